"""How much of a step's bytes goes through rank 0, next to the mean rank."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from benchmarks.scaling.saturate import by_link, clients
from megatron_taopd.plan.collectives import Collective, rows_moved, step_collectives, teacher_row
from megatron_taopd.plan.setup import Setup

# Of HTTP, a token of a request and one of an answer with its log-probability (benchmarks/client).
ASKED_BYTES, ANSWERED_BYTES = 7, 46


@dataclass(frozen=True)
class Traffic:
    """Bytes of a rank in one step: all of them, and those between nodes."""

    sent: float
    received: float
    sent_between: float
    received_between: float


def traffic(setup: Setup) -> list[Traffic]:
    """Count what each rank sends and receives, by the formulas of `plan/collectives.py`.

    Answers of servers to the ranks that ask them are in it; what servers send each other is not.
    """
    found = [step_collectives(setup, rank) for rank in range(setup.gpus)]
    rows, work, asking = rows_moved(setup), setup.workload, clients(setup)
    by_rank = []
    for rank, own in enumerate(found):
        sent = by_link(own, setup.gpus_per_node)
        received = {"node": 0.0, "network": 0.0}
        for c in own:
            link = "node" if c.span <= setup.gpus_per_node else "network"
            own_share = (rank in asking) / max(1, len(asking))
            received[link] += _received(c, setup, rows.received[rank], own_share)
        for phase, grid in (("teacher", setup.teacher_grid), ("scoring", setup.student_grid)):
            if grid is not None and grid.stage(rank) > 0:
                before = found[rank - grid.tp * grid.data_ranks]
                sends = [c for c in before if c.phase == phase and c.op == "send"]
                for link, bytes_ in by_link(sends, setup.gpus_per_node).items():
                    received[link] += bytes_
        if rank in asking:
            sequences = work.sequences / len(asking)
            sent["network"] += ASKED_BYTES * sequences * work.prompt
            received["network"] += ANSWERED_BYTES * sequences * work.response
        by_rank.append(
            Traffic(
                sum(sent.values()), sum(received.values()), sent["network"], received["network"]
            )
        )
    return by_rank


def _received(c: Collective, setup: Setup, rows: int, own_share: float) -> float:
    """Count what comes of a collective: what is sent, but for those that are not symmetrical.

    Args:
        rows: of the teacher that the rank receives.
        own_share: of the responses, which the rank has asked for itself.
    """
    if c.op == "all_to_all" and c.phase == "exchange":
        return rows * teacher_row(setup)
    if c.op == "broadcast" and c.phase == "rollout":
        return c.bytes * (1 - own_share)
    # A server takes what its source sends. Of a pass forward the next stage receives; in training
    # as much comes back.
    if c.group == "a server" or (c.op == "send" and c.phase != "training"):
        return 0.0
    return c.bytes


def share_of_rank_0(by_rank: list[Traffic]) -> dict[str, float]:
    """Divide what rank 0 sends and receives by the mean of all ranks; 1 where nothing is moved."""
    shares = {}
    for name in vars(by_rank[0]):
        values = [getattr(one, name) for one in by_rank]
        shares[name] = values[0] / mean(values) if any(values) else 1.0
    return shares
