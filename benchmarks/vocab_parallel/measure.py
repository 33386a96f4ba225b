"""Time, memory, traffic and error of every way, on fresh ranks."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from benchmarks.vocab_parallel import peers
from benchmarks.vocab_parallel.formulas import Formula, dense_scores
from benchmarks.vocab_parallel.problem import Problem, Setup
from benchmarks.vocab_parallel.ways import GatherColumns, Way, all_reduce, report, ways
from megatron_taopd import TokenScores, VocabShard
from megatron_taopd.parallel.memory import peak_memory

ERROR_ROWS = 64


def measure(setup: Setup) -> dict:
    """Run all ways on fresh ranks; what rank 0 wrote down."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            measure_on_rank, (setup, folder), nprocs=setup.tp, start_method="forkserver"
        )
        return json.loads((Path(folder) / "result.json").read_text())


def measure_on_rank(rank: int, setup: Setup, folder: str) -> None:
    """Memory, wire and error of each way once, then times, the ways taking turns."""
    torch.set_num_threads(max(1, setup.threads // setup.tp))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # host names need not resolve
    backend, store = "nccl" if setup.device == "cuda" else "gloo", f"file://{folder}/store"
    joined = not dist.is_initialized()
    if joined:
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=setup.tp)
    problem = Problem.draw(setup, rank)
    if "loss" in setup.only:
        problem = replace(problem, reported=report(problem))
    references = References(problem.at(torch.arange(min(ERROR_ROWS, setup.rows))))
    runnable: list[tuple[Way, Problem, dict]] = []
    results = []
    for way in ways(setup):
        result = {"name": way.name, "what": way.what, "ratio": way.ratio, "exact": way.exact}
        if way.what == "loss" and way.exact:
            result["computes"] = way.computes.name
        results.append(result)
        result["skipped"] = way.reason_to_skip(setup)
        if result["skipped"]:
            continue
        if way.peer and way.peer.on_megatron:
            peers.start_megatron(setup.tp)
        own = problem if way.ratio == 1 else problem.kept(way.ratio)
        result["rows"] = own.num_rows
        if way.exact and way.ratio == 1:
            result["error"] = references.of(way.computes).errors(way)
        result |= cost(way, own)
        runnable.append((way, own, result))
        say(
            rank,
            f"  {way.what}: {way.name}, {own.num_rows} rows, {result['temporaries'] / 1e6:.0f} MB",
        )
    for repeat in range(setup.repeats):
        for way, own, result in runnable:
            started = time.process_time()
            result.setdefault("seconds", []).append(seconds(way, own))
            result.setdefault("cpu_seconds", []).append(time.process_time() - started)
        say(rank, f"  timed {repeat + 1} of {setup.repeats}")
    if rank == 0:
        answer = {"setup": asdict(setup), "title": str(setup), "ways": results}
        if setup.tp == 1:
            answer["best_matmul_flops"] = best_matmul_rate(problem)
        (Path(folder) / "result.json").write_text(json.dumps(answer))
    dist.barrier()
    if joined:
        dist.destroy_process_group()


def say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, file=sys.stderr, flush=True)


def forget_gradients(p: Problem) -> None:
    p.student_hidden.grad = p.student_weight.grad = None


def cost(way: Way, p: Problem) -> dict:
    """Peak temporaries of the worst rank in bytes; collectives; bytes a row and rank sends."""
    forget_gradients(p)
    # torch.compile knows collectives by their functions, so they cannot be replaced then.
    counting = nullcontext([]) if way.peer is peers.COMPILER else count_collectives()
    with peak_memory(p.student_hidden.device.type) as memory, counting as sent:
        result = way(p)
    del result
    peaks = torch.tensor([memory.temporaries, memory.peak])
    temporaries, peak = all_reduce(peaks, p.shard, dist.ReduceOp.MAX).tolist()
    return {
        "temporaries": temporaries,
        "peak": peak,
        "collectives": len(sent),
        "sent_per_row": sum(sent) / p.num_rows,
    }


@contextmanager
def count_collectives() -> Iterator[list[int]]:
    """The bytes that this rank hands to each collective of torch.distributed."""
    sent: list[int] = []
    position = {
        "all_reduce": 0,
        "all_gather": 1,
        "all_gather_into_tensor": 1,
        "all_gather_single": 1,
    }
    originals = {name: getattr(dist, name) for name in position}

    def counting(name: str) -> Callable:
        def call(*args, **kwargs):
            sent.append(args[position[name]].nbytes)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def seconds(way: Way, p: Problem) -> float:
    """Time one way until the last rank is done."""
    forget_gradients(p)
    wait_for_all(p)
    started = time.perf_counter()
    result = way(p)
    wait_for_all(p)
    del result
    return time.perf_counter() - started


