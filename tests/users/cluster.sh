#!/usr/bin/env bash
# An engineer with 64 GPUs, as far as one machine without any goes: the plan and the manifests of a
# recipe; then servers and two nodes of this machine, a pre-emption, a killed rank, and the student.
#
#     bash tests/users/cluster.sh [DIRECTORY]      # results stay there; without it they go
set -euo pipefail
cd "$(dirname "$0")/../.."
make --quiet .venv/.installed
source tests/users/steps.sh "${1:-}"
RECIPE=examples/recipes/qwen3_14b_to_4b_64gpu.yaml
export MODELS="$OUT/models" DATA="$OUT/data" RUNS="$OUT/runs" SGLANG_KEY=secret
mkdir -p "$MODELS" "$DATA" "$RUNS"

step "what it takes on 64 H800s, before there is one: both models' config.json is enough"
PYTHONPATH=tests python - "$MODELS" <<'PYTHON'
import sys
from support.published import MODELS

for name in ("Qwen3-14B", "Qwen3-4B"):
    MODELS[name].save_pretrained(f"{sys.argv[1]}/{name}")
PYTHON
urls=$(for node in 6 7 8; do for gpu in 0 1 2 3 4 5 6 7; do echo "http://node$node:3000$gpu"; done; done | paste -sd,)
taopd plan "$RECIPE" --gpus 40 --cluster h800 "rollout.servers.urls=[$urls]" | tee "$OUT/plan.txt"
grep -q "fits: at most" "$OUT/plan.txt"

step "this machine: versions, network, disks, prompts"
taopd doctor examples/tiny_pair.yaml --quick "run.dir=$RUNS/two_nodes"

step "a server of rollouts, which a run finds by its URL"
port=$(python -c 'from megatron_taopd.serving.server import free_port; print(free_port("127.0.0.1"))')
begin taopd serve examples/tiny_pair/student --host 127.0.0.1 --port "$port" --dtype float32 \
    --api-key-env SGLANG_KEY --max-total-tokens 8192 --logs "$OUT/servers" >"$OUT/serve.txt"
for _ in $(seq 1200); do
    grep -qs serves "$OUT/serve.txt" && break
    sleep 0.5
done
see "$OUT/serve.txt"

step "two nodes, one rank each, until the scheduler takes them away"
rendezvous=$(python -c 'from megatron_taopd.serving.server import free_port; print(free_port("127.0.0.1"))')
node() {
    NNODES=2 NODE_RANK=$1 NPROC=1 MASTER_PORT=$rendezvous PAUSE=1 examples/launch/node.sh \
        examples/tiny_pair.yaml "run.dir=$RUNS/two_nodes" rollout.engine=sglang \
        "rollout.servers.urls=[http://127.0.0.1:$port]" rollout.servers.api_key_env=SGLANG_KEY \
        rollout.prompts=16 checkpoint.every=2 eval.at_start=false eval.every=0 eval.limit=16 \
        "train.steps=$2" >"$OUT/node$1.txt" 2>&1
}
logged() { cat "$RUNS/two_nodes/metrics.jsonl" 2>/dev/null | wc -l; }
until_step() {
    for _ in $(seq 2400); do
        [ "$(logged)" -ge "$1" ] && return
        kill -0 "$2" 2>/dev/null || fail "a node has ended: $(tail -5 "$OUT"/node*.txt)"
        sleep 0.25
    done
    fail "step $1 was not reached"
}
node 0 500 & first=$!
node 1 500 & second=$!
STARTED+=("$first" "$second")
until_step 3 "$first"
pkill -TERM --parent "$first"; pkill -TERM --parent "$second"
status=0; wait "$first" || status=$?
[ "$status" = 3 ] || fail "status $status: $(tail "$OUT/node0.txt")"
wait "$second" || true
grep "stopped after step" "$OUT/node0.txt"
before=$(logged)

# Node 1's: its launcher ends and starts again before node 0 has noticed.
step "the same command goes on; a rank that is killed is started again, by itself"
last=$((before + 6))
node 0 "$last" & first=$!
node 1 "$last" & second=$!
STARTED+=("$first" "$second")
until_step $((before + 3)) "$first"
pkill -KILL --parent "$(pgrep --parent "$(pgrep --parent "$second")")" --full megatron_taopd.train
wait "$first" || fail "node 0: $(tail "$OUT/node0.txt")"
wait "$second" || fail "node 1: $(tail "$OUT/node1.txt")"
grep -E "start 2 of|resuming after step" "$OUT"/node*.txt
python - "$RUNS/two_nodes/metrics.jsonl" "$last" <<'PYTHON'
import json, sys

steps = [json.loads(line)["step"] for line in open(sys.argv[1])]
assert steps == [*range(1, int(sys.argv[2]) + 1)], steps
PYTHON

step "the student, in Megatron's format and back, to the bit"
taopd convert to-megatron --hf "$RUNS/two_nodes/student" --out "$OUT/megatron" --quiet
taopd convert to-hf --megatron "$OUT/megatron" --out "$OUT/again" --quiet
python - "$RUNS/two_nodes/student" "$OUT/again" <<'PYTHON'
import sys
from safetensors.torch import load_file

before, after = (load_file(f"{place}/model.safetensors") for place in sys.argv[1:])
assert before.keys() == after.keys() and all(before[n].equal(after[n]) for n in before)
PYTHON
taopd verify --hf "$RUNS/two_nodes/student" --megatron "$OUT/megatron" --no-logits --quiet

done_in_all
