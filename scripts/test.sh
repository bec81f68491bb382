#!/usr/bin/env bash
# Makes an environment and runs the whole test suite: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
extras="pytest==9.2.0 ruff==0.17.6 fastapi==0.165.0 uvicorn==0.54.0 transformers==5.23.0"
extras="$extras eccv_caption==0.1.0"
source scripts/environment.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest -q "$@"
