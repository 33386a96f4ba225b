"""The real loop on real ranks: it learns, resumes bit for bit, and ends cleanly when told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from support.commands import run_python
from support.patience import finish, wait_for
from support.ranks import run_ranks

from megatron_taopd.checkpoints import files as checkpoint_files

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "examples" / "tiny_pair.yaml")
SHORT = ["rollout.prompts=16", "eval.every=0", "eval.limit=16", "log.tensorboard=false"]


def train(overrides, die_in=None, after=0):
    """`main` on every rank; `die_in` = (phase, step) raises when that step first comes to the
    phase, as a crash would. `after` is the step that it has to go on from.

    Returns (exit status, records of metrics.jsonl)."""
    from contextlib import contextmanager

    from megatron_taopd import build as building
    from megatron_taopd import train as module
    from megatron_taopd.monitoring import monitor
    from megatron_taopd.parallel import watchdog

    span, at_step, build = monitor.Monitor.span, watchdog.at_step, building.build
    here, begun_after = {"step": 0}, []

    def count(step):
        here["step"] = step
        at_step(step)

    @contextmanager
    def dying(self, phase):
        with span(self, phase):
            if (phase, here["step"]) == die_in:
                raise KeyboardInterrupt
            yield

    def noted(*arguments):
        run = build(*arguments)
        begun_after.append(run.first_step)
        return run

    monitor.Monitor.span, watchdog.at_step, building.build = dying, count, noted
    try:
        status = module.main([TINY, *SHORT, *overrides])
    except KeyboardInterrupt:
        status = "died"
    finally:
        monitor.Monitor.span, watchdog.at_step, building.build = span, at_step, build
    assert begun_after in ([after], [] if status == 2 else [after]), begun_after
    directory = next(o for o in overrides if o.startswith("run.dir=")).removeprefix("run.dir=")
    return status, read_metrics(directory)


def read_metrics(directory):
    path = Path(directory) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# What a step took and how full the machine was.
UNREPEATABLE = ("time/", "eval/", "checkpoint/", "memory/most", "memory/least")


def curve(records):
    """Everything a step computed; times aside, resuming must not change a bit of it."""
    return [
        {
            k: v
            for k, v in record.items()
            if not k.startswith(UNREPEATABLE) and "tokens_per_second" not in k
        }
        for record in records
        if record["step"] > 0
    ]


LAYOUTS = {
    "TP2 | PP2": (2, []),
    "DP2 | TP2": (2, ["student.parallel.tp=1", "teacher.parallel={tp: 2, pp: 1}"]),
    "PP2 | TP1": (2, ["student.parallel={tp: 1, pp: 2}", "teacher.parallel.pp=1"]),
}


def test_loss_falls_with_the_teacher_in_another_layout(tmp_path):
    """All rows kept, so that the loss of one step can be compared with that of another."""
    options = ["train.steps=14", "optimizer.warmup_steps=3", "selection.selector=full"]
    (status, records), _ = run_ranks(
        2, train, [f"run.dir={tmp_path}/run", *options, "rollout.prompts=64"], timeout=300
    )
    assert status == 0
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 14
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])


def test_what_a_run_logs_and_leaves(tmp_path):
    run_dir = tmp_path / "run"
    (_, records), _ = run_ranks(2, train, [f"run.dir={run_dir}", "train.steps=3"])
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    for record in (records[0], records[-1]):
        assert record["eval/accuracy_low"] < record["eval/accuracy"] < record["eval/accuracy_high"]
    for record in records[1:]:
        assert record["kept_rows"] == -(-record["valid_rows"] // 10)
        assert 0 < record["tokens_trained"] < record["tokens_rolled_out"]
        # Invariant 9: the engine generates with the weights that the step before produced.
        assert record["rollout/weight_version"] == record["step"] - 1
        assert record["rollout/logprob_gap_max"] < 1e-4
        assert record["time/step"] > record["time/training"] > 0
        assert 0 < record["memory/head_training"] <= record["memory/head_scoring"]
    for name in ("report.html", "student/model.safetensors", "checkpoints/step_00000003"):
        assert (run_dir / name).exists()
    kept = json.loads((run_dir / "samples.json").read_text())
    assert [look["step"] for look in kept["steps"]] == [1, 3]
    assert [answers["step"] for answers in kept["evaluations"]] == [0, 3]
    for look, record in zip(kept["steps"], (records[1], records[3]), strict=True):
        assert sum(rows for rows, _ in look["counts"].values()) == record["valid_rows"]
        assert sum(chosen for _, chosen in look["counts"].values()) == record["kept_rows"]
    (session,) = json.loads((run_dir / "sessions.json").read_text())
    assert session["ranks"] == 2 and session["seconds"] > 0 and "torch" in session["versions"]


def train_and_listen(overrides):
    """`train`, and what was printed."""
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as said:
        train(overrides)
    return said.getvalue()


@pytest.mark.parametrize(
    "options, said",
    [
        (["rollout.max_new_tokens=3"], {"rollout.max_new_tokens: evaluation 0: 100%"}),
        (
            ["rollout.max_new_tokens=3", "eval.at_start=false", "eval.max_new_tokens=2"],
            {"rollout.max_new_tokens: step 1: 100%", "eval.max_new_tokens: evaluation 2: 100%"},
        ),
        (["rollout.horizon=3"], set()),  # cut on purpose
        ([], set()),
    ],
)
def test_responses_that_never_end_are_told(tmp_path, options, said):
    overrides = [f"run.dir={tmp_path}/run", "train.steps=2", *options]
    printed, _ = run_ranks(2, train_and_listen, overrides)
    lines = [line for line in printed.splitlines() if "cut off at this length" in line]
    assert {line.partition(" of the")[0] for line in lines} == said
    assert all("rollout.stop_token_ids" in line for line in lines)


def test_the_report_shows_held_out_answers_marked(tmp_path):
    run_ranks(2, train, [f"run.dir={tmp_path}/run", "train.steps=1"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Held-out prompts, before and after training" in page
    marks = page.count('<em class="good">right') + page.count('<em class="bad">wrong')
    assert marks == 8 and page.count("; the reference is ") == 8  # four of each evaluation


def test_a_forgotten_weight_update_shows_in_the_gap(tmp_path):
    """Invariant 9 is measured: an engine left with old weights is seen in the log."""
    options = ["train.steps=6", "optimizer.warmup_steps=0", "optimizer.lr=3e-3"]
    (_, records), _ = run_ranks(2, train_with_a_stale_engine, [f"run.dir={tmp_path}/run", *options])
    assert records[-1]["rollout/logprob_gap_max"] > 1e-2


def train_with_a_stale_engine(overrides):
    from megatron_taopd.rollout.local import LocalEngine

    update = LocalEngine.update_weights
    LocalEngine.update_weights = lambda self, named_tensors, version: list(named_tensors)
    try:
        return train(overrides)
    finally:
        LocalEngine.update_weights = update


SAVING = ["train.steps=5", "checkpoint={every: 2, asynchronous: false}"]


@pytest.fixture(scope="module", params=LAYOUTS)
def whole_run(request, tmp_path_factory):
    """(world size, options, curve) of a run that no one has disturbed."""
    world_size, layout = LAYOUTS[request.param]
    directory = tmp_path_factory.mktemp("runs") / "whole"
    (status, records), *_ = run_ranks(world_size, train, [f"run.dir={directory}", *SAVING, *layout])
    assert status == 0
    return world_size, [*SAVING, *layout], curve(records)


@pytest.mark.parametrize("phase", ["rollout", "training", "checkpoint"])
def test_resume_is_bit_identical(tmp_path, whole_run, phase):
    """Invariant 6: a run that dies in some phase continues the curve of one that does not. It dies
    in step 4, before the second checkpoint, and goes on from the first."""
    world_size, options, whole = whole_run
    broken = [f"run.dir={tmp_path}/broken", *options]
    (status, records), *_ = run_ranks(world_size, partial(train, die_in=(phase, 4)), broken)
    assert (status, curve(records)) == ("died", whole[:3])
    (status, resumed), *_ = run_ranks(world_size, partial(train, after=2), broken)
    assert status == 0
    assert curve(resumed) == whole


def test_a_run_that_saves_resumes_bit_for_bit_too(tmp_path):
    """Replay, concentration and the horizon, whose memory is part of the checkpoint."""
    options = [
        "train.steps=4", "checkpoint={every: 2, asynchronous: false}", *LAYOUTS["DP2 | TP2"][1],
        "train.schedule=replay", "selection.concentrate=0.5",
        "rollout.horizon=auto", "rollout.horizon_floor=4",
    ]  # fmt: skip
    (_, whole), _ = run_ranks(2, train, [f"run.dir={tmp_path}/whole", *options])
    broken = [f"run.dir={tmp_path}/broken", *options]
    (status, _), _ = run_ranks(2, partial(train, die_in=("training", 4)), broken)
    assert status == "died"
    (_, resumed), _ = run_ranks(2, partial(train, after=2), broken)
    assert curve(resumed) == curve(whole)

    first, *others = curve(whole)
    assert all(r["rollout/horizon"] < first["rollout/horizon"] for r in others)
    for record in curve(whole):
        assert record["selection/trained_share"] <= 0.5
        assert record["kept_rows"] == -(-record["valid_rows"] // 10)
        assert 0 < record["flops/training"] < record["flops/full_opd"]


def test_both_schedules_take_the_same_steps(tmp_path, reference_curve):
    options = ["train.steps=3", "train.schedule=replay"]
    (status, records), _ = run_ranks(2, train, [f"run.dir={tmp_path}/run", *options])
    assert status == 0
    for ours, reference in zip(curve(records), reference_curve, strict=True):
        assert (ours["train/replayed"], reference["train/replayed"]) == (1, 0)
        for key in ("loss", "grad_norm", "tokens_trained", "flops/training"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-4), key


def test_layer_outputs_that_do_not_fit_are_not_kept(tmp_path):
    options = ["train.schedule=replay", "train.replay_memory_mib=1", "rollout.prompts=64"]
    (status, records), _ = run_ranks(
        2, train, [f"run.dir={tmp_path}/run", "train.steps=2", *options]
    )
    assert status == 0
    assert [record["train/replayed"] for record in curve(records)] == [0, 0]


ALL_LAYOUTS = {  # world size, student, teacher
    "one rank": (1, "{tp: 1, pp: 1}", "{tp: 1, pp: 1}"),
    "TP2 | TP2": (2, "{tp: 2, pp: 1}", "{tp: 2, pp: 1}"),
    "TP2 SP | PP2": (2, "{tp: 2, pp: 1, sequence: true}", "{tp: 1, pp: 2}"),
    "PP2 | PP2": (2, "{tp: 1, pp: 2}", "{tp: 1, pp: 2}"),
    "DP2 | DP2": (2, "{tp: 1, pp: 1}", "{tp: 1, pp: 1}"),
    "TP2 PP2 | TP1": (4, "{tp: 2, pp: 2}", "{tp: 1, pp: 1}"),
    "TP2 DP2 | PP4": (4, "{tp: 2, pp: 1}", "{tp: 1, pp: 4}"),
}


@pytest.fixture(scope="module")
def reference_curve(tmp_path_factory):
    options = [f"run.dir={tmp_path_factory.mktemp('runs')}/TP2", "train.steps=3"]
    (_, records), _ = run_ranks(2, train, options)
    return curve(records)


@pytest.mark.parametrize("name", ALL_LAYOUTS)
def test_every_layout_takes_the_same_steps(tmp_path, reference_curve, name):
    """Rollouts, scores, kept positions, losses and gradient norms, through two weight updates."""
    world_size, student, teacher = ALL_LAYOUTS[name]
    options = ["train.steps=3", f"student.parallel={student}", f"teacher.parallel={teacher}"]
    (status, records), *_ = run_ranks(
        world_size, train, [f"run.dir={tmp_path}/run", *options], timeout=300
    )
    assert status == 0
    for ours, reference in zip(curve(records), reference_curve, strict=True):
        for key in ("valid_rows", "kept_rows", "tokens_trained", "tokens_rolled_out"):
            assert ours[key] == reference[key], key
        for key in ("loss", "grad_norm", "scores/disagreement_q95", "selection/threshold"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-4), key


def interrupted_train(overrides, at_call):
    """`train`, asked to end when the loop looks for the n-th time (six times a step)."""
    from itertools import count

    from megatron_taopd import start as module

    calls = count(1)
    catch_signals = module.catch_signals
    module.catch_signals = lambda: lambda: next(calls) == at_call
    try:
        return train(overrides)
    finally:
        module.catch_signals = catch_signals


@pytest.mark.parametrize(("at_call", "done"), [(13, 2), (15, 2), (18, 3)])
def test_interrupted_in_or_after_a_step(tmp_path, at_call, done):
    """In a step before its training, also between two parts of its rollouts: as if it had not
    begun. After: with the step's checkpoint. (A step asks six times.)"""
    options = ["train.steps=4", "checkpoint.every=0"]
    (_, whole), _ = run_ranks(2, train, [f"run.dir={tmp_path}/whole", *options])
    stopped = [f"run.dir={tmp_path}/stopped", *options]
    (status, records), _ = run_ranks(2, partial(interrupted_train, at_call=at_call), stopped)
    assert (status, len(curve(records))) == (3, done)
    assert not (tmp_path / "stopped" / "student").exists()
    assert (tmp_path / "stopped" / "checkpoints" / f"step_{done:08d}").exists()
    (status, resumed), _ = run_ranks(2, partial(train, after=done), stopped)
    assert status == 0
    assert curve(resumed) == curve(whole)


