"""Attention and norm for packed sequences when TransformerEngine is absent.

Megatron's own fallback refuses packed sequences, and its torch norm sequence parallelism. These
two take their place in the layer spec, so that one data path, always packed, serves every device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight gradient Megatron sums over TP under sequence parallelism."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused):
        device = torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class PackedAttention(torch.nn.Module):
    """Causal self-attention inside each segment of a packed micro-batch.

    The `core_attention` of a Megatron layer: query [T, heads, d] and key, value [T, groups, d] of
    this tensor-parallel rank in, [T, heads × d] out. Half precision on CUDA takes torch's variable
    length flash attention, everything else `scaled_dot_product_attention` segment by segment.
    """

    def __init__(self, config, softmax_scale: float | None = None, **_unused):
        super().__init__()
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams,
        **_unused,
    ) -> Tensor:
        cu_seqlens = packed_seq_params.cu_seqlens_q
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
            longest = int(packed_seq_params.max_seqlen_q)
            out = varlen_attn(
                query, key, value, cu_seqlens, cu_seqlens, longest, longest,
                scale=self.scale, window_size=(-1, 0), enable_gqa=True,
            )  # fmt: skip
        else:
            out = self._per_segment(query, key, value, cu_seqlens.diff().tolist())
        return out.flatten(1)

    def _per_segment(self, query, key, value, lengths: list[int]) -> Tensor:
        outputs = []
        for q, k, v in zip(
            query.split(lengths), key.split(lengths), value.split(lengths), strict=True
        ):
            out = F.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in (q, k, v)),
                is_causal=True,
                scale=self.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)
