"""Checkpoints between Hugging Face directories and Megatron's distributed format.

One parameter is in memory at a time, and several ranks share the work: each parameter is read by
one of them. What is written does not depend on how many there were, nor on a layout.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from megatron_taopd.formats import hf_map
from megatron_taopd.formats.files import check_space, written_aside
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
from megatron_taopd.formats.hf_map import Parameter
from megatron_taopd.formats.megatron import (
    EXTRA_STATE,
    SIDE_FILES,
    MegatronCheckpoint,
    MegatronWriter,
    find_keys,
)

Advance = Callable[[int, int], None]  # bytes done since the last call, bytes to do on this rank


def ignore(_done: int, _total: int) -> None:
    """Take the progress of a conversion that nobody looks at."""


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote, over all ranks."""

    out: str
    model: str
    tensors: int
    bytes: int
    files: int


# ----------------------------------------------------------------------------------------- HF → M


def to_megatron(
    hf_dir: str | Path,
    out: str | Path,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    dtype: torch.dtype | None = None,
    advance: Advance = ignore,
) -> Converted:
    """Write a Hugging Face directory as a Megatron distributed checkpoint that any layout loads.

    Every rank calls this; none is needed.

    Args:
        out: replaced if it exists.
        tp, pp, ep: the layout that it is for: refused if the model does not divide by it. Tensors
            are stored in the pieces that its ranks read; other layouts read parts of pieces.
        dtype: of what is written; None: as it is.
        advance: told the bytes of each parameter that this rank has written, and of all of them.

    Raises:
        ValueError: what is wrong with the model, its files, the layout or the place to write to.

    Collectives: barriers, and a gather of what was written, some 200 bytes a piece.
    """
    check_apart(out, hf_dir)
    hf = read_config(hf_dir)
    hf_map.check_layout(hf, hf_dir, tp, pp, ep)
    checkpoint = HFCheckpoint(hf_dir)
    stored = checkpoint.check(hf)
    parameters = hf_map.parameters(hf)
    dtypes = _dtypes_by_key(hf_dir, parameters.values(), stored, dtype)
    shapes = whole_shapes(hf, parameters)
    sizes = [prod(shapes[name]) * dtypes[p.key].itemsize for name, p in parameters.items()]
    check_space(out, sum(sizes))
    rank, world_size = rank_and_size()
    with written_aside(out) as aside:
        if rank == 0:
            (aside / SIDE_FILES).mkdir()
            copy_side_files(hf_dir, aside / SIDE_FILES, dtypes.values())
        writer = MegatronWriter(aside, rank)
        mine, to_do = share(list(parameters.values()), sizes, rank, world_size)
        for parameter in mine:
            mapping, to = parameter.mapping, dtypes[parameter.key]
            whole = mapping.merge([checkpoint[name] for name in mapping.names], hf).to(to)
            dim, chunks = mapping.cuts(tp)
            writer.write(parameter.key, whole, parameter.index, parameter.shape, dim, chunks)
            advance(whole.nbytes, to_do)
        if rank == 0:
            for key in _extra_states(parameters.values()):
                writer.write_object(key, None)
        writer.finish(
            {
                "checkpoint_version": 3.0,
                "iteration": 0,
                "content_metadata": {
                    "singleton_local_shards": False,
                    "non_homogeneous_layers": False,
                },
            }
        )
    return Converted(str(out), _name(hf), len(stored), sum(sizes), world_size)


