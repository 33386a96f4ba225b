"""Megatron's layers of TransformerEngine, by a stand-in (`support/stand_ins`): the same weights,
steps and checkpoints as without."""

from __future__ import annotations

import zlib
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from support.apart import TRANSFORMER_ENGINE, Apart
from support.families import CONFIGS, save_random
from support.ranks import run_ranks
from support.step import OPTIMIZER, make_batch, make_model, relative_error, step_on_ranks
from test_models import transformers_logits, trunk_on_ranks
from test_pretend_cuda import STUDENT, make_teachers, pretending, run
from test_train import curve

from megatron_taopd.formats import convert

DENSE = [name for name in CONFIGS if not name.startswith("qwen3_moe")]


@pytest.fixture(scope="module")
def with_engine():
    """`run_ranks`, on ranks that have TransformerEngine's stand-in."""
    with Apart(TRANSFORMER_ENGINE) as apart:
        yield lambda size, function, *args: apart.run(size, engaged, function, *args)


def engaged(function, *args):
    """The product takes TransformerEngine's layers with CUDA alone, so it is told to."""
    from megatron_taopd.models import gpt

    with mock.patch.object(gpt, "use_transformer_engine", lambda: True):
        return function(*args)


@pytest.fixture(scope="module")
def hf_dirs(tmp_path_factory):
    """A random tiny checkpoint of each family."""
    root = tmp_path_factory.mktemp("hf")
    for name, config in CONFIGS.items():
        save_random(config, root / name)
    return {name: str(root / name) for name in CONFIGS}


def classes_of_layers(hf_dir):
    from megatron.core import parallel_state
    from megatron.core.optimizer import Adam

    from megatron_taopd.formats import hf as hf_checkpoint
    from megatron_taopd.models import gpt
    from megatron_taopd.parallel import layout, platform

    platform.emulate_cuda()
    try:
        hf, one = hf_checkpoint.load_config(hf_dir), layout.student_layout(1, 1)
        trunk = gpt.Trunk(hf, gpt.transformer_config(hf, one, torch.float32), one)
        qkv = trunk.decoder.layers[0].self_attention.linear_qkv
        return type(qkv).__name__, Adam.__name__
    finally:
        parallel_state.destroy_model_parallel()


def test_only_ranks_that_ask_for_it_have_the_stand_in(with_engine, hf_dirs):
    arguments = classes_of_layers, hf_dirs["qwen3"]
    assert with_engine(1, *arguments) == [("TELayerNormColumnParallelLinear", "FusedAdam")]
    assert run_ranks(1, *arguments) == [("ColumnParallelLinear", "AdamW")]


# ------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("tp", "pp", "sequence"), [(2, 1, True), (1, 2, False)])
def test_logits_and_round_trip(with_engine, hf_dirs, family, tp, pp, sequence):
    lengths = [9, 4, 11]
    results = with_engine(2, trunk_on_ranks, hf_dirs[family], tp, pp, sequence, lengths)
    expected = transformers_logits(hf_dirs[family], lengths)
    shards = [logits for logits, _, _ in results if logits is not None]
    assert (torch.cat(shards, dim=-1)[:, : expected.shape[-1]] - expected).abs().max() < 1e-4
    original = load_file(f"{hf_dirs[family]}/model.safetensors")
    for _, exported, _ in results:
        assert exported.keys() == original.keys()
        assert all(torch.equal(exported[name], tensor) for name, tensor in original.items())


