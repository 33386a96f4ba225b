"""Weights between Hugging Face checkpoints and the shards of a Megatron trunk, both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_taopd.formats import hf_map
from megatron_taopd.formats.files import written_aside
from megatron_taopd.formats.hf import (
    CARD,
    MAX_FILE_BYTES,
    HFCheckpoint,
    HFWriter,
    copy_side_files,
    load_config,
    tensor_shapes,
    whole_shapes,
)
from megatron_taopd.formats.megatron import (
    EXTRA_STATE,
    MegatronCheckpoint,
    find_keys,
    layers_are_apart,
)
from megatron_taopd.formats.output_head import OutputHead, find_head
from megatron_taopd.formats.unpickle import check_pickles
from megatron_taopd.models.gpt import Trunk
from megatron_taopd.parallel import packing, platform, progress, watchdog


def named_parameters(model: Trunk) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield this rank's parameters under the names of `hf_map.parameters`."""
    layers = model.decoder.layers
    first_layer = layers[0].layer_number - 1 if len(layers) else 0
    first_expert = 0
    if experts := hf_map.num_experts(model.hf):
        first_expert = model.layout.ep_rank * (experts // model.layout.ep)
    for name, parameter in model.named_parameters():
        yield hf_map.plain_name(name, first_layer, first_expert), parameter


def load_weights(model: Trunk, hf_dir: str | Path) -> None:
    """Fill the trunk's parameters on this rank from a Hugging Face directory, in place.

    One parameter is held at a time. Raises ValueError for missing, unexpected or misshapen tensors.
    """
    checkpoint = HFCheckpoint(hf_dir)
    checkpoint.check(model.hf)
    layout, known = model.layout, hf_map.parameters(model.hf)
    if model.hf.tie_word_embeddings:  # the last stage's own copy
        known["output_layer.weight"] = known["embedding.word_embeddings.weight"]
    with torch.no_grad():
        parameters = list(named_parameters(model))
        for name, parameter in progress.track(parameters, None, f"loading {hf_dir}"):
            mapping = known[name].mapping
            whole = mapping.merge([checkpoint[n] for n in mapping.names], model.hf)
            parameter.copy_(mapping.shard(whole, layout.tp_rank, layout.tp))


def load_tensors(model: Trunk, named: Iterable[tuple[str, Tensor]]) -> None:
    """Fill the trunk's parameters on this rank from whole tensors, in place.

    Args:
        named: by Hugging Face name, in the order of `export_weights`, of a model of the same
            architecture and in whatever layout. Every rank calls this.
    """
    layout, own, tensors = model.layout, dict(named_parameters(model)), iter(named)
    for name, parameter in hf_map.parameters(model.hf).items():
        mapping = parameter.mapping
        found = dict(islice(tensors, len(mapping.names)))
        if name in own:
            whole = mapping.merge([found[n] for n in mapping.names], model.hf)
            own[name].data.copy_(mapping.shard(whole, layout.tp_rank, layout.tp))


def load_megatron(model: Trunk, directory: str | Path) -> None:
    """Fill the trunk's parameters from a Megatron distributed checkpoint, with Megatron's loader.

    Whatever layout saved it, with layers stacked or apart; each rank reads what it needs. Every
    rank calls this.

    Raises:
        ValueError: no such checkpoint, it is of another model, something pickled in it is more than
            plain data, or Megatron cannot load it.

    Collectives: those of Megatron's loader (metadata, some 100 bytes a tensor and rank).
    """
    checkpoint = MegatronCheckpoint(directory)
    keys = find_keys(checkpoint, model.hf, hf_map.parameters(model.hf))
    check_pickles(directory)  # which Megatron unpickles without looking
    sharded = without_extra_states(
        sharded_weights(model, layers_are_apart(keys.values(), directory))
    )
    try:
        with progress.phase(f"loading {directory}"):
            loaded = dist_checkpointing.load(sharded, str(directory))
    except Exception as error:  # Megatron and torch raise a dozen kinds on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{directory}: Megatron cannot load it: {reason[:300]}") from error
    fill(model, loaded)


def sharded_weights(model: Trunk, apart: bool = False) -> dict:
    """Describe this rank's parts of the model to Megatron's checkpointing.

    Args:
        apart: each layer has tensors of its own there, instead of a part of one for all layers.
    """
    metadata = {"dp_cp_group": model.layout.groups.dp_cp, "non_homogeneous_layers": apart}
    return model.sharded_state_dict(metadata=metadata)


def without_extra_states(state: dict) -> dict:
    """Leave out what TransformerEngine keeps next to weights: the scales of FP8, which is not used.

    Which modules have such a state depends on the layers: a checkpoint that was written with
    TransformerEngine has other ones than a model without it asks for, and the other way round.
    """
    return {name: value for name, value in state.items() if EXTRA_STATE not in name}


def extra_states(state: dict) -> dict:
    """Leave only what `without_extra_states` leaves out, which a checkpoint has all the same."""
    return {name: value for name, value in state.items() if EXTRA_STATE in name}


def fill(model: torch.nn.Module, state: dict) -> None:
    """Give the model all its parameters. What else either of them has is left alone."""
    missing, _unexpected = model.load_state_dict(without_extra_states(state), strict=False)
    missing = [name for name in missing if EXTRA_STATE not in name]
    assert not missing, missing


def load_head(hf_dir: str | Path, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Read rows of a checkpoint's output projection: [len(ids), D], on this rank's device.

    A factor that the model has on its logits is in them, so that logits are rows · hidden. Where it
    is no power of two, a narrow dtype rounds them once more.

    Args:
        ids: [V] int64, the row for each column; zeros for −1, a column that takes part in nothing.

    Raises:
        ValueError: the model's logits are no such product (`output_head`).
    """
    return load_rows(hf_dir, find_head(hf_dir), ids, dtype)


def load_rows(hf_dir: str | Path, head: OutputHead, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Read rows as `load_head` does, of a head that has been found."""
    rows = HFCheckpoint(hf_dir).rows(head.name, ids).to(platform.device())
    return (rows if head.scale == 1 else rows.float() * head.scale).to(dtype)


def export_weights(
    model: Trunk, read: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's tensors under their Hugging Face names, whole, on **every** rank.

    Every rank has to run the iterator to its end.

    Parameters of one owner travel together, up to `packing.EXPORT_BYTES` of whole ones; a larger
    one goes alone. An owner is a pipeline stage and, of experts, an expert-parallel rank. First the
    shards go to the ranks of the same tensor-parallel rank, of the same stage and then in the other
    ones, so that little goes between nodes; then each stage gathers them over TP.

    Args:
        read: picks what is exported of a parameter, of its shape and dtype: its value, or say its
            gradient.

    Memory: a bucket of whole parameters and this rank's shards of it, and one whole parameter.

    Collectives, per bucket: a broadcast of this rank's shards over the pipeline group and, of
    experts, before it over the EP group; and an all-gather of them over the TP group. A parameter
    that TP does not cut goes along.
    """
    own = {name: read(parameter) for name, parameter in named_parameters(model)}
    known = hf_map.parameters(model.hf)
    if not hasattr(model, "whole_shapes"):  # they never change
        model.whole_shapes = whole_shapes(model.hf, known)
    dtype, parameters = dtype_of(model), list(known.values())
    sizes = [prod(model.whole_shapes[p.name]) * dtype.itemsize for p in parameters]
    owners = [_owner(parameter, model) for parameter in parameters]
    for start, stop in packing.pack(sizes, owners, packing.EXPORT_BYTES):
        together = parameters[start:stop]
        for parameter, shards in zip(together, _shards(together, own, model), strict=True):
            watchdog.heartbeat()
            mapping = parameter.mapping
            whole = mapping.unshard(shards) if mapping.sharded else shards[0]
            for hf_name, tensor in zip(mapping.names, mapping.split(whole, model.hf), strict=True):
                yield hf_name, tensor.contiguous()


def _shards(
    parameters: Sequence[hf_map.Parameter], own: Mapping[str, Tensor], model: Trunk
) -> Iterator[list[Tensor]]:
    """Yield, for each of these parameters of one owner, what every tensor-parallel rank has of it.

    Args:
        own: this rank's parameters by name, those of its stage.
    """
    layout, groups = model.layout, model.layout.groups
    if layout.tp * layout.pp * layout.ep == 1:
        yield from ([own[parameter.name]] for parameter in parameters)
        return
    shapes = [_shard_shape(p.mapping, model.whole_shapes[p.name], layout.tp) for p in parameters]
    ends = list(accumulate(map(prod, shapes)))
    stage, expert_rank = _owner(parameters[0], model)
    if parameters[0].name in own:
        flat = torch.cat([own[parameter.name].reshape(-1) for parameter in parameters])
    else:
        flat = torch.empty(ends[-1], dtype=dtype_of(model), device=platform.device())
    if expert_rank is not None and layout.ep > 1 and layout.pp_rank == stage:
        source = dist.get_process_group_ranks(groups.ep)[expert_rank]
        dist.broadcast(flat, src=source, group=groups.ep)
    if layout.pp > 1:
        source = dist.get_process_group_ranks(groups.pp)[stage]
        dist.broadcast(flat, src=source, group=groups.pp)
    every = flat[None]
    if layout.tp > 1:
        every = flat.new_empty(layout.tp, len(flat))
        dist.all_gather_into_tensor(every.view(-1), flat, group=groups.tp)
    del flat
    for shape, end in zip(shapes, ends, strict=True):
        yield [row[end - prod(shape) : end].view(shape) for row in every]


def _shard_shape(mapping: hf_map.AnyMapping, whole: Sequence[int], tp: int) -> tuple[int, ...]:
    if not mapping.sharded:
        return tuple(whole)
    dim, _ = mapping.cuts(tp)
    return (*whole[:dim], whole[dim] // tp, *whole[dim + 1 :])


def dtype_of(model: torch.nn.Module) -> torch.dtype:
    """Return the dtype of a model's parameters, which all have the same."""
    return next(model.parameters()).dtype


def _owner(parameter: hf_map.Parameter, model: Trunk) -> tuple[int, int | None]:
    """Return the pipeline stage that holds a parameter and, of an expert's, its EP rank."""
    layout, last = model.layout, model.layout.pp - 1
    if parameter.layer is None:
        return (0 if parameter.name.startswith("embedding") else last), None
    stage = parameter.layer // (model.config.num_layers // layout.pp)
    if parameter.expert is None:
        return stage, None
    return stage, parameter.expert // (hf_map.num_experts(model.hf) // layout.ep)


def save_hf(
    named_tensors: Iterable[tuple[str, Tensor]],
    source: str | Path,
    out: str | Path,
    dtype: torch.dtype,
    max_file_bytes: int = MAX_FILE_BYTES,
    card: str | None = None,
) -> None:
    """Write a Hugging Face directory with these weights and the source's config and tokenizer.

    Rank 0 writes, one tensor at a time; the others only run the iterator. The directory appears
    under its name when it is whole, in place of one that was there.

    Args:
        named_tensors: as `export_weights` yields them.
        source: the directory the model came from.
        dtype: of the tensors.
        max_file_bytes: size above which a new safetensors file is begun.
        card: README.md, the model card; None: there is none.

    Raises:
        ValueError: no space left, or no right to write there.
    """
    with written_aside(out) as aside:
        if dist.get_rank() == 0:
            shapes = tensor_shapes(load_config(source))
            writer = HFWriter(aside, {n: (s, dtype) for n, s in shapes.items()}, max_file_bytes)
            for name, tensor in progress.track(named_tensors, len(shapes), f"writing {out}"):
                writer.write(name, tensor)
            assert not writer.missing, writer.missing
            writer.write_index()
            copy_side_files(source, aside, [dtype])
            if card is not None:
                (aside / CARD).write_text(card, encoding="utf-8")
        else:
            for _ in named_tensors:
                pass
