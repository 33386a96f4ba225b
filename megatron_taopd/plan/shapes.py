"""Parameters of a rank, Megatron's gradient buffers, and the optimizer's share of them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from math import lcm, prod
from typing import NamedTuple

from transformers import PretrainedConfig

from megatron_taopd.formats import hf_map
from megatron_taopd.formats.hf import whole_shapes
from megatron_taopd.monitoring.accounting import ModelCost

# Megatron makes a layer's parameters in this order, and its buffers follow it.
_ORDER = (
    "input_layernorm.weight",
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
    "mlp.experts.local_experts.0.linear_fc1.weight",
    "mlp.experts.local_experts.0.linear_fc2.weight",
)
_LAYER = "decoder.layers.0."


@dataclass(frozen=True)
class Architecture:
    """A model's sizes. Widths are of the whole model: all heads, all columns.

    Attributes:
        layer: (name, elements, cut over TP, held by one expert) of a layer's parameters; all layers
            are alike, and an expert stands for all.
        exported: (elements, cut over TP, expert's number or None) of a layer's parameters, in the
            order in which `models.weights.export_weights` has them.
        largest: elements of the largest parameter.
    """

    hidden: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    qk_norm: bool
    experts: int
    experts_per_token: int
    layer: tuple[tuple[str, int, bool, bool], ...]
    exported: tuple[tuple[int, bool, int | None], ...]
    largest: int
    cost: ModelCost

    @classmethod
    def of(cls, hf: PretrainedConfig) -> Architecture:
        """Read the sizes from the config of a model of a family in `hf_map.FAMILIES`."""
        single = deepcopy(hf)
        single.num_hidden_layers = 1
        if hasattr(single, "quantization_config"):  # of a served teacher: sizes are the same
            del single.quantization_config
        known = hf_map.parameters(single)
        shapes = whole_shapes(single, known)
        experts = hf_map.num_experts(hf)
        layer = tuple(
            (
                name,
                prod(shapes[_LAYER + name]),
                known[_LAYER + name].mapping.sharded,
                "experts" in name,
            )
            for name in _ORDER
            if _LAYER + name in known
        )
        return cls(
            hidden=hf.hidden_size,
            layers=hf.num_hidden_layers,
            heads=hf.num_attention_heads,
            groups=hf.num_key_value_heads,
            head_dim=hf_map.head_dim(hf),
            ffn=hf.moe_intermediate_size if experts else hf.intermediate_size,
            vocab=hf_map.padded_vocab_size(hf.vocab_size),
            tied=hf.tie_word_embeddings,
            qk_norm=any("q_layernorm" in name for name, *_ in layer),
            experts=experts,
            experts_per_token=hf.num_experts_per_tok if experts else 1,
            layer=layer,
            exported=tuple(
                (prod(shapes[name]), parameter.mapping.sharded, parameter.expert)
                for name, parameter in known.items()
                if parameter.layer is not None
            ),
            largest=max(prod(shape) for shape in shapes.values()),
            cost=ModelCost.of(hf),
        )

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.groups * self.head_dim

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def elements(self) -> int:
        """Count the whole model's elements; a tied head counts once."""
        inside = sum(n * (self.experts if expert else 1) for _, n, _, expert in self.layer)
        heads = self.embedding if self.tied else 2 * self.embedding
        return self.layers * inside + heads + self.hidden


class Exported(NamedTuple):
    """A parameter of the whole model on its way to every rank.

    Attributes:
        shard: elements of a tensor-parallel rank; all of them where TP does not cut it.
        owner: the stage and, of an expert's, the expert-parallel rank that have it.
    """

    elements: int
    shard: int
    owner: tuple[int, int | None]


def exported(model: Architecture, grid: Grid) -> list[Exported]:
    """List the parameters in the order in which `models.weights.export_weights` has them."""

    def one(elements: int, cut: bool, expert: int | None, stage: int) -> Exported:
        shard = elements // grid.tp if cut else elements
        owner = None if expert is None else expert // (model.experts // grid.ep)
        return Exported(elements, shard, (stage, owner))

    inside = model.layers // grid.pp
    last = [(model.hidden, False, None)] + [(model.embedding, True, None)] * (not model.tied)
    return [
        one(model.embedding, True, None, 0),
        *(one(*size, layer // inside) for layer in range(model.layers) for size in model.exported),
        *(one(*size, grid.pp - 1) for size in last),
    ]


@dataclass(frozen=True)
class Grid:
    """One model's layout, without ranks and groups; `parallel.layout.Layout` has those.

    Ranks are numbered tensor first, then context, data and pipeline.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence: bool = False
    ep: int = 1
    cp: int = 1

    @property
    def data_ranks(self) -> int:
        return self.dp * self.cp

    def data_rank(self, rank: int) -> int:
        return rank // self.tp % self.data_ranks

    def cp_rank(self, rank: int) -> int:
        return self.data_rank(rank) % self.cp

    def stage(self, rank: int) -> int:
        return rank // (self.tp * self.data_ranks)

    @property
    def shards(self) -> int:
        """The number of ranks over which the tokens between TP regions are cut."""
        return self.tp if self.sequence else 1

    def __str__(self) -> str:
        context = f"-CP({self.cp})" if self.cp > 1 else ""
        experts = f"-EP({self.ep})" if self.ep > 1 else ""
        sequence = "-SP" if self.sequence else ""
        return f"TP({self.tp}){context}-PP({self.pp})-DP({self.dp}){experts}{sequence}"


@cache
def parameter_sizes(
    model: Architecture, grid: Grid, stage: int, head: bool = True
) -> tuple[tuple[int, bool], ...]:
    """List (elements, in a bucket of its own) of a rank's parameters, front to back.

    Those of experts, which lie in a buffer of their own, are `expert_sizes`.

    Args:
        head: with the output projection, as a student; a teacher's trunk is without.
    """
    first, last = stage == 0, stage == grid.pp - 1
    columns = model.embedding // grid.tp
    layer = [
        (elements // grid.tp if cut else elements, False)
        for _, elements, cut, expert in model.layer
        if not expert
    ]
    found = []
    if first:
        # Stages that share an embedding keep it in a bucket of its own.
        found.append((columns, head and model.tied and not last))
    found += layer * (model.layers // grid.pp)
    if last:
        found.append((model.hidden, False))
        if head and not (model.tied and first):
            found.append((columns, model.tied))
    return tuple(found)


def expert_sizes(model: Architecture, grid: Grid) -> tuple[tuple[int, bool], ...]:
    """List a rank's parameters of experts as `parameter_sizes` does; a dense model has none."""
    one = [(elements // grid.tp, False) for _, elements, _, expert in model.layer if expert]
    return tuple(one * (model.experts // grid.ep) * (model.layers // grid.pp))


def parameter_elements(model: Architecture, grid: Grid, stage: int, head: bool = True) -> int:
    """Count the parameters' elements on a rank of a stage; head: as in `parameter_sizes`."""
    sizes = parameter_sizes(model, grid, stage, head) + expert_sizes(model, grid)
    return sum(elements for elements, _ in sizes)


@dataclass(frozen=True)
class Bucket:
    """A part of Megatron's gradient buffer that is reduced at a time.

    Attributes:
        size: elements, padded so that every data-parallel rank has an equal share.
        spans: (start, end) of each parameter in it.
    """

    size: int
    spans: tuple[tuple[int, int], ...]

    def share(self, dp: int, dp_rank: int) -> int:
        """Count the parameter elements in the share of a data-parallel rank."""
        width = self.size // dp
        start = dp_rank * width
        return sum(max(0, min(end, start + width) - max(begin, start)) for begin, end in self.spans)


@cache
def gradient_buckets(
    sizes: tuple[tuple[int, bool], ...], dp: int, bucket_size: int | None = None
) -> tuple[Bucket, ...]:
    """Lay out the buffer of Megatron's DDP with a distributed optimizer.

    Parameters lie in it back to front, each at a multiple of 64 elements, buckets at a multiple of
    128 and dp. A bucket is full when it has bucket_size elements (None: it never is).

    Args:
        sizes: from `parameter_sizes`.
    """
    multiple = lcm(dp, 128)
    buckets, spans, at = [], [], 0

    def close() -> None:
        nonlocal spans, at
        buckets.append(Bucket(_padded(at, multiple), tuple(spans)))
        spans, at = [], 0

    for elements, alone in reversed(sizes):
        at = _padded(at, 64)
        if alone and spans:
            close()
        spans.append((at, at + elements))
        at += elements
        if alone or (bucket_size is not None and at >= bucket_size):
            close()
    if spans:
        close()
    return tuple(buckets)


def default_bucket_size(dp: int, stage: int) -> int | None:
    """Return Megatron's, in elements: reductions overlap the backward pass on stage 0 only."""
    return max(40_000_000, 1_000_000 * dp) if stage == 0 else None


@dataclass(frozen=True)
class Buffer:
    """The weights' buffer, and the gradients', of the parameters that the same ranks share.

    Attributes:
        ranks: data-parallel ranks that have these parameters; of experts dp / ep, of all others dp.
        apart: of the data-parallel ranks, how many a rank is from the next of these.
    """

    buckets: tuple[Bucket, ...]
    ranks: int
    apart: int = 1

    @property
    def elements(self) -> int:
        """Count the elements, padding included."""
        return sum(bucket.size for bucket in self.buckets)

    def share(self, dp_rank: int) -> int:
        """Count the parameter elements that a data-parallel rank updates."""
        rank = dp_rank // self.apart
        return sum(bucket.share(self.ranks, rank) for bucket in self.buckets)


def student_buffers(model: Architecture, grid: Grid, stage: int) -> tuple[Buffer, ...]:
    """Lay out the buffers of a student's rank: that of experts, if it has some, comes last."""
    found = []
    for sizes, apart in (
        (parameter_sizes(model, grid, stage), 1),
        (expert_sizes(model, grid), grid.ep),
    ):
        if sizes:
            ranks = grid.data_ranks // apart
            bucket_size = default_bucket_size(ranks, stage)
            found.append(Buffer(gradient_buckets(sizes, ranks, bucket_size), ranks, apart))
    return tuple(found)


def buffer_elements(buffers: tuple[Buffer, ...]) -> int:
    """Count the elements of all buffers, padding included."""
    return sum(buffer.elements for buffer in buffers)


@cache
def optimizer_elements(buffers: tuple[Buffer, ...], dp: int, dp_rank: int | None = None) -> int:
    """Count the parameter elements that a data-parallel rank updates; None: the most of any."""
    ranks = range(dp) if dp_rank is None else (dp_rank,)
    return max(sum(buffer.share(rank) for buffer in buffers) for rank in ranks)


def optimizer_bytes(elements: int, itemsize: int) -> int:
    """Count two fp32 moments and, of bf16 weights, an fp32 copy; Adam's counters are left out."""
    return elements * (8 if itemsize == 4 else 12)


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
