#!/usr/bin/env bash
# Make .venv and install everything the toolkit needs. See --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

PYTHON=${PYTHON:-python3}
VENV_PYTHON=.venv/bin/python
STAMP=.venv/.setup-stamp
CPU_INDEX=https://download.pytorch.org/whl/cpu
CLIP_GIT=https://github.com/openai/CLIP.git
DEV=no

usage() {
  cat <<'TEXT'
usage: ./setup.sh [--dev] [--help]

Makes .venv and installs PyTorch, CLIP and the other packages. Run again, it checks and changes nothing.

  --dev    add the test tools and the peers that the tests compare with
  --help   this text

Environment: PYTHON (interpreter, default python3), TORCH_INDEX (a package index for PyTorch, or "default"),
CLIP_SOURCE ("git" or "pypi").
TEXT
}

say() { printf '%s\n' "setup: $*"; }
fail() { printf '%s\n' "setup: error: $*" >&2; exit "${2:-1}"; }
pip() { "$VENV_PYTHON" -m pip --disable-pip-version-check "$@"; }

read_options() {
  local option
  for option in "$@"; do
    case $option in
      --dev) DEV=yes ;;
      --help | -h) usage; exit 0 ;;
      *) printf '%s\n' "setup: error: unknown option $option" >&2; usage >&2; exit 2 ;;
    esac
  done
}

# What the environment was made from. --dev is left out: it only adds packages, and has a stamp of its own.
fingerprint() { cat setup.sh requirements.txt requirements-dev.txt | cksum; }

is_done() { [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ]; }
dev_is_done() { [ -f "$STAMP-dev" ] && [ "$(cat "$STAMP-dev")" = "$(fingerprint)" ]; }

make_venv() {
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$PYTHON is older than Python 3.10; name another one: PYTHON=python3.12 ./setup.sh"
  [ -x "$VENV_PYTHON" ] || { say "making .venv with $("$PYTHON" --version)"; "$PYTHON" -m venv .venv; }
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; }

# Asked before pip is, which would try an unreachable index again and again.
answers() {
  "$VENV_PYTHON" - "$1" <<'PY' >/dev/null 2>&1
import os, sys, threading, urllib.request
threading.Timer(6, os._exit, [1]).start()  # a name look-up has no time limit of its own
urllib.request.urlopen(sys.argv[1], timeout=5).close()
os._exit(0)
PY
}

torch_index() {
  if [ -n "${TORCH_INDEX:-}" ]; then
    printf '%s' "$TORCH_INDEX"
  elif [ "$(uname -s)" != Linux ] || has_nvidia_gpu; then
    printf default
  elif answers "$CPU_INDEX/torch/"; then
    printf '%s' "$CPU_INDEX"
  else
    printf default
  fi
}

# Both in one command and from one place: a torch and a torchvision of different builds do not fit each other.
install_torch() {
  local index
  index=$(torch_index)
  if [ "$index" = default ]; then
    say "installing torch and torchvision from the default index (may be some GB)"
    pip install --quiet "torch>=2.6" torchvision
  else
    say "installing torch and torchvision from $index"
    pip install --quiet --index-url "$index" "torch>=2.6" torchvision
  fi
}

git_answers() {
  GIT_TERMINAL_PROMPT=0 timeout 8 git ls-remote --quiet "$CLIP_GIT" HEAD >/dev/null 2>&1
}

# Without its dependencies: those are in requirements.txt, and the torch that is installed stays.
install_clip() {
  local source=${CLIP_SOURCE:-}
  [ -n "$source" ] || { if git_answers; then source=git; else source=pypi; fi; }
  case $source in
    git)
      say "installing CLIP from $CLIP_GIT"
      # its setup.py imports pkg_resources, which is in the setuptools installed here
      pip install --quiet wheel
      pip install --quiet --no-deps --no-build-isolation "git+$CLIP_GIT" && return
      say "that failed; installing clip-anytorch from PyPI instead" ;;
    pypi) say "installing CLIP from PyPI (clip-anytorch)" ;;
    *) fail "CLIP_SOURCE is git or pypi, not $source" 2 ;;
  esac
  pip install --quiet --no-deps clip-anytorch
}

install_all() {
  install_torch
  say "installing the other packages"
  pip install --quiet -r requirements.txt
  install_clip
  fingerprint >"$STAMP"
}

install_dev() {
  say "installing the test tools"
  pip install --quiet -r requirements-dev.txt
  fingerprint >"$STAMP-dev"
}

check() {
  "$VENV_PYTHON" -W ignore - <<'PY'
import platform, sys

try:
    import torch, torchvision
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except (ImportError, RuntimeError, AttributeError) as error:
    sys.exit(
        f"setup: error: torch and torchvision do not fit each other ({str(error).splitlines()[0]}).\n"
        "They must come from the same place. Start again with: rm -rf .venv && ./setup.sh\n"
        "or install both together: .venv/bin/python -m pip install --force-reinstall torch torchvision"
    )
import clip, matplotlib, numpy, PIL, pydantic, safetensors, tqdm
from torch.utils.tensorboard import SummaryWriter

clip.tokenize(["a picture"])
device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
versions = {m.__name__: m.__version__ for m in (torch, torchvision, numpy, PIL, matplotlib, pydantic, safetensors, tqdm)}
print("setup: Python", platform.python_version(), *(f"{name} {version}" for name, version in versions.items()))
print("setup: clip", clip.__file__)
print("setup: device", device)
PY
}

main() {
  read_options "$@"
  if is_done; then say "everything is installed already; checking it"; else make_venv; install_all; fi
  if [ "$DEV" = yes ] && ! dev_is_done; then install_dev; fi
  check || { rm -f "$STAMP" "$STAMP-dev"; exit 1; }
  say "ready; next: .venv/bin/python train.py --help, or the README's quick start"
}

main "$@"
