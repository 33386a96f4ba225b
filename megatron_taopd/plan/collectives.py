"""Every collective of a step: which ranks, how often, how many bytes.

Exact where sequences are of one length and divide evenly over the ranks that they are dealt to, as
`Workload` has them; benchmarks/scaling compares it with what a rank of 64 really calls.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from megatron_taopd.parallel import exchange, packing
from megatron_taopd.parallel.vocab.projection import rows_within
from megatron_taopd.plan import links
from megatron_taopd.plan.setup import Servers, Setup, Workload, rows_by_rank
from megatron_taopd.plan.shapes import (
    Architecture,
    Grid,
    exported,
    student_buffers,
)
from megatron_taopd.serving.sources import deal, share_out

SHAPE_BYTES = 3 * 8  # that a pipeline stage sends before each tensor
PROBED_ROWS = 1024  # of `scoring.score`


@dataclass(frozen=True)
class Collective:
    """What a rank does of one kind in one phase.

    Attributes:
        op: all_reduce, all_gather, reduce_scatter, all_to_all, broadcast or send.
        group: student tp, student dp, …, world.
        ranks: in the group.
        span: how many consecutive ranks the group is spread over; up to a node's, it stays inside.
        bytes: that this rank sends in all calls together, by `links`' arithmetic.
    """

    phase: str
    op: str
    group: str
    ranks: int
    span: int
    calls: int
    bytes: float


def step_collectives(setup: Setup, rank: int, moved: float = 0.0) -> list[Collective]:
    """List a rank's collectives in one step, in their order; groups of one are left out.

    Args:
        moved: share of the kept rows whose sequence another data-parallel rank trains than scored.
    """
    found = [
        *_rollout(setup),
        *_teacher(setup, rank),
        *_scoring(setup, rank),
        *_selection(setup, rank),
        *_training(setup, rank, moved),
        *_gradients(setup, rank),
        *_optimizer(setup, rank),
        *_sync(setup, rank),
    ]
    return [c for c in found if c.ranks > 1 and c.calls]


# ------------------------------------------------------------------------------- passes of a trunk


@dataclass(frozen=True)
class _Pass:
    """A data-parallel rank's share of a pass over sequences of one length.

    Attributes:
        tokens: of all its micro-batches, padding included.
        rows: response rows of all its micro-batches.
        sequences: that it runs, or its part of.
        cp: ranks that share each of them; 1: they are whole.
    """

    model: Architecture
    grid: Grid
    rank: int
    itemsize: int
    micro_batches: int
    tokens: int
    rows: int
    sequences: int
    cp: int

    @classmethod
    def of(cls, setup: Setup, model: Architecture, grid: Grid, rank: int, length: int, rows: int):
        """Describe a rank's pass over its sequences.

        Args:
            length: tokens of a sequence.
            rows: of a sequence, the last of its tokens.
        """
        work = replace(setup.workload, prompt=length - rows, response=rows)
        share = work.share(grid, setup.micro_batch_tokens)
        multiple = grid.shards
        if share.cp > 1:
            rows = rows_by_rank(length, length - rows, grid.cp)[grid.cp_rank(rank)]
            multiple = math.lcm(2, multiple)
        full, rest = divmod(share.sequences, share.together)
        tokens = full * _padded(share.together * share.length, multiple)
        tokens += _padded(rest * share.length, multiple)
        count, rows = full + (rest > 0), share.sequences * rows
        sizes = count, tokens, rows, share.sequences, share.cp
        return cls(model, grid, rank, setup.itemsize, *sizes)

    @property
    def stage(self) -> int:
        return self.grid.stage(self.rank)

    @property
    def layers(self) -> int:
        return self.model.layers // self.grid.pp

    @property
    def last(self) -> bool:
        return self.stage == self.grid.pp - 1

    @property
    def activations(self) -> int:
        """The bytes of the whole activations between two layers, of all micro-batches."""
        return self.tokens * self.model.hidden * self.itemsize

    def over_tp(
        self, phase: str, op: str, calls: int, total: float, who: str = "student"
    ) -> Collective:
        """Describe a collective over the tensor-parallel group.

        Args:
            calls: per micro-batch.
            total: bytes of one call a micro-batch, over all micro-batches.
        """
        wire = links.all_reduce_bytes if op == "all_reduce" else links.gather_bytes
        tp = self.grid.tp
        return Collective(
            phase, op, f"{who} tp", tp, tp, calls * self.micro_batches, calls * wire(total, tp)
        )

    def over_pp(self, phase: str, who: str = "student") -> Collective:
        """Describe what goes to the neighbouring stage: a shape, and a tensor."""
        bytes_ = self.micro_batches * SHAPE_BYTES + links.pipeline_bytes(
            self.tokens, self.model.hidden, self.itemsize, self.grid.shards
        )
        span = self.grid.tp * self.grid.data_ranks * self.grid.pp
        return Collective(
            phase, "send", f"{who} pp", self.grid.pp, span, 2 * self.micro_batches, bytes_
        )

    def over_cp(self, phase: str, op: str, who: str = "student") -> Collective:
        """Describe an all-gather of all layers' keys and values, or their gradients' way back."""
        keys = self.model.head_dim * max(1, self.model.groups // self.grid.tp)
        bytes_ = links.key_value_bytes(self.tokens, keys, self.layers, self.itemsize, self.cp)
        calls = self.layers * self.micro_batches
        return Collective(phase, op, f"{who} cp", self.cp, self.grid.tp * self.cp, calls, bytes_)

    def forward(self, phase: str, who: str = "student") -> list[Collective]:
        return [
            *self.embedding(phase, who),
            *self.through_layers(phase, who),
            self.over_cp(phase, "all_gather", who),
            *self.picked(phase, who),
            *([] if self.last else [self.over_pp(phase, who)]),
        ]

    def embedding(self, phase: str, who: str) -> list[Collective]:
        op = "reduce_scatter" if self.grid.sequence else "all_reduce"
        return [self.over_tp(phase, op, 1, self.activations, who)] if self.stage == 0 else []

    def through_layers(self, phase: str, who: str = "student") -> list[Collective]:
        if self.model.experts:
            return self._through_layers_of_experts(phase, who)
        if not self.grid.sequence:
            return [self.over_tp(phase, "all_reduce", 2 * self.layers, self.activations, who)]
        return [
            self.over_tp(phase, op, 2 * self.layers, self.activations, who)
            for op in ("all_gather", "reduce_scatter")
        ]

    def _through_layers_of_experts(self, phase: str, who: str) -> list[Collective]:
        """List those of attention, and of tokens on their way to evenly loaded experts and back.

        They travel over EP, and then to all of TP, whose ranks have a part of each expert. Without
        sequence parallelism every rank of TP sends all of them.
        """
        model, grid, both = self.model, self.grid, ("all_gather", "reduce_scatter")
        routed = links.routed_bytes(self.activations, model.experts_per_token, grid)
        attention = [("all_reduce", self.activations)]
        if grid.sequence:
            attention = [(op, self.activations) for op in both]
        over_tp = [*attention, *((op, grid.tp * routed) for op in both)]
        span, calls = grid.tp * grid.ep, 2 * self.layers * self.micro_batches
        over_ep = links.expert_bytes(routed, self.layers, grid.ep)
        return [
            *(self.over_tp(phase, op, self.layers, total, who) for op, total in over_tp),
            Collective(phase, "all_to_all", f"{who} ep", grid.ep, span, calls, over_ep),
        ]

    def picked(self, phase: str, who: str) -> list[Collective]:
        """List that of `models.gpt.pick_rows`, forward: one, if any."""
        gathers = self.last and self.grid.sequence
        return [self.over_tp(phase, "all_gather", 1, self.activations, who)] if gathers else []

    def backward(self, phase: str) -> list[Collective]:
        """List those of the backward pass: as in the forward one, inputs gathered once more.

        Attention over shared sequences is always computed again. Experts' inputs are kept as they
        have come.
        """
        found = self.through_layers(phase)
        found += [self.over_cp(phase, op) for op in ("all_gather", "reduce_scatter")]
        if self.grid.sequence:
            again = (1 if self.model.experts else 2) * self.layers
            found.append(self.over_tp(phase, "all_gather", again, self.activations))
            if self.last:
                found.append(self.over_tp(phase, "reduce_scatter", 1, self.activations))
            if self.stage == 0:
                found.append(self.over_tp(phase, "all_gather", 1, self.activations))
        elif self.last:
            rows = self.rows * self.model.hidden * self.itemsize
            found.append(self.over_tp(phase, "all_reduce", 1, rows))
        return found + ([] if self.stage == 0 else [self.over_pp(phase)])

    def heads(self, phase: str, chunk_rows: int, row_bytes: int) -> list[Collective]:
        """List those of the heads: one all-gather a chunk of rows, on the last stage."""
        if not self.last:
            return []
        tp, count = self.grid.tp, self.micro_batches
        rows = -(-self.rows // count)
        calls = count * -(-rows // chunk_rows)
        bytes_ = links.gather_bytes(self.rows * row_bytes * tp, tp)
        return [Collective(phase, "all_gather", "student tp", tp, tp, calls, bytes_)]


# ------------------------------------------------------------------------------------------ phases


def _rollout(setup: Setup) -> list[Collective]:
    work, world = setup.workload, setup.gpus
    if setup.rollout is not None:  # who asked for them tells all others
        bytes_ = work.sequences * (12 + 12 * work.response)
        return [Collective("rollout", "broadcast", "world", world, world, 2, bytes_)]
    share = -(-work.sequences // world) * world
    bytes_ = links.gather_bytes(share * (8 * work.response + 4), world)
    return [Collective("rollout", "all_gather", "world", world, world, 1, bytes_)]


def _teacher(setup: Setup, rank: int) -> list[Collective]:
    found, grid, work = _average(setup, rank), setup.teacher_grid, setup.workload.as_read
    if grid is not None:
        read = _Pass.of(setup, setup.teacher, grid, rank, work.length - 1, work.response)
        found += read.forward("teacher", "teacher")
    world = setup.gpus
    moved = rows_moved(setup)
    sent = moved.sent[rank] * teacher_row(setup)
    calls = exchange.rounds(moved.most)
    return [*found, Collective("exchange", "all_to_all", "world", world, world, calls, sent)]


def _average(setup: Setup, rank: int) -> list[Collective]:
    """List those of `models.average.WeightAverage.fill`."""
    if not setup.average:
        return []
    there_and_back = _over_dp(setup, rank, "teacher", "all_gather", setup.itemsize, times=2)
    return [*there_and_back, *_export(setup, rank, "teacher")]


def teacher_row(setup: Setup) -> int:
    """Count the bytes of what the teacher says of a row."""
    return (2 * setup.k + 1) * 4 if setup.columns_only else setup.teacher.hidden * setup.itemsize


@dataclass(frozen=True)
class RowsMoved:
    """Rows of the teacher on their way to the ranks that score them, by rank.

    Attributes:
        sent, received: to and from others.
        most: that any rank moves, those to itself included.
    """

    sent: Counter[int]
    received: Counter[int]
    most: int


def rows_moved(setup: Setup) -> RowsMoved:
    """Count the rows that each rank sends and receives (`teacher.dispatch`).

    Sequences of one length are dealt round; of a served teacher, which has no layout, runs of them
    to the ranks that ask. Every rank of the scoring TP group takes its copy
    from itself or from a holder.
    """
    grid, own, work = setup.student_grid, setup.teacher_grid, setup.workload
    micro, read = setup.micro_batch_tokens, work.as_read
    asked_by: list[int] = []
    if own is None:
        asks = asking(setup, setup.teacher_servers)
        servers = [asks[rank] for rank in range(setup.gpus)]
        lengths = torch.ones(setup.workload.sequences, dtype=torch.int64)
        asked_by = share_out(lengths, servers).tolist()
    sources, destinations = Counter(), Counter()
    sent, received = Counter(), Counter()
    for sequence in range(setup.workload.sequences):
        scored = _runs(grid, micro, work.length - 1, work.prompt - 1, sequence)
        readers = [(0, 0)]
        if own is not None:
            readers = _runs(own, micro, read.length - 1, read.prompt - 1, sequence)
        for rows, reader, scorer in _pieces(readers, scored, 0, work.response):
            if own is None:
                holders = [asked_by[sequence]]
            else:
                holders = [_last_stage_rank(own, reader, t) for t in range(own.tp)]
            for t in range(grid.tp):
                destination = _last_stage_rank(grid, scorer, t)
                source = destination if destination in holders else holders[t % len(holders)]
                sources[source] += rows
                destinations[destination] += rows
                if source != destination:
                    sent[source] += rows
                    received[destination] += rows
    return RowsMoved(sent, received, max([*sources.values(), *destinations.values()]))


def _last_stage_rank(grid: Grid, data_rank: int, tp_rank: int) -> int:
    return tp_rank + grid.tp * (data_rank + grid.data_ranks * (grid.pp - 1))


def _runs(
    grid: Grid, micro_batch_tokens: int, length: int, first: int, sequence: int
) -> list[tuple[int, int]]:
    """Cut a sequence's rows into runs of one data rank each (`data.batching.Placement`).

    Args:
        length: tokens that are run of it.
        first: position of its first row.

    Returns:
        (row that it starts with, data rank) of each, the former ascending from 0 or less on.
    """
    cp = Workload(1, length, 0, 0.0).share(grid, micro_batch_tokens).cp
    if cp == 1:
        return [(0, sequence % grid.data_ranks)]
    base, chunk = sequence % grid.dp * cp, -(-length // (2 * cp))
    return [(k * chunk - first, base + min(k, 2 * cp - 1 - k)) for k in range(2 * cp)]


def _pieces(
    sources: list[tuple[int, int]], destinations: list[tuple[int, int]], start: int, end: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (rows, source, destination) of the runs in [start, end) that both sides have whole."""
    cuts = {start, end, *(row for row, _ in (*sources, *destinations) if start < row < end)}
    for first, last in pairwise(sorted(cuts)):
        ranks = [
            [rank for row, rank in runs if row <= first][-1] for runs in (sources, destinations)
        ]
        yield last - first, ranks[0], ranks[1]


