"""A model's directory, before anything is read of its tensors: which files are its weights.

torch is not imported, so that what is wrong here is known in no time.
"""

from __future__ import annotations

import json
from pathlib import Path

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_POINTER = b"version https://git-lfs"  # begins what Git LFS leaves in the place of a file
_ADAPTER = "adapter_config.json"


def check_fetched(path: Path) -> None:
    """Raise ValueError if a file is not what it is called, but says where Git LFS has that."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{path}: a pointer of Git LFS in the place of the file; git lfs pull, in that "
                "directory, fetches it"
            )


def read_json(path: Path) -> dict:
    """Read a JSON file of one object.

    Raises:
        ValueError: it is not JSON, another value than an object, or a pointer of Git LFS.
    """
    check_fetched(path)
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}; fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object, but {json.dumps(value)[:40]}; fetch it again")
    return value


def check_directory(hf_dir: str | Path, weights: bool = True) -> None:
    """Refuse what is no whole model: config, tokenizer and, if they are asked for, weights.

    Raises:
        ValueError: one line with what is missing or wrong, and what to do.
    """
    directory = Path(hf_dir)
    wanted = "give a Hugging Face checkpoint directory"
    if not directory.is_dir():
        raise ValueError(f"{hf_dir}: no such directory; {wanted}")
    if not (directory / "config.json").is_file():
        if (directory / _ADAPTER).is_file():
            raise ValueError(_adapter_alone(hf_dir))
        raise ValueError(f"{hf_dir} has no config.json; {wanted}")
    read_json(directory / "config.json")
    tokenizers = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not tokenizers:
        raise ValueError(
            f"{hf_dir} has no tokenizer ({', '.join(TOKENIZER_FILES)}); "
            "copy the files of the model's own tokenizer there"
        )
    for path in tokenizers:
        check_fetched(path)
    if not weights:
        return
    if (directory / INDEX).is_file():
        read_json(directory / INDEX)
    weight_map(hf_dir)


def weight_map(hf_dir: str | Path) -> dict[str, str] | None:
    """The file of each tensor by the directory's index, or None: all are in model.safetensors.

    This is transformers' choice: model.safetensors where there is one, else the index's shards;
    neither other indexes, formats and variants nor what lies in folders. SGLang goes by the index,
    and without one takes every safetensors file. A directory that is two models to the two is
    refused, as is one where transformers would apply an adapter and others would not.

    Raises:
        ValueError: one line: no safetensors, a file that the index names is missing or a pointer of
            Git LFS, or readers differ.
    """
    directory = Path(hf_dir)
    index, named = directory / INDEX, None
    if index.is_file():
        named = _read_index(index)
        for file in sorted(set(named.values())):
            if not (directory / file).is_file():
                raise ValueError(f"{index}: names {file}, which is not there; that file is missing")
            check_fetched(directory / file)
    single = directory / SINGLE
    if single.is_file():
        check_fetched(single)
    if (directory / _ADAPTER).is_file():
        if named is None and not single.is_file():
            raise ValueError(_adapter_alone(hf_dir))
        raise ValueError(
            f"{hf_dir}: {_ADAPTER} beside the weights: transformers applies the adapter, "
            "others do not; merge it into the weights, or move it elsewhere"
        )
    if not single.is_file():
        if named is None:
            raise ValueError(_without_safetensors(directory))
        return named
    if named is not None:
        if others := sorted(set(named.values()) - {SINGLE}):
            raise ValueError(
                f"{hf_dir}: {SINGLE}, which transformers reads, beside an index of {others[0]}, "
                "which SGLang reads: two models in one directory; keep one of them"
            )
        return named
    beside = sorted(path.name for path in directory.glob("[!.]*.safetensors"))
    beside.remove(SINGLE)
    if beside and beside != ["consolidated.safetensors"]:  # which SGLang leaves out
        raise ValueError(
            f"{hf_dir}: {beside[0]} beside {SINGLE}: SGLang reads both, transformers the latter; "
            "move it elsewhere"
        )
    return None


def _adapter_alone(hf_dir: str | Path) -> str:
    return (
        f"{hf_dir}: an adapter ({_ADAPTER}) without the model that it changes; merge it first: "
        f"peft.AutoPeftModelForCausalLM.from_pretrained({str(hf_dir)!r}).merge_and_unload()"
        ".save_pretrained(OUT), and copy the tokenizer's files"
    )


def _without_safetensors(directory: Path) -> str:
    """Say that there are no safetensors, and how those of torch's own format become some."""
    missing = f"{directory}: no {SINGLE} and no {INDEX}: {SINGLE} is missing"
    if others := sorted(path.name for path in directory.glob("*.bin")):
        return (
            f"{missing}, there is {others[0]} in torch's own format; convert it: "
            "transformers.AutoModelForCausalLM.from_pretrained("
            f"{str(directory)!r}, dtype='auto').save_pretrained(OUT), and copy the tokenizer's "
            "files"
        )
    return f"{missing}; give a Hugging Face checkpoint directory with safetensors weights"


def _read_index(index: Path) -> dict[str, str]:
    check_fetched(index)
    try:
        files = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
            raise ValueError("a file that is not beside it")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        reason = " ".join(repr(error).split())
        raise ValueError(f"{index}: not an index of safetensors files ({reason})") from error
    return files
