#!/bin/bash
# One training on several nodes under SLURM: torchrun starts one process a card, and accelerate joins them.
#
#   sbatch examples/slurm.sh my-recipe.yaml
#
# All nodes need this checkout, its environment, and one shared folder for the cache and the runs.
# A job that was killed or preempted goes on from its last checkpoint when it is started again.
#SBATCH --job-name=limbeck
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=limbeck-%j.log
set -euo pipefail

RECIPE=${1:?the recipe is missing: sbatch examples/slurm.sh RECIPE}
SHARED=${SHARED:-$SLURM_SUBMIT_DIR}
export LIMBECK_CACHE=${LIMBECK_CACHE:-$SHARED/cache}
export OMP_NUM_THREADS=4

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# The plan refuses a batch that so many processes cannot share, before any card waits for it.
limbeck plan "$RECIPE" --nodes "$SLURM_NNODES" --gpus 4

srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" \
  --nproc_per_node 4 \
  --rdzv_id "$SLURM_JOB_ID" \
  --rdzv_backend c10d \
  --rdzv_endpoint "${nodes[0]}:29500" \
  -m limbeck run "$RECIPE" --out "$SHARED/runs/$(basename "$RECIPE" .yaml)"
