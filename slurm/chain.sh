#!/usr/bin/env bash
# Submit the three stages so that each starts when the one before it is done. From anywhere, on a login node:
#
#   slurm/chain.sh [--stages 1,2,3] [--recipes DIR] [--dry-run] [sbatch options, as --time=12:00:00] [key=value for all recipes]
#
# DIR holds stage1.yaml, stage2.yaml and stage3.yaml; without it each script's own RECIPE line counts. The code and the recipes
# are frozen now: what is edited later changes nothing for these jobs. Stages that are done are left out: the same command after a
# failure goes on. --dry-run submits nothing: it prints each sbatch command and script, and what `sbatch --test-only` says of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
eval "$(grep -E '^(ENVIRONMENT|MODULES|MOUNTS)=' slurm/stage1.sh)"
# shellcheck source=slurm/common.sh
source slurm/common.sh
forget_this_job  # of an interactive allocation that this runs in

STAGES="1,2,3" RECIPES="" DRY_RUN=0 OPTIONS=() OVERRIDES=()
while [ $# -gt 0 ]; do
    case $1 in
        --stages) STAGES=${2:?--stages needs a list, e.g. 2,3}; shift ;;
        --recipes) RECIPES=${2:?--recipes needs a folder}; shift ;;
        --dry-run) DRY_RUN=1 ;;
        -h|--help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        -*) OPTIONS+=("$1") ;;
        *=*) OVERRIDES+=("$1") ;;
        *) die "'$1' is neither key=value nor an option (write --partition=gpu, not -p gpu): see slurm/chain.sh --help" ;;
    esac
    shift
done
[[ $STAGES =~ ^[123](,[123])*$ ]] || die "--stages $STAGES: write for example 1,2,3 or 2,3"
CONTROLLER=1
{ command -v sbatch >/dev/null && client scontrol ping 2>/dev/null | grep -q "is UP"; } || CONTROLLER=0
[ "$CONTROLLER$DRY_RUN" != 00 ] || die "no Slurm controller answers (scontrol ping): go to a login node, or add --dry-run" 1

ID=chain-$(date +%Y%m%d-%H%M%S)-$$
CODE=$PWD/slurm/jobs/$ID/code
[ "$DRY_RUN" = 0 ] || trap 'rm -rf "$PWD/slurm/jobs/$ID"' EXIT

# Recipes are read here where the login node can, so that a wrong one is found before anything waits in the queue.
# In a shell of its own: the jobs open the environment themselves, on their nodes.
stage_and_output() (
    LOCAL_DISK=/tmp  # the nodes' own may not exist here
    open_environment
    PYTHONPATH=$CODE "${IN_CONTAINER[@]}" python "$CODE/train/preflight.py" "$RECIPE" --where "${OVERRIDES[@]}"
)
case $ENVIRONMENT in pyxis:*) READABLE=0 ;; *) READABLE=1 ;; esac
[ "$READABLE" = 1 ] \
    || echo "recipes cannot be read here ($ENVIRONMENT): stages that are done and jobs in the queue are not looked for" >&2

