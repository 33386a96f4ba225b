"""A Hugging Face config becomes a Megatron trunk.

A *trunk* is a GPTModel whose last stage returns the normed hidden states instead of logits. The
head, its output projection, is a plain weight: everything vocabulary-wide happens in
`parallel/vocab/`, on the rows that need it.
"""

from __future__ import annotations

import importlib.util
import math

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_taopd.data.chunks import Pieces
from megatron_taopd.formats import hf_map
from megatron_taopd.models.attention import PackedAttention, Packing, RMSNorm, SelfAttention
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.compat.megatron_internals import (
    HiddenStatesModel,
    accumulates_gradients,
    count_routed_tokens_ahead,
    define_missing_names,
    keep_norm_before_router,
    let_engine_accumulate,
)
from megatron_taopd.parallel.copies import to_device
from megatron_taopd.parallel.layout import Layout
from megatron_taopd.parallel.vocab import VocabShard

define_missing_names()
count_routed_tokens_ahead()

RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def use_transformer_engine() -> bool:
    """Tell whether to take TransformerEngine's layers: it is installed, and CUDA is there."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def transformer_config(
    hf: PretrainedConfig, layout: Layout, dtype: torch.dtype, recompute: str = "none"
) -> TransformerConfig:
    """Return Megatron's configuration of a Hugging Face model in a layout.

    Args:
        hf: of a family in `hf_map.FAMILIES`.
        dtype: of the parameters, torch.float32 or torch.bfloat16.
        recompute: "none", "selective" (core attention) or "full" (every layer). Under context
            parallelism without TransformerEngine "none" is "selective".

    Raises:
        ValueError: the model does something that the trunk does not, one line with the key.
    """
    hf_map.check_keys(hf)
    engine = use_transformer_engine()
    if engine:
        let_engine_accumulate()
    elif layout.cp > 1 and recompute == "none":
        # What attention would keep are all ranks' keys and values; TransformerEngine keeps its own.
        recompute = "selective"
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=hf_map.head_dim(hf),
        softmax_scale=_softmax_scale(hf),
        layernorm_epsilon=hf.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=hf.model_type == "qwen2",
        qk_layernorm=hf.model_type in ("qwen3", "qwen3_moe"),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,
        # Megatron asks for this one together with variable lengths, also of dense models.
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        # All weights are read from a checkpoint, but the initialisation has to be "performed":
        # Megatron marks tensor-parallel parameters only there, and a gradient norm without the
        # marks counts only one rank's shard of them (a third too small at TP2).
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        # Kernels of Apex and TransformerEngine, where they are; SwiGLU's, forward and backward, is
        # compiled by torch, which takes the CPU longer than it saves.
        gradient_accumulation_fusion=engine or accumulates_gradients(),
        apply_rope_fusion=engine,
        bias_activation_fusion=torch.cuda.is_available(),
        masked_softmax_fusion=False,
        persist_layer_norm=engine,
        **_experts(hf, layout),
        **RECOMPUTE[recompute],
    )


def _experts(hf: PretrainedConfig, layout: Layout) -> dict:
    """Return the part of Megatron's configuration that a mixture of experts adds."""
    if not hf_map.num_experts(hf):
        return {}
    return dict(
        num_moe_experts=hf_map.num_experts(hf),
        moe_ffn_hidden_size=hf.moe_intermediate_size,
        moe_router_topk=hf.num_experts_per_tok,
        # Softmax over all experts and then the top-K of it, or the softmax of the top-K, which is
        # the same normalised to 1.
        moe_router_pre_softmax=not hf.norm_topk_prob,
        moe_router_load_balancing_type="aux_loss",  # whose weight is 0, unless a student sets it
        moe_router_dtype="fp32",
        moe_grouped_gemm=use_transformer_engine(),
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.tp,
    )


def _leave(weight: Tensor) -> Tensor:
    return weight


class Embedding(VocabParallelEmbedding):
    """Megatron's embedding, with a sparse gradient: the rows of the tokens looked up.

    DDP adds these to its buffer as they are. A dense gradient would be as large as the head.
    """

    def forward(self, input_: Tensor) -> Tensor:
        columns = input_ - self.vocab_start_index
        elsewhere = (columns < 0) | (columns >= self.num_embeddings_per_partition)
        rows = F.embedding(columns.masked_fill(elsewhere, 0), self.weight, sparse=True)
        rows = rows.masked_fill(elsewhere[..., None], 0)
        if self.reduce_scatter_embeddings:
            rows = rows.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)


