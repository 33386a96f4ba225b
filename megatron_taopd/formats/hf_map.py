"""Which Hugging Face tensors make up which Megatron parameter: tables, as data.

A family is a dict from Megatron parameter name to a mapping. `{i}` stands for the layer's number in
the whole model and `{e}` for the expert's. A mapping knows three things: the Hugging Face names,
how their tensors are laid out in one Megatron tensor (`merge` and its exact inverse `split`), and
how that tensor is cut over the tensor-parallel ranks (`shard` and its exact inverse `unshard`;
`cuts` tells the same of the whole tensor). A new family is a new table.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_taopd.formats.hf_keys import unsupported


class _Cut:
    """A tensor cut evenly along `dim` over TP, or replicated (None)."""

    dim: int | None

    @property
    def sharded(self) -> bool:
        return self.dim is not None

    def cuts(self, tp: int) -> tuple[int, int]:
        """Return (dim, n): n equal chunks along dim give every rank whole chunks."""
        return (0, 1) if self.dim is None else (self.dim, tp)

    def shard(self, tensor: Tensor, tp_rank: int, tp: int) -> Tensor:
        return tensor if self.dim is None else tensor.chunk(tp, self.dim)[tp_rank]

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return shards[0] if self.dim is None else torch.cat(shards, self.dim)


@dataclass(frozen=True)
class Mapping(_Cut):
    """One Hugging Face tensor, unchanged."""

    name: str
    dim: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def merge(self, tensors: list[Tensor], config) -> Tensor:
        return tensors[0]

    def split(self, tensor: Tensor, config) -> list[Tensor]:
        return [tensor]


@dataclass(frozen=True)
class Vocabulary(Mapping):
    """Embedding or output rows, padded with zero rows to the size that every TP divides."""

    dim: int | None = 0

    def merge(self, tensors: list[Tensor], config) -> Tensor:
        (weight,) = tensors
        padding = padded_vocab_size(config.vocab_size) - len(weight)
        return torch.nn.functional.pad(weight, (0, 0, 0, padding)) if padding else weight

    def split(self, tensor: Tensor, config) -> list[Tensor]:
        return [tensor[: config.vocab_size]]


@dataclass(frozen=True)
class QKV(_Cut):
    """Query, key and value, interleaved by KV group: the group's queries, its key, its value.

    The whole is cut evenly, also over more ranks than there are groups: Megatron then gathers the
    projections of a group's ranks, so that each of them has the group's key and value.
    """

    query: str
    key: str
    value: str
    dim: int | None = 0

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


@dataclass(frozen=True)
class GatedMLP:
    """Gate and up projection in one tensor; each TP rank holds its part of both."""

    gate: str
    up: str
    sharded = True

    @property
    def names(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def cuts(self, tp: int) -> tuple[int, int]:
        return 0, 2 * tp

    def merge(self, tensors: list[Tensor], config) -> Tensor:
        return torch.cat(tensors)

    def split(self, tensor: Tensor, config) -> list[Tensor]:
        return list(tensor.chunk(2))

    def shard(self, tensor: Tensor, tp_rank: int, tp: int) -> Tensor:
        return torch.cat([part.chunk(tp)[tp_rank] for part in tensor.chunk(2)])

    def unshard(self, shards: list[Tensor]) -> Tensor:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])


AnyMapping = Mapping | QKV | GatedMLP

# ----------------------------------------------------------------------------------------- tables

_MEGATRON, _HF = "decoder.layers.{i}.", "model.layers.{i}."
_EXPERT, _HF_EXPERT = _MEGATRON + "mlp.experts.local_experts.{e}.", _HF + "mlp.experts.{e}."

_MODEL: dict[str, AnyMapping] = {
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
    "decoder.final_layernorm.weight": Mapping("model.norm.weight"),
    "output_layer.weight": Vocabulary("lm_head.weight"),
}
_DENSE_MLP: dict[str, AnyMapping] = {
    _MEGATRON + "mlp.linear_fc1.weight": GatedMLP(
        _HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"
    ),
    _MEGATRON + "mlp.linear_fc2.weight": Mapping(_HF + "mlp.down_proj.weight", dim=1),
}
_EXPERTS: dict[str, AnyMapping] = {
    _MEGATRON + "mlp.router.weight": Mapping(_HF + "mlp.gate.weight"),
    _EXPERT + "linear_fc1.weight": GatedMLP(
        _HF_EXPERT + "gate_proj.weight", _HF_EXPERT + "up_proj.weight"
    ),
    _EXPERT + "linear_fc2.weight": Mapping(_HF_EXPERT + "down_proj.weight", dim=1),
}
_QKV_BIAS: dict[str, AnyMapping] = {
    _MEGATRON + "self_attention.linear_qkv.bias": QKV(
        _HF + "self_attn.q_proj.bias", _HF + "self_attn.k_proj.bias", _HF + "self_attn.v_proj.bias"
    ),
}
_QK_NORM: dict[str, AnyMapping] = {
    _MEGATRON + "self_attention.q_layernorm.weight": Mapping(_HF + "self_attn.q_norm.weight"),
    _MEGATRON + "self_attention.k_layernorm.weight": Mapping(_HF + "self_attn.k_norm.weight"),
}

FAMILIES: dict[str, dict[str, AnyMapping]] = {
    "llama": _MODEL | _DENSE_MLP,
    "qwen2": _MODEL | _DENSE_MLP | _QKV_BIAS,
    "qwen3": _MODEL | _DENSE_MLP | _QK_NORM,
    "qwen3_moe": _MODEL | _EXPERTS | _QK_NORM,
}
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}


def check_architecture(config: PretrainedConfig) -> None:
    """Raise ValueError, saying what of this model has no table or cannot be run."""
    for name in config.architectures or ["an architecture that config.json does not name"]:
        if name not in ARCHITECTURES:
            raise ValueError(f"{name} is not supported; supported: {', '.join(ARCHITECTURES)}")
        if ARCHITECTURES[name] != config.model_type:
            raise ValueError(f"{name} with model_type {config.model_type} contradict each other")
    check_keys(config)


def check_keys(config: PretrainedConfig) -> None:
    """Raise ValueError, one line, for the first key whose effect the trunk does not have."""
    for sentence in unsupported(config):
        raise ValueError(sentence)


def check_layout(config: PretrainedConfig, path, tp: int, pp: int, ep: int = 1) -> None:
    """Raise ValueError unless the model at `path` divides by the layout: "tp: 3 does not …"."""
    experts = num_experts(config)
    columns = config.moe_intermediate_size if experts else config.intermediate_size
    sizes = {
        "attention heads": config.num_attention_heads,
        "MLP columns": columns,
        "vocabulary rows": padded_vocab_size(config.vocab_size),
    }
    # More ranks than key-value heads share them, in equal numbers.
    heads = config.num_key_value_heads
    choices = [n for n in divisors(math.gcd(*sizes.values())) if heads % n == 0 or n % heads == 0]
    if tp not in choices:
        wrong = [f"does not divide the {n} {what}" for what, n in sizes.items() if tp < 1 or n % tp]
        wrong += [f"neither divides nor is a multiple of the {heads} key-value heads"]
        raise ValueError(f"tp: {tp} {wrong[0]} of {path}; one of {listed(choices)}")
    if ep > 1 and not experts:
        raise ValueError(f"ep: {ep} with {path}, which has no experts; it has to be 1")
    for name, size, count, what in (
        ("pp", pp, config.num_hidden_layers, "layers"),
        ("ep", ep, experts or 1, "experts"),
    ):
        if size not in divisors(count):
            raise ValueError(
                f"{name}: {size} does not divide the {count} {what} of {path}; "
                f"one of {listed(divisors(count))}"
            )


def divisors(n: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def listed(numbers: Iterable[int]) -> str:
    """Join numbers as an error line shows them: "1, 2, 4"."""
    return ", ".join(map(str, numbers))


# ------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter of the whole model.

    Attributes:
        name: layer and expert counted over the whole model.
        mapping: with the layer and the expert filled in.
        key: of the tensor in a distributed checkpoint that has this parameter at `index`.
        index: (), (layer,) or (layer, expert): all layers and experts share a tensor there.
        shape: of what `index` counts: (), (layers,) or (layers, experts).
    """

    name: str
    mapping: AnyMapping
    key: str
    index: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    @property
    def layer(self) -> int | None:
        return self.index[0] if self.index else None

    @property
    def expert(self) -> int | None:
        return self.index[1] if len(self.index) == 2 else None

    @property
    def key_in_layer(self) -> str:
        """The key where each layer has its own tensor ("non-homogeneous layers")."""
        if self.layer is None:
            return self.key
        return self.key.replace("decoder.layers.", f"decoder.layers.{self.layer}.")


