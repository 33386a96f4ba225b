"""What checkpoints take of time and of the host's memory, and what offloading gives back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from megatron.core import parallel_state

from benchmarks.checkpoint import OPTIMIZER, make_model
from benchmarks.first_gpu.result import Result, Setting
from benchmarks.first_gpu.runs import STUDENT, TEACHER, join, precision
from benchmarks.weight_sync import make_checkpoint
from megatron_taopd.checkpoints import saving
from megatron_taopd.formats.hf import DTYPES
from megatron_taopd.models.student import Student
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.layout import forward_layout, student_layout
from megatron_taopd.rollout.engine import make_rollout_batch
from megatron_taopd.teacher.megatron import MegatronTeacher
from megatron_taopd.types import RolloutBatch

SAMPLE_S = 0.002
COMMON = 1024  # ids that both models of any pair here have


class HostMemory:
    """Sees in a thread the most bytes that this process holds of the host's memory.

    Pinned memory may not be among them: it is what is available of the host that then drops.
    """

    def __init__(self) -> None:
        self.most, self.least_available = 0, float("inf")
        self._ended = threading.Event()
        self._process = psutil.Process()

    def __enter__(self) -> HostMemory:
        self.before = self._process.memory_info().rss
        self.available_before = psutil.virtual_memory().available
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return max(0, self.most - self.before)

    @property
    def drop(self) -> float:
        return max(0.0, self.available_before - self.least_available)

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, self._process.memory_info().rss)
            available = psutil.virtual_memory().available
            self.least_available = min(self.least_available, available)
            if self._ended.wait(SAMPLE_S):
                return


def saves(setting: Setting) -> Result:
    """Save a student while training waits and while it goes on, and resume it in a new one.

    On one rank, whose own part is all of the state: 14 bytes of an element in bf16, 16 in fp32.
    """
    result = Result()
    join()
    model = STUDENT
    if not setting.small:
        model = Path(setting.scratch) / "student"
        make_model(model, 3e8)
    directory = Path(setting.scratch) / "checkpoints"
    with _student(model) as student:
        update(student)
        elements = sum(parameter.numel() for parameter in student.trunk.parameters())
        own = elements * (14 if student.dtype == torch.bfloat16 else 16)
        result.figures["parameters, millions"] = elements / 1e6
        result.figures["a rank's own state, MB"] = own / 1e6
        for step, asynchronous in enumerate((False, True) * (1 if setting.small else 2), start=1):
            checkpoints = saving.Checkpoints(directory, 1, asynchronous, print)
            with HostMemory() as host:
                began = time.perf_counter()
                checkpoints.save(step, student, {})
                blocked = time.perf_counter() - began
                checkpoints.finish()
                whole = time.perf_counter() - began
            checkpoints.close()
            checkpoints.check()
            name = "asynchronous" if asynchronous else "synchronous"
            name += ", the first" if step <= 2 else ", again"
            result.figures[f"{name}: blocked, s"] = blocked
            result.figures[f"{name}: blocked, s per GB"] = blocked / own * 1e9
            result.figures[f"{name}: until it is there, s"] = whole
            growth = f"{name}: growth of host memory ÷ own state"
            result.figures[f"{name}: drop of the host's available memory ÷ own state"] = (
                host.drop / own
            )
            if setting.small:  # in so few bytes a process grows by anything
                result.figures[growth] = host.growth / own
            else:
                result.most(growth, host.growth / own, 1.25)
        size = sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())
        result.most("bytes written ÷ own state", size / own, 1.25 if setting.small else 1.05)
        update(student)
        after = [parameter.detach().cpu() for parameter in student.trunk.parameters()]
    with _student(model) as student:
        with HostMemory() as host:
            began = time.perf_counter()
            saving.load(directory, step, student)
            result.figures["resumed, s"] = time.perf_counter() - began
        result.figures["resumed: growth of host memory ÷ own state"] = host.growth / own
        update(student)
        pairs = zip(student.trunk.parameters(), after, strict=True)
        different = sum(int((ours.cpu() != theirs).sum()) for ours, theirs in pairs)
        result.most("elements that differ after the next step", different, 0)
    return result


@contextmanager
def _student(model: Path) -> Iterator[Student]:
    dtype = DTYPES[precision()]
    try:
        yield Student(model, student_layout(1, 1), dtype, "none", OPTIMIZER, 100, COMMON)
    finally:
        parallel_state.destroy_model_parallel()


def update(student: Student) -> None:
    """Take an optimizer step with gradients that differ from element to element."""
    for parameter in student.model.parameters():
        places = torch.arange(parameter.numel(), device=parameter.device) % 97
        parameter.main_grad.copy_((places.view(parameter.shape) - 40) * 1e-5)
    student.step()


def offload(setting: Setting) -> Result:
    """Read with a teacher whose weights come and go, and with one whose weights stay."""
    result = Result()
    join()
    path = TEACHER
    if not setting.small:
        path = Path(setting.scratch) / "teacher"
        make_checkpoint(path, 1 << 30)
    batch = _sequences(4 if setting.small else 8, 24 if setting.small else 512)
    dtype = DTYPES[precision()]
    tokens = int(batch.lengths.sum())
    try:
        student_layout(1, 1)  # has the random states that Megatron's layers ask for
        stays = MegatronTeacher(path, forward_layout(1, 1), dtype, tokens)
        goes = MegatronTeacher(path, forward_layout(1, 1), dtype, tokens, offload=True)
        weights = sum(p.numel() * p.element_size() for p in goes.trunk.parameters())
        with stays.resident():
            expected = stays.read(batch).held.rows
        with goes.resident():  # with all that the first pass allocates for good
            got = goes.read(batch).held.rows
        result.figures["weights, MB"] = weights / 1e6
        result.most(
            "numbers that differ from those of weights that stay", (got != expected).sum(), 0
        )
        result.most("change of the fingerprint", abs(goes.fingerprint() - stays.fingerprint()), 0)
        if torch.cuda.is_available() and not setting.small:
            _give_back(result, goes, batch, weights)
            _overlap(result, goes, weights)
        elif not torch.cuda.is_available():
            result.notes.append("There is no device that memory could be given back to.")
    finally:
        parallel_state.destroy_model_parallel()
    return result


def _give_back(result: Result, teacher: MegatronTeacher, batch: RolloutBatch, weights: int) -> None:
    """Compare what the device has free before, during and after a read."""
    before = torch.cuda.mem_get_info()[0]
    with teacher.resident():
        teacher.read(batch)
        torch.cuda.synchronize()
        during = torch.cuda.mem_get_info()[0]
    after = torch.cuda.mem_get_info()[0]
    result.least("taken while it reads ÷ weights", (before - during) / weights, 1.0)
    result.most("still taken afterwards ÷ weights", (before - after) / weights, 0.02)


def _overlap(result: Result, teacher: MegatronTeacher, weights: int) -> None:
    """Time the weights' way to the device by itself, and next to matrix products."""
    x = torch.randn(4096, 4096, device=platform.device(), dtype=torch.bfloat16)

    def work(times: int) -> None:
        for _ in range(times):
            torch.mm(x, x)

    def seconds(products: int, fetch: bool) -> tuple[float, float]:
        """Return the host's seconds until the block is entered, and those until all is done."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        if not fetch:
            work(products)
            torch.cuda.synchronize()
            return 0.0, time.perf_counter() - began
        with teacher.resident():
            entered = time.perf_counter() - began
            work(products)
            torch.cuda.synchronize()
            return entered, time.perf_counter() - began

    seconds(10, True)
    entered, fetched = seconds(0, True)
    once = seconds(100, False)[1] / 100
    products = max(1, round(fetched / once))  # that take as long
    alone, both = seconds(products, False)[1], seconds(products, True)[1]
    result.figures["fetched, GB/s"] = weights / fetched / 1e9
    result.figures["fetched, ms"] = 1e3 * fetched
    result.figures["products of the same length: alone, next to it, ms"] = (
        f"{1e3 * alone:.1f}, {1e3 * both:.1f}"
    )
    result.most("host waits for the fetch, of its length", entered / fetched, 0.5, goal=True)
    hidden = (alone + fetched - both) / min(alone, fetched)
    result.least("fetch that products hide", hidden, 0.7, goal=True)


def _sequences(count: int, length: int) -> RolloutBatch:
    """Draw sequences of ids below 1,000, half of each a prompt."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 1000, (count, 2, length // 2), generator=generator)

    def zeros(**options) -> list[torch.Tensor]:
        return [torch.zeros(length // 2, **options) for _ in range(count)]

    return make_rollout_batch(
        tokens[:, 0].tolist(), range(count), list(tokens[:, 1]), zeros(), [True] * count,
        zeros(dtype=torch.int64),
    )  # fmt: skip
