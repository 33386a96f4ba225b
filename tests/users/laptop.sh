#!/usr/bin/env bash
# A researcher with a laptop: from a clone to a student that transformers loads, prompts of their
# own, one ablation, and both runs on one page. No GPU, no network behind the package index.
#
#     bash tests/users/laptop.sh [DIRECTORY]      # results stay there; without it they go
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/users/steps.sh "${1:-}"

step "a clone is enough: the first command installs what it needs and trains"
make quickstart ARGS="run.dir=$OUT/full train.steps=20 eval.limit=64"
see "$OUT/full/report.html" "$OUT/full/metrics.jsonl" "$OUT/full/student/model.safetensors"

step "the report is one file, and asks nothing of the network"
if grep -Eo '(src|href)="https?:[^"]*"' "$OUT/full/report.html"; then
    fail "the report loads something"
fi

step "transformers loads the student, which answers"
python - "$OUT/full/student" <<'PYTHON'
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
student = AutoModelForCausalLM.from_pretrained(sys.argv[1])
prompt = tokenizer("Sam has 3 pens . finds 4 . ?", return_tensors="pt")
answer = student.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt.input_ids.shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
assert len(answer) > 0
PYTHON

step "its model card says what it is made of, for whoever gets it"
python - "$OUT/full/student/README.md" <<'PYTHON'
import sys
from huggingface_hub import ModelCard

card = ModelCard.load(sys.argv[1], ignore_metadata_errors=False)
assert card.data.library_name == "transformers" and "teach" in card.text
PYTHON

step "prompts of one's own: a few lines, compressed as they came"
python - "$OUT/own.jsonl.gz" <<'PYTHON'
import gzip, json, sys

with gzip.open(sys.argv[1], "wt") as file:
    for pens in range(2, 34):
        row = {"question": f"Sam has {pens} pens . finds 4 . ?", "answer": pens + 4}
        file.write(json.dumps(row) + "\n")
PYTHON
taopd launch --nproc-per-node 2 examples/tiny_pair.yaml "run.dir=$OUT/own" train.steps=2 \
    "data.prompts=$OUT/own.jsonl.gz" data.prompt_column=question eval.prompts=null

step "one flag is an ablation: rows at random instead of those that teach"
taopd launch --nproc-per-node 2 examples/tiny_pair.yaml "run.dir=$OUT/random" train.steps=20 \
    eval.limit=64 selection.selector=random

step "both runs on one page"
taopd compare runs "$OUT/full" "$OUT/random" --out "$OUT/compared"
see "$OUT/compared"/*.html

step "the same command again: there is nothing left to do, and it does nothing"
taopd launch --nproc-per-node 2 examples/tiny_pair.yaml "run.dir=$OUT/random" train.steps=20 \
    eval.limit=64 selection.selector=random 2>&1 | tee "$OUT/again.txt"
grep -q "nothing is left to do" "$OUT/again.txt"

done_in_all
