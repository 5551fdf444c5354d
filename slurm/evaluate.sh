#!/usr/bin/env bash
# Score a model folder on packed shards, with every GPU of the job.
#
#   sbatch [sbatch options] slurm/evaluate.sh OPTIONS     from the project's root; OPTIONS: python -m evaluation.run --help
#
# Predictions are written at once: a job that was stopped continues.
# example: sbatch slurm/evaluate.sh --model runs/mine/sft/model --shards /shards/test-clean --task asr
#SBATCH --job-name=soundwave-evaluate
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
# shellcheck disable=SC2034,SC2153  # variables that common.sh reads and sets
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

CODE=$PWD
if [ "${1:-}" = --frozen ]; then CODE=$2/code; fi  # a job in the place of another one
# shellcheck source=/dev/null
source "$CODE/slurm/common.sh" \
    || { echo "error: no slurm/common.sh in $CODE: call sbatch from the project's root; a frozen copy that was deleted needs a new submission" >&2; exit 2; }
case ${1:-} in -h|--help) help_of "$0"; exit 0 ;; esac
[ -n "${SLURM_JOB_ID:-}" ] || die "submit this with sbatch from the project's root"
prepare "$@"
export SOUNDWAVE_JOB=$FIRST_JOB  # --restart is meant once: evaluation.run knows this job's own answers by it
set -- "${ARGUMENTS[@]}"
run_resumable -m evaluation.run "$@"
