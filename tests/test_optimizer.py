"""The student's optimizer steps next to torch's AdamW in float64, fresh and across a resume whose
configuration is another."""

from __future__ import annotations

import math
import zlib
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from support.ranks import run_ranks
from support.step import make_model

# Each of them matters: gradients are clipped in every other step, ε is as large as they are.
SETTINGS = dict(
    lr=1e-2, min_lr=1e-3, decay="cosine", warmup_steps=3, weight_decay=0.3, beta1=0.8, beta2=0.95,
    eps=1e-3, clip=1.0,
)  # fmt: skip
BEFORE, STEPS = 5, 10  # updates before a resume, and of the whole run


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "student"
    return make_model(directory, vocab_size=128, hidden_size=32, layers=2, seed=0)


def rate(settings, update, steps):
    """The learning rate of an update, counted from 1."""
    if update <= settings.warmup_steps:
        return settings.lr * update / settings.warmup_steps
    if settings.decay == "constant":
        return settings.lr
    left = (steps - update) / (steps - settings.warmup_steps)
    if settings.decay == "cosine":
        left = (1 + math.cos(math.pi * (1 - left))) / 2
    return settings.min_lr + left * (settings.lr - settings.min_lr)


class Reference:
    """torch's AdamW over whole tensors in float64; weight decay is for matrices."""

    def __init__(self, tensors, settings):
        self.weights = {name: torch.nn.Parameter(t.double()) for name, t in tensors.items()}
        of_dim = [[w for w in self.weights.values() if w.dim() == dim] for dim in (2, 1)]
        self.adam = torch.optim.AdamW([{"params": weights} for weights in of_dim])
        self.settings = settings

    def step(self, gradients, update, steps):
        """(gradient norm before clipping, learning rate)"""
        settings, weights = self.settings, self.weights
        matrices, vectors = self.adam.param_groups
        for group, weight_decay in ((matrices, settings.weight_decay), (vectors, 0.0)):
            group.update(
                lr=rate(settings, update, steps),
                weight_decay=weight_decay,
                betas=(settings.beta1, settings.beta2),
                eps=settings.eps,
            )
        for name, gradient in gradients.items():
            weights[name].grad = gradient.double()
        most = settings.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), most).item()
        self.adam.step()
        return norm, matrices["lr"]


def make_student(student_dir, parallel, dtype, settings, steps):
    from megatron.core import parallel_state

    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform

    platform.emulate_cuda()
    parallel_state.destroy_model_parallel()  # of a student before this one
    layout = layouts.student_layout(*parallel)
    return Student(student_dir, layout, dtype, "none", settings, steps, 128)


def make_up_gradients(student, update):
    """Gradients that depend on update, parameter and shard alone; whole, by Hugging Face name.
    Their norm is above 1 in every other update, and below 1 in the others."""
    from megatron_taopd.models import weights

    scale = 2e-2 if update % 2 else 2e-3
    student.model.zero_grad_buffer()
    for name, parameter in weights.named_parameters(student.trunk):
        if student.trunk.hf.tie_word_embeddings:  # of which the last stage has its own copy
            name = name.replace("output_layer", "embedding.word_embeddings")
        rank = student.layout.tp_rank if getattr(parameter, "tensor_model_parallel", False) else 0
        seed = zlib.crc32(f"{update} {name} {rank}".encode())
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.main_grad.copy_((scale * gradient).to(parameter.dtype))
    exported = weights.export_weights(student.trunk, read=lambda p: p.main_grad.to(p.dtype))
    return {name: tensor.clone() for name, tensor in exported}


def follow(student, reference, updates, steps):
    """Take updates with both; the student's (norm, learning rate) of each, as expected."""
    taken = []
    for update in updates:
        gradients = make_up_gradients(student, update)
        taken.append(student.step())
        assert taken[-1] == pytest.approx(reference.step(gradients, update, steps), rel=1e-5)
    return taken


def errors(student, reference):
    """The largest deviation in any weight."""
    weights = dict(student.named_tensors())
    assert weights.keys() == reference.weights.keys()
    return max((weights[n].double() - w).abs().max().item() for n, w in reference.weights.items())


def whole_schedule(student_dir, parallel, settings):
    student = make_student(student_dir, parallel, torch.float32, settings, STEPS)
    reference = Reference(dict(student.named_tensors()), settings)
    taken = follow(student, reference, range(1, STEPS + 1), STEPS)
    return taken, errors(student, reference)


