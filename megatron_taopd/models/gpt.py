"""A Hugging Face config becomes a Megatron trunk; its weights come from and go to safetensors.

A *trunk* is a GPTModel whose last stage returns the normed hidden states instead of logits. The
head, its output projection, is a plain weight: everything vocabulary-wide happens in
`parallel/vocab.py`, on the rows that need it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_taopd.models import hf_map
from megatron_taopd.models.attention import PackedAttention, RMSNorm
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.layout import Layout

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
    """TransformerEngine's layers are taken where it is installed and CUDA is there."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def transformer_config(
    hf: PretrainedConfig, layout: Layout, dtype: torch.dtype, recompute: str = "none"
) -> TransformerConfig:
    """Megatron's configuration of a Hugging Face model in a layout.

    Args:
        hf: of a family in `hf_map.FAMILIES`.
        dtype: of the parameters, torch.float32 or torch.bfloat16.
        recompute: "none", "selective" (core attention) or "full" (every layer).
    """
    engine = use_transformer_engine()
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=hf_map.head_dim(hf),
        layernorm_epsilon=hf.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=hf.model_type == "qwen2",
        qk_layernorm=hf.model_type == "qwen3",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,
        # Megatron asks for this one together with variable lengths, also of dense models.
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        # All weights are read from a checkpoint.
        perform_initialization=False,
        # Kernels of Apex and TransformerEngine, where they are.
        gradient_accumulation_fusion=bool(
            importlib.util.find_spec("fused_weight_gradient_mlp_cuda")
        ),
        apply_rope_fusion=engine,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=engine,
        **RECOMPUTE[recompute],
    )


class Trunk(GPTModel):
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
            max_sequence_length=hf.max_position_embeddings,
            pre_process=layout.is_first_stage,
            post_process=layout.is_last_stage,
            share_embeddings_and_output_weights=head and hf.tie_word_embeddings,
            position_embedding_type="rope",
            pg_collection=layout.groups,
        )
        self.hf = hf
        self.layout = layout
        self.rotary_pos_emb.inv_freq = rope_frequencies(hf).to(platform.device())
        if not head and self.post_process:
            del self.output_layer

    def _postprocess(self, hidden_states: Tensor, *_, **__) -> Tensor:
        return hidden_states

    @property
    def head_weight(self) -> Tensor:
        """[V, D], this rank's rows of the output projection; on the last stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def packed_forward(
    model, tokens: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """This stage's hidden states of one packed micro-batch, from a trunk or what wraps one.

    Args:
        tokens, position_ids: [T] int64.
        cu_seqlens: [S+1] int32, padding being a segment of its own.
        max_seqlen: tokens of the longest segment.
    """
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )
    return model(
        input_ids=tokens[None],
        position_ids=position_ids[None],
        attention_mask=None,
        packed_seq_params=packing,
    )


def pick_rows(hidden_states: Tensor, rows: Tensor, layout: Layout) -> Tensor:
    """[R, D] hidden states at packed positions `rows` on every rank of the TP group.

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

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        norm = TENorm
    else:
        layer = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, normalization=config.normalization
        )
        norm = RMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = norm
    layers = [layer] * (config.num_layers // layout.pp)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def rope_frequencies(hf: PretrainedConfig) -> Tensor:
    """[head_dim / 2] float32 inverse frequencies, by transformers' own rules for the RoPE type.

    Raises:
        ValueError: the type scales attention or changes with the length of the input.
    """
    rope = hf.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        width = hf_map.head_dim(hf)
        return rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rope_type {kind!r} is not supported; supported: default, linear, llama3")
    frequencies, _attention_scaling = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))
    return frequencies


# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------


def load_config(hf_dir: str | Path) -> PretrainedConfig:
    """The directory's config.json; RoPE parameters as transformers 4 and 5 write them both do.

    Raises:
        ValueError: there is no config.json.
    """
    if not (Path(hf_dir) / "config.json").is_file():
        raise ValueError(f"{hf_dir}: no config.json; give a Hugging Face checkpoint directory")
    return AutoConfig.from_pretrained(hf_dir)


class Checkpoint:
    """The tensors of a Hugging Face directory, each read from safetensors when asked for.

    Raises:
        ValueError: no safetensors, a shard the index names is missing, or a file is damaged.
    """

    def __init__(self, hf_dir: str | Path):
        self.dir = Path(hf_dir)
        index = self.dir / "model.safetensors.index.json"
        if index.is_file():
            self.files = json.loads(index.read_text())["weight_map"]
        elif (self.dir / "model.safetensors").is_file():
            with self._open("model.safetensors") as file:
                self.files = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise ValueError(f"{hf_dir}: no model.safetensors and no model.safetensors.index.json")
        for file in sorted(set(self.files.values())):
            if not (self.dir / file).is_file():
                raise ValueError(f"{index}: names {file}, which is not there")

    def _open(self, file: str):
        try:
            return safe_open(self.dir / file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self.dir / file}: damaged safetensors file ({error})") from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.files:
            raise ValueError(f"{self.dir}: tensor {name} is missing")
        with self._open(self.files[name]) as file:
            return file.get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a matrix, as far as it has them; nothing else is read."""
        if name not in self.files:
            raise ValueError(f"{self.dir}: tensor {name} is missing")
        with self._open(self.files[name]) as file:
            return file.get_slice(name)[start:stop]

    def check(self, config: PretrainedConfig) -> None:
        """Raise ValueError unless the tensors are exactly those of the family's table."""
        wanted = {
            name
            for parameter, _ in hf_map.parameter_names(config)
            for name in hf_map.mapping_of(config, parameter).names
        }
        if missing := sorted(wanted - self.files.keys()):
            raise ValueError(f"{self.dir}: {len(missing)} tensors are missing, first {missing[0]}")
        # Some checkpoints of tied models repeat the embedding as lm_head.
        allowed = wanted | ({"lm_head.weight"} if config.tie_word_embeddings else set())
        extra = sorted(n for n in self.files.keys() - allowed if "rotary_emb" not in n)
        if extra:
            raise ValueError(
                f"{self.dir}: {len(extra)} tensors do not belong to {config.model_type}, "
                f"first {extra[0]}"
            )


