"""Hugging Face ⇄ Megatron: the same bits and logits on any layout; bad input leaves nothing."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.commands import run_python
from support.families import CONFIGS, save_random
from support.patience import run
from support.ranks import run_ranks
from support.sglang_server import prompt_logprobs, serve
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_taopd.cli import convert as command
from megatron_taopd.formats.convert import to_hf, to_megatron
from megatron_taopd.formats.hf import HFCheckpoint
from megatron_taopd.formats.megatron import MegatronCheckpoint, MegatronWriter

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny_pair"


@pytest.fixture(scope="session")
def hf_dirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    for name, config in CONFIGS.items():
        save_random(config, root / name)
    return {name: root / name for name in CONFIGS}


@pytest.fixture(scope="session")
def megatron_dirs(hf_dirs, tmp_path_factory):
    root = tmp_path_factory.mktemp("megatron")
    for name, directory in hf_dirs.items():
        to_megatron(directory, root / name)
    return {name: root / name for name in hf_dirs}


def tensors(directory) -> dict[str, torch.Tensor]:
    checkpoint = HFCheckpoint(directory)
    return {name: checkpoint[name] for name in checkpoint.files}


def assert_same(a, b):
    """Two Hugging Face directories hold the same bits under the same names."""
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name


# ------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_bit_identical(tmp_path, family, dtype):
    save_random(CONFIGS[family], tmp_path / "hf", dtype)
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    done = to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same(tmp_path / "hf", tmp_path / "back")
    assert done.bytes == sum(t.nbytes for t in tensors(tmp_path / "hf").values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert loaded.dtype == dtype


def test_config_tokenizer_and_chat_template_come_back(tmp_path):
    to_megatron(TINY / "student", tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back")
    for path in (TINY / "student").iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_it_works_without_a_tokenizer_and_with_another_config_directory(
    hf_dirs, megatron_dirs, tmp_path
):
    assert not list(hf_dirs["qwen3"].glob("tokenizer*"))
    shutil.copytree(megatron_dirs["qwen3"], tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "hf")
    with pytest.raises(ValueError, match=r"bare: keeps no hf/config.json.*\(--hf\)"):
        to_hf(tmp_path / "bare", tmp_path / "back")
    to_hf(tmp_path / "bare", tmp_path / "back", hf_dir=hf_dirs["qwen3"])
    assert_same(hf_dirs["qwen3"], tmp_path / "back")


@pytest.mark.parametrize("direction", ["to_megatron", "to_hf"])
def test_a_dtype_can_be_chosen(hf_dirs, tmp_path, direction):
    chosen = {direction: torch.bfloat16}
    to_megatron(hf_dirs["llama"], tmp_path / "megatron", dtype=chosen.get("to_megatron"))
    to_hf(tmp_path / "megatron", tmp_path / "back", dtype=chosen.get("to_hf"))
    back = tensors(tmp_path / "back")
    for name, tensor in tensors(hf_dirs["llama"]).items():
        assert torch.equal(back[name], tensor.bfloat16()), name
    assert AutoConfig.from_pretrained(tmp_path / "back").dtype == torch.bfloat16


@pytest.mark.parametrize("max_file_bytes", [20_000, 10**9])
def test_files_are_cut_as_transformers_cuts_them(hf_dirs, tmp_path, max_file_bytes):
    model = AutoModelForCausalLM.from_pretrained(hf_dirs["qwen3_moe"])
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_file_bytes)
    to_megatron(tmp_path / "theirs", tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "ours", max_file_bytes=max_file_bytes)
    assert_same(tmp_path / "theirs", tmp_path / "ours")
    files = {f.name: f.stat().st_size for f in (tmp_path / "ours").glob("*.safetensors")}
    assert (len(files) > 1) == (tmp_path / "ours/model.safetensors.index.json").exists()
    for name in files:
        held = load_file(tmp_path / "ours" / name)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= max_file_bytes
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours")


# ---------------------------------------------------------------------------------------- layouts


def logits_on_ranks(hf_dir, megatron_dir, tp, pp, ep):
    from megatron_taopd.checkpoints.verify import compare_logits
    from megatron_taopd.parallel import platform

    platform.emulate_cuda()
    return compare_logits(hf_dir, megatron_dir, tp, pp, ep)


LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1)]
CASES = [(family, *layout) for family in CONFIGS for layout in LAYOUTS]
CASES += [("qwen3_moe", 1, 1, 2), ("qwen3_moe", 2, 1, 2), ("qwen3_moe", 1, 2, 2)]


@pytest.mark.parametrize(("family", "tp", "pp", "ep"), CASES)
def test_megatron_loads_it_on_any_layout(hf_dirs, megatron_dirs, family, tp, pp, ep):
    """Megatron's own loader, from one file for all layouts; logits beside transformers' in fp32."""
    case = (str(hf_dirs[family]), str(megatron_dirs[family]), tp, pp, ep)
    for difference, largest in run_ranks(tp * pp * ep, logits_on_ranks, *case):
        assert largest > 0.1
        assert difference < 1e-4


def save_with_megatron(hf_dir, out, tp, pp, ep, metadata):
    """The model alone, as Megatron's own writer stores it."""
    import queue

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_taopd.formats.hf import load_config
    from megatron_taopd.models import gpt, weights
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform

    platform.emulate_cuda()
    layout = layouts.student_layout(tp, pp, ep=ep)
    hf = load_config(hf_dir)
    trunk = gpt.Trunk(hf, gpt.transformer_config(hf, layout, torch.float32), layout)
    weights.load_weights(trunk, hf_dir)
    if dist.get_rank() == 0:
        Path(out).mkdir()
    dist.barrier()
    filesystem_async._results_queue = queue.Queue()
    metadata = metadata | {"dp_cp_group": layout.groups.dp_cp}
    dist_checkpointing.save(trunk.sharded_state_dict(metadata=metadata), out)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(
    ("family", "tp", "pp", "ep"),
    [("qwen2", 2, 2, 1), ("qwen3", 2, 1, 1), ("llama", 1, 2, 1), ("qwen3_moe", 2, 1, 2)],
)
def test_what_megatron_saves_converts(hf_dirs, tmp_path, family, tp, pp, ep, per_layer):
    """Stacked layers and a tensor per layer; the pieces of any layout."""
    hf_dir, out = str(hf_dirs[family]), str(tmp_path / "megatron")
    metadata = {"non_homogeneous_layers": per_layer}
    run_ranks(tp * pp * ep, save_with_megatron, hf_dir, out, tp, pp, ep, metadata)
    to_hf(out, tmp_path / "back", hf_dir=hf_dir)
    assert_same(hf_dir, tmp_path / "back")


