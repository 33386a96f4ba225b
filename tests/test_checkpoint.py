"""A checkpoint is what was saved, or there is none: while a run goes on, after a crash, on a full
disk, from hands that mean harm."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.patience import wait_for
from support.ranks import run_ranks
from support.step import OPTIMIZER, make_model, train_step
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_taopd.checkpoints import files
from megatron_taopd.formats.megatron import MegatronCheckpoint

TINY = str(Path(__file__).parent.parent / "examples" / "tiny_pair.yaml")
STATE = {"counter": 7, "ratio": 0.5, "name": "run", "lengths": [3, 4], "memory": torch.arange(5)}


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "student"
    return make_model(directory, vocab_size=96, hidden_size=32, layers=4, seed=0)


@pytest.fixture(scope="module")
def two_saved(student_dir, tmp_path_factory):
    """A directory with the checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    run_ranks(2, save_steps, student_dir, str(directory), [1, 2])
    return directory


@pytest.fixture
def saved(two_saved, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(two_saved, tmp_path / "checkpoints"))


def make_student(student_dir, tp=1, pp=1):
    from megatron.core import parallel_state

    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform

    platform.emulate_cuda()
    parallel_state.destroy_model_parallel()  # of a student before this one
    layout = layouts.student_layout(tp, pp)
    return Student(student_dir, layout, torch.float32, "none", OPTIMIZER, 100, 96)


def contents(student):
    """Copies of everything that training changes."""
    (distributed,) = student.optimizer.chained_optimizers
    tensors = [p.detach().clone() for p in student.trunk.parameters()]
    for group in distributed.optimizer.param_groups:
        for parameter in group["params"]:
            moments = distributed.optimizer.state[parameter]
            tensors += [moments[name].clone() for name in sorted(moments)]
    return tensors, student.scheduler.state_dict()


def same(ours, theirs):
    return ours[1] == theirs[1] and all(map(torch.equal, ours[0], theirs[0]))


def open_checkpoints(directory, asynchronous=True, keep=3):
    from megatron_taopd.checkpoints.saving import Checkpoints

    lines = []
    return Checkpoints(directory, keep, asynchronous, lines.append), lines


def save_steps(student_dir, directory, steps, keep=3):
    student = make_student(student_dir, tp=dist.get_world_size())
    checkpoints, lines = open_checkpoints(directory, keep=keep)
    for step in steps:
        train_step(student, seed=step)
        checkpoints.save(step, student, STATE)
        checkpoints.poll()
    checkpoints.finish()
    checkpoints.close()
    assert not lines and not checkpoints.failure
    return checkpoints.metrics()


def latest(directory, **options):
    """In this process alone; (step, what was told)."""
    lines = []
    return files.latest_valid(directory, lines.append, **options), lines


# ---------------------------------------------------------------------------- while a run goes on


def save_then_change(student_dir, directory, parallel, asynchronous):
    from megatron_taopd.checkpoints import saving as checkpoint
    from megatron_taopd.checkpoints import writing

    student = make_student(student_dir, *parallel)
    train_step(student, seed=1)
    saved = contents(student)
    checkpoints, lines = open_checkpoints(directory, asynchronous)
    write, changed = writing.write, threading.Event()
    if not asynchronous:
        changed.set()

    def write_late(*arguments):
        changed.wait()
        return write(*arguments)

    writing.write = write_late
    try:
        checkpoints.save(1, student, STATE)
    finally:
        writing.write = write
    assert files.steps(directory) == ([] if asynchronous else [1])
    train_step(student, seed=2)
    for parameter in student.trunk.parameters():
        parameter.data.fill_(-1)
    changed.set()
    checkpoints.poll()
    checkpoints.finish()
    checkpoints.close()
    assert not same(contents(student), saved)

    assert checkpoint.latest_valid(directory, lines.append) == 1
    resumed = make_student(student_dir, *parallel)
    state = checkpoint.load(directory, 1, resumed)
    assert same(contents(resumed), saved)
    assert torch.equal(state.pop("memory"), STATE["memory"])
    assert state == {k: v for k, v in STATE.items() if k != "memory"} | {"step": 1}
    assert not lines
    return checkpoints.metrics()


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(
    ("world", "parallel"), [(1, (1, 1)), (2, (2, 1)), (2, (1, 2)), (2, (1, 1))]
)
def test_what_changes_after_the_call_is_not_saved(
    tmp_path, student_dir, world, parallel, asynchronous
):
    directory = str(tmp_path / "run" / "checkpoints")
    arguments = (student_dir, directory, parallel, asynchronous)
    for metrics in run_ranks(world, save_then_change, *arguments):
        assert set(metrics) == {"checkpoint/blocked_s", "checkpoint/write_s"}
    assert os.listdir(directory) == ["step_00000001"]


