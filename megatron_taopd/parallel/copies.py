"""Copies from the host to the device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor of the host on the device, which it reaches in the order of the stream.

    Of CUDA's copies only those from pinned memory go on without the host. Torch keeps that memory
    until the copy is done, and for the next one after that. A tensor that is there is returned.
    """
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
