#!/usr/bin/env bash
# Fine-tune a base on the hosts of hostfiles/two_node; its comments say what every host needs, and BASE besides.
#     sft/launch_two_node.sh [BASE [RECIPE]] [flags of sft/train.py]
# BASE and RECIPE may come from the environment. Paths are those of the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -gt 0 && $1 != -* ]]; then BASE=$1 && shift; fi
if [[ $# -gt 0 && $1 != -* ]]; then RECIPE=$1 && shift; fi

exec deepspeed --hostfile hostfiles/two_node sft/train.py \
    --recipe "${RECIPE:-axiom-380m-instruct}" --base "${BASE:-runs/axiom-380m}" "$@"
