"""Weights between Hugging Face safetensors and the shards of a Megatron trunk, both ways."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from megatron_taopd.models import hf_map
from megatron_taopd.models.gpt import Trunk, load_config
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.layout import Layout


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

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """[len(ids), D] these rows of a matrix, zeros for an id of −1; nothing else is read.

        Args:
            ids: [n] int64. Rows that lie together in the file are read at once, in whatever order
                they are asked for.
        """
        if name not in self.files:
            raise ValueError(f"{self.dir}: tensor {name} is missing")
        ids, places = ids.sort()
        wanted = ids >= 0
        ids, places = ids[wanted], places[wanted]
        with self._open(self.files[name]) as file:
            matrix = file.get_slice(name)
            rows = matrix[:0]
            rows = rows.new_zeros(len(wanted), rows.shape[1])
            breaks = (ids.diff() != 1).nonzero()[:, 0] + 1
            for run, at in zip(ids.tensor_split(breaks), places.tensor_split(breaks), strict=True):
                if len(run):
                    rows[at] = matrix[int(run[0]) : int(run[-1]) + 1]
        return rows

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


def load_head(hf_dir: str | Path, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[len(ids), D] rows of a checkpoint's output projection, on this rank's device.

    Args:
        ids: [V] int64, the row for each column; zeros for −1, a column that takes part in nothing.
    """
    hf = load_config(hf_dir)
    name = "model.embed_tokens.weight" if hf.tie_word_embeddings else "lm_head.weight"
    return Checkpoint(hf_dir).rows(name, ids).to(platform.device(), dtype)


def export_weights(
    model: Trunk, read: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's tensors under their Hugging Face names, whole, on **every** rank.

    Every rank has to run the iterator to its end.

    Args:
        read: picks what is exported of a parameter, of its shape and dtype: its value, or say its
            gradient.

    Collectives, per parameter: an all-gather over the owners' TP group and a broadcast over the
    pipeline group, of the parameter's bytes each.
    """
    layout = model.layout
    own = {_global_name(model, name): read(p) for name, p in model.named_parameters()}
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


# Everything of a checkpoint directory that is not weights.
_KEPT_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*")


def save_hf(
    named_tensors: Iterable[tuple[str, Tensor]],
    source: str | Path,
    out: str | Path,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Write a Hugging Face directory with these weights and the source's config and tokenizer.

    Rank 0 writes, one file's worth of tensors at a time; the others only run the iterator. The
    directory appears under its name when it is whole, in place of one that was there.

    Args:
        named_tensors: as `export_weights` yields them.
        source: the directory the model came from.
        max_file_bytes: size above which a new safetensors file is begun.
    """
    source, out = Path(source), Path(out)
    aside = out.with_name(out.name + ".incomplete")
    writes = dist.get_rank() == 0
    if writes:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    files: list[dict[str, int]] = []  # tensor name -> bytes, by file
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(pending, aside / f"part-{len(files)}", metadata={"format": "pt"})
        files.append({name: t.nbytes for name, t in pending.items()})
        pending.clear()

    for name, tensor in named_tensors:
        if not writes:
            continue
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > max_file_bytes:
            flush()
        pending[name] = tensor.cpu()
    if writes:
        flush()
        _name_files(aside, files)
        for pattern in _KEPT_FILES:
            for path in source.glob(pattern):
                if path.name != "model.safetensors.index.json":
                    shutil.copy(path, aside / path.name)
        shutil.rmtree(out, ignore_errors=True)
        aside.rename(out)
    dist.barrier()


def _name_files(directory: Path, files: list[dict[str, int]]) -> None:
    if len(files) == 1:
        (directory / "part-0").rename(directory / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (directory / f"part-{i}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_size": sum(size for names in files for size in names.values())},
        "weight_map": weight_map,
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
