"""Time and memory of both conversions of a large synthetic checkpoint, beside `cp -r` of its bytes.

    python -m benchmarks.convert                      # 8 GB, Qwen3-14B's shapes with 8 layers
    python -m benchmarks.convert --model qwen3-30b-a3b --layers 6 --ranks 2

Random bf16 weights; each conversion is a process of its own, timed as a whole (start and imports
included) and measured by its peak resident memory, mapped files included. docs/convert.md has the
figures seen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_taopd.formats.hf import MAX_FILE_BYTES, HFWriter, tensor_shapes

CONVERT = ["-m", "megatron_taopd", "convert"]
SHAPES = {
    "qwen3-14b": (
        Qwen3Config,
        dict(
            hidden_size=5120,
            intermediate_size=17408,
            num_attention_heads=40,
            num_key_value_heads=8,
            head_dim=128,
        ),
    ),
    "qwen2.5-3b": (
        Qwen2Config,
        dict(
            hidden_size=2048,
            intermediate_size=11008,
            num_attention_heads=16,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3-30b-a3b": (
        Qwen3MoeConfig,
        dict(
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
        ),
    ),
}


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="qwen3-14b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1, help="of each conversion, by torchrun")
    parser.add_argument("--tp", type=int, default=1, help="the pieces that to-megatron writes")
    parser.add_argument("--dir", type=Path, help="scratch space of three times the checkpoint")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as scratch:
        measured = measure(arguments, Path(scratch))
    Console().print(as_table(measured))
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2) + "\n")


def measure(arguments, scratch: Path) -> dict:
    kind, sizes = SHAPES[arguments.model]
    config = kind(vocab_size=151936, num_hidden_layers=arguments.layers, **sizes)
    total, largest = make_checkpoint(config, scratch / "hf")
    convert = [sys.executable, *CONVERT]
    if arguments.ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        convert = [sys.executable, *torchrun, str(arguments.ranks), *CONVERT]
    hf, megatron, back = scratch / "hf", scratch / "megatron", scratch / "back"
    layout = ["--tp", str(arguments.tp)]
    ways = {
        "cp -r": ["cp", "-r", hf, scratch / "copy"],
        "to-megatron": [*convert, "to-megatron", "--hf", hf, "--out", megatron, *layout],
        "to-hf": [*convert, "to-hf", "--megatron", megatron, "--out", back],
    }
    outputs = {"cp -r": "copy", "to-megatron": "megatron", "to-hf": "back"}
    runs: dict[str, list[dict]] = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, command in ways.items():
            shutil.rmtree(scratch / outputs[name], ignore_errors=True)
            runs[name].append(run(name, command, scratch))
        shutil.rmtree(scratch / "copy")
    compare = ["verify", "--no-logits", "--quiet", "--hf", back, "--megatron", megatron]
    same = subprocess.run([sys.executable, *CONVERT, *compare], stdout=subprocess.DEVNULL)
    rows = [
        {
            "way": name,
            "seconds": statistics.median(r["wall"] for r in each),
            "converting": statistics.median(r["seconds"] for r in each),
            "peak_memory_bytes": max(r["peak_memory_bytes"] for r in each),
        }
        for name, each in runs.items()
    ]
    return {
        "model": arguments.model,
        "layers": arguments.layers,
        "ranks": arguments.ranks,
        "bytes": total,
        "largest_tensor_bytes": largest,
        "memory_limit_bytes": 3 * largest + 2**30,
        "round_trip_same": same.returncode == 0,
        "ways": rows,
    }


def make_checkpoint(config, directory: Path) -> tuple[int, int]:
    """Random bf16 weights under the names of the config: (bytes, bytes of the largest tensor)."""
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(directory)
    plan = {name: (shape, torch.bfloat16) for name, shape in tensor_shapes(config).items()}
    writer = HFWriter(directory, plan, MAX_FILE_BYTES)
    generator = torch.Generator().manual_seed(0)
    for name, (shape, dtype) in plan.items():
        writer.write(name, torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=generator))
    writer.write_index()
    return writer.total_bytes, max(torch.Size(s).numel() * 2 for s, _ in plan.values())


def run(name: str, command: list, scratch: Path) -> dict:
    """Wall time, the conversion's own time and its peak memory; dirty pages are written first."""
    os.sync()
    figures = scratch / "figures.json"
    extra = [] if name == "cp -r" else ["--quiet", "--json", figures]
    started = time.monotonic()
    subprocess.run([*command, *extra], check=True, stdout=subprocess.DEVNULL)
    wall = time.monotonic() - started
    if name == "cp -r":
        return {"wall": wall, "seconds": wall, "peak_memory_bytes": 0}
    return {"wall": wall, **json.loads(figures.read_text())}


def as_table(measured: dict) -> Table:
    size, largest = (measured[name] / 1e9 for name in ("bytes", "largest_tensor_bytes"))
    table = Table(
        title=f"{measured['model']}, {measured['layers']} layers, {size:.2f} GB, largest tensor "
        f"{largest:.2f} GB, {measured['ranks']} process(es); round trip "
        + ("bit-identical" if measured["round_trip_same"] else "DIFFERS"),
        box=SIMPLE,
    )
    for header in ("", "seconds", "÷ cp -r", "converting", "peak memory", "limit"):
        table.add_column(header, justify="right" if header else "left")
    copied = measured["ways"][0]["seconds"]
    for way in measured["ways"]:
        memory = way["peak_memory_bytes"]
        limit = f"{measured['memory_limit_bytes'] / 1e9:.2f} GB"
        table.add_row(
            way["way"],
            f"{way['seconds']:.1f}",
            f"{way['seconds'] / copied:.2f}",
            f"{way['converting']:.1f}",
            f"{memory / 1e9:.2f} GB" if memory else "",
            limit if memory else "",
        )
    return table


if __name__ == "__main__":
    main()
