#!/usr/bin/env bash
# On a GPU machine without a network: install what was brought along in .whl/ (benchmarks/wheels.py) into python3's own
# environment, then measure. Flags go to benchmarks/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
begin=$SECONDS
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1

python3 -m pip install --quiet --no-deps .whl/*.whl
python3 -m pip install --quiet --no-deps --no-build-isolation --editable .
PATH=$(python3 -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
export PATH

# What is still missing is told, not fatal: a check that needs it will say so.
python3 -m pip check 2>&1 | grep -i '^ds-slm' || true
echo "installed after $((SECONDS - begin)) s"
exec python3 benchmarks/gpu.py --seconds "$((480 - (SECONDS - begin)))" "$@"
