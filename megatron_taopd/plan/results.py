"""A plan as tables for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from megatron_taopd.monitoring.numbers import percent
from megatron_taopd.plan.cluster import Cluster
from megatron_taopd.plan.memory import (
    GIB,
    Place,
    host_bytes,
    peak,
    phases,
    places,
    problems,
)
from megatron_taopd.plan.propose import Proposal
from megatron_taopd.plan.setup import Setup
from megatron_taopd.plan.time import Phase, step_phases, step_seconds, step_throughput


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        memory: of each kind of rank, bytes by phase and item.
        time: by phase.
        usable: bytes of a device without the reserve.
    """

    setup: Setup
    cluster: Cluster
    memory: dict[Place, dict[str, dict[str, int]]]
    time: dict[str, Phase]
    usable: float

    @classmethod
    def of(cls, setup: Setup, cluster: Cluster) -> Plan:
        memory = {place: phases(setup, place, cluster.memory_gib) for place in places(setup)}
        usable = (cluster.memory_gib - cluster.reserve_gib) * GIB
        return cls(setup, cluster, memory, step_phases(setup, cluster), usable)

    @property
    def worst(self) -> Place:
        return max(self.memory, key=lambda place: peak(self.memory[place])[1])

    @property
    def seconds(self) -> float:
        return step_seconds(self.time, self.setup.waits)

    @property
    def throughput(self) -> dict[str, float]:
        """Return the `perf/*` of a step of the run."""
        return step_throughput(self.setup, self.cluster, self.time)

    def problems(self) -> list[str]:
        return [
            line
            for place, by_phase in self.memory.items()
            for line in problems(place, by_phase, self.usable)
        ]

    def host(self) -> dict[str, int]:
        """Count the bytes in the memory of a host, by item, of the rank that holds most there."""
        return max((host_bytes(self.setup, place) for place in self.memory), key=_total)

    def node_host(self) -> int:
        """Bound the bytes in the memory of a node by those of that rank, times ranks of a node."""
        return _total(self.host()) * min(self.setup.gpus_per_node, self.setup.gpus)

    def last_stage_extra(self) -> dict[str, int]:
        """Count the bytes that the last pipeline stage holds and the others do not, by item."""
        last = max(self.memory, key=lambda place: place.stage)
        items = ("teacher head", "teacher rows", "logits")
        by_phase = self.memory[last].values()
        sizes = {item: max(phase.get(item, 0) for phase in by_phase) for item in items}
        return {item: size for item, size in sizes.items() if size}


def _total(items: dict[str, int]) -> int:
    return sum(items.values())


def as_json(plan: Plan, proposed: Sequence[Proposal]) -> dict:
    """Return everything for `--json`, in bytes and seconds."""
    worst = plan.worst
    phase, size = peak(plan.memory[worst])
    return {
        "gpus": plan.setup.gpus,
        "devices": plan.setup.devices,
        "cluster": vars(plan.cluster),
        "student": str(plan.setup.student_grid),
        "teacher": plan.setup.layouts(),
        "fits": not plan.problems(),
        "usable_bytes": round(plan.usable),
        "peak": {"rank": worst.rank, "phase": phase, "bytes": size},
        "problems": plan.problems(),
        "memory": [
            {**vars(place), "phases": by_phase, "peak_bytes": peak(by_phase)[1]}
            for place, by_phase in plan.memory.items()
        ],
        "last_stage_extra": plan.last_stage_extra(),
        "host": {"rank": plan.host(), "node_bytes": plan.node_host()},
        "seconds": {name: vars(phase) for name, phase in plan.time.items()},
        "step_seconds": plan.seconds,
        "throughput": plan.throughput,
        "proposals": [
            {"keys": p.keys(), "seconds": p.seconds, "peak_bytes": p.peak} for p in proposed
        ],
    }


def tables(plan: Plan, proposed: Sequence[Proposal], most: int = 10) -> Iterator[Table]:
    """Yield the tables for the terminal.

    Args:
        most: proposals to show.
    """
    yield _ranks(plan)
    yield _items(plan, plan.worst)
    yield _time(plan)
    if proposed:
        yield _proposals(plan, proposed[:most], len(proposed))


def _ranks(plan: Plan) -> Table:
    setup, cluster = plan.setup, plan.cluster
    table = Table(
        title=f"GiB by phase · {setup.gpus} × {cluster.name}, {plan.usable / GIB:.0f} GiB of "
        f"{cluster.memory_gib:.0f} usable · student {setup.student_grid}, teacher "
        f"{setup.layouts()}"
    )
    names = list(next(iter(plan.memory.values())))
    for name in ("ranks", "student stage", "teacher stage", *names, "peak"):
        table.add_column(name, justify="right")
    for place, by_phase in plan.memory.items():
        sums = [sum(by_phase[name].values()) for name in names]
        style = "bold red" if max(sums) > plan.usable else None
        mark = " ◂ worst" if place == plan.worst else ""
        table.add_row(
            f"{place.rank} and {place.count - 1} more" if place.count > 1 else str(place.rank),
            str(place.stage),
            "–" if place.teacher_stage is None else str(place.teacher_stage),
            *(f"{total / GIB:.1f}" for total in sums),
            f"{max(sums) / GIB:.1f}{mark}",
            style=style,
        )
    return table


def _items(plan: Plan, place: Place) -> Table:
    by_phase = plan.memory[place]
    table = Table(title=f"What is alive on rank {place.rank}, GiB")
    table.add_column("")
    for name in by_phase:
        table.add_column(name, justify="right")
    for item in dict.fromkeys(item for items in by_phase.values() for item in items):
        sizes = (items.get(item) for items in by_phase.values())
        table.add_row(item, *("" if size is None else f"{size / GIB:.2f}" for size in sizes))
    return table


def _time(plan: Plan) -> Table:
    table = Table(title="Seconds of a step, by arithmetic")
    table.add_column("phase")
    table.add_column("s", justify="right")
    table.add_column("tokens/s/GPU", justify="right")
    table.add_column("MFU", justify="right")
    table.add_column("of which")
    perf = plan.throughput

    def rates(suffix: str) -> tuple[str, str]:
        tokens, mfu = (
            perf.get(f"perf/tokens_per_second_per_gpu{suffix}"),
            perf.get(f"perf/mfu{suffix}"),
        )
        return "" if tokens is None else f"{tokens:,.0f}", "" if mfu is None else percent(mfu)

    for name, phase in plan.time.items():
        parts = ", ".join(f"{part} {s:.2f}" for part, s in phase.parts.items() if s >= 0.005)
        if name == "checkpoint":
            every = plan.setup.checkpoint_every
            parts += f"; every {every} steps, not of the sum" if every else "; at the end"
        table.add_row(name, f"{phase.seconds:.2f}", *rates(f"_{name}"), parts)
    table.add_section()
    table.add_row("step", f"{plan.seconds:.2f}", *rates(""), "")
    return table


def _proposals(plan: Plan, proposed: Sequence[Proposal], total: int) -> Table:
    table = Table(title=f"The fastest of {total} layouts that fit")
    for name in ("student", "teacher", "offload", "recompute", "micro-batch", "s", "peak GiB"):
        table.add_column(name, justify="left" if name in ("student", "teacher") else "right")
    for proposal in proposed:
        setup = proposal.setup
        table.add_row(
            str(setup.student_grid),
            str(setup.teacher_grid or "served"),
            "yes" if setup.offload else "no",
            setup.recompute,
            f"{setup.micro_batch_tokens:,}",
            f"{proposal.seconds:.1f}",
            f"{proposal.peak / GIB:.1f}",
        )
    return table
