#!/usr/bin/env bash
# Stage 2, shrinking: both adapters and LoRA.
#
#   sbatch [sbatch options] slurm/stage2.sh [--recipe FILE] [key=value ...]     from the project's root; all stages: slurm/chain.sh
#
# --recipe FILE: default train/recipes/stage2.yaml, or the variable RECIPE. Nodes, GPUs and time are in this file: docs/slurm.md.
# example: sbatch --nodes=1 slurm/stage2.sh optim.steps=20000
#SBATCH --job-name=soundwave-2
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
# shellcheck disable=SC2034,SC2153  # variables that common.sh reads and sets
# ---- edit from here (a line with ## is off) -----------------------------------------------------------------------------
##SBATCH --partition=gpu
##SBATCH --account=project
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
##SBATCH --gres=gpu:8  # instead, where --gpus-per-node is not known
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
RECIPE=${RECIPE:-train/recipes/stage2.yaml}
ENVIRONMENT=venv:.venv  # venv:DIR | conda:NAME | apptainer:FILE.sif | pyxis:IMAGE
# ---- to here; what each line means is in docs/slurm.md --------------------------------------------------------------------

# Slurm runs a copy of this file from a folder of its own, and starts it in the folder where sbatch was called. --frozen FOLDER is
# what slurm/chain.sh puts first.
CODE=$PWD
if [ "${1:-}" = --frozen ]; then CODE=$2/code; fi
# shellcheck source=/dev/null
source "$CODE/slurm/common.sh" \
    || { echo "error: no slurm/common.sh in $CODE: call sbatch from the project's root; a frozen copy that was deleted needs a new submission" >&2; exit 2; }
run_stage "$@"