def compare_on_ranks(hf_dir, megatron_dir, tp, pp, ep):
    """What `verify` compares: tensors, and logits of a model that Megatron's loader has filled."""
    from megatron_taopd.checkpoints.verify import compare_tensors

    tensors = compare_tensors(hf_dir, megatron_dir, lambda *_: None)
    return tensors, logits_on_ranks(hf_dir, megatron_dir, tp, pp, ep)


def assert_verified(hf_dir, megatron_dir, tp=1, pp=1, ep=1):
    case = str(hf_dir), str(megatron_dir), tp, pp, ep
    for found, (difference, largest) in run_ranks(tp * pp * ep, compare_on_ranks, *case):
        assert (found.different, found.tensors) == (0, len(tensors(hf_dir)))
        assert largest > 0.1
        assert difference < 1e-4


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(
    ("family", "saved", "loaded"),
    [
        ("qwen2", (1, 2, 1), (2, 1, 1)),
        ("llama", (1, 1, 1), (1, 2, 1)),
        ("qwen3_moe", (1, 1, 2), (1, 2, 1)),
        ("qwen3_moe", (2, 1, 1), (1, 1, 2)),
    ],
)
def test_what_megatron_saves_is_verified(hf_dirs, tmp_path, family, saved, loaded, per_layer):
    hf_dir, out = str(hf_dirs[family]), str(tmp_path / "megatron")
    metadata = {"non_homogeneous_layers": per_layer}
    run_ranks(2 if 2 in saved else 1, save_with_megatron, hf_dir, out, *saved, metadata)
    keys = MegatronCheckpoint(out).tensors
    assert ("decoder.layers.3.self_attention.linear_qkv.weight" in keys) == per_layer
    assert_verified(hf_dir, out, *loaded)


