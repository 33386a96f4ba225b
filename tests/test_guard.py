"""What a step is skipped for, on real ranks: what is said of it, and that it changes nothing."""

from __future__ import annotations

import hashlib
import io
import math
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from test_train import LAYOUTS, curve, train

from megatron_taopd.checkpoints.files import steps
from megatron_taopd.parallel.faults import Fault, listed
from megatron_taopd.step.guard import Guard, Jump
from megatron_taopd.step.output_heads import TopkOutputHeads
from megatron_taopd.step.scoring import culprits
from megatron_taopd.teacher.topk import TopkRows
from megatron_taopd.types import TokenScores

TP2, DP2 = LAYOUTS["TP2 | PP2"], LAYOUTS["DP2 | TP2"]
QUICK = ["eval.at_start=false", "checkpoint.export_hf=false", "optimizer.warmup_steps=0"]
NAN = torch.nan


def faulty_train(overrides, spoilt, after=0):
    """`train` with something spoilt in some steps {step: what}, counted from its first: (status,
    records, whether the skipped steps left the student as it was, what was printed)."""
    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel.faults import Fault
    from megatron_taopd.step import distiller, guard, training
    from megatron_taopd.teacher import teachers

    here = {"step": 0}
    kept = []
    patched = [
        (distiller.Distiller, "learn"), (teachers, "dispatch"), (distiller, "score"),
        (training, "backward"), (training, "kept_row_loss"), (Student, "step"),
        (distiller, "choose"), (guard, "ENOUGH"),
    ]  # fmt: skip
    originals = [getattr(owner, name) for owner, name in patched]
    learn, dispatch, score, backward, loss, take, choose, _ = originals

    def now(wanted):
        return spoilt.get(here["step"]) == wanted

    def learn_here(self, *args):
        before = digest(self.student)
        try:
            return learn(self, *args)
        except Fault:
            kept.append(digest(self.student) == before)
            raise

    def dispatch_here(parts, batch, student, owner):
        here["step"] += 1
        held = dispatch(parts, batch, student, owner)
        if now("teacher"):
            held.rows[batch.row_sequences()[held.ids] == 5] = NAN
        return held

    def score_here(batch, assigned, teacher_rows, student, *rest):
        if now("weight") and dist.get_rank() == 0:
            next(student.trunk.parameters()).data[:] = NAN
        return score(batch, assigned, teacher_rows, student, *rest)

    def loss_here(section, heads, *args):
        total, metrics = loss(section, heads, *args)
        # A tensor-parallel group has one loss.
        spoil = now("loss") and (dist.get_rank() == 1 or heads.shard.group is not None)
        return total + (NAN if spoil else 0), metrics

    def backward_here(*args):
        metrics = backward(*args)
        return metrics | {"loss": metrics["loss"] * (50 if now("spike") else 1)}

    def step_here(self):
        if now("gradient") and dist.get_rank() == 1:
            for parameter in self.trunk.parameters():
                parameter.main_grad[:] = NAN
        return take(self)

    def choose_here(*args):
        choice = choose(*args)
        return replace(choice, mask=choice.mask & (not now("selection")))

    replacements = [
        learn_here, dispatch_here, score_here, backward_here, loss_here, step_here, choose_here, 3,
    ]  # fmt: skip
    printed = io.StringIO()
    try:
        for (owner, name), replacement in zip(patched, replacements, strict=True):
            setattr(owner, name, replacement)
        with redirect_stdout(printed), redirect_stderr(printed):
            status, records = train([*QUICK, *overrides], after=after)
    finally:
        for (owner, name), original in zip(patched, originals, strict=True):
            setattr(owner, name, original)
    return status, records, kept, printed.getvalue()


