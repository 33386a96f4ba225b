"""The product as if on CUDA (`support/pretend_cuda.py`): what would raise there raises here."""

from __future__ import annotations

import asyncio
import re
import shutil
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support import dense
from support.apart import Apart
from support.families import EXPERTS, SIZES, save_random
from support.host_waits import Wait
from support.ranks import run_ranks
from test_mix import write as write_references
from test_train import curve, read_metrics
from test_vocab_map import relabel_tiny_teacher
from transformers import Qwen3MoeConfig

TINY = Path(__file__).parent.parent / "examples" / "tiny_pair"
STUDENT, TEACHER = TINY / "student", TINY / "teacher"
MICRO_BATCHES = Wait("", "micro-batches", "")  # counts those, in all passes of both models


@pytest.fixture(scope="module")
def on_cuda():
    """`run_ranks`, on ranks that believe they have a CUDA device each."""
    with Apart() as apart:
        yield lambda size, function, *args: apart.run(size, pretending, function, *args)


def pretending(function, *args):
    """What the function returns, and what the host waited for: a phase is a span of the monitor,
    but for what happens in a layer, or else in a pass over micro-batches, which are counted, too.
    """
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from support.pretend_cuda import pretend_cuda

    from megatron_taopd.models import pipeline
    from megatron_taopd.monitoring.monitor import Monitor

    waits = pretend_cuda()
    waits.counts.clear()
    run_layer, run_passes = TransformerLayer.forward, pipeline._run

    def layer(self, *arguments, **options):
        with waits.phase("layer"):
            return run_layer(self, *arguments, **options)

    def passes(model, layout, micro_batches, *arguments, **options):
        waits.counts[MICRO_BATCHES] += len(micro_batches)
        with waits.phase("micro-batches"):
            return run_passes(model, layout, micro_batches, *arguments, **options)

    with (
        mock.patch.object(Monitor, "span", waits.of_span(Monitor.span)),
        mock.patch.object(TransformerLayer, "forward", layer),
        mock.patch.object(pipeline, "_run", passes),
    ):
        return function(*args), waits.counts


# -------------------------------------------------------------------------------------- the device


def errors_of(calls):
    """The type and first line of what each expression raises; None of one that raises nothing."""
    names = {
        "torch": torch,
        "dist": dist,
        "device": torch.arange(6.0, device="cuda"),
        "host": torch.arange(6.0),
        "table": torch.zeros(4, 3),
        "table_on_device": torch.zeros(4, 3, device="cuda"),
        "places": torch.tensor([1, 0]),
    }
    found = {}
    for call in calls:
        try:
            eval(call, names)
            found[call] = None
        except Exception as error:
            found[call] = (type(error).__name__, str(error).split("\n")[0])
    return found


MIXED = (
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
)
RAISES = {
    "device + host": MIXED,
    "torch.cat([device, host])": MIXED,
    "torch.stack([device.sum(), host.sum()])": MIXED,
    "torch.where(host > 2, device, device)": MIXED,
    "torch.mm(table_on_device.T, table)": MIXED,
    "torch.isin(device, host)": MIXED,
    "torch.searchsorted(device, host)": MIXED,
    "table_on_device.index_select(0, places)": MIXED,
    "table_on_device.gather(0, places[:, None])": MIXED,
    "table_on_device.scatter_add_(0, places[:, None], table[:2])": MIXED,
    "table_on_device.index_put_((places,), table[:2])": MIXED,
    "table_on_device.masked_fill_(table == 0, 1.0)": MIXED,
    "torch.equal(device, host)": MIXED,
    "torch.add(device, 1, out=host)": MIXED,
    "table[places.cuda()]": "indices should be either on cpu or on the same device",
    "device.numpy()": "can't convert cuda:0 device type tensor to numpy",
    "dist.all_reduce(host)": "No backend type associated with device type cpu",
    "dist.all_gather_into_tensor(host.new_empty(6), device)": "No backend type associated",
}
ALLOWED = [
    "device * host.sum()",  # a scalar may come from anywhere
    "device + 1",
    "table_on_device[places]",
    "table_on_device.index_put_((places,), torch.tensor(1.0))",
    "device.copy_(host)",
    "host.copy_(device)",
    "device.cpu() + host",
    "torch.tensor([device.sum(), host.sum()])",
    "dist.all_reduce(device)",
    "dist.all_gather_object([None], 'text')",
]


