"""One Megatron-core for every machine: NCCL on CUDA, gloo on a CPU.

Megatron-core writes `device="cuda"` in some two hundred places. Without CUDA this module answers
those with the CPU, so that models, schedules, DDP, optimizer and checkpoints run unchanged. With
CUDA nothing is touched.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from megatron_taopd.parallel import cuda_variables, nccl
from megatron_taopd.parallel.compat import torch_internals

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


# What makes tensors and takes the name of their device.
_CONSTRUCTORS = (
    *("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace"),
    *("ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm"),
    *("tensor", "zeros", "zeros_like"),
)


def _constructor(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(make)
    def make_on_the_cpu(*args, **kwargs):
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return make_on_the_cpu


def _moved(to: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(to)
    def move(tensor, *args, **kwargs):
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        elif "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return to(tensor, *args, **kwargs)

    return move


def _typed(type_of: Callable) -> Callable:
    # The optimizer sorts its parameters by these names and refuses those of CPU tensors.
    @functools.wraps(type_of)
    def name(tensor, *args, **kwargs):
        result = type_of(tensor, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result

    return name


def _is_cuda(value) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


def _unequal(tensors: list[Tensor]) -> bool:
    return any(tensor.shape != tensors[0].shape for tensor in tensors)


# Experts receive unequal numbers of tokens, which gloo cannot gather or scatter.


def _gathered(all_gather: Callable) -> Callable:
    @functools.wraps(all_gather)
    def gather(parts, own, group=None, *args, **kwargs):
        if _unequal(parts):
            return _all_gather(parts, own, group)
        return all_gather(parts, own, group, *args, **kwargs)

    return gather


def _scattered(reduce_scatter: Callable) -> Callable:
    @functools.wraps(reduce_scatter)
    def scatter(own, parts, *args, **kwargs):
        if _unequal(parts):
            return _reduce_scatter(own, parts, kwargs["group"])
        return reduce_scatter(own, parts, *args, **kwargs)

    return scatter


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


_emulated = False


def emulate_cuda() -> None:
    """Let the CPU stand in for CUDA in this process where there is none (once; else a no-op)."""
    global _emulated
    if torch.cuda.is_available() or _emulated:
        return
    _emulated = True
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.cuda.Stream = _Stream
    torch.cuda.current_stream = lambda *_, **__: _Stream()
    torch.cuda.stream = nullcontext
    # Each name is answered where it stands. A TorchFunctionMode would see every operator, too,
    # which doubles what a small one costs.
    torch_internals.remember_constructors()
    for name in _CONSTRUCTORS:
        setattr(torch, name, _constructor(getattr(torch, name)))
    torch.Tensor.to = _moved(torch.Tensor.to)
    torch.Tensor.type = _typed(torch.Tensor.type)
    dist.all_gather = _gathered(dist.all_gather)
    dist.reduce_scatter = _scattered(dist.reduce_scatter)
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
