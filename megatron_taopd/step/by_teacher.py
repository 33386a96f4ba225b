"""A step of several teachers: what is chosen and logged within the rows of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_taopd.config.schema import SelectionSection
from megatron_taopd.parallel.copies import to_device
from megatron_taopd.parallel.order import all_reduce
from megatron_taopd.step.batch_scores import BatchScores
from megatron_taopd.step.selection import Choice, choose
from megatron_taopd.types import WantedRows


def choose_by_teacher(
    section: SelectionSection, scores: BatchScores, teachers: Tensor, seed: int
) -> Choice:
    """Choose as `selection.choose`, with a budget and quantiles within the rows of each teacher.

    Args:
        teachers: [N] int64 on the CPU, the teacher of each sequence; the same on every rank.

    Returns:
        A choice of the whole batch.

    Collectives: for each teacher those of `choose`.
    """
    places, choices = [], []
    for teacher in teachers.unique().tolist():
        own, where = scores.within(teachers == teacher)
        places.append(where)
        choices.append(choose(section.selector, own, section.ratio, seed, section.concentrate))
    order = torch.cat(places).argsort()
    priority, mask = (
        torch.cat(parts)[to_device(order, parts[0].device)]
        for parts in ([c.priority for c in choices], [c.mask for c in choices])
    )
    return Choice(scores, section.selector, priority, mask)


def metrics_by_teacher(
    names: Sequence[str], teachers: Tensor, scores: BatchScores, kept: WantedRows
) -> dict[str, float]:
    """Return what the log says of each teacher's rows, of those that have any.

    Args:
        names: of the teachers by number.
        teachers: [N] int64 on the CPU, the teacher of each sequence.

    Returns:
        teacher/NAME/rows: response rows that it has read; kept_share: kept ones over these;
        disagreement and compatibility: means over them, an infinite D counting as the largest
        finite one of the batch.

    Collectives: of the scores' group, an all-reduce of 16 bytes for each teacher.
    """
    held = scores.held
    values = torch.stack([scores.bounded(name) for name in ("disagreement", "compatibility")])
    whose = to_device(teachers[held.sequences].repeat_interleave(held.counts), values.device)
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=values.device)
    all_reduce(sums.index_add_(1, whose, values.double()), held.group)
    disagreement, compatibility = sums.tolist()
    found: dict[str, float] = {}
    for number, name in enumerate(names):
        own = teachers == number
        if rows := int(held.cu_rows.diff()[own].sum()):
            found |= {
                f"teacher/{name}/rows": rows,
                f"teacher/{name}/kept_share": int(kept.counts[own].sum()) / rows,
                f"teacher/{name}/disagreement": disagreement[number] / rows,
                f"teacher/{name}/compatibility": compatibility[number] / rows,
            }
    return found


def losses_by_teacher(
    names: Sequence[str], teachers: Tensor, kept: WantedRows, trained: dict[str, float]
) -> dict[str, float]:
    """Return `teacher/NAME/loss`, the mean over its kept rows, of each teacher that has some.

    Args:
        trained: of `training.train_on`; the `loss/NUMBER` in it are taken out.
    """
    found = {}
    for number, name in enumerate(names):
        share = trained.pop(f"loss/{number}", None)
        if share is not None and (rows := int(kept.counts[teachers == number].sum())):
            found[f"teacher/{name}/loss"] = share * kept.num_rows / rows
    return found
