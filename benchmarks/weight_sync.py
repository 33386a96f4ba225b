"""Seconds from the trainer's weights to a server that goes on with them, for each way.

    python -m benchmarks.weight_sync                                  # the tiny student
    python -m benchmarks.weight_sync --hf Qwen3-4B --bucket-mib 512
    python -m benchmarks.weight_sync --random-mib 500

One process with whole tensors in memory and one SGLang server on this machine; the trainer's own
gathering of shards is not in the figures. The first push also makes the process group.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config

from megatron_taopd.formats.hf import (
    MAX_FILE_BYTES,
    HFCheckpoint,
    HFWriter,
    load_config,
    tensor_shapes,
)
from megatron_taopd.parallel import platform
from megatron_taopd.rollout.weight_sync import DiskSync, DistributedSync, TensorSync
from megatron_taopd.serving.server import Server

TINY = Path(__file__).parent.parent / "examples" / "tiny_pair" / "student"


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", type=Path, default=TINY, help="Hugging Face directory")
    parser.add_argument("--random-mib", type=int, help="random bf16 weights of this size instead")
    parser.add_argument("--bucket-mib", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", default="distributed,tensor,disk")
    parser.add_argument("--dir", type=Path, help="scratch space, for the disk way too")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    platform.initialize()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as scratch:
        measured = measure(arguments, Path(scratch))
    Console().print(as_table(measured))
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2) + "\n")


def measure(arguments, scratch: Path) -> dict:
    hf_dir = arguments.hf
    if arguments.random_mib:
        hf_dir = scratch / "model"
        make_checkpoint(hf_dir, arguments.random_mib << 20)
    checkpoint = HFCheckpoint(hf_dir)
    names = tensor_shapes(load_config(hf_dir))
    tensors = [(name, checkpoint[name].to(platform.device())) for name in names]
    bucket = arguments.bucket_mib << 20
    syncs = {
        "distributed": lambda: DistributedSync(hf_dir, bucket),
        "tensor": lambda: TensorSync(hf_dir, bucket),
        "disk": lambda: DiskSync(hf_dir, bucket, directory=scratch),
    }
    rows, version = [], 0
    options = dict(max_total_tokens=4096, max_running_requests=16)
    with Server(hf_dir, scratch / "server.log", **options) as server:
        replica, client = SimpleNamespace(url=server.url, tp=1, gpus=(0,)), Client()
        for way in arguments.ways.split(","):
            sync, seconds = syncs[way](), []
            for _ in range(1 + arguments.repeats):
                version += 1
                started = time.perf_counter()
                sync.push(client, [replica], iter(tensors), version)
                seconds.append(time.perf_counter() - started)
            rows.append(
                {"way": way, "first": seconds[0], "seconds": statistics.median(seconds[1:])}
            )
    return {
        "model": str(hf_dir.name),
        "device": platform.device().type,
        "bytes": sum(tensor.nbytes for _, tensor in tensors),
        "bucket_mib": arguments.bucket_mib,
        "ways": rows,
    }


def make_checkpoint(directory: Path, size: int) -> None:
    """Random bf16 weights, at least so many bytes."""
    config = Qwen3Config(
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        num_hidden_layers=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"],
    )
    while 2 * sum(map(_numel, tensor_shapes(config).values())) < size:
        config.num_hidden_layers += 1
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    config.save_pretrained(directory)
    plan = {name: (shape, torch.bfloat16) for name, shape in tensor_shapes(config).items()}
    writer = HFWriter(directory, plan, MAX_FILE_BYTES)
    for name, (shape, dtype) in plan.items():
        writer.write(name, torch.empty(shape, dtype=dtype).normal_(0, 0.02))
    writer.write_index()


def _numel(shape) -> int:
    return torch.Size(shape).numel()


class Client:
    """Requests on an event loop in a thread."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def spawn(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    async def post(self, replica, path, payload, timeout):
        async with httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
            answer = await client.post(replica.url + path, json=payload)
        if answer.status_code != 200:
            raise RuntimeError(f"{replica.url}{path}: {answer.text}")
        return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text


def as_table(measured: dict) -> Table:
    size = measured["bytes"]
    table = Table(
        title=f"{measured['model']} on {measured['device']}, {size / 1e6:.1f} MB, "
        f"buckets of {measured['bucket_mib']} MiB",
        box=SIMPLE,
    )
    for header in ("", "first push", "push", "MB/s"):
        table.add_column(header, justify="right" if header else "left")
    for row in measured["ways"]:
        table.add_row(
            row["way"],
            f"{row['first']:.2f} s",
            f"{row['seconds']:.2f} s",
            f"{size / 1e6 / row['seconds']:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