def parameters(config: PretrainedConfig) -> dict[str, Parameter]:
    """Return every parameter of the model by name, front to back.

    The output of a tied model is left out: it is the embedding.
    """
    layers, experts = config.num_hidden_layers, num_experts(config)
    found: list[Parameter] = []
    table = FAMILIES[config.model_type]
    inside = [name for name in table if "{i}" in name]
    outside = [name for name in table if "{i}" not in name]
    first, *last = outside
    found.append(Parameter(first, table[first], first))
    for i in range(layers):
        for name in inside:
            key = _checkpoint_key(name, bool(experts))
            if "{e}" not in name:
                filled = _fill(table[name], i)
                found.append(Parameter(name.format(i=i), filled, key, (i,), (layers,)))
                continue
            for e in range(experts):
                filled = _fill(table[name], i, e)
                shape = (layers, experts)
                found.append(Parameter(name.format(i=i, e=e), filled, key, (i, e), shape))
    for name in last:
        if not (name == "output_layer.weight" and config.tie_word_embeddings):
            found.append(Parameter(name, table[name], name))
    return {parameter.name: parameter for parameter in found}


def _fill(mapping, layer: int, expert: int | None = None):
    filled = {
        key: value.format(i=layer, e=expert)
        for key, value in vars(mapping).items()
        if isinstance(value, str)
    }
    return replace(mapping, **filled)