def what_evaluations_leave(directory):
    """Each evaluation's figures, by step; best.json; the checkpoints; the student's weights."""
    evaluations = {
        record["step"]: {k: v for k, v in record.items() if k.startswith("eval/")}
        for record in read_metrics(directory)
        if "eval/accuracy" in record
    }
    checkpoints = directory / "checkpoints"
    names = sorted(path.name for path in checkpoints.glob("step_*"))
    best = json.loads((checkpoints / "best.json").read_text())
    weights = directory / "student" / "model.safetensors"
    return evaluations, best, names, weights.read_bytes() if weights.exists() else None


def test_evaluations_and_the_best_checkpoint_survive_an_interruption(tmp_path):
    """In step 3, before and after its training, and in step 4."""
    options = [
        "student.parallel={tp: 1, pp: 1}", "teacher.parallel={tp: 1, pp: 1}",
        "train.steps=5", "checkpoint={every: 0, keep_last: 1}", "optimizer.warmup_steps=0",
        "eval={every: 2, limit: 48, samples: 2, temperature: 1.0, pass_at: [2]}",
    ]  # fmt: skip
    run_ranks(1, train, [f"run.dir={tmp_path}/whole", *options])
    whole = what_evaluations_leave(tmp_path / "whole")
    assert [*whole[0]] == [0, 2, 4, 5] and whole[3]
    for at_call, done in ((15, 2), (18, 3), (21, 3)):  # a step asks six times
        stopped = [f"run.dir={tmp_path}/{at_call}", *options]
        [(status, _)] = run_ranks(1, partial(interrupted_train, at_call=at_call), stopped)
        evaluations, best, names, weights = what_evaluations_leave(tmp_path / str(at_call))
        assert (status, [*evaluations], weights) == (3, [0, 2], None)
        assert best["step"] == 2 and names == sorted({"step_00000002", f"step_{done:08d}"})
        [(status, _)] = run_ranks(1, partial(train, after=done), stopped)
        assert status == 0
        assert what_evaluations_leave(tmp_path / str(at_call)) == whole


