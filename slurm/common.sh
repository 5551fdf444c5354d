#!/usr/bin/env bash
# What the job scripts share: freeze the code, open the environment, check the nodes, run, and requeue when that helps.
#
#   sbatch slurm/stage1.sh -> run_stage:  freeze -> environment -> preflight -> training -> exit code decides
#       0 done                     the job ends COMPLETED and its dependents start
#       85 stopped and saved       (Slurm's warning before the time limit, preemption) the same job is requeued, or, where the
#                                  site forbids that, submitted anew with its dependents moved over
#       a node does not answer     requeued as well
#       2 wrong recipe or input    FAILED, never requeued
#       anything else              FAILED, never requeued
#
# The parts are in lib/. On the nodes this file is run, not sourced: bash common.sh worker PROGRAM ARGS (bottom).
#
# A job's contract, its frozen copy and recipe and what was counted before it, is in its arguments, where no option of sbatch and
# no variable of a user or site can undo it:
#
#   SCRIPT --frozen FOLDER --place NAME [--recipe FILE] [--stops N] [--faults N] [--first-job ID] [--instead-of ID] -- ARGUMENTS
#
# FOLDER/code is the copy, FOLDER/settings what slurm/chain.sh was given; FOLDER/NAME.job holds the id of the job that does this work.
# A plain `sbatch slurm/stage1.sh` has no contract: it makes FOLDER, slurm/jobs/ID, when it first starts, and keeps to it.

LIB=$(dirname "${BASH_SOURCE[0]}")/lib
# shellcheck source=slurm/lib/report.sh
source "$LIB/report.sh"
# shellcheck source=slurm/lib/slurm.sh
source "$LIB/slurm.sh"
# shellcheck source=slurm/lib/freeze.sh
source "$LIB/freeze.sh"
# shellcheck source=slurm/lib/environment.sh
source "$LIB/environment.sh"
# shellcheck source=slurm/lib/steps.sh
source "$LIB/steps.sh"
# shellcheck source=slurm/lib/restart.sh
source "$LIB/restart.sh"
# shellcheck source=slurm/lib/options.sh
source "$LIB/options.sh"

# help_of SCRIPT: its first comment, without the options of sbatch.
help_of() { awk 'NR > 1 && (!/^#/ || /^#SBATCH/) { exit } NR > 1 { sub(/^# ?/, ""); print }' "$1"; }

if [ "${BASH_SOURCE[0]}" = "$0" ]; then  # on a node
    set -euo pipefail
    case ${1:-} in -h|--help) help_of "$0"; exit 0 ;; esac
    "$@"
    exit
fi

# was_restarted: Slurm's own count; its variable may be another job's, and counts only where Slurm does not answer.
was_restarted() {
    local restarts
    restarts=$(job_field Restarts)
    [ "${restarts:-${SLURM_RESTART_COUNT:-0}}" -gt 0 ]
}

