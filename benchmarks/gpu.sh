#!/bin/sh
# What the toolkit does on a GPU, part by part: benchmarks/gpu.sh [PART...]; benchmarks/gpu.sh --help lists them.
cd "$(dirname "$0")/.." || exit 1
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
exec "$PYTHON" benchmarks/gpu.py "$@"
