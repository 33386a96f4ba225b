"""Figures as tables."""

from __future__ import annotations

from rich.table import Table

from benchmarks.scaling.saturate import Size
from megatron_taopd.plan.collectives import Collective


def number_of_bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.1f} GB"


def counts_table(collectives: list[Collective], gpus_per_node: int, title: str) -> Table:
    table = _table(title, "phase", "operation", "over", "ranks", "link")
    for name in ("calls", "sent"):
        table.add_column(name, justify="right")
    for c in collectives:
        link = "node" if c.span <= gpus_per_node else "network"
        table.add_row(
            c.phase, c.op, c.group, str(c.ranks), link, f"{c.calls:,}", number_of_bytes(c.bytes)
        )
    return table


def shares_line(shares: dict[str, float]) -> str:
    """Say how rank 0's bytes compare with the mean rank's."""
    return (
        f"rank 0 sends {shares['sent']:.3f} and receives {shares['received']:.3f} times what the "
        f"mean rank does; between nodes {shares['sent_between']:.3f} and "
        f"{shares['received_between']:.3f}"
    )


def measured_table(results: list[dict]) -> Table:
    table = _table(
        "Collectives of a step on ranks of 64, as called; those that are not as by formula",
        "student", "teacher", "as rank", "kinds", "calls", "bytes sent", "differ",
    )  # fmt: skip
    cases: dict[tuple, list[dict]] = {}
    for result in results:
        cases.setdefault((result["student"], result["teacher"]), []).append(result)
    for (student, teacher), ranks in cases.items():
        rows = [row for result in ranks for row in result["collectives"]]
        table.add_row(
            student,
            teacher,
            ", ".join(str(result["rank"]) for result in ranks),
            str(len(rows)),
            f"{sum(row['calls'] for row in rows):,}",
            f"{sum(row['bytes'] for row in rows):,.0f}",
            str(sum(differs(row) for row in rows)),
        )
    return table


def differs(row: dict) -> bool:
    """Whether calls or bytes are not what the formula says."""
    return row["calls"] != row["planned_calls"] or abs(row["bytes"] - row["planned_bytes"]) > 0.5


def sizes_table(found: list[Size], title: str) -> Table:
    table = _table(title, "")
    for size in found:
        table.add_column(f"{size.gpus} GPUs", justify="right")
    for name, cells in (
        ("sequences", [f"{s.sequences:,}" for s in found]),
        ("student", [s.student for s in found]),
        ("teacher", [s.teacher for s in found]),
        ("micro-batches a rank", [str(s.micro_batches) for s in found]),
        ("servers", [f"{s.servers:,}" for s in found]),
        ("of one source", [str(s.most_sent_to) for s in found]),
        ("ranks that ask", [str(s.asking) for s in found]),
    ):
        table.add_row(name, *cells)
    table.add_section()
    for name in found[0].seconds:
        table.add_row(f"{name}, s", *(f"{s.seconds[name]:.2f}" for s in found))
    table.add_section()
    table.add_row("step, s", *(f"{s.step:.1f}" for s in found))
    table.add_row("efficiency", *(f"{s.efficiency:.0%}" for s in found))
    table.add_row("lost to", *(_lost(s) for s in found))
    table.add_section()
    for link in ("node", "network"):
        cells = (number_of_bytes(s.wire[link]) for s in found)
        table.add_row(f"a rank sends: {link}", *cells)
    table.add_row("a served teacher's rows", *(number_of_bytes(s.serves) for s in found))
    return table


def _lost(size: Size) -> str:
    return "\n".join(f"{name} {share:.0%}" for name, share in list(size.behind.items())[:3])


def host_table(measured: list[dict]) -> Table:
    table = _table("A rank's host, one thread: CPU seconds · MiB added", "rows", "held")
    parts = list(measured[0]["seconds"])
    for name in (*parts, "a rank, s per million rows"):
        table.add_column(name, justify="right")
    for m in measured:
        # What a rank of many does; the selection by one rank is for comparison.
        of_rank = [s for name, s in m["seconds"].items() if name != "selection by one rank"]
        table.add_row(
            f"{m['rows']:,}",
            f"{m['held']:,}",
            *(f"{m['seconds'][name]:.3f} · {m['bytes'][name] / 2**20:.0f}" for name in parts),
            f"{sum(of_rank) / m['rows'] * 1e6:.3f}",
        )
    return table


def before_table(parts: tuple[str, ...], recorded: dict[int, tuple[float, ...]]) -> Table:
    table = _table("The same as it was, recorded: CPU seconds", "rows")
    for name in parts:
        table.add_column(name, justify="right")
    for rows, figures in recorded.items():
        table.add_row(f"{rows:,}", *(f"{figure:g}" for figure in figures))
    return table


def ranks_table(run: dict) -> Table:
    table = _table(f"Seconds of a step · {run['layout']}, {run['rows']:,} rows", "phase")
    for name in ("CPU, most of a rank", "CPU, all ranks", "wall, most of a rank"):
        table.add_column(name, justify="right")
    parts = [run["cpu"], run["cpu_of_all"], run["wall"]]
    for name in run["cpu"]:
        table.add_row(name, *(f"{part[name]:.3f}" for part in parts))
    table.add_section()
    table.add_row("step", *(f"{sum(part.values()):.3f}" for part in parts))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for name in columns:
        table.add_column(name)
    return table
