#!/usr/bin/env bash
# TA-OPD on the tiny pair with a real SGLang server for the rollouts: one rank next to one server, on
# CPU or on a GPU that both share.
set -euo pipefail
cd "$(dirname "$0")/.."

memory=()
if [ "$(bash examples/gpus.sh)" != 0 ]; then
    memory=(rollout.servers.mem_fraction=0.2)
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec taopd launch --nproc-per-node 1 \
    examples/tiny_pair_sglang.yaml "run.dir=runs/quickstart-sglang-$(date +%Y%m%d-%H%M%S)" \
    "${memory[@]}" "$@"
