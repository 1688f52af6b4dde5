"""The house rules of docs/ARCHITECTURE.md, held against the code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found & MODULES.keys()


def table() -> dict[str, str]:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `(\w+)\.py` \| [^|]+ \|\s*([^|]*)\|$", text, re.MULTILINE))


def test_the_page_lists_every_module_in_order_of_import() -> None:
    rows = table()
    assert rows.keys() == MODULES.keys()
    for number, (name, listed) in enumerate(rows.items()):
        above = set(list(rows)[:number])
        assert imports_of(MODULES[name]) <= above, name
        if name != "train":
            assert imports_of(MODULES[name]) == set(re.findall(r"\w+", listed)), name


def test_nobody_imports_train() -> None:
    assert not [name for name, path in MODULES.items() if "train" in imports_of(path)]


@pytest.mark.parametrize("name", ["config", "visualization", "annotations", "sample_data"])
def test_light_modules_stay_light(name: str) -> None:
    code = f"import {name}, sys; sys.exit(bool({{'torch', 'clip', 'matplotlib.figure'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_importing_everything_prints_and_writes_nothing(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(MODULES)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
