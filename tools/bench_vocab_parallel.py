"""Time, memory, bytes on the wire and error of scoring and loss, ours beside the other ways.

    pip install '.[bench]'
    python tools/bench_vocab_parallel.py --tp 1 2 4 --rows 512 2048

Every way works on the same rows and the same heads and yields the same numbers: D, C and both
entropies of each row, or the mean reverse KL with the gradients of the student's hidden states and
head. docs/vocab_parallel.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_taopd import TokenScores, VocabShard, linear_divergence, score_hidden
from megatron_taopd.parallel.memory import peak_memory
from megatron_taopd.selection import budget

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ERROR_ROWS = 64
BLOCKS = 8  # the heads are drawn in this many blocks of columns, so that they do not depend on TP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", nargs="+", type=int, default=[1024], help="of the student")
    parser.add_argument(
        "--teacher-hidden", nargs="+", type=int, default=[2560], help="one for each"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[2048])
    parser.add_argument("--tp", nargs="+", type=int, default=[1])
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.05, 0.1], help="kept rows")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--chunk-rows", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of all ranks together")
    parser.add_argument("--memory-limit", type=float, help="GB; default 70 %% of what is free")
    parser.add_argument("--only", nargs="+", choices=["scores", "loss"], default=["scores", "loss"])
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    if len(arguments.hidden) != len(arguments.teacher_hidden):
        parser.error(
            "--hidden and --teacher-hidden go in pairs: give as many of one as of the other"
        )
    if arguments.vocab % BLOCKS or any(BLOCKS % tp for tp in arguments.tp):
        parser.error(f"--vocab must be a multiple of {BLOCKS}, and --tp a divisor of {BLOCKS}")
    if arguments.device == "cuda" and arguments.tp != [1]:
        parser.error("--device cuda measures one GPU: --tp 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")

    torch.multiprocessing.set_forkserver_preload(["torch", "megatron_taopd"])
    # For the ranks, which start afresh: no chatter of the profiler or of TRL in the tables.
    os.environ.update(KINETO_LOG_LEVEL="99", TRL_EXPERIMENTAL_SILENCE="1")
    pairs = zip(arguments.hidden, arguments.teacher_hidden, strict=True)
    console = Console()
    if not console.is_terminal:
        console.width = 130
    measured = []
    for (hidden, teacher_hidden), rows, tp in product(pairs, arguments.rows, arguments.tp):
        setup = Setup.of(arguments, hidden, teacher_hidden, rows, tp)
        console.print(str(setup), highlight=False)
        measured.append(setup.measure())
        console.print(*tables(measured[-1]))
        if arguments.json:
            arguments.json.write_text(json.dumps(measured, indent=2) + "\n")
    console.print(targets_table(measured))


# ------------------------------------------------------------------------------------ one setup


@dataclass(frozen=True)
class Setup:
    """One table: a pair of heads, a number of rows, a tensor-parallel size."""

    vocab: int
    hidden: int
    teacher_hidden: int
    rows: int
    tp: int
    ratios: tuple[float, ...]
    k: int
    chunk_rows: int
    dtype: str
    device: str
    repeats: int
    threads: int
    memory_limit: float
    only: tuple[str, ...]

    @classmethod
    def of(cls, arguments, hidden: int, teacher_hidden: int, rows: int, tp: int) -> Setup:
        on_cuda = arguments.device == "cuda"
        free = torch.cuda.mem_get_info()[0] if on_cuda else psutil.virtual_memory().available
        limit = 0.7 * free if arguments.memory_limit is None else 1e9 * arguments.memory_limit
        return cls(
            arguments.vocab,
            hidden,
            teacher_hidden,
            rows,
            tp,
            tuple(arguments.ratio),
            arguments.k,
            min(arguments.chunk_rows, rows),
            arguments.dtype,
            arguments.device,
            arguments.repeats,
            arguments.threads,
            limit,
            tuple(arguments.only),
        )

    def __str__(self) -> str:
        heads = f"{self.vocab:,} × {self.hidden} and {self.teacher_hidden}"
        threads = f"{self.threads} threads in all" if self.device == "cpu" else self.device
        return (
            f"{heads}, {self.rows} rows, TP {self.tp}, {self.dtype}, K = {self.k}, "
            f"chunks of {self.chunk_rows} rows, {threads}"
        )

    @property
    def input_bytes(self) -> int:
        width = self.hidden + self.teacher_hidden
        return DTYPES[self.dtype].itemsize * width * (self.vocab + self.tp * self.rows)

    def measure(self) -> dict:
        """Run all ways on fresh ranks; what rank 0 wrote down."""
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                measure_on_rank, (self, folder), nprocs=self.tp, start_method="forkserver"
            )
            return json.loads((Path(folder) / "result.json").read_text())


@dataclass(frozen=True)
class Problem:
    """What a rank works on. Shapes: student_hidden [R, D_s], student_weight [V/tp, D_s], …"""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    shard: VocabShard
    k: int
    chunk_rows: int

    @classmethod
    def draw(cls, setup: Setup, rank: int) -> Problem:
        """Logits of standard deviation 3 that the two models half share, the same for any TP."""
        shared = min(setup.hidden, setup.teacher_hidden) // 2
        private = (setup.hidden - shared, setup.teacher_hidden - shared)
        dtype, std, columns = DTYPES[setup.dtype], 0.02, setup.vocab // BLOCKS

        def normal(rows: int, width: int, logit_std: float | None = None) -> Tensor:
            scale = std if logit_std is None else logit_std / (std * math.sqrt(width))
            return torch.randn(rows, width, generator=generator).mul_(scale).to(dtype)

        generator = torch.Generator().manual_seed(BLOCKS)
        common = normal(setup.rows, shared, 2.8)
        hidden = [torch.cat([common, normal(setup.rows, width, 1.0)], 1) for width in private]
        per_rank = BLOCKS // setup.tp
        weights = [
            torch.empty(per_rank * columns, width, dtype=dtype)
            for width in (shared + p for p in private)
        ]
        for block in range(per_rank):
            generator.manual_seed(rank * per_rank + block)
            rows = slice(block * columns, (block + 1) * columns)
            weights[0][rows, :shared] = weights[1][rows, :shared] = normal(columns, shared)
            for weight, width in zip(weights, private, strict=True):
                weight[rows, shared:] = normal(columns, width)
        student_hidden, teacher_hidden = (h.to(setup.device) for h in hidden)
        student_weight, teacher_weight = (w.to(setup.device) for w in weights)
        start = rank * per_rank * columns
        group = dist.group.WORLD if setup.tp > 1 else None
        shard = VocabShard(start, start + per_rank * columns, group, setup.vocab)
        return cls(
            student_hidden.requires_grad_(),
            student_weight.requires_grad_(),
            teacher_hidden,
            teacher_weight,
            shard,
            setup.k,
            setup.chunk_rows,
        )

    @property
    def num_rows(self) -> int:
        return len(self.student_hidden)

    def at(self, rows: Tensor) -> Problem:
        """The same with only these rows [n], as a start of their own for autograd."""
        return replace(
            self,
            student_hidden=self.student_hidden.detach()[rows].requires_grad_(),
            teacher_hidden=self.teacher_hidden[rows],
        )

    def kept(self, ratio: float) -> Problem:
        """A share of the rows, spread evenly. All of them are the problem itself."""
        kept = budget(ratio, self.num_rows)
        return self.at(torch.arange(kept) * self.num_rows // kept)

    def logits(self) -> tuple[Tensor, Tensor]:
        """[R, V/tp] of the student, differentiable, and of the teacher, in the heads' dtype."""
        with torch.no_grad():
            teacher = self.teacher_hidden @ self.teacher_weight.t()
        return self.student_hidden @ self.student_weight.t(), teacher

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.num_rows, self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, self.num_rows))


