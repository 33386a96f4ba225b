"""Each rank saves what its optimizer owns, and reads it again: bytes held, written and read."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from support.ranks import run_ranks
from support.step import OPTIMIZER, make_model, train_step
from torch.distributed.checkpoint import FileSystemReader

from benchmarks.checkpoint import gathered
from megatron_taopd.checkpoints.files import MANIFEST, shared
from megatron_taopd.formats.megatron import MegatronCheckpoint

VOCABULARY = 4096


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "student"
    return make_model(directory, vocab_size=VOCABULARY, hidden_size=64, layers=4, seed=0)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 4)])
def test_boxes_are_the_range_in_order(shape):
    """Of every range of a tensor whose elements are their own numbers."""
    from megatron_taopd.checkpoints.shards import boxes

    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(numbers.numel() + 1):
        for stop in range(start, numbers.numel() + 1):
            cut = list(boxes(start, stop, shape))
            found = [
                numbers[tuple(slice(c, c + n) for c, n in zip(*box, strict=True))].flatten()
                for box in cut
            ]
            assert torch.cat([*found, numbers.new_empty(0)]).tolist() == [*range(start, stop)]
            assert len(cut) <= 2 * len(shape) - 1


def make_student(student_dir, parallel, dtype):
    from megatron.core import parallel_state

    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform

    platform.emulate_cuda()
    parallel_state.destroy_model_parallel()  # of a student before this one
    layout = layouts.student_layout(*parallel)
    return Student(student_dir, layout, dtype, "none", OPTIMIZER, 100, VOCABULARY)


def trained(student_dir, parallel, dtype):
    """After two steps with made-up gradients; all moments move."""
    student = make_student(student_dir, parallel, dtype)
    for seed in (1, 2):
        train_step(student, seed)
    return student


def contents(student):
    """(weights by name, this rank's masters and moments)"""
    owned = []
    for distributed in student.optimizer.chained_optimizers:
        for main in masters(distributed):
            moments = distributed.optimizer.state[main]
            owned += [main.detach().clone(), *(moments[name].clone() for name in sorted(moments))]
    return {name: t.clone() for name, t in student.named_tensors()}, owned


def masters(distributed):
    return [main for group in distributed.optimizer.param_groups for main in group["params"]]


def same(ours, theirs):
    weights = all(torch.equal(ours[0][name], theirs[0][name]) for name in theirs[0])
    return weights and all(map(torch.equal, ours[1], theirs[1]))


def save_and_resume(student_dir, directory, parallel, dtype, other, before=False):
    """What a save holds, which files a resume sums and which places in them it loads, and whether
    both layouts have what was saved."""
    from megatron_taopd.checkpoints import files, saving
    from megatron_taopd.parallel.memory import peak_memory

    student = trained(student_dir, parallel, dtype)
    saved = contents(student)
    optimizers = student.optimizer.chained_optimizers
    elements = sum(main.numel() for each in optimizers for main in masters(each))
    checkpoints = saving.Checkpoints(directory, 1, True, print)
    state, own_form = saving._state, gathered if before else saving._state
    saving._state = own_form
    try:
        with peak_memory() as memory:
            checkpoints.save(1, student, {})
            checkpoints._writing.written.result()
    finally:
        saving._state = state
    checkpoints.finish()
    checkpoints.check()
    checkpoints.close()

    slices, read = FileSystemReader._slice_file, []

    def count(reader, file, info):
        read.append((info.relative_path, info.offset, info.length))
        return slices(reader, file, info)

    sum_of, summed = files.sum_of, []

    def note(file):
        summed.append(file.name)
        return sum_of(file)

    resumed = make_student(student_dir, parallel, dtype)
    FileSystemReader._slice_file, files.sum_of = count, note
    try:
        assert files.latest_valid(directory, print) == 1
        saving.load(directory, 1, resumed)
    finally:
        FileSystemReader._slice_file, files.sum_of = slices, sum_of
    again = same(contents(resumed), saved)
    there = make_student(student_dir, other, dtype)
    saving.load(directory, 1, there)
    elsewhere = same((contents(there)[0], []), saved)
    own = elements * (12 + dtype.itemsize)
    return memory.peak / own, (summed, read), again, elsewhere


LAYOUTS = pytest.mark.parametrize(
    ("parallel", "dtype", "other"),
    [((1, 1), torch.float32, (2, 2)), ((2, 1), torch.bfloat16, (1, 2))],
    ids=["DP4", "TP2-DP2 in bf16"],
)


def written(directory):
    """Bytes of the tensors that each rank has written, without torch's some 1,300 around each."""
    checkpoint, sizes = MegatronCheckpoint(Path(directory) / "step_00000001"), [0] * 4
    for key, places in checkpoint.places.items():
        for _corner, shape, info in places:
            rank = int(info.relative_path.split("_")[2])
            sizes[rank] += prod(shape) * checkpoint.dtype(key).itemsize
    return sizes


@LAYOUTS
def test_a_rank_holds_writes_and_reads_its_own(student_dir, tmp_path, parallel, dtype, other):
    """Host memory of a save, in shares of a rank's own state; bytes that each rank writes; every
    byte that a resume reads, once, but for the norms, which TP ranks have in common."""
    arguments = student_dir, str(tmp_path), parallel, dtype, other
    answers = run_ranks(4, save_and_resume, *arguments)
    held, reads, again, elsewhere = zip(*answers, strict=True)
    summed, reads = zip(*reads, strict=True)
    assert max(held) <= 1.25
    assert all(again) and all(elsewhere)
    sizes = written(tmp_path)
    assert max(sizes) < 1.1 * min(sizes)
    places = [place for read in reads for place in read]
    twice = sum(place[2] for place in places) - sum(place[2] for place in set(places))
    assert twice == 0 if parallel == (1, 1) else twice < 0.05 * sum(sizes)
    assert places
    # And no byte from storage but once: a rank has summed what it loads, in its node's page cache.
    listed = json.loads((tmp_path / "step_00000001" / MANIFEST).read_text())["files"]
    assert sorted(name for own in summed for name in own) == sorted(Path(n).name for n in listed)
    others = sum(
        size
        for own, read in zip(summed, reads, strict=True)
        for name, _offset, size in read
        if name not in own
    )
    assert others == twice


@pytest.mark.parametrize(
    ("parallel", "other"),
    [
        ((1, 1, False, 0, 2), (2, 1, True, 0, 2)),
        ((2, 1, True, 0, 2), (1, 1, False, 0, 4)),
        ((1, 2, False, 0, 2), (1, 1, False, 0, 1)),
    ],
    ids=["EP2-DP2 to TP2-SP-EP2", "TP2-SP-EP2 to EP4", "PP2-EP2 to DP4"],
)
def test_experts_resume_on_their_layout_and_on_another(tmp_path, parallel, other):
    """Experts have an optimizer of their own, over the ranks that have the same ones."""
    student = tmp_path / "student"
    make_model(student, VOCABULARY, 32, layers=2, seed=0, tied=False, experts=4)
    arguments = str(student), str(tmp_path / "saved"), parallel, torch.float32, other
    _held, reads, again, elsewhere = zip(*run_ranks(4, save_and_resume, *arguments), strict=True)
    assert all(again) and all(elsewhere)
    places = [place for _summed, read in reads for place in read]
    twice = sum(place[2] for place in places) - sum(place[2] for place in set(places))
    assert twice < 0.05 * sum(place[2] for place in places)  # norms and routers under TP


def test_files_of_other_ranks_than_there_are_now_are_dealt_by_size():
    found = {f"__{rank}_0.distcp": (100 + rank, 0) for rank in range(4)} | {"common.pt": (7, 0)}
    names = ["common.pt", *(f"__{rank}_0.distcp" for rank in range(4))]
    assert shared(found, 2) == [sorted(names[0::2]), sorted(names[1::2])]
    assert shared(found, 4) == [sorted([names[1], names[0]]), *([n] for n in names[2:])]
    by_one_of_two = {"__0_0.distcp": (9, 0), "__0_1.distcp": (8, 0)}  # as there were before
    assert shared(by_one_of_two, 2) == [["__0_1.distcp"], ["__0_0.distcp"]]


@LAYOUTS
def test_checkpoints_from_before_load(student_dir, tmp_path, parallel, dtype, other):
    """Whole tensors of each model-parallel rank, written by one of its data-parallel ranks."""
    arguments = student_dir, str(tmp_path), parallel, dtype, other, True
    held, _reads, again, elsewhere = zip(*run_ranks(4, save_and_resume, *arguments), strict=True)
    assert max(held) > 2  # so the meter meters
    assert all(again) and all(elsewhere)
    assert 0 in written(tmp_path)