def save_what_arrives_late(student_dir, directory):
    """Copies that the device has not made when the save returns, but when they are waited for."""
    from megatron_taopd.checkpoints import saving as checkpoint
    from megatron_taopd.parallel.copies import HostCopies

    class Late(HostCopies):
        def take(self, tensors):
            copies, wait = super().take(tensors)
            arriving = [copy.clone() for copy in copies]
            for copy in copies:
                copy.fill_(-1)

            def arrive():
                wait()
                for copy, data in zip(copies, arriving, strict=True):
                    copy.copy_(data)

            return copies, arrive

    student = make_student(student_dir)
    train_step(student, seed=1)
    checkpoints, lines = open_checkpoints(directory)
    checkpoints._host = Late()
    checkpoints.save(1, student, STATE)
    checkpoints.finish()
    checkpoints.close()
    resumed = make_student(student_dir)
    checkpoint.load(directory, 1, resumed)
    return same(contents(resumed), contents(student)), lines


def test_copies_are_waited_for_before_they_are_written(tmp_path, student_dir):
    answers = run_ranks(1, save_what_arrives_late, student_dir, str(tmp_path))
    assert answers == [(True, [])]


def test_the_newest_are_kept_and_remains_removed(tmp_path, student_dir):
    for name in ("step_00000009.incomplete", "step_00000001.deleted"):
        (tmp_path / name).mkdir()
    run_ranks(1, save_steps, student_dir, str(tmp_path), [1, 2, 3, 4], 2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000003", "step_00000004"]


def save_evaluated(student_dir, directory, accuracies, resume_at=None):
    """A save for each (step, accuracy); what would be the best, and what is at the end."""
    from megatron_taopd.checkpoints import saving as checkpoint

    student = make_student(student_dir, tp=dist.get_world_size())
    lines, best = [], None
    if resume_at:
        state = checkpoint.load(directory, resume_at, student)
        assert state["step"] == resume_at
        best = state.get("best")
    checkpoints = checkpoint.Checkpoints(directory, 1, True, lines.append, resume_at, best)
    would_be = []
    for step, accuracy in accuracies:
        would_be.append(accuracy is not None and checkpoints.would_be_best(accuracy))
        checkpoints.save(step, student, STATE, accuracy)
    checkpoints.finish()
    checkpoints.close()
    return would_be, checkpoints.best, files.steps(directory)


def test_the_best_is_kept_and_named_beyond_a_restart(tmp_path, student_dir):
    directory = tmp_path / "checkpoints"

    def named():
        return json.loads((directory / "best.json").read_text())

    accuracies = [(1, 0.25), (2, 0.5), (3, 0.5), (4, None), (5, 0.4)]
    answers = run_ranks(2, save_evaluated, student_dir, str(directory), accuracies)
    assert answers == [([True, True, False, False, False], files.Best(2, 0.5), [2, 5])] * 2
    assert named() == {"step": 2, "accuracy": 0.5, "path": "step_00000002"}

    (directory / "best.json").unlink()  # what a checkpoint says of it is what counts
    answers = run_ranks(1, save_evaluated, student_dir, str(directory), [(6, 0.5)], 5)
    assert answers == [([False], files.Best(2, 0.5), [2, 6])]
    assert named()["step"] == 2
    answers = run_ranks(1, save_evaluated, student_dir, str(directory), [(7, 0.75)], 6)
    assert answers == [([True], files.Best(7, 0.75), [7])]

    shutil.rmtree(directory / "step_00000007")
    answers = run_ranks(1, save_evaluated, student_dir, str(directory), [(8, 0.1)])
    assert answers == [([True], files.Best(8, 0.1), [8])]


# ------------------------------------------------------------------------------- what is on a disk


def test_every_file_is_in_the_list(two_saved):
    folder = two_saved / "step_00000002"
    listed = json.loads((folder / files.MANIFEST).read_text())
    there = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert set(listed["files"]) == there - {files.MANIFEST}
    assert listed["step"] == 2 and ".metadata" in there and "hf/config.json" in there
    assert latest(two_saved) == (2, [])


def test_a_crash_at_any_byte_leaves_the_checkpoint_before(saved):
    """Files cut short and bits flipped, at random places of every file of the newest one."""
    draw, newest = random.Random(0), saved / "step_00000002"
    for file in [f for f in newest.rglob("*") if f.is_file()]:
        whole = file.read_bytes()
        for _ in range(24):
            place = draw.randrange(len(whole))
            damaged = bytearray(whole)
            damaged[place] ^= 1 << draw.randrange(8)
            for data in (whole[:place], damaged):
                file.write_bytes(data)
                step, lines = latest(saved)
                if step == 2:  # another blank in the list of checksums changes nothing
                    assert file.name == files.MANIFEST and not lines
                    assert json.loads(data) == json.loads(whole)
                else:
                    assert step == 1
                    assert lines[0].startswith(f"{newest}: {file.relative_to(newest)}: ")
                    newest.with_suffix(".damaged").rename(newest)
        file.unlink()
        reason = "missing" if file.name == files.MANIFEST else "No such file or directory"
        line = f"{newest}: {file.relative_to(newest)}: {reason}; not resumed from"
        assert latest(saved) == (1, [line])
        newest.with_suffix(".damaged").rename(newest)
        file.write_bytes(whole)
    assert latest(saved) == (2, [])


def test_a_damaged_checkpoint_makes_room(saved, student_dir):
    """It counts no longer among the newest, and its step can be saved again."""
    os.truncate(saved / "step_00000002" / "common.pt", 100)
    assert latest(saved)[0] == 1
    run_ranks(2, save_steps, student_dir, str(saved), [2], 2)
    assert latest(saved) == (2, [])
    names = ["step_00000001", "step_00000002", "step_00000002.damaged"]
    assert sorted(os.listdir(saved)) == names


def latest_on_ranks(directory):
    lines = []
    return files.latest_valid(directory, lines.append), lines


def test_ranks_share_the_files_and_agree(saved):
    os.truncate(saved / "step_00000002" / "__1_0.distcp", 100)
    answers = run_ranks(2, latest_on_ranks, str(saved))
    assert answers[0] == answers[1] == (1, answers[0][1])
    assert "step_00000002: __1_0.distcp: 100 bytes, " in answers[0][1][0]


def test_checkpoints_of_which_none_is_valid_are_no_new_start(saved):
    os.truncate(saved / "step_00000001" / "common.pt", 100)
    (saved / "step_00000002" / files.MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"no checkpoint is as it was written \(step_00000001: co"):
        latest(saved)
    assert files.steps(saved) == [1, 2]  # nothing is moved before it is clear what to go on from
    assert latest(saved, trust=True) == (2, [])
    assert latest(saved / "nowhere") == (None, [])


def save_for_ever(student_dir, directory, connection):
    """Weights of step n are all n; one checkpoint after the other, until killed."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    first = files.latest_valid(directory, print) or 0
    student = make_student(student_dir)
    checkpoints, _ = open_checkpoints(directory, keep=2)
    connection.send(first)
    for step in range(first + 1, 1_000_000):
        for parameter in student.trunk.parameters():
            parameter.data.fill_(step)
        checkpoints.save(step, student, {})


def test_kill_9_while_writing(tmp_path, student_dir):
    context, draw = multiprocessing.get_context("forkserver"), random.Random(0)
    directory, reached = tmp_path / "run" / "checkpoints", 0
    for _ in range(3):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=save_for_ever, args=(student_dir, str(directory), theirs), daemon=True
        )
        process.start()
        try:
            wait_for(ours.poll, seconds=120)
            assert ours.recv() == reached
            wait_for(lambda old=reached: files.steps(directory)[-1:] > [old], seconds=120)
            time.sleep(draw.random() * 0.3)
        finally:
            process.kill()
            process.join()
        newest, before = latest(directory)[0], reached
        assert newest > before and latest(directory)[1] == []
        reached = newest
        weight = MegatronCheckpoint(files.path(directory, newest)).read(
            "decoder.final_layernorm.weight"
        )
        assert (weight == newest).all()


# ----------------------------------------------------------------------------------- a full disk


def save_with_a_full_disk_on(rank, student_dir, directory):
    """No file of that rank may be longer than 4 KB in the second save."""
    student = make_student(student_dir, tp=2)
    checkpoints, lines = open_checkpoints(directory)
    checkpoints.save(1, student, STATE)
    checkpoints.finish()
    checkpoints.metrics()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        checkpoints.save(2, student, STATE)
        checkpoints.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    metrics, failure = checkpoints.metrics(), checkpoints.failure
    there = os.listdir(directory)
    dist.barrier()
    checkpoints.save(2, student, STATE)  # it is tried again
    checkpoints.finish()
    checkpoints.check()
    return lines, failure, metrics["checkpoint/failed"], there


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_one_rank_fails_the_save_on_all(tmp_path, student_dir, rank):
    directory = tmp_path / "checkpoints"
    line = f"{directory}/step_00000002: not saved, rank {rank}: no space left"
    for answer in run_ranks(2, save_with_a_full_disk_on, rank, student_dir, str(directory)):
        assert answer == ([line], line, 1, ["step_00000001"])
    assert latest(directory) == (2, [])


def train(overrides):
    from megatron_taopd.train import main

    short = ["rollout.prompts=16", "eval.prompts=null", "log.tensorboard=false"]
    return main([TINY, *short, *overrides])


def test_a_run_goes_on_without_its_checkpoints_and_says_so_at_its_end(tmp_path):
    """A file stands where the directory should be; later it does not."""
    (tmp_path / "checkpoints").write_text("")
    options = [f"run.dir={tmp_path}", "train.steps=2", "checkpoint.every=1"]
    assert run_ranks(2, train, options) == [1, 1]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["checkpoint/failed"] for record in records[1:]] == [1, 1]
    assert (tmp_path / "student" / "model.safetensors").exists()
    (tmp_path / "checkpoints").unlink()
    assert run_ranks(2, train, options) == [0, 0]
    assert latest(tmp_path / "checkpoints") == (2, [])


# --------------------------------------------------------------------- hands that mean harm


class Trap:
    """A pickle that runs code."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.makedirs, (self.file, 0o777, True)


class HiddenTrap(Trap):
    """By a name inside a module of Megatron's."""

    def __reduce__(self):
        return _Named("megatron.core.dist_checkpointing.strategies.torch", "os.makedirs"), (
            self.file,
            0o777,
            True,
        )


class _Named:
    """Pickled as a global of any name."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self, *_): ...


class _Pickler(pickle._Pickler):
    def save(self, value, save_persistent_id=True):
        if isinstance(value, _Named):
            self.write(
                pickle.SHORT_BINUNICODE + bytes([len(value.module)]) + value.module.encode()
                + pickle.SHORT_BINUNICODE + bytes([len(value.name)]) + value.name.encode()
                + pickle.STACK_GLOBAL
            )  # fmt: skip
        else:
            super().save(value, save_persistent_id)


def pickled(value):
    stream = io.BytesIO()
    _Pickler(stream, protocol=4).dump(value)
    return stream.getvalue()


def in_metadata(folder, trap):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = trap
    (folder / ".metadata").write_bytes(pickled(metadata))
    return ".metadata"


def in_common(folder, trap):
    common = torch.load(folder / "common.pt", weights_only=True)
    torch.save(common | {"more": trap}, folder / "common.pt")
    return "common.pt"


def in_an_object(folder, trap):
    """Behind the tensors of a file; the metadata says that it lies there."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    described = metadata.state_dict_metadata
    where = next(
        w for w in metadata.storage_data if isinstance(described[w.fqn], BytesStorageMetadata)
    )
    info, stream = metadata.storage_data[where], io.BytesIO()
    torch.save(trap, stream)
    with (folder / info.relative_path).open("ab") as file:
        info.offset, info.length = file.tell(), len(stream.getvalue())
        file.write(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return info.relative_path


def load_on_another_layout(student_dir, directory, trust):
    """DP2 for TP2; what each rank says."""
    from megatron_taopd.checkpoints.saving import load

    assert files.latest_valid(directory, print) == 2
    try:
        load(directory, 2, make_student(student_dir), trust)
    except Exception as error:
        return type(error).__name__, str(error)
    return None, ""


@pytest.mark.parametrize(
    ("plant", "kind"),
    [(in_metadata, Trap), (in_metadata, HiddenTrap), (in_common, Trap), (in_an_object, Trap)],
)
def test_no_code_in_a_checkpoint_is_run(saved, student_dir, tmp_path, plant, kind):
    """Its checksums fit: whoever changed it has counted anew."""
    folder, sprung = saved / "step_00000002", tmp_path / "sprung"
    changed = plant(folder, kind(str(sprung)))
    listed = {str(f.relative_to(folder)): files.sum_of(f) for f in folder.rglob("*") if f.is_file()}
    del listed[files.MANIFEST]
    files.publish(folder, folder, 2, listed)

    for kind_of_error, text in run_ranks(2, load_on_another_layout, student_dir, str(saved), False):
        assert kind_of_error == "ValueError" and "\n" not in text
        assert text.startswith(f"{folder}/{changed}: it asks for ")
        assert text.endswith("; not loaded unless checkpoint.trust is true")
    assert not sprung.exists()
    if plant is in_an_object:  # nobody asks for those that are there; yet the trap was one
        stream = io.BytesIO()
        torch.save(kind(str(sprung)), stream)
        torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
        assert sprung.exists()
    elif plant is not in_common:  # of which torch refuses as much by itself
        run_ranks(2, load_on_another_layout, student_dir, str(saved), True)
        assert sprung.exists()  # so the trap was one