def test_devices_that_do_not_match_raise(on_cuda):
    [(found, _)] = on_cuda(1, errors_of, [*RAISES])
    for call, message in RAISES.items():
        assert found[call] is not None and message in found[call][1], (call, found[call])


def test_what_cuda_allows_is_allowed(on_cuda):
    [(found, _)] = on_cuda(1, errors_of, ALLOWED)
    assert found == dict.fromkeys(ALLOWED)


def devices_in_the_backward_pass():
    """Where saved tensors and gradients say they are; and a gradient that was computed there."""
    seen = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            seen.extend(str(t.device) for t in (x, grad, grad.new_zeros(1), x.sum()))
            return 2 * x * grad

    model = torch.nn.Linear(3, 3, bias=False).to("cuda")
    model.weight.data.copy_(torch.eye(3))
    Square.apply(model(torch.arange(3.0, device="cuda"))).sum().backward()
    return seen, str(model.weight.grad.device), model.weight.grad.cpu()


def test_the_backward_pass_is_on_the_device(on_cuda):
    [((seen, device, grad), _)] = on_cuda(1, devices_in_the_backward_pass)
    assert (seen, device) == (["cuda:0"] * 4, "cuda:0")
    x = torch.arange(3.0)
    assert torch.equal(grad, 2 * x[:, None] * x)


def wait_in_phases():
    from support.pretend_cuda import pretend_cuda

    waits, x, host = pretend_cuda(), torch.arange(4.0, device="cuda"), torch.zeros(4)
    waits.counts.clear()
    with waits.phase("outer"):
        x.tolist()
        with waits.phase("inner"):
            [x.sum().item() for _ in range(3)]
        x[x > 1]  # as many as there are
    with waits.phase("copies"):
        x.copy_(host)
        x.to("cpu", non_blocking=True)
        host.to("cuda")
        torch.cuda.synchronize()
        (x + x).to("cuda")  # is there
    return waits.by_phase(), waits.by_line("inner")


def test_host_waits_are_counted_by_phase_and_line(on_cuda):
    [((phases, lines), _)] = on_cuda(1, wait_in_phases)
    assert phases == {"outer": 2, "inner": 3, "copies": 3}
    [line] = lines
    assert line.startswith("tests/test_pretend_cuda.py:") and line.endswith(" <listcomp>")


def head_gradients(size, at_once):
    """Gradients of bf16 hidden states and an fp32 main_grad of `size` ids of 448 rows of a head."""
    from support.pretend_cuda import pretend_cuda

    from megatron_taopd.parallel.vocab import VocabShard, linear_divergence

    pretend_cuda()
    hidden, weight, *teacher = (t.cuda() for t in odd_heads(size))
    hidden.requires_grad_(), weight.requires_grad_()
    weight.main_grad = torch.ones(weight.shape, device="cuda")
    row_weight = torch.ones(len(hidden), device="cuda")
    shard = VocabShard(0, len(weight), None, size)
    if at_once:
        linear_divergence(hidden, weight, *teacher, shard, "jsd", 4, row_weight).backward()
    else:
        linear_divergence(hidden, weight, *teacher, shard, "jsd", 4).backward(row_weight)
    return hidden.grad.cpu(), weight.main_grad.cpu() - 1


def odd_heads(size):
    generator = torch.Generator().manual_seed(0)
    sizes = ((11, 24), (448, 24), (11, 40), (448, 40))
    heads = [torch.randn(s, generator=generator).bfloat16() for s in sizes]
    for weight in heads[1::2]:
        weight /= 8  # so that no token has all the mass
        weight[size:] = torch.nan  # in rows that take no part
    return heads


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("size", [447, 384, 100])  # three blocks and a rest; no rest; a rest alone
def test_a_head_in_half_precision_sums_its_gradients_in_fp32(on_cuda, size, at_once):
    """By matmuls that only CUDA has: the sum over the vocabulary in two parts, the head's gradient
    on top of what is in its buffer."""
    [((hidden, weight), _)] = on_cuda(1, head_gradients, size, at_once)
    z, w, z_t, w_t = (t.double() for t in odd_heads(size))
    z.requires_grad_(), w.requires_grad_()
    dense.divergence(z @ w[:size].t(), z_t @ w_t[:size].t(), "jsd").sum().backward()
    # Of what CUDA has, only the gradient of the logits is rounded to bf16, and the result.
    for got, exact in ((hidden, z.grad), (weight, w.grad)):
        assert (got.double() - exact).norm() < 2**-7 * exact.norm()
    assert not weight[size:].any()


