# What the scripts of this directory have in common: numbered steps, and what to see after them.
# It sets OUT, the directory of the results, and puts the environment of the clone on the path.
MADE=
OUT=${1:-}
if [ -z "$OUT" ]; then
    OUT=$(mktemp -d)
    MADE=yes
fi
mkdir -p "$OUT"
PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
STEPS=0
STARTED=()

step() {
    STEPS=$((STEPS + 1))
    printf '\n— %d. %s (%d s)\n' "$STEPS" "$1" "$SECONDS"
}

fail() {
    echo "step $STEPS: $1" >&2
    exit 1
}

# Files that have to be there and not be empty.
see() {
    local file
    for file in "$@"; do
        [ -s "$file" ] || fail "$file is missing or empty"
    done
}

# refused STATUS TEXT COMMAND…: it ends with this status after one line on stderr that has the text.
refused() {
    local status=0 wanted=$1 text=$2
    shift 2
    "$@" >"$OUT/stdout" 2>"$OUT/stderr" || status=$?
    printf '  %s\n' "$(head -c 300 "$OUT/stderr")"
    [ "$status" = "$wanted" ] || fail "status $status instead of $wanted: $*"
    [ "$(wc -l <"$OUT/stderr")" = 1 ] || fail "more than one line: $(cat "$OUT/stderr")"
    grep -qF -- "$text" "$OUT/stderr" || fail "the line does not say '$text'"
}

# Processes in the background, which end with the script whatever happens.
begin() {
    "$@" &
    STARTED+=("$!")
}

end_all() {
    local pid
    for pid in "${STARTED[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    wait || true
    [ -z "$MADE" ] || rm -rf "$OUT"
}
trap end_all EXIT

done_in_all() {
    printf '\n%d steps in %d s\n' "$STEPS" "$SECONDS"
}
