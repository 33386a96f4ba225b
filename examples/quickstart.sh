#!/usr/bin/env bash
# TA-OPD on the tiny pair: two ranks, student at TP2, teacher at PP2, on CPU (gloo) or on GPUs (NCCL).
set -euo pipefail
cd "$(dirname "$0")/.."

ranks=2
layout=()
if [ "$(bash examples/gpus.sh)" = 1 ]; then
    ranks=1
    layout=(student.parallel.tp=1 teacher.parallel.pp=1)
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec taopd launch --nproc-per-node "$ranks" \
    examples/tiny_pair.yaml "run.dir=runs/quickstart-$(date +%Y%m%d-%H%M%S)" "${layout[@]}" "$@"
