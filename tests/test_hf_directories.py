"""One directory, one model: the files that we, transformers and SGLang read are the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import CONFIGS, save_random
from transformers import AutoModelForCausalLM

from megatron_taopd.formats.convert import to_hf, to_megatron
from megatron_taopd.formats.directory import weight_map
from megatron_taopd.formats.hf import HFCheckpoint, load_model
from megatron_taopd.rollout.local import LocalEngine

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same model in one file and in shards, and another one in a file."""
    root = tmp_path_factory.mktemp("models")
    save_random(CONFIGS["llama"], root / "single")
    model = AutoModelForCausalLM.from_pretrained(root / "single")
    model.save_pretrained(root / "shards", max_shard_size=40_000)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.save_pretrained(root / "other")
    return root


def copy(models: Path, name: str, to: Path) -> Path:
    shutil.copytree(models / name, to)
    return to


def beside(directory: Path, models: Path, name: str) -> None:
    """Another model's weights under this name."""
    (directory / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(models / "other" / SINGLE, directory / name)


def index(directory: Path, files: dict[str, str], name: str = INDEX) -> None:
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def sglang_reads(directory: Path) -> set[str]:
    """Its DefaultModelLoader: all safetensors files at hand, or those of them in the index; of two
    without an index, consolidated.safetensors is left out."""
    files = {path.name for path in directory.glob("*.safetensors")}
    if (directory / INDEX).is_file():
        return files & set(json.loads((directory / INDEX).read_text())["weight_map"].values())
    if files == {"consolidated.safetensors", SINGLE}:
        return {SINGLE}
    return files


def leftovers(directory: Path, models: Path) -> None:
    """What an index leaves out, and what is no safetensors file of this directory."""
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"):
        beside(directory, models, name)
    beside(directory, models, "original/model.safetensors")
    torch.save({}, directory / "pytorch_model.bin")
    index(directory, {"x": "pytorch_model-1-of-9.bin"}, "pytorch_model.bin.index.json")
    index(directory, {"x": "consolidated.safetensors"}, "consolidated.safetensors.index.json")


ONE_MODEL = {
    "one file": ("single", lambda d, models: None),
    "shards": ("shards", lambda d, models: None),
    "shards beside everything else": ("shards", leftovers),
    "an index of the one file": (
        "single",
        lambda d, models: index(d, dict.fromkeys(load_file(d / SINGLE), SINGLE)),
    ),
    "the same file under Mistral's name": (
        "single",
        lambda d, models: beside(d, models, "consolidated.safetensors"),
    ),
    "a folder": ("single", lambda d, models: beside(d, models, "fp16/model.safetensors")),
    "other formats": (
        "single",
        lambda d, models: torch.save({}, d / "pytorch_model.bin"),
    ),
}


@pytest.mark.parametrize("case", ONE_MODEL)
def test_all_readers_take_the_same_weights(models, tmp_path, case):
    name, change = ONE_MODEL[case]
    directory = copy(models, name, tmp_path / "hf")
    change(directory, models)
    ours = HFCheckpoint(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    assert ours.files.keys() == theirs.keys()
    for tensor in theirs:
        assert torch.equal(ours[tensor], theirs[tensor]), tensor
    assert set(ours.files.values()) == sglang_reads(directory)


def shard_names(directory: Path) -> dict[str, str]:
    return json.loads((directory / INDEX).read_text())["weight_map"]


TWO_MODELS = {
    "one file beside an index of shards": (
        "shards",
        lambda d, models: beside(d, models, SINGLE),
        r"model.safetensors, which transformers reads, beside an index of model-00001-of-.*, which "
        "SGLang reads: two models in one directory; keep one of them",
    ),
    "one file that is also a shard": (
        "single",
        lambda d, models: (
            beside(d, models, "model-2.safetensors"),
            index(d, {"a": SINGLE, "b": "model-2.safetensors"}),
        ),
        "beside an index of model-2.safetensors",
    ),
    "one file beside shards without an index": (
        "single",
        lambda d, models: beside(d, models, "model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors beside model.safetensors: SGLang reads both",
    ),
    "an adapter's weights": (
        "single",
        lambda d, models: beside(d, models, "adapter_model.safetensors"),
        "adapter_model.safetensors beside model.safetensors: .*move it elsewhere",
    ),
    "a variant": (
        "single",
        lambda d, models: beside(d, models, "model.fp16.safetensors"),
        "model.fp16.safetensors beside model.safetensors",
    ),
    "an adapter": (
        "single",
        lambda d, models: (d / "adapter_config.json").write_text("{}"),
        "adapter_config.json beside the weights: .*merge it into the weights",
    ),
}
NO_MODEL = {
    "a variant alone": (
        "single",
        lambda d, models: (d / SINGLE).rename(d / "model.fp16.safetensors"),
        "no model.safetensors and no model.safetensors.index.json",
    ),
    "torch's format alone": (
        "single",
        lambda d, models: (torch.save({}, d / "pytorch_model.bin"), (d / SINGLE).unlink()),
        "no model.safetensors and no model.safetensors.index.json",
    ),
    "shards in a folder": (
        "shards",
        lambda d, models: index(d, {n: f"parts/{f}" for n, f in shard_names(d).items()}),
        "index.json: not an index of safetensors files",
    ),
    "a list for an index": (
        "shards",
        lambda d, models: (d / INDEX).write_text("[]"),
        "index.json: not an index of safetensors files",
    ),
    "a file less than the index names": (
        "shards",
        lambda d, models: (d / sorted(shard_names(d).values())[0]).unlink(),
        "names model-00001-of-.*, which is not there",
    ),
}


@pytest.mark.parametrize("case", TWO_MODELS | NO_MODEL)
def test_a_directory_of_two_models_or_none_is_refused_by_every_reader(models, tmp_path, case):
    name, change, message = (TWO_MODELS | NO_MODEL)[case]
    directory = copy(models, name, tmp_path / "hf")
    change(directory, models)
    readers = [
        weight_map,
        HFCheckpoint,
        lambda d: load_model(d, torch.float32),
        lambda d: LocalEngine.from_hf(d, torch.float32, "cpu"),
        lambda d: to_megatron(d, tmp_path / "out"),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=message) as caught:
            read(directory)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", [c for c in TWO_MODELS if c != "an adapter"])
def test_these_are_two_models_indeed(models, tmp_path, case):
    """transformers reads the one file alone."""
    name, change, _ = TWO_MODELS[case]
    directory = copy(models, name, tmp_path / "hf")
    change(directory, models)
    theirs = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    for tensor, values in load_file(directory / SINGLE).items():
        assert torch.equal(theirs[tensor], values)
    assert sglang_reads(directory) != {SINGLE}


def test_what_is_exported_names_no_files_of_its_source(models, tmp_path):
    directory = copy(models, "shards", tmp_path / "hf")
    leftovers(directory, models)
    to_megatron(directory, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert not list((tmp_path / "back").glob("*.index.json"))
    assert [path.name for path in (tmp_path / "back").glob("*.safetensors")] == [SINGLE]


def test_tensors_that_the_index_has_elsewhere_are_told(models, tmp_path):
    directory = copy(models, "shards", tmp_path / "hf")
    files = shard_names(directory)
    first, last = min(files.values()), max(files.values())
    moved = next(name for name, file in files.items() if file == first)
    index(directory, files | {moved: last})
    with pytest.raises(ValueError, match=rf"tensor {moved} is (not|only) in the index"):
        to_megatron(directory, tmp_path / "out")
    held = load_file(directory / first)
    save_file(held | {"x": torch.zeros(1)}, directory / first, metadata={"format": "pt"})
    index(directory, files)
    with pytest.raises(ValueError, match=rf"{first}: tensor x is not in the index"):
        to_megatron(directory, tmp_path / "out")