# -------------------------------------------------------------------------------------------- steps


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return (
        make_model(root / "student", 200, 32, layers=4, seed=0),
        make_model(root / "teacher", 216, 48, layers=4, seed=1, tied=False, experts=4),
    )


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (((2, 1, True), (1, 2, False)), {"replay": True}),
        (((2, 1, False), (2, 1, True)), {"recompute": "full"}),
        (((1, 2, False), (1, 1, False, 2)), {}),
        (((1, 1, False), (2, 1, True)), {"recompute": "selective", "offload": True}),
    ],
    ids=["TP2 SP | PP2, replay", "TP2 | TP2 SP, recomputed", "PP2 | EP2", "DP2 | TP2 SP"],
)
def test_a_training_step_is_the_one_without(with_engine, pair, layout, options):
    """Scores, kept rows, gradients, their norm and, after three updates, the weights."""
    step = (step_once, *pair, *layout, make_batch(200), {"steps": 3, **options})
    ours, reference = with_engine(2, *step)[0], run_ranks(2, *step)[0]
    assert torch.equal(ours["mask"], reference["mask"])
    for name, expected in vars(reference["scores"]).items():
        torch.testing.assert_close(getattr(ours["scores"], name), expected, rtol=1e-4, atol=1e-5)
    for key in ("loss", "kept_rows", "tokens_trained"):
        assert ours["metrics"][key] == pytest.approx(reference["metrics"][key], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
    assert relative_error(ours["gradients"], reference["gradients"]) < 1e-5
    before = load_file(f"{pair[0]}/model.safetensors")
    moved, expected = (changes(result["weights"], before) for result in (ours, reference))
    assert relative_error(moved, expected) < 1e-3


def step_once(student, teacher, student_parallel, teacher_parallel, batch, options):
    return step_on_ranks(
        student, teacher, student_parallel, teacher_parallel, batch, 200, **options
    )


@pytest.mark.parametrize("family", DENSE)
def test_a_student_of_every_family_has_the_gradients_without(with_engine, hf_dirs, pair, family):
    step = (step_once, hf_dirs[family], pair[1], (2, 1, True), (1, 2, False), make_batch(200), {})
    ours, reference = with_engine(2, *step)[0], run_ranks(2, *step)[0]
    assert relative_error(ours["gradients"], reference["gradients"]) < 1e-5


def changes(weights, before):
    return {name: tensor - before[name] for name, tensor in weights.items()}


def together(tensors):
    return {"all": torch.cat([tensor.flatten() for tensor in tensors.values()])}


# -------------------------------------------------------------------------------------- checkpoints


def make_student(hf_dir, parallel, dtype):
    from megatron.core import parallel_state

    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel import layout, platform

    platform.emulate_cuda()
    parallel_state.destroy_model_parallel()  # of a student before this one
    return Student(hf_dir, layout.student_layout(*parallel), dtype, "none", OPTIMIZER, 100, 200)


def gradient(name, shape, number):
    """A made-up one of a whole parameter, the same on every layout, for the update of a number."""
    generator = torch.Generator().manual_seed(number * 1_000_003 + zlib.crc32(name.encode()))
    return torch.rand(shape, generator=generator) - 0.3


def update(student, number) -> float:
    """Take an update with made-up gradients; the norm by which they were clipped."""
    from megatron_taopd.formats import hf_map
    from megatron_taopd.formats.hf import whole_shapes
    from megatron_taopd.models import weights

    known, layout = hf_map.parameters(student.trunk.hf), student.layout
    shapes = whole_shapes(student.trunk.hf, known)
    student.model.zero_grad_buffer()
    for name, parameter in weights.named_parameters(student.trunk):
        name = name if name in known else "embedding.word_embeddings.weight"  # the last stage's
        whole = gradient(name, shapes[name], number)
        parameter.main_grad.copy_(known[name].mapping.shard(whole, layout.tp_rank, layout.tp))
    return student.step()[0]


def train_and_save(hf_dir, directory, parallel, dtype, updates):
    """Updates, a checkpoint, and two more: the weights there and after each of these, and the norms
    of all gradients."""
    from megatron_taopd.checkpoints.saving import Checkpoints

    student = make_student(hf_dir, parallel, dtype)
    norms = [update(student, number) for number in range(1, updates + 1)]
    checkpoints = Checkpoints(directory, 3, False, print)
    checkpoints.save(updates, student, {})
    checkpoints.close()
    return train_on(student, updates, norms)


def load_and_train(hf_dir, directory, parallel, dtype, updates):
    from megatron_taopd.checkpoints import saving as checkpoint

    student = make_student(hf_dir, parallel, dtype)
    checkpoint.load(directory, updates, student)
    return train_on(student, updates, [])


def train_on(student, updates, norms):
    seen = [copies(student)]
    for number in (updates + 1, updates + 2):
        norms.append(update(student, number))
        seen.append(copies(student))
    return seen, norms


def copies(student):
    return {name: tensor.clone() for name, tensor in student.named_tensors()}


def adamw(weight, norms):
    """[u, n] float64, torch's own AdamW over the final norm's made-up gradients, after each of u
    updates."""
    weight = torch.nn.Parameter(weight.double())
    optimizer = torch.optim.AdamW(
        [weight],
        lr=OPTIMIZER.lr,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
    )
    after = []
    for number, norm in enumerate(norms, start=1):
        whole = gradient("decoder.final_layernorm.weight", weight.shape, number)
        weight.grad = whole.double() * min(1, OPTIMIZER.clip / norm)
        optimizer.step()
        after.append(weight.detach().clone())
    return torch.stack(after)


RESUMED = {  # family, dtype, updates before the checkpoint, layouts that write and read it
    "qwen3, TP2 SP": ("qwen3", torch.float32, 3, (2, 1, True), (2, 1, True)),
    "qwen2, DP2 from TP2": ("qwen2", torch.float32, 3, (2, 1), (1, 1)),
    "llama, PP2, bf16": ("llama", torch.bfloat16, 2, (1, 2), (1, 2)),
    "qwen2-tied, PP2, before any update": ("qwen2-tied", torch.float32, 0, (1, 2), (1, 2)),
}


@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.parametrize("direction", ["with, then without", "without, then with"])
def test_a_checkpoint_resumes_the_other_way(with_engine, hf_dirs, tmp_path, case, direction):
    """The weights that were saved, and then the updates of a run that never stopped: moments and
    their bias correction go on. The run itself is torch's AdamW."""
    family, dtype, updates, written, read = RESUMED[case]
    saves, resumes = with_engine, run_ranks
    if direction == "without, then with":
        saves, resumes = resumes, saves
    run = hf_dirs[family], str(tmp_path)
    (whole, norms), _ = saves(2, train_and_save, *run, written, dtype, updates)
    (resumed, _), _ = resumes(2, load_and_train, *run, read, dtype, updates)
    for name, tensor in whole[0].items():
        assert torch.equal(resumed[0][name], tensor), name
    for before, ours, after in zip(whole[:-1], resumed[1:], whole[1:], strict=True):
        moved, expected = changes(ours, before), changes(after, before)
        if dtype == torch.float32:
            assert relative_error(moved, expected) < 1e-4
        else:  # norms move by less than bf16 can tell
            assert relative_error(together(moved), together(expected)) < 5e-2
    if dtype == torch.float32:
        start = load_file(f"{hf_dirs[family]}/model.safetensors")["model.norm.weight"]
        ours = torch.stack([weights["model.norm.weight"] for weights in resumed[1:]])
        expected = adamw(start, norms)[-2:]
        torch.testing.assert_close(ours.double() - start, expected - start, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("engine", [True, False], ids=["with", "without"])
def test_a_checkpoint_becomes_a_hugging_face_directory(with_engine, hf_dirs, tmp_path, engine):
    """Whichever layers wrote it, and it is verified with the others."""
    saves, verifies = (with_engine, run_ranks) if engine else (run_ranks, with_engine)
    family = hf_dirs["qwen3"]
    (seen, _), _ = saves(2, train_and_save, family, str(tmp_path), (2, 1, True), torch.float32, 1)
    saved = tmp_path / "step_00000001"
    convert.to_hf(saved, tmp_path / "hf")
    converted = load_file(tmp_path / "hf" / "model.safetensors")
    assert converted.keys() == seen[0].keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in seen[0].items())
    for difference, largest in verifies(2, logits_apart, tmp_path / "hf", saved, 1, 2):
        assert difference < 1e-4 < largest


def logits_apart(hf_dir, megatron_dir, tp, pp):
    from megatron.core import parallel_state

    from megatron_taopd.checkpoints import verify
    from megatron_taopd.parallel import platform

    platform.emulate_cuda()
    try:
        return verify.compare_logits(hf_dir, megatron_dir, tp, pp)
    finally:
        parallel_state.destroy_model_parallel()


def load_by_megatron(hf_dir, megatron_dir):
    """Into Megatron's own description of the model, extra states and all, as Megatron-LM does."""
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_taopd.formats import hf as hf_checkpoint
    from megatron_taopd.models import gpt, weights
    from megatron_taopd.parallel import layout, platform

    platform.emulate_cuda()
    try:
        hf, two = hf_checkpoint.load_config(hf_dir), layout.student_layout(2, 1, True)
        trunk = gpt.Trunk(hf, gpt.transformer_config(hf, two, torch.float32), two)
        sharded = trunk.sharded_state_dict(metadata={"dp_cp_group": two.groups.dp_cp})
        loaded = dist_checkpointing.load({"model": sharded}, str(megatron_dir))
        trunk.load_state_dict(loaded["model"])
        return dict(weights.export_weights(trunk))
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_converted_loads_with_and_without(with_engine, hf_dirs, tmp_path, family):
    hf_dir, out = hf_dirs[family], tmp_path / "megatron"
    convert.to_megatron(hf_dir, out)
    original = load_file(f"{hf_dir}/model.safetensors")
    for on_ranks in (with_engine, run_ranks):
        for difference, largest in on_ranks(2, logits_apart, hf_dir, out, 2, 1):
            assert difference < 1e-4 < largest
        for loaded in on_ranks(2, load_by_megatron, hf_dir, out):
            assert all(torch.equal(loaded[name], tensor) for name, tensor in original.items())


# --------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def on_cuda():
    """`run_ranks`, on ranks that have the stand-in and a pretended device."""
    with Apart(TRANSFORMER_ENGINE) as apart:
        [((layer, _), _)] = apart.run(1, pretending, classes_of_layers, STUDENT)
        assert layer == "TELayerNormColumnParallelLinear"
        yield lambda size, function, *args: apart.run(size, pretending, function, *args)


@pytest.mark.parametrize("first", ["with", "without"])
def test_a_run_goes_on_the_other_way(on_cuda, tmp_path, first):
    """On CUDA with TransformerEngine for some steps, and on the CPU for the others: the steps of a
    run on the CPU. A mixture of experts teaches, whose weights come and go."""
    overrides = [
        f"teacher={{path: {make_teachers(tmp_path)['experts']}, offload: true}}",
        "train={schedule: replay, micro_batch_tokens: 80}", "optimizer.warmup_steps=0",
    ]  # fmt: skip
    [(*_, whole)] = run_ranks(1, run, tmp_path / "whole", overrides, 4)
    directory = tmp_path / "run"
    if first == "with":
        [((before, _, _), _)] = on_cuda(1, run, directory, overrides, 2)
        [(after, resumed, records)] = run_ranks(1, run, directory, overrides, 4)
    else:
        [(before, _, _)] = run_ranks(1, run, directory, overrides, 2)
        [((after, resumed, records), _)] = on_cuda(1, run, directory, overrides, 4)
    assert (before, after, resumed) == ([0], [0], [2])
    for ours, expected in zip(curve(records), curve(whole), strict=True):
        assert ours == pytest.approx(expected, rel=1e-3, abs=1e-4)
