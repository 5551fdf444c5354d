#!/usr/bin/env bash
# Submit the three stages so that each starts when the one before it is done. From anywhere, on a login node:
#
#   slurm/chain.sh [--stages 1,2,3] [--recipes DIR] [--dry-run] [sbatch options] [key=value for all recipes]
#
# --stages LIST: default 1,2,3. --recipes DIR: folder of stage1.yaml, stage2.yaml and stage3.yaml; default: the RECIPE of each stage's
# script. --dry-run: submit nothing; print each sbatch command and script, and the answer of `sbatch --test-only`.
# Code and recipes are copied: later edits do not affect these jobs. Finished stages are left out: the same command resumes after a
# failure. Relative paths, here and in recipes, are relative to the folder where this is called, and where the jobs run.
# example: slurm/chain.sh --recipes recipes --time=12:00:00 output=runs/mine

# shellcheck disable=SC2034,SC2153  # variables that common.sh reads and sets
if [ -z "${BASH_VERSION:-}" ] || shopt -qo posix; then exec env -u POSIXLY_CORRECT bash "$0" "$@"; fi  # called as `sh slurm/chain.sh`
set -euo pipefail
if [ "$(basename "$0")" = slurm_script ]; then
    echo "error: run slurm/chain.sh itself, on a login node, not with sbatch: it submits the jobs" >&2
    exit 2
fi
HERE=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
eval "$(grep -E '^(ENVIRONMENT|MODULES|MOUNTS)=' "$HERE/slurm/stage1.sh")"
# shellcheck source=/dev/null
source "$HERE/slurm/common.sh"
PROJECT=$HERE
unset_this_job  # of an interactive allocation that this runs in

STAGES="1,2,3" RECIPES="" DRY_RUN=0 OVERRIDES=()
while [ $# -gt 0 ]; do
    case $1 in
        --stages) STAGES=${2:?--stages needs a list, e.g. 2,3}; shift ;;
        --recipes) RECIPES=${2:?--recipes needs a folder}; shift ;;
        --stages=*) STAGES=${1#*=} ;;
        --recipes=*) RECIPES=${1#*=} ;;
        --dry-run) DRY_RUN=1 ;;
        -h|--help) help_of "${BASH_SOURCE[0]}"; exit 0 ;;
        -*) take_option "$1" ;;
        *=*) OVERRIDES+=("$1") ;;
        *) die "'$1' is neither key=value nor an option (write --partition=gpu, not -p gpu): see slurm/chain.sh --help" ;;
    esac
    shift
done
[[ $STAGES =~ ^[123](,[123])*$ ]] || die "--stages $STAGES: write for example 1,2,3 or 2,3"
CONTROLLER=1
{ command -v sbatch >/dev/null && client scontrol ping 2>/dev/null | grep -q "is UP"; } || CONTROLLER=0
[ "$CONTROLLER$DRY_RUN" != 00 ] || die "no Slurm controller answers (scontrol ping): go to a login node, or add --dry-run" 1

FROZEN=$PROJECT/slurm/jobs/chain-$(date +%Y%m%d-%H%M%S)-$$ SBATCH=(sbatch)
CODE=$FROZEN/code
[ "$DRY_RUN" = 0 ] || trap 'rm -rf "$FROZEN"' EXIT

# Recipes are read here where the login node can, so that a wrong one is found before anything waits in the queue.
case $ENVIRONMENT in pyxis:*) READABLE=0 ;; *) READABLE=1 ;; esac
[ "$READABLE" = 1 ] \
    || echo "recipes cannot be read here ($ENVIRONMENT): stages that are done and jobs in the queue are not looked for" >&2

# stage_here: stage, output, state and start of RECIPE, a line each, marked. In a shell of its own: the jobs open the environment themselves,
# on their nodes, whose LOCAL_DISK may not exist here.
stage_here() (
    LOCAL_DISK=/tmp
    open_environment >&2
    where_of "$CODE" "$RECIPE" "${OVERRIDES[@]}" || exit 2
    printf '%s\n' "$STAGE" "$OUTPUT" "$STATE" "$START"
)

# First all stages are looked at, then all are submitted: four words each: number, recipe, stage, output.
queue="" plan=()
if [ "$CONTROLLER" = 1 ]; then
    queue=$(patient squeue -h -u "$(id -un)" -o %A) || die "squeue does not answer: $queue" 1
