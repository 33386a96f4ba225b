"""What a distributed checkpoint pickles, read without executing any of it.

`.metadata`, `common.pt` and every object next to the tensors are pickles, and a pickle can call
anything. Of `.metadata` only the classes that describe tensors are made; everything else goes
through torch's own restricted unpickler.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from pathlib import Path
from typing import IO, BinaryIO, cast

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_taopd.parallel.compat.torch_internals import StorageInfo

METADATA, CONFIG, COMMON = ".metadata", "metadata.json", "common.pt"  # files of a checkpoint
BACKEND = {  # what CONFIG says
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Where a chunk starts in its tensor, its shape, and where it lies.
Place = tuple[torch.Size, torch.Size, StorageInfo]


def check_pickles(directory: str | Path, part: int = 0, parts: int = 1) -> None:
    """Look into everything that Megatron's loader unpickles, without executing any of it.

    Args:
        part, parts: look into one of so many equal shares of the objects next to the metadata.

    Raises:
        ValueError: one line: something is no tensor, plain container or description of a tensor, or
            cannot be read.
    """
    directory = Path(directory)
    path = directory / CONFIG
    try:
        stated = json.loads(path.read_text())
        # Megatron-core 0.19 names no common backend.
        if "sharded_backend" not in stated or BACKEND | stated != BACKEND:
            raise ValueError("it names another format than torch_dist")
        path = directory / METADATA
        with path.open("rb") as stream:
            metadata = StrictUnpickler(stream).load()
        tensors = describe(metadata)[0]
        objects = [i for w, i in metadata.storage_data.items() if w.fqn not in tensors]
        objects = [(info.relative_path, info.offset, info.length) for info in objects]
        if (directory / COMMON).exists():  # Megatron-core 0.19 has it among the objects
            objects.append((COMMON, 0, (directory / COMMON).stat().st_size))
        for name, offset, length in objects[part::parts]:
            path = directory / name
            with path.open("rb") as stream:
                torch.load(section(stream, offset, length), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file trips over
        raise ValueError(f"{path}: {_told(error)}") from error


def _told(error: Exception) -> str:
    """Return the first sentence that says something; torch adds advice to disable the check."""
    text = " ".join(str(error).split()) or type(error).__name__
    if asked := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it asks for {asked[1].rstrip('.')}, which is no tensor or plain value"
    if text.startswith("Weights only load failed"):
        return "it is damaged, or holds more than tensors and plain values"
    return text


def describe(metadata: Metadata) -> tuple[dict[str, TensorStorageMetadata], dict]:
    """Return every tensor, and the places of its chunks, by key.

    Raises:
        Exception: whatever a damaged file trips over.
    """
    described = metadata.state_dict_metadata
    tensors = {k: v for k, v in described.items() if isinstance(v, TensorStorageMetadata)}
    for key, tensor in tensors.items():
        if not isinstance(tensor.properties.dtype, torch.dtype):
            raise ValueError(f"{key} has no dtype")
    sizes = {(k, c.offsets): c.sizes for k, tensor in tensors.items() for c in tensor.chunks}
    places: dict[str, list[Place]] = {key: [] for key in tensors}
    ends: dict[str, int] = {}
    for where, info in sorted(metadata.storage_data.items(), key=lambda item: item[1].offset):
        if Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"{where.fqn} lies outside, {info.relative_path}")
        if info.offset < ends.get(info.relative_path, 0):
            raise ValueError(f"{where.fqn} lies where another tensor does")
        ends[info.relative_path] = info.offset + info.length
        if where.fqn in tensors:
            size = sizes[where.fqn, where.offset]
            if not len(size) == len(where.offset) == len(tensors[where.fqn].size):
                raise ValueError(f"{where.fqn} has a chunk of another number of dimensions")
            places[where.fqn].append((where.offset, size, info))
    return tensors, places


def section(stream: BinaryIO, start: int, length: int) -> IO[bytes]:
    """Return the bytes [start, start + length) of a file as a file."""
    return cast(IO[bytes], _Section(stream, start, length))  # all of it that is read with


class _Section(io.RawIOBase):
    def __init__(self, stream: BinaryIO, start: int, length: int):
        self.stream, self.start, self.length, self.position = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = base + offset
        return self.position

    def readinto(self, buffer) -> int:
        self.stream.seek(self.start + self.position)
        wanted = memoryview(buffer)[: max(0, self.length - self.position)]
        read = self.stream.readinto(wanted)  # type: ignore[attr-defined]  # open() has it
        self.position += read
        return read


# By module, what a pickle may name. tests/test_compat.py has that each of them is still there.
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"dict", "list", "set", "tuple"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}


class MetadataUnpickler(pickle.Unpickler):
    """Makes the classes that describe tensors, and nothing else."""

    def find_class(self, module: str, name: str):
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if module.startswith("megatron.core.dist_checkpointing.strategies."):
            return _Ignored  # what Megatron keeps next to the plans to save again faster
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which describes no tensor")


class StrictUnpickler(MetadataUnpickler):
    """Ignores nothing: for what another unpickler will read, too."""

    def find_class(self, module: str, name: str):
        if module.startswith("megatron."):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which describes no tensor")
        return super().find_class(module, name)


class _Ignored:
    """Takes whatever state it is given, and has none."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state) -> None:
        pass
