"""Ranks that die, hang or raise: all others end, and say which one it was and where.

Each job is a group of processes of its own, started as torchrun would, so that ends harm nobody.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.patience import finish, patience, wait_for
from support.ranks import PRELOAD, run_ranks
from test_train import kill_all, start, wait_for_step

from megatron_taopd.config.schema import DataSection
from megatron_taopd.parallel import watchdog
from megatron_taopd.parallel.watchdog import ENDED, Watchdog, at_step, heartbeat, phase

SILENT_S, STUCK_S = 4, 6  # on a quiet machine: a rank gets its turn at least every 4 s
ROOT = Path(__file__).parent.parent
PAIR = ROOT / "examples" / "tiny_pair"


def beats_of(work: Callable[[], object]) -> int:
    before = watchdog._here.beats
    work()
    return watchdog._here.beats - before


def test_prompts_are_signs_of_life_while_they_load(tmp_path):
    """400,000 of them take longer than a rank may go without one."""
    from transformers import AutoTokenizer

    from megatron_taopd.data.prompts import load_prompts

    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "Sam has 8 eggs . ?", "answer": 8}\n' * 50)
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "student")
    assert beats_of(lambda: load_prompts(file, tokenizer, DataSection())) == 50
    assert (
        beats_of(lambda: load_prompts(file, tokenizer, DataSection(max_prompt_tokens=9, limit=20)))
        >= 20
    )


def test_long_work_on_the_host_shows_that_it_goes_on(tmp_path):
    from megatron_taopd.checkpoints.files import SummedFile, sum_of
    from megatron_taopd.evaluation.in_loop import grade_exactly

    def write():
        with SummedFile(tmp_path / "f") as file:
            for _ in range(5):
                file.write(bytes(4 << 20))

    assert beats_of(write) == 5
    assert beats_of(lambda: sum_of(tmp_path / "f")) == 5
    assert beats_of(lambda: grade_exactly(["4"] * 7, ["4"] * 7)) == 7
    if find_spec("math_verify"):
        from megatron_taopd.evaluation.in_loop import grade_as_mathematics

        answers = [rf"\boxed{{\sqrt{{{i}}}}}" for i in range(2, 9)]
        assert beats_of(lambda: grade_as_mathematics(answers, ["x"] * 7)) == 14


def weights_on_the_move(directory: str) -> list[int]:
    """Beats of a rank that loads, exports, saves and sums up a model."""
    from megatron.core import parallel_state

    from megatron_taopd.models.student import FrozenStudent
    from megatron_taopd.models.weights import export_weights, save_hf
    from megatron_taopd.parallel import platform
    from megatron_taopd.parallel.layout import forward_layout, student_layout
    from megatron_taopd.teacher.megatron import MegatronTeacher

    platform.initialize()
    path, dtype = PAIR / "student", torch.float32
    try:
        trunk = FrozenStudent(path, student_layout(1, 1, seed=0), dtype, 1152).trunk
        teacher = MegatronTeacher(PAIR / "teacher", forward_layout(1, 1), dtype, 512)
        return [
            beats_of(lambda: list(export_weights(trunk))),
            beats_of(lambda: save_hf(export_weights(trunk), path, f"{directory}/out", dtype)),
            beats_of(teacher.fingerprint),
        ]
    finally:
        parallel_state.destroy_model_parallel()


def test_weights_on_the_move_show_that_work_goes_on(tmp_path):
    (beats,) = run_ranks(1, weights_on_the_move, str(tmp_path))
    assert min(beats) > 10, beats  # a parameter each


def test_files_that_a_library_reads_show_that_work_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "PERIOD_S", 0.05)
    (tmp_path / "f").write_bytes(bytes(2 << 20))

    def read():
        with watchdog.file_io():
            before = watchdog._here.beats
            while watchdog._here.beats < before + 3:
                (tmp_path / "f").read_bytes()

    assert beats_of(read) >= 3  # or it never ends

    def hang():
        with watchdog.file_io():
            time.sleep(1)

    assert beats_of(hang) == 0


def job(misfortune: str, whose: int, directory: str, silent_s: float, stuck_s: float) -> None:
    """Four steps of two phases; at the third, something happens to one rank before a collective."""
    dist.init_process_group("gloo")
    store = dist.distributed_c10d._get_default_store()
    rank = dist.get_rank()
    watchdog = Watchdog(store, rank, dist.get_world_size(), silent_s, stuck_s, directory)
    with watchdog:
        for step in range(1, 5):
            at_step(step)
            with phase("rollout"):
                heartbeat()
            with phase("training"):
                if (step, rank) == (3, whose):
                    time.sleep(silent_s / 4)  # a heartbeat says where
                    befall(misfortune, stuck_s)
                heartbeat()
                dist.all_reduce(torch.ones(1))
    watchdog.stop()
    dist.destroy_process_group()
    print(f"rank {rank} is done")


def befall(misfortune: str, stuck_s: float) -> None:
    if misfortune == "raises":
        raise KeyError("the cat")
    if misfortune == "sleeps":
        time.sleep(1e6)
    if misfortune == "works":
        until = time.monotonic() + 1.5 * stuck_s
        while time.monotonic() < until:
            time.sleep(0.5)
            heartbeat()
    if misfortune in ("SIGSTOP", "SIGKILL"):
        os.kill(os.getpid(), getattr(signal, misfortune))


def rank_process(rank, ranks, port, path, *args):
    """One rank, as torchrun would start it, with its output in a file."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    with open(path, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    job(*args)


