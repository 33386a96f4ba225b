"""Which Hugging Face tensors make up which Megatron parameter: tables, as data.

A family is a dict from Megatron parameter name to a mapping. `{i}` stands for the layer's number in
the whole model. A mapping knows three things: the Hugging Face names, how their tensors are laid
out in one Megatron tensor (`merge` and its exact inverse `split`), and how that tensor is cut over
the tensor-parallel ranks (`shard` and its exact inverse `unshard`). A new family is a new table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mapping:
    """One Hugging Face tensor, unchanged; cut along `dim` over TP, or replicated (None)."""

    name: str
    dim: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def sharded(self) -> bool:
        return self.dim is not None

    def merge(self, tensors: list[Tensor], config) -> Tensor:
        return tensors[0]

    def split(self, tensor: Tensor, config) -> list[Tensor]:
        return [tensor]

    def shard(self, tensor: Tensor, tp_rank: int, tp: int) -> Tensor:
        return tensor if self.dim is None else tensor.chunk(tp, self.dim)[tp_rank]

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return shards[0] if self.dim is None else torch.cat(shards, self.dim)


@dataclass(frozen=True)
class Vocabulary(Mapping):
    """Embedding or output rows, padded with zero rows to the size that every TP divides."""

    dim: int | None = 0

    def merge(self, tensors: list[Tensor], config) -> Tensor:
        (weight,) = tensors
        padding = padded_vocab_size(config.vocab_size) - len(weight)
        return torch.nn.functional.pad(weight, (0, 0, 0, padding))

    def split(self, tensor: Tensor, config) -> list[Tensor]:
        return [tensor[: config.vocab_size]]


@dataclass(frozen=True)
class QKV:
    """Query, key and value, interleaved by KV group: the group's queries, its key, its value."""

    query: str
    key: str
    value: str
    dim: int = 0
    sharded = True

    @property
    def names(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    def merge(self, tensors: list[Tensor], config) -> Tensor:
        groups, tail = config.num_key_value_heads, tensors[0].shape[1:]
        return torch.cat([t.view(groups, -1, *tail) for t in tensors], dim=1).view(-1, *tail)

    def split(self, tensor: Tensor, config) -> list[Tensor]:
        groups, tail = config.num_key_value_heads, tensor.shape[1:]
        width = head_dim(config)
        queries = config.num_attention_heads // groups * width
        grouped = tensor.view(groups, queries + 2 * width, *tail)
        return [t.reshape(-1, *tail) for t in grouped.split([queries, width, width], dim=1)]

    shard, unshard = Mapping.shard, Mapping.unshard


@dataclass(frozen=True)
class GatedMLP:
    """Gate and up projection in one tensor; each TP rank holds its part of both."""

    gate: str
    up: str
    sharded = True

    @property
    def names(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def merge(self, tensors: list[Tensor], config) -> Tensor:
        return torch.cat(tensors)

    def split(self, tensor: Tensor, config) -> list[Tensor]:
        return list(tensor.chunk(2))

    def shard(self, tensor: Tensor, tp_rank: int, tp: int) -> Tensor:
        return torch.cat([part.chunk(tp)[tp_rank] for part in tensor.chunk(2)])

    def unshard(self, shards: list[Tensor]) -> Tensor:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])


_MEGATRON, _HF = "decoder.layers.{i}.", "model.layers.{i}."

LLAMA = {
    "embedding.word_embeddings.weight": Vocabulary("model.embed_tokens.weight"),
    _MEGATRON + "input_layernorm.weight": Mapping(_HF + "input_layernorm.weight"),
    _MEGATRON + "self_attention.linear_qkv.weight": QKV(
        _HF + "self_attn.q_proj.weight",
        _HF + "self_attn.k_proj.weight",
        _HF + "self_attn.v_proj.weight",
    ),
    _MEGATRON + "self_attention.linear_proj.weight": Mapping(
        _HF + "self_attn.o_proj.weight", dim=1
    ),
    _MEGATRON + "pre_mlp_layernorm.weight": Mapping(_HF + "post_attention_layernorm.weight"),
    _MEGATRON + "mlp.linear_fc1.weight": GatedMLP(
        _HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"
    ),
    _MEGATRON + "mlp.linear_fc2.weight": Mapping(_HF + "mlp.down_proj.weight", dim=1),
    "decoder.final_layernorm.weight": Mapping("model.norm.weight"),
    "output_layer.weight": Vocabulary("lm_head.weight"),
}
QWEN2 = LLAMA | {
    _MEGATRON + "self_attention.linear_qkv.bias": QKV(
        _HF + "self_attn.q_proj.bias", _HF + "self_attn.k_proj.bias", _HF + "self_attn.v_proj.bias"
    ),
}
QWEN3 = LLAMA | {
    _MEGATRON + "self_attention.q_layernorm.weight": Mapping(_HF + "self_attn.q_norm.weight"),
    _MEGATRON + "self_attention.k_layernorm.weight": Mapping(_HF + "self_attn.k_norm.weight"),
}
ROPE_TYPES = ("default", "linear", "llama3")
FAMILIES = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}

# TransformerEngine fuses a norm into the projection after it and names it there.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def family(config) -> dict:
    """The table of a Hugging Face config; a tied model has no tensor of its own for the output.

    Raises:
        ValueError: the architecture has no table.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    table = FAMILIES[config.model_type]
    if config.tie_word_embeddings:
        tied = Vocabulary("model.embed_tokens.weight")
        table = table | {"output_layer.weight": tied}
    return table


def parameter_names(config) -> list[tuple[str, int | None]]:
    """Every Megatron name of the model and its layer (None outside the layers), front to back.

    The output of a tied model is left out: it is the embedding.
    """
    table = [n for n in family(config) if n != "output_layer.weight"]
    layers = [n for n in table if "{i}" in n]
    names: list[tuple[str, int | None]] = [("embedding.word_embeddings.weight", None)]
    for i in range(config.num_hidden_layers):
        names += [(n.format(i=i), i) for n in layers]
    names.append(("decoder.final_layernorm.weight", None))
    if not config.tie_word_embeddings:
        names.append(("output_layer.weight", None))
    return names


def mapping_of(config, name: str):
    """The mapping of one Megatron parameter (global layer number), with its layer filled in."""
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return family(config)[name]
    layer, inner = parts[2], ".".join(parts[3:])
    mapping = family(config)[_MEGATRON + FUSED_NORMS.get(inner, inner)]
    filled = {
        key: value.replace("{i}", layer)
        for key, value in vars(mapping).items()
        if isinstance(value, str)
    }
    return type(mapping)(**(vars(mapping) | filled))


def head_dim(config) -> int:
    """Width of one attention head, which some configs leave to be derived."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def padded_vocab_size(vocab_size: int, multiple: int = 64) -> int:
    """Vocabulary rows after padding: the same for every power-of-two TP up to 64, so that
    checkpoint shapes do not depend on it (151,936 and 152,064 need no padding)."""
    return -(-vocab_size // multiple) * multiple
