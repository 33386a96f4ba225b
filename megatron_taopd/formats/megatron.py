"""Megatron's distributed checkpoint format ("torch_dist"), a tensor at a time.

A directory has files of tensors in torch's own serialisation, one after the other, and a pickled
`.metadata` that says which region of which tensor lies where. Megatron writes and reads it from
models; its writer holds all of a rank's tensors at once. Here single parameters are written and
read, whatever layout wrote the file or will read it.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from transformers import PretrainedConfig

from megatron_taopd.formats.files import os_errors_of_torch
from megatron_taopd.formats.hf import DTYPE_NAMES, whole_shapes
from megatron_taopd.formats.hf_map import Parameter, Vocabulary
from megatron_taopd.formats.unpickle import (
    BACKEND,
    COMMON,
    CONFIG,
    METADATA,
    MetadataUnpickler,
    describe,
    section,
)
from megatron_taopd.parallel.compat.torch_internals import StorageInfo

# Where a checkpoint keeps config, tokenizer and chat template of the model it came from.
SIDE_FILES = "hf"
EXTRA_STATE = "_extra_state"  # ends the key of what a module keeps next to its parameters

Key = tuple[str, tuple[int, ...] | None]  # of a tensor and the corner of a region, or of an object


class MegatronWriter:
    """Writes this process's share of a distributed checkpoint; `finish` makes it one.

    Args:
        directory: exists; the same for all ranks.
        rank: names the file.
    """

    def __init__(self, directory: str | Path, rank: int = 0):
        self.dir = Path(directory)
        self.file = f"__{rank}_0.distcp"
        self.stream = (self.dir / self.file).open("wb")
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self.stored: dict[Key, tuple[str, int, int]] = {}  # file, first byte, number of bytes

    def write(
        self,
        key: str,
        tensor: Tensor,
        index: Sequence[int] = (),
        shape: Sequence[int] = (),
        dim: int = 0,
        chunks: int = 1,
    ) -> None:
        """Append a part of the tensor `key`: the one at `index` of its leading dimensions.

        Args:
            tensor: of any shape; `key` has the shape (*shape, *tensor.shape).
            index: where the part lies in the leading dimensions.
            shape: of these dimensions.
            dim, chunks: the tensor is cut into so many equal chunks along this dimension, each of
                which can be read without the others.
        """
        size = torch.Size((*shape, *tensor.shape))
        properties = TensorProperties(dtype=tensor.dtype)
        known = self.tensors.setdefault(key, TensorStorageMetadata(properties, size, []))
        assert (known.properties.dtype, known.size) == (tensor.dtype, size), key
        corner = [0] * tensor.dim()
        for chunk in tensor.chunk(chunks, dim):
            offsets = torch.Size((*index, *corner))
            sizes = torch.Size((*[1] * len(index), *chunk.shape))
            known.chunks.append(ChunkStorageMetadata(offsets, sizes))
            # torch.save stores the whole storage of a view.
            alone = chunk.numel() == tensor.untyped_storage().nbytes() // tensor.itemsize
            self._append((key, tuple(offsets)), (chunk if alone else chunk.clone()).view(sizes))
            corner[dim] += chunk.shape[dim]

    def write_object(self, key: str, value) -> None:
        self._append((key, None), [value])

    def _append(self, key: Key, value) -> None:
        start = self.stream.tell()
        with os_errors_of_torch():
            torch.save(value, self.stream)
        self.stored[key] = (self.file, start, self.stream.tell() - start)

    def finish(self, common: dict) -> None:
        """Write what makes the files a checkpoint. Every rank calls this.

        Args:
            common: the state that is no tensor, read by Megatron together with the tensors.

        Collectives: a gather of the list of what each rank wrote, some 200 bytes a chunk.
        """
        self.stream.close()
        written = (self.tensors, self.stored)
        if dist.is_initialized() and dist.get_world_size() > 1:
            everything: list[Any] = [None] * dist.get_world_size()
            dist.gather_object(written, everything if dist.get_rank() == 0 else None)
            if dist.get_rank() != 0:
                return
        else:
            everything = [written]
        tensors: dict = {}
        storage = {}
        for described, stored in everything:
            for key, tensor in described.items():
                tensors.setdefault(key, TensorStorageMetadata(tensor.properties, tensor.size, []))
                tensors[key].chunks.extend(tensor.chunks)
            for (key, offsets), place in stored.items():
                corner = None if offsets is None else torch.Size(offsets)
                storage[MetadataIndex(key, corner)] = StorageInfo(*place)
                if offsets is None:
                    tensors[key] = BytesStorageMetadata()
        torch.save(common, self.dir / COMMON)
        metadata = Metadata(state_dict_metadata=tensors, planner_data={}, storage_data=storage)
        (self.dir / METADATA).write_bytes(pickle.dumps(metadata))
        (self.dir / CONFIG).write_text(json.dumps(BACKEND) + "\n")


class MegatronCheckpoint:
    """The tensors of a distributed checkpoint, each read when asked for.

    Nothing that the files say is executed: of the pickled metadata only the classes that describe
    tensors are made, and tensors are read as such.

    Raises:
        ValueError: no such checkpoint, another format, or damaged metadata.
    """

    def __init__(self, directory: str | Path):
        self.dir = Path(directory)
        path = self.dir / CONFIG
        if not path.is_file():
            raise ValueError(f"{directory}: no {CONFIG}; {self._suggestion()}")
        try:
            backend = json.loads(path.read_text())["sharded_backend"]
            with (self.dir / METADATA).open("rb") as stream:
                metadata = MetadataUnpickler(stream).load()
            self.tensors, self.places = describe(metadata)
        except FileNotFoundError as error:
            raise ValueError(f"{directory}: no {METADATA}; the checkpoint is incomplete") from error
        except Exception as error:  # whatever a damaged file trips over
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{directory}: damaged metadata ({reason})") from error
        if backend != BACKEND["sharded_backend"]:
            raise ValueError(f"{directory}: format {backend!r}; only 'torch_dist' can be read")

    def _suggestion(self) -> str:
        inside = sorted(path.parent.name for path in self.dir.glob(f"*/{CONFIG}"))
        if inside:
            return f"give one of the checkpoints in it, {', '.join(inside[-3:])}"
        return "give the directory of one Megatron distributed checkpoint"

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].properties.dtype

    def read(self, key: str, index: Sequence[int] = ()) -> Tensor:
        """Read the part of a tensor at `index` of its leading dimensions, from its chunks.

        Each chunk's checksum is compared.

        Raises:
            ValueError: a file is missing or damaged, or its chunks do not cover the part.
        """
        shape, lead = self.shape(key)[len(index) :], len(index)
        pieces = []
        for offsets, sizes, info in self.places[key]:
            inside = zip(index, offsets[:lead], sizes[:lead], strict=True)
            if all(start <= i < start + size for i, start, size in inside):
                pieces.append((offsets, sizes, info))
        corners = [(offsets[lead:], sizes[lead:]) for offsets, sizes, _ in pieces]
        if not _tile(shape, corners):
            raise ValueError(f"{self.dir}: the chunks of {key} do not make up its {list(shape)}")
        if len(pieces) != 1:
            whole = torch.empty(shape, dtype=self.dtype(key))
        for offsets, sizes, info in pieces:
            within = tuple(i - start for i, start in zip(index, offsets, strict=False))
            piece = self._load(key, sizes, info)[within]
            if len(pieces) == 1:
                return piece
            ranges = zip(offsets[lead:], sizes[lead:], strict=True)
            whole[tuple(slice(start, start + size) for start, size in ranges)] = piece
        return whole

    def _load(self, key: str, sizes: Sequence[int], info: StorageInfo) -> Tensor:
        path = self.dir / info.relative_path
        try:
            with path.open("rb") as stream:
                view = section(stream, info.offset, info.length)
                tensor = torch.load(view, map_location="cpu", weights_only=True)
                _check_sums(view, tensor)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: missing; {key} lies there") from error
        except Exception as error:  # torch.load raises a dozen kinds on damaged files
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path}: damaged at {key} ({reason})") from error
        dtype = self.dtype(key)
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.shape != sizes:
            raise ValueError(f"{path}: holds no {list(sizes)} of {dtype} for {key}")
        return tensor


def find_keys(
    checkpoint: MegatronCheckpoint, hf: PretrainedConfig, parameters: Mapping[str, Parameter]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Find (key, index) of every parameter in a checkpoint that stacks the layers or does not.

    Raises:
        ValueError: a tensor is missing, unexpected, or of a shape or dtype that the config does not
            give it.
    """
    shapes = whole_shapes(hf, parameters)
    found = {}
    for name, parameter in parameters.items():
        key, index, lead = parameter.key, parameter.index, parameter.shape
        if key not in checkpoint and parameter.key_in_layer in checkpoint:
            key, index, lead = parameter.key_in_layer, index[1:], lead[1:]
        if key not in checkpoint:
            if prefixed := [k for k in checkpoint.tensors if k.endswith(f".{key}")]:
                prefix = prefixed[0].removesuffix(key)
                raise ValueError(
                    f"{checkpoint.dir}: keys begin with {prefix!r} ({prefixed[0]}), as NeMo and "
                    "unwrapped DDP modules save them; save it from Megatron's own model, or export "
                    "it to Hugging Face there (NeMo: llm.export_ckpt) and give that directory"
                )
            raise ValueError(f"{checkpoint.dir}: tensor {key} is missing")
        shape, wanted = checkpoint.shape(key), (*lead, *shapes[name])
        # Others pad the vocabulary to other multiples.
        padded = isinstance(parameter.mapping, Vocabulary) and len(shape) == 2
        if padded and shape[1:] == wanted[1:] and shape[0] >= hf.vocab_size:
            shape = wanted
        if shape != wanted:
            raise ValueError(
                f"{checkpoint.dir}: {key} is {list(shape)} where config.json asks for "
                f"{list(wanted)}"
            )
        if (dtype := checkpoint.dtype(key)) not in DTYPE_NAMES:
            raise ValueError(
                f"{checkpoint.dir}: {key} is {dtype}; one of {', '.join(DTYPE_NAMES.values())} is "
                "needed"
            )
        found[name] = key, index
    known = {key for key, _ in found.values()}
    parts = ("embedding.", "decoder.", "output_layer.")
    if extra := sorted(k for k in checkpoint.tensors.keys() - known if k.startswith(parts)):
        raise ValueError(
            f"{checkpoint.dir}: {len(extra)} tensors do not belong to {hf.model_type}"
            f"{' with tied embeddings' if hf.tie_word_embeddings else ''}, first {extra[0]}"
        )
    return found


