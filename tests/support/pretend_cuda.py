"""A CPU that passes for one CUDA device, and raises where CUDA would.

    waits = pretend_cuda()          # for the rest of this process, which has to be a test's own
    x = torch.arange(3, device="cuda")
    x + torch.ones(3)               # RuntimeError: Expected all tensors to be on the same device …
    with waits.phase("training"):
        x.tolist()                  # waits.by_phase() == {"training": 1}

A tensor on the device is a `DeviceTensor`, whose numbers are in a tensor on the host. Every
operator that reaches torch's dispatcher, in the backward pass, too, is looked at: where its tensors
are, whether CUDA would run it, and whether the host would have to wait for it. It is then computed
on the host. `device`, `is_cuda` and `torch.cuda.is_available()` answer as they do with CUDA, so
that the product takes its CUDA branches, and `torch.cuda.set_sync_debug_mode` has waits raise or
warn. To torch's C++ code the device is PrivateUse1, which is its place for backends that are
written in Python.

NCCL is gloo here, which refuses tensors that are not on the device, as NCCL does. Several ranks are
several processes with a device each.

It does not see
    kernels         Triton's are replaced by their references, flash attention by SDPA;
    streams         there is one, so that nothing races;
    memory          its statistics are those of the machine;
    pinned memory   a copy waits unless it is `non_blocking`, whatever the host's side is;
    CUDA graphs and CUDA IPC.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from support.host_waits import HostWaits

CUDA = torch.device("cuda", 0)
BACKEND = "pretended"  # the device's name in torch's C++ code

# An index may be on the host where the indexed tensor is on the device; not the other way round.
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# The host has to know their result, or its size.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
}

_waits = HostWaits()
_gloo_groups: set[str] = set()  # process groups that were asked to be gloo's with CUDA, too
_modes: list = []


def pretend_cuda() -> HostWaits:
    """Give this process a CUDA device for the rest of its life; return what its host waits for."""
    from megatron_taopd.parallel import platform

    if _modes:
        return _waits
    assert not platform._emulated, "this process has been told that CUDA is the CPU"
    _setup_privateuseone_for_python_backend(BACKEND)
    torch.autograd.set_multithreading_enabled(False)  # a mode is one thread's
    # `module.to("cuda")` keeps its parameters, of which some may be tied, and moves their numbers.
    torch._has_compatible_shallow_copy_type = lambda *_: True
    _patch_cuda()
    _patch_distributed()
    _patch_kernels()
    for mode in (_Names(), _Operators()):
        mode.__enter__()
        _modes.append(mode)
    return _waits


# ----------------------------------------------------------------------------------------- tensors


class DeviceTensor(torch.Tensor):
    """A tensor on the device, or a parameter that is `away` from it; `host` has its numbers."""

    host: Tensor
    away = False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        layout = {}
        if host.layout == torch.strided:
            layout = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, dtype=host.dtype, layout=host.layout, device=BACKEND, **layout
        )
        tensor.host = host
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})

    def __repr__(self, **_) -> str:
        return f"{self.device}: {self.host!r}"

    device = property(lambda self: torch.device("cpu") if self.away else CUDA)
    is_cuda = property(lambda self: not self.away)
    is_cpu = property(lambda self: self.away)

    # `parameter.data = tensor` is no operator. It can take a parameter to the host, and back.
    data = property(Tensor.data.__get__, lambda self, tensor: self._set_data(tensor))

    def _set_data(self, tensor: Tensor) -> None:
        self.away = not _on_device(tensor)
        self.host = tensor if self.away else tensor.host
        Tensor.data.__set__(self, DeviceTensor(self.host))

    def type(self, dtype=None, **options):
        if dtype is None:
            return super().type().replace(BACKEND, "cuda")
        return super().type(dtype, **options)

    # What torch would compute below its dispatcher.

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> list:
        return self.cpu().tolist()

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False) -> Tensor:
        made = torch.tensor(data, dtype=dtype or self.dtype, device=device or CUDA)
        return made.requires_grad_(requires_grad)

    def untyped_storage(self):
        return self.host.untyped_storage()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def pin_memory(self, *_, **__):
        raise RuntimeError(
            "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned"
        )

    def record_stream(self, stream) -> None: ...


def _take_to_device(parameter: Tensor, data: DeviceTensor) -> None:
    """Set the `data` of a parameter that was made on the host: it becomes a DeviceTensor."""
    attributes = vars(parameter).copy()
    torch.utils.swap_tensors(parameter, torch.nn.Parameter(data, parameter.requires_grad))
    vars(parameter).update(attributes)


class _Operators(TorchDispatchMode):
    """Sees operators none of whose tensors is on the device, too."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