# ----------------------------------------------------------------------------------------- ways


@dataclass(frozen=True)
class Way:
    """One way to get the scores (a function Problem → TokenScores) or the loss (→ scalar).

    Attributes:
        copies: how many tensors as large as its logits it holds at its worst, rounded up. This and
            the next two only serve to skip what cannot fit.
        rows_at_once: rows of which it has logits at the same time; None for all it gets.
        gathered: whether it has logits of all columns on every rank.
        ratio: share of the rows it gets.
        package: the package that has it, if it is not ours.
        ranks: "one" or "several" if it makes no sense otherwise.
        exact: whether its results are to be compared.
    """

    name: str
    what: str
    run: Callable[[Problem], TokenScores | Tensor]
    copies: int = 2
    rows_at_once: int | None = None
    gathered: bool = False
    ratio: float = 1.0
    package: str | None = None
    ranks: str = "any"
    exact: bool = True

    def expected_bytes(self, setup: Setup) -> int:
        """Of all ranks together, inputs included."""
        rows = budget(self.ratio, setup.rows)
        logits = (
            4
            * min(rows, self.rows_at_once or rows)
            * setup.vocab
            * (setup.tp if self.gathered else 1)
        )
        gradients = 2 * 4 * setup.vocab * setup.hidden if self.what == "loss" else 0
        return setup.input_bytes + self.copies * logits + gradients

    def reason_to_skip(self, setup: Setup) -> str | None:
        if self.ranks == ("several" if setup.tp == 1 else "one"):
            return f"for {self.ranks} rank{'s' * (self.ranks == 'several')}"
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if (needed := self.expected_bytes(setup)) > setup.memory_limit:
            return f"needs {needed / 1e9:.2g} GB"
        return None

    def __call__(self, problem: Problem) -> TokenScores | Tensor:
        """The scores, or the loss after its backward pass."""
        if self.what == "scores":
            with torch.no_grad():
                return self.run(problem)
        loss = self.run(problem)
        loss.backward()
        return loss.detach()


