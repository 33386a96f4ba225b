"""Hugging Face checkpoint directories: tensors read one by one, and written one by one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from megatron_taopd.formats.directory import INDEX, SINGLE, check_fetched, weight_map
from megatron_taopd.formats.hf_map import Parameter

# Above it a new safetensors file is begun, as transformers 4 does.
MAX_FILE_BYTES = 5 * 10**9
# The model card. A student has one of its own, so the card of the model that it was is left behind.
CARD = "README.md"
# Bytes of a block of a fingerprint, and how many there are at most.
_BLOCK, _BLOCKS = 4096, 2048
# Everything of a directory that is neither weights nor card. The Python files are those that
# `auto_map` names, and what they import.
_SIDE_FILES = (
    *("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"),
    *("*.py", "LICENSE*"),
)
# The names that safetensors' headers have for what a weight may be.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The names that users choose from.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_config(hf_dir: str | Path) -> PretrainedConfig:
    """The directory's config.json; RoPE parameters as transformers 4 and 5 write them both do.

    Raises:
        ValueError: there is no config.json, or transformers cannot read it.
    """
    path = Path(hf_dir) / "config.json"
    if not path.is_file():
        raise ValueError(f"{hf_dir}: no config.json; give a Hugging Face checkpoint directory")
    check_fetched(path)
    try:
        return AutoConfig.from_pretrained(hf_dir, local_files_only=True)
    except Exception as error:  # whatever transformers trips over in the user's file
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: transformers cannot read it: {reason}") from error


def tensor_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model has, as transformers says.

    The output of a tied model is left out.

    Raises:
        ValueError: transformers makes no model of this config.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever it trips over in a user's config
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"config.json: transformers makes no model of it: {reason}") from error
    tensors = revert_weight_conversion(model, model.state_dict())
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def whole_shapes(
    config: PretrainedConfig, parameters: Mapping[str, Parameter]
) -> dict[str, tuple[int, ...]]:
    """The shape that this config gives every whole Megatron parameter, by name."""
    shapes = tensor_shapes(config)
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {
        name: tuple(
            parameter.mapping.merge([meta[n] for n in parameter.mapping.names], config).shape
        )
        for name, parameter in parameters.items()
    }


def load_model(hf_dir: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a directory with transformers, on the CPU, if every reader takes the same weights of it.

    Raises:
        ValueError: what `weight_map` refuses.
    """
    weight_map(hf_dir)
    return AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype, local_files_only=True)


