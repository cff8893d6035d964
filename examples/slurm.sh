#!/bin/bash
# nGPT 1B at 4k on 8 nodes of 8 GPUs: sbatch examples/slurm.sh
# Designed, not measured: the development machine has no Slurm. The shell's syntax is tested.
#SBATCH --job-name=ngpt-1b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --output=%x-%j.out
set -euo pipefail

OUT=${OUT:-$PWD/runs/ngpt-1b}
DATA=${DATA:-$PWD/data/openwebtext}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Go on with the run where there is one.
RESUME=()
if [ -e "$OUT/config.json" ]; then
    RESUME=(--resume)
fi

# Slurm sends USR1 120 seconds before the time is up, to torchrun, which passes it on to its processes.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node=8 \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$HEAD:29500" \
    --max-restarts=3 \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m spherelm train \
    --arm ngpt --preset 1b-4k --recipe paper --micro-batch-size 2 --dtype bfloat16 --strategy hybrid \
    --data "$DATA" --out "$OUT" --save-every 500 "${RESUME[@]}"