class Trunk(HiddenStatesModel):
    """A GPTModel that ends in hidden states, [T, 1, D] or [T / tp, 1, D] under sequence
    parallelism, on every pipeline stage.

    Args:
        head: keep the output projection. A teacher's is read apart, in the student's shards.
    """

    def __init__(
        self, hf: PretrainedConfig, config: TransformerConfig, layout: Layout, head: bool = True
    ):
        super().__init__(
            config,
            _block_spec(config, layout),
            vocab_size=hf_map.padded_vocab_size(hf.vocab_size),
            max_sequence_length=hf_map.longest_sequence(hf),
            pre_process=layout.is_first_stage,
            post_process=layout.is_last_stage,
            share_embeddings_and_output_weights=head and hf.tie_word_embeddings,
            # `PackedAttention` rotates queries and keys itself.
            position_embedding_type="rope" if use_transformer_engine() else "none",
            pg_collection=layout.groups,
        )
        self.hf = hf
        self.layout = layout
        self.frequencies = rope(hf)[0].to(platform.device())
        if self.position_embedding_type == "rope":
            self.rotary_pos_emb.inv_freq = self.frequencies
        if self.pre_process:
            self.embedding.word_embeddings.__class__ = Embedding  # GPTModel takes no spec for it
        if not head and self.post_process:
            del self.output_layer
        self.to(platform.device())  # but for a router's weight, all is made there

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, packed_seq_params: Packing, **options
    ) -> Tensor:
        if packed_seq_params.keys is not None:
            packed_seq_params.cp_group = self.layout.groups.cp
        elif self.layout.cp > 1:
            packed_seq_params.local_cp_size = 1
        if self.position_embedding_type == "none":
            packed_seq_params.rotation = self._rotation(position_ids[0])
        return super().forward(
            input_ids, position_ids, packed_seq_params=packed_seq_params, **options
        )

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of RoPE at these positions, [T, 1, head_dim] each."""
        angles = torch.outer(positions.to(self.frequencies.dtype), self.frequencies).repeat(1, 2)
        dtype = self.config.params_dtype
        return angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype)

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the output projection, [V, D]; on the last stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def vocab_shard(self, size: int, absent: Tensor | None = None) -> VocabShard:
        """Return the columns of head_weight; size and absent as in `VocabShard`."""
        columns = hf_map.padded_vocab_size(self.hf.vocab_size) // self.layout.tp
        start = self.layout.tp_rank * columns
        group = self.layout.groups.tp if self.layout.tp > 1 else None
        if absent is not None:
            absent = absent.to(platform.device())
        return VocabShard(start, start + columns, group, size, absent)


def packed_forward(
    model,
    tokens: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    pieces: Pieces | None = None,
) -> Tensor:
    """Return this stage's hidden states of one packed micro-batch, from a trunk or what wraps one.

    Args:
        tokens, position_ids: [T] int64.
        cu_seqlens: [S+1] int32 on the host, padding being a segment of its own.
        max_seqlen: tokens of the longest segment.
        pieces: of segments that a context-parallel group shares: this rank's.
    """
    lengths = keys = cu_seqlens.diff().tolist()
    starts = [cu_seqlens, cu_seqlens]
    longest = [max_seqlen, max_seqlen]
    if pieces is not None:
        lengths, keys = pieces.queries, pieces.keys
        if not use_transformer_engine():  # which finds its pieces itself
            starts = [torch.tensor([0, *n]).cumsum(0).int() for n in (lengths, keys)]
            longest = [max(lengths), max(keys)]
    of_queries = to_device(starts[0], tokens.device)
    packing = Packing(
        qkv_format="thd",
        cu_seqlens_q=of_queries,
        cu_seqlens_kv=to_device(starts[1], tokens.device) if pieces else of_queries,
        max_seqlen_q=longest[0],
        max_seqlen_kv=longest[1],
        lengths=lengths,
        key_lengths=keys,
        keys=to_device(pieces.places, tokens.device) if pieces else None,
    )
    return model(
        input_ids=tokens[None],
        position_ids=position_ids[None],
        attention_mask=None,
        packed_seq_params=packing,
    )


def pick_rows(hidden_states: Tensor, rows: Tensor, layout: Layout) -> Tensor:
    """Return [R, D]: hidden states at packed positions `rows`, on every rank of the TP group.

    Their gradient may be this vocabulary shard's partial sum. Collectives: under sequence
    parallelism an all-gather forward (T·D elements) and a reduce-scatter backward; otherwise none
    forward and an all-reduce of R·D elements backward.
    """
    group = layout.groups.tp
    if layout.sequence:
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=True, group=group
        )
        return hidden_states[rows, 0]
    return copy_to_tensor_model_parallel_region(hidden_states[rows, 0], group=group)


def _block_spec(config: TransformerConfig, layout: Layout) -> TransformerBlockSubmodules:
    if use_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        norm = TENorm
    else:
        layer = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts,
            qk_layernorm=config.qk_layernorm,
            normalization=config.normalization,
        )
        norm = RMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = norm
        if config.num_moe_experts:
            keep_norm_before_router(layer)
    layer.submodules.self_attention.module = SelfAttention
    layers = [layer] * (config.num_layers // layout.pp)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def rope(hf: PretrainedConfig) -> tuple[Tensor, float]:
    """Return RoPE by transformers' rules for the type: frequencies and attention's factor.

    Args:
        hf: with a type of `hf_keys.ROPE_TYPES`, none of which changes with the input's length.

    Returns:
        ([head_dim / 2] float32 inverse frequencies; what queries and keys are multiplied by, which
        is 1 but for YaRN, arXiv 2309.00071.)
    """
    parameters = hf.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        width = hf_map.head_dim(hf)
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return parameters["rope_theta"] ** -exponents, 1.0
    return ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))


def _softmax_scale(hf: PretrainedConfig) -> float | None:
    """Return what attention multiplies its logits by; None: one over the root of the width.

    A factor on queries and keys is its square on their products, whoever rotates them.
    """
    factor = rope(hf)[1]
    return None if factor == 1 else factor**2 / math.sqrt(hf_map.head_dim(hf))