def _dtypes_by_key(
    hf_dir, parameters: Iterable[Parameter], stored: dict, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Return the dtype of each tensor of the checkpoint, which all its layers have to share."""
    dtypes: dict[str, tuple[torch.dtype, str]] = {}
    for parameter in parameters:
        for name in parameter.mapping.names:
            first, first_name = dtypes.setdefault(parameter.key, (dtype or stored[name], name))
            if dtype is None and stored[name] != first:
                raise ValueError(
                    f"{hf_dir}: {name} is {stored[name]} and {first_name} {first}, which become "
                    "one tensor; choose a dtype for all"
                )
    return {key: dtype for key, (dtype, _) in dtypes.items()}


def _extra_states(parameters: Iterable[Parameter]) -> list[str]:
    """Name the states that Megatron asks for next to weights.

    All of TransformerEngine's modules have one, norms among them, in older versions its attention,
    too; of Megatron's own modules the linear layers have. Without FP8 it is empty.
    """
    found: dict[str, None] = {}
    for parameter in parameters:
        module = parameter.key.rsplit(".", 1)[0]
        if not module.startswith("decoder.") or module.endswith(".router"):
            continue
        index, shape = parameter.index or (0,), parameter.shape or (1,)
        shard = "_".join(".".join(map(str, numbers)) for numbers in (index, shape))
        found[f"{module}.{EXTRA_STATE}/shard_{shard}"] = None
        if module.endswith("self_attention.linear_proj"):
            attention = module.replace("linear_proj", "core_attention")
            found[f"{attention}.{EXTRA_STATE}/shard_{shard}"] = None
    return list(found)


# ----------------------------------------------------------------------------------------- M → HF


def to_hf(
    megatron_dir: str | Path,
    out: str | Path,
    hf_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    advance: Advance = ignore,
) -> Converted:
    """Write the model of a Megatron distributed checkpoint as a Hugging Face directory.

    Every rank calls this; none is needed. Whatever layout saved the checkpoint, and whatever else
    is in it (the optimizer's state, say), the model's tensors alone are read. The model card that a
    run has put into its checkpoint becomes the directory's.

    Args:
        out: replaced if it exists.
        hf_dir: config, tokenizer and chat template are taken from here; None: from the checkpoint.
        dtype: of what is written; None: as it is.
        max_file_bytes: above it a new safetensors file is begun.
        advance: told the bytes of each tensor that this rank has written, and of all of them.

    Raises:
        ValueError: what is wrong with the checkpoint or the place to write to.

    Collectives: barriers.
    """
    checkpoint = MegatronCheckpoint(megatron_dir)
    side = side_directory(megatron_dir, hf_dir)
    check_apart(out, megatron_dir, side)
    hf = read_config(side)
    parameters = hf_map.parameters(hf)
    keys = find_keys(checkpoint, hf, parameters)
    shapes = tensor_shapes(hf)
    dtypes = {
        name: dtype or checkpoint.dtype(keys[parameter.name][0])
        for parameter in parameters.values()
        for name in parameter.mapping.names
    }
    rank, world_size = rank_and_size()
    with written_aside(out) as aside:
        plan = {name: (shape, dtypes[name]) for name, shape in _in_order(shapes, parameters)}
        writer = HFWriter(aside, plan, max_file_bytes)
        check_space(out, writer.total_bytes)
        mine = {n for file in sorted(writer.files)[rank::world_size] for n in writer.files[file]}
        sizes = {name: prod(shapes[name]) * dtypes[name].itemsize for name in mine}
        to_do = sum(sizes.values())
        for parameter in parameters.values():
            if mine.isdisjoint(parameter.mapping.names):
                continue
            whole = checkpoint.read(*keys[parameter.name])
            split = parameter.mapping.split(whole, hf)
            for name, tensor in zip(parameter.mapping.names, split, strict=True):
                if name in mine:
                    writer.write(name, tensor.to(dtypes[name]))
                    advance(sizes[name], to_do)
        assert not writer.missing, writer.missing
        if rank == 0:
            writer.write_index()
            copy_side_files(side, aside, dtypes.values())
            if (card := Path(megatron_dir) / SIDE_FILES / CARD).is_file():
                shutil.copyfile(card, aside / CARD)
    return Converted(str(out), _name(hf), len(shapes), writer.total_bytes, len(writer.files))


def side_directory(megatron_dir: str | Path, hf_dir: str | Path | None) -> Path:
    """Return where a Megatron checkpoint's config and tokenizer are: hf_dir, or next to it.

    Raises:
        ValueError: neither.
    """
    side = Path(megatron_dir) / SIDE_FILES if hf_dir is None else Path(hf_dir)
    if hf_dir is None and not (side / "config.json").is_file():
        raise ValueError(
            f"{megatron_dir}: keeps no {SIDE_FILES}/config.json; name a Hugging Face directory "
            "that has the model's config and tokenizer (--hf)"
        )
    return side


def check_apart(out: str | Path, *sources: str | Path) -> None:
    """Raise ValueError if what is replaced and what is read lie in one another."""
    place = Path(out).resolve()
    for source in sources:
        read = Path(source).resolve()
        if place == read or place in read.parents or read in place.parents:
            raise ValueError(f"{out}: is, holds or lies in {source}, which is read; give another")


def _in_order(shapes: dict, parameters: dict[str, Parameter]) -> Iterator[tuple[str, tuple]]:
    """Return HF names front to back, so that a parameter's tensors mostly share a file."""
    for parameter in parameters.values():
        for name in parameter.mapping.names:
            yield name, shapes[name]


# ----------------------------------------------------------------------------------------- shared


def read_config(hf_dir: str | Path) -> PretrainedConfig:
    """Read the config of a Hugging Face directory that can be converted.

    Raises:
        ValueError: what `load_config` refuses, or an architecture that `hf_map` has no table for.
    """
    hf = load_config(hf_dir)
    try:
        hf_map.check_architecture(hf)
    except ValueError as error:
        raise ValueError(f"{hf_dir}: {error}") from None
    return hf


def _name(hf: PretrainedConfig) -> str:
    return (hf.architectures or [hf.model_type])[0]


def share(
    parameters: list[Parameter], sizes: list[int], rank: int, world_size: int
) -> tuple[list[Parameter], int]:
    """Return this rank's parameters and their bytes: neighbours, about as many as on any rank."""
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    middles = [(start + end) / 2 for start, end in pairwise(ends)]
    mine = [i for i, middle in enumerate(middles) if int(middle * world_size / ends[-1]) == rank]
    return [parameters[i] for i in mine], sum(sizes[i] for i in mine)


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the world size; (0, 1) without a process group."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
