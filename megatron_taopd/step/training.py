"""The training pass: kept rows only, in sequences cut after their last one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.config.schema import LossSection, TrainSection
from megatron_taopd.data import batching
from megatron_taopd.models.gpt import pick_rows
from megatron_taopd.models.student import Student
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.copies import to_device
from megatron_taopd.parallel.exchange import Routes, RowShard, Traffic, send_rows, tell_ids
from megatron_taopd.parallel.faults import Fault, by_rank
from megatron_taopd.parallel.layout import Layout
from megatron_taopd.step.extensions.row_weights import RowWeights
from megatron_taopd.step.guard import Guard
from megatron_taopd.step.loss import kept_row_loss, metric_names
from megatron_taopd.step.output_heads import Heads
from megatron_taopd.step.scoring import ScoredBatch
from megatron_taopd.types import RolloutBatch, WantedRows

OF_REFERENCES = "loss_of_references"


def train_on(
    scored: ScoredBatch,
    kept: WantedRows,
    student: Student,
    heads: Heads | None,
    train: TrainSection,
    loss: LossSection,
    guard: Guard,
    weights: RowWeights | None = None,
) -> dict[str, float]:
    """Take `train.mini_batches` optimizer steps over the kept rows, whole sequences each.

    Selection was over the whole batch; each step's loss is the mean over its own kept rows. A step
    that has none is not taken. A batch whose layers' outputs were kept takes one optimizer step.

    Args: those of `backward`.
        guard: knows the losses of the steps before.
        weights: of the kept rows in the mean of their loss, which is Σ w·loss / Σ w in each step;
            None: they are all alike.

    Returns:
        Metrics of `backward`, means weighted by kept rows, counts summed, the largest `head_rows`;
        `grad_norm` (the mean over the steps, before clipping) and `lr` (of the last step). Without
        kept rows only counts.

    Raises:
        Fault: a loss that is not finite or has jumped, or gradients that are not finite; that
            optimizer step and those after it are not taken.
    """
    assert scored.kept_outputs is None or train.mini_batches == 1, train.mini_batches
    kept_rows: float = 0  # counts among metrics, whose type is float
    trained: float = 0
    head_rows: float = 0
    sums: Counter = Counter()
    grad_norms: list[float] = []
    for part in batching.split_mini_batches(scored.batch, kept, train.mini_batches):
        if not part.num_rows:
            continue
        own = weights and weights.within(part)
        metrics = backward(scored, part, student, heads, loss, train.micro_batch_tokens, own)
        guard.check(metrics["loss"])
        grad_norm, lr = student.step()
        guard.taken(metrics["loss"])
        rows = metrics.pop("kept_rows")
        kept_rows += rows
        trained += metrics.pop("tokens_trained")
        head_rows = max(head_rows, metrics.pop("head_rows"))
        sums.update({name: rows * value for name, value in metrics.items()})
        grad_norms.append(grad_norm)
    counts: dict[str, float] = {
        "kept_rows": kept_rows,
        "tokens_trained": trained,
        "head_rows": head_rows,
    }
    if not grad_norms:
        return counts
    means = {name: value / kept_rows for name, value in sums.items()}
    return {**counts, **means, "grad_norm": sum(grad_norms) / len(grad_norms), "lr": lr}


def backward(
    scored: ScoredBatch,
    kept: WantedRows,
    student: Student,
    heads: Heads | None,
    loss: LossSection,
    micro_batch_tokens: int,
    weights: RowWeights | None = None,
) -> dict[str, float]:
    """Form the gradients of the mean loss over the kept rows of the **whole** batch (Eq. 6–7).

    With the layers' outputs of the scoring pass the sequences stay where they are (those that a
    context-parallel group shares, in the group, where they are cut into chunks anew), and only the
    backward pass runs the layers; without, the kept tokens are balanced and packed anew and run
    forward and backward.

    Args:
        scored: what was scored, with teacher rows of (at least) the kept rows scored here.
        kept: the rows to train on, those known that were scored here.
        heads: None except on the last stage.
        loss: its kind, and the parameters of that.
        micro_batch_tokens: the most tokens in a packed micro-batch.
        weights: of the kept rows; None: 1.

    Returns:
        `loss`, further means over the kept rows, `kept_rows` and `tokens_trained`; the same on
        every rank. Of a batch with references also OF_REFERENCES, what their rows add to the loss;
        of several teachers `loss/NUMBER`, the part of the loss that is each one's.
        `head_rows`, the most rows of a micro-batch on this data-parallel rank.

    Raises:
        Fault: the loss is not finite, on every rank alike.

    Collectives: where a row is trained on another rank than scored, all-to-alls that take the
    kept teacher rows (D_t elements and a number of 8 bytes each, per TP rank) there; the trunk's
    and the loss's own.
    """
    layout, batch, teacher_rows = student.layout, scored.batch, scored.teacher_rows
    if scored.kept_outputs is None:
        trainers, own = batching.deal(batch, kept, layout, micro_batch_tokens)
        kept, teacher_rows = _follow(teacher_rows, batch, kept, scored.assigned, trainers, layout)
        assigned = batching.build(batch, trainers, own, kept, layout)
        outputs = nullcontext()
    else:
        assigned, places = batching.shorten(batch, scored.assigned, kept, layout)
        # A cut sequence that a context-parallel group shares has other chunks.
        _, teacher_rows = _follow(teacher_rows, batch, kept, scored.assigned, assigned, layout)
        outputs = student.replay_outputs(scored.kept_outputs, places)

    device = platform.device()
    num_rows, num_tokens = kept.num_rows, int(assigned.lengths.sum())

    def loss_func(micro_batch: batching.MicroBatch, hidden_states: Tensor):
        assert heads is not None  # on the last stage, which alone comes here
        own_heads, held = heads.of(micro_batch.teacher), teacher_rows[micro_batch.teacher]
        hidden = pick_rows(hidden_states, micro_batch.rows, layout)
        read = held.at(micro_batch.row_ids)
        log_probs = to_device(batch.log_probs[micro_batch.row_ids], device)
        own = None if weights is None else to_device(weights.of_rows(micro_batch), device)

        def over(rows: Tensor | slice) -> tuple[Tensor, dict[str, Tensor]]:
            return kept_row_loss(
                loss,
                own_heads,
                hidden[rows],
                read[rows],
                micro_batch.targets[rows],
                log_probs[rows],
                None if own is None else own[rows],
            )

        if batch.references is None:
            total, metrics = over(slice(None))
        else:  # one source after the other, so that the loss of each is known
            of_data = batch.references[batch.sequences_of(micro_batch.row_ids)]
            ours, _ = over(to_device((~of_data).nonzero()[:, 0], device))
            theirs, _ = over(to_device(of_data.nonzero()[:, 0], device))
            total, metrics = ours + theirs, {OF_REFERENCES: theirs.detach()}
        count = torch.full((), len(micro_batch.rows), dtype=torch.int, device=device)
        return total, count, {"loss": total.detach(), **metrics}

    with outputs:
        sums = student.forward_backward(assigned.micro_batches, loss_func, num_rows, num_tokens)
    names = "loss", *metric_names(loss.kind)
    if batch.references is not None:
        names = *names, OF_REFERENCES
    totals = _global_sums(sums, names, layout)
    means = {name: total / max(num_rows, 1) for name, total in zip(names, totals, strict=True)}
    if not math.isfinite(means["loss"]):
        raise _fault(sums, assigned.micro_batches, layout)
    if batch.teachers is not None:
        number = int(batch.teachers.max()) + 1
        totals = _sums_by_teacher(sums, assigned.micro_batches, number, layout)
        means |= {f"loss/{i}": total / max(num_rows, 1) for i, total in enumerate(totals)}
    return {
        **means,
        "kept_rows": num_rows,
        "tokens_trained": num_tokens,
        "head_rows": assigned.most_rows(kept),
    }


def _fault(
    sums: Sequence[dict[str, Tensor]], micro_batches: list[batching.MicroBatch], layout: Layout
) -> Fault:
    """Say whose loss is not finite, from every rank's sums by micro-batch."""
    counted = sums if layout.tp_rank == 0 else []  # empty but on the last stage
    bad = [
        sequence
        for metrics, micro_batch in zip(counted, micro_batches, strict=False)
        if not metrics["loss"].isfinite()
        for sequence in micro_batch.sequences
    ]
    found = by_rank(bad)
    return Fault("the loss is not finite", [*found], sorted(chain(*found.values())))


