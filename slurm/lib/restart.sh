# shellcheck shell=bash disable=SC2034  # the other parts' variables
# What happens after a step: the job ends, is requeued, or is submitted anew where the site does not requeue.

# finish CODE: end the job as the step's exit code demands. Does not return.
finish() {
    local now state
    case $1 in
        0) event "done" ""; say "$STAGE is done${OUTPUT:+: $OUTPUT/$STAGE/model}"; exit 0 ;;
        2) event failed "${FAULT:-wrong recipe or input}"; die "wrong recipe or input: see the line above; not requeued" ;;
    esac
    now=$(patient scontrol -d show job "$SLURM_JOB_ID") || now=""
    state=$(field JobState <<<"$now")
    [ "${state:-RUNNING}" = RUNNING ] || ended_by_slurm "$1" "$state" "$now"
    if [ "$1$WARNED" = 850 ] && [ -n "${STOP_FILE:-}" ] && grep -qs '"reason": "STOP file' "$OUTPUT/$STAGE/run.json"; then
        event stopped "STOP file"
        say "$STAGE has saved and stopped, as its STOP file asked; not requeued. Submitting it again continues from there"
        exit 85
    fi
    [ "$1" != 85 ] || start_again stop "stopped in time"
    # A signal ended the step after the warning or a save, and no rank failed of itself (a crash is noted: 139, 137, ...).
    if [ "$1" -gt 128 ] && [ -z "$CULPRIT" ] && { [ "$WARNED" = 1 ] || notes | grep -q ' 85 '; }; then
        start_again fault "killed after the warning"
    fi
    if [ -z "$INTERACTIVE" ] && nodes_fail; then start_again fault "node failure: $FAULT_OF_NODE"; fi
    [ -n "$FAULT" ] || FAULT=${CULPRIT:-$(refusal "$1")}
    event failed "$FAULT"
    die "$STAGE failed, $FAULT: see the lines above; not requeued. Submitting it again continues where it stopped" 1
}

# ended_by_slurm CODE STATE FACTS: the job is cancelled, past its time limit, preempted, or back in the queue. Does not return.
ended_by_slurm() {
    trap '' USR1 TERM
    if [ "$(field Restarts <<<"$3")" -gt "$OWN_RESTARTS" ]; then
        [ "$1" != 85 ] || ! grep -q "DUE TO PREEMPTION" <<<"$SRUN_WORDS" || note_stop
        event requeued "by Slurm"
        say "Slurm has put this job back into the queue: nothing more to do here"
        exit 85
    fi
    case $(field PreemptTime <<<"$3") in ""|None|Unknown) ;; *)
        if [ -z "$INTERACTIVE$ARRAY_TASK" ]; then
            if [ "$1" = 85 ]; then STOPS=$((STOPS + 1)); else FAULTS=$((FAULTS + 1)); fi
            limit_restarts "$STOPS" "$FAULTS" preempted
            say "preempted, and cancelled by Slurm (PreemptMode=CANCEL): submitting a new job in this one's place"
            event preempted "$([ "$1" = 85 ] && echo saved || echo "exit code $1")"
            resubmit 20
        fi ;;
    esac
    event ended "by Slurm ($2), exit code $1"
    say "Slurm ends this job ($2): nothing more to do here"
    exit 85
}

# refusal CODE: srun's own reason where no rank has failed: it refused the step, or could not start it.
refusal() {
    local line
    line=$(grep -aE '^srun: (fatal|error|unrecognized|invalid)' <<<"$SRUN_WORDS" | grep -vE ': tasks? [0-9,-]+: ' | head -n 1 || true)
    [ -n "$line" ] && [ -z "$(notes)" ] && echo "srun refuses the step (${line#srun: })" || echo "exit code $1"
}

# note_stop: a stop that was saved, with which this job's next start begins. An empty file needs no room.
note_stop() { { : >"$JOB/stop.$((OWN_RESTARTS + 1))"; } 2>/dev/null || true; }

