"""Seconds that training waits for a checkpoint: written while it waits, and while it goes on.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.checkpoint --parameters 60 --repeats 3

A random student of so many million parameters, fp32 weights and Adam's moments; the ways alternate.
`blocked` is the time in which no step runs; asynchronous, that is the copy, the plan and, after
the last step, what is left to write, as steps of `--compute` seconds go on meanwhile. `stretch` is
what those steps take beside the same steps without a save.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config

from megatron_taopd.parallel import platform

OPTIMIZER = SimpleNamespace(
    lr=1e-3, min_lr=None, decay="constant", warmup_steps=0, weight_decay=0.0,
    beta1=0.9, beta2=0.98, eps=1e-8, clip=1.0,
)  # fmt: skip
HIDDEN, VOCABULARY = 512, 8192


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=60, help="millions")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tp", type=int, help="the rest is data parallel; all ranks, if not given")
    parser.add_argument(
        "--gathered", action="store_true", help="also Megatron's own form, by turns with ours"
    )
    parser.add_argument("--compute", type=float, default=0.2, help="seconds of a step")
    parser.add_argument("--dir", type=Path, help="scratch space for a model and two checkpoints")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    platform.initialize()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as mine:
        shared = [mine]
        dist.broadcast_object_list(shared)
        results = measure(Path(shared[0]), arguments)
        dist.barrier()
    if dist.get_rank() == 0:
        for name, value in results.items():
            print(f"{name:42} {value}")
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    dist.destroy_process_group()


def measure(scratch: Path, arguments) -> dict[str, float]:
    from megatron_taopd.checkpoints import saving
    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel.layout import student_layout

    if dist.get_rank() == 0:
        make_model(scratch / "student", arguments.parameters * 1e6)
    dist.barrier()
    layout = student_layout(arguments.tp or dist.get_world_size(), 1)
    student = Student(
        scratch / "student", layout, torch.float32, "none", OPTIMIZER, 100, VOCABULARY
    )
    for parameter in student.model.parameters():
        parameter.main_grad.fill_(1e-3)
    student.step()
    ours, gathered_s = saving._state, []
    times: dict[str, list[float]] = {
        "synchronous": [], "asynchronous": [], "written": [], "stretch": []
    }  # fmt: skip
    plain = statistics.median(work(arguments.compute) for _ in range(10))
    for step in range(1, 2 * arguments.repeats + 1):
        asynchronous = step % 2 == 0
        checkpoints = saving.Checkpoints(scratch / "checkpoints", 1, asynchronous, print)
        checkpoints.save(step, student, {})
        lasted = []
        while checkpoints.busy:
            lasted.append(work(arguments.compute))
            checkpoints.poll()
        checkpoints.close()
        checkpoints.check()
        metrics = checkpoints.metrics()
        times["asynchronous" if asynchronous else "synchronous"].append(
            metrics["checkpoint/blocked_s"]
        )
        if asynchronous:
            times["written"].append(metrics["checkpoint/write_s"])
            times["stretch"].append(statistics.mean(lasted) / plain)
        if arguments.gathered and asynchronous:
            saving._state = gathered
            checkpoints = saving.Checkpoints(scratch / "gathered", 1, True, print)
            checkpoints.save(step, student, {})
            checkpoints._writing.written.result()  # as above, the writing is no part of the wait
            checkpoints.finish()
            checkpoints.close()
            saving._state = ours
            gathered_s.append(checkpoints.metrics()["checkpoint/blocked_s"])
    middle = {name: statistics.median(values) for name, values in times.items()}
    size = sum(f.stat().st_size for f in (scratch / "checkpoints").rglob("*") if f.is_file())
    gathering = (
        {"blocked, asynchronous, gathered first, s": round(statistics.median(gathered_s), 2)}
        if gathered_s
        else {}
    )
    return gathering | {
        "checkpoint, MB": round(size / 1e6),
        "blocked, synchronous, s": round(middle["synchronous"], 2),
        "blocked, asynchronous, s": round(middle["asynchronous"], 2),
        "written in the background, s": round(middle["written"], 2),
        "blocked, async / sync": round(middle["asynchronous"] / middle["synchronous"], 2),
        "steps meanwhile, stretch": round(middle["stretch"], 2),
    }


def gathered(student) -> dict:
    """Make the state as Megatron's `fully_reshardable` does: all of it on every rank.

    Data-parallel rank 0 writes it. Checkpoints had this form before.
    """
    from megatron_taopd.models import weights

    form = {"distrib_optim_sharding_type": "fully_reshardable"}
    model = weights.sharded_weights(student.trunk)
    return {
        "model": model,
        "optimizer": student.optimizer.sharded_state_dict(model, metadata=form),
        "scheduler": student.scheduler.state_dict(),
        "content_metadata": form,
    }


def work(seconds: float) -> float:
    """So many seconds of small products, as many Python calls as a step has; how long it took."""
    x, start = torch.ones(256, 256), time.perf_counter()
    for _ in range(int(seconds * 1000)):
        x = (x @ x).clamp(max=1.0)
    return time.perf_counter() - start


def make_model(path: Path, parameters: float) -> None:
    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * 4 * HIDDEN
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=max(1, round((parameters - VOCABULARY * HIDDEN) / layer)),
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=HIDDEN // 8,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)


if __name__ == "__main__":
    main()
