#!/usr/bin/env bash
# Make .venv and install the project into it: `bash launch/install.sh [EXTRA]`. Skips what is done.
set -euo pipefail
cd "$(dirname "$0")/.."

extra="${1:-}"
torch_version="2.13.0"
venv=".venv"
stamp="$venv/installed${extra:+-$extra}"
gpu=""
if nvidia-smi -L >/dev/null 2>&1; then gpu="gpu"; fi
wanted="$(cat pyproject.toml constraints.txt launch/install.sh | cksum)${gpu:+ $gpu}"

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed, $python is not; name another one with PYTHON=..." >&2
    exit 2
fi
if [ ! -x "$venv/bin/pip" ]; then
    echo "making $venv"
    "$python" -m venv "$venv"
fi

pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check "$@"
}

# torch first and on its own. `===` takes the index's own build, which is the one for GPUs; the CPU build, where an index
# offers it, spares a machine without a GPU some gigabytes.
echo "installing torch $torch_version"
if [ -n "$gpu" ]; then
    pip install -qq "torch===$torch_version" || pip install -qq "torch==$torch_version"
else
    pip install -qq "torch==$torch_version+cpu" 2>/dev/null || pip install -qq "torch==$torch_version"
fi
echo "installing the project${extra:+ with its $extra tools}"
pip install -qq --constraint constraints.txt --editable ".${extra:+[$extra]}"
# Extra tools come on top of the rest, which is then there as well.
echo "$wanted" | tee "$venv/installed" >"$stamp"
