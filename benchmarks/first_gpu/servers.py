"""SGLang servers: on the trainer's own device, and on another one, where one is killed in a push."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import httpx
import torch
from torch import Tensor

from benchmarks.first_gpu.result import Result, Setting
from benchmarks.first_gpu.runs import STUDENT, TINY_SGLANG, precision, run_of
from benchmarks.weight_sync import Client
from megatron_taopd import loop
from megatron_taopd.formats.hf import DTYPES, HFCheckpoint, load_config, tensor_shapes
from megatron_taopd.parallel import platform
from megatron_taopd.plan.shapes import Architecture
from megatron_taopd.rollout.weight_sync import DistributedSync
from megatron_taopd.serving.server import Server

STEPS = 3
TOKENS = 4_000_000  # of a colocated server's cache on CUDA
GAP = {"bf16": 0.05, "fp32": 1e-3}  # mean |Δ log p| of engine and trainer


def colocated(setting: Setting) -> Result:
    """Take steps whose rollouts come from a server on the trainer's device, or on the CPU next to it.

    On CUDA it gives its memory back while the student trains, and gets it again with each push. The
    trainer's log-probabilities of what the server then generates say that the weights are the ones.
    """
    result, on_cuda = Result(), torch.cuda.is_available()
    servers = "{replicas: 1, max_total_tokens: 4096, concurrency: 16}"
    if on_cuda:
        servers = f"{{replicas: 1, gpus: [0], max_total_tokens: {TOKENS}, mem_fraction: 0.5}}"
    overrides = (
        f"train={{precision: {precision()}, steps: {STEPS}}}", f"rollout.servers={servers}",
        "rollout={prompts: 16, max_new_tokens: 16}",
        f"rollout.sync={{transport: distributed, release_memory: {str(on_cuda).lower()}}}",
    )  # fmt: skip
    began = time.perf_counter()
    with run_of(TINY_SGLANG, Path(setting.log).parent / "colocated", *overrides) as run:
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
    """Push weights to two servers on the second device, one of which is killed in the second push.

    The push has to fail soon and name that server; the other one takes the next push.
    """
    result = Result()
    platform.initialize()
    checkpoint = HFCheckpoint(STUDENT)
    tensors = [
        (name, checkpoint[name].to(platform.device(), DTYPES[precision()]))
        for name in tensor_shapes(load_config(STUDENT))
    ]
    options = {"max_total_tokens": 4096, "max_running_requests": 8, "start_timeout": 240}
    options |= {"dtype": "bfloat16" if precision() == "bf16" else "float32"}
    if torch.cuda.is_available():
        options |= {"gpus": [1], "mem_fraction": 0.3}
    logs = Path(setting.log).parent
    with ExitStack() as stack:
        servers = []
        for number in range(2):
            server = Server(STUDENT, logs / f"server_{number}.log", **options)
            stack.callback(server.stop, 0)
            servers.append(server)
        for server in servers:
            server.wait_until_ready()
        targets = [SimpleNamespace(url=server.url, tp=1) for server in servers]
        client = Client()
        sync = DistributedSync(STUDENT, bucket_bytes=200_000)
        size = sum(tensor.nbytes for _, tensor in tensors)
        for name in ("first push, with its groups, s", "second push, s"):
            began = time.perf_counter()
            sync.push(client, targets, iter(tensors), 1 if "first" in name else 2)
            result.figures[name] = time.perf_counter() - began
        result.figures["weights, MB"] = size / 1e6

        victim, other = servers
        killed = []

        def deadly() -> Iterator[tuple[str, Tensor]]:
            for place, named in enumerate(tensors):
                if place == len(tensors) // 2:
                    killed.append(time.perf_counter())
                    victim.stop(grace_s=0)
                yield named

        named, seconds = 0, float("inf")
        try:
            sync.push(client, targets, deadly(), 3)
        except RuntimeError as error:
            seconds = time.perf_counter() - killed[0]
            result.notes.append(f"The push said: {error}")
            named = int(victim.url in str(error) and other.url not in str(error))
        result.least("the push names the server that was killed, and no other", named, 1)
        result.most("seconds from the kill to the failure", seconds, 60)
        sync.push(client, targets[1:], iter(tensors), 4)
        version = asked(other.url)
        result.figures["version of the other server afterwards"] = version
        result.most("versions that it lacks", int(version != "4"), 0)
    return result


def asked(url: str) -> str:
    """Let a server generate a token; return the version of its weights."""
    request = {"input_ids": [2, 5, 6], "sampling_params": {"max_new_tokens": 1}}
    answer = httpx.post(f"{url}/generate", json=request, timeout=60, trust_env=False)
    return str(answer.raise_for_status().json()["meta_info"]["weight_version"])