def copies_to_the_host():
    """What was copied, twice; the memory of each copy, of all, and what the host waited for."""
    from support.pretend_cuda import pretend_cuda

    from megatron_taopd.parallel.copies import HostCopies

    waits, host, registered = pretend_cuda(), HostCopies(), []
    waits.counts.clear()
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, _flags: registered.append((address, size)) or 0,
        cudaHostUnregister=lambda address: registered.append((address, None)) or 0,
    )
    found = []
    with mock.patch.object(torch.cuda, "cudart", lambda: runtime):
        for scale in (1, 2, 2):  # the same sizes, and then larger ones
            tensors = [torch.arange(5000.0 * scale), torch.tensor(7), torch.zeros(0, 3)]
            tensors += [torch.arange(6).view(2, 3).t().bfloat16()]
            device = [tensor.cuda() for tensor in tensors]
            before = waits.by_phase()[""]
            copies, wait = host.take(device)
            during = waits.by_phase()[""] - before
            wait()
            same = all(map(torch.equal, copies, tensors))
            own = all(c.untyped_storage().nbytes() == c.nbytes for c in copies)
            found.append((same, own, during, waits.by_phase()[""] - before, copies[0].data_ptr()))
    return found, registered


def test_copies_to_the_host_share_pinned_memory_of_their_size(on_cuda):
    [((found, registered), _)] = on_cuda(1, copies_to_the_host)
    assert [each[:4] for each in found] == [(True, True, 0, 1)] * 3  # and only `wait` waits
    small, large = 20_032 + 64 + 64, 40_000 + 64 + 64  # multiples of 64
    first, second = found[0][4], found[1][4]
    assert registered == [(first, small), (first, None), (second, large)]
    assert found[2][4] == second


def held_by_ranks():
    from megatron_taopd.parallel.memory import rank_memory

    rank = dist.get_rank()
    with mock.patch.multiple(
        torch.cuda,
        max_memory_reserved=lambda: (5 + rank) << 20,
        max_memory_allocated=lambda: (4 - rank) << 20,
    ):
        return rank_memory()


def test_the_log_has_the_memory_that_is_reserved(on_cuda):
    """What the plan counts, which other processes cannot have; and what tensors took of it."""
    found = {"memory/most_mib": 6, "memory/most_rank": 1, "memory/least_mib": 5}
    found["memory/most_allocated_mib"] = 4
    assert [answer for answer, _ in on_cuda(2, held_by_ranks)] == [found] * 2


# ---------------------------------------------------------------------------------------- the loop

