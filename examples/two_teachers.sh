#!/usr/bin/env bash
# Two experts teach one student both of their skills: makes them once, then runs two_teachers.yaml.
set -euo pipefail
cd "$(dirname "$0")/.."

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
[ -d examples/two_teachers/subtract ] || python tools/make_two_experts.py --out examples/two_teachers
ranks=2
layout=()
if [ "$(bash examples/gpus.sh)" = 1 ]; then
    ranks=1
    layout=(student.parallel.tp=1 teacher.parallel.pp=1)
fi
exec taopd launch --nproc-per-node "$ranks" \
    examples/two_teachers.yaml "run.dir=runs/two-teachers-$(date +%Y%m%d-%H%M%S)" "${layout[@]}" "$@"