def written_otherwise(hf_dir, out, to_key=None, pad=64, dtype=None, skip=(), write=None):
    """A checkpoint as others write it, parameter by parameter.

    Args:
        to_key: (parameter) → (key, index, shape); None: as ours.
        pad: the multiple that the vocabulary is padded to.
        skip: keys that are left out.
        write: (writer, key, whole, index, shape) in place of the writer's own.
    """
    from megatron_taopd.formats import hf_map
    from megatron_taopd.formats.convert import read_config

    hf, source = read_config(hf_dir), HFCheckpoint(hf_dir)
    Path(out).mkdir()
    writer = MegatronWriter(out)
    for parameter in hf_map.parameters(hf).values():
        mapping = parameter.mapping
        whole = mapping.merge([source[name] for name in mapping.names], hf)
        if isinstance(mapping, hf_map.Vocabulary):
            rows = -(-hf.vocab_size // pad) * pad
            whole = torch.nn.functional.pad(whole[: hf.vocab_size], (0, 0, 0, rows - hf.vocab_size))
        key, index, shape = parameter.key, parameter.index, parameter.shape
        if to_key is not None:
            key, index, shape = to_key(parameter)
        if key not in skip:
            (write or MegatronWriter.write)(writer, key, whole.to(dtype), index, shape)
    writer.finish({"checkpoint_version": 3.0})
    shutil.copytree(hf_dir, Path(out) / "hf", ignore=shutil.ignore_patterns("*.safetensors"))


def layer_apart(parameter):
    return parameter.key_in_layer, parameter.index[1:], parameter.shape[1:]


def first_key_apart(parameter):
    """A mixture: norms of a layer each, the rest of all layers."""
    apart = "layer_norm" in parameter.key
    return layer_apart(parameter) if apart else (parameter.key, parameter.index, parameter.shape)


@pytest.mark.parametrize("pad", [1, 64, 96])
@pytest.mark.parametrize("to_key", [None, layer_apart], ids=["stacked", "per layer"])
def test_a_vocabulary_padded_otherwise_is_verified(hf_dirs, tmp_path, to_key, pad):
    written_otherwise(hf_dirs["llama"], tmp_path / "megatron", to_key, pad)
    assert_verified(hf_dirs["llama"], tmp_path / "megatron", tp=2)


def test_bf16_is_verified_in_fp32(tmp_path):
    save_random(CONFIGS["qwen3"], tmp_path / "hf", torch.bfloat16)
    written_otherwise(tmp_path / "hf", tmp_path / "megatron", layer_apart)
    assert_verified(tmp_path / "hf", tmp_path / "megatron")


def train_briefly(run_dir, overrides):
    from megatron_taopd.train import main

    short = ["train.steps=2", "rollout.prompts=8", "eval.prompts=null", "log.tensorboard=false"]
    config = str(ROOT / "examples" / "tiny_pair.yaml")
    assert main([config, f"run.dir={run_dir}", *short, *overrides]) == 0


@pytest.mark.parametrize(
    "overrides",
    [
        ["student.parallel={tp: 2, pp: 1}"],
        ["student.parallel={tp: 1, pp: 2}", "teacher.parallel.pp=1", "train.precision=bf16"],
    ],
)
def test_a_training_checkpoint_converts_by_itself(tmp_path, overrides):
    """Optimizer state included, at TP2 in fp32 and PP2 in bf16."""
    run_ranks(2, train_briefly, str(tmp_path / "run"), overrides)
    to_hf(tmp_path / "run/checkpoints/step_00000002", tmp_path / "back")
    assert_same(tmp_path / "run/student", tmp_path / "back")
    assert (tmp_path / "back/tokenizer.json").exists()
    checkpoint = tmp_path / "run/checkpoints/step_00000002"
    assert_verified(tmp_path / "run/student", checkpoint, tp=2)
    with pytest.raises(ValueError, match="give one of the checkpoints in it, step_00000002"):
        to_hf(tmp_path / "run/checkpoints", tmp_path / "other")


def test_pieces_are_those_of_the_layout(hf_dirs, tmp_path):
    """A rank of that layout reads no byte of another's."""
    to_megatron(hf_dirs["qwen3"], tmp_path / "megatron", tp=4)
    checkpoint = MegatronCheckpoint(tmp_path / "megatron")
    chunks = {
        key: {(tuple(c.offsets[1:]), tuple(c.sizes[1:])) for c in tensor.chunks}
        for key, tensor in checkpoint.tensors.items()
    }
    # QKV: 8 query and 2 × 4 key and value heads of width 16; MLP: gate and up of 64 columns.
    assert chunks["decoder.layers.self_attention.linear_qkv.weight"] == {
        ((row, 0), (64, 32)) for row in range(0, 256, 64)
    }
    assert chunks["decoder.layers.self_attention.linear_proj.weight"] == {
        ((0, column), (32, 32)) for column in range(0, 128, 32)
    }
    assert chunks["decoder.layers.mlp.linear_fc1.weight"] == {
        ((row, 0), (16, 32)) for row in range(0, 128, 16)
    }


def convert_on_ranks(hf_dir, out, max_file_bytes):
    """Both directions; which tensors of which checkpoint this rank has read."""
    reads = []
    get, read = HFCheckpoint.__getitem__, MegatronCheckpoint.read
    HFCheckpoint.__getitem__ = lambda self, name: (reads.append(name), get(self, name))[1]
    MegatronCheckpoint.read = lambda self, *key: (reads.append(key), read(self, *key))[1]
    try:
        to_megatron(hf_dir, f"{out}/megatron")
        to_hf(f"{out}/megatron", f"{out}/back", max_file_bytes=max_file_bytes)
    finally:
        HFCheckpoint.__getitem__, MegatronCheckpoint.read = get, read
    return reads


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_ranks_share_the_work(hf_dirs, tmp_path, family):
    reads = run_ranks(4, convert_on_ranks, str(hf_dirs[family]), str(tmp_path), 20_000)
    assert_same(hf_dirs[family], tmp_path / "back")
    assert all(reads)
    times = Counter(name for each in reads for name in each if isinstance(name, str))
    assert times.keys() == tensors(hf_dirs[family]).keys()
    assert set(times.values()) == {1}


def megatron_logprobs(hf_dir, megatron_dir, sequences):
    """log p of every token but the first of each sequence, by a TP2 trunk; on every rank."""
    from megatron_taopd.formats.hf import load_config
    from megatron_taopd.models import gpt, weights
    from megatron_taopd.parallel import platform
    from megatron_taopd.parallel.layout import student_layout

    platform.emulate_cuda()
    layout = student_layout(2, 1)
    hf = load_config(hf_dir)
    trunk = gpt.Trunk(hf, gpt.transformer_config(hf, layout, torch.float32), layout)
    weights.load_megatron(trunk, megatron_dir)
    found = []
    for ids in map(torch.tensor, sequences):
        positions, cu_seqlens = torch.arange(len(ids)), torch.tensor([0, len(ids)]).int()
        with torch.no_grad():
            hidden = gpt.packed_forward(trunk, ids, positions, cu_seqlens, len(ids))
            shard = gpt.pick_rows(hidden, positions, layout) @ trunk.head_weight.T
        shards = [torch.empty_like(shard) for _ in range(2)]
        dist.all_gather(shards, shard, group=layout.groups.tp)
        log_probs = torch.cat(shards, 1)[:-1, : hf.vocab_size].log_softmax(1)
        found.append(log_probs.gather(1, ids[1:, None])[:, 0].tolist())
    return found


def test_what_comes_out_is_served_by_sglang(tmp_path):
    """A real server's log-probabilities beside those of Megatron at TP2."""
    to_megatron(TINY / "student", tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "student")
    size = AutoConfig.from_pretrained(TINY / "student").vocab_size
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 40, 17)
    sequences = [torch.randint(size, (n,), generator=generator).tolist() for n in lengths]
    ours = run_ranks(
        2, megatron_logprobs, str(TINY / "student"), str(tmp_path / "megatron"), sequences
    )
    with serve(tmp_path / "student") as server:
        theirs = prompt_logprobs(server.url, sequences)
    for mine, served in zip(ours[0], theirs, strict=True):
        assert mine == pytest.approx(served, abs=1e-4)


