#!/bin/bash
# One training over all GPUs of a SLURM job: sbatch docs/slurm.sh --data.path photos/ --out runs/photos ...
# The arguments are those of `vimoe train`. After a limit of time or a failure: sbatch docs/slurm.sh --resume runs/photos
#SBATCH --job-name=vimoe
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
set -euo pipefail

# torchrun starts one process for each GPU of a machine; they meet at the first machine of the job
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:29500" \
    -m vimoe train "$@"