@pytest.mark.parametrize("parallel", [(2, 1), (1, 2), (1, 1)], ids=["TP2", "PP2", "DP2"])
def test_updates_are_those_of_adamw(student_dir, parallel):
    """Through warm-up and decay to the end; gradients are clipped in some of them."""
    for taken, error in run_ranks(2, whole_schedule, student_dir, parallel, namespace()):
        norms, rates = zip(*taken, strict=True)
        assert min(norms) < 0.7 and max(norms) > 2
        assert rates[2] == 1e-2 and rates[-1] == pytest.approx(1e-3, rel=1e-12)
        assert error < 2e-6  # each setting's mistake is larger than 1e-4


@pytest.mark.parametrize(
    "parallel",
    [(1, 1, False, 0, 2), (2, 1, True, 0, 2), (1, 2, False, 0, 2)],
    ids=["EP2 DP2", "TP2 SP EP2", "PP2 EP2"],
)
def test_updates_of_experts_are_those_of_adamw(tmp_path, parallel):
    """Two optimizers clip by one norm, in which every expert counts once."""
    student = make_model(tmp_path, 128, 32, layers=2, seed=0, tied=False, experts=4)
    for taken, error in run_ranks(4, whole_schedule, student, parallel, namespace()):
        norms = [norm for norm, _rate in taken]
        assert min(norms) < 1 and max(norms) > 2
        assert error < 2e-6


def namespace(**changed):
    return SimpleNamespace(**SETTINGS | changed)


def small_updates_in_bf16(student_dir, parallel, settings):
    """The largest deviation in bf16's spacings; and if each update had been rounded at once."""
    student = make_student(student_dir, parallel, torch.bfloat16, settings, STEPS)
    start = {name: tensor.clone() for name, tensor in student.named_tensors()}
    reference = Reference(start, settings)
    follow(student, reference, range(1, STEPS + 1), STEPS)
    ours = dict(student.named_tensors())
    matrix = "model.layers.0.mlp.up_proj.weight"
    expected = reference.weights[matrix].detach()
    spacing = 2.0 ** (expected.abs().log2().floor() - 7)
    deviation = ((ours[matrix].double() - expected).abs() / spacing).max().item()
    unmoved = (start[matrix].double() - expected).abs() / spacing
    return ours[matrix].dtype, deviation, unmoved.max().item()


def test_masters_in_fp32_keep_what_bf16_would_lose(student_dir):
    settings = namespace(lr=2e-4, min_lr=2e-4, decay="constant", warmup_steps=0, weight_decay=0.0)
    for dtype, deviation, unmoved in run_ranks(
        2, small_updates_in_bf16, student_dir, (2, 1), settings
    ):
        assert dtype == torch.bfloat16
        assert deviation <= 0.51 and unmoved > 1


def rates(student_dir, cases):
    """Of every update of whole runs: {(decay, warm-up): …}"""
    found = {}
    for decay, warmup_steps in cases:
        settings = namespace(decay=decay, warmup_steps=warmup_steps)
        student = make_student(student_dir, (1, 1), torch.float32, settings, STEPS)
        found[decay, warmup_steps] = []
        for update in range(1, STEPS + 1):
            make_up_gradients(student, update)
            found[decay, warmup_steps].append(student.step()[1])
    return found


def test_every_schedule_to_its_end(student_dir):
    cases = [(decay, warmup) for decay in ("constant", "cosine", "linear") for warmup in (0, 1, 4)]
    cases += [("cosine", STEPS), ("linear", STEPS + 5)]  # a run that ends in its warm-up
    [found] = run_ranks(1, rates, student_dir, cases)
    for decay, warmup in cases:
        settings = namespace(decay=decay, warmup_steps=warmup)
        expected = [rate(settings, update, STEPS) for update in range(1, STEPS + 1)]
        assert found[decay, warmup] == pytest.approx(expected, rel=1e-12), (decay, warmup)
    assert found["linear", 0][-1] == pytest.approx(1e-3) and found["constant", 0][-1] == 1e-2


