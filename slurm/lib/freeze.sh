# shellcheck shell=bash
# The frozen copy: the project's code and a recipe with the recipes that it is based on. Queued and requeued jobs run this copy, so
# that editing the checkout meanwhile changes nothing for them.

# freeze CODE RECIPE: copy the code, and RECIPE if it is not empty, to the folder CODE. Prints where the recipe went.
freeze() {
    local code=$1 recipe frozen next part seen="" failed="no frozen copy in $1 (disk or quota?)"
    set -o pipefail  # always called in a $( ), where bash drops set -e
    if [ ! -d "$code" ]; then
        mkdir -p "$code.part" || die "$failed" 1
        for part in core train model data_tools recipe stream soundwave serving evaluation ds_configs slurm; do
            # 1: a file changed while it was read, as editors do it.
            { tar -cf - -C "$PROJECT" --exclude=__pycache__ --exclude=slurm/jobs --exclude=slurm/logs "$part" || [ $? = 1 ]; } \
                | tar -xf - -C "$code.part" || die "$failed" 1
        done
        git -C "$PROJECT" describe --always --dirty '--exclude=*' >"$code.part/VERSION" 2>/dev/null || true  # core/files.py, code_version
        mv "$code.part" "$code" || die "$failed" 1  # atomic
    fi
    [ -n "$2" ] || return 0
    recipe=$(realpath -m -- "$2")
    next=$recipe
    while [ -f "$next" ]; do  # `base:` is relative to the recipe that names it, so the folders between them are kept
        frozen=$(frozen_path "$code" "$next")
        [ -e "$frozen" ] || { mkdir -p -- "$(dirname -- "$frozen")" && cp -- "$next" "$frozen"; } || die "$failed" 1
        seen+="$next"$'\n'
        part=$(base_of "$next") || exit $?
        [ -n "$part" ] || break
        case $part in /*) die "$next: base $part is an absolute path, and would not be frozen: write it relative to the recipe" ;; esac
        part=$(realpath -m -- "$(dirname -- "$next")/$part")
        [ -f "$part" ] || die "$next: base $part does not exist"
        ! grep -qxF -- "$part" <<<"$seen" || die "$next: base $part is based on this recipe itself"
        [ "$(in_project "$next")" = "$(in_project "$part")" ] \
            || die "$next: base $part lies on the other side of $PROJECT: keep a recipe and its base in one folder"
        next=$part
    done
    frozen_path "$code" "$recipe"
}

in_project() { case $1 in "$PROJECT"/*) echo yes ;; *) echo no ;; esac; }

# frozen_path CODE FILE: where FILE lies in the frozen copy: at its own place in the project, or under outside/.
frozen_path() {
    case $2 in
        "$1"/*) echo "$2" ;;
        "$PROJECT"/*) echo "$1/${2#"$PROJECT"/}" ;;
        *) echo "$1/outside$2" ;;
    esac
}

# base_of RECIPE: the value of its key `base`, as YAML reads it where it stands on one line; empty where there is none.
base_of() {
    local line value quoted="^'(([^']|'')*)'[[:space:]]*(#.*)?\$" double='^"(([^"\\]|\\["\\])*)"[[:space:]]*(#.*)?$'
    line=$(sed '1s/^\xef\xbb\xbf//; s/\r$//' "$1" | grep -m 1 -E "^(base|'base'|\"base\")[[:space:]]*:([[:space:]]|\$)") || return 0
    value=${line#*:}
    value=${value#"${value%%[![:space:]]*}"}
    if [[ $value =~ $quoted ]]; then
        value=${BASH_REMATCH[1]//"''"/"'"}
    elif [[ $value =~ $double ]]; then
        value=$(printf '%s\n' "${BASH_REMATCH[1]}" | sed 's/\\\(["\\]\)/\1/g')
    else
        value=${value%%[[:space:]]#*}
        value=${value%"${value##*[![:space:]]}"}
        case $value in
            null|"~"|"") value="" ;;
            [][{}\"\'\&*!\|\>@\`%]*) die "$1: '$line' cannot be read here: write base: FILE on one line" ;;
        esac
    fi
    printf '%s\n' "$value"
}