def digest(student):
    """Of weights, moments, master weights and the schedule."""
    (optimizer,) = student.optimizer.chained_optimizers
    moments = [t for state in optimizer.optimizer.state.values() for t in state.values()]
    tensors = [*student.trunk.parameters(), *optimizer.get_parameters(), *moments]
    whole = hashlib.sha256(str(student.scheduler.num_steps).encode())
    for tensor in tensors:
        whole.update(tensor.detach().float().contiguous().numpy().tobytes())
    return whole.hexdigest()


def said(printed, step):
    """The one line about a step."""
    (line,) = [line for line in printed.splitlines() if line.startswith(f"step {step}: ")]
    return line


SPOILT = {2: "teacher", 4: "loss", 6: "gradient", 8: "spike"}


@pytest.mark.parametrize("name", ["TP2 | PP2", "DP2 | TP2"])
def test_bad_steps_are_named_and_skipped_and_the_run_goes_on(tmp_path, name):
    world_size, layout = LAYOUTS[name]
    options = [f"run.dir={tmp_path}/run", "train.steps=9", "rollout.prompts=8", *layout]
    results = run_ranks(world_size, faulty_train, options, SPOILT, timeout=300)
    for _, _, unchanged, _ in results:
        assert unchanged == [True] * 4
    status, records, _, printed = results[0]
    assert status == 0
    records = curve(records)
    assert [r["guard/skipped"] for r in records] == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert [r["guard/skipped_total"] for r in records] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert ["loss" in record for record in records] == [r["step"] not in SPOILT for r in records]

    lines = {step: said(printed, step) for step in SPOILT}
    for step, line in lines.items():
        assert line.endswith("; the step is skipped (1 of 3 in a row)"), (step, line)
    teacher, loss, gradient, spike = (line.partition(": ")[2] for line in lines.values())
    assert teacher.startswith("teacher hidden states are not finite: rank ")
    assert ", sequence 5 (prompt " in teacher
    # The loss of a tensor-parallel group is told by its first rank.
    culprit = 0 if name == "TP2 | PP2" else 1
    assert loss.startswith(f"the loss is not finite: rank {culprit}, sequence")
    assert gradient.startswith("gradients are not finite (parameters ")
    assert ": rank 1;" in gradient
    assert "more than guard.loss_spike 10 times" in spike


def test_losses_that_stay_high_end_a_run_once(tmp_path):
    """From step 6 on: the guard knows five losses, refuses two, and says how to go on. The same
    command then does, from there; the checkpoint from before is still there."""
    options = [f"run.dir={tmp_path}/run", "train.steps=10", "guard.max_skipped=2", *DP2[1]]
    options += ["checkpoint={every: 5, keep_last: 1}", "rollout.prompts=8"]
    spoilt = dict.fromkeys(range(6, 11), "spike")
    status, records, unchanged, printed = run_ranks(2, faulty_train, options, spoilt)[0]
    assert status == 1 and unchanged == [True, True]
    assert [r["guard/skipped"] for r in curve(records)] == [0, 0, 0, 0, 0, 1, 1]
    checkpoints = tmp_path / "run" / "checkpoints"
    last = printed.strip().splitlines()[-1]
    assert last == (
        "error: step 7: guard.loss_spike: 2 losses in a row were more than 10 times the usual one; "
        f"the same command goes on with {checkpoints}/step_00000007 and takes such losses for "
        "usual; if they are not, remove that directory and it goes on from the one before"
    )
    assert steps(checkpoints) == [5, 7]

    spoilt = dict.fromkeys(range(1, 4), "spike")
    status, records, _, _ = run_ranks(2, faulty_train, options, spoilt, 7)[0]
    assert status == 0
    assert [r["guard/skipped"] for r in curve(records)][7:] == [0, 0, 0]
    assert records[-1]["guard/skipped_total"] == 2