def wait_for_all(p: Problem) -> None:
    if p.student_hidden.is_cuda:
        torch.cuda.synchronize()
    if p.shard.group is not None:
        dist.barrier(p.shard.group)


def best_matmul_rate(p: Problem) -> float:
    """FLOP/s of the fastest matmul of a head found, for chunks of rows and for all of them."""
    best = 0.0
    row_counts = (
        {p.chunk_rows, min(8192, p.num_rows)} if p.student_hidden.is_cuda else {p.chunk_rows}
    )
    heads = ((p.student_hidden, p.student_weight), (p.teacher_hidden, p.teacher_weight))
    for rows, (hidden, weight) in product(row_counts, heads):
        logits = hidden.new_empty(rows, len(weight))
        way = Way("matmul", "scores", partial(matmul, hidden[:rows], weight, logits))
        alone = replace(p, shard=replace(p.shard, group=None))
        fastest = min(seconds(way, alone) for _ in range(3))
        best = max(best, 2 * rows * weight.numel() / fastest)
    return best


def matmul(hidden: Tensor, weight: Tensor, out: Tensor, _: Problem) -> None:
    torch.mm(hidden, weight.t(), out=out)


class References:
    """The reference of every formula, once for all that compute it."""

    def __init__(self, problem: Problem):
        self.of = cache(partial(Reference.of, problem))


@dataclass(frozen=True)
class Reference:
    """The float64 answer for a few rows, from logits of the very same hidden states and heads."""

    problem: Problem
    scores: TokenScores
    loss: Tensor
    hidden_grad: Tensor
    logits_grad: Tensor = field(repr=False)  # [n, V/tp] of this rank's columns

    @classmethod
    def of(cls, p: Problem, formula: Formula) -> Reference:
        """Compute it for a problem of few rows."""
        student, teacher = (
            wide_logits(h, w, p.shard)
            for h, w in (
                (p.student_hidden.detach(), p.student_weight.detach()),
                (p.teacher_hidden, p.teacher_weight),
            )
        )
        student.requires_grad_()
        loss = formula.dense(student, teacher, p.k)
        loss.backward()
        own = student.grad[:, p.shard.start : p.shard.stop].contiguous()
        hidden_grad = sum(
            own[:, columns] @ p.student_weight.detach()[columns].double()
            for columns in blocks(len(p.student_weight))
        )
        scores = dense_scores(student.detach(), teacher, p.k)
        return cls(p, scores, loss.detach(), all_reduce(hidden_grad, p.shard), own)

    def errors(self, way: Way) -> dict[str, float]:
        """Largest relative error of each result; of gradients, relative to the largest entry."""
        p = self.problem
        forget_gradients(p)
        result = way(p)
        if way.what == "scores":
            entropies = ("student_entropy", "teacher_entropy")
            return {
                "D": relative_error(result.disagreement, self.scores.disagreement),
                "C": relative_error(result.compatibility, self.scores.compatibility),
                "H": max(
                    relative_error(getattr(result, name), getattr(self.scores, name))
                    for name in entropies
                ),
            }
        hidden_grad = all_reduce(p.student_hidden.grad.double(), p.shard)
        off, largest = torch.zeros(2, dtype=torch.float64).unbind()
        hidden = p.student_hidden.detach().double()
        for columns in blocks(len(p.student_weight)):
            exact = self.logits_grad[:, columns].t() @ hidden
            gap = (p.student_weight.grad[columns] - exact).abs().max().cpu()
            off, largest = torch.maximum(off, gap), torch.maximum(largest, exact.abs().max().cpu())
        off, largest = all_reduce(torch.stack([off, largest]), p.shard, dist.ReduceOp.MAX)
        return {
            "loss": relative_error(result, self.loss),
            "∂h": (
                (hidden_grad - self.hidden_grad).abs().max() / self.hidden_grad.abs().max()
            ).item(),
            "∂W": (off / largest).item(),
        }


def wide_logits(hidden: Tensor, weight: Tensor, shard: VocabShard) -> Tensor:
    """[n, V] float64 of the whole vocabulary; the head is widened block by block."""
    hidden = hidden.double()
    local = torch.cat([hidden @ weight[c].double().t() for c in blocks(len(weight))], dim=1)
    return local if shard.group is None else GatherColumns.apply(local, shard)


def blocks(columns: int, size: int = 8192) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, columns, size))


def relative_error(values: Tensor, exact: Tensor) -> float:
    return ((values.double() - exact).abs() / exact.abs()).max().item()