def layers_are_apart(keys: Iterable[tuple[str, tuple[int, ...]]], where: str | Path) -> bool:
    """Tell whether a checkpoint has a tensor per layer, from the keys of `find_keys`.

    Raises:
        ValueError: of some tensors only: Megatron loads no such mixture.
    """
    layers = [key for key, _ in keys if key.startswith("decoder.layers.")]
    apart = {re.match(r"decoder\.layers\.\d", key) is not None for key in layers}
    if len(apart) > 1:
        raise ValueError(
            f"{where}: some tensors hold all layers, others one; Megatron loads no mixture"
        )
    return True in apart


def _tile(shape: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Tell whether boxes (corner, size) lie in a tensor, apart from one another, and fill it."""
    ranges = [
        [(start, start + size) for start, size in zip(corner, sizes, strict=True)]
        for corner, sizes in boxes
    ]
    for box in ranges:
        if any(not 0 <= start <= end <= n for (start, end), n in zip(box, shape, strict=True)):
            return False
    for a, b in combinations(ranges, 2):
        if all(x[0] < y[1] and y[0] < x[1] for x, y in zip(a, b, strict=True)):
            return False
    return sum(prod(sizes) for _, sizes in boxes) == prod(shape)


def _check_sums(stream: IO[bytes], tensor: Tensor) -> None:
    """Raise unless what torch.load made of a stream is what torch.save put there; torch does not
    look.
    """
    with zipfile.ZipFile(stream) as archive:
        for record in archive.infolist():
            if "/data/" not in record.filename:
                archive.read(record)  # which compares the sum
                continue
            storage = torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())
            if zlib.crc32(storage.numpy().data) != record.CRC:
                raise ValueError("its checksum is another")
