#!/usr/bin/env bash
# Runs the tests that a version of megatron-core could break against each that setup.py allows.
#
#   tests/versions.sh [VERSION ...]   all four without any
#   tests/versions.sh --table         what was seen last, as the table of docs/install.md
#
# A version has an environment of its own, $VENVS/VERSION, which is made once: without SGLang, and
# some gigabytes where pip finds no CPU build of torch. $PYTHON311 and $PYTHON312 name interpreters
# that are not on the path as python3.11 and python3.12.
set -euo pipefail
cd "$(dirname "$0")/.."
VENVS=${VENVS:-.venvs}
RESULTS=tests/versions.tsv
FILES=(tests/test_{compat,checkpoint,shards,resume,optimizer,step,models,transformer_engine}.py)

environment() { # VERSION
    local python=${PYTHON312:-python3.12}
    if [[ $1 == 0.16.* ]]; then python=${PYTHON311:-python3.11}; fi
    make --no-print-directory VENV="$VENVS/$1" PYTHON="$python" MEGATRON="$1" \
        "$VENVS/$1/.without-sglang"
}

# PYTHONPATH: an environment that another checkout has made serves this one, too.
run() { # VERSION
    PATH="$(realpath "$VENVS/$1/bin"):$PATH" PYTHONPATH=$PWD OMP_NUM_THREADS=1 \
        python -m pytest -n "${WORKERS:-0}" -W ignore --tb short -p no:cacheprovider \
        --junit-xml "$VENVS/$1/tests.xml" "${FILES[@]}"
}

record() { # VERSION
    "$VENVS/$1/bin/python" - "$VENVS/$1/tests.xml" "$RESULTS" <<'PYTHON'
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

report, results = map(Path, sys.argv[1:])
suite = ElementTree.parse(report).find("testsuite")
tests, failed, errors, skipped = (
    int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")
)
failed += errors
ours = version("megatron-core")
row = [ours, platform.python_version(), version("torch").partition("+")[0]]
row += map(str, (tests - failed - skipped, failed, skipped))
header, *rows = [line.split("\t") for line in results.read_text().splitlines()]
rows = sorted([*(other for other in rows if other[0] != ours), row])
aside = results.with_suffix(".incomplete")
aside.write_text("".join("\t".join(line) + "\n" for line in [header, *rows]))
aside.rename(results)
PYTHON
}

if [[ ${1:-} == --table ]]; then
    sed -e 's/\t/ | /g; s/.*/| & |/' -e '1a |---|---|---|---|---|---|' "$RESULTS"
    exit
fi
status=0
if [[ $# == 0 ]]; then set -- 0.16.1 0.17.1 0.18.2 0.19.2; fi
for version; do
    environment "$version"
    run "$version" || status=1
    record "$version"
done
exit $status