def _global_name(model: Trunk, name: str) -> str:
    """A parameter's name with the layer counted over the whole model instead of the stage."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
    return ".".join(parts)


def load_weights(model: Trunk, hf_dir: str | Path) -> None:
    """Fill the trunk's parameters on this rank from a Hugging Face directory, in place.

    One tensor is held at a time. Raises ValueError for missing, unexpected or misshapen tensors.
    """
    checkpoint = Checkpoint(hf_dir)
    checkpoint.check(model.hf)
    layout = model.layout
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mapping = hf_map.mapping_of(model.hf, _global_name(model, name))
            whole = mapping.merge([checkpoint[n] for n in mapping.names], model.hf)
            shard = mapping.shard(whole, layout.tp_rank, layout.tp)
            if shard.shape != parameter.shape:
                raise ValueError(
                    f"{hf_dir}: {', '.join(mapping.names)} give {list(shard.shape)} where config."
                    f"json asks for {list(parameter.shape)}"
                )
            parameter.copy_(shard)


def load_head(hf_dir: str | Path, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """[stop − start, D] rows of a checkpoint's output projection, on this rank's device.

    Rows past the checkpoint's vocabulary are zero: the other model's padding reaches further, and
    they lie outside the common vocabulary.
    """
    hf = load_config(hf_dir)
    name = "model.embed_tokens.weight" if hf.tie_word_embeddings else "lm_head.weight"
    weight = Checkpoint(hf_dir).rows(name, start, stop)
    weight = F.pad(weight, (0, 0, 0, stop - start - len(weight)))
    return weight.to(platform.device(), dtype)


def export_weights(model: Trunk) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's tensors under their Hugging Face names, whole, on **every** rank.

    Every rank has to run the iterator to its end. Collectives, per parameter: an all-gather over
    the owners' TP group and a broadcast over the pipeline group, of the parameter's bytes each.
    """
    layout = model.layout
    own = {_global_name(model, name): p.detach() for name, p in model.named_parameters()}
    for unfused, fused in _unfused_names(model.hf):
        if fused in own:
            own[unfused] = own.pop(fused)
    shapes = _whole_shapes(model, own)
    stages = dist.get_process_group_ranks(layout.groups.pp)
    for name, layer in hf_map.parameter_names(model.hf):
        mapping = hf_map.mapping_of(model.hf, name)
        stage = _stage(name, layer, model)
        if layout.pp_rank == stage:
            whole = _unshard(mapping, own[name], layout)
        else:
            whole = torch.empty(shapes[name], dtype=dtype_of(model), device=platform.device())
        if layout.pp > 1:
            dist.broadcast(whole, src=stages[stage], group=layout.groups.pp)
        for hf_name, tensor in zip(mapping.names, mapping.split(whole, model.hf), strict=True):
            yield hf_name, tensor.contiguous()


def dtype_of(model: torch.nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _unfused_names(hf: PretrainedConfig) -> Iterator[tuple[str, str]]:
    for i in range(hf.num_hidden_layers):
        for fused, unfused in hf_map.FUSED_NORMS.items():
            yield f"decoder.layers.{i}.{unfused}", f"decoder.layers.{i}.{fused}"


def _stage(name: str, layer: int | None, model: Trunk) -> int:
    """The pipeline stage that holds a parameter."""
    if layer is not None:
        return layer // (model.config.num_layers // model.layout.pp)
    return 0 if name.startswith("embedding") else model.layout.pp - 1


def _whole_shapes(model: Trunk, own: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Shapes of all whole parameters; a stage learns the others' once (they never change)."""
    if not hasattr(model, "whole_shapes"):
        layout, shapes = model.layout, {}
        for name, tensor in own.items():
            mapping = hf_map.mapping_of(model.hf, name)
            meta = tensor.to("meta")
            shapes[name] = (
                mapping.unshard([meta] * layout.tp).shape if mapping.sharded else (meta.shape)
            )
        stages: list = [None] * layout.pp
        dist.all_gather_object(stages, shapes, group=layout.groups.pp)
        model.whole_shapes = {name: shape for stage in stages for name, shape in stage.items()}
    return model.whole_shapes


def _unshard(mapping, shard: Tensor, layout: Layout) -> Tensor:
    shard = shard.contiguous()
    if layout.tp == 1 or not mapping.sharded:
        return shard
    shards = [torch.empty_like(shard) for _ in range(layout.tp)]
    dist.all_gather(shards, shard, group=layout.groups.tp)
    return mapping.unshard(shards)
