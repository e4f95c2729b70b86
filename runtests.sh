#!/usr/bin/env bash
# Command 2: set-up, code style, every test. Arguments go to pytest: ./runtests.sh -k masking
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh
ruff check .
ruff format --check .
python -m pytest "$@"