# -------------------------------------------------------------------------------------- bad input


def refuses(convert, source, out, match, **arguments):
    """One line that matches, and nothing at or beside the output."""
    with pytest.raises(ValueError, match=match) as caught:
        convert(source, out, **arguments)
    assert "\n" not in str(caught.value)
    assert not list(out.parent.glob(f"{out.name}*"))


def rewrite(hf_dir, change):
    file = hf_dir / "model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})


def reconfigure(hf_dir, **changes):
    file = hf_dir / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def index(hf_dir, **files):
    (hf_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
DAMAGES = {
    "a file that the index names is missing": (
        lambda d: index(d, **{Q_PROJ: "model-00001-of-00002.safetensors"}),
        "index.json: names model-00001-of-00002.safetensors, which is not there",
    ),
    "the index names a file elsewhere": (
        lambda d: index(d, **{Q_PROJ: "../model.safetensors"}),
        "index.json: not an index of safetensors files",
    ),
    "the index is no JSON": (
        lambda d: (d / "model.safetensors.index.json").write_text("{"),
        "index.json: not an index of safetensors files",
    ),
    "index and file disagree": (
        lambda d: index(d, **dict.fromkeys([*tensors(d), "model.norm.bias"], "model.safetensors")),
        "model.norm.bias",
    ),
    "a file is cut short": (
        lambda d: os.truncate(d / "model.safetensors", 30_000),
        "model.safetensors: damaged safetensors file",
    ),
    "an empty file": (
        lambda d: os.truncate(d / "model.safetensors", 0),
        "model.safetensors: damaged safetensors file",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors and no"),
    "a tensor is missing": (
        lambda d: rewrite(d, lambda t: t.pop(Q_PROJ)),
        f"1 tensors are missing, first {Q_PROJ}",
    ),
    "a tensor too many": (
        lambda d: rewrite(d, lambda t: t.update({"model.layers.9.x": torch.zeros(3)})),
        "1 tensors do not belong to qwen3, first model.layers.9.x",
    ),
    "another shape": (
        lambda d: rewrite(d, lambda t: t.update({Q_PROJ: torch.zeros(7, 32)})),
        rf"{Q_PROJ} is \[7, 32\] where config.json asks for \[128, 32\]",
    ),
    "integers": (
        lambda d: rewrite(d, lambda t: t.update({Q_PROJ: t[Q_PROJ].int()})),
        f"{Q_PROJ} is I32; one of F64, F32, F16, BF16 is needed",
    ),
    "two dtypes in one parameter": (
        lambda d: rewrite(d, lambda t: t.update({Q_PROJ: t[Q_PROJ].half()})),
        "torch.float16.*which become one tensor; choose a dtype",
    ),
    "the config has fewer layers": (
        lambda d: reconfigure(d, num_hidden_layers=3, layer_types=None),
        "do not belong to qwen3, first model.layers.3",
    ),
    "the config has other heads": (
        lambda d: reconfigure(d, num_key_value_heads=2),
        r"k_proj.weight is \[64, 32\] where config.json asks for \[32, 32\]",
    ),
    "the config unties the embeddings": (
        lambda d: reconfigure(d, tie_word_embeddings=False),
        "1 tensors are missing, first lm_head.weight",
    ),
    "tied embeddings that differ": (
        lambda d: rewrite(d, lambda t: t.update({"lm_head.weight": torch.zeros(200, 32)})),
        "tie_word_embeddings, but lm_head.weight differs",
    ),
    "an unknown architecture": (
        lambda d: reconfigure(d, architectures=["MambaForCausalLM"]),
        "MambaForCausalLM is not supported; supported: LlamaForCausalLM",
    ),
    "an unknown model type": (lambda d: reconfigure(d, model_type="qwen99"), "cannot read it"),
    "a contradiction": (
        lambda d: reconfigure(d, architectures=["Qwen2ForCausalLM"]),
        "Qwen2ForCausalLM with model_type qwen3 contradict each other",
    ),
    "quantised weights": (
        lambda d: reconfigure(d, quantization_config={"quant_method": "fp8"}),
        "quantised weights is not supported",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_hf_directory_is_refused(hf_dirs, tmp_path, damage):
    inflict, message = DAMAGES[damage]
    shutil.copytree(hf_dirs["qwen3"], tmp_path / "bad")
    inflict(tmp_path / "bad")
    refuses(to_megatron, tmp_path / "bad", tmp_path / "out", message)


def test_a_second_copy_of_a_tied_embedding_is_no_damage(hf_dirs, tmp_path):
    shutil.copytree(hf_dirs["qwen3"], tmp_path / "hf")
    repeat = lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})  # noqa: E731
    rewrite(tmp_path / "hf", repeat)
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same(hf_dirs["qwen3"], tmp_path / "back")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tp": 3}, "tp: 3 does not divide the 8 attention heads of .*; one of 1, 2, 4"),
        ({"tp": 0}, "tp: 0 does not divide"),
        ({"pp": 3}, "pp: 3 does not divide the 4 layers"),
        ({"ep": 3}, "ep: 3 does not divide the 8 experts"),
    ],
)
def test_a_layout_that_does_not_divide_the_model(hf_dirs, tmp_path, layout, message):
    refuses(to_megatron, hf_dirs["qwen3_moe"], tmp_path / "out", message, **layout)
    if "ep" in layout:
        dense = "ep: 3 with .*, which has no experts"
        refuses(to_megatron, hf_dirs["qwen3"], tmp_path / "out", dense, **layout)


