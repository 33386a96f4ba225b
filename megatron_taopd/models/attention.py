"""Parts of a Megatron layer that take the place of its own in the layer spec.

Without TransformerEngine, Megatron's attention refuses packed sequences, and its torch norm
sequence parallelism. With these, one data path, always packed, serves every device.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    all_gather_last_dim_from_tensor_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import attention
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight gradient Megatron sums over TP under sequence parallelism."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused):
        device = torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


@dataclass
class Packing(PackedSeqParams):
    """A packed micro-batch's segments, and what is known of them before the first layer.

    Megatron's own code for RoPE and attention would ask the device for the segments' lengths in
    every layer.

    Attributes:
        lengths: queries of each segment.
        key_lengths: keys of each segment, the last of which stand where its queries do.
        keys: [Σ key_lengths] int64, of sequences that a context-parallel group shares: where a
            segment's keys lie among those of all its ranks. None: they are the queries' own.
        rotation: RoPE's cosines and sines at the tokens' positions, [T, 1, d] in the parameters'
            dtype; none with TransformerEngine, whose kernels read `cu_seqlens` on the device.
    """

    lengths: list[int] = field(default_factory=list)
    key_lengths: list[int] = field(default_factory=list)
    keys: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None


class PackedAttention(torch.nn.Module):
    """Causal self-attention inside each segment of a packed micro-batch, with RoPE.

    The `core_attention` of a Megatron layer: query [T, heads, d] and key, value [T, groups, d] of
    this tensor-parallel rank in, [T, heads × d] out. Half precision on CUDA takes torch's variable
    length flash attention, everything else `scaled_dot_product_attention` segment by segment.

    Collectives, of sequences that a context-parallel group shares: over it, forward an all-gather
    of keys and values (2 · T · groups · d elements, T being all its tokens), backward a
    reduce-scatter.
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
        packed_seq_params: Packing,
        **_unused,
    ) -> Tensor:
        packing = packed_seq_params
        query, key = (_rotate(x, *packing.rotation) for x in (query, key))
        if packing.keys is not None:
            key, value = _gather(key, value, packing)
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
            # A segment's mask is aligned at its end, as flash attention has it.
            out = varlen_attn(
                query, key, value, packing.cu_seqlens_q, packing.cu_seqlens_kv,
                packing.max_seqlen_q, packing.max_seqlen_kv,
                scale=self.scale, window_size=(-1, 0), enable_gqa=True,
            )  # fmt: skip
        else:
            out = self._per_segment(query, key, value, packing)
        return out.flatten(1)

    def _per_segment(self, query, key, value, packing: Packing) -> Tensor:
        outputs = []
        for q, k, v in zip(
            query.split(packing.lengths),
            key.split(packing.key_lengths),
            value.split(packing.key_lengths),
            strict=True,
        ):
            before, mask = len(k) - len(q), None
            if before:
                mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(before)
            out = F.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in (q, k, v)),
                attn_mask=mask,
                is_causal=not before,
                scale=self.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)


def _gather(key: Tensor, value: Tensor, packing: Packing) -> list[Tensor]:
    """Return the keys and values of this rank's segments, from all ranks of the group."""
    gathered = gather_from_sequence_parallel_region(
        torch.cat([key, value], dim=1), tensor_parallel_output_grad=True, group=packing.cp_group
    )
    return gathered.index_select(0, packing.keys).chunk(2, dim=1)


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return queries or keys [T, heads, d] turned by their positions' angles (RoPE)."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines


_ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)  # all that RoPE asks of a group


class SelfAttention(attention.SelfAttention):
    """Megatron's self-attention, for TP ranks that share a key-value head in any process groups.

    With TransformerEngine, Megatron turns queries and keys as if every micro-batch were shared by
    the context-parallel group; one that this rank has alone is turned as such.

    Where there are more ranks than key-value heads (a multiple of them), Megatron's own gathers the
    projections over the global groups, which are the student's. Collectives, then: an all-gather of
    the projections over the TP group forward, a reduce-scatter backward.
    """

    def forward(self, *args, packed_seq_params: Packing, **options):
        groups = self.pg_collection
        if packed_seq_params.local_cp_size == 1:
            self.pg_collection = copy(groups)
            self.pg_collection.cp = _ALONE
        try:
            return super().forward(*args, packed_seq_params=packed_seq_params, **options)
        finally:
            self.pg_collection = groups

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, **options
    ):
        tp, groups = self.world_size, self.config.num_query_groups
        if groups >= tp:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, **options)
        assert options.get("split_qkv", True) and not options.get("output_gate")
        projected, _bias = self.linear_qkv(hidden_states)
        projected = all_gather_last_dim_from_tensor_parallel_region(projected, self.tp_group)
        ranks = tp // groups  # that share a key-value head
        group, place = divmod(self.tp_group.rank(), ranks)
        width = self.hidden_size_per_attention_head
        heads = projected.chunk(groups, -1)[group].unflatten(-1, (-1, width))
        queries, key, value = heads.split([heads.shape[2] - 2, 1, 1], dim=2)
        query = queries.chunk(ranks, 2)[place]
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, value