# start_again stop|fault WHY: put this job back into the queue, or submit it anew where that is forbidden. Does not return.
# A stop was saved (time limit, preemption), a fault was not.
start_again() {
    local refusal now state code=1
    [ "$1" = fault ] || code=85
    if [ -n "$INTERACTIVE" ]; then
        event stopped "$2"
        die "$2: an interactive job is not requeued; the same command again continues where it stopped" 1
    fi
    if [ "$1" = stop ]; then
        limit_restarts $((STOPS + 1)) "$FAULTS" "$2"
        say "$2: requeue, stop $((STOPS + 1)) of at most $MAX_PREEMPTIONS"
        note_stop
    else
        limit_restarts "$STOPS" $((FAULTS + 1)) "$2"
        say "$2: requeue, fault $((FAULTS + 1)) of at most $MAX_RESTARTS"
    fi
    event requeued "$2"
    trap '' USR1 TERM  # Slurm ends this shell
    if refusal=$(patient scontrol requeue "$SLURM_JOB_ID"); then
        sleep 60
        exit 85
    fi
    now=$(patient scontrol -d show job "$SLURM_JOB_ID") || now=""
    state=$(field JobState <<<"$now")
    [ "${state:-RUNNING}" = RUNNING ] || ended_by_slurm "$code" "$state" "$now"  # cancelled in this moment
    if [ -n "$ARRAY_TASK" ]; then  # the job that merges waits for this array, and a part can't be submitted alone
        die "this site does not requeue ($(clean "$refusal")): run the same slurm/pack.sh command again, it continues" 1
    fi
    say "this site does not requeue ($refusal): submitting a new job in this one's place"
    [ "$1" = stop ] || FAULTS=$((FAULTS + 1))
    [ "$1" = fault ] || STOPS=$((STOPS + 1))
    resubmit 600
}

# limit_restarts STOPS FAULTS WHY: end the job where it was started too often.
limit_restarts() {
    local limit=""
    [ "$1" -le "$MAX_PREEMPTIONS" ] || limit="restarted $MAX_PREEMPTIONS times after it had saved (MAX_PREEMPTIONS)"
    [ "$2" -le "$MAX_RESTARTS" ] || limit="restarted $MAX_RESTARTS times already after faults (MAX_RESTARTS)"
    [ -n "$limit" ] || return 0
    event failed "$3, but $limit"
    die "$3, but $limit: look for the cause; submitting it again continues where it stopped" 1
}

# resubmit SECONDS: a new job of the same script, options and arguments, which sbatch has SECONDS to accept; every job that waits for
# this one waits for the new one. Does not return.
resubmit() {
    local left=$1 value words contract name waiting given=()
    if [ -n "$END" ] && [ $((END - $(date +%s) - 45)) -lt "$left" ]; then left=$((END - $(date +%s) - 45)); fi
    contract=(--frozen "$FROZEN" --place "$PLACE" ${RECIPE:+--recipe "$RECIPE"} --stops "$STOPS" --faults "$FAULTS"
        --first-job "$FIRST_JOB" --instead-of "$SLURM_JOB_ID" --)
    # The new job gets what this one was given, not what it has made of that: folders on its nodes' disks, say, that go with it.
    while IFS= read -r -d '' value; do
        name=${value%%=*}
        case $name in SLURM_CONF) given+=("$value") ;; SLURM_*|SLURMD_*|SBATCH_*|SRUN_*|SOUNDWAVE_*) ;; *) given+=("$value") ;; esac
    done <"/proc/$$/environ"
    same_options
    SBATCH=(env -i "${given[@]}" sbatch)
    if ! submit "$left" "$0" "${SAME_OPTIONS[@]}" "$0" "${contract[@]}" "${ARGUMENTS[@]}"; then
        event failed "could not be submitted again"
        die "sbatch does not accept a new job (above): submit it again yourself, and it resumes" 1
    fi
    put "$SUBMITTED" "$FROZEN/$PLACE.job"
    while read -r waiting words; do
        patient scontrol update "JobId=$waiting" "Dependency=$words" >/dev/null \
            || say "job $waiting waits for this one; change it with: scontrol update JobId=$waiting Dependency=$words"
    done < <(dependents "$SUBMITTED")
    event resubmitted "as job $SUBMITTED"
    LOG=$(numbered "$SUBMITTED" "$LOG")
    EVENT_JOB=$SUBMITTED event submitted "in place of job $SLURM_JOB_ID"
    say "submitted as job $SUBMITTED"
    exit 85
}

# dependents NEW: the jobs that wait for this one, a line each: their id, and their dependencies with NEW in this job's place.
dependents() {
    { patient squeue -h -u "$(id -un)" -t PENDING -o '%i %E' || true; } | sed -E 's/\([a-z]+\)//g' \
        | sed -nE "s/:$SLURM_JOB_ID(\$|[^0-9_])/:$1\\1/gp"
}