def only_file(directory, pattern):
    (file,) = directory.glob(pattern)
    return file


def metadata_with(directory, change):
    file = directory / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(change(metadata) or metadata))


def drop_key(metadata):
    del metadata.state_dict_metadata["decoder.final_layernorm.weight"]


def drop_chunk(metadata):
    qkv = "decoder.layers.self_attention.linear_qkv.weight"
    del metadata.storage_data[next(i for i in metadata.storage_data if i.fqn == qkv)]


def point_elsewhere(metadata):
    for info in metadata.storage_data.values():
        info.relative_path = "../secret"


class Trap:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.system, ("touch TRAPPED",)


MEGATRON_DAMAGES = {
    "no checkpoint": (lambda d: shutil.rmtree(d) or d.mkdir(), "no metadata.json; give the dir"),
    "another format": (
        lambda d: (d / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "format 'zarr'; only 'torch_dist' can be read",
    ),
    "no metadata": (
        lambda d: (d / ".metadata").unlink(),
        "no .metadata; the checkpoint is incomplete",
    ),
    "metadata cut short": (lambda d: os.truncate(d / ".metadata", 500), "damaged metadata"),
    "a file is missing": (lambda d: only_file(d, "*.distcp").unlink(), "__0_0.distcp: missing"),
    "a file is cut short": (
        lambda d: os.truncate(only_file(d, "*.distcp"), 40_000),
        "__0_0.distcp: damaged at",
    ),
    "a tensor is missing": (
        lambda d: metadata_with(d, drop_key),
        "tensor decoder.final_layernorm.weight is missing",
    ),
    "a chunk is missing": (
        lambda d: metadata_with(d, drop_chunk),
        "the chunks of decoder.layers.self_attention.linear_qkv.weight do not make up its",
    ),
    "files elsewhere": (lambda d: metadata_with(d, point_elsewhere), r"lies outside, \.\./secret"),
    "code in the metadata": (
        lambda d: metadata_with(d, lambda _: Trap()),
        "damaged metadata .it asks for posix.system, which describes no tensor",
    ),
    "the config has other heads": (
        lambda d: reconfigure(d / "hf", num_key_value_heads=2),
        r"linear_qkv.weight is \[4, 256, 32\] where config.json asks for \[4, 192, 32\]",
    ),
    "the config unties the embeddings": (
        lambda d: reconfigure(d / "hf", tie_word_embeddings=False),
        "tensor output_layer.weight is missing",
    ),
    "the config is of a model without QK norms": (
        lambda d: reconfigure(d / "hf", model_type="llama", architectures=["LlamaForCausalLM"]),
        "2 tensors do not belong to llama with tied embeddings, first decoder.layers",
    ),
}


@pytest.mark.parametrize("damage", MEGATRON_DAMAGES)
def test_a_bad_megatron_checkpoint_is_refused(megatron_dirs, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    inflict, message = MEGATRON_DAMAGES[damage]
    shutil.copytree(megatron_dirs["qwen3"], tmp_path / "bad")
    inflict(tmp_path / "bad")
    refuses(to_hf, tmp_path / "bad", tmp_path / "out", message)
    assert not Path("TRAPPED").exists()


def comparison(hf_dir, megatron_dir):
    from megatron_taopd.checkpoints.verify import compare_tensors

    return compare_tensors(hf_dir, megatron_dir, lambda *_: None)


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d != "two dtypes in one parameter"])
def test_a_bad_hf_directory_is_compared_with_nothing(hf_dirs, megatron_dirs, tmp_path, damage):
    inflict, message = DAMAGES[damage]
    shutil.copytree(hf_dirs["qwen3"], tmp_path / "bad")
    inflict(tmp_path / "bad")
    with pytest.raises(ValueError, match=message) as caught:
        comparison(tmp_path / "bad", megatron_dirs["qwen3"])
    assert "\n" not in str(caught.value)


