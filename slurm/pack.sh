#!/usr/bin/env bash
# Pack a corpus with many nodes: an array job, one task for every PARTS-th shard (PARTS=16 in this file), then a job that writes the index.
#
#   slurm/pack.sh [sbatch options --] OPTIONS     on the login node; OPTIONS: python data_tools/pack.py --help
#
# A stopped task resumes; so does the same command. Relative paths are relative to the folder where this is called.
# example: slurm/pack.sh --time=8:00:00 -- --corpus librispeech:/data/LibriSpeech --out /shards/librispeech
#SBATCH --job-name=soundwave-pack
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.log
# shellcheck disable=SC2034,SC2153  # variables that common.sh reads and sets
# ---- edit from here (a line with ## is off) -----------------------------------------------------------------------------
##SBATCH --partition=cpu
##SBATCH --account=project
#SBATCH --cpus-per-task=16
#SBATCH --mem-per-cpu=2G
#SBATCH --time=12:00:00
PARTS=16
ENVIRONMENT=venv:.venv  # venv:DIR | conda:NAME | apptainer:FILE.sif | pyxis:IMAGE
# ---- to here --------------------------------------------------------------------------------------------------------------

if [ -z "${BASH_VERSION:-}" ] || shopt -qo posix; then exec env -u POSIXLY_CORRECT bash "$0" "$@"; fi  # called as `sh slurm/pack.sh`
if [ "${1:-}" = --frozen ]; then  # one of the jobs that are submitted below
    TASK_ID=${SLURM_ARRAY_TASK_ID:-}
    # shellcheck source=/dev/null
    source "$2/code/slurm/common.sh" || { echo "error: the frozen copy $2 was deleted: run slurm/pack.sh again, it continues" >&2; exit 2; }
    prepare "$@"
    case $PLACE in
        part) run_resumable "$CODE/data_tools/pack.py" --workers "$CPUS" "${ARGUMENTS[@]}" --part "${ARRAY_TASK:-$TASK_ID}/$PARTS" ;;
        merge) run_resumable "$CODE/data_tools/pack.py" "${ARGUMENTS[@]}" --merge ;;
    esac
    die "this job's contract names no part of the packing: run slurm/pack.sh again"
fi
set -euo pipefail
if [ "$(basename "$0")" = slurm_script ]; then
    echo "error: run slurm/pack.sh itself, on a login node, not with sbatch: it submits the jobs" >&2
    exit 2
fi
HERE=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
# shellcheck source=/dev/null
source "$HERE/slurm/common.sh"
PROJECT=$HERE
unset_this_job  # of an interactive allocation that this runs in
case ${1:-} in -h|--help) help_of "${BASH_SOURCE[0]}"; exit 0 ;; esac

# What comes before an argument `--` is for sbatch.
separated="" folder=""
for argument in "$@"; do [ "$argument" != -- ] || separated=yes; done
if [ -n "$separated" ]; then
    while [ "$1" != -- ]; do take_option "$1"; shift; done
    shift
fi
arguments=()
for argument in "$@"; do
    case $argument in --out|--out=*) folder=yes ;; esac
    case $argument in --*=\~/*) argument=${argument%%=*}=$HOME/${argument#*=\~/} ;; esac  # which bash expands in words of their own only
    arguments+=("$argument")
done
[ -n "$folder" ] || die "say what and where to: slurm/pack.sh --manifest M.jsonl --out DIR"

FROZEN=$PROJECT/slurm/jobs/pack-$(date +%Y%m%d-%H%M%S)-$$ SBATCH=(sbatch) name=${JOB_NAME:-soundwave-pack}
CODE=$FROZEN/code script=$FROZEN/code/slurm/pack.sh
freeze "$CODE" ""
write_settings "$FROZEN"
logs=$(log_pattern "$script")
log=$(sed 's/%A/%j/g; s/_%a//g; s/%a/merge/g' <<<"$logs")  # the merging job is no array
options=("--chdir=$PWD" --export=ALL "--job-name=$name" "${OPTIONS[@]}" --nodes=1 --ntasks=1)
refused() {
    put "" "$FROZEN/given-up"
    [ -z "${array:-}" ] || client scancel "$array" || say "scancel failed: cancel it with scancel $array" >&2
    die "sbatch refused the $1 (above); nothing is left in the queue" 1
}
submit 60 "$script" "${options[@]}" "--output=$logs" --array="0-$((PARTS - 1))" "$script" --frozen "$FROZEN" --place part -- "${arguments[@]}" \
    || refused "array job"
array=$SUBMITTED KNOWN_JOBS=$SUBMITTED
put "$array" "$FROZEN/part.job"
submit 60 "$script" "${options[@]}" "--output=$log" --cpus-per-task=1 --dependency="afterok:$array" --kill-on-invalid-dep=yes \
    "$script" --frozen "$FROZEN" --place merge -- "${arguments[@]}" || refused "merging job"
put "$SUBMITTED" "$FROZEN/merge.job"
put "$(clean "pack: job $array, $PARTS parts, logs $(sed "s/%x/$name/g; s/%A/$array/g; s/%a/*/g; s/%%/%/g" <<<"$logs")")"
put "$(clean "merge: job $SUBMITTED, log $(log_of "$SUBMITTED" "$name" "$log")")"
put "cancel: scancel $array $SUBMITTED"
