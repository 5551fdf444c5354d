# shellcheck shell=bash disable=SC2034  # the other parts' variables
# sbatch's options as slurm/chain.sh and slurm/pack.sh take them on their command lines.

# take_option OPTION: add it to OPTIONS. --export is completed, --job-name goes to JOB_NAME; what these scripts decide themselves is
# refused, because it would undo what the jobs need.
take_option() {
    local option=$1 name=${1%%=*} refused hint
    case $option in
        --export=*)
            case ",${option#*=}," in
                *,ALL,*|*,NONE,*|*,NIL,*) OPTIONS+=("$option") ;;
                *) OPTIONS+=("--export=ALL,${option#*=}") ;;  # alone, sbatch passes on nothing else: no HF_HOME, no proxy
            esac
            return ;;
        --job-name=*/*|-J*/*) die "$option: write a name without /, because logs are named after it" ;;
        --job-name=?*) JOB_NAME=${option#*=}; return ;;
        -J?*) JOB_NAME=${option#-J}; return ;;
        --export|--job-name|-J) die "$option: write $option=VALUE" ;;
    esac
    while read -r refused hint; do
        case $name in
            "${refused%%|*}") die "$name: $hint" ;;
            --?*) case ${refused%%|*} in "$name"*) die "$name: write sbatch's options in full" ;; esac ;;
            -?*) case $refused in *"|${name:0:2}") die "$name: $hint" ;; esac ;;
        esac
    done <<'REFUSED'
--output|-o the log's place is the line --output in the script; the run's folder is output=DIR, without dashes
--array|-a these jobs have no array of yours
--wait|-W nothing is waited for here: follow the jobs with the commands that are printed
--parsable| is given already, and more than job ids is printed
--chdir|-D the jobs run in the folder where this is called
--wrap| the jobs' scripts are those of slurm/
--job-name| write --job-name=NAME
--export| write --export=NAME=VALUE,...
--test-only| use slurm/chain.sh --dry-run
--clusters|-M submit on a login node of that cluster
--export-file| name the variables with --export=NAME=VALUE,...
--version|-V is sbatch's own
--usage| is sbatch's own
REFUSED
    OPTIONS+=("$option")
}

# log_pattern SCRIPT: the value of its --output line, as an absolute path; its folder is made, because Slurm fails a job without one.
log_pattern() {
    local pattern
    pattern=$(sed -n 's/^#SBATCH --output=//p' "$1" | tail -n 1 | tr -d "\"'")
    case ${pattern:=slurm/logs/%x-%j.log} in /*) ;; *) pattern=${PROJECT//%/%%}/$pattern ;; esac
    case ${pattern%/*} in *%*) ;; *) mkdir -p "${pattern%/*}" || die "no folder for logs: ${pattern%/*}" 1 ;; esac
    printf '%s\n' "$pattern"
}

# log_of JOB NAME PATTERN: the log file of a submitted job.
log_of() {
    local found
    found=$({ client scontrol show job "$1" 2>/dev/null || true; } | SLURM_JOB_ID=$1 field StdOut)
    [ -n "$found" ] || found=$(sed "s/%x/$2/g; s/%j/$1/g; s/%%/%/g" <<<"$3")
    printf '%s\n' "$found"
}

# write_settings FOLDER: what a job needs to know of the command that submitted it, whatever its environment holds: the settings that
# were given, and sbatch's options, for a job that has to submit itself anew.
write_settings() {
    local name
    {
        # shellcheck disable=SC2016
        for name in "${GIVEN[@]}"; do printf '[ -n "${%s+x}" ] || %s=%q\n' "$name" "$name" "${!name}"; done
        printf 'OPTIONS=('
        [ ${#OPTIONS[@]} = 0 ] || printf '%q ' "${OPTIONS[@]}"
        echo ')'
    } >"$1/settings" || die "$1/settings cannot be written (disk or quota?)" 1
}
