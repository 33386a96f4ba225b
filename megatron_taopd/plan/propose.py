"""Layouts that fit, by estimated step time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from transformers import PretrainedConfig

from megatron_taopd.formats.hf_map import check_layout, divisors, num_experts
from megatron_taopd.plan.cluster import Cluster
from megatron_taopd.plan.memory import GIB, peak_bytes
from megatron_taopd.plan.setup import Setup
from megatron_taopd.plan.shapes import Grid
from megatron_taopd.plan.time import step_phases, step_seconds


@dataclass(frozen=True)
class Proposal:
    """A layout, the seconds of a step and the bytes of its worst rank."""

    setup: Setup
    seconds: float
    peak: int

    def keys(self) -> dict[str, object]:
        """Return the configuration's keys that give this layout."""
        found = {
            "student.parallel.tp": self.setup.student_grid.tp,
            "student.parallel.pp": self.setup.student_grid.pp,
            "student.parallel.cp": self.setup.student_grid.cp,
            "student.parallel.sequence": self.setup.student_grid.sequence,
            "student.parallel.ep": self.setup.student_grid.ep,
        }
        if own := self.setup.teacher_grid:
            found |= {
                "teacher.parallel.tp": own.tp,
                "teacher.parallel.pp": own.pp,
                "teacher.parallel.cp": own.cp,
                "teacher.parallel.ep": own.ep,
                "teacher.parallel.sequence": own.sequence,
                "teacher.offload": self.setup.offload,
            }
        return found | {
            "train.recompute": self.setup.recompute,
            "train.micro_batch_tokens": self.setup.micro_batch_tokens,
        }


def grids(hf: PretrainedConfig, gpus: int, gpus_per_node: int, stages: int = 8) -> Iterator[Grid]:
    """Yield the layouts that divide a model and the GPUs.

    TP stays inside a node; nothing is context parallel; there are a few stages and, of a mixture of
    experts, every EP. With TP, a layout comes with and without sequence parallelism.
    """
    for tp, pp in product(divisors(gpus_per_node), range(1, stages + 1)):
        if gpus % (tp * pp):
            continue
        dp = gpus // (tp * pp)
        for ep in divisors(num_experts(hf) or 1):
            if dp % ep:
                continue
            try:
                check_layout(hf, "", tp, pp, ep)
            except ValueError:
                continue
            for sequence in (False, True)[: 1 + (tp > 1)]:
                yield Grid(tp, pp, dp, sequence, ep)


def proposals(
    setup: Setup, cluster: Cluster, student: PretrainedConfig, teacher: PretrainedConfig | None
) -> list[Proposal]:
    """List all that fits, the fastest first; of equally fast ones the one with most memory left.

    Varied are both layouts, recomputation, micro-batches of one, two and four of the longest
    sequences, and the teacher's offloading. A teacher with TP runs sequence parallel, and so does a
    student of experts.

    Args:
        teacher: None of a served one.
    """
    usable = (cluster.memory_gib - cluster.reserve_gib) * GIB
    own = list(grids(student, setup.gpus, setup.gpus_per_node))
    own = [grid for grid in own if grid.dp <= setup.workload.sequences]
    if setup.student.experts:
        own = [grid for grid in own if grid.sequence or grid.tp == 1]
    if setup.replay:
        own = [grid for grid in own if grid.pp == 1]
    theirs: list[Grid | None] = [None]
    if teacher is not None:
        theirs = [
            grid
            for grid in grids(teacher, setup.gpus, setup.gpus_per_node)
            if grid.sequence or grid.tp == 1
        ]
    found = []
    for mine, other, recompute, sequences, offload in product(
        own,
        theirs,
        ("none", "selective", "full"),
        (1, 2, 4),
        (False, True) if teacher is not None else (False,),
    ):
        shards = max(grid.shards for grid in (mine, other) if grid is not None)
        tokens = -(-sequences * setup.longest // shards) * shards
        varied = replace(
            setup,
            student_grid=mine,
            teacher_grid=other,
            recompute=recompute,
            micro_batch_tokens=tokens,
            offload=offload,
        )
        if (peak := peak_bytes(varied, cluster.memory_gib)) <= usable:
            found.append((varied, peak))
    ranked = [
        Proposal(varied, step_seconds(step_phases(varied, cluster), setup.waits), peak)
        for varied, peak in found
    ]
    return sorted(ranked, key=lambda proposal: (round(proposal.seconds, 3), proposal.peak))