def _follow(
    held: dict[int, RowShard],
    batch: RolloutBatch,
    kept: WantedRows,
    scorers: batching.Placement,
    trainers: batching.Placement,
    layout: Layout,
) -> tuple[WantedRows, dict[int, RowShard]]:
    """Send the kept rows of each teacher to the data rank that trains them.

    Returns:
        The kept rows, of which those are known here that this rank trains, and what the teachers
        say of them. Where none has moved that is what was given.

    Collectives, besides those that move rows: of sequences that a context-parallel group shares, an
    all-reduce of 8 bytes for each run of rows, of which each has 4·cp at most.
    """
    routes = Routes.between(batch.num_rows, scorers.runs(batch), trainers.runs(batch))
    sequences = batch.sequences_of(routes.first)
    of_kept = kept.counts[sequences] > 0
    if torch.equal(routes.source[of_kept], routes.destination[of_kept]):
        return kept, held
    moved = routes.only(of_kept)
    rows = kept.counts[sequences[of_kept]]
    if scorers.shared.any() or trainers.shared.any():
        here = layout.last_stage_rank(moved.source, 0) == layout.rank
        rows = _count(kept, moved.first, moved.end, here)
    moved = replace(moved, rows=rows)
    ids, found, tp_ranks = [], {}, range(layout.tp)
    for teacher, shard in held.items():
        own = moved
        if batch.teachers is not None:
            own = moved.only(batch.teachers[batch.sequences_of(moved.first)] == teacher)
        routes = Routes(
            own.first.repeat(layout.tp),
            own.end.repeat(layout.tp),
            torch.cat([layout.last_stage_rank(own.source, tp) for tp in tp_ranks]),
            torch.cat([layout.last_stage_rank(own.destination, tp) for tp in tp_ranks]),
            own.rows.repeat(layout.tp),
        )
        leaving, counts = routes.outgoing()
        outgoing = Traffic(kept.between(routes.first[leaving], routes.end[leaving]), counts)
        incoming = tell_ids(outgoing, routes.incoming()[1])
        # Later mini-batches need what is here.
        found[teacher] = send_rows([shard], outgoing, incoming, routes.rounds)
        ids.append(incoming.ids)
    return replace(kept, ids=torch.cat(ids).sort().values), found


