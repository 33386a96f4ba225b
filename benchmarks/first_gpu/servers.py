"""SGLang servers on the trainer's own device, and on other ones, where one is killed in a push."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.first_gpu.result import Result, Setting
from benchmarks.first_gpu.runs import STUDENT, TINY_SGLANG, precision, run_of
from megatron_taopd import loop
from megatron_taopd.formats.hf import DTYPES, load_config
from megatron_taopd.plan.shapes import Architecture

STEPS = 3
TOKENS = 4_000_000  # of a colocated server's cache on CUDA
BUCKET_BYTES = 1 << 17  # of the tiny student some five or ten, so that the kill is among them
GAP = {"bf16": 0.05, "fp32": 1e-3}  # mean |Δ log p| of engine and trainer


def colocated(setting: Setting) -> Result:
    """Take steps whose rollouts come from a server on the trainer's own device, or CPU.

    On CUDA it gives its memory back while the student trains, and gets it again with each push. The
    trainer's log-probabilities of what the server then generates say that the weights are the ones.
    """
    result, on_cuda = Result(), torch.cuda.is_available()
    servers = "{replicas: 1, max_total_tokens: 4096, concurrency: 16}"
    if on_cuda:
        servers = (
            f"{{replicas: 1, gpus: [0], max_total_tokens: {TOKENS}, mem_fraction: 0.5, "
            "args: [--enable-memory-saver]}"
        )
    overrides = (
        f"train={{precision: {precision()}, steps: {STEPS}}}", f"rollout.servers={servers}",
        "rollout={prompts: 16, max_new_tokens: 16}",
        f"rollout.sync={{transport: tensor, release_memory: {str(on_cuda).lower()}}}",
    )  # fmt: skip
    began = time.perf_counter()
    with run_of(TINY_SGLANG, Path(setting.log).parent / "run", *overrides) as run:
        result.figures["built, with its server, s"] = time.perf_counter() - began
        given, pushes = [], []
        offload, update = run.engine.offload, run.engine.update_weights

        def measured_offload() -> None:
            before = device_bytes_free()
            offload()
            given.append(device_bytes_free() - before)

        def measured_update(named_tensors, version) -> None:
            started = time.perf_counter()
            update(named_tensors, version)
            pushes.append(time.perf_counter() - started)

        with (
            mock.patch.object(run.engine, "offload", measured_offload),
            mock.patch.object(run.engine, "update_weights", measured_update),
        ):
            for step in range(1, STEPS + 1):
                metrics, _ = loop.take_step(run, step)
                result.most(
                    f"step {step}: mean |Δ log p| of engine and trainer",
                    metrics["rollout/logprob_gap_mean"],
                    GAP[precision()],
                )
                result.most(f"step {step}: resynced servers", metrics["rollout/resyncs"], 0)
        versions = [replica.version for replica in run.engine.replicas.all]
    result.most("servers without the last weights", sum(v != STEPS for v in versions), 0)
    result.figures["push, s"] = ", ".join(f"{seconds:.2f}" for seconds in pushes)
    if on_cuda:
        hf = Architecture.of(load_config(STUDENT))
        itemsize = DTYPES[precision()].itemsize
        cache = TOKENS * 2 * hf.layers * hf.groups * hf.head_dim * itemsize
        result.figures["the server's cache, MB"] = cache / 1e6
        result.least("memory given back ÷ the server's cache", min(given) / cache, 0.9)
    else:
        result.notes.append("There is no device whose memory a server could give back.")
    return result


def device_bytes_free() -> int:
    """Return what the device has free, for whatever process; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def broadcast(setting: Setting) -> Result:
    """Take steps with servers on other devices, one of which is killed while it gets the weights.

    The run goes on: the push is given up, the server is started anew, and its weights are those of
    the trainer before it generates again.
    """
    result, on_cuda, others = Result(), torch.cuda.is_available(), setting.gpus - 1
    servers = f"{{replicas: {others}, max_total_tokens: 4096, concurrency: 16}}"
    if on_cuda:
        gpus = list(range(1, setting.gpus))
        servers = servers.replace("}", f", gpus: {gpus}, mem_fraction: 0.3}}")
    overrides = (
        f"train={{precision: {precision()}, steps: {STEPS}}}", f"rollout.servers={servers}",
        "rollout={prompts: 16, max_new_tokens: 16}", "rollout.sync.transport=distributed",
    )  # fmt: skip
    with run_of(TINY_SGLANG, Path(setting.log).parent / "run", *overrides) as run:
        run.engine.updates.sync.bucket_bytes = BUCKET_BYTES
        victim, pushes = run.engine.replicas.all[0], []
        update, weights = run.engine.update_weights, run.student.named_tensors

        def measured(named_tensors, version) -> None:
            named = deadly() if version == STEPS - 1 else named_tensors
            began = time.perf_counter()
            update(named, version)
            pushes.append(time.perf_counter() - began)

        def deadly() -> Iterator[tuple[str, Tensor]]:
            tensors = list(weights())
            for place, named in enumerate(tensors):
                if place == len(tensors) // 2:
                    victim.server.stop(grace_s=0)
                yield named

        with mock.patch.object(run.engine, "update_weights", measured):
            for step in range(1, STEPS + 1):
                began = time.perf_counter()
                metrics, _ = loop.take_step(run, step)
                result.figures[f"step {step}, s"] = time.perf_counter() - began
                result.most(
                    f"step {step}: mean |Δ log p| of engine and trainer",
                    metrics["rollout/logprob_gap_mean"],
                    GAP[precision()],
                )
        failed = run.engine.failed_syncs
        versions = [replica.version for replica in run.engine.replicas.all]
    first, killed, last = pushes
    result.figures |= {"push, with its group, s": first, "push to a new server, s": last}
    result.most("seconds until the push to the killed server was given up", killed, 60)
    result.least("restarted servers", metrics["rollout/restarts"], 1)
    result.least("servers that got the weights again", metrics["rollout/resyncs"], 1)
    result.most("failed pushes that were not made good", failed, 0)
    result.most("servers without the last weights", sum(v != STEPS for v in versions), 0)
    return result
