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
# On the nodes the same file is run, not sourced: bash common.sh worker PROGRAM ARGS (bottom).
#
# A job that was started before and has its frozen copy goes on with that copy's version of this file.
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SOUNDWAVE_CODE:-}" ] && [ -f "$PWD/slurm/jobs/$SLURM_JOB_ID/code/slurm/common.sh" ]; then
    export SOUNDWAVE_CODE=$PWD/slurm/jobs/$SLURM_JOB_ID/code
    # shellcheck source=/dev/null
    source "$SOUNDWAVE_CODE/slurm/common.sh"
    return
fi

# Settings, from the stage script's top lines or the environment:
ENVIRONMENT=${ENVIRONMENT:-venv:.venv}  # venv:DIR | conda:NAME | apptainer:FILE.sif | pyxis:IMAGE
LAUNCHER=${LAUNCHER:-srun}              # srun: one task per GPU | torchrun: one task per node, which starts the others
MODULES=${MODULES:-}                    # environment modules to load first, e.g. "cuda/12.4 gcc/12"
MOUNTS=${MOUNTS:-}                      # containers: further folders (shards, models), comma separated; $PWD is always there
LOCAL_DISK=${LOCAL_DISK:-${SLURM_TMPDIR:-/tmp}}  # a folder on each node's own disk: caches, and shards with STAGE_SHARDS=1
STAGE_SHARDS=${STAGE_SHARDS:-0}         # 1: copy the shards to LOCAL_DISK before training
MAX_RESTARTS=${MAX_RESTARTS:-20}        # a job that was restarted this often fails instead of starting again
PREFLIGHT_MINUTES=${PREFLIGHT_MINUTES:-15}

say() { printf '[%s] %s\n' "$(date '+%F %T')" "$*"; }
die() { say "error: $1" >&2; exit "${2:-2}"; }

# --- the job's folder: frozen code and recipe ---------------------------------------------------------------------------