def ways(setup: Setup) -> list[Way]:
    score, loss = partial(Way, what="scores"), partial(Way, what="loss")
    ours = partial(loss, "ours", run=our_loss, copies=6, rows_at_once=setup.chunk_rows)
    matmuls = {"copies": 1, "rows_at_once": setup.chunk_rows, "exact": False}
    trl, liger = {"package": "trl", "ranks": "one"}, {"package": "liger_kernel", "ranks": "one"}
    every = [
        score("ours", run=our_scores, copies=5, rows_at_once=setup.chunk_rows),
        score("matmuls alone", run=scoring_matmuls, **matmuls),
        score("full logits, gathered", run=gathered_scores, copies=8, gathered=True),
        score("many collectives", run=textbook_scores, copies=7, ranks="several"),
        ours(),
        *(ours(ratio=ratio) for ratio in setup.ratios),
        loss("ours, one chunk", run=our_loss_in_one_chunk, copies=6),
        loss("matmuls alone", run=loss_matmuls, **matmuls),
        loss("full logits, gathered", run=gathered_loss, copies=9, gathered=True),
        loss("many collectives", run=textbook_loss, copies=7, ranks="several"),
        loss("TRL, full logits", run=trl_loss, copies=10, **trl),
        loss("TRL, chunked", run=trl_chunked_loss, copies=2, rows_at_once=4096, **trl),
        loss("Liger, chunked", run=liger_loss, copies=8, rows_at_once=2047, **liger),
    ]
    return [way for way in every if way.what in setup.only]


def our_scores(p: Problem) -> TokenScores:
    return score_hidden(
        p.student_hidden,
        p.student_weight,
        p.teacher_hidden,
        p.teacher_weight,
        p.k,
        p.shard,
        chunk_rows=p.chunk_rows,
    )


def our_loss(p: Problem) -> Tensor:
    return linear_divergence(
        p.student_hidden,
        p.student_weight,
        p.teacher_hidden,
        p.teacher_weight,
        p.shard,
        "reverse_kl",
        chunk_rows=p.chunk_rows,
        row_weight=torch.full((p.num_rows,), 1 / p.num_rows, device=p.student_hidden.device),
    )


def our_loss_in_one_chunk(p: Problem) -> Tensor:
    return our_loss(replace(p, chunk_rows=p.num_rows))


def scoring_matmuls(p: Problem) -> None:
    """The floor: both heads, into buffers that are there already."""
    buffer = p.student_hidden.new_empty(p.chunk_rows, len(p.student_weight))
    for rows in p.chunks():
        logits = buffer[: rows.stop - rows.start]
        torch.mm(p.student_hidden[rows], p.student_weight.t(), out=logits)
        torch.mm(p.teacher_hidden[rows], p.teacher_weight.t(), out=logits)