# TransformerEngine fuses a norm into the projection after it and names it there. Distributed
# checkpoints use its names, whichever layers the model that saved has.
_FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def _checkpoint_key(name: str, experts: bool) -> str:
    """Return the key of a layer's parameter, from its name in the tables.

    decoder.layers.{i}.mlp.experts.local_experts.{e}.X → decoder.layers.mlp.experts.experts.X
    """
    inner = name.removeprefix(_MEGATRON)
    if not (experts and inner == "pre_mlp_layernorm.weight"):  # several projections come after it
        inner = _FUSED_NORMS.get(inner, inner)
    return "decoder.layers." + inner.replace("local_experts.{e}.", "experts.")


def plain_name(name: str, first_layer: int = 0, first_expert: int = 0) -> str:
    """Return a parameter's name as the tables have it, from that in a pipeline stage's model.

    Args:
        name: of a model with Megatron's own layers or TransformerEngine's.
        first_layer, first_expert: the numbers in the whole model of the stage's layer 0 and this
            rank's expert 0.
    """
    if not (match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)):
        return name
    layer, inner = int(match[1]) + first_layer, match[2]
    unfused = {fused: plain for plain, fused in _FUSED_NORMS.items()}
    inner = unfused.get(inner, inner)
    grouped = re.fullmatch(r"mlp\.experts\.(linear_fc\d)\.weight(\d+)", inner)
    single = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc\d)\.weight", inner)
    if grouped is not None:
        projection, number = grouped.groups()
    elif single is not None:
        number, projection = single.groups()
    if grouped or single:
        expert = int(number) + first_expert
        inner = f"mlp.experts.local_experts.{expert}.{projection}.weight"
    return f"decoder.layers.{layer}.{inner}"


# ------------------------------------------------------------------------------------------ sizes


def num_experts(config: PretrainedConfig) -> int:
    """Return the number of experts per layer; 0 for a dense model."""
    return config.num_experts if config.model_type == "qwen3_moe" else 0


def head_dim(config: PretrainedConfig) -> int:
    """Return the width of one attention head, which some configs leave to be derived."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def longest_sequence(config: PretrainedConfig) -> int:
    """Return how many positions a model of any family has; one without a limit, sys.maxsize.

    With YaRN they are those that it is stretched to: Qwen3's configs keep the trained length in
    `max_position_embeddings` then.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    most = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if rope.get("rope_type") != "yarn":
        return most
    return max(most, int(rope["factor"] * rope["original_max_position_embeddings"]))


def padded_vocab_size(vocab_size: int, multiple: int = 64) -> int:
    """Return the vocabulary's rows after padding.

    They are the same for every power-of-two TP up to 64, so that checkpoint shapes do not depend on
    it (151,936 and 152,064 need no padding).
    """
    return -(-vocab_size // multiple) * multiple
