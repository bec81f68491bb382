#!/usr/bin/env bash
# Makes an environment and runs the whole test suite: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
locks="core tests"
source scripts/environment.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# One process per core, with one thread each: with two threads each, they would wait for each other.
export OMP_NUM_THREADS=1
"$PYTHON" -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadgroup "$@"