# Of the config beside it a comparison knows nothing.
@pytest.mark.parametrize("damage", [d for d in MEGATRON_DAMAGES if "the config" not in d])
def test_a_bad_megatron_checkpoint_is_compared_with_nothing(
    hf_dirs, megatron_dirs, tmp_path, monkeypatch, damage
):
    monkeypatch.chdir(tmp_path)
    inflict, message = MEGATRON_DAMAGES[damage]
    shutil.copytree(megatron_dirs["qwen3"], tmp_path / "bad")
    inflict(tmp_path / "bad")
    with pytest.raises(ValueError, match=message) as caught:
        comparison(hf_dirs["qwen3"], tmp_path / "bad")
    assert "\n" not in str(caught.value)
    assert not Path("TRAPPED").exists()


def refusal_on_rank(hf_dir, megatron_dir):
    """What Megatron's loader is kept from, or trips over."""
    try:
        logits_on_ranks(hf_dir, megatron_dir, 1, 1, 1)
    except ValueError as error:
        return str(error)


def overlapping(writer, key, whole, index, shape):
    """Rows 0–2 and 1–… of an embedding: as many numbers as it has."""
    if not key.startswith("embedding"):
        return writer.write(key, whole, index, shape)
    writer.write(key, whole, chunks=2)
    for stored in [stored for stored in writer.stored if stored[0] == key and stored[1][0]]:
        shifted = (key, (stored[1][0] - 1, *stored[1][1:]))
        writer.stored[shifted] = writer.stored.pop(stored)
    chunk = writer.tensors[key].chunks[1]
    writer.tensors[key].chunks[1] = replace(
        chunk, offsets=torch.Size([chunk.offsets[0] - 1, *chunk.offsets[1:]])
    )


def outside(writer, key, whole, index, shape):
    """Rows that begin before the first."""
    writer.write(key, whole, index, shape)
    if key.startswith("embedding"):
        where = (key, (0, 0))
        writer.stored[key, (-1, 0)] = writer.stored.pop(where)
        (chunk,) = writer.tensors[key].chunks
        writer.tensors[key].chunks[0] = replace(chunk, offsets=torch.Size([-1, 0]))