def run_job(misfortune, whose, directory, ranks=3):
    """(exit status or None, output) by rank; a rank that is stopped is killed in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    paths = [directory / f"output_{rank}.txt" for rank in range(ranks)]
    arguments = (misfortune, whose, str(directory), patience(SILENT_S), patience(STUCK_S))
    processes = [
        context.Process(target=rank_process, args=(rank, ranks, port, path, *arguments))
        for rank, path in enumerate(paths)
    ]
    for process in processes:
        process.start()
    try:
        for rank, process in enumerate(processes):
            if misfortune != "SIGSTOP" or rank != whose:
                wait_for(lambda ending=process: ending.exitcode is not None, seconds=90)
        ended = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return list(zip(ended, [path.read_text() for path in paths], strict=True))


def line_of(output, beginning):
    """The one line that begins so."""
    (line,) = [line for line in output.splitlines() if line.startswith(beginning)]
    return line


@pytest.mark.parametrize("whose", [0, 1])
@pytest.mark.parametrize("misfortune", ["SIGSTOP", "SIGKILL"])
def test_a_rank_that_falls_silent_is_named_by_all_others(tmp_path, misfortune, whose):
    """Of rank 0 its store is gone, too, or does not answer."""
    results = run_job(misfortune, whose, tmp_path)
    status, _ = results.pop(whose)
    assert status == (None if misfortune == "SIGSTOP" else -signal.SIGKILL)
    for rank, (status, output) in zip({0, 1, 2} - {whose}, results, strict=True):
        assert status == ENDED, output
        line = line_of(output, f"rank {rank} ends: ")
        assert f"rank {whose} (" in line and "in training, step 3 for" in line
        assert "has been silent for" in line
        # Rank 0 may not have been heard before; where its store is, is known.
        assert ("or the store of the job on 127.0.0.1 has" in line) == (whose == 0)
        assert "Traceback" not in output, output


def test_a_stuck_job_names_the_rank_that_is_behind_and_leaves_stacks(tmp_path):
    for rank, (status, output) in enumerate(run_job("sleeps", 2, tmp_path)):
        assert status == ENDED, output
        line = line_of(output, f"rank {rank} ends: no rank has got any further for ")
        assert "behind is rank 2 (" in line and "in training, step 3 for" in line
        stacks = (tmp_path / "hang" / f"rank_{rank}.txt").read_text()
        assert ("in befall" if rank == 2 else "in all_reduce") in stacks


def test_an_exception_reaches_the_others_as_one_line(tmp_path):
    results = run_job("raises", 1, tmp_path)
    status, output = results.pop(1)
    assert status == 1
    before, traceback = output.split("Traceback", 1)
    assert "error on rank 1 in training, step 3: KeyError: 'the cat'" in before
    assert "befall(misfortune, stuck_s)" in traceback
    for rank, (status, output) in zip((0, 2), results, strict=True):
        assert status == ENDED, output
        line = line_of(output, f"rank {rank} ends: rank 1 (")
        assert line.endswith("failed in training, step 3: KeyError: 'the cat'")
        assert "Traceback" not in output


def test_work_that_goes_on_is_no_hang(tmp_path):
    for rank, (status, output) in enumerate(run_job("works", 1, tmp_path)):
        assert (status, output.splitlines()[-1]) == (0, f"rank {rank} is done")


def test_a_run_ends_when_one_of_its_processes_is_stopped(tmp_path):
    """The whole thing: torchrun, the tiny pair, and rank 1 stopped in the middle of a step."""
    import psutil

    options = [
        "train.steps=2000",
        "eval.at_start=false",
        f"watchdog.heartbeat_timeout_s={patience(15)}",
    ]
    process = start(f"run.dir={tmp_path}/run", *options)
    try:
        wait_for_step(process, tmp_path / "run", 20)  # rank 1 has said since that it is in a step
        (worker,) = [
            child
            for child in psutil.Process(process.pid).children()
            if child.environ().get("RANK") == "1"
        ]
        worker.suspend()
        output = finish(process, seconds=120)
    finally:
        if process.poll() is None:
            kill_all(process)
    assert process.returncode != 0
    line = line_of(output, "rank 0 ends: ")
    assert "rank 1 (" in line and ", step " in line and "has been silent for" in line
    assert "exitcode  : 4" in output
