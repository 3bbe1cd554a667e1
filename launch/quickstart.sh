#!/usr/bin/env bash
# Install, then distil a pruned student out of the embedded teacher on two processes: `bash launch/quickstart.sh [KEY=VALUE ...]`.
# Run again, it skips what is done and goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/install.sh
# More threads a process than cores make every matrix product wait for the others.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m launch.torchrun --nproc-per-node 2 -m launch.distill experiment=quickstart "$@"