# same_options: SAME_OPTIONS, the sbatch options of this job, from what Slurm knows of it and what slurm/chain.sh was given.
same_options() {
    local field option value kind signal
    SAME_OPTIONS=("--chdir=$PWD" --export=ALL "--job-name=$SLURM_JOB_NAME" "--nodes=$NODES" "--ntasks-per-node=$TASKS" "--cpus-per-task=$CPUS")
    for option in Partition:partition Account:account QOS:qos TimeLimit:time Features:constraint Reservation:reservation \
        ExcNodeList:exclude ReqNodeList:nodelist Licenses:licenses MinMemoryNode:mem MinMemoryCPU:mem-per-cpu MinTmpDiskNode:tmp \
        WCKey:wckey MailUser:mail-user MailType:mail-type Comment:comment; do
        field=${option%:*} option=${option#*:}
        value=$(fact "$field")
        case $field:$value in
            *:) ;;
            TimeLimit:Partition_Limit|MinTmpDiskNode:0|MailType:NONE) ;;
            MinMemory*:0) [ -n "$(fact MemPerTres)" ] || SAME_OPTIONS+=("--mem=0") ;;
            *) SAME_OPTIONS+=("--$option=$value") ;;
        esac
    done
    for option in TresPerNode:gres TresPerTask:gpus-per-task TresPerJob:gpus TresPerSocket:gpus-per-socket MemPerTres:mem-per-gpu \
        CpusPerTres:cpus-per-gpu; do
        field=${option%:*} option=${option#*:}
        value=$(fact "$field")
        [ -n "$value" ] || continue
        value=${value//gres[:\/]/}  # gres:gpu:a100:2, gres/gpu:a100=2
        value=${value//=/:}
        if [ "$option" != gres ]; then
            kind=$(tr ',' '\n' <<<"$value" | sed -n 's/^gpu://p' | head -n 1)
            [ -z "$kind" ] || SAME_OPTIONS+=("--$option=$kind")
        elif [[ $value != *,* ]] && grep -qs '^#SBATCH --gpus-per-node' "$0"; then
            SAME_OPTIONS+=("--gpus-per-node=${value#gpu:}")
        else
            SAME_OPTIONS+=("--gres=$value")
        fi
    done
    case $(fact OverSubscribe) in
        NO) SAME_OPTIONS+=(--exclusive) ;;
        YES) SAME_OPTIONS+=(--oversubscribe) ;;
        USER) SAME_OPTIONS+=(--exclusive=user) ;;
    esac
    [ "$(fact Requeue)" != 0 ] || SAME_OPTIONS+=(--no-requeue)
    value=$(fact Nice)
    [ "${value:-0}" = 0 ] || SAME_OPTIONS+=("--nice=$value")
    # The log's name is known with this job's number in it.
    for option in StdOut:output StdErr:error; do
        value=$(fact "${option%:*}")
        [ -n "$value" ] || continue
        if [ "$option" = StdErr:error ] && [ "$value" = "$(fact StdOut)" ]; then continue; fi
        SAME_OPTIONS+=("--${option#*:}=$(numbered %j "${value//%/%%}")")
    done
    signal=$(warning_asked_for)
    [ -z "$signal" ] || SAME_OPTIONS+=("--signal=$signal")
    for value in "${OPTIONS[@]}"; do  # of two of a kind sbatch takes the last; what these two ask for has been waited for
        case $value in --begin=*|-b*|--dependency=*|-d*|--hold|-H) ;; *) SAME_OPTIONS+=("$value") ;; esac
    done
}

# numbered NUMBER FILE: FILE with NUMBER in its name in the place of this job's, where that is at the end.
numbered() {
    local name=${2##*/}
    printf '%s\n' "${2%"$name"}$(printf '%s\n' "$name" | sed "s/\(.*[^0-9]\|^\)$SLURM_JOB_ID\([^0-9]\|\$\)/\1$1\2/")"
}

# warning_asked_for: --signal's value, where it differs from the script's: Slurm does not show it. From the accounting's record of the
# command, or from when the warning came.
warning_asked_for() {
    local line left limit
    line=$({ timeout 10 sacct -X -n -P -j "$SLURM_JOB_ID" -o SubmitLine 2>/dev/null || true; } | grep -oE -- '--signal[= ][^ ]+' | tail -n 1 || true)
    if [ -n "$line" ]; then echo "${line#--signal?}"; return; fi
    [ "$WARNING" = USR1 ] && [ -n "$END" ] || return 0
    left=$((END - WARNED_AT)) limit=$(seconds "$(fact TimeLimit)")
    # Slurm warns up to a minute early. What comes much earlier was sent by somebody else, a preemption say.
    if [ "$left" -gt 0 ] && [ "$left" -le 7200 ] && [ $((left * 2)) -lt "$limit" ] && { [ "$left" -lt "$(warning_seconds)" ] \
        || [ "$left" -gt $(($(warning_seconds) + 90)) ]; }; then echo "B:USR1@$left"; fi
}

# warning_seconds: how long before the time limit Slurm warns, by chain.sh's options or the script.
warning_seconds() {
    { sed -n 's/^.SBATCH --signal=.*@\([0-9]*\).*/\1/p' "$0"; printf '%s\n' "${OPTIONS[@]}" | sed -n 's/^--signal=.*@\([0-9]*\).*/\1/p'; echo 0; } \
        | grep -v '^0$' | tail -n 1 | grep . || echo 0
}
