"""Rotary embedding of packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """[T, heads, d]: each sequence begins at position 0."""
    assert (tensor_format, interleaved, fused, cp_size) == ("thd", False, True, 1)
    lengths = cu_seqlens.diff()
    positions = torch.arange(len(t), device=t.device) - cu_seqlens[:-1].repeat_interleave(lengths)
    angles = freqs[:, 0][positions]
    first, second = t.float().chunk(2, -1)
    turned = t.float() * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
    return turned.to(t.dtype)
