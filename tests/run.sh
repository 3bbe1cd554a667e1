#!/usr/bin/env bash
# Install with the test tools, then check style, import directions and behaviour: `bash tests/run.sh [PYTEST ARGUMENTS]`.
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/install.sh test
export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports --no-cache
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest -m "not slow" "$@"
fi
# Two files at a time: most tests keep one core busy.
.venv/bin/python -m pytest -m "not slow and not alone" --numprocesses 2 --dist loadfile
exec .venv/bin/python -m pytest -m "alone and not slow"