# freeze CODE RECIPE: copy the project's code and the recipe, with the recipes it is based on, to the folder CODE; say where the
# recipe went. Queued and requeued jobs run this copy, so that editing the checkout meanwhile changes nothing for them.
freeze() {
    local code=$1 recipe frozen next part outside failed="no frozen copy in $1 (disk or quota?)"
    set -o pipefail  # always called in a $( ), where bash forgets set -e
    if [ ! -d "$code" ]; then
        mkdir -p "$code.part" || die "$failed" 1
        for part in core train model data_tools evaluation ds_configs slurm; do
            # 1: a file changed while it was read, as editors do it.
            { tar -cf - --exclude=__pycache__ --exclude=slurm/jobs --exclude=slurm/logs "$part" || [ $? = 1 ]; } \
                | tar -xf - -C "$code.part" || die "$failed" 1
        done
        git describe --always --dirty '--exclude=*' >"$code.part/VERSION" 2>/dev/null || true  # train/files.py, code_version
        mv "$code.part" "$code" || die "$failed" 1  # complete or not there
    fi
    [ -n "$2" ] || return 0
    recipe=$(realpath -m "$2")
    next=$recipe
    while [ -f "$next" ]; do  # `base:` is relative to the recipe that says it, so the folders between them are kept
        frozen=$(frozen_path "$code" "$next")
        [ -e "$frozen" ] || { mkdir -p "$(dirname "$frozen")" && cp "$next" "$frozen"; } || die "$failed" 1
        part=$(sed -n 's/^base:[[:space:]]*\([^[:space:]#]*\).*/\1/p' "$next" | head -n 1 | tr -d "\"'")
        [ -n "$part" ] || break
        case $part in /*) die "$next: base $part is an absolute path, and would not be frozen: write it relative to the recipe" ;; esac
        part=$(realpath -m "$(dirname "$next")/$part")
        case $next in "$PWD"/*) outside=0 ;; *) outside=1 ;; esac
        case $part in "$PWD"/*) ;; *) outside=$((1 - outside)) ;; esac
        [ "$outside" = 0 ] || die "$next: base $part lies on the other side of $PWD: keep a recipe and its base in one folder"
        next=$part
    done
    frozen_path "$code" "$recipe"
}

# frozen_path CODE FILE: where FILE lies in the frozen copy: at its own place in the project, or under outside/.
frozen_path() {
    case $2 in
        "$1"/*) echo "$2" ;;
        "$PWD"/*) echo "$1/${2#"$PWD"/}" ;;
        *) echo "$1/outside$2" ;;
    esac
}

# event NAME DETAIL: one JSON line in OUTPUT/slurm.jsonl, which `python -m train.status` reads. OUTPUT is known after preflight.
# EVENT_JOB: whose it is, if not this job's. A disk that takes no line must not cost a requeue, or a finished stage its name.
event() {
    [ -n "${OUTPUT:-}" ] && [ -d "$OUTPUT" ] || return 0
    local line
    printf -v line '{"time": "%s", "stage": "%s", "job": "%s", "event": "%s", "restarts": %s, "nodes": "%s", "log": "%s", "detail": "%s"}' \
        "$(date -u +%FT%T.%3NZ)" "$STAGE" "${EVENT_JOB:-$SLURM_JOB_ID}" "$1" "$(restarts)" \
        "${SLURM_JOB_NODELIST:-}" "${LOG:-}" "${2//[\"\\]/}"
    { echo "$line" >>"$OUTPUT/slurm.jsonl"; } 2>/dev/null || say "$OUTPUT/slurm.jsonl takes no line: $line"
}

# --- environment --------------------------------------------------------------------------------------------------------

# Opens the Python environment for this shell (and so for srun, which passes it on), or sets IN_CONTAINER, the words that go
# before a command on a node, and STEP_OPTIONS, srun's.
open_environment() {
    local kind=${ENVIRONMENT%%:*} name=${ENVIRONMENT#*:} module file tool
    IN_CONTAINER=() STEP_OPTIONS=()
    set +u  # the site's and conda's own scripts read unset variables
    if [ -n "$MODULES" ] && ! type module >/dev/null 2>&1; then  # a batch shell is no login shell: nobody has defined it yet
        for file in "$MODULESHOME/init/bash" /etc/profile.d/{lmod,z00_lmod,modules}.sh; do
            # shellcheck source=/dev/null
            if [ -r "$file" ]; then source "$file" || true; break; fi
        done
    fi
    for module in $MODULES; do
        type module >/dev/null 2>&1 || die "MODULES=$MODULES, but this site has no 'module' command: leave MODULES empty"
        module load "$module" || die "module load $module failed: see 'module avail'"
    done
    case $kind in
        venv)
            [ -x "$name/bin/python" ] || die "ENVIRONMENT=$ENVIRONMENT: no $name/bin/python in $PWD: run 'make setup GPU=1' first"
            VIRTUAL_ENV=$(cd "$name" && pwd)
            export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH" ;;
        conda)
            command -v conda >/dev/null || die "ENVIRONMENT=$ENVIRONMENT: no conda on the PATH: name its module in MODULES"
            # shellcheck disable=SC1091
            source "$(conda info --base)/etc/profile.d/conda.sh"
            conda activate "$name" || die "conda activate $name failed: see 'conda env list'" ;;
        apptainer)
            [ -e "$name" ] || die "ENVIRONMENT=$ENVIRONMENT: $name does not exist: build it as docs/slurm.md says"
            for tool in apptainer singularity; do command -v "$tool" >/dev/null && break; tool=""; done  # its name until 2021
            [ -n "$tool" ] || die "ENVIRONMENT=$ENVIRONMENT: no apptainer on the PATH: name its module in MODULES"
            # Images are read-only.
            export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$LOCAL_DISK/soundwave-cache-$(id -u)/extensions}
            IN_CONTAINER=("$tool" exec --nv --bind "$PWD,$LOCAL_DISK${MOUNTS:+,$MOUNTS}" --pwd "$PWD" "$name") ;;
        pyxis)
            local mounts="$PWD:$PWD,$LOCAL_DISK:$LOCAL_DISK" folder
            for folder in ${MOUNTS//,/ }; do mounts+=",$folder:$folder"; done
            STEP_OPTIONS=("--container-image=$name" "--container-mounts=$mounts" "--container-workdir=$PWD") ;;
        *) die "ENVIRONMENT=$ENVIRONMENT: write venv:DIR, conda:NAME, apptainer:FILE.sif or pyxis:IMAGE" ;;
    esac
    set -u
}

# What the ranks need to know. Anything set before (site profile, sbatch --export) is left as it is.
set_variables() {
    export PYTHONPATH="$CODE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
    export PYTHONSAFEPATH=1  # `python -m` must not find the checkout in the current folder before the frozen copy
    # Compute nodes often have no network: what the hub holds was fetched on the login node (docs/slurm.md).
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
    # Without this every rank starts a thread per core of the whole node.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    # Batches differ in shape from step to step, which splits PyTorch's memory pool into pieces too small to use.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}  # NCCL says why it stops
    # 4 us * 2^22 = 17 s per try: a link that flaps for some seconds, or a switch that reroutes, is waited for, not fatal.
    export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
    # Set by the site where NCCL's or Gloo's own choice is wrong (docs/slurm.md): NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME
    # (the interface of the bootstrap connection), NCCL_IB_HCA (the InfiniBand ports), NCCL_IB_GID_INDEX (RoCE).
    SOUNDWAVE_NODES=$(client scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')  # names need not share a prefix
    MASTER_ADDR=${SOUNDWAVE_NODES%% *}
    # Two jobs that share a node seldom meet, nor does a restarted job what a dead node has left of its former self. From 32768
    # on Linux gives ports to whoever asks.
    MASTER_PORT=$((20000 + (SLURM_JOB_ID + 7919 * $(restarts)) % 12768))
    export SOUNDWAVE_NODES MASTER_ADDR MASTER_PORT
    if [ -z "${SLURM_JOB_END_TIME:-}" ]; then  # newer Slurms set it
        local end
        end=$(job_field EndTime)
        [ -z "$end" ] || SLURM_JOB_END_TIME=$(date -d "$end" +%s 2>/dev/null || true)  # of "", date makes this day's midnight
        export SLURM_JOB_END_TIME
    fi
}

# --- questions to Slurm; no answer is waited for longer than 60 seconds ---------------------------------------------------

client() { timeout 60 "$@"; }

# patient COMMAND: a client command. A controller that is too busy to answer, as on large clusters for minutes, is asked eight
# times: a saved job that was not requeued is a night lost. A refusal is not repeated. Prints the answer, or the last error.
patient() {
    local answer code try
    for try in 1 2 3 4 5 6 7 8; do
        code=0
        answer=$(client "$@" 2>&1) || code=$?
        [ "$code" = 124 ] || [[ ${answer,,} =~ "timed out"|"unable to contact"|"communication"|"connection refused" ]] || break
        [ "$code" != 0 ] || break
        [ "$try" = 8 ] || sleep "${BUSY_SECONDS:-15}"
    done
    echo "$answer"
    return "$code"
}

# job_field NAME: one field of `scontrol show job`, empty where Slurm does not say.
job_field() { { patient scontrol -o show job "$SLURM_JOB_ID" || true; } | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1; }
restarts() { echo $((${SLURM_RESTART_COUNT:-0} + ${SOUNDWAVE_RESTARTS:-0})); }

# --- steps --------------------------------------------------------------------------------------------------------------

# step SRUN-ARGUMENTS: run a job step; pass Slurm's warning on to its processes; set CODE_OF_STEP.
# bash runs a trap only while it waits for a background process, hence & and wait.
step() {
    local pid status
    rm -f "$JOB"/exit.*
    srun --export=ALL --kill-on-bad-exit=1 "${STEP_OPTIONS[@]}" "$@" &
    pid=$!
    while :; do
        SIGNALLED=0 status=0
        wait "$pid" || status=$?
        [ "$SIGNALLED" = 1 ] || break
        kill -USR1 "$pid" 2>/dev/null || true
        [ -z "${STOP_FILE:-}" ] || touch "$STOP_FILE"  # for ranks that are still starting, and let the signal pass
    done
    # srun kills what remains of a step after its first bad exit, and then reports that. Ranks that ended of themselves noted
    # their codes.
    CULPRITS=$(grep -Lxs -E '0|85|143' "$JOB"/exit.* | sed 's/.*exit\./rank /' | sort -k 2 -n | head -n 4 | tr '\n' ' ' || true)
    if grep -qxs 2 "$JOB"/exit.*; then status=2
    elif [ "$status" = 0 ] && grep -qxs 85 "$JOB"/exit.*; then status=85
    # 143, ended by TERM: a preemption's, which this shell does not get; or srun's own after a rank failed, which noted its code.
    elif [ "$status${STOPS_AT_WARNING:-0}$CULPRITS" = 1431 ]; then status=85
    fi
    CODE_OF_STEP=$status
}

on_warning() {
    SIGNALLED=1 WARNING=$1
    [ "$WARNED" = 1 ] || say "Slurm warns that this job's time ends ($1): saving and stopping"
    WARNED=1
}

# launch SRUN-OPTION PROGRAM ARGS: a program with one process per GPU, by srun or by torchrun. SRUN-OPTION may be empty.
launch() {
    local options=(${1:+"$1"}) command=("${IN_CONTAINER[@]}" bash "$CODE/slurm/common.sh")
    shift
    if [ "$LAUNCHER" = torchrun ]; then
        step "${options[@]}" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$((CPUS * TASKS))" \
            "${command[@]}" torchrun_worker "$TASKS" "$@"
    else
        step "${options[@]}" --cpus-per-task="$CPUS" "${command[@]}" worker "$@"
    fi
}

# nodes_answer: does every node of this job still run commands? Says which does not.
nodes_answer() {
    local words
    words=$(client srun --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 true 2>&1) && return 0
    say "a node of this job does not answer: $(echo "$words" | grep -i 'error' | head -n 1)"
    return 1
}

# --- after a step ---------------------------------------------------------------------------------------------------------

# finish CODE: end the job as the step's exit code demands. Does not return.
finish() {
    case $1 in
        0) event "done" ""; say "$STAGE is done${OUTPUT:+: $OUTPUT/$STAGE/model}"; exit 0 ;;
        2) event failed "${FAULT:-wrong recipe or input}"; die "wrong recipe or input: see the line above; not requeued" ;;
    esac
    local state
    state=$(job_field JobState)
    if [ "${state:-RUNNING}" != RUNNING ]; then  # cancelled, past its time limit, or put back into the queue by Slurm itself
        event "${state,,}" "exit code $1"
        say "Slurm says that this job is $state: nothing more to do here"
        exit 85
    fi
    if [ "$1$WARNED" = 850 ] && [ -n "${STOP_FILE:-}" ] && grep -qs '"reason": "STOP file' "$OUTPUT/$STAGE/run.json"; then
        event stopped "STOP file"
        say "$STAGE has saved and stopped, as its STOP file asked; not requeued. Submitting it again goes on from there"
        exit 85
    fi
    [ "$1" != 85 ] || start_again "stopped in time"
    # A signal ended the step behind the warning or a save, and no rank noted a failure (a crash is noted: 139, 137, ...).
    if [ "$1" -gt 128 ] && [ -z "$CULPRITS" ] && { [ "$WARNED" = 1 ] || grep -qxs 85 "$JOB"/exit.*; }; then
        start_again "killed after the warning"
    fi
    nodes_answer || start_again "node failure"
    event failed "${FAULT:-exit code $1${CULPRITS:+ of ${CULPRITS% }}}"
    die "$STAGE failed with exit code $1: see the lines above; not requeued. Submitting it again goes on where it stopped" 1
}

# start_again WHY: put this job back into the queue, or submit it anew where that is forbidden. Does not return.
start_again() {
    local refusal
    if [ "$(restarts)" -ge "$MAX_RESTARTS" ]; then
        event failed "$1, but restarted $MAX_RESTARTS times already"
        die "$1, but restarted $MAX_RESTARTS times already (MAX_RESTARTS): submit it again to go on where it stopped" 1
    fi
    say "$1: requeue, restart $(($(restarts) + 1)) of $MAX_RESTARTS at most"
    event requeued "$1"
    if refusal=$(patient scontrol requeue "$SLURM_JOB_ID"); then
        sleep 60  # Slurm ends this shell
        exit 85
    fi
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then  # the job that merges waits for this array, and a part can't be submitted alone
        die "this site does not requeue (${refusal//$'\n'/ }): run the same slurm/pack.sh command again, it goes on" 1
    fi
    say "this site does not requeue (${refusal//$'\n'/ }): submitting a new job in this one's place"
    resubmit
}

# forget_this_job: what is submitted from inside an interactive allocation must not inherit its SLURM_ variables.
forget_this_job() {
    local name
    for name in "${!SLURM_@}"; do [ "$name" = SLURM_CONF ] || unset "$name"; done
}

# resubmit: a new job of the same script, options and arguments; every job that waits for this one shall wait for the new one.
resubmit() {
    local new count try waiting kind field value gpus mark asked=() given=() options=(--parsable --chdir="$PWD" --export=ALL --job-name="$SLURM_JOB_NAME"
        --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$TASKS" --cpus-per-task="$CPUS")
    for field in Partition:partition Account:account QOS:qos TimeLimit:time Features:constraint Reservation:reservation \
        ExcNodeList:exclude; do
        value=$(job_field "${field%:*}")
        case $value in ""|"(null)"|N/A) ;; *) options+=("--${field#*:}=$value") ;; esac
    done
    gpus=$(job_field TresPerNode)
    if [ -n "${SLURM_GPUS_PER_NODE:-}" ]; then options+=("--gpus-per-node=$SLURM_GPUS_PER_NODE")
    elif [ -n "$gpus" ]; then gpus=${gpus#gres:}; options+=("--gres=${gpus/gres\/gpu/gpu}")
    fi
    eval "asked=(${SOUNDWAVE_OPTIONS:-})"  # chain.sh's, quoted there; of two of a kind sbatch takes the last
    for value in "${asked[@]}"; do  # what two of them ask for has been waited for
        case $value in --begin=*|--dependency=*) ;; *) options+=("$value") ;; esac
    done
    cp "$0" "$JOB/script.sh"  # the spool copy goes when this job ends
    # The new job gets what this one was given, not what it has made of that: folders on its nodes' disks, say, that go with it.
    while IFS= read -r -d '' value; do
        case $value in SLURM_CONF=*) given+=("$value") ;; SLURM_*) ;; *) given+=("$value") ;; esac
    done <"/proc/$$/environ"
    count=$(($(restarts) + 1)) mark="in place of $SLURM_JOB_ID"
    [[ " ${asked[*]} " = *" --comment="* ]] || options+=("--comment=$mark")
    # A busy controller may take a job and not say so: before it is asked again, the queue is.
    for try in 1 2 3 4 5 6 7 8; do
        new=$(client env -i "${given[@]}" SOUNDWAVE_CODE="$CODE" SOUNDWAVE_RESTARTS="$count" RECIPE="$RECIPE" \
            ${SOUNDWAVE_JOB:+"SOUNDWAVE_JOB=$SOUNDWAVE_JOB"} sbatch "${options[@]}" "$JOB/script.sh" "${ARGUMENTS[@]}" 2>"$JOB/sbatch.err") && break
        new=""
        cat "$JOB/sbatch.err"
        grep -qiE "timed out|unable to contact|communication|connection refused" "$JOB/sbatch.err" || [ ! -s "$JOB/sbatch.err" ] || break
        sleep "${BUSY_SECONDS:-15}"
        new=$(client squeue -h -u "$(id -un)" -o '%A %k' | sed -n "s/^\([0-9]*\) $mark$/\1/p" | head -n 1) || true
        [ -z "$new" ] || break
    done
    new=${new%%;*}
    [ -n "$new" ] || { event failed "could not be submitted again"; die "sbatch refused: submit it again by hand, and it goes on" 1; }
    while read -r waiting kind; do
        patient scontrol update "JobId=$waiting" "Dependency=$kind:$new" \
            || say "job $waiting waits for this one; tell it by hand: scontrol update JobId=$waiting Dependency=$kind:$new"
    done < <(patient squeue -h -t PENDING -o '%i %E' \
        | sed -n "s/^\([^ ]*\) .*\(after[a-z]*\):$SLURM_JOB_ID\([^0-9].*\)\{0,1\}$/\1 \2/p")
    event resubmitted "as job $new"
    EVENT_JOB=$new LOG=${LOG//$SLURM_JOB_ID/$new} event submitted "in place of job $SLURM_JOB_ID"  # chain.sh asks for it
    say "submitted as job $new"
    exit 85
}

# --- jobs, from the first line to the last ----------------------------------------------------------------------------------

# prepare RECIPE ARGUMENTS: what every job begins with. RECIPE may be empty.
prepare() {
    set -euo pipefail
    RECIPE=$1
    shift
    ARGUMENTS=("$@")
    JOB=$PWD/slurm/jobs/$SLURM_JOB_ID
    CODE=${SOUNDWAVE_CODE:-$JOB/code}
    TASKS=${SLURM_NTASKS_PER_NODE:-1} CPUS=${SLURM_CPUS_PER_TASK:-1}
    WARNED=0 WARNING="" BEGAN=$(date +%s) OUTPUT="" STAGE=$SLURM_JOB_NAME FAULT="" CULPRITS=""
    mkdir -p "$JOB"
    trap 'on_warning USR1' USR1
    trap 'on_warning TERM' TERM
    RECIPE=$(freeze "$CODE" "$RECIPE")
    LOG=$(job_field StdOut)
    export JOB CODE LOCAL_DISK
    say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $TASKS tasks a node, restart $(restarts) of $MAX_RESTARTS at most; code $CODE"
    case $LAUNCHER in srun|torchrun) ;; *) die "LAUNCHER=$LAUNCHER: write srun or torchrun" ;; esac
    open_environment
    set_variables
}

# run_stage key=value ...: what slurm/stage[123].sh do. RECIPE names the recipe.
run_stage() {
    [ -n "${SLURM_JOB_ID:-}" ] || die "submit this with sbatch from the project's root, or all three stages with slurm/chain.sh"
    prepare "$RECIPE" "$@"
    [ -f "$RECIPE" ] || die "the recipe does not exist ($RECIPE): set RECIPE in the script, and submit from the project's root"
    [ "${SLURM_GPUS_ON_NODE:-$TASKS}" = "$TASKS" ] \
        || die "$SLURM_GPUS_ON_NODE GPUs but $TASKS tasks on a node: make --ntasks-per-node the number of GPUs"

    say "preflight"
    # Its parts may take a third of the time each.
    launch "--time=$PREFLIGHT_MINUTES" "$CODE/train/preflight.py" "$RECIPE" --where-to "$JOB/where" \
        --timeout "$((PREFLIGHT_MINUTES * 20))" "$@"
    if [ -f "$JOB/where" ]; then { read -r STAGE; read -r OUTPUT; read -r FAULT || true; } <"$JOB/where"; fi
    go_on
    if [ "$STAGE_SHARDS" = 1 ]; then
        SOUNDWAVE_LOCAL_SHARDS=$LOCAL_DISK/soundwave-shards-$(id -u)
        export SOUNDWAVE_LOCAL_SHARDS
        say "copying the shards to $SOUNDWAVE_LOCAL_SHARDS on every node"
        STOPS_AT_WARNING=1 step --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$((CPUS * TASKS))" \
            "${IN_CONTAINER[@]}" bash "$CODE/slurm/common.sh" worker "$CODE/train/staging.py" "$RECIPE" "$@"
        go_on
    fi
    alone
    event started ""
    say "training"
    STOP_FILE=$OUTPUT/$STAGE/STOP
    rm -f "$STOP_FILE"
    launch "" "$CODE/train/run.py" "$RECIPE" "$@"
    rm -f "$STOP_FILE"
    finish "$CODE_OF_STEP"
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

# run_resumable PROGRAM ARGUMENTS: a program that may be killed at any moment and goes on where it stopped (packing, evaluation).
# Slurm's warning ends it, and the job is requeued.
run_resumable() {
    export STOPS_AT_WARNING=1
    launch "" "$@"
    [ "$WARNED" = 0 ] || [ "$CODE_OF_STEP" = 0 ] || CODE_OF_STEP=85
    finish "$CODE_OF_STEP"
}

# warning_seconds: how long before the time limit Slurm warns, by chain.sh's options or the script.
warning_seconds() {
    { sed -n 's/^.SBATCH --signal=.*@\([0-9]*\).*/\1/p' "$0"; echo "${SOUNDWAVE_OPTIONS:-}" | tr ' ' '\n' \
        | sed -n 's/^--signal=.*@\([0-9]*\).*/\1/p'; } | tail -n 1
}