@torch.no_grad()
def loss_matmuls(p: Problem) -> Tensor:
    """The floor: both heads, and the student's two gradients from anything of the right shape."""
    logits = p.student_hidden.new_empty(p.chunk_rows, len(p.student_weight))
    hidden_grad = torch.empty_like(p.student_hidden)
    weight_grad = torch.zeros_like(p.student_weight)
    for rows in p.chunks():
        chunk = logits[: rows.stop - rows.start]
        torch.mm(p.teacher_hidden[rows], p.teacher_weight.t(), out=chunk)
        torch.mm(p.student_hidden[rows], p.student_weight.t(), out=chunk)
        torch.mm(chunk, p.student_weight, out=hidden_grad[rows])
        weight_grad.addmm_(chunk.t(), p.student_hidden[rows])
    return torch.zeros((), requires_grad=True)


# --- dense, of logits of any float type: also the float64 reference


def dense_scores(student_logits: Tensor, teacher_logits: Tensor, k: int) -> TokenScores:
    """[R, V] logits of the whole vocabulary → scores, by their definitions."""
    log_p, log_q = student_logits.log_softmax(1), teacher_logits.log_softmax(1)
    top = [logits.topk(k, dim=1).indices for logits in (student_logits, teacher_logits)]
    ids = torch.cat(top, dim=1)
    return TokenScores(
        disagreement=disagreement(ids, log_p.gather(1, ids), log_q.gather(1, ids)),
        compatibility=log_q.gather(1, top[0]).exp().sum(1),
        student_entropy=-(log_p.exp() * log_p).sum(1),
        teacher_entropy=-(log_q.exp() * log_q).sum(1),
    )


def disagreement(ids: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """[R] KL(q ‖ p) over the set of the ids [R, 2K], renormalised; an id twice counts once."""
    ids, order = ids.sort(dim=1)
    again = torch.nn.functional.pad(ids.diff(dim=1) == 0, (1, 0))
    log_p, log_q = (
        x.gather(1, order).masked_fill(again, -torch.inf).log_softmax(1) for x in (log_p, log_q)
    )
    return (log_q.exp() * (log_q - log_p).masked_fill(again, 0)).sum(1)


def dense_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean reverse KL of [R, V] logits of the whole vocabulary."""
    log_p, log_q = student_logits.log_softmax(1), teacher_logits.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


class GatherColumns(torch.autograd.Function):
    """[R, V/tp] of each rank → [R, V] on every rank; the gradient is this rank's columns of it."""

    @staticmethod
    def forward(ctx, local, shard):
        ctx.columns = slice(shard.start, shard.stop)
        parts = [torch.empty_like(local) for _ in range(shard.world_size)]
        dist.all_gather(parts, local.contiguous(), group=shard.group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, grad):
        return grad[:, ctx.columns], None


def gathered_logits(p: Problem) -> list[Tensor]:
    """[R, V] fp32 of both models."""
    if p.shard.group is None:
        return [logits.float() for logits in p.logits()]
    return [GatherColumns.apply(logits.float(), p.shard) for logits in p.logits()]


def gathered_scores(p: Problem) -> TokenScores:
    return dense_scores(*gathered_logits(p), p.k)


def gathered_loss(p: Problem) -> Tensor:
    return dense_loss(*gathered_logits(p))


# --- the textbook: a collective wherever the dense formula has a reduction


class SumShards(torch.autograd.Function):
    """Σ over ranks. The gradient is summed, too, if each rank goes on with its own columns."""

    @staticmethod
    def forward(ctx, local, shard, own_columns_follow):
        ctx.shard, ctx.sum_gradient = shard, own_columns_follow
        return all_reduce(local.clone(), shard)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad.clone(), ctx.shard) if ctx.sum_gradient else grad, None, None


def all_reduce(x: Tensor, shard: VocabShard, op=dist.ReduceOp.SUM) -> Tensor:
    if shard.group is not None:
        dist.all_reduce(x, op, group=shard.group)
    return x


def sharded_log_softmax(logits: Tensor, shard: VocabShard) -> Tensor:
    """[R, V/tp] → log p of the whole vocabulary's distribution. Two all-reduces."""
    top = all_reduce(logits.detach().amax(1, keepdim=True), shard, dist.ReduceOp.MAX)
    shifted = logits - top
    return shifted - SumShards.apply(shifted.exp().sum(1, keepdim=True), shard, True).log()