# First all stages are looked at, then all are submitted: four words each: number, recipe, stage, output.
queue="" plan=()
[ "$CONTROLLER" = 0 ] || queue=$(client squeue -h -u "$(id -un)" -o %A)
for stage in ${STAGES//,/ }; do
    script=slurm/stage$stage.sh
    # A RECIPE of the environment is one stage's: not meant for three.
    recipe=${RECIPES:+$RECIPES/stage$stage.yaml}
    [ -n "$recipe" ] || recipe=$(unset RECIPE; eval "$(grep -E '^RECIPE=' "$script")"; echo "$RECIPE")
    RECIPE=$(freeze "$CODE" "$recipe")
    [ -f "$RECIPE" ] || die "$recipe does not exist: give the recipes' folder with --recipes, or the right RECIPE in $script"
    OUTPUT="" STAGE=stage$stage STATE=unknown START=""
    if [ "$READABLE" = 1 ]; then
        where=$(stage_and_output) || exit 2
        { read -r STAGE; read -r OUTPUT; read -r STATE; read -r START || true; } <<<"$where"
    fi
    if [ "$STATE" = finished ]; then
        for ((i = 0; i < ${#plan[@]}; i += 4)); do
            [ "$START" != "${plan[i + 3]}/${plan[i + 2]}/model" ] \
                || die "stage $stage is done, but stage ${plan[i]}, its start, is not: remove $OUTPUT/$STAGE, or choose another output"
        done
        echo "stage $stage ($STAGE) is done: $OUTPUT/$STAGE/model"
        continue
    fi
    while read -r job; do
        ! grep -qx "$job" <<<"$queue" || die "job $job of $OUTPUT is still in the queue: wait for it, or scancel $job first" 1
    done < <(sed -n 's/.*"job": "\([0-9]*\)".*/\1/p' "$OUTPUT/slurm.jsonl" 2>/dev/null | sort -nu)
    plan+=("$stage" "$RECIPE" "$STAGE" "$OUTPUT")
done

previous="" submitted=()
# For a job that has to submit itself again.
SOUNDWAVE_OPTIONS=$([ ${#OPTIONS[@]} = 0 ] || printf '%q ' "${OPTIONS[@]}")
export SOUNDWAVE_OPTIONS
for ((i = 0; i < ${#plan[@]}; i += 4)); do
    stage=${plan[i]} script=slurm/stage$stage.sh RECIPE=${plan[i + 1]} STAGE=${plan[i + 2]} OUTPUT=${plan[i + 3]}
    command=(sbatch --parsable "--chdir=$PWD" --export=ALL "${OPTIONS[@]}")
    [ -z "$previous" ] || command+=("--dependency=afterok:$previous" --kill-on-invalid-dep=yes)
    command+=("$CODE/$script" "${OVERRIDES[@]}")
    if [ "$DRY_RUN" = 1 ]; then
        echo "=== stage $stage ($STAGE): SOUNDWAVE_CODE=$CODE RECIPE=$RECIPE ${command[*]}"
        cat "$CODE/$script"
        if [ "$CONTROLLER" = 1 ]; then
            client sbatch --test-only "--chdir=$PWD" "${OPTIONS[@]}" "$CODE/$script" 2>&1 \
                || die "sbatch would refuse stage $stage: see above" 1
        else
            echo "(no Slurm controller here: not tested with sbatch --test-only)"
        fi
        previous=JOB_OF_STAGE_$stage
        continue
    fi
    if ! job=$(client env SOUNDWAVE_CODE="$CODE" RECIPE="$RECIPE" "${command[@]}") || ! [[ ${job%%;*} =~ ^[0-9]+$ ]]; then
        # A chain without its end is no chain, and a dependency on a job that does not exist would start at once.
        [ ${#submitted[@]} = 0 ] || client scancel "${submitted[@]}"
        die "sbatch refused stage $stage (above); ${#submitted[@]} jobs submitted before it are cancelled" 1
    fi
    previous=${job%%;*}
    submitted+=("$previous")
    LOG=$PWD/slurm/logs/soundwave-$stage-$previous.log
    if [ -n "$OUTPUT" ]; then mkdir -p "$OUTPUT"; EVENT_JOB=$previous event submitted "${OVERRIDES[*]}"; fi
    echo "stage $stage ($STAGE): job $previous, log $LOG"
done
[ ${#submitted[@]} -gt 0 ] || exit 0
ids=$(IFS=,; echo "${submitted[*]}")
echo "follow: squeue -j $ids"
echo "        tail -F slurm/logs/soundwave-*-${submitted[0]}.log"
[ -z "$OUTPUT" ] || echo "        $([ "${ENVIRONMENT%%:*}" = venv ] && echo "${ENVIRONMENT#*:}/bin/")python -m train.status $OUTPUT"
echo "cancel: scancel ${submitted[*]}"
echo "frozen: ${CODE%/code}  (may be deleted when these jobs are over)"