# go_on: between two steps. After Slurm's warning there is no time for the next one, and nothing to save yet.
go_on() {
    [ "$CODE_OF_STEP" = 0 ] || [ "$WARNED" = 1 ] || finish "$CODE_OF_STEP"
    [ "$WARNED" = 1 ] || return 0
    local now end=${SLURM_JOB_END_TIME:-0}
    now=$(date +%s)
    # Slurm warns of the time limit, and less time has passed than is left: every start would end here. (Preemption may send the
    # same signal; more is left then than the script's own line asks for.)
    if [ "$WARNING" = USR1 ] && [ $((now - BEGAN)) -lt $((end - now)) ] && [ $((end - now)) -le $(($(warning_seconds) + 90)) ]; then
        die "Slurm's warning came before training could begin: give --time more than twice the seconds of --signal=B:USR1@SECONDS"
    fi
    finish 85
}

# --- on the nodes -----------------------------------------------------------------------------------------------------------

# worker PROGRAM ARGS: one rank. Notes the program's exit code; for the launcher, 85 is success, lest it kill the other ranks.
worker() {
    local code=0 cache
    # Until the program listens to them itself; the default would kill it. Preemption sends TERM to every process of a step, and
    # this shell must live to note the program's code.
    [ "${STOPS_AT_WARNING:-0}" = 1 ] || trap '' USR1 TERM
    if [ -z "${TORCHELASTIC_RUN_ID:-}" ]; then  # under torchrun these are set
        export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-1}
    fi
    # Where the site gives each task its own GPU and hides the others, that GPU is number 0.
    case ${CUDA_VISIBLE_DEVICES-none,} in *,*) ;; *) [ "$LOCAL_WORLD_SIZE" = 1 ] || export LOCAL_RANK=0 ;; esac
    # Compiled kernels are cached per node: a shared home is slow, and two nodes building one file spoil it for each other.
    # (C++ ops were built by `make setup`, into the environment itself.)
    cache=$LOCAL_DISK/soundwave-cache-$(id -u)
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
    export MPLCONFIGDIR=${MPLCONFIGDIR:-$cache/matplotlib}
    # Libraries are loaded from there: a folder that another user has made under this name must not be used.
    python -IS "$CODE/core/private_folder.py" "$cache" || code=$?
    if [ "$code" = 0 ]; then
        mkdir -p "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR" "$MPLCONFIGDIR"
        python "$@" || code=$?
    fi
    echo "$code" >"$JOB/exit.$RANK"
    case $code in
        0|85) exit 0 ;;
        *)
            [ "$1" != -m ] || shift
            echo "node ${SLURMD_NODENAME:-$(hostname)}, rank $RANK: $(basename -- "$1") ended with exit code $code" >&2
            exit "$code" ;;
    esac
}

# torchrun_worker GPUS PROGRAM ARGS: one node's torchrun, which starts GPUS workers.
torchrun_worker() {
    local gpus=$1
    shift
    # Inherited by torchrun, which would otherwise die of them and leave its workers behind. TERM it would also handle, and kill
    # its workers 30 seconds later; they get the signal themselves, and may need longer to save.
    [ "${STOPS_AT_WARNING:-0}" = 1 ] || trap '' USR1 TERM
    exec torchrun --signals-to-handle=SIGINT,SIGHUP,SIGQUIT \
        --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$gpus" \
        --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --no-python bash "$CODE/slurm/common.sh" worker "$@"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    "$@"
fi