class _Names(TorchFunctionMode):
    """Tells torch's C++ code of the device by the name that it knows, and does what it cannot."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = _own_name(kwargs["device"])
        if function is Tensor.to:
            args = tuple(map(_own_name, args))
        elif function is Tensor.cuda:
            return args[0].to(BACKEND, non_blocking=kwargs.get("non_blocking", False))
        elif function is Tensor.pin_memory:
            return args[0].clone()
        elif function == Tensor.data.__set__:
            parameter, data = args
            if _on_device(data) and not isinstance(parameter, DeviceTensor):
                return _take_to_device(parameter, data)
        elif function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            device, grad = kwargs.pop("device", "cpu"), kwargs.pop("requires_grad", False)
            made = function(_numbers(args[0]), *args[1:], **kwargs)
            return made.to(device).requires_grad_(grad)
        return function(*args, **kwargs)


def _own_name(value):
    named = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
    return BACKEND if named else value


def _numbers(data):
    """Replace the tensors in the data of a tensor by their numbers."""
    if isinstance(data, (list, tuple)):
        return [_numbers(each) for each in data]
    return data.tolist() if isinstance(data, Tensor) else data


def _on_device(value) -> bool:
    return isinstance(value, DeviceTensor) and not value.away


def _is_device(value) -> bool:
    return isinstance(value, torch.device) and value.type in ("cuda", BACKEND)


# --------------------------------------------------------------------------------------- operators


def _run(operator, args: tuple, kwargs: dict):
    """Check an operator, and compute it on the host."""
    on_device: dict[int, DeviceTensor] = {}  # by the id of their numbers
    on_host: dict[int, Tensor] = {}

    def down(value):
        if isinstance(value, DeviceTensor):
            (on_host if value.away else on_device)[id(value.host)] = value
            return value.host
        if isinstance(value, Tensor):
            on_host[id(value)] = value
        elif isinstance(value, (list, tuple)):
            return type(value)(map(down, value))
        elif _is_device(value):
            return torch.device("cpu")
        return value

    def up(value):
        if isinstance(value, Tensor):
            known = on_device.get(id(value), on_host.get(id(value)))
            return DeviceTensor(value) if known is None else known
        if isinstance(value, (list, tuple)):
            return type(value)(map(up, value))
        return value

    below = down(args), {name: down(value) for name, value in kwargs.items()}
    device = kwargs.get("device")
    lands = bool(on_device) if device is None else _is_device(device)  # the result, on the device
    if operator.namespace == "c10d":
        _check_collective(operator, args, on_host.values())
    elif on_device or lands:
        _check_devices(operator._schema.name, operator.tags, args, on_host.values())
        _count_waits(operator._schema.name, args, kwargs, lands, bool(on_device), bool(on_host))
    result = _compute(operator, *below)
    if lands and torch.Tag.inplace_view in operator.tags:  # another shape
        Tensor.data.__set__(args[0], DeviceTensor(args[0].host))
    return up(result) if lands else result


def _check_devices(name: str, tags, args: tuple, on_host) -> None:
    """Raise RuntimeError where CUDA would, of an operator that meets the device."""
    if name in ("aten::copy_", "aten::_to_copy"):
        return
    if name in INDEXING:
        if not _on_device(args[0]):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        strangers = [value for value in args[2:3] if value.dim() and not _on_device(value)]
    else:  # a scalar takes part in anything elementwise
        elementwise = torch.Tag.pointwise in tags
        strangers = [tensor for tensor in on_host if tensor.dim() or not elementwise]
    if strangers:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
            f"and cpu! ({name}; on cpu: {[list(tensor.shape) for tensor in strangers]})"
        )


def _count_waits(
    name: str, args: tuple, kwargs: dict, lands: bool, from_device: bool, from_host: bool
) -> None:
    """Count what the host would wait for in an operator that meets the device."""
    if name == "aten::_to_copy":
        if lands != from_device and not kwargs.get("non_blocking"):
            _waits(f"copy to the {'device' if lands else 'host'}")
    elif name == "aten::copy_":
        if from_device and from_host and not (kwargs.get("non_blocking") or args[2:] == (True,)):
            _waits(f"copy to the {'device' if _on_device(args[0]) else 'host'}")
    elif name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if not all(map(_on_device, indices)):
            _waits("copy to the device")
        if any(index.dtype == torch.bool for index in indices):
            _waits("nonzero")
    elif name in WAITING and kwargs.get("output_size") is None:
        _waits(name.removeprefix("aten::"))


def _check_collective(operator, args: tuple, on_host) -> None:
    """Raise RuntimeError for a tensor of the host in a group that is NCCL's with CUDA."""
    if not on_host or "barrier" in operator._schema.name:
        return
    for value in args:
        if (group := _group(value)) is not None and group.group_name not in _gloo_groups:
            raise RuntimeError("No backend type associated with device type cpu")