def sharded_topk(logits: Tensor, k: int, shard: VocabShard) -> Tensor:
    """[R, K] ids of the highest logits of all shards. Two all-gathers."""
    values, columns = logits.topk(k, dim=1)
    if shard.group is None:
        return columns
    all_values = [torch.empty_like(values) for _ in range(shard.world_size)]
    all_ids = [torch.empty_like(columns) for _ in range(shard.world_size)]
    dist.all_gather(all_values, values, group=shard.group)
    dist.all_gather(all_ids, columns + shard.start, group=shard.group)
    best = torch.cat(all_values, dim=1).topk(k, dim=1).indices
    return torch.cat(all_ids, dim=1).gather(1, best)


def fetch(values: Tensor, ids: Tensor, shard: VocabShard) -> Tensor:
    """[R, n] values at ids, wherever they are. One all-reduce."""
    columns = ids - shard.start
    here = (columns >= 0) & (columns < values.shape[1])
    found = values.gather(1, columns.clamp(0, values.shape[1] - 1)).masked_fill(~here, 0)
    return all_reduce(found, shard)


def textbook_scores(p: Problem) -> TokenScores:
    student_logits, teacher_logits = (logits.float() for logits in p.logits())
    log_p = sharded_log_softmax(student_logits, p.shard)
    log_q = sharded_log_softmax(teacher_logits, p.shard)
    student_ids = sharded_topk(student_logits, p.k, p.shard)
    ids = torch.cat([student_ids, sharded_topk(teacher_logits, p.k, p.shard)], dim=1)
    log_p_at, log_q_at = fetch(log_p, ids, p.shard), fetch(log_q, ids, p.shard)
    return TokenScores(
        disagreement=disagreement(ids, log_p_at, log_q_at),
        compatibility=log_q_at[:, : p.k].exp().sum(1),
        student_entropy=-all_reduce((log_p.exp() * log_p).sum(1), p.shard),
        teacher_entropy=-all_reduce((log_q.exp() * log_q).sum(1), p.shard),
    )


def textbook_loss(p: Problem) -> Tensor:
    log_p, log_q = (sharded_log_softmax(logits.float(), p.shard) for logits in p.logits())
    return SumShards.apply((log_p.exp() * (log_p - log_q)).sum(1), p.shard, False).mean()


# --- other projects' own functions, for which beta = 1 is the reverse KL


def trl_loss(p: Problem) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(*p.logits(), beta=1.0)


def trl_chunked_loss(p: Problem) -> Tensor:
    """What TRL's DistillationTrainer calls, with its own chunks (4096 rows × 32768 columns)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = (p.student_hidden, p.student_weight), (p.teacher_hidden, p.teacher_weight)
    divergence, _ = ChunkedDivergenceFunction.apply(*student, None, *teacher, None, 1.0)
    return divergence.mean()


def liger_loss(p: Problem) -> Tensor:
    """With its own chunk size (1024 rows); compiled on CUDA, which is its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=p.student_hidden.is_cuda
    )
    labels = torch.zeros(p.num_rows, dtype=torch.long, device=p.student_hidden.device)
    student, teacher = (p.student_hidden, p.student_weight), (p.teacher_hidden, p.teacher_weight)
    return loss(*student, *teacher, labels)


# ------------------------------------------------------------------------------------ measuring


def measure_on_rank(rank: int, setup: Setup, folder: str) -> None:
    """Memory, wire and error of each way once, then times, the ways taking turns."""
    torch.set_num_threads(max(1, setup.threads // setup.tp))
    if setup.tp > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # host names need not resolve
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=setup.tp)
    problem = Problem.draw(setup, rank)
    reference = Reference.of(problem.at(torch.arange(min(ERROR_ROWS, setup.rows))))
    runnable: list[tuple[Way, Problem, dict]] = []
    results = []
    for way in ways(setup):
        result = {"name": way.name, "what": way.what, "ratio": way.ratio, "exact": way.exact}
        results.append(result)
        result["skipped"] = way.reason_to_skip(setup)
        if result["skipped"]:
            continue
        own = problem if way.ratio == 1 else problem.kept(way.ratio)
        result["rows"] = own.num_rows
        if way.exact and way.ratio == 1:
            result["error"] = reference.errors(way)
        result |= cost(way, own)
        runnable.append((way, own, result))
        say(
            rank,
            f"  {way.what}: {way.name}, {own.num_rows} rows, {result['temporaries'] / 1e6:.0f} MB",
        )
    for repeat in range(setup.repeats):
        for way, own, result in runnable:
            result.setdefault("seconds", []).append(seconds(way, own))
        say(rank, f"  timed {repeat + 1} of {setup.repeats}")
    if rank == 0:
        answer = {"setup": asdict(setup), "title": str(setup), "ways": results}
        if setup.tp == 1:
            answer["best_matmul_flops"] = best_matmul_rate(problem)
        (Path(folder) / "result.json").write_text(json.dumps(answer))
    if setup.tp > 1:
        dist.barrier()
        dist.destroy_process_group()


def say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, file=sys.stderr, flush=True)