LAST_MLP = "decoder.layers.3.mlp.linear_fc2.weight"
OTHERWISE = {
    "a layer is missing": (
        dict(to_key=layer_apart, skip=[LAST_MLP]),
        f"tensor decoder.layers.mlp.linear_fc2.weight is missing|tensor {LAST_MLP} is missing",
    ),
    "all layers' norms are missing": (
        dict(skip=["decoder.layers.self_attention.q_layernorm.weight"]),
        "tensor decoder.layers.self_attention.q_layernorm.weight is missing",
    ),
    "whole numbers": (
        dict(dtype=torch.int32),
        "embedding.word_embeddings.weight is torch.int32; one of F64, F32, F16, BF16 is needed",
    ),
    "8 bits": (
        dict(dtype=torch.float8_e4m3fn),
        "embedding.word_embeddings.weight is torch.float8_e4m3fn; one of F64",
    ),
    "chunks that overlap": (dict(write=overlapping), "the chunks of embedding.* do not make up"),
    "a chunk outside": (dict(write=outside), "the chunks of embedding.* do not make up"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_others_have_written_badly_is_refused(hf_dirs, tmp_path, case):
    how, message = OTHERWISE[case]
    written_otherwise(hf_dirs["qwen3"], tmp_path / "bad", **how)
    refuses(to_hf, tmp_path / "bad", tmp_path / "out", message)
    with pytest.raises(ValueError, match=message):
        comparison(hf_dirs["qwen3"], tmp_path / "bad")


def test_a_mixture_of_layouts_converts_but_megatron_does_not_load_it(hf_dirs, tmp_path):
    written_otherwise(hf_dirs["qwen3"], tmp_path / "mixed", first_key_apart)
    to_hf(tmp_path / "mixed", tmp_path / "back")
    assert_same(hf_dirs["qwen3"], tmp_path / "back")
    (said,) = run_ranks(1, refusal_on_rank, str(hf_dirs["qwen3"]), str(tmp_path / "mixed"))
    assert "some tensors hold all layers, others one; Megatron loads no mixture" in said


def test_what_megatron_trips_over_is_one_line(hf_dirs, megatron_dirs, tmp_path):
    """A file that is missing, or that its common state is not in."""
    for name in ("__0_0.distcp", "common.pt"):
        shutil.copytree(megatron_dirs["qwen3"], tmp_path / name)
        (tmp_path / name / name).unlink()
        (said,) = run_ranks(1, refusal_on_rank, str(hf_dirs["qwen3"]), str(tmp_path / name))
        assert said.startswith(str(tmp_path / name)) and "\n" not in said


@pytest.mark.parametrize("place", [".", "..", "hf"])
def test_what_is_read_is_not_replaced(hf_dirs, megatron_dirs, tmp_path, place):
    shutil.copytree(megatron_dirs["qwen3"], tmp_path / "step")
    shutil.copytree(hf_dirs["qwen3"], tmp_path / "step" / "model")
    for convert, source in ((to_hf, "step"), (to_megatron, "step/model")):
        out = tmp_path / source / place
        with pytest.raises(ValueError, match=r"is, holds or lies in .*, which is read"):
            convert(tmp_path / source, out)
    assert_same(hf_dirs["qwen3"], tmp_path / "step" / "model")


@settings(max_examples=150)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_no_flipped_header_byte_of_safetensors_goes_through(hf_dirs, tmp_path_factory, place, flip):
    directory = tmp_path_factory.mktemp("flip")
    shutil.copytree(hf_dirs["qwen3"], directory / "bad")
    file = directory / "bad/model.safetensors"
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[int(place * header)] ^= flip
    file.write_bytes(data)
    refuses(to_megatron, directory / "bad", directory / "out", directory.name)
    shutil.rmtree(directory)


@settings(max_examples=150)
@given(
    place=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
    name=st.sampled_from([".metadata", "__0_0.distcp"]),
)
def test_a_flipped_byte_of_a_megatron_checkpoint_never_gives_other_tensors(
    hf_dirs, megatron_dirs, tmp_path_factory, place, flip, name
):
    """Some bytes are of no consequence; with these the tensors come out as they were."""
    directory = tmp_path_factory.mktemp("flip")
    shutil.copytree(megatron_dirs["qwen3"], directory / "bad")
    data = bytearray((directory / "bad" / name).read_bytes())
    data[int(place * len(data))] ^= flip
    (directory / "bad" / name).write_bytes(data)
    try:
        to_hf(directory / "bad", directory / "out")
    except ValueError as error:
        assert "\n" not in str(error)
        assert not list(directory.glob("out*"))
    else:
        assert_same(hf_dirs["qwen3"], directory / "out")
    shutil.rmtree(directory)


def test_no_space_is_told_before_anything_is_written(hf_dirs, megatron_dirs, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 99))
    message = r"out: needs 0.00 GB, .* has 0.00 GB free"
    refuses(to_megatron, hf_dirs["qwen3"], tmp_path / "out", message)
    refuses(to_hf, megatron_dirs["qwen3"], tmp_path / "out", message)


def convert_with_small_files(convert, source, out):
    """With files that cannot grow beyond 40 kB: a write fails in the middle, as on a full disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        convert(source, out)
    except ValueError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_leaves_nothing(hf_dirs, megatron_dirs, tmp_path):
    for convert, source in ((to_megatron, hf_dirs["llama"]), (to_hf, megatron_dirs["llama"])):
        out = str(tmp_path / "out")
        (message,) = run_ranks(1, convert_with_small_files, convert, str(source), out)
        assert message == f"{out}: no space left; nothing was kept"
        assert not list(tmp_path.iterdir())


def test_an_interrupted_conversion_is_started_over(hf_dirs, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_megatron(hf_dirs["qwen2"], tmp_path / "out", advance=interrupt)
    assert not list(tmp_path.iterdir())
    # What a process leaves that could not clean up: files, but nothing that makes a checkpoint.
    (tmp_path / "out.incomplete").mkdir()
    writer = MegatronWriter(tmp_path / "out.incomplete")
    writer.write("decoder.final_layernorm.weight", torch.zeros(32))
    writer.stream.close()
    with pytest.raises(ValueError, match=r"no metadata.json"):
        MegatronCheckpoint(tmp_path / "out.incomplete")
    to_megatron(hf_dirs["qwen2"], tmp_path / "out")
    to_hf(tmp_path / "out", tmp_path / "back")
    assert_same(hf_dirs["qwen2"], tmp_path / "back")
    assert not list(tmp_path.glob("*.incomplete"))


# ----------------------------------------------------------------------------------- command line


def run_tool(*arguments, ranks=1):
    return run_python("tools/convert.py", *arguments, ranks=ranks, seconds=200)


def test_the_command_line(hf_dirs, tmp_path):
    """There and back, compared by two ranks; what is there is not replaced unasked."""
    hf, megatron, back = hf_dirs["qwen3_moe"], tmp_path / "megatron", tmp_path / "back"
    figures = tmp_path / "figures.json"
    done = run_tool("to-megatron", "--hf", hf, "--out", megatron, "--tp", "2", "--ep", "2")
    assert done.returncode == 0, done.stderr
    assert "Qwen3MoeForCausalLM" in done.stdout
    again = run_tool("to-megatron", "--hf", hf, "--out", megatron)
    assert again.returncode == 2
    assert again.stderr == f"error: --out: {megatron} exists; give another, or --overwrite\n"

    done = run_tool("to-hf", "--megatron", megatron, "--out", back, "--json", figures, ranks=2)
    assert done.returncode == 0, done.stderr
    assert json.loads(figures.read_text())["tensors"] == len(tensors(hf))
    assert_same(hf, back)

    compare = ["verify", "--megatron", megatron, "--json", figures]
    done = run_tool(*compare, "--hf", back, "--tp", "2", ranks=2)
    assert done.returncode == 0, done.stderr
    assert json.loads(figures.read_text())["logits_largest_difference"] < 1e-4

    rewrite(back, lambda t: t[Q_PROJ].view(-1)[0:1].add_(0.5))
    done = run_tool(*compare, "--hf", back, "--no-logits")
    assert done.returncode == 1, done.stderr
    found = json.loads(figures.read_text())
    assert (found["different"], found["first"]) == (1, Q_PROJ)
    assert found["largest"] == pytest.approx(0.5, abs=1e-6)


def as_a_command(capsys, *arguments):
    """The command in this process: (exit status, what it said)."""
    try:
        status = command.main([*map(str, arguments)])
    except SystemExit as refusal:  # argparse's
        status = refusal.code
    return status, capsys.readouterr().err


WRONG = {
    "no such directory": (
        lambda hf, megatron: ["to-megatron", "--hf", "nowhere", "--out", "out"],
        "nowhere: no config.json",
    ),
    "a file for a directory": (
        lambda hf, megatron: ["to-megatron", "--hf", hf / "config.json", "--out", "out"],
        "no config.json",
    ),
    "no such checkpoint": (
        lambda hf, megatron: ["to-hf", "--megatron", "nowhere", "--out", "out"],
        "nowhere: no metadata.json",
    ),
    "the other way round": (
        lambda hf, megatron: ["verify", "--no-logits", "--hf", megatron, "--megatron", hf],
        "no config.json",
    ),
    "another model": (
        lambda hf, megatron: [
            "verify", "--no-logits", "--hf", hf.parent / "llama", "--megatron", megatron
        ],
        "decoder.layers.self_attention.linear_qkv.weight is .* where config.json asks for",
    ),
    "no place for the figures": (
        lambda hf, megatron: [
            "to-megatron", "--hf", hf, "--out", "out", "--json", "nowhere/figures.json"
        ],
        "--json: .*nowhere: no such directory",
    ),
    "no place for the result": (
        lambda hf, megatron: ["to-megatron", "--hf", hf, "--out", hf / "config.json" / "out"],
        "Not a directory|lies in",
    ),
    "files of no size": (
        lambda hf, megatron: [
            "to-hf", "--megatron", megatron, "--out", "out", "--max-file-gb", "0"
        ],
        "--max-file-gb: 0; it has to be above 0",
    ),
    "no number": (
        lambda hf, megatron: ["verify", "--hf", hf, "--megatron", megatron, "--tolerance", "nan"],
        "--tolerance: nan; it has to be 0 or more",
    ),
    "too few tokens": (
        lambda hf, megatron: ["verify", "--hf", hf, "--megatron", megatron, "--tokens", "1"],
        "--tokens: 1; it has to be at least 3",
    ),
    "a layout": (
        lambda hf, megatron: ["to-megatron", "--hf", hf, "--out", "out", "--tp", "-2"],
        "tp: -2 does not divide",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_told_in_one_line(
    hf_dirs, megatron_dirs, tmp_path, monkeypatch, capsys, case
):
    monkeypatch.chdir(tmp_path)
    arguments, message = WRONG[case]
    wrong = arguments(hf_dirs["qwen3"], megatron_dirs["qwen3"])
    status, said = as_a_command(capsys, *wrong)
    last = said.rstrip("\n").splitlines()[-1]
    assert status == 2
    assert re.search(message, last), said
    assert "Traceback" not in said and last.count("error: ") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_result_is_replaced(
    hf_dirs, megatron_dirs, tmp_path, monkeypatch, capsys
):
    (tmp_path / "out").write_text("something")
    (tmp_path / "out.replaced").mkdir()  # of a conversion that was killed
    wanted = ["to-hf", "--megatron", megatron_dirs["qwen3"], "--out", tmp_path / "out", "--quiet"]
    status, said = as_a_command(capsys, *wanted)
    assert (status, said.count("exists; give another, or --overwrite")) == (2, 1)
    assert as_a_command(capsys, *wanted, "--overwrite")[0] == 0
    assert_same(hf_dirs["qwen3"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def frames_of_ours(said: str) -> list[str]:
    """Lines of tracebacks through this package; torchrun's own, of its launcher, are not."""
    frames = [line for line in said.splitlines() if 'File "' in line]
    return [line for line in frames if "megatron_taopd" in line or "convert.py" in line]


def test_damage_that_one_of_two_ranks_finds_is_one_line(hf_dirs, megatron_dirs, tmp_path):
    """The other is left alone in a collective, and says nothing."""
    shutil.copytree(megatron_dirs["qwen3"], tmp_path / "bad")
    data = bytearray((tmp_path / "bad" / "__0_0.distcp").read_bytes())
    data[len(data) // 4] ^= 1  # in the share of rank 0
    (tmp_path / "bad" / "__0_0.distcp").write_bytes(data)
    compare = ["verify", "--no-logits", "--quiet", "--megatron", tmp_path / "bad"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run([*launch, ROOT / "tools/convert.py", *compare, "--hf", hf_dirs["qwen3"]], 200)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "__0_0.distcp: damaged at" in lines[0], done.stderr
    assert not frames_of_ours(done.stderr)


def test_a_tensor_per_layer_is_verified_by_the_command(hf_dirs, tmp_path):
    """By two ranks, logits included; what is missing there is one line for both of them."""
    written_otherwise(hf_dirs["qwen3"], tmp_path / "apart", layer_apart)
    figures = tmp_path / "figures.json"
    compare = ["verify", "--hf", hf_dirs["qwen3"], "--quiet", "--json", figures, "--tp", "2"]
    done = run_tool(*compare, "--megatron", tmp_path / "apart", ranks=2)
    assert done.returncode == 0, done.stderr
    assert json.loads(figures.read_text())["logits_largest_difference"] < 1e-4

    written_otherwise(hf_dirs["qwen3"], tmp_path / "less", layer_apart, skip=[LAST_MLP])
    done = run_tool(*compare, "--megatron", tmp_path / "less", ranks=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "is missing" in lines[0], done.stderr
    assert not frames_of_ours(done.stderr)