fi
for stage in ${STAGES//,/ }; do
    script=$PROJECT/slurm/stage$stage.sh
    # A RECIPE of the environment is one stage's: not meant for three.
    recipe=${RECIPES:+$RECIPES/stage$stage.yaml}
    if [ -z "$recipe" ]; then
        recipe=$(unset RECIPE; eval "$(grep -E '^RECIPE=' "$script")"; echo "$RECIPE")
        case $recipe in /*) ;; *) recipe=$PROJECT/$recipe ;; esac
    fi
    RECIPE=$(freeze "$CODE" "$recipe")
    [ -f "$RECIPE" ] || die "$recipe does not exist: give the recipes' folder with --recipes, or the right RECIPE in slurm/stage$stage.sh"
    OUTPUT="" STAGE=stage$stage STATE=unknown START=""
    if [ "$READABLE" = 1 ]; then
        here=$(stage_here) || exit 2
        { read -r STAGE; IFS= read -r OUTPUT; read -r STATE; IFS= read -r START || true; } <<<"$here"
    fi
    if [ "$STATE" = finished ]; then
        for ((i = 0; i < ${#plan[@]}; i += 4)); do
            [ "$START" != "${plan[i + 3]}/${plan[i + 2]}/model" ] \
                || die "stage $stage is done, but stage ${plan[i]}, its start, is not: remove $OUTPUT/$STAGE, or choose another output"
        done
        put "stage $stage ($STAGE) is done: $(clean "$OUTPUT")/$STAGE/model"
        continue
    fi
    while read -r job; do
        ! grep -qx "$job" <<<"$queue" || die "job $job of $OUTPUT is still in the queue: wait for it, or scancel $job first" 1
    done < <(sed -n 's/.*"job": "\([0-9]*\)".*/\1/p' "$OUTPUT/slurm.jsonl" 2>/dev/null | sort -nu)
    plan+=("$stage" "$RECIPE" "$STAGE" "$OUTPUT")
done

# give_up: a chain without its end is no chain, and a dependency on a job that does not exist would start at once. A job that sbatch
# accepts later, or has accepted without an answer, finds the mark and ends.
submitted=()
give_up() {
    put "" "$FROZEN/given-up"
    [ ${#submitted[@]} = 0 ] || client scancel "${submitted[@]}" || say "scancel failed: cancel jobs ${submitted[*]} with scancel" >&2
}

previous=""
if [ "$DRY_RUN" = 0 ] && [ ${#plan[@]} -gt 0 ]; then
    write_settings "$FROZEN"
    trap 'give_up; die "interrupted: ${#submitted[@]} jobs are cancelled" 1' INT TERM HUP
fi
for ((i = 0; i < ${#plan[@]}; i += 4)); do
    stage=${plan[i]} script=$CODE/slurm/stage${plan[i]}.sh RECIPE=${plan[i + 1]} STAGE=${plan[i + 2]} OUTPUT=${plan[i + 3]}
    pattern=$(log_pattern "$script")
    options=("--chdir=$PWD" --export=ALL "--output=$pattern" ${JOB_NAME:+"--job-name=$JOB_NAME-$stage"} "${OPTIONS[@]}")
    [ -z "$previous" ] || options+=("--dependency=afterok:$previous" --kill-on-invalid-dep=yes)
    contract=(--frozen "$FROZEN" --place "stage$stage" --recipe "$RECIPE" --)
    if [ "$DRY_RUN" = 1 ]; then
        put "=== stage $stage ($STAGE): $(printf '%q ' sbatch --parsable "${options[@]}" "$script" "${contract[@]}" "${OVERRIDES[@]}")"
        replaced=""
        for option in "${OPTIONS[@]}"; do
            ! grep -q "^#SBATCH ${option%%=*}\b" "$script" || replaced+="${replaced:+, }$option"
        done
        [ -z "$replaced" ] || put "(instead of the #SBATCH lines below: $(clean "$replaced"))"
        cat "$script"
        if [ "$CONTROLLER" = 1 ]; then
            client sbatch --test-only "--chdir=$PWD" "${OPTIONS[@]}" "$script" 2>&1 \
                || die "sbatch would refuse stage $stage: see above" 1
        else
            echo "(no Slurm controller here: not tested with sbatch --test-only)"
        fi
        previous=JOB_OF_STAGE_$stage
        continue
    fi
    if ! submit 60 "$script" "${options[@]}" "$script" "${contract[@]}" "${OVERRIDES[@]}"; then
        give_up
        die "sbatch refused stage $stage (above); ${#submitted[@]} jobs submitted before it are cancelled" 1
    fi
    previous=$SUBMITTED
    submitted+=("$SUBMITTED")
    put "$SUBMITTED" "$FROZEN/stage$stage.job"
    LOG=$(log_of "$SUBMITTED" "${JOB_NAME:-soundwave}-$stage" "$pattern")
    if [ -n "$OUTPUT" ]; then
        mkdir -p "$OUTPUT" || say "$OUTPUT cannot be made here: python -m train.status will not know of job $SUBMITTED" >&2
        EVENT_JOB=$SUBMITTED event submitted "${OVERRIDES[*]}"
    fi
    put "$(clean "stage $stage ($STAGE): job $SUBMITTED, log $LOG")"
    [ ${#submitted[@]} != 1 ] || first_log=$LOG
done
trap - INT TERM HUP
[ ${#submitted[@]} -gt 0 ] || exit 0
put "follow: squeue -j $(IFS=,; echo "${submitted[*]}")"
put "        tail -F $(printf %q "$first_log")"
if [ -n "$OUTPUT" ]; then
    python=python
    case $ENVIRONMENT in venv:/*) python=${ENVIRONMENT#*:}/bin/python ;; venv:*) python=$PROJECT/${ENVIRONMENT#*:}/bin/python ;; esac
    [ "$PWD" = "$PROJECT" ] && place="" || place="PYTHONPATH=$(printf %q "$PROJECT") "
    put "        $place$(printf %q "${python#"$PWD"/}") -m train.status $(printf %q "$OUTPUT")"
fi
put "cancel: scancel ${submitted[*]}"
put "frozen: $FROZEN  (may be deleted when these jobs are over)"
