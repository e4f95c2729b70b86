#!/usr/bin/env bash
# Command 2: set-up, code style, tests, one process for each core. Arguments go to pytest: ./runtests.sh -k masking
# ./runtests.sh --slow: the tests that this leaves out.
# ./runtests.sh --label: the tests of a real MONAI Label server, in an environment of their own (8 GB).
set -euo pipefail
cd "$(dirname "$0")"
if [ "${1:-}" = --label ]; then
  shift
  python=$(command -v python3 || command -v python)
  [ -x .venv-label/bin/python ] || "$python" -m venv .venv-label
  # shellcheck disable=SC1091
  . .venv-label/bin/activate
  wanted=$(cat requirements-label.txt pyproject.toml | cksum)
  if [ "$(cat .venv-label/installed 2>/dev/null)" != "$wanted" ]; then
    echo "installing requirements-label.txt into .venv-label (a few minutes, once)"
    pip install --quiet --disable-pip-version-check --no-deps -r requirements-label.txt
    pip install --quiet --disable-pip-version-check --no-deps -e .
    echo "$wanted" >.venv-label/installed
  fi
  exec python -m pytest tests/label "$@"
fi
marked="not slow"
if [ "${1:-}" = --slow ]; then
  shift
  marked=slow
fi
. ./setup.sh
ruff check .
ruff format --check .
python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m "$marked" "$@"