def forget_gradients(p: Problem) -> None:
    p.student_hidden.grad = p.student_weight.grad = None


def cost(way: Way, p: Problem) -> dict:
    """Peak temporaries of the worst rank in bytes; collectives; bytes a row and rank sends."""
    forget_gradients(p)
    with peak_memory(p.student_hidden.device.type) as memory, count_collectives() as sent:
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
    """Until the last rank is done."""
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


@dataclass(frozen=True)
class Reference:
    """The float64 answer for a few rows, from logits of the very same hidden states and heads."""

    problem: Problem
    scores: TokenScores
    loss: Tensor
    hidden_grad: Tensor
    logits_grad: Tensor = field(repr=False)  # [n, V/tp] of this rank's columns

    @classmethod
    def of(cls, p: Problem) -> Reference:
        student, teacher = (
            wide_logits(h, w, p.shard)
            for h, w in (
                (p.student_hidden.detach(), p.student_weight.detach()),
                (p.teacher_hidden, p.teacher_weight),
            )
        )
        student.requires_grad_()
        loss = dense_loss(student, teacher)
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


# -------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Target:
    """A ratio of two figures of one table, and its limit."""

    text: str
    limit: float
    ratio: Callable[[Results], float]
    at_least: bool = False
    applies: Callable[[dict], bool] = lambda setup: True

    def met(self, ratio: float) -> bool:
        return ratio >= self.limit if self.at_least else ratio <= self.limit


class Results:
    """Look-ups in what was measured of one setup. KeyError for what did not run."""

    def __init__(self, measured: dict):
        self.measured, self.setup = measured, measured["setup"]
        self.ways = {
            (way["what"], way["name"], way["ratio"]): way
            for way in measured["ways"]
            if way["skipped"] is None
        }

    def seconds(self, what: str, name: str, ratio: float = 1.0) -> float:
        return median(self.ways[what, name, ratio]["seconds"])

    def temporaries(self, what: str, name: str, ratio: float = 1.0) -> int:
        return self.ways[what, name, ratio]["temporaries"]

    def fastest_peer(self) -> float:
        """Seconds of the fastest loss that is not ours."""
        own = ("ours", "ours, one chunk", "matmuls alone")
        return min(
            self.seconds(*key) for key in self.ways if key[0] == "loss" and key[1] not in own
        )

    def flops(self, what: str) -> int:
        """Of the matmuls alone, on all rows."""
        width = {"scores": self.setup["hidden"], "loss": 3 * self.setup["hidden"]}[what]
        return 2 * self.setup["rows"] * self.setup["vocab"] * (width + self.setup["teacher_hidden"])

    def best_matmul_flops(self) -> float:
        """FLOP/s, by themselves or in a row."""
        floors = (key for key in self.ways if key[1] == "matmuls alone")
        rates = (self.flops(key[0]) / min(self.ways[key]["seconds"]) for key in floors)
        return max(self.measured["best_matmul_flops"], *rates)

    def matmul_fraction(self, what: str) -> float:
        """Of the best rate: that at which our matmuls get done, with all the rest."""
        return self.flops(what) / self.seconds(what, "ours") / self.best_matmul_flops()


def on_cuda(setup: dict) -> bool:
    return setup["device"] == "cuda"


