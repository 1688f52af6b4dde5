"""`export.py`: a run's checkpoint in the forms of other libraries, each loaded by its library in a fresh process."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clip_model import CLIPModel, add_self_test
from cliptune.export import forms
from cliptune.export.card import USE, usage
from cliptune.export.folder import MARKER
from cliptune.export.forms import FORMS
from cliptune.export.onnx import cost_of_rounding
from cliptune.export.verify import Differences
from cliptune.language.catalogue import language_of
from cliptune.model.checkpoint_file import save_checkpoint
from export import main
from tests.export.test_fold import projected
from tests.helpers.models import small_architectures

__all__ = ["small_architectures"]

ROOT = Path(__file__).parent.parent


def saved(model: CLIPModel, path: Path) -> Path:
    state = {"model_state_dict": model.state_dict(), "architecture": model.architecture.to_dict()}
    about = {"epoch": 1, "global_step": 0, "config": {}, "val_images": []}
    save_checkpoint(path, add_self_test({**state, **about}))
    return path


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification without a process of its own, which is what makes it slow."""
    differences = Differences(1e-7, 2e-7, 1 / 255, True)
    monkeypatch.setattr("export.verify", lambda *arguments, **options: differences)


def test_a_run_is_exported_with_its_card(
    trained_dir: Path, written: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["--checkpoint", str(trained_dir), "--to", "open_clip", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"exported: {folder}, loaded by open_clip in a process of its own" in out
    assert "images 1.0e-07, texts 2.0e-07, pixels 1.00/255 (at most 1e-05, 1e-05 and 1/255)" in out
    results = json.loads((trained_dir / "results" / "training_results.json").read_text())
    card = (folder / "README.md").read_text()
    assert f"| this model | {results['metrics']['i2t_r1']:.1f} |" in card
    assert "RSum" in re.search(r"## How it did\n\n(.*)", card)[1]  # type: ignore[index]
    assert "| `learning_rate` | `0.001` |" in card
    assert "cuts out one pixel beside" in card
    assert "## Licence\n\nTo be filled in" in card
    assert USE["open_clip"].replace("exported/open_clip", "out") in card
    assert str(tmp_path) not in card
    assert str(trained_dir) not in card + (folder / MARKER).read_text()  # nobody's folders travel
    again = CLIPModel(pretrained=folder).eval()
    original = CLIPModel.from_checkpoint(trained_dir / "model-checkpoint" / "best_model.pth")
    with torch.no_grad():
        assert (again.encode_text(["a cat"]) - original.encode_text(["a cat"])).abs().max() < 1e-6

    assert main(["--checkpoint", str(trained_dir), "--to", "open_clip", str(folder)]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert main(["--checkpoint", str(trained_dir), "--to", "open_clip", str(folder), "--overwrite"]) == 0


@pytest.mark.slow
def test_without_a_folder_it_goes_below_exported(
    trained_dir: Path, written: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--checkpoint", str(trained_dir), "--to", "openai"]) == 0
    assert (tmp_path / "exported" / "openai" / "model.pt").is_file()
    assert USE["openai"] in (tmp_path / "exported" / "openai" / "README.md").read_text()


@pytest.mark.parametrize("form", FORMS)
def test_a_card_names_the_folder_that_was_written(form: str) -> None:
    assert usage(form, Path("exported", form)) == USE[form]
    for name in ("mine/猫", "it's", 'a "b"', """a 'b' "c\\d\n"""):
        nodes = ast.walk(ast.parse(usage(form, Path(name))))
        strings = [node.value for node in nodes if isinstance(node, ast.Constant)]
        assert name in strings or f"{name}/model.pt" in strings
    assert '"mine' in usage(form, Path("/home/me/mine"))
    assert "/home" not in usage(form, Path("/home/me/mine"))


@pytest.mark.slow
def test_weights_of_others_are_exported(written: None, tmp_path: Path) -> None:
    """An export among them."""
    path = saved(projected("ViT-Mini", 48), tmp_path / "model.pth")
    assert main(["--checkpoint", str(path), "--to", "open_clip", str(tmp_path / "a")]) == 0
    assert main(["--checkpoint", str(tmp_path / "a"), "--to", "open_clip", str(tmp_path / "b")]) == 0
    models = [CLIPModel(pretrained=each).eval() for each in (path, tmp_path / "b")]
    with torch.no_grad():
        features = [each.encode_text(["a cat"]) for each in models]
    assert (features[0] - features[1]).norm() < 1e-6
    assert "Nothing is recorded of it" in (tmp_path / "b" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "tensorflow"], "--to: expected one of transformers, open_clip"),
        (["--to", "open_clip", "a", "b"], "and a folder behind it, got 'open_clip a b'"),
        (["--to", "open_clip", "--quantize", "int8"], "quantize is about graphs: it needs --to onnx"),
        (["--to", "open_clip", "--onnx_files", "one"], "onnx_files is about graphs"),
        (["--to", "open_clip", "--checkpoint", "nothing.pth"], "no such checkpoint: nothing.pth"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_resnet_says_what_can_hold_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(projected("RN-Ti", 64), tmp_path / "model.pth")
    assert main(["--checkpoint", str(path), "--to", "transformers", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "its image tower is a ResNet" in error
    assert "These can hold it: open_clip, onnx, openai" in error
    assert [each.name for each in tmp_path.iterdir()] == ["model.pth"]


def test_a_missing_library_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(forms.importlib.util, "find_spec", lambda name: None)
    assert main(["--checkpoint", "nothing", "--to", "sentence-transformers", str(tmp_path / "out")]) == 2
    assert "pip install transformers sentence-transformers" in capsys.readouterr().err


def test_an_export_that_is_not_the_checkpoint_is_removed(
    trained_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise ValueError("does not give what the checkpoint gives")

    monkeypatch.setattr("export.verify", refuse)
    assert main(["--checkpoint", str(trained_dir), "--to", "open_clip", str(tmp_path / "out")]) == 2
    assert "does not give what the checkpoint gives" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_wrong_activation_is_found_out(trained_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library in a real process: what is written wrongly must not be announced."""
    pytest.importorskip("open_clip")
    write = FORMS["open_clip"].write
    assert write is not None

    def tampered(weights: Any, folder: Path) -> None:
        write(weights, folder)
        path = folder / "open_clip_config.json"
        path.write_text(path.read_text().replace('"quick_gelu": true', '"quick_gelu": false'))

    monkeypatch.setitem(FORMS, "open_clip", FORMS["open_clip"]._replace(write=tampered))
    assert main(["--checkpoint", str(trained_dir), "--to", "open_clip", str(tmp_path / "out")]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_verified_and_loads_as_its_card_says(
    form: str, trained_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Export, then the code of docs/EXPORT.md in a process of its own, in a folder with a photo."""
    if form != "openai":
        pytest.importorskip({"sentence-transformers": "sentence_transformers"}.get(form, form))
    assert USE[form] in (ROOT / "docs" / "EXPORT.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    flags = ["--quantize", "int8"] if form == "onnx" else []
    assert main(["--checkpoint", str(trained_dir), "--to", form, *flags]) == 0
    out = capsys.readouterr().out
    assert "in a process of its own" in out
    assert form != "onnx" or re.search(r"Quantised graphs .* RSum [\d.]+ instead of [\d.]+ \([+-]", out)
    assert form != "onnx" or "fewer than 50 images tell little" in (tmp_path / "exported/onnx/README.md").read_text()
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.jpg", quality=95)
    code = USE[form]
    if form == "openai":  # whose PyPI form asks for a module that newer setuptools lack
        code = "from cliptune.runtime.openai_clip import import_clip; import_clip()\n" + code
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    numbers = [float(number) for number in re.findall(r"\d\.\d+(?:e-\d+)?", done.stdout)]
    assert len(numbers) == 2
    if form != "sentence-transformers":  # which gives cosines
        model = CLIPModel.from_checkpoint(trained_dir / "model-checkpoint" / "best_model.pth")
        expected = model.classify("photo.jpg", ["cat", "dog"])[0]
        assert numbers == pytest.approx([expected["cat"], expected["dog"]], abs=5e-3)


def test_what_rounding_costs_is_said_with_its_number_of_images() -> None:
    (line,) = cost_of_rounding(510.0, 505.25, num_images=50)
    assert line == "Quantised graphs (`*_int8.onnx`): RSum 505.2 instead of 510.0 (-4.8) on 50 validation images."
    lines = cost_of_rounding(500.0, 450.0, num_images=6)
    assert lines[0].endswith("(-50.0) on 6 validation images.")
    assert "fewer than 50 images tell little of what they cost" in lines[1]
    in_chinese = language_of("zh").say_lines("\n".join(lines)).splitlines()
    assert in_chinese[0].startswith("量化图")
    assert in_chinese[1].startswith("量化图：不足 50 张图像")


@pytest.mark.slow
def test_both_towers_in_one_graph(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    path = saved(projected("RN-Ti", 48), tmp_path / "model.pth")
    flags = ["--to", "onnx", str(tmp_path / "out"), "--onnx_files", "one", "--quantize", "int8"]
    assert main(["--checkpoint", str(path), *flags]) == 0
    assert {each.name for each in (tmp_path / "out").glob("*.onnx")} == {"model.onnx", "model_int8.onnx"}
    assert "was not measured" in (tmp_path / "out" / "README.md").read_text()
    sys.path.insert(0, str(tmp_path / "out"))
    try:
        runner = __import__("clip_onnx").CLIP(tmp_path / "out")
    finally:
        sys.path.pop(0)
    clear = Image.fromarray(np.random.default_rng(1).integers(0, 256, (70, 90, 4), dtype=np.uint8), "RGBA")
    model = CLIPModel.from_checkpoint(path)
    with torch.no_grad():
        wanted = model.encode_image(clear).numpy(), model.encode_text(["a", "b"]).numpy()
    assert np.linalg.norm(runner.encode_image([clear]) - wanted[0]) < 1e-5
    assert np.linalg.norm(runner.encode_text(["a", "b"]) - wanted[1]) < 1e-5


@pytest.mark.slow
def test_a_sentence_transformers_folder_is_read_here(trained_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    folder = tmp_path / "out"
    assert main(["--checkpoint", str(trained_dir), "--to", "sentence-transformers", str(folder)]) == 0
    models = [CLIPModel(pretrained=folder), CLIPModel(pretrained=trained_dir / "model-checkpoint" / "best_model.pth")]
    with torch.no_grad():
        features = [model.eval().encode_text(["a cat"]) for model in models]
    assert (features[0] - features[1]).norm() < 1e-6