def _chunk_rows(setup: Setup) -> int:
    return rows_within(setup.head_memory, setup.student.vocab // setup.student_grid.tp)


def _scoring(setup: Setup, rank: int) -> list[Collective]:
    grid, work, world = setup.student_grid, setup.workload, setup.gpus
    scored = _Pass.of(setup, setup.student, grid, rank, work.length - 1, work.response)
    rows = work.sequences * work.response
    stride = max(1, rows // PROBED_ROWS)
    probed = _Pass.of(setup, setup.student, grid, rank, work.length - 1, work.response // stride)
    chunk = _chunk_rows(setup)
    a_row = 12 * setup.k + 12 if setup.columns_only else 24 * setup.k + 28
    told = links.all_reduce_bytes(4 * (1 + -(-rows // stride)), world)
    whole: list[Collective] = []
    if scored.cp > 1:  # the scores of whole sequences to the first rank of each group
        leaves = scored.last and rank % grid.tp == 0 and grid.cp_rank(rank) > 0
        sent = 4 * (8 + setup.weighted) * scored.rows * leaves
        calls = exchange.rounds(scored.sequences * work.response)
        whole = [Collective("scoring", "all_to_all", "world", world, world, calls, sent)]
    return [
        *whole,
        *scored.forward("scoring"),
        *scored.heads("scores", chunk, a_row),
        *probed.heads("probe", chunk, 12),
        *(scored.heads("weights", chunk, 12) if setup.weighted else []),
        Collective("scoring", "all_reduce", "world", world, world, 1, told),
    ]


def _selection(setup: Setup, rank: int) -> list[Collective]:
    """List those of `selection.choose` by teachability, of `look`, and the mask's way over TP."""
    grid, work, world = setup.student_grid, setup.workload, setup.gpus
    digits = (1 << 11, 1 << 11, 1 << 10)  # cells of a float32's, `parallel.order`
    # Four scores are described by three quantiles, between two places each; then the threshold is
    # looked for, and that of the best D^L.
    bytes_ = [8 * 4, 8 * 4]
    bytes_ += [4 * 4 * places * cells for places, cells in zip((1, 6, 6), digits, strict=True)]
    bytes_ += 2 * [4 * cells for cells in digits]
    bytes_ += [8 * work.sequences + 8, 24 * work.sequences, 9 * 8]
    sent = sum(links.all_reduce_bytes(each, world) for each in bytes_)
    found = [Collective("selection", "all_reduce", "world", world, world, len(bytes_), sent)]
    share = work.share(grid, setup.micro_batch_tokens)
    if grid.stage(rank) == grid.pp - 1:
        rows = share.sequences * work.response
        if rank % grid.tp == 0:
            cp, span = share.cp, grid.tp * share.cp
            found.append(Collective("selection", "broadcast", "student cp", cp, span, 1, rows))
        found.append(Collective("selection", "broadcast", "student tp", grid.tp, grid.tp, 1, rows))
    return found


def _training(setup: Setup, rank: int, moved: float) -> list[Collective]:
    grid, work, world = setup.student_grid, setup.workload, setup.gpus
    length = min(work.length - 1, -(-work.length * work.trained // 1))
    kept = max(1, round(work.kept * work.response))
    trained = _Pass.of(setup, setup.student, grid, rank, int(length), kept)
    a_row = 4 * setup.k + 8 if setup.columns_only else 20  # `links.loss_bytes`
    found = trained.forward("training")
    if setup.student.experts:  # `ExpertLoad.take`
        told = 8 * (setup.student.layers * setup.student.experts + 3)
        told = links.all_reduce_bytes(told, world)
        found.append(Collective("training", "all_reduce", "world", world, world, 1, told))
    if setup.weighted:  # every rank learns those of all kept rows, and which rows are shared
        shared = work.share(grid, setup.micro_batch_tokens).cp > 1
        told = links.all_reduce_bytes((4 + 8 * shared) * work.sequences * kept, world)
        found.append(Collective("weights", "all_reduce", "world", world, world, 1 + shared, told))
    if setup.recompute == "full" and not setup.replay:
        found += trained.through_layers("training")
    found += _rows_follow(setup, rank, int(length), kept)
    found += trained.backward("training")
    found += trained.heads("loss", _chunk_rows(setup), a_row)
    if moved and trained.last:
        sent = moved * trained.rows * teacher_row(setup)
        found.append(Collective("training", "all_to_all", "world", world, world, 1, sent))
    return found


def _rows_follow(setup: Setup, rank: int, length: int, kept: int) -> list[Collective]:
    """List what takes kept rows to who trains them, where cut sequences have other chunks.

    Args:
        length, kept: tokens that are trained of a sequence; its kept rows, the last of these.
    """
    grid, work, world = setup.student_grid, setup.workload, setup.gpus
    runs, leave, sent = 0, Counter[int](), 0
    if work.share(grid, setup.micro_batch_tokens).cp == 1:
        return []
    arrive = Counter[int]()
    for sequence in range(work.sequences):
        scored, trained = (
            _runs(grid, setup.micro_batch_tokens, n, work.prompt - 1, sequence)
            for n in (work.length - 1, length)
        )
        runs += sum(1 for _ in _pieces(scored, trained, 0, work.response))
        end = length - work.prompt + 1
        for rows, source, destination in _pieces(scored, trained, end - kept, end):
            leave[source] += rows
            arrive[destination] += rows
            here = grid.data_rank(rank) == source and grid.stage(rank) == grid.pp - 1
            sent += rows * (here and source != destination)
        moves = scored != trained
    if not moves:
        return []
    calls = 1 + exchange.rounds(max([*leave.values(), *arrive.values()]))
    told = links.all_reduce_bytes(8 * runs, world)
    return [
        Collective("training", "all_reduce", "world", world, world, 1, told),
        Collective(
            "training", "all_to_all", "world", world, world, calls, sent * (8 + teacher_row(setup))
        ),
    ]


def _gradients(setup: Setup, rank: int) -> list[Collective]:
    model, grid = setup.student, setup.student_grid
    stage = grid.stage(rank)
    last = stage == grid.pp - 1
    found = _over_dp(setup, rank, "gradients", "reduce_scatter", 4, setup.mini_batches)
    # What every rank of the TP group has whole, and has seen a part of the tokens or heads for.
    norms = model.layers // grid.pp * 2 * model.head_dim * model.qk_norm
    if grid.sequence:
        norms += model.layers // grid.pp * (2 + model.experts) * model.hidden + last * model.hidden
    if norms:
        bytes_ = links.all_reduce_bytes(4 * norms, grid.tp)
        found.append(
            Collective("gradients", "all_reduce", "student tp", grid.tp, grid.tp, 1, bytes_)
        )
    if model.tied and grid.pp > 1 and (last or stage == 0):  # both ends hold the embedding
        bytes_ = links.all_reduce_bytes(4 * model.embedding // grid.tp, 2)
        found.append(Collective("gradients", "all_reduce", "embedding", 2, setup.gpus, 1, bytes_))
    return found


def _optimizer(setup: Setup, rank: int) -> list[Collective]:
    return _over_dp(setup, rank, "optimizer", "all_gather", setup.itemsize, setup.mini_batches)


def _over_dp(
    setup: Setup, rank: int, phase: str, op: str, itemsize: int, times: int
) -> list[Collective]:
    """List those of each buffer of the student, so many times a call a bucket."""
    grid = setup.student_grid
    return [
        Collective(
            phase,
            op,
            "student dp" if buffer.apart == 1 else "student experts' dp",
            buffer.ranks,
            grid.tp * grid.data_ranks,
            times * len(buffer.buckets),
            times * links.gather_bytes(itemsize * buffer.elements, buffer.ranks),
        )
        for buffer in student_buffers(setup.student, grid, grid.stage(rank))
    ]


def _export(setup: Setup, rank: int, phase: str) -> list[Collective]:
    """List those of `models.weights.export_weights`."""
    model, grid, e = setup.student, setup.student_grid, setup.itemsize
    parameters = exported(model, grid)
    sizes = [e * p.elements for p in parameters]
    calls = len([*packing.pack(sizes, [p.owner for p in parameters], packing.EXPORT_BYTES)])
    shards = sum(p.shard for p in parameters)
    over_tp, over_pp = links.export_bytes(shards, e, grid.tp, grid.pp)
    span = grid.tp * grid.data_ranks * grid.pp
    stage = grid.stage(rank)
    own = [p for p in parameters if p.owner[0] == stage and p.owner[1] is not None]
    of_experts = len(
        [*packing.pack([e * p.elements for p in own], [p.owner for p in own], packing.EXPORT_BYTES)]
    )
    over_ep = e * sum(p.shard for p in own)
    return [
        Collective(
            phase, "broadcast", "student ep", grid.ep, grid.tp * grid.ep, of_experts, over_ep
        ),
        Collective(phase, "broadcast", "student pp", grid.pp, span, calls, over_pp),
        Collective(phase, "all_gather", "student tp", grid.tp, grid.tp, calls, over_tp),
    ]


def _sync(setup: Setup, rank: int) -> list[Collective]:
    """List those of the weights' export, and of a rank's groups with its servers."""
    found = _export(setup, rank, "sync")
    if servers := sources(setup)[rank]:
        whole = setup.itemsize * setup.student.elements
        calls = servers * -(-whole // setup.sync_bucket)
        ranks = setup.rollout.tp + 1  # a group with each server
        found.append(
            Collective("sync", "broadcast", "a server", ranks, setup.gpus, calls, servers * whole)
        )
    return found


def sources(setup: Setup) -> Counter[int]:
    """Count the servers that each rank sends the weights to."""
    if setup.rollout is None or setup.sync_way != "distributed":
        return Counter()
    return _dealt(setup, setup.rollout)


def asking(setup: Setup, servers: Servers) -> Counter[int]:
    """Count the servers that each rank asks (`serving.begin.open_own`)."""
    dealt = _dealt(setup, servers)
    return Counter({0: servers.replicas}) if servers.gpus or len(dealt) < 2 else dealt


def _dealt(setup: Setup, servers: Servers) -> Counter[int]:
    host = "127.0.0.1" if servers.gpus else "servers"
    urls = [f"http://{host}:{i}" for i in range(servers.replicas)]
    nodes = [rank // setup.gpus_per_node for rank in range(setup.gpus)]
    return Counter(deal(urls, nodes).values())


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