ERRORS = {"scores": ("D", "C", "H"), "loss": ("loss", "∂h", "∂W")}
DENSE = "full logits, gathered"
TARGETS = (
    Target(
        "scoring: time ÷ the two head matmuls",
        1.5,
        lambda r: r.seconds("scores", "ours") / r.seconds("scores", "matmuls alone"),
    ),
    Target(
        "scoring: temporaries ÷ full logits, 2,048 rows or more",
        1 / 8,
        lambda r: r.temporaries("scores", "ours") / r.temporaries("scores", DENSE),
        applies=lambda setup: setup["rows"] >= 2048,
    ),
    Target(
        "loss at ρ = 10 %: time ÷ all rows",
        0.15,
        lambda r: r.seconds("loss", "ours", 0.1) / r.seconds("loss", "ours"),
    ),
    Target(
        "loss at ρ = 10 %: temporaries ÷ all rows in one chunk",
        0.15,
        lambda r: r.temporaries("loss", "ours", 0.1) / r.temporaries("loss", "ours, one chunk"),
    ),
    Target(
        "loss: time ÷ fastest peer",
        1.2,
        lambda r: r.seconds("loss", "ours") / r.fastest_peer(),
    ),
    Target(
        "loss: temporaries ÷ full logits",
        1 / 4,
        lambda r: r.temporaries("loss", "ours") / r.temporaries("loss", DENSE),
    ),
    Target(
        "scoring: share of the best matmul rate",
        0.7,
        lambda r: r.matmul_fraction("scores"),
        at_least=True,
        applies=on_cuda,
    ),
    Target(
        "loss: share of the best matmul rate",
        0.6,
        lambda r: r.matmul_fraction("loss"),
        at_least=True,
        applies=on_cuda,
    ),
)


def tables(measured: dict) -> Iterator[Table]:
    results = Results(measured)
    for what, errors in ERRORS.items():
        if what not in measured["setup"]["only"]:
            continue
        table = Table(box=SIMPLE, caption=matmul_share(results, what), caption_justify="left")
        table.add_column(what, no_wrap=True)
        for header in ("rows", "s", "÷ matmuls", "MB", "collectives", "B/row", *errors):
            table.add_column(header, justify="right", no_wrap=True)
        for way in measured["ways"]:
            if way["what"] == what:
                table.add_row(*cells(way, results))
        yield table


def cells(way: dict, results: Results) -> list[str]:
    name = way["name"] + (f", ρ = {100 * way['ratio']:g} %" if way["ratio"] < 1 else "")
    if way["skipped"]:
        return [f"{name} ({way['skipped']})"]
    key, floor = (way["what"], way["name"], way["ratio"]), (way["what"], "matmuls alone", 1.0)
    seconds, errors = results.seconds(*key), way.get("error", {})
    return [
        name,
        f"{way['rows']:,}",
        f"{seconds:.3g}",
        f"{seconds / results.seconds(*floor):.2f}" if floor in results.ways else "",
        f"{way['temporaries'] / 1e6:,.0f}" if way["exact"] else "",
        f"{way['collectives'] or ''}",
        f"{way['sent_per_row']:,.0f}" if way["collectives"] else "",
        *(f"{errors[name]:.0e}" if name in errors else "" for name in ERRORS[way["what"]]),
    ]


def matmul_share(results: Results, what: str) -> str | None:
    try:
        share = results.matmul_fraction(what)
    except KeyError:
        return None
    rate = f"{results.best_matmul_flops() / 1e12:.3g} TFLOP/s"
    return f"best matmul of a head {rate}; ours runs at {share:.0%} of it"


def targets_table(measured: list[dict]) -> Table:
    table = Table(box=SIMPLE, title="targets")
    for header in ("", "setup", "limit", "measured", ""):
        table.add_column(header, justify="right" if header in ("limit", "measured") else "left")
    for target in TARGETS:
        for results in map(Results, measured):
            setup = results.setup
            if not target.applies(setup):
                continue
            try:
                ratio = target.ratio(results)
            except KeyError:
                continue  # one of the two did not run: its own row of the table says why
            where = f"{setup['hidden']}/{setup['teacher_hidden']} {setup['rows']} TP{setup['tp']}"
            sign = "≥" if target.at_least else "≤"
            met = "met" if target.met(ratio) else "missed"
            table.add_row(target.text, where, f"{sign} {target.limit:.3g}", f"{ratio:.3f}", met)
    return table


if __name__ == "__main__":
    main()