def _group(value) -> dist.ProcessGroup | None:
    is_object = isinstance(value, torch.ScriptObject)
    if is_object and value._type().qualified_name().endswith(".ProcessGroup"):
        return dist.ProcessGroup.unbox(value)
    return None


def _compute(operator, args: tuple, kwargs: dict):
    if operator is torch.ops.aten.mm.dtype:  # of half precision, summed and put out in fp32
        left, right, dtype = args
        return left.to(dtype) @ right.to(dtype)
    if operator is torch.ops.aten.addmm.dtype_out:  # likewise
        total, left, right, dtype = args
        return torch.addmm(total, left.to(dtype), right.to(dtype), out=kwargs["out"])
    return operator(*args, **kwargs)


# ----------------------------------------------------------------------------------------- patches


def _patch_cuda() -> None:
    """Let torch.cuda speak of the device and of its only stream."""
    from megatron.core.tensor_parallel import random

    from megatron_taopd.parallel import platform

    class Stream(platform._Stream):
        """The only stream, and any event on it; the run does not wait for what its threads do."""

        def synchronize(self) -> None:
            if threading.current_thread() is threading.main_thread():
                _waits("event")

    memory = psutil.virtual_memory()
    properties = SimpleNamespace(
        name="a CPU", total_memory=memory.total, uuid="0", major=9, minor=0
    )
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "_lazy_init": None,
        "get_device_properties": properties,
        "get_device_name": properties.name,
        "get_device_capability": (9, 0),
        "memory_allocated": memory.used,
        "max_memory_allocated": memory.used,
        "max_memory_reserved": memory.used,
        "reset_peak_memory_stats": None,
        "mem_get_info": (memory.available, memory.total),
        "empty_cache": None,
        "current_stream": Stream(),
        "default_stream": Stream(),
        "stream": nullcontext(),
        "cudart": SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0),
        "check_error": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.nccl.version = lambda: (2, 27, 5)
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.synchronize = lambda *_: _waits("synchronize")
    torch.cuda.get_sync_debug_mode = lambda: _waits.debug_mode
    torch.cuda.set_sync_debug_mode = lambda mode: setattr(_waits, "debug_mode", mode)

    def get_state(*_, **__):
        return torch.get_rng_state()

    def set_state(state, *_, **__):
        torch.set_rng_state(state)

    torch.cuda.get_rng_state = random._get_cuda_rng_state = get_state
    torch.cuda.set_rng_state = random._set_cuda_rng_state = set_state


def _patch_distributed() -> None:
    """Let gloo be NCCL, for tensors on the device alone."""
    c10d = dist.distributed_c10d
    init, create, place = dist.init_process_group, dist.new_group, c10d._get_object_coll_device

    def init_process_group(backend=None, *args, **kwargs):
        return init("gloo" if backend == "nccl" else backend, *args, **kwargs)

    def new_group(ranks=None, timeout=None, backend=None, **kwargs):
        group = create(ranks, timeout, "gloo", **kwargs)
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            # A pool of ranks gives out one group for all of the same ranks: NCCL's rules are those
            # that hold.
            change = _gloo_groups.add if backend == "gloo" else _gloo_groups.discard
            change(group.group_name)
        return group

    def object_device(group=None):
        name = (group or dist.group.WORLD).group_name
        return place(group) if name in _gloo_groups else "cuda"

    dist.init_process_group = c10d.init_process_group = init_process_group
    dist.new_group = c10d.new_group = new_group
    c10d._get_object_coll_device = object_device


def _patch_kernels() -> None:
    """Put references in the place of what is compiled for CUDA."""
    from megatron.core.fusions import fused_bias_swiglu

    from megatron_taopd.models import attention
    from megatron_taopd.parallel.vocab import reductions

    reductions._fused = lambda logits: False
    for name, compiled in list(vars(fused_bias_swiglu).items()):
        if (plain := getattr(compiled, "_torchdynamo_orig_callable", None)) is not None:
            setattr(fused_bias_swiglu, name, plain)

    def varlen_attn(query, key, value, cu_q, cu_k, longest_q, longest_k, *, scale, **options):
        assert options == {"window_size": (-1, 0), "enable_gqa": True}, options  # causal
        assert cu_q.is_cuda and cu_q.dtype == torch.int32 and type(longest_q) is int
        # Which the kernel reads where they are.
        lengths, key_lengths = (starts.host.diff().tolist() for starts in (cu_q, cu_k))
        packing = SimpleNamespace(lengths=lengths, key_lengths=key_lengths)
        module = SimpleNamespace(scale=scale)
        return attention.PackedAttention._per_segment(module, query, key, value, packing)

    attention.varlen_attn = varlen_attn