DP2 = ["student.parallel={tp: 1, cp: 1}", "teacher.parallel={tp: 2, pp: 1, cp: 1}"]
CP2 = ["student.parallel={tp: 1, cp: 2}", "teacher.parallel={pp: 1, cp: 2}"]


@pytest.mark.parametrize(
    ("before", "layout"), [([], DP2), ([], CP2), (CP2, DP2)], ids=["DP2", "CP2", "from CP2"]
)
def test_resume_on_another_layout(tmp_path, before, layout):
    """Of TP2, say, → DP2 after step 2: the same curve up to rounding. CP2 shares most sequences."""
    options = ["checkpoint={every: 2, asynchronous: false}", "train.steps=4", *before]
    options += ["train.micro_batch_tokens=64", "data.max_prompt_tokens=32"]
    (_, whole), _ = run_ranks(2, train, [f"run.dir={tmp_path}/whole", *options])
    broken = [f"run.dir={tmp_path}/broken", *options]
    (status, records), _ = run_ranks(2, partial(train, die_in=("rollout", 4)), broken)
    assert (status, curve(records)) == ("died", curve(whole)[:3])
    (_, resumed), _ = run_ranks(2, partial(train, after=2), [*broken, *layout])
    assert [r["step"] for r in resumed] == [r["step"] for r in whole]
    for ours, theirs in zip(curve(resumed), curve(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def drawn(overrides):
    """What each step draws, with weights that stay: (prompts, tokens, seed of the selection)."""
    from megatron_taopd.step import distiller
    from megatron_taopd.step.distiller import Distiller

    learn, choose, draws = Distiller.learn, distiller.choose, []

    def seen_learn(self, batch, *rest):
        draws.append((batch.prompts.tolist(), batch.tokens.tolist()))
        return learn(self, batch, *rest)

    def seen_choose(selector, scores, ratio, seed, *rest):
        draws[-1] += (seed,)
        return choose(selector, scores, ratio, seed, *rest)

    Distiller.learn, distiller.choose = seen_learn, seen_choose
    try:
        train(["optimizer.lr=1e-12", "selection={selector: random, ratio: 0.5}", *overrides])
    finally:
        Distiller.learn, distiller.choose = learn, choose
    return draws


def test_every_step_and_seed_draws_anew(tmp_path):
    """One prompt, twice a step: in no two steps, and under no two seeds, the same responses or rows
    drawn alike. And with many, another order under another seed."""
    (tmp_path / "one.jsonl").write_text('{"prompt": "12 + 34 =", "answer": "46"}\n')
    options = [
        "student.parallel={tp: 1, pp: 1}", "teacher.parallel={tp: 1, pp: 1}", "train.steps=3",
        "rollout={prompts: 2, max_new_tokens: 8}", f"data.prompts={tmp_path}/one.jsonl",
        "eval.prompts=null", "checkpoint={every: 0, export_hf: false}",
    ]  # fmt: skip
    steps = []
    for seed in (0, 1):
        directory = f"run.dir={tmp_path}/{seed}"
        steps += run_ranks(1, drawn, [directory, f"run.seed={seed}", *options])[0]
    assert len({tuple(tokens) for _, tokens, _ in steps}) == len(steps) == 6
    assert len({seed for *_, seed in steps}) == 6

    orders = []
    for seed in (0, 1):
        directory = f"run.dir={tmp_path}/{seed}-order"
        many = [*options, f"data.prompts={ROOT}/examples/tiny_pair/train.jsonl", "train.steps=1"]
        orders += run_ranks(1, drawn, [directory, f"run.seed={seed}", *many])[0]
    assert orders[0][0] != orders[1][0]


def start(*overrides):
    """A run of its own, as a user starts one, in a process group that can be killed whole."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "megatron_taopd.train", TINY, *SHORT, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_until(process, there, what):
    def reached():
        if there():
            return True
        assert process.poll() is None, process.stdout.read()
        return False

    wait_for(reached, seconds=180, what=f"{what} was not reached")


def wait_for_step(process, directory, step):
    def there():
        return any(record["step"] >= step for record in read_metrics(directory))

    wait_until(process, there, f"step {step}")


def kill_all(process):
    """SIGKILL for torchrun and for its workers, which have sessions of their own."""
    import psutil

    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)


def test_kill_9_and_sigterm(tmp_path):
    """A killed run loses at most the steps since its last checkpoint; a terminated one none."""
    directory = tmp_path / "run"
    options = [f"run.dir={directory}", "train.steps=200", "checkpoint.every=2"]
    process = start(*options)
    wait_for_step(process, directory, 3)
    wait_until(process, lambda: checkpoint_files.steps(directory / "checkpoints"), "a checkpoint")
    kill_all(process)
    before = curve(read_metrics(directory))
    newest = checkpoint_files.steps(directory / "checkpoints")[-1]
    assert 2 <= newest <= len(before)

    process = start(*options)
    wait_for_step(process, directory, len(before) + 2)
    process.send_signal(signal.SIGTERM)
    output = finish(process, seconds=120)
    assert f"resuming after step {newest}\n" in output
    records = read_metrics(directory)
    assert curve(records)[: len(before)] == before
    last = records[-1]["step"]
    assert last < 200
    assert (directory / "checkpoints" / f"step_{last:08d}" / "metadata.json").exists()


def test_user_errors_are_one_line(capsys, tmp_path):
    from megatron_taopd.train import main

    assert main([TINY, f"run.dir={tmp_path}/run", "selection.ratio=1.5"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: selection.ratio: 1.5") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_told_in_one_line(tmp_path):
    """The last stage's norm has a wrong shape; rank 0 says so before anything is built."""
    import shutil

    from safetensors.torch import load_file, save_file

    damaged = tmp_path / "student"
    shutil.copytree(ROOT / "examples" / "tiny_pair" / "student", damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    options = [f"run.dir={tmp_path}/run", f"student.path={damaged}", "teacher.parallel.pp=1"]
    options += ["student.parallel={tp: 1, pp: 2}", *SHORT]
    done = run_python("megatron_taopd.train", TINY, *options, ranks=2, seconds=180)
    assert done.returncode != 0
    output = done.stdout + done.stderr
    [line] = [line for line in output.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: student.path: {damaged}/") and "in build" not in output
    assert "model.norm.weight is [95]" in line