def resumed(student_dir, directory, before, after, steps):
    """Half of the updates on TP2, the others by other settings on DP2."""
    from megatron_taopd.checkpoints import saving as checkpoint

    student = make_student(student_dir, (2, 1), torch.float32, before, STEPS)
    reference = Reference(dict(student.named_tensors()), before)
    follow(student, reference, range(1, BEFORE + 1), STEPS)
    checkpoints = checkpoint.Checkpoints(directory, 1, False, print)
    checkpoints.save(BEFORE, student, {})
    checkpoints.close()

    student = make_student(student_dir, (1, 1), torch.float32, after, steps)
    assert checkpoint.load(directory, BEFORE, student)["step"] == BEFORE
    assert student.scheduler.num_steps == BEFORE
    as_before = Reference(dict(student.named_tensors()), before)
    as_before.adam.load_state_dict(deepcopy(reference.adam.state_dict()))
    reference.settings = after
    for update in range(BEFORE + 1, steps + 1):
        follow(student, reference, [update], steps)
        as_before.step(make_up_gradients(student, update), update, STEPS)
    return errors(student, reference), errors(student, as_before)


CHANGED = {
    "nothing": {},
    "lr": dict(lr=3e-2),
    "min_lr": dict(min_lr=8e-3),
    "decay": dict(decay="linear"),
    "no decay": dict(decay="constant", min_lr=None),
    "warmup_steps": dict(warmup_steps=7),
    "weight_decay": dict(weight_decay=0.9),
    "beta1": dict(beta1=0.3),
    "beta2": dict(beta2=0.7),
    "eps": dict(eps=1e-1),
    "clip": dict(clip=0.3),
    "no clip": dict(clip=0.0),
    "more steps": {},
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_resumed_run_follows_its_configuration(student_dir, tmp_path, name):
    """Each setting at another value; moments and counts of steps stay."""
    steps = STEPS + 6 if name == "more steps" else STEPS
    arguments = student_dir, str(tmp_path), namespace(), namespace(**CHANGED[name]), steps
    for error, as_before in run_ranks(2, resumed, *arguments):
        assert error < 2e-6
        assert (as_before < 2e-6) == (name == "nothing")
        assert name == "nothing" or as_before > 1e-4  # so the setting is seen


def resumed_in(student_dir, directory, before, after):
    """A checkpoint in one precision, resumed in the other: the largest deviation from AdamW at the
    end, and bf16's half spacing there."""
    from megatron_taopd.checkpoints import saving as checkpoint

    settings = namespace()
    student = make_student(student_dir, (2, 1), before, settings, STEPS)
    reference = Reference(dict(student.named_tensors()), settings)
    for update in range(1, BEFORE + 1):
        reference.step(make_up_gradients(student, update), update, STEPS)
        student.step()
    checkpoints = checkpoint.Checkpoints(directory, 1, False, print)
    checkpoints.save(BEFORE, student, {})
    checkpoints.close()
    student = make_student(student_dir, (1, 1), after, settings, STEPS)
    assert checkpoint.load(directory, BEFORE, student)["step"] == BEFORE
    for update in range(BEFORE + 1, STEPS + 1):
        reference.step(make_up_gradients(student, update), update, STEPS)
        student.step()
    half = max(2.0 ** (w.abs().max().log2().floor().item() - 8) for w in reference.weights.values())
    return errors(student, reference), half


@pytest.mark.parametrize(
    ("before", "after"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_the_precision_may_change(student_dir, tmp_path, before, after):
    """In bf16 the weights are AdamW's, rounded; resumed from it in fp32, they are its masters."""
    for error, half in run_ranks(2, resumed_in, student_dir, str(tmp_path), before, after):
        assert error < (2e-6 if after == torch.float32 else 1.01 * half)


def trained_on(student_dir, directory):
    """A checkpoint at the end of a run, and the rates of one that goes on with twice the steps."""
    from megatron_taopd.checkpoints import saving as checkpoint

    student = make_student(student_dir, (1, 1), torch.float32, namespace(), BEFORE)
    for update in range(1, BEFORE + 1):
        make_up_gradients(student, update)
        last = student.step()[1]
    checkpoints = checkpoint.Checkpoints(directory, 1, False, print)
    checkpoints.save(BEFORE, student, {})
    checkpoints.close()
    student = make_student(student_dir, (1, 1), torch.float32, namespace(), 2 * BEFORE)
    checkpoint.load(directory, BEFORE, student)
    found = []
    for update in range(BEFORE + 1, 2 * BEFORE + 1):
        make_up_gradients(student, update)
        found.append(student.step()[1])
    return last, found


def test_a_run_that_was_done_decays_to_its_new_end(student_dir, tmp_path):
    [(last, found)] = run_ranks(1, trained_on, student_dir, str(tmp_path))
    assert last == pytest.approx(1e-3)
    expected = [rate(namespace(), update, 10) for update in range(6, 11)]
    assert found == pytest.approx(expected, rel=1e-12) and found[0] > 5e-3
