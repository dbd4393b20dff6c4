#!/usr/bin/env bash
# Fine-tune a base on this machine: every GPU, or two processes on a machine without one.
#     sft/launch_local.sh [BASE [RECIPE]] [flags of sft/train.py]
# BASE and RECIPE may come from the environment. Paths are those of the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -gt 0 && $1 != -* ]]; then BASE=$1 && shift; fi
if [[ $# -gt 0 && $1 != -* ]]; then RECIPE=$1 && shift; fi

devices=()
has_gpu=$(python -c 'import torch; print(torch.cuda.is_available())') || {
    echo "python with torch is not on the PATH: . .venv/bin/activate" >&2
    exit 2
}
if [[ $has_gpu != True ]]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}"
    devices=(--num_accelerators 2)
fi
exec deepspeed ${devices[@]+"${devices[@]}"} sft/train.py \
    --recipe "${RECIPE:-axiom-380m-instruct}" --base "${BASE:-runs/axiom-380m}" "$@"