def test_a_broken_student_ends_the_run_and_the_last_good_checkpoint_stays(tmp_path):
    """One weight matrix is lost in step 2: from then on nothing is finite."""
    options = [f"run.dir={tmp_path}/run", "train.steps=9", "checkpoint.every=1", *TP2[1]]
    options += ["guard.max_skipped=1", "checkpoint.keep_last=1"]
    status, records, _, printed = run_ranks(2, faulty_train, options, {2: "weight"})[0]
    assert status == 1
    assert [r["guard/skipped"] for r in curve(records)] == [0, 1]
    assert "student hidden states are not finite: rank 0, sequences 0, 1, 2, 3, 4 and" in said(
        printed, 2
    )
    (error,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: step 2: guard.max_skipped: 1 steps in a row were skipped")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000001"]


def test_a_broken_student_is_never_saved(tmp_path):
    """A checkpoint is due before enough steps were skipped to end the run."""
    options = [f"run.dir={tmp_path}/run", "train.steps=9", "checkpoint.every=2", *DP2[1]]
    status, records, _, printed = run_ranks(2, faulty_train, options, {2: "weight"})[0]
    assert (status, len(curve(records))) == (1, 1)
    (error,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: step 2 is not saved: student weights are not finite (parameter")
    assert not list((tmp_path / "run" / "checkpoints").glob("step_0*"))


def test_a_teacher_that_changes_ends_the_run(tmp_path):
    options = [f"run.dir={tmp_path}/run", "train.steps=9", "checkpoint.every=0", *DP2[1]]
    status, records, printed = run_ranks(
        2, train_with_another_teacher, [*QUICK, *options, "guard.teacher_every=2"]
    )[0]
    assert (status, len(curve(records))) == (1, 1)
    assert "error: step 2: " in printed and "the teacher's weights have changed" in printed


def train_with_another_teacher(overrides):
    from itertools import count

    from megatron_taopd.teacher.megatron import MegatronTeacher

    fingerprint, calls = MegatronTeacher.fingerprint, count()
    MegatronTeacher.fingerprint = lambda self: next(calls)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            status, records = train(overrides)
    finally:
        MegatronTeacher.fingerprint = fingerprint
    return status, records, printed.getvalue()


def test_a_step_that_keeps_no_row_is_skipped_and_said_once(tmp_path):
    options = [f"run.dir={tmp_path}/run", "train.steps=9", "guard.max_skipped=2", *DP2[1]]
    spoilt = {2: "selection", 3: "selection"}
    status, records, _, printed = run_ranks(2, faulty_train, options, spoilt)[0]
    assert status == 1
    assert [r["guard/skipped_total"] for r in curve(records)] == [0, 1, 2]
    assert [r["kept_rows"] > 0 for r in curve(records)] == [True, False, False]
    assert printed.count("selection.selector: no row of step 2 is kept") == 1
    assert "no row of step 3" not in printed


# ---------------------------------------------------------------------------------- without ranks


def test_whose_numbers_are_not_finite():
    fine = torch.zeros(5)
    scores = TokenScores(torch.tensor([0, torch.inf, NAN, NAN, 0]), fine.clone(), fine, fine)
    scores.compatibility[4] = torch.inf
    student = torch.tensor([True, True, True, False, True])
    teacher = torch.tensor([True, True, True, False, True])
    assert culprits(student, teacher, scores).tolist() == [0, 0, 4, 3, 4]


def test_the_top_k_of_a_served_teacher_may_leave_tokens_out_but_not_be_nan():
    log_probs = torch.tensor([[-1.0, -torch.inf], [-1.0, NAN], [-1.0, -2.0]])
    rows = TopkRows(torch.zeros(3, 2).long(), log_probs, torch.tensor([-1.0, -1.0, NAN]))
    assert TopkOutputHeads.sound(rows.pack()).tolist() == [True, False, False]


def test_a_spike_is_measured_against_the_median():
    guard = Guard(max_skipped=3, loss_spike=10)
    guard.check(1e9)  # nothing is known yet
    for loss in [1.0] * 5 + [3.0] * 4:
        guard.taken(loss)
    guard.check(10.0)
    with pytest.raises(Fault, match=r"the loss is 10\.1, more than guard\.loss_spike 10 times 1, "):
        guard.check(10.1)
    Guard(3, 0).check(math.inf)


def refused(guard, losses):
    """Which of these losses are refused, one a step."""
    answers = []
    for loss in losses:
        fault = None
        try:
            guard.check(loss)
            guard.taken(loss)
        except Fault as raised:
            fault = raised
        guard.observe(fault)
        answers.append(fault is not None)
    return answers


def test_a_level_that_stays_is_the_new_usual_one():
    """A full window: after 16 of 32, the median is half of it. One that does not stay is refused
    each time."""
    guard = Guard(max_skipped=99, loss_spike=10)
    assert refused(guard, [1.0] * 40) == [False] * 40
    assert refused(guard, [100.0, 1.0, 1.0, 1.0] * 5) == [True, False, False, False] * 5
    assert refused(guard, [1.0] * 32 + [100.0] * 18) == [False] * 32 + [True] * 16 + [False] * 2
    assert refused(guard, [1001.0, 100.0]) == [True, False]


def test_no_number_that_means_nothing_is_remembered():
    guard = Guard(max_skipped=99, loss_spike=10)
    refused(guard, [1.0] * 10)
    for loss in [math.nan, math.inf] * 32:
        guard.taken(loss)
        with pytest.raises(Fault):
            guard.check(loss)
    assert list(guard.losses) == [1.0] * 10
    assert refused(guard, [100.0]) == [True]


def test_a_resumed_guard_goes_on_as_the_other_would():
    """At any moment, refused losses included."""
    losses = [1.0] * 10 + [50.0, 60.0, 2.0, 500.0, 30.0] * 8
    whole = Guard(3, 10)
    expected = refused(whole, losses)
    assert sum(expected) > 3
    for moment in range(len(losses)):
        first, second = Guard(3, 10), Guard(3, 10)
        answers = refused(first, losses[:moment])
        second.load(first.state())
        assert {**second.state(), "losses": 0} == {**first.state(), "losses": 0}
        assert answers + refused(second, losses[moment:]) == expected
        assert (second.losses, second.jumped) == (whole.losses, whole.jumped)
        assert {**second.state(), "losses": 0} == {**whole.state(), "losses": 0}


def test_a_guard_that_is_exhausted_knows_by_what():
    for faults, jumped in (("jjj", True), ("njj", False), ("jjn", False), ("jj j", False)):
        guard = Guard(max_skipped=3, loss_spike=10)
        for fault in faults:
            guard.observe({"j": Jump("it jumps"), "n": Fault("it is not finite"), " ": None}[fault])
        assert (guard.exhausted, guard.jumped) == (" " not in faults, jumped), faults
    guard.observe(Jump("it jumps"))
    guard.forget()
    assert (guard.exhausted, guard.state()["in_a_row"]) == (False, 0)


def test_a_run_ends_after_so_many_in_a_row_and_few_lines_are_said():
    guard, fault = Guard(max_skipped=2, loss_spike=10), Fault("it rains", [3], [1, 0])
    prompts = torch.tensor([7, 9])
    lines = []
    for _ in range(300):
        assert guard.observe(fault)["guard/skipped"] == 1
        lines.append(guard.line(fault, prompts))
        assert not guard.exhausted
        guard.observe(None)
    assert lines[0] == (
        "it rains: rank 3, sequences 1, 0 (prompts 9, 7); the step is skipped (1 of 2 in a row)"
    )
    assert sum(line is not None for line in lines) == 23
    guard.observe(fault)
    guard.observe(fault)
    assert guard.exhausted


def test_long_lists_are_cut():
    assert listed("rank", [3]) == "rank 3"
    assert listed("rank", range(12)) == "ranks 0, 1, 2, 3, 4 and 7 more"
