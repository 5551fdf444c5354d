# shellcheck shell=bash disable=SC2153  # the other parts' variables
# Job steps: start them, pass signals on, and find out how they ended and which rank was first.

PORT_TAKEN=98  # exit code of a program that could not listen on MASTER_PORT (train/preflight.py, train/run.py)

# launch SRUN-OPTION PROGRAM ARGS: run a program with one process per GPU, by srun or by torchrun. SRUN-OPTION may be empty.
launch() {
    local options=(${1:+"$1"}) command=("${IN_CONTAINER[@]}" bash "$CODE/slurm/common.sh") try
    shift
    for try in 1 2 3 4 5 6 7 8; do
        choose_port
        if [ "$LAUNCHER" = torchrun ]; then
            step "${options[@]}" --ntasks="$NODES" --ntasks-per-node=1 --cpus-per-task="$((CPUS * TASKS))" \
                "${command[@]}" torchrun_worker "$TASKS" "$@"
        else
            step "${options[@]}" --ntasks="$SOUNDWAVE_RANKS" --ntasks-per-node="$TASKS" --cpus-per-task="$CPUS" \
                "${command[@]}" worker "$@"
        fi
        if [ "$CODE_OF_STEP" = 0 ] || [ "$WARNED" = 1 ] || [ "$try" = 8 ]; then return 0; fi
        if [ "$CODE_OF_STEP" = "$PORT_TAKEN" ]; then
            MASTER_PORT=$((MASTER_PORT + 1))
        elif [ -z "$(notes)" ] && grep -aE '^srun: ' <<<"$SRUN_WORDS" | grep -qiE 'contact slurm controller|create step.*(timed out|contact)'; then
            say "srun cannot reach Slurm's controller: the step is started again in $BUSY_SECONDS s"
            sleep "$BUSY_SECONDS"
        else
            return 0
        fi
    done
}

# choose_port: MASTER_PORT, or the next free port of this node, where rank 0 runs.
choose_port() {
    local taken=$MASTER_PORT
    [ "${SLURMD_NODENAME:-}" = "$MASTER_ADDR" ] || return 0
    while listening "$MASTER_PORT" && [ $((MASTER_PORT - taken)) -lt 100 ]; do MASTER_PORT=$((MASTER_PORT + 1)); done
    [ "$MASTER_PORT" = "$taken" ] || say "port $taken of $MASTER_ADDR is taken by another program: using $MASTER_PORT"
}

# listening PORT: does a program of this node listen on it?
listening() {
    awk -v port="$(printf '%04X' "$1")" '$4 == "0A" && $2 ~ ":" port "$" { found = 1 } END { exit !found }' \
        /proc/net/tcp /proc/net/tcp6 2>/dev/null
}

# step SRUN-ARGUMENTS: run a job step; pass Slurm's warning on to its processes; set CODE_OF_STEP, and CULPRIT where a rank failed.
# The options leave nothing to variables or the site's configuration: all of the job's memory, ranks in the order of the nodes.
# bash runs a trap only while it waits for a background process, hence & and wait.
step() {
    local pid reader status file stderr_of_srun
    [ -f "$CODE/slurm/common.sh" ] || die "the frozen copy $CODE was deleted: submit again, it continues where it stopped" 1
    rm -f "$JOB"/exit.* ${STEP_FOLDER:+"$STEP_FOLDER"/.exit.*} 2>/dev/null || true
    SRUN_WORDS="" file=$(mktemp "${TMPDIR:-/tmp}/soundwave-srun.XXXXXX" 2>/dev/null) || file=""
    exec {stderr_of_srun}> >(keep_words "$file")
    reader=$!
    # shellcheck disable=SC2086  # STEP_OPTIONS is a line of options
    srun --export=ALL --kill-on-bad-exit=1 --nodes="$NODES" --distribution=block --mem=0 "${CONTAINER_OPTIONS[@]}" $STEP_OPTIONS "$@" \
        2>&"$stderr_of_srun" {stderr_of_srun}>&- &
    pid=$!
    exec {stderr_of_srun}>&-
    SIGNALLED=$WARNED  # a warning may have come since the last step
    while :; do
        status=0
        [ "$SIGNALLED" = 1 ] || wait "$pid" || status=$?
        [ "$SIGNALLED" = 1 ] || break
        SIGNALLED=0
        [ -z "${STOP_FILE:-}" ] || touch "$STOP_FILE" 2>/dev/null || true  # for ranks that are still starting, and let the signal pass
        await_srun "$pid"
        kill -USR1 "$pid" 2>/dev/null || true
    done
    # What Slurm sends to this shell with the signal that ended the step shall come now: bash 5.2 ends with a syntax error (exit code
    # 2) if it runs a trap while it parses a $( ).
    sleep 0.3 &
    wait "$!" || true
    for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$reader" 2>/dev/null || break; sleep 0.2; done
    if [ -n "$file" ]; then
        SRUN_WORDS=$(cat "$file") || true
        rm -f "$file"
    fi
    judge "$status"
}

