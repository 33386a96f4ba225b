"""Attention over packed sequences."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch.extra_state import WithExtraState


class DotProductAttention(WithExtraState):
    """Causal attention within each sequence of [T, heads, d] queries."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
    ):
        super().__init__()
        assert attention_type == "self" and attention_dropout == 0
        self.scale = softmax_scale or 1 / math.sqrt(kv_channels)

        def forget(_module, incompatible) -> None:
            """Do not ask checkpoints for this module's state: older ones have none."""
            missing = incompatible.missing_keys
            missing[:] = [key for key in missing if "core_attention._extra_state" not in key]

        self.register_load_state_dict_post_hook(forget)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        qkv_format: str,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        attn_mask_type: str,
        **not_given,
    ) -> Tensor:
        assert (qkv_format, attn_mask_type, attention_mask) == ("thd", "padding_causal", None)
        assert cu_seqlens_q.dtype == torch.int32 and type(max_seqlen_q) is int
        assert all(value is None for value in not_given.values()), not_given
        outputs = []
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) == max_seqlen_q, (lengths, max_seqlen_q)
        for parts in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
            q, k, v = (part.transpose(0, 1)[None] for part in parts)
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs).flatten(1)


class _SplitAlongDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dim, sizes):
        ctx.dim = dim
        return tensor.split(sizes, dim)

    @staticmethod
    def backward(ctx, *grads):
        return torch.cat(grads, ctx.dim), None, None
