"""Copies between the host and the device that the host does not wait for."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ALIGNMENT = 64  # of each copy, in bytes


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor of the host on the device, which it reaches in the order of the stream.

    Of CUDA's copies only those from pinned memory go on without the host. Torch keeps that memory
    until the copy is done, and for the next one after that. A tensor that is there is returned.
    """
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopies:
    """Copies of tensors in the memory of the host, which last until the next ones are taken.

    With CUDA they lie in one piece of pinned memory, which is kept for the next ones and is as
    large as they need. Torch's own pinned memory comes in powers of two, for each tensor.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._address = 0

    def take(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        """Copy tensors, of the device or the host, in the order of the device's stream.

        What is done to the tensors after this call does not reach the copies.

        Returns:
            The copies, each with memory of its own, and a function that waits until they are there,
            which any thread may call.

        Raises:
            RuntimeError: CUDA cannot pin so much memory.
        """
        if not torch.cuda.is_available():
            return [tensor.to("cpu", copy=True) for tensor in tensors], lambda: None
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        memory, offset, copies = self._of_size(sum(sizes)), 0, []
        for tensor, size in zip(tensors, sizes, strict=True):
            copy = torch.empty(0, dtype=tensor.dtype)
            if size:
                copy = torch.frombuffer(
                    memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset
                )
            copies.append(copy.view(tensor.shape).copy_(tensor, non_blocking=True))
            offset += size
        return copies, torch.cuda.current_stream().record_event().synchronize

    def _of_size(self, size: int) -> mmap.mmap:
        """Return pinned memory of at least so many bytes; what there was is given back first."""
        if self._memory is None or len(self._memory) < size:
            runtime = torch.cuda.cudart()
            if self._memory is not None:
                torch.cuda.check_error(runtime.cudaHostUnregister(self._address))
            self._memory = mmap.mmap(-1, max(size, mmap.PAGESIZE))
            self._address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
            torch.cuda.check_error(runtime.cudaHostRegister(self._address, len(self._memory), 0))
        return self._memory
