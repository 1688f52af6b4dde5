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

Environment:
  PYTHON        interpreter that makes a new .venv, 3.10 or later (default: python3)
  TORCH_INDEX   package index for torch and torchvision, or "default" for pip's own
                (default: PyTorch's CPU index on Linux without an NVIDIA GPU if it answers, else pip's own)
  CLIP_SOURCE   "git" for OpenAI's repository, "pypi" for clip-anytorch (default: git if it answers, else pypi)
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
fingerprint() { cat setup.sh requirements*.txt | cksum; }

# The stamp's lines: fingerprint, index that torch came from, source that CLIP came from.
stamped() { [ ! -f "$STAMP" ] || sed -n "$1p" "$STAMP"; }

# An override that is not given keeps what was chosen before.
is_done() {
  [ "$(stamped 1)" = "$(fingerprint)" ] &&
    [ "${TORCH_INDEX:-$(stamped 2)}" = "$(stamped 2)" ] &&
    [ "${CLIP_SOURCE:-$(stamped 3)}" = "$(stamped 3)" ]
}
dev_is_done() { [ -f "$STAMP-dev" ] && [ "$(cat "$STAMP-dev")" = "$(fingerprint)" ]; }

# Before anything is downloaded: a wrong word should not cost minutes.
check_overrides() {
  case ${CLIP_SOURCE:-git} in git | pypi) ;; *) fail "CLIP_SOURCE is git or pypi, not $CLIP_SOURCE" 2 ;; esac
}

check_python() {
  command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON; name an interpreter: PYTHON=python3.12 ./setup.sh"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$PYTHON is older than Python 3.10; name another one: PYTHON=python3.12 ./setup.sh"
}

make_venv() {
  local way_out="start again with: rm -rf .venv && ./setup.sh"
  if [ ! -x "$VENV_PYTHON" ]; then
    say "making .venv with $("$PYTHON" --version)"
    "$PYTHON" -m venv .venv || fail "no .venv could be made (Debian and Ubuntu: install python3-venv); $way_out"
  fi
  # an interrupted run, or another tool, leaves a .venv without pip
  pip --version >/dev/null 2>&1 || "$VENV_PYTHON" -m ensurepip >/dev/null || fail ".venv has no pip; $way_out"
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
    say "no NVIDIA GPU, but PyTorch's CPU index does not answer" >&2
    printf default
  fi
}

# Both in one command and from one place: a torch and a torchvision of different builds do not fit each other.
install_torch() {
  local index=$1 before=$2
  if [ -n "$before" ] && [ "$index" != "$before" ]; then
    # pip keeps what is there, wherever it came from
    pip uninstall --quiet --yes torch torchvision
  fi
  if [ "$index" = default ]; then
    say "installing torch and torchvision from the default index (may be some GB)"
    pip install --quiet "torch>=2.6" torchvision
  else
    say "installing torch and torchvision from $index"
    pip install --quiet --index-url "$index" "torch>=2.6" torchvision
  fi
}

# macOS has no timeout; git then gives up when the connection does.
git_answers() {
  local limit=()
  if command -v timeout >/dev/null; then limit=(timeout 8); fi
  GIT_TERMINAL_PROMPT=0 ${limit[@]+"${limit[@]}"} git ls-remote --quiet "$CLIP_GIT" HEAD >/dev/null 2>&1
}

clip_source() {
  if [ -n "${CLIP_SOURCE:-}" ]; then
    printf '%s' "$CLIP_SOURCE"
  elif git_answers; then
    printf git
  else
    say "OpenAI's CLIP repository does not answer" >&2
    printf pypi
  fi
}

# CLIP's setup.py imports pkg_resources, which setuptools 81 no longer has. Only building it needs that.
install_clip_from_git() {
  say "installing CLIP from $CLIP_GIT"
  pip install --quiet wheel "setuptools<81" &&
    GIT_TERMINAL_PROMPT=0 pip install --quiet --no-deps --no-build-isolation "git+$CLIP_GIT"
}

# Both without their dependencies: those are in requirements.txt, and the torch that is installed stays.
# Both are the module clip, so one goes before the other comes.
install_clip() {
  CLIP_INSTALLED=$(clip_source)
  pip uninstall --quiet --yes clip clip-anytorch >/dev/null 2>&1
  if [ "$CLIP_INSTALLED" = git ]; then
    if install_clip_from_git; then return; fi
    say "that failed"
    CLIP_INSTALLED=pypi
  fi
  say "installing CLIP from PyPI (clip-anytorch)"
  pip install --quiet --no-deps clip-anytorch
}

install_all() {
  local before index
  before=$(stamped 2)
  index=$(torch_index)
  rm -f "$STAMP" # half an installation is none
  install_torch "$index" "$before"
  say "installing the other packages"
  pip install --quiet -r requirements.txt
  install_clip
  printf '%s\n' "$(fingerprint)" "$index" "$CLIP_INSTALLED" >"$STAMP"
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
        "or install both together: .venv/bin/python -m pip install --force-reinstall torch torchvision && ./setup.sh"
    )
import filelock, huggingface_hub, matplotlib, numba, numpy, PIL, psutil, pyarrow, pydantic, safetensors, simplejpeg, tqdm
from torch.utils.tensorboard import SummaryWriter

from cliptune.runtime.openai_clip import import_clip

clip = import_clip()
clip.tokenize(["a photo"])
device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
versions = {m.__name__: m.__version__ for m in (torch, torchvision, numpy, PIL, matplotlib, pydantic, safetensors, tqdm)}
print("setup: Python", platform.python_version(), *(f"{name} {version}" for name, version in versions.items()))
print("setup: clip", clip.__file__)
print("setup: device", device)
PY
}

main() {
  read_options "$@"
  check_overrides
  check_python
  if is_done; then say "everything is installed already; checking it"; else make_venv; install_all; fi
  if [ "$DEV" = yes ] && ! dev_is_done; then install_dev; fi
  check || { rm -f "$STAMP" "$STAMP-dev"; exit 1; }
  say "ready; next: .venv/bin/python train.py --help, or the README's quick start"
}

main "$@"
