"""The point where more GPUs stop helping: a step's phases at several sizes, what falls behind."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from megatron_taopd.config import Config
from megatron_taopd.plan.cluster import Cluster
from megatron_taopd.plan.collectives import Collective, asking, sources, step_collectives
from megatron_taopd.plan.setup import Servers, Setup
from megatron_taopd.plan.time import step_phases

# CPU seconds of the selection for a million rows that a rank has scored (`host`). On a device it is
# not the host that does it.
SELECTION_S = 0.15
# CPU seconds of who asks servers, for a million tokens of their answers (benchmarks/client).
CLIENT_S = 0.5
# Microseconds that a message takes beside its bytes, inside a node and between nodes.
HOP_INSIDE_US, HOP_BETWEEN_US = 2.0, 10.0


@dataclass(frozen=True)
class Size:
    """A step on so many GPUs.

    Attributes:
        seconds: by phase; `bubble` is taken out of the passes that have it, `longest response` is
            what a batch waits for after all others of average length.
        efficiency: speed-up over growth, from the smallest size.
        behind: GPU-seconds of the step by which each phase exceeds perfect scaling, as a share of
            all that are lost; largest first.
    """

    gpus: int
    sequences: int
    student: str
    teacher: str
    micro_batches: int
    seconds: dict[str, float]
    step: float
    efficiency: float
    behind: dict[str, float]
    wire: dict[str, float]  # bytes of a rank inside its node, and between nodes
    serves: float  # bytes of rows on a rank that asks, were the teacher served as rollouts are
    asking: int  # ranks that ask the rollout's servers
    servers: int
    most_sent_to: int  # servers that one rank sends the weights to


def sizes(
    config: Config,
    gpus: list[int],
    grow: bool,
    cluster: Cluster,
    gpus_per_server: int | None,
    host_s_per_million: float,
    **lengths,
) -> list[Size]:
    """A step at each size; the batch is the configuration's, or grows with the GPUs.

    Args:
        gpus: ascending; where the batch grows, multiples of the first.
        gpus_per_server: SGLang servers, of their own GPUs, for so many that train; None: what the
            configuration says.
        host_s_per_million: seconds of a rank's host for a million rows of the batch (`host`).
        lengths: of `Setup.of`.
    """
    found: list[Size] = []
    for count in gpus:
        prompts = config.rollout.prompts * (count // gpus[0] if grow else 1)
        of_size = replace(config, rollout=replace(config.rollout, prompts=prompts))
        setup = Setup.of(of_size, count, **lengths)
        if gpus_per_server and setup.rollout is not None:
            served = setup.rollout
            number = max(1, count // gpus_per_server)
            setup = replace(setup, rollout=Servers(number, served.tp, served.concurrency, (), 0.0))
        found.append(_size(setup, cluster, host_s_per_million, grow, found[0] if found else None))
    return found


def _size(
    setup: Setup, cluster: Cluster, host_s_per_million: float, grow: bool, base: Size | None
) -> Size:
    work, grid = setup.workload, setup.student_grid
    collectives = step_collectives(setup, setup.gpus - 1)
    seconds = _seconds(setup, cluster, collectives, host_s_per_million)
    step = sum(seconds.values())
    efficiency, behind = 1.0, {}
    if base is not None:
        ideal = 1.0 if grow else base.gpus / setup.gpus
        efficiency = base.step * ideal / step
        lost = {name: s - base.seconds[name] * ideal for name, s in seconds.items()}
        lost = {name: s for name, s in lost.items() if s > 1e-3 * step}
        total = sum(lost.values())
        behind = {n: lost[n] / total for n in sorted(lost, key=lost.get, reverse=True)}
    asks, rows = max(1, len(clients(setup))), float(work.sequences * work.response)
    return Size(
        setup.gpus,
        work.sequences,
        str(grid),
        str(setup.teacher_grid or "served"),
        work.share(grid, setup.micro_batch_tokens).micro_batches,
        seconds,
        step,
        efficiency,
        behind,
        by_link(collectives, setup.gpus_per_node),
        rows * setup.teacher.hidden * setup.itemsize / asks,
        asks,
        setup.rollout.replicas if setup.rollout else 0,
        max(sources(setup).values(), default=0),
    )


def clients(setup: Setup) -> list[int]:
    """List the ranks that ask the rollout's servers and read their answers."""
    return [] if setup.rollout is None else sorted(asking(setup, setup.rollout))


def _seconds(
    setup: Setup, cluster: Cluster, collectives: list[Collective], host_s_per_million: float
) -> dict[str, float]:
    phases = step_phases(setup, cluster)
    seconds = {name: p.seconds for name, p in phases.items() if name != "checkpoint"}
    bubble = 0.0
    for name in ("teacher", "scoring", "training"):
        idle = phases[name].parts.get("bubble", 0.0)
        seconds[name] -= idle
        bubble += idle
    rows = setup.workload.sequences * setup.workload.response
    tail = phases["rollout"].parts["longest response"]
    seconds["rollout"] -= tail
    rate = cluster.network_gb_s * 1e9 * cluster.link_fraction
    return seconds | {
        "longest response": tail,
        "bubble": bubble,
        # As if all answers came at once, when the last one is generated.
        "client": CLIENT_S * rows / 1e6 / max(1, len(clients(setup))) * bool(setup.rollout),
        "selection": sum(c.bytes for c in collectives if c.phase == "selection") / rate,
        "host": (host_s_per_million * rows + SELECTION_S * rows / setup.student_grid.data_ranks)
        / 1e6,
        "latency": sum(_latency(c, setup.gpus_per_node) for c in collectives),
    }


def _latency(collective: Collective, gpus_per_node: int) -> float:
    """Seconds of messages, whatever their size: rings, but trees of all-reduces and broadcasts."""
    ranks = collective.ranks
    hops = {
        "all_reduce": min(2 * (ranks - 1), 2 * math.ceil(math.log2(ranks))),
        "broadcast": math.ceil(math.log2(ranks)),
        "send": 1,
    }.get(collective.op, ranks - 1)
    inside = collective.span <= gpus_per_node
    return collective.calls * hops * (HOP_INSIDE_US if inside else HOP_BETWEEN_US) * 1e-6


def by_link(collectives: list[Collective], gpus_per_node: int) -> dict[str, float]:
    """Bytes that a rank sends in groups that stay inside a node, and in those that do not."""
    total = {"node": 0.0, "network": 0.0}
    for c in collectives:
        total["node" if c.span <= gpus_per_node else "network"] += c.bytes
    return total


def as_json(found: list[Size]) -> list[dict]:
    return [asdict(size) for size in found]
