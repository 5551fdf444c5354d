# shellcheck shell=bash
# Questions to Slurm and submissions. No client command is waited for longer than 60 seconds, every query names its format, and what
# other programs print is read only in lines of the expected form.

# What a busy controller answers, and what a limit on jobs does. Both pass; everything else is a refusal.
BUSY="timed out|unable to contact|communication|connection refused|connection reset|temporarily|try again"
LIMIT="violates accounting|submit limit|maxjobcount|too many jobs"

client() { timeout 60 "$@"; }

# is_busy CODE ANSWER: whether a command failed because the controller did not answer.
is_busy() { [ "$1" != 0 ] && { [ "$1" = 124 ] || grep -qiE "$BUSY" <<<"$2"; }; }

# patient COMMAND: run a client command, eight times where the controller is busy: on large clusters it can be for minutes, and a
# saved job that is not requeued is a night lost. Prints the answer, or the last error.
patient() {
    local answer code try
    for try in 1 2 3 4 5 6 7 8; do
        code=0
        answer=$(client "$@" 2>&1) || code=$?
        is_busy "$code" "$answer" || break
        [ "$try" = 8 ] || sleep "$BUSY_SECONDS"
    done
    printf '%s\n' "$answer"
    return "$code"
}

# --- variables that others left in the environment ------------------------------------------------------------------------

unset_all() {
    local name
    for name in "$@"; do unset "$name" 2>/dev/null || true; done
}

# unset_others: display settings change what Slurm's commands print or select. A launcher's variables (of a training script that
# submits its successor, say) would make every rank the only one.
unset_others() {
    unset_all "${!SQUEUE_@}" "${!SACCT_@}" "${!SINFO_@}" "${!SCONTROL_@}" "${!SCANCEL_@}" SLURM_TIME_FORMAT SLURM_BITSTR_LEN \
        "${!TORCHELASTIC_@}" "${!PET_@}" RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE NODE_RANK \
        ROLE_NAME ROLE_RANK ROLE_WORLD_SIZE CROSS_RANK CROSS_SIZE MASTER_ADDR MASTER_PORT "${!SOUNDWAVE_@}"
}

# unset_this_job: for scripts that submit from inside a job (salloc's shell, say): the new job must not inherit its variables.
# Also what sbatch reads from the environment and these scripts decide themselves.
unset_this_job() {
    local name
    [ -z "${SLURM_CLUSTERS:-}${SBATCH_CLUSTERS:-}" ] \
        || die "SLURM_CLUSTERS is set: unset it, and submit on a login node of the cluster that shall run the jobs"
    for name in "${!SLURM_@}"; do [ "$name" = SLURM_CONF ] || unset_all "$name"; done
    unset_all "${!SRUN_@}" SBATCH_ARRAY_INX SBATCH_EXPORT SBATCH_JOB_NAME SBATCH_OUTPUT SBATCH_WAIT SBATCH_HINT
}

# keep_own_variables: in a job, of the SLURM_ variables those that Slurm sets anew for every job. sbatch passes on all that it finds
# where it is called, and srun reads most as options: the memory, layout, binding or restarts of another job. An option that the
# job's script or chain.sh's command line asks for keeps its variable (--hint: SLURM_HINT).
keep_own_variables() {
    local name option asked
    asked=$(printf '%s\n' "${OPTIONS[@]}"; grep -s '^#SBATCH' "$0" | cut -d ' ' -f 2- || true)
    for name in "${!SLURM_@}"; do
        case $name in
            SLURM_CONF|SLURM_TMPDIR|SLURM_CLUSTER_NAME|SLURM_WORKING_CLUSTER|SLURM_SUBMIT_DIR|SLURM_SUBMIT_HOST) continue ;;
            SLURM_JOB_ID|SLURM_JOBID|SLURM_JOB_NAME|SLURM_JOB_NODELIST|SLURM_JOB_NUM_NODES|SLURM_JOB_PARTITION) continue ;;
            SLURM_NNODES|SLURM_NODELIST|SLURM_TASKS_PER_NODE|SLURM_JOB_CPUS_PER_NODE|SLURM_JOB_UID|SLURM_JOB_USER) continue ;;
            SLURM_NODE_ALIASES|SLURM_TOPOLOGY_ADDR|SLURM_TOPOLOGY_ADDR_PATTERN) continue ;;
            SLURM_MEM_*|SLURM_*TASK*|SLURM_CPUS_*|SLURM_*GPU*|SLURM_GRES) ;;  # every step's options name these
            *)
                option=${name#SLURM_}
                option=${option,,}
                ! grep -qE -- "^--${option//_/-}(=| |$)" <<<"$asked" || continue ;;
        esac
        unset_all "$name"
    done
    unset_all "${!SRUN_@}" "${!SBATCH_@}"
}

# --- facts about a job ----------------------------------------------------------------------------------------------------

# field NAME: one field of `scontrol show job SLURM_JOB_ID`, given on standard input; empty where there is none. Names and paths
# of the user's stand on lines of their own and may hold anything, "JobState=FAILED" too.
field() {
    awk -v id="$SLURM_JOB_ID" -v name="$1" '
        /^JobId=/ { mine = $1 == "JobId=" id; if (mine && name != "ArrayJobId" && name != "ArrayTaskId") next }
        !mine { next }
        { sub(/^ +/, "") }
        index($0, name "=") == 1 && name ~ /^(Comment|StdErr|StdOut)$/ { sub(/ +$/, ""); print substr($0, length(name) + 2); exit }
        /^(Command|WorkDir|SubmitLine|Comment|AdminComment|SystemComment|StdErr|StdIn|StdOut)=/ { next }
        { for (i = 1; i <= NF; i++) if (index($i, name "=") == 1) { print substr($i, length(name) + 2); exit } }'
}