# await_srun PID: wait until a process started in the background is srun. The bash that will be it loses a signal.
await_srun() {
    local name
    for _ in {1..50}; do
        read -r name 2>/dev/null <"/proc/$1/comm" || return 0
        [ "$name" != srun ] || return 0
        command -p sleep 0.1 &
        wait "$!" || true
    done
}

# keep_words FILE: copy srun's own lines to standard error and to FILE. (Ranks write to standard output: worker.)
keep_words() {
    local line
    trap '' USR1 TERM
    while IFS= read -r line || [ -n "$line" ]; do
        put "$line" >&2
        [ -z "$1" ] || { printf '%s\n' "$line" >>"$1"; } 2>/dev/null || true
    done
}

# notes: what ranks noted at their end, a line each: RANK CODE TIME NODE. A rank that was killed with its shell noted nothing.
notes() {
    local file
    for file in "$JOB"/exit.* ${STEP_FOLDER:+"$STEP_FOLDER"/.exit.*}; do
        [ -s "$file" ] || continue
        echo "${file##*exit.} $(head -n 1 "$file")"
    done | sort -u
}

# judge STATUS: set CODE_OF_STEP and CULPRIT from srun's exit status, the ranks' notes and srun's words. srun reports the first bad
# exit, or that it killed the others after it; 85 is a success for it (worker).
judge() {
    local status=$1 noted
    noted=$(notes)
    CODE_OF_STEP=$status CULPRIT=""
    if awk '$2 == 2 { found = 1 } END { exit !found }' <<<"$noted"; then CODE_OF_STEP=2; return 0; fi
    if awk -v taken="$PORT_TAKEN" '$2 == taken { found = 1 } END { exit !found }' <<<"$noted"; then CODE_OF_STEP=$PORT_TAKEN; fi
    if [ "$status" = 0 ]; then
        if awk '$2 == 85 { found = 1 } END { exit !found }' <<<"$noted"; then CODE_OF_STEP=85; fi
        return 0
    fi
    CULPRIT=$(culprit "$noted")
    [ -z "$CULPRIT" ] || return 0
    # A TERM that ended all ranks of a program that has nothing to save is a preemption's, which this shell does not get.
    if [ "$status${STOPS_AT_WARNING:-0}" = 1431 ]; then CODE_OF_STEP=85; fi
    if awk '$2 == 85 { saved = 1 } NF > 1 && $2 != 85 && $2 != 0 { other = 1 } END { exit !saved || other }' <<<"$noted"; then CODE_OF_STEP=85; fi
}