def _sums_by_teacher(
    sums: Sequence[dict[str, Tensor]],
    micro_batches: list[batching.MicroBatch],
    number: int,
    layout: Layout,
) -> list[float]:
    """Return the sum of the loss over the rows of each teacher, on every rank.

    Collectives: an all-reduce of 8 bytes a teacher.
    """
    total = torch.zeros(number, dtype=torch.float64, device=platform.device())
    if layout.tp_rank == 0:
        for metrics, micro_batch in zip(sums, micro_batches, strict=False):  # none of other stages
            total[micro_batch.teacher] += metrics["loss"]
    dist.all_reduce(total)
    return total.tolist()


def _count(kept: WantedRows, first: Tensor, end: Tensor, here: Tensor) -> Tensor:
    """Return [p] int64: the kept rows of each run, of which each is known to the rank it is on.

    Args:
        here: [p] bool, the runs that this rank counts.
    """
    runs = here.nonzero()[:, 0]
    starts, ends = (torch.searchsorted(kept.known_ids, rows[runs]) for rows in (first, end))
    counts = torch.zeros(len(first), dtype=torch.int64)
    counts[runs] = ends - starts
    counts = to_device(counts, platform.device())
    dist.all_reduce(counts)
    return counts.cpu()


def _global_sums(
    sums: Sequence[dict[str, Tensor]], names: Sequence[str], layout: Layout
) -> list[float]:
    """Return the sums over micro-batches and data-parallel ranks, by name, on every rank.

    Collectives: an all-reduce of 8 bytes a name.
    """
    total = torch.zeros(len(names), dtype=torch.float64, device=platform.device())
    if layout.tp_rank == 0:
        for metrics in sums:  # empty but on the last stage
            total += torch.stack([metrics[name] for name in names])
    dist.all_reduce(total)
    return total.tolist()