SHORT = [
    str(TINY.parent / "tiny_pair.yaml"), "student.parallel={tp: 1, pp: 1}",
    "teacher.parallel={tp: 1, pp: 1}", "train.steps=2", "checkpoint.every=1", "rollout.prompts=4",
    "rollout.max_new_tokens=8", "eval={limit: 2, every: 1}", "log.tensorboard=false",
]  # fmt: skip
HIDDEN = "teacher={engine: sglang, form: hidden_states}"
TOPK = "teacher={engine: sglang, form: topk, topk: 32}"
# Every schedule with every loss but one, every form of teacher with both schedules.
RUNS = {
    "replay, reverse_kl, Megatron": [
        "train={schedule: replay, recompute: full, micro_batch_tokens: 80}",
        "selection={selector: teachability_entropy, ratio: 0.4}",
    ],
    "replay, jsd, hidden states": [
        HIDDEN, "loss.kind=jsd", "train={schedule: replay, head_memory_mib: 1}",
        "checkpoint.asynchronous=false", "rollout.stream=false", "rollout.samples=2",
    ],
    "replay, skewed_reverse_kl, top-K": [
        TOPK, "loss={kind: skewed_reverse_kl, alpha: 0.3}", "train.schedule=replay",
        "selection={concentrate: 0.3, ratio: 0.3}",
        "eval={samples: 2, temperature: 1, pass_at: [2]}",
    ],
    "replay, sampled_token, offloaded": [
        "teacher.offload=true", "loss.kind=sampled_token", "train.schedule=replay",
        "rollout={horizon: auto, horizon_floor: 2}", "guard.teacher_every=1",
    ],
    "two passes, forward_kl, a mixture of experts": [
        "teacher.path={experts}", "loss.kind=forward_kl",
        "train={mini_batches: 2, recompute: selective}",
        "selection={selector: random, ratio: 0.4}", "optimizer.clip=0",
    ],
    "two passes, jsd, Megatron, other words": [
        "teacher.path={words}", "loss={kind: jsd, beta: 0.2}",
        "selection={selector: tip, concentrate: 0.2}",
        "rollout={temperature: 0.7, top_p: 0.9, top_k: 50, mix: {dataset: 0.5}}",
        "data.prompts={references}", "data={response_column: solution, excluded_column: hidden}",
        "train.micro_batch_tokens=80",
    ],
    "two passes, reverse_kl, top-K": [
        TOPK, "selection.selector=full", "train.mini_batches=3", "optimizer.decay=constant",
    ],
    "two passes, sampled_token, hidden states": [
        HIDDEN, "loss.kind=sampled_token", "train.mini_batches=2", "rollout.horizon=6",
    ],
    "TP2 SP | PP2, replay, forward_kl": [
        "student.parallel={tp: 2, sequence: true}", "teacher={parallel: {pp: 2}, offload: true}",
        "train.schedule=replay", "loss.kind=forward_kl", "teacher.path={words}",
        "selection.selector=prefix_share",
    ],
    "DP2 | TP2, two passes, reverse_kl": [
        "teacher.path={student}", "teacher={source: student_ema, ema: 0.5, system: so}",
        "teacher={parallel: {tp: 2, sequence: true}, offload: true}",
        "selection={selector: prefix, ratio: 0.5}",
        "train={mini_batches: 2, micro_batch_tokens: 80}", "loss={weights: discrepancy, gamma: 2}",
    ],
    "PP2 | served, two passes, skewed_reverse_kl": [
        "student.parallel={pp: 2}", HIDDEN, "loss.kind=skewed_reverse_kl", "train.recompute=full",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """The student, experts, a teacher with other ids that lacks some of the student's words; and
    prompts with reference responses."""
    return make_teachers(tmp_path_factory.mktemp("teachers"))


def make_teachers(directory):
    experts = Qwen3MoeConfig(**SIZES | {"vocab_size": 1152}, **EXPERTS, norm_topk_prob=True)
    save_random(experts, directory / "experts")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TEACHER / file, directory / "experts")
    lacking = {word: word.upper() for word in ("well", "okay", "so", "then")}
    return {
        "student": STUDENT,
        "experts": directory / "experts",
        "words": relabel_tiny_teacher(directory / "words", lacking, seed=6),
        "references": write_references(directory / "references.jsonl"),
    }


def run(run_dir, overrides, *steps):
    """A run that ends, and is resumed, after so many steps: (exit statuses, steps that it resumed
    from, metrics)."""
    from megatron_taopd import build
    from megatron_taopd.checkpoints import saving as checkpoint
    from megatron_taopd.train import main

    resumed, load = [], checkpoint.load
    with (
        mock.patch.object(build, "begin_teacher_servers", stand_in),
        mock.patch.object(checkpoint, "load", lambda *a: (resumed.append(a[1]), load(*a))[1]),
    ):
        statuses = [
            main([*SHORT, f"run.dir={run_dir}", *overrides, f"train.steps={done}"])
            for done in steps
        ]
    return statuses, resumed, read_metrics(run_dir)


def stand_in(config, _key):
    """The teacher's servers, within this process."""
    from support.served_teacher import ServedTeacher

    from megatron_taopd.serving.model import ServedModel

    if config.teacher.engine != "sglang":
        return None
    served = None if dist.get_rank() else ServedTeacher(config.teacher.path)
    begun: Future = Future()
    begun.set_result((ServedModel.of(config.teacher.path, 128), served))
    return begun


@pytest.mark.parametrize("name", RUNS)
def test_a_run_takes_the_steps_that_it_takes_on_the_cpu(on_cuda, teachers, tmp_path, name):
    """It is resumed for its last step, and takes what it takes on the CPU in one go."""
    named = ("path={", "prompts={")
    overrides = [o.format(**teachers) if any(n in o for n in named) else o for o in RUNS[name]]
    ranks = 2 if "|" in name else 1
    [(found, waits), *_] = on_cuda(ranks, run, tmp_path / "cuda", overrides, 2, 3)
    statuses, resumed, records = found
    assert (statuses, resumed) == ([0, 0], [2])
    [(*_, on_cpu), *_] = run_ranks(ranks, run, tmp_path / "cpu", overrides, 3)
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    for ours, reference in zip(curve(records), curve(on_cpu), strict=True):
        assert ours == pytest.approx(reference, rel=1e-4, abs=1e-5)
    phases = {wait.phase for wait in waits}
    assert {"rollout", "teacher", "scoring", "training", "sync", "checkpoint", "eval"} <= phases
    updates = 3 * max(map(int, re.findall(r"mini_batches\W+(\d)", " ".join(overrides))), default=1)
    given = str(overrides)
    kinds = ("pp: 2" in given, "concentrate" in given, name.startswith("DP2"))
    others = {"experts": "experts" in given, "weighted": "weights: discrepancy" in given}
    check_waits(waits, 3, updates, *kinds, **others)


# What a step may wait for, however many layers, micro-batches, rows and parameters there are.
OF_A_STEP = {
    "step": 6,  # was any rank signalled? after each phase
    "teacher": 3,  # of a served one: rank 0 has its rows, and tells so
    "scoring": 1,  # is anything not finite? and the gap to the engine
    "selection": 3,  # what is kept of each sequence, what the log says, which rows of this rank's
    "sync": 0,
}
OF_AN_UPDATE = 2  # the losses, which the guard looks at, and the gradient norm
OF_A_MOVE = 1  # which rows come to a rank that trains what another one has scored
# Prices, each with four thresholds and a sum; before them which rows are near, after them the cuts.
OF_CONCENTRATING = 31 * 5 + 5
BY_EXPERTS = "moe/token_dispatcher.py"  # without TransformerEngine and with it
LAYERS = SIZES["num_hidden_layers"]


def check_waits(
    waits,
    steps: int,
    updates: int,
    pipelined: bool,
    concentrated: bool,
    moved: bool,
    experts: bool,
    weighted: bool,
) -> None:
    """The host waits no more than it may, apart from the ends of spans, whose time is taken.

    A pipeline tells each micro-batch's shape, at most twice; after a pass with gradients the
    schedule looks at the number of rows. Weights of rows come to the host once a step. Each layer
    of experts waits once for how many tokens each of them gets: the sizes of matrix products are
    the host's.
    """
    micro_batches = waits[MICRO_BATCHES]
    assert micro_batches > steps
    once = 2  # the absent ids among a shard's columns, of the run and of its resumption
    of_shapes = 2 * micro_batches if pipelined else 0
    allowed = {"layer": 0, "micro-batches": of_shapes + updates + once}
    allowed |= {phase: steps * most for phase, most in OF_A_STEP.items()}
    allowed["selection"] += concentrated * steps * OF_CONCENTRATING
    allowed["training"] = updates * (OF_AN_UPDATE + moved * OF_A_MOVE) + weighted * steps
    for_experts = 0
    for phase, most in allowed.items():
        found = {}
        for wait, count in waits.items():
            if phase == "layer" and wait.kind == "event" and BY_EXPERTS in wait.line:
                for_experts += count
            elif wait.phase == phase and wait.kind != "synchronize":
                found[f"{wait.kind}: {wait.line}"] = count
        assert sum(found.values()) <= most, (phase, most, found)
    assert for_experts <= LAYERS * micro_batches
    assert bool(for_experts) == experts


@pytest.mark.parametrize("schedule", ["two_pass", "replay"])
def test_a_run_in_half_precision(on_cuda, tmp_path, schedule):
    """Flash attention of packed sequences, bf16 operands of heads, fp32 master weights."""
    overrides = ["train={precision: bf16, micro_batch_tokens: 80}", f"train.schedule={schedule}"]
    [((statuses, resumed, records), _)] = on_cuda(1, run, tmp_path / "run", overrides, 1, 2)
    assert (statuses, resumed) == ([0, 0], [1])
    for record in curve(records):
        assert 0 < record["loss"] < 20 and record["rollout/logprob_gap_max"] < 0.1


# ------------------------------------------------------------------------------ without the loop


def doctor(run_dir):
    from megatron.core import parallel_state

    from megatron_taopd import config
    from megatron_taopd.preflight.examine import examine

    options = [*SHORT[1:3], f"run.dir={run_dir}", "data.limit=20", "rollout.max_new_tokens=8"]
    try:
        return dict(examine(config.load(SHORT[0], options), ranks=1, quick=False))["models"]
    finally:
        parallel_state.destroy_model_parallel()


def test_the_doctor_compares_the_models(on_cuda, tmp_path):
    [(findings, _)] = on_cuda(1, doctor, tmp_path / "run")
    assert [finding.level for finding in findings] == ["ok", "ok"]
    assert "log p of 8 greedy tokens differs by" in findings[0].what


def fill_and_score(directory):
    from megatron.core import parallel_state

    from megatron_taopd.config.schema import DataSection
    from megatron_taopd.diagnostics.bank import add_rollouts
    from megatron_taopd.diagnostics.engines import local_engine
    from megatron_taopd.diagnostics.score import score_bank
    from megatron_taopd.parallel import platform
    from megatron_taopd.rollout.engine import Sampling

    platform.initialize()
    engine, sampling = partial(local_engine, student=STUDENT, seed=0), Sampling(8, samples=2)
    try:
        add_rollouts(
            directory / "bank",
            STUDENT,
            TINY / "test.jsonl",
            sampling,
            0,
            engine,
            DataSection(limit=4),
        )
        table = directory / "table.parquet"
        means = score_bank(directory / "bank", STUDENT, TEACHER, table, view=1)
        return {name: mean for name, mean in means.items() if name != "out"}
    finally:
        parallel_state.destroy_model_parallel()


def test_a_bank_is_filled_and_scored(on_cuda, tmp_path):
    for name in ("cuda", "cpu"):
        (tmp_path / name).mkdir()
    [(means, _)] = on_cuda(1, fill_and_score, tmp_path / "cuda")
    [reference] = run_ranks(1, fill_and_score, tmp_path / "cpu")
    assert means == pytest.approx(reference, rel=1e-4, abs=1e-5)


def convert_and_verify(out):
    from megatron.core import parallel_state

    from megatron_taopd.checkpoints import verify
    from megatron_taopd.formats import convert

    convert.to_megatron(STUDENT, out)
    try:
        found = verify.compare_tensors(STUDENT, out, convert.ignore)
        return found.different, verify.compare_logits(STUDENT, out)
    finally:
        parallel_state.destroy_model_parallel()


def test_a_conversion_is_verified(on_cuda, tmp_path):
    [((different, (difference, largest)), _)] = on_cuda(
        1, convert_and_verify, tmp_path / "megatron"
    )
    assert different == 0 and difference < 1e-4 < largest


class Client:
    """What a server answers to the requests of a push."""

    async def post(self, _replica, _path, _payload, _timeout):
        return {"meta_info": {"weight_version": "0"}}

    def spawn(self, coroutine) -> Future:
        future: Future = Future()
        future.set_result(asyncio.run(coroutine))
        return future


def push(directory):
    """The student's weights as two ways of weight sync send them, by name, and where they were."""
    from megatron.core import parallel_state
    from support.step import OPTIMIZER

    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel.layout import student_layout
    from megatron_taopd.rollout import weight_sync
    from megatron_taopd.rollout.weight_sync import disk, distributed

    broadcast, devices, written = {}, set(), {}
    entries = iter(())

    class Group:
        def broadcast(self, tensors, _options):
            devices.add(str(tensors[0].device))
            bucket = next(entries)
            broadcast.update({name: t.cpu() for name, t in bucket.tensors()})
            return SimpleNamespace(is_completed=lambda: True, wait=lambda: None)

        def abort(self): ...

    def send(self, client, targets, bucket, where):
        nonlocal entries
        self._wait_for_last()  # the one before, whose entries these were
        entries = iter([bucket])
        return sending(self, client, targets, bucket, where)

    def last(self, client, targets):
        self._writer.write_index()
        for file in self._checkpoint.glob("*.safetensors"):
            written.update(load_file(file))

    student = Student(
        STUDENT, student_layout(1, 1), torch.float32, "none", OPTIMIZER, 10, common_vocabulary=1152
    )
    target, tensors = (
        [SimpleNamespace(url="http://127.0.0.1:1", tp=1)],
        weight_sync.Repeatable(student.named_tensors),
    )
    sending = distributed.DistributedSync._send
    try:
        with (
            mock.patch.object(distributed, "join_group", lambda *_: Group()),
            mock.patch.object(distributed.DistributedSync, "_send", send),
            mock.patch.object(disk.DiskSync, "_last", last),
        ):
            for way in (
                weight_sync.DistributedSync,
                partial(weight_sync.DiskSync, directory=directory),
            ):
                way(STUDENT, 150_000).push(Client(), target, tensors, 1)
    finally:
        parallel_state.destroy_model_parallel()
    return broadcast, devices, written


def test_weights_are_sent_from_the_device(on_cuda, tmp_path):
    [((broadcast, devices, written), _)] = on_cuda(1, push, tmp_path)
    assert devices == {"cuda:0"}
    expected = load_file(STUDENT / "model.safetensors")
    for sent in (broadcast, written):
        assert sent.keys() == expected.keys()
        assert all(torch.equal(sent[name], tensor) for name, tensor in expected.items())