# culprit NOTES: the rank that failed first, as "exit code 1 of rank 3 on n1"; empty where none did. Ranks that end by TERM (143),
# or by KILL after another one's failure, are its victims.
culprit() {
    local line node task message code="" victims='Terminated|User defined signal|exit code (143|138|85)$'
    # srun reports ends in their order; its tasks are ranks where it started them.
    line=$(grep -aE '^srun: error: [^ ]+: tasks? [0-9,-]+: ' <<<"$SRUN_WORDS" | grep -avE "$victims" | head -n 1 || true)
    if [ -n "$line" ] && [ "$LAUNCHER" != torchrun ] && [[ $line =~ ^"srun: error: "([^ ]+)": task"s?" "([0-9,-]+)": "(.*)$ ]]; then
        node=${BASH_REMATCH[1]} task=${BASH_REMATCH[2]} message=${BASH_REMATCH[3]}
        task=$(ranks_in "$task" | awk 'NR == FNR { at[$1] = $3; next } { t = $1 in at ? at[$1] : 0 }
            FNR == 1 || t < best { best = t; rank = $1 } END { print rank }' <(echo "$1") -)
        case $message in
            *"exit code "*) code=${message##*exit code } ;;
            *"Segmentation fault"*) code=139 ;;
            *Aborted*) code=134 ;;
            *"Out Of Memory"*|*Killed*) code=137 ;;
        esac
        describe "${code:-?}" "$task" "$node"
        return
    fi
    # By torchrun, or where srun's words are not known: the first rank that noted a failure of its own, then one that noted nothing.
    line=$(awk 'NF > 1 && $2 != 0 && $2 != 85 && $2 != 143 && $2 != 138 && $2 != 137' <<<"$1" | sort -k 3 | head -n 1)
    if [ -z "$line" ] && grep -qE '^(srun|slurmstepd).*(task|oom|Killed)' <<<"$SRUN_WORDS" && [ -n "$1" ]; then
        task=$(awk -v ranks="$SOUNDWAVE_RANKS" '{ there[$1] = 1 } END { for (r = 0; r < ranks; r++) if (!(r in there)) { print r; exit } }' <<<"$1")
        if [ -n "$task" ] && grep -aE '^srun: error: [^ ]+: tasks? ' <<<"$SRUN_WORDS" | grep -qavE "$victims"; then
            describe 137 "$task" "$(awk -v node=$((task / TASKS + 1)) '{ print $node }' <<<"$SOUNDWAVE_NODES")"
            return
        fi
    fi
    [ -n "$line" ] || line=$(awk '$2 == 137' <<<"$1" | sort -k 3 | head -n 1)
    # shellcheck disable=SC2086
    [ -z "$line" ] || { set -- $line; describe "$2" "$1" "$4"; }
}

# describe CODE RANK NODE
describe() {
    local why=""
    case $1 in
        137) why=" (killed: out of memory?)"; ! grep -qi oom <<<"$SRUN_WORDS" || why=" (killed: out of memory)" ;;
        139|134) why=" (crashed: see its log)" ;;
    esac
    echo "exit code $1 of rank $2 on $3$why"
}

