#!/usr/bin/env bash
# Somebody in a hurry: what everyone mistypes is told in one line, with what would be right, before
# anything is built; `taopd launch` adds nothing to it. tests/faults/bad_inputs.py has many more.
#
#     bash tests/users/mistakes.sh [DIRECTORY]
set -euo pipefail
cd "$(dirname "$0")/../.."
make --quiet .venv/.installed
source tests/users/steps.sh "${1:-}"
TINY=examples/tiny_pair.yaml
run() { taopd launch --nproc-per-node 2 "$@"; }

step "keys and values"
refused 2 "optimizer.learning_rate: unknown key" run $TINY optimizer.learning_rate=1e-4
refused 2 "selection.ratio: 1.5" run $TINY selection.ratio=1.5
refused 2 "teachabilty" run $TINY selection.selector=teachabilty
refused 2 "train.steps" run $TINY train.steps=many
refused 2 "student.parallel" run $TINY student.parallel.tp=3

step "files and models"
refused 2 "examples/tiny_pare.yaml: no such file" run examples/tiny_pare.yaml
refused 2 "data.prompts: $PWD/prompts.jsonl: no such file" run $TINY data.prompts=prompts.jsonl
printf 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n' >"$OUT/pointer.jsonl"
refused 2 "git lfs pull" run $TINY "data.prompts=$OUT/pointer.jsonl" "run.dir=$OUT/run"
printf '{"prompt": "one"}\n{"prompt": "two"\n' >"$OUT/cut.jsonl"
refused 2 "$OUT/cut.jsonl line 2: not JSON" run $TINY "data.prompts=$OUT/cut.jsonl" "run.dir=$OUT/run"
refused 2 "student.path: $PWD/no/such/model: no such directory" run $TINY student.path=./no/such/model

step "servers"
sglang=(rollout.engine=sglang "run.dir=$OUT/run")
refused 2 "does not resolve" run $TINY "${sglang[@]}" 'rollout.servers.urls=[http://no-such-node.invalid:30000]'
refused 2 "http://HOST:PORT is expected" run $TINY "${sglang[@]}" 'rollout.servers.urls=[node1:30000]'
refused 2 "SGLANG_KEY is not set" run $TINY "${sglang[@]}" rollout.servers.api_key_env=SGLANG_KEY

step "the command itself"
refused 2 "no command 'trian'" taopd trian $TINY
refused 2 "--gpus" taopd plan $TINY
refused 2 "nowhere: no such directory" taopd plan $TINY --gpus 2 --json nowhere/plan.json
refused 2 "--host: 0.0.0.0 without --api-key-env" taopd serve examples/tiny_pair/student --host 0.0.0.0

step "and none of them has left anything behind"
[ ! -e "$OUT/run" ] || [ -z "$(ls "$OUT/run")" ] || fail "$OUT/run: $(ls "$OUT/run")"
[ ! -e nowhere ] || fail "a directory was made"

done_in_all
