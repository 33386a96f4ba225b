"""One Megatron-core for every machine: NCCL on CUDA, gloo on a CPU.

Megatron-core writes `device="cuda"` in some two hundred places. Without CUDA this module answers
those with the CPU, so that models, schedules, DDP, optimizer and checkpoints run unchanged. With
CUDA nothing is touched.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_taopd.parallel import cuda_variables, nccl

# Loggers of megatron-core that tell, since 0.17, at every start and save what it will drop.
_ANNOUNCING = (
    "megatron.core.dist_checkpointing.strategies.common",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.models.gpt.gpt_model",
)
_ANNOUNCEMENT = re.compile("deprecated|full_param_layout not provided", re.IGNORECASE)


def device() -> torch.device:
    """Return the device of this rank's tensors."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_name() -> str | None:
    """Return the name of this rank's GPU; None on a CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def device_memory() -> int | None:
    """Return all bytes of this rank's GPU, free or not; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def local_world_size() -> int:
    """Count the ranks of this node, as torchrun tells; without it, they are all here."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def empty_cache() -> None:
    """Give the device what torch keeps of it without need, for other processes that share it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait for the device, so that a timer read next is true."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quiet() -> None:
    """Silence what libraries print at every step or rank and no user can act on."""
    warnings.filterwarnings("ignore", message=".*deprecat", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    transformers.utils.logging.disable_progress_bar()
    for name in _ANNOUNCING:
        logging.getLogger(name).addFilter(_is_no_announcement)


def _is_no_announcement(record: logging.LogRecord) -> bool:
    return _ANNOUNCEMENT.search(record.getMessage()) is None


def initialize(timeout_s: float = 1800.0) -> bool:
    """Join the process group that torchrun described (RANK, WORLD_SIZE, MASTER_ADDR, …).

    A process that was not started by torchrun becomes a world of one.

    Returns:
        Whether this call joined; False if the process was in a group already.
    """
    quiet()
    cuda_variables.set_connections(os.environ)
    emulate_cuda()
    nccl.set_defaults(os.environ)
    if dist.is_initialized():
        return False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_s)
    # No `device_id`: with one, torch makes the communicators of all of Megatron's groups at once,
    # and their buffers, also of those that nobody uses.
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    return True


class _CudaIsCpu(TorchFunctionMode):
    """Answers every torch call that names a CUDA device with the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        # Experts receive unequal numbers of tokens, which gloo cannot gather or scatter.
        if func is dist.all_gather and _unequal(args[0]):
            return _all_gather(*args, group=kwargs["group"])
        if func is dist.reduce_scatter and _unequal(args[1]):
            return _reduce_scatter(*args, group=kwargs["group"])
        result = func(*args, **kwargs)
        # The optimizer sorts its parameters by these names and refuses those of CPU tensors.
        if func is torch.Tensor.type and isinstance(result, str):
            result = result.replace("torch.", "torch.cuda.")
        return result


def _is_cuda(value) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


def _unequal(tensors: list[Tensor]) -> bool:
    return any(tensor.shape != tensors[0].shape for tensor in tensors)


def _all_gather(parts: list[Tensor], own: Tensor, group: dist.ProcessGroup) -> None:
    for rank, part in enumerate(parts):
        if rank == group.rank():
            part.copy_(own)
        dist.broadcast(part, group=group, group_src=rank)


def _reduce_scatter(own: Tensor, parts: list[Tensor], group: dist.ProcessGroup) -> None:
    for rank, part in enumerate(parts):
        total = part.clone()
        dist.reduce(total, group=group, group_dst=rank)
        if rank == group.rank():
            own.copy_(total)


class _Stream:
    """A queue of its own in name only: everything on a CPU runs in order."""

    def wait_stream(self, stream: _Stream) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None: ...


_mode: _CudaIsCpu | None = None


def emulate_cuda() -> None:
    """Let the CPU stand in for CUDA in this process where there is none (once; else a no-op)."""
    global _mode
    if torch.cuda.is_available() or _mode is not None:
        return
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.cuda.Stream = _Stream
    torch.cuda.current_stream = lambda *_, **__: _Stream()
    torch.cuda.stream = nullcontext
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self

    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    from megatron.core.transformer.moe import token_dispatcher

    # Megatron reads numbers of tokens from numpy arrays, which it makes of CUDA tensors alone.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, **_: (
        tensor.numpy() if as_numpy and tensor is not None else tensor
    )
    # A mode is a thread-local stack entry: it stays for the life of the process.
    _mode = _CudaIsCpu()
    _mode.__enter__()