class HFCheckpoint:
    """The tensors of a Hugging Face directory, each read from safetensors when asked for.

    Raises:
        ValueError: what `weight_map` refuses, or a damaged file.
    """

    def __init__(self, hf_dir: str | Path):
        self.dir = Path(hf_dir)
        files = weight_map(hf_dir)
        if files is None:
            with self._open(SINGLE) as file:
                files = dict.fromkeys(file.keys(), SINGLE)
        self.files = files

    @contextmanager
    def _open(self, file: str):
        try:
            with safe_open(self.dir / file, framework="pt") as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self.dir / file}: damaged safetensors file ({reason}); fetch it again"
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        with self._holding(name) as file:
            return file.get_tensor(name)

    @contextmanager
    def _holding(self, name: str):
        if name not in self.files:
            raise ValueError(f"{self.dir}: tensor {name} is missing")
        with self._open(self.files[name]) as file:
            yield file

    def header(self, name: str) -> tuple[tuple[int, ...], torch.dtype | None]:
        """Shape and dtype of a tensor, None for a dtype that no weight has unquantised."""
        with self._holding(name) as file:
            tensor = file.get_slice(name)
            return tuple(tensor.get_shape()), _DTYPES.get(tensor.get_dtype())

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """[len(ids), D] these rows of a matrix, zeros for an id of −1; nothing else is read.

        Args:
            ids: [n] int64. Rows that lie together in the file are read at once, in whatever order
                they are asked for.
        """
        ids, places = ids.sort()
        wanted = ids >= 0
        ids, places = ids[wanted], places[wanted]
        with self._holding(name) as file:
            matrix = file.get_slice(name)
            rows = matrix[:0]
            rows = rows.new_zeros(len(wanted), rows.shape[1])
            breaks = (ids.diff() != 1).nonzero()[:, 0] + 1
            for run, at in zip(ids.tensor_split(breaks), places.tensor_split(breaks), strict=True):
                if len(run):
                    rows[at] = matrix[int(run[0]) : int(run[-1]) + 1]
        return rows

    def check(self, config: PretrainedConfig) -> dict[str, torch.dtype]:
        """The dtype of every tensor, once names and shapes are exactly those of the config.

        Every file's header is read, no tensor but a tied model's second copy of its embedding.

        Raises:
            ValueError: a damaged file; a tensor that is missing, unexpected, of another shape than
                config.json gives it, or not of floating-point numbers.
        """
        shapes = tensor_shapes(config)
        if (self.dir / "hf_quant_config.json").is_file():
            raise ValueError(
                f"{self.dir}: hf_quant_config.json, by which SGLang reads quantised weights; "
                "give the original, or move it elsewhere"
            )
        if missing := sorted(shapes.keys() - self.files.keys()):
            first = f"{missing[0]} {list(shapes[missing[0]])}"
            raise ValueError(
                f"{self.dir}: {len(missing)} tensors are missing, first {first}; fetch the rest, "
                "or the config.json of these weights"
            )
        extra = self.files.keys() - shapes.keys()
        if config.tie_word_embeddings and "lm_head.weight" in extra:
            # Some checkpoints of tied models repeat the embedding.
            self._check_tied()
            extra -= {"lm_head.weight"}
        if strangers := sorted(name for name in extra if "rotary_emb" not in name):
            raise ValueError(
                f"{self.dir}: {len(strangers)} tensors do not belong to {config.model_type}, "
                f"first {strangers[0]} of {self.files[strangers[0]]}; give the config.json of "
                "these weights"
            )
        dtypes = {}
        for file, names in _grouped(self.files).items():
            with self._open(file) as opened:
                if (kind := (opened.metadata() or {"format": "pt"}).get("format")) != "pt":
                    raise ValueError(f"{self.dir / file}: format {kind!r} in its header, not 'pt'")
                if strays := sorted(set(opened.keys()) ^ set(names)):
                    where = "only in the index" if strays[0] in names else "not in the index"
                    raise ValueError(f"{self.dir / file}: tensor {strays[0]} is {where}")
                for name in names:
                    if name not in shapes:
                        continue
                    tensor = opened.get_slice(name)
                    if (shape := tuple(tensor.get_shape())) != shapes[name]:
                        raise ValueError(
                            f"{self.dir / file}: {name} is {list(shape)} where config.json asks "
                            f"for {list(shapes[name])}; they are of different models"
                        )
                    if (dtype := tensor.get_dtype()) not in _DTYPES:
                        raise ValueError(
                            f"{self.dir / file}: {name} is {dtype}; one of "
                            f"{', '.join(_DTYPES)} is needed"
                        )
                    dtypes[name] = _DTYPES[dtype]
        return {name: dtypes[name] for name in shapes}

    def fingerprint(self) -> str:
        """A SHA-256 of every file's header, with names, dtypes and shapes of its tensors, and of
        evenly spaced blocks of all files: some 8 MiB of them, and all of a checkpoint that is less.

        Training changes nearly every weight, and so nearly every block; an edit of a few may not be
        seen.
        """
        digest, files = hashlib.sha256(), sorted(set(self.files.values()))
        for name in files:
            with open(self.dir / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                header = int.from_bytes(file.read(8), "little")
                digest.update(f"{name} {size}\n".encode() + file.read(min(header, size)))
                for start in range(0, size, max(_BLOCK, size * len(files) // _BLOCKS)):
                    file.seek(start)
                    digest.update(file.read(_BLOCK))
        return digest.hexdigest()

    def _check_tied(self) -> None:
        if not torch.equal(self["lm_head.weight"], self["model.embed_tokens.weight"]):
            raise ValueError(
                f"{self.dir}: config.json says tie_word_embeddings, but lm_head.weight differs "
                "from model.embed_tokens.weight; which of the two is right?"
            )


def _grouped(files: Mapping[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, file in files.items():
        grouped.setdefault(file, []).append(name)
    return grouped


class HFWriter:
    """Safetensors files of known names and shapes, filled in any order, a tensor at a time.

    The tensors are dealt out to files as transformers does it, and an index is written if there is
    more than one. A file may be filled by one process only; `files` says what is in each.

    Args:
        directory: exists; the files are made in it.
        tensors: shape and dtype by name, in the order in which they are to be stored.
        max_file_bytes: above it a new file is begun; a tensor that is larger has one to itself.
    """

    def __init__(
        self,
        directory: str | Path,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        max_file_bytes: int,
    ):
        self.dir = Path(directory)
        self.tensors = dict(tensors)
        meta = {n: torch.empty(s, dtype=d, device="meta") for n, (s, d) in tensors.items()}
        self.plan = split_torch_state_dict_into_shards(
            meta, filename_pattern="model{suffix}.safetensors", max_shard_size=max_file_bytes
        )
        self.files: dict[str, list[str]] = self.plan.filename_to_tensors
        self.file_of = {name: file for file, names in self.files.items() for name in names}
        self.places: dict[str, int] = {}  # where each tensor of a file that was begun starts
        self.missing: set[str] = set()  # tensors of such files that have not been written

    @property
    def total_bytes(self) -> int:
        return self.plan.metadata["total_size"]

    def write_index(self) -> None:
        """The index, where there is more than one file; by one process."""
        if self.plan.is_sharded:
            index = {"metadata": self.plan.metadata, "weight_map": self.file_of}
            (self.dir / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place; the first one of a file makes the file."""
        shape, dtype = self.tensors[name]
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype), name
        file = self.file_of[name]
        if name not in self.places:
            self.write_header(file)
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        with (self.dir / file).open("r+b", buffering=0) as stream:
            stream.seek(self.places[name])
            written = data.data  # a memoryview
            while written:  # a raw write may take a part only
                written = written[stream.write(written) :]
        self.missing.discard(name)

    def write_header(self, file: str) -> None:
        """Make a file of its full length, without the tensors' data: the system stores no zeros."""
        header: dict = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in self.files[file]:
            shape, dtype = self.tensors[name]
            start, end = end, end + prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8
        with (self.dir / file).open("wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little"))
            stream.write(encoded)
            stream.truncate(8 + len(encoded) + end)
        for name in self.files[file]:
            self.places[name] = 8 + len(encoded) + header[name]["data_offsets"][0]
        self.missing.update(self.files[file])


def side_files(directory: str | Path) -> Iterator[Path]:
    """Config, generation config, tokenizer, chat template, code, licence: not weights and card."""
    for pattern in _SIDE_FILES:
        for path in sorted(Path(directory).glob(pattern)):
            if path.is_file() and not path.name.endswith(".index.json"):
                yield path


def copy_side_files(
    source: str | Path, out: str | Path, dtypes: Iterable[torch.dtype] = ()
) -> None:
    """Copy what is not weights; config.json names the weights' dtype, if they have one alone."""
    out = Path(out)
    for path in side_files(source):
        shutil.copyfile(path, out / path.name)
    if len(dtypes := set(dtypes)) == 1:
        path = out / "config.json"
        config = json.loads(path.read_text())
        name = str(dtypes.pop()).removeprefix("torch.")
        keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]
        if any(config.get(key) != name for key in keys):
            config |= dict.fromkeys(keys, name)
            path.write_text(json.dumps(config, indent=2) + "\n")