# ranks_in LIST: the numbers of Slurm's "0-2,5", a line each.
ranks_in() {
    local part
    for part in ${1//,/ }; do seq "${part%-*}" "${part#*-}"; done
}

# --- on the nodes -----------------------------------------------------------------------------------------------------------

# worker PROGRAM ARGS: one rank that srun started.
worker() {
    exec 2>&1  # srun's standard error holds its own words only
    [ "${SLURM_STEP_NUM_TASKS:-}" = "$SOUNDWAVE_RANKS" ] \
        || die "srun started ${SLURM_STEP_NUM_TASKS:-no} tasks, but this job has $SOUNDWAVE_RANKS: see STEP_OPTIONS and --ntasks-per-node"
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SOUNDWAVE_TASKS
    [ "$RANK" != 0 ] || [ "${SLURMD_NODENAME:-$MASTER_ADDR}" = "$MASTER_ADDR" ] \
        || die "rank 0 runs on $SLURMD_NODENAME, but the others look for it on $MASTER_ADDR: remove --distribution from STEP_OPTIONS"
    run_rank "$@"
}

# torchrun_rank PROGRAM ARGS: one rank that torchrun_worker's torchrun started, and numbered.
torchrun_rank() {
    [ "${WORLD_SIZE:-}" = "$SOUNDWAVE_RANKS" ] || die "torchrun started ${WORLD_SIZE:-no} ranks, but this job has $SOUNDWAVE_RANKS"
    run_rank "$@"
}

# run_rank PROGRAM ARGS: run the program and note its exit code. For the launcher 85 is success, lest it kill the other ranks.
run_rank() {
    local code=0 cache note=""
    # Where the site gives each task its own GPU and hides the others, that GPU is number 0.
    case ${CUDA_VISIBLE_DEVICES-none,} in *,*) ;; *) [ "$LOCAL_WORLD_SIZE" = 1 ] || export LOCAL_RANK=0 ;; esac
    # Compiled kernels are cached per node: a shared home is slow, and two nodes building one file spoil it for each other.
    # (C++ ops were built by `make setup`, into the environment itself.)
    cache=$LOCAL_DISK/soundwave-cache-$(id -u)
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
    export MPLCONFIGDIR=${MPLCONFIGDIR:-$cache/matplotlib}
    # Libraries are loaded from there: a folder that another user has made under this name must not be used.
    python -IS "$CODE/core/private_folder.py" "$cache" || code=$?
    [ "$code" != 0 ] || mkdir -p "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR" "$MPLCONFIGDIR" \
        || put "node ${SLURMD_NODENAME:-$(hostname)}: no room for caches in LOCAL_DISK=$LOCAL_DISK"
    # Preemption sends TERM to every process of a step, and this shell must live to note the program's code. A program that saves is
    # to live, too, until it handles signals itself: it inherits that they are ignored.
    if [ "${STOPS_AT_WARNING:-0}" = 1 ]; then trap : USR1 TERM; else trap '' USR1 TERM; fi
    [ "$code" != 0 ] || python "$@" || code=$?
    trap '' USR1 TERM  # bash 5.2 ends with a syntax error (exit code 2) if it runs a trap while it parses a $( )
    # The job's folder may be on a full disk; the stage's, where the checkpoint was saved, then seldom is.
    for note in "$JOB/exit.$RANK" ${STEP_FOLDER:+"$STEP_FOLDER/.exit.$RANK"} ""; do
        [ -n "$note" ] || break
        ! { echo "$code $(date +%s.%N) ${SLURMD_NODENAME:-$(hostname)}" >"$note"; } 2>/dev/null || break
    done
    case $code in
        0) exit 0 ;;
        85)
            [ -z "$note" ] || exit 0
            sleep 10  # without a note, the exit code is the only signal: end after the other ranks
            exit 85 ;;
        *)
            [ "$1" != -m ] || shift
            put "node ${SLURMD_NODENAME:-$(hostname)}, rank $RANK: $(basename "$1") ended with exit code $code"
            exit "$code" ;;
    esac
}

# torchrun_worker GPUS PROGRAM ARGS: one node's torchrun, which starts GPUS ranks.
torchrun_worker() {
    local gpus=$1
    shift
    exec 2>&1
    # Inherited by torchrun, which would otherwise die by these signals and leave its workers behind. TERM it would also handle, and kill
    # its workers 30 seconds later; they get the signal themselves, and may need longer to save.
    [ "${STOPS_AT_WARNING:-0}" = 1 ] || trap '' USR1 TERM
    exec torchrun --signals-to-handle=SIGINT,SIGHUP,SIGQUIT \
        --nnodes="$((SOUNDWAVE_RANKS / SOUNDWAVE_TASKS))" --node-rank="$SLURM_NODEID" --nproc-per-node="$gpus" \
        --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --no-python bash "$CODE/slurm/common.sh" torchrun_rank "$@"
}
