#!/bin/bash
# Train on several machines under Slurm, a process for each GPU: sbatch docs/slurm.sh
# After a time limit or a failed machine, submit it again: it goes on from the newest checkpoint.
#SBATCH --job-name=evit
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
# GPUs of a node, not of a task: each process must see all of its machine's and takes its own.
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=14
#SBATCH --time=24:00:00
# SIGTERM two minutes before the end: the run writes a checkpoint and ends with status 143.
#SBATCH --signal=TERM@120
#SBATCH --requeue

set -euo pipefail

# Where the processes meet, which srun does not say: the first machine, and a port that follows from the job.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# One thread a process beside its loading workers; otherwise every process starts one for each core.
export OMP_NUM_THREADS=1

# The folder must be one that all machines share.
srun --kill-on-bad-exit=1 evit train --recipe imagenet-300 --data "$DATA/imagenet" \
    --output "$HOME/runs/imagenet-300" --workers 12 --checkpoint-every 1000 --no-progress
