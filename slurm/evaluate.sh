#!/usr/bin/env bash
# Score a model folder on packed shards, with every GPU of the job.
# From the project's root: sbatch slurm/evaluate.sh --model runs/x/sft/model --shards /shards/test --task asr ...
# (options: python -m evaluation.run --help). What is predicted is on disk at once: a job that was stopped goes on.
#SBATCH --job-name=soundwave-evaluate
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
# ---- edit from here (a line with ## is off) -----------------------------------------------------------------------------
##SBATCH --partition=gpu
##SBATCH --account=project
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
##SBATCH --gres=gpu:8  # instead, where --gpus-per-node is not known
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=4:00:00
ENVIRONMENT=venv:.venv  # venv:DIR | conda:NAME | apptainer:FILE.sif | pyxis:IMAGE
# ---- to here; what each line means is in docs/slurm.md --------------------------------------------------------------------

# shellcheck source=slurm/common.sh
source "${SOUNDWAVE_CODE:-$PWD}/slurm/common.sh" \
    || { echo "error: no slurm/common.sh in $PWD: call sbatch from the project's root" >&2; exit 2; }
[ -n "${SLURM_JOB_ID:-}" ] || die "submit this with sbatch from the project's root"
export SOUNDWAVE_JOB=${SOUNDWAVE_JOB:-$SLURM_JOB_ID}  # --restart is meant once: evaluation.run knows this job's own answers by it
prepare "" "$@"
run_resumable -m evaluation.run "$@"