unset_others
FROZEN="" PROJECT=$PWD
if [ "${1:-}" = --frozen ]; then
    FROZEN=$2 PROJECT=${2%/slurm/jobs/*}
elif [ "$(basename "$0")" = slurm_script ] && [ -f "$PWD/slurm/jobs/$SLURM_JOB_ID/code/slurm/common.sh" ] \
    && [ "${BASH_SOURCE[0]}" != "$PWD/slurm/jobs/$SLURM_JOB_ID/code/slurm/common.sh" ] && was_restarted; then
    # A plain job that was requeued continues with its own copy, and with that copy's version of this file.
    # shellcheck source=/dev/null
    source "$PWD/slurm/jobs/$SLURM_JOB_ID/code/slurm/common.sh"
    return
fi

# Settings, from the stage script's top lines or the environment (for chain.sh's jobs: that of chain.sh):
SETTINGS=(LAUNCHER MODULES MOUNTS LOCAL_DISK STAGE_SHARDS STEP_OPTIONS MAX_RESTARTS MAX_PREEMPTIONS PREFLIGHT_MINUTES BUSY_SECONDS)
GIVEN=()  # those that the environment sets
for name in "${SETTINGS[@]}"; do [ -z "${!name+x}" ] || GIVEN+=("$name"); done
# shellcheck disable=SC2034  # JOB_NAME: in options.sh
OPTIONS=() JOB_NAME=""  # sbatch options that chain.sh was given
if [ -n "$FROZEN" ] && [ -f "$FROZEN/settings" ]; then
    # shellcheck source=/dev/null
    source "$FROZEN/settings"
fi
ENVIRONMENT=${ENVIRONMENT:-venv:.venv}  # venv:DIR | conda:NAME | apptainer:FILE.sif | pyxis:IMAGE
LAUNCHER=${LAUNCHER:-srun}              # srun: one task per GPU | torchrun: one task per node, which starts the others
MODULES=${MODULES:-}                    # environment modules to load first, e.g. "cuda/12.4 gcc/12"
MOUNTS=${MOUNTS:-}                      # containers: further folders (shards, models), comma separated; the project is always there
LOCAL_DISK=${LOCAL_DISK:-${SLURM_TMPDIR:-/tmp}}  # a folder on each node's own disk: caches, and shards with STAGE_SHARDS=1
STAGE_SHARDS=${STAGE_SHARDS:-0}         # 1: copy the shards to LOCAL_DISK before training
STEP_OPTIONS=${STEP_OPTIONS:-}          # further options of every srun, e.g. "--cpu-bind=none --mpi=pmix"
MAX_RESTARTS=${MAX_RESTARTS:-20}        # a job with more faults (dead nodes, requeues that saved nothing) fails instead of starting again
MAX_PREEMPTIONS=${MAX_PREEMPTIONS:-200} # the same for stops that were saved (time limits, preemptions)
PREFLIGHT_MINUTES=${PREFLIGHT_MINUTES:-15}
BUSY_SECONDS=${BUSY_SECONDS:-15}        # between two questions to a controller that is too busy to answer

# read_contract ARGUMENTS: set what stands before `--`, and ARGUMENTS to what comes after it.
read_contract() {
    RECIPE="" PLACE=job STOPS=0 FAULTS=0 FIRST_JOB=$SLURM_JOB_ID INSTEAD_OF=""
    if [ "${1:-}" = --frozen ]; then
        shift 2
        while [ "${1:-}" != -- ]; do
            case ${1:-} in
                --place) PLACE=$2 ;;
                --recipe) RECIPE=$2 ;;
                --stops) STOPS=$2 ;;
                --faults) FAULTS=$2 ;;
                --first-job) FIRST_JOB=$2 ;;
                --instead-of) INSTEAD_OF=$2 ;;
                *) die "this job's contract is not complete (no -- in its arguments): submit it again" ;;
            esac
            shift 2
        done
        shift
    fi
    ARGUMENTS=("$@")
}

# read_facts: what Slurm knows of this job. Of its variables only those that it sets for every job are believed.
read_facts() {
    JOB_FACTS=$(patient scontrol -d show job "$SLURM_JOB_ID") || JOB_FACTS=""
    FACTS_TIME=$(date +%s)
    OWN_RESTARTS=$(fact Restarts) ARRAY_TASK=$(fact ArrayTaskId) LOG=$(fact StdOut) END=$(end_of_job) CPUS=$(fact CPUs/Task)
    CPUS=${CPUS:-1} NODES=$SLURM_JOB_NUM_NODES
    if [ -z "$JOB_FACTS" ]; then
        say "Slurm does not answer what it knows of this job: its time limit is not known"
        OWN_RESTARTS=${SLURM_RESTART_COUNT:-} CPUS=${SLURM_CPUS_PER_TASK:-1}  # which may be another job's
    fi
    OWN_RESTARTS=${OWN_RESTARTS:-0}
    [[ $SLURM_TASKS_PER_NODE =~ ^([0-9]+)(\(x[0-9]+\))?$ ]] \
        || die "the tasks are not spread evenly over the nodes ($SLURM_TASKS_PER_NODE): give --ntasks-per-node instead of --ntasks"
    TASKS=${BASH_REMATCH[1]}
    local total
    total=$(fact JOB_GRES | tr ',' '\n' | sed -nE 's/^gpu:(.*:)?([0-9]+)$/\2/p' | awk '{ n += $1 } END { print n }')
    GPUS=${total:+$((total / NODES))}
}

# prepare ARGUMENTS: what every job begins with. RECIPE_LINE: the recipe of a job without one in its contract; empty for none.
prepare() {
    set -euo pipefail
    trap 'on_warning USR1' USR1
    trap 'on_warning TERM' TERM
    WARNED=0 WARNING="" WARNED_AT=0 BEGAN=$(date +%s) OUTPUT="" STAGE=$SLURM_JOB_NAME FAULT="" CULPRIT="" SRUN_WORDS="" STEP_FOLDER=""
    INTERACTIVE="" SBATCH=(sbatch)
    [ "$(basename "$0")" = slurm_script ] || INTERACTIVE=yes  # the name that Slurm gives a batch script
    read_contract "$@"
    read_facts
    [ -n "$FROZEN" ] || case ${SLURM_EXPORT_ENV:-ALL} in ALL*) ;; *)
        say "sbatch --export=$SLURM_EXPORT_ENV: RECIPE and other settings of the environment have not come here; the script's own lines count" ;;
    esac
    keep_own_variables
    [ -z "$ARRAY_TASK" ] || [ "$PLACE" = part ] || die "this is one job: submit it without --array"
    JOB=$PROJECT/slurm/jobs/$SLURM_JOB_ID
    [ -z "$INTERACTIVE" ] || JOB+=-$(date +%H%M%S)-$$  # one allocation, many runs, each with the code and recipe of its moment
    if [ -z "$FROZEN" ]; then
        FROZEN=$JOB
        # Slurm's ids begin anew with its database: what an older job of this id has left is not this one's.
        [ "$OWN_RESTARTS" -gt 0 ] || [ ! -d "$JOB" ] || mv "$JOB" "$JOB-until-$(date +%Y%m%d-%H%M%S)-$$"
    fi
    CODE=$FROZEN/code
    mkdir -p "$JOB" 2>/dev/null || say "no folder $JOB (disk or quota?)"
    count_restarts
    say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $TASKS tasks a node, restart $RESTARTS ($STOPS saved stops of at most $MAX_PREEMPTIONS," \
        "$FAULTS faults of at most $MAX_RESTARTS); code $CODE"
    hold_place
    COPIED_AGAIN=""
    [ "$OWN_RESTARTS" = 0 ] || [ -d "$CODE" ] || COPIED_AGAIN=yes
    [ -n "$RECIPE" ] || RECIPE=$(freeze "$CODE" "${RECIPE_LINE:-}")  # a contract names a frozen one
    [ -z "$RECIPE" ] || say "recipe $RECIPE"
    export JOB CODE LOCAL_DISK STEP_FOLDER
    case $LAUNCHER in srun|torchrun) ;; *) die "LAUNCHER=$LAUNCHER: write srun or torchrun" ;; esac
    open_environment
    set_variables
}

# count_restarts: RESTARTS = STOPS that were saved (note_stop) + FAULTS: dead nodes, requeues by Slurm or by a user.
count_restarts() {
    local number saved=0
    for ((number = 1; number <= OWN_RESTARTS; number++)); do
        [ ! -e "$JOB/stop.$number" ] || saved=$((saved + 1))
    done
    RESTARTS=$((STOPS + FAULTS + OWN_RESTARTS))
    FAULTS=$((FAULTS + OWN_RESTARTS - saved)) STOPS=$((STOPS + saved))
}

# hold_place: a job that sbatch accepted without saying so may have been given up, or submitted once more.
hold_place() {
    local holder
    [ ! -e "$FROZEN/given-up" ] || die "slurm/chain.sh gave up the chain of this job, which sbatch had accepted without an answer" 1
    [ -n "$JOB_FACTS" ] || return 0
    holder=$(tail -n 1 "$FROZEN/$PLACE.job" 2>/dev/null) || return 0
    case $holder in ""|"$SLURM_JOB_ID"|"$(fact ArrayJobId)"|"$INSTEAD_OF") ;; *) die "job $holder was submitted in this one's place" 1 ;; esac
}

on_warning() {
    SIGNALLED=1 WARNING=$1
    [ "$WARNED" = 1 ] || { WARNED_AT=$(date +%s); say "Slurm warns that this job's time ends ($1): saving and stopping"; }
    WARNED=1
}

# where_of CODE RECIPE ARGUMENTS: set STAGE, OUTPUT, STATE (finished or not) and START (a model folder) from the recipe. Only marked
# lines are read: modules, containers and shell profiles may print others. Fails where the recipe is wrong, which has then been said.
where_of() {
    local code=$1 recipe=$2 said
    shift 2
    said=$(PYTHONPATH=$code PYTHONSAFEPATH=1 "${IN_CONTAINER[@]}" python "$code/train/preflight.py" "$recipe" --where "$@") || return
    marked() { sed -n "s/^soundwave-where $1 //p" <<<"$said" | tail -n 1; }
    # shellcheck disable=SC2034  # STATE, START: for chain.sh
    STAGE=$(marked stage) OUTPUT=$(marked output) STATE=$(marked state) START=$(marked start)
    [ -n "$STAGE" ] && [ -n "$OUTPUT" ]
}

# run_stage key=value ...: what slurm/stage[123].sh do. RECIPE, or --recipe FILE as the first argument, names the recipe.
run_stage() {
    case ${1:-} in -h|--help) help_of "$0"; exit 0 ;; esac
    [ -n "${SLURM_JOB_ID:-}" ] || die "submit this with sbatch from the project's root, or all three stages with slurm/chain.sh"
    local RECIPE_LINE=${RECIPE:-}
    if [ "${1:-}" = --recipe ]; then RECIPE_LINE=${2:-}; shift 2; fi
    prepare "$@"
    [ -f "$RECIPE" ] || die "the recipe does not exist ($RECIPE): set RECIPE in the script, and submit from the project's root"
    check_visible_gpus
    [ "${GPUS:-$TASKS}" = "$TASKS" ] \
        || die "$GPUS GPUs but $TASKS tasks on a node: make --ntasks-per-node the number of GPUs"
    set -- "${ARGUMENTS[@]}"

    say "preflight"
    read_where "$@"
    limit_restarts "$STOPS" "$FAULTS" "Slurm has started this job again"
    if [ -n "$COPIED_AGAIN" ] && grep -qs "\"job\": \"$SLURM_JOB_ID\", \"event\": \"started\"" "$OUTPUT/slurm.jsonl"; then
        event failed "its frozen copy was deleted"
        die "the frozen copy of this job, $CODE, was deleted: submit again, it continues where it stopped, with the code of today"
    fi
    rm -f "$JOB/faults" 2>/dev/null || true
    # Its parts may take a third of the time each.
    launch "--time=$PREFLIGHT_MINUTES" "$CODE/train/preflight.py" "$RECIPE" --faults-to "$JOB/faults" \
        --timeout "$((PREFLIGHT_MINUTES * 20))" "$@"
    FAULT=$(head -n 1 "$JOB/faults" 2>/dev/null) || true
    next_step
    [ -n "$OUTPUT" ] || read_where "$@"
    [ -n "$OUTPUT" ] || die "train/preflight.py --where does not print the stage and its output folder: see the lines above"
    STEP_FOLDER=$OUTPUT/$STAGE
    if [ "$STAGE_SHARDS" = 1 ]; then
        SOUNDWAVE_LOCAL_SHARDS=$LOCAL_DISK/soundwave-shards-$(id -u)
        export SOUNDWAVE_LOCAL_SHARDS
        say "copying the shards to $SOUNDWAVE_LOCAL_SHARDS on every node"
        STOPS_AT_WARNING=1 SOUNDWAVE_RANKS=$NODES SOUNDWAVE_TASKS=1 step --ntasks="$NODES" --ntasks-per-node=1 \
            --cpus-per-task="$((CPUS * TASKS))" "${IN_CONTAINER[@]}" bash "$CODE/slurm/common.sh" worker "$CODE/train/staging.py" "$RECIPE" "$@"
        next_step
    fi
    alone
    event started ""
    say "training"
    STOP_FILE=$OUTPUT/$STAGE/STOP
    rm -f "$STOP_FILE" 2>/dev/null || true
    launch "" "$CODE/train/run.py" "$RECIPE" "$@"
    rm -f "$STOP_FILE" 2>/dev/null || true
    finish "$CODE_OF_STEP"
}

# check_visible_gpus: Slurm sets CUDA_VISIBLE_DEVICES where it knows the job's GPUs. Elsewhere it may be an salloc session's, and all
# ranks would train on the one GPU of that.
check_visible_gpus() {
    local visible=${CUDA_VISIBLE_DEVICES:-}
    [ -z "$GPUS" ] && [ -n "$visible" ] || return 0
    visible=$(tr ',' '\n' <<<"$visible" | grep -c .)
    [ "$visible" -ge "$TASKS" ] || [ "$TASKS" = 1 ] || die "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names $visible GPUs for $TASKS tasks on a node: unset it before sbatch, or ask for GPUs"
}

# read_where key=value ...: STAGE and OUTPUT from the recipe, before anything else can fail. Pyxis' containers exist in steps only.
read_where() {
    local code=0
    if [ ${#CONTAINER_OPTIONS[@]} = 0 ]; then
        where_of "$CODE" "$RECIPE" "$@" || code=$?
    else
        # shellcheck disable=SC2206  # STEP_OPTIONS is a line of options
        local IN_CONTAINER=(srun --export=ALL --nodes=1 --ntasks=1 --mem=0 "${CONTAINER_OPTIONS[@]}" $STEP_OPTIONS)
        where_of "$CODE" "$RECIPE" "$@" || code=$?
    fi
    case $code in
        0) mkdir -p "$OUTPUT" 2>/dev/null || true ;;
        2) die "wrong recipe or input: see the line above; not requeued" ;;
        *) OUTPUT="" STAGE=$SLURM_JOB_NAME ;;  # the preflight meets it, and knows more
    esac
}

# alone: two jobs that train the same stage in the same output would take each other's checkpoints away.
alone() {
    local other
    while read -r other; do
        if [ "$other" != "$SLURM_JOB_ID" ] && [ -n "$(client squeue -h -j "$other" -t RUNNING -o %A 2>/dev/null)" ]; then
            die "job $other is training $STAGE in $OUTPUT: wait for it, scancel $other, or choose another output"
        fi
    done < <(sed -n "s/.*\"stage\": \"$STAGE\", \"job\": \"\([0-9]*\)\", \"event\": \"\([a-z]*\)\".*/\1 \2/p" "$OUTPUT/slurm.jsonl" 2>/dev/null \
        | awk '{last[$1] = $2} END {for (job in last) if (last[job] == "started") print job}')
}