# job_field NAME: the field as it is now. fact NAME: as it was when the job began (prepare).
job_field() { { patient scontrol -d show job "$SLURM_JOB_ID" || true; } | field "$1"; }
fact() { field "$1" <<<"$JOB_FACTS" | grep -vxE '\(null\)|N/A|None|Unknown' || true; }

# seconds DURATION: of Slurm's [DAYS-]HOURS:MINUTES:SECONDS; nothing for anything else.
seconds() {
    [[ $1 =~ ^(([0-9]+)-)?([0-9]+):([0-9]+):([0-9]+)$ ]] || return 0
    echo $((10#${BASH_REMATCH[2]:-0} * 86400 + 10#${BASH_REMATCH[3]} * 3600 + 10#${BASH_REMATCH[4]} * 60 + 10#${BASH_REMATCH[5]}))
}

# end_of_job: when the time limit ends the job, in seconds since 1970; nothing where Slurm does not say. Of durations, because times
# of day depend on the time zone and on display settings.
end_of_job() {
    local limit run
    limit=$(seconds "$(fact TimeLimit)") run=$(seconds "$(fact RunTime)")
    [ -z "$limit" ] || [ -z "$run" ] || echo $((FACTS_TIME + limit - run))
}

# --- submission -----------------------------------------------------------------------------------------------------------

# queued SCRIPT: the newest job of this user in the queue that was submitted with SCRIPT, other than this one and KNOWN_JOBS. Fails
# where Slurm does not answer.
queued() {
    local answer
    answer=$(patient squeue -h -u "$(id -un)" -o '%F|%o') || return 1
    awk -F '|' -v script="$1" -v own="${SLURM_JOB_ID:-}" -v known="${KNOWN_JOBS:-}" '
        { command = substr($0, length($1) + 2) }
        $1 ~ /^[0-9]+$/ && $1 != own && $1 != known && (command == script || index(command, script " ") == 1) && $1 + 0 > newest + 0 { newest = $1 }
        END { if (newest) print newest }' <<<"$answer"
}

# submit SECONDS SCRIPT SBATCH-ARGUMENTS: submit the job and set SUBMITTED to its id. A busy controller and a limit on jobs are
# waited for, SECONDS at most. A controller may accept a job and not say so: the queue is asked before sbatch is again.
# SBATCH: the command, with its environment.
submit() {
    local until=$(($(date +%s) + $1)) script=$2 answer code
    shift 2
    while :; do
        code=0
        answer=$(client "${SBATCH[@]}" --parsable "$@" 2>&1) || code=$?
        SUBMITTED=$(sed -nE 's/^([0-9]+)(;[^ ]*)?$/\1/p' <<<"$answer" | tail -n 1)
        answer=$(grep -vxE '[0-9]+(;[^ ]*)?' <<<"$answer" || true)
        [ -z "$answer" ] || put "$answer" >&2
        [ "$code" != 0 ] || [ -z "$SUBMITTED" ] || return 0
        if SUBMITTED=$(queued "$script"); then
            [ -z "$SUBMITTED" ] || return 0
            is_busy "$code" "$answer" || { [ "$code" != 0 ] && grep -qiE "$LIMIT" <<<"$answer"; } || return 1
        fi
        [ "$(date +%s)" -lt "$until" ] || return 1
        say "sbatch is asked again in $BUSY_SECONDS s, until $(date -d "@$until" +%T)" >&2
        sleep "$BUSY_SECONDS"
    done
}

# --- nodes ------------------------------------------------------------------------------------------------------------------

# broken_node: a node of this job that Slurm calls down, failed or not responding, with its reason; nothing where all are well.
broken_node() {
    { client sinfo -h -N -n "$SLURM_JOB_NODELIST" -o '%N|%T|%E' 2>/dev/null || true; } \
        | awk -F '|' 'NF >= 2 && tolower($2) ~ /down|fail|error|unknown|boot|no_resp|not_resp|\*/ { print $1 " is " $2 " (" $3 ")"; exit }'
}

# nodes_fail: does a node of this job not run commands any more? Sets FAULT to which and why. srun that refuses is no dead node: on
# this one, which is alive, it then fails too.
nodes_fail() {
    local words code=0
    FAULT_OF_NODE=$(broken_node)
    [ -z "$FAULT_OF_NODE" ] || return 0
    words=$(client srun --overlap --mem=0 --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --cpus-per-task=1 true 2>&1) || code=$?
    [ "$code" != 0 ] || return 1
    client srun --overlap --mem=0 --nodes=1 --ntasks=1 --cpus-per-task=1 --nodelist="${SLURMD_NODENAME:-$(hostname -s)}" true \
        >/dev/null 2>&1 || return 1
    FAULT_OF_NODE=$(broken_node)
    [ -n "$FAULT_OF_NODE" ] || FAULT_OF_NODE="one does not answer within 60 s: $(grep -iE 'error|fatal' <<<"$words" | head -n 1 || true)"
    return 0
}
