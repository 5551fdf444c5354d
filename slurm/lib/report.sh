# shellcheck shell=bash
# Lines for people and for train.status. Nothing here fails: a full disk must not turn a saved or finished stage into a failed one.

# clean TEXT: TEXT with line breaks, terminal escapes and other control characters as blanks.
clean() { printf '%s' "${1//[[:cntrl:]]/ }"; }

# put TEXT [FILE]: write one line to standard output or append it to FILE. A line that FILE does not take goes to standard output.
put() {
    if [ $# = 1 ]; then
        { printf '%s\n' "$1"; } 2>/dev/null || true
    else
        { printf '%s\n' "$1" >>"$2"; } 2>/dev/null || say "$2 takes no line: $1"
    fi
}

say() { put "[$(date '+%F %T')] $(clean "$*")"; }

# die MESSAGE [CODE]: log an error and end with CODE, by default 2 (wrong input).
die() { say "error: $1" >&2; exit "${2:-2}"; }

# json TEXT: TEXT as a JSON string.
json() {
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\n'/\\n}
    text=${text//$'\t'/\\t}
    printf '"%s"' "$(clean "$text")"
}

# event NAME DETAIL: append one JSON line to OUTPUT/slurm.jsonl, which `python -m train.status` reads. EVENT_JOB: the job that the
# line is about, if it is not this one.
event() {
    [ -n "${OUTPUT:-}" ] && [ -d "$OUTPUT" ] || return 0
    local line
    printf -v line '{"time": "%s", "stage": %s, "job": "%s", "event": "%s", "restarts": %s, "nodes": %s, "log": %s, "detail": %s}' \
        "$(date -u +%FT%T.%3NZ)" "$(json "$STAGE")" "${EVENT_JOB:-${SLURM_JOB_ID:-}}" "$1" "${RESTARTS:-0}" \
        "$(json "${SLURM_JOB_NODELIST:-}")" "$(json "${LOG:-}")" "$(json "$2")"
    put "$line" "$OUTPUT/slurm.jsonl"
}