# run_resumable PROGRAM ARGUMENTS: a program that may be killed at any moment and resumes where it stopped (packing, evaluation).
# Slurm's warning ends it, and the job is requeued.
run_resumable() {
    export STOPS_AT_WARNING=1
    limit_restarts "$STOPS" "$FAULTS" "Slurm has started this job again"
    launch "" "$@"
    [ "$WARNED" = 0 ] || [ "$CODE_OF_STEP" = 0 ] || [ -n "$CULPRIT" ] || CODE_OF_STEP=85
    finish "$CODE_OF_STEP"
}

# next_step: between two steps. After Slurm's warning there is no time for the next one, and nothing to save yet.
next_step() {
    [ "$CODE_OF_STEP" = 0 ] || [ "$WARNED" = 1 ] || finish "$CODE_OF_STEP"
    [ "$WARNED" = 1 ] || return 0
    local now end=${END:-0}
    now=$(date +%s)
    # Slurm warns of the time limit, and less time has passed than is left: every start would end here. (Preemption may send the
    # same signal; more is left then than the script's own line asks for.)
    if [ "$WARNING" = USR1 ] && [ $((now - BEGAN)) -lt $((end - now)) ] && [ $((end - now)) -le $(($(warning_seconds) + 90)) ]; then
        die "Slurm's warning came before training could begin: give --time more than twice the seconds of --signal=B:USR1@SECONDS"
    fi
    finish 85
}
