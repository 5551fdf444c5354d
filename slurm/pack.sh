#!/usr/bin/env bash
# Pack a corpus with many nodes: an array job, one task for every PARTS-th shard, and a job behind it that writes the index.
# Run it on the login node (it submits both jobs):   slurm/pack.sh [sbatch options, as --time=8:00:00 --] PACK OPTIONS
#   e.g.  slurm/pack.sh --corpus librispeech:/data/LibriSpeech --out /shards/librispeech    (see data_tools/pack.py --help)
# A task that is stopped goes on where it was; so does the same command again.
#SBATCH --job-name=soundwave-pack
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.log
# ---- edit from here (a line with ## is off) -----------------------------------------------------------------------------
##SBATCH --partition=cpu
##SBATCH --account=project
#SBATCH --cpus-per-task=16
#SBATCH --mem-per-cpu=2G
#SBATCH --time=12:00:00
PARTS=16
ENVIRONMENT=venv:.venv  # venv:DIR | conda:NAME | apptainer:FILE.sif | pyxis:IMAGE
# ---- to here --------------------------------------------------------------------------------------------------------------

# In a job SOUNDWAVE_CODE is set; and sbatch runs a copy, beside which there is no common.sh.
if [ -z "${SOUNDWAVE_CODE:-}" ] && [ -f "$(dirname "${BASH_SOURCE[0]}")/common.sh" ]; then
    set -euo pipefail
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    # shellcheck source=slurm/common.sh
    source slurm/common.sh
    forget_this_job
    case " $* " in *" --out "*|*" --out="*) ;; *) die "say what and where to: slurm/pack.sh --manifest M.jsonl --out DIR" ;; esac
    options=()
    case " $* " in *" -- "*) while [ "$1" != -- ]; do options+=("$1"); shift; done; shift ;; esac
    SOUNDWAVE_CODE=$PWD/slurm/jobs/pack-$(date +%Y%m%d-%H%M%S)-$$/code
    export SOUNDWAVE_CODE
    freeze "$SOUNDWAVE_CODE" ""
    script=$SOUNDWAVE_CODE/slurm/pack.sh
    array=$(client sbatch --parsable --array="0-$((PARTS - 1))" --nodes=1 --ntasks=1 "${options[@]}" "$script" "$@")
    merge=$(client sbatch --parsable --dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes --nodes=1 --ntasks=1 \
        --cpus-per-task=1 --output=slurm/logs/%x-%j.log "${options[@]}" "$script" "$@") \
        || { client scancel "${array%%;*}"; exit 1; }
    echo "pack: job ${array%%;*}, $PARTS parts, logs slurm/logs/soundwave-pack-${array%%;*}_*.log"
    echo "merge: job ${merge%%;*}, log slurm/logs/soundwave-pack-${merge%%;*}.log"
    echo "cancel: scancel ${array%%;*} ${merge%%;*}"
    exit 0
fi
# shellcheck source=slurm/common.sh
source "${SOUNDWAVE_CODE:?run slurm/pack.sh itself on the login node, not with sbatch}/slurm/common.sh" || exit 2
prepare "" "$@"
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    run_resumable "$CODE/data_tools/pack.py" --workers "$CPUS" "$@" --part "$SLURM_ARRAY_TASK_ID/$PARTS"
else
    run_resumable "$CODE/data_tools/pack.py" "$@" --merge
fi
