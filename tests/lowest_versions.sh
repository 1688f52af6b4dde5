#!/usr/bin/env bash
# The fast tests on the lowest versions that pyproject.toml allows, in an environment of its own (some GB of downloads).
#   tests/lowest_versions.sh [FOLDER]     FOLDER: where the environment is made (default: a temporary one)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
FOLDER=${1:-$(mktemp -d)}

"$PYTHON" -m venv "$FOLDER/venv"
# each bound `name>=1.2` becomes `name==1.2`, of the toolkit and of what export.py and search.py need; the tests' own
# tools are the newest, and the tests of what is not installed skip
"$FOLDER/venv/bin/python" - >"$FOLDER/lowest.txt" <<'PY'
from pathlib import Path

from pip._vendor import tomli

project = tomli.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
print("\n".join(line.replace(">=", "==") for line in project["dependencies"] + extras["search"] + extras["export"]))
PY
# later versions of pyparsing warn of how matplotlib 3.8 calls them, and a test asks for no warning
"$FOLDER/venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$FOLDER/lowest.txt" \
  httpx hypothesis import-linter ipykernel nbclient pandas pytest pytest-cov pytest-timeout "setuptools>=77" "pyparsing<3.3"
"$FOLDER/venv/bin/python" -m pip list --disable-pip-version-check
"$FOLDER/venv/bin/python" -m pytest -m "not slow" -p no:cacheprovider
