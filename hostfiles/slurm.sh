#!/bin/bash
# A run under Slurm, without ssh and without a shared disk: one task a node starts that node's ranks.
#
#     sbatch hostfiles/slurm.sh axiom-380m                       # nodes, devices and time: below, or flags of sbatch
#     sbatch --nodes=4 hostfiles/slurm.sh slm-10m --micro-batch auto
#
# Two minutes before the job's time is up Slurm sends SIGTERM to the ranks: they save and leave, and the job is queued
# again. The same happens when a node fails (--requeue). Ranks a node: the GPUs of --gpus-per-node, or 1 on its CPU.
# RUN_DIR=... names another run folder than runs/RECIPE.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

recipe=${1:?"expected: sbatch hostfiles/slurm.sh RECIPE [flags of ds_slm/pretrain.py]"}
run=${RUN_DIR:-runs/$(basename "$recipe" .toml)}
flags=("${@:2}")

cd "$SLURM_SUBMIT_DIR" || exit 2
[ -d .venv ] && . .venv/bin/activate

# On every node: the hosts of this job as a hostfile, then DeepSpeed's launcher. Told to end, the launcher's runner would
# die at once and take the ranks along, so it does not listen: the ranks do.
began=$(mktemp) # signs of an earlier launch are older
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
srun bash -c '
    trap "" TERM
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    hostfile=$(mktemp) && trap "rm -f $hostfile" EXIT
    printf "%s slots=${SLURM_GPUS_ON_NODE:-1}\n" $hosts > "$hostfile"
    deepspeed --no_ssh --node_rank "$SLURM_NODEID" --hostfile "$hostfile" \
        --master_addr "${hosts%%[[:space:]]*}" --master_port "$MASTER_PORT" "$@"
' deepspeed ds_slm/pretrain.py --recipe "$recipe" --run-dir "$run" "${flags[@]}"
code=$?

# The run folder says how it ended: finished, stopped with everything saved, or failed.
if [ "$code" = 0 ] && [ -f "$run/done.json" ]; then
    exit 0
elif [ "$run/stopped.json" -nt "$began" ]; then
    scontrol requeue "$SLURM_JOB_ID" # the same command goes on behind the last step
else
    exit $((code ? code : 1))
fi
