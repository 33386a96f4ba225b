"""What was measured, as tables, and beside its targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from rich.box import SIMPLE
from rich.table import Table


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
    """Look-ups in what was measured of one setup raise KeyError for what did not run."""

    def __init__(self, measured: dict):
        self.measured, self.setup = measured, measured["setup"]
        self.ways = {
            (way["what"], way["name"], way["ratio"]): way
            for way in measured["ways"]
            if way["skipped"] is None
        }

    def seconds(self, what: str, name: str, ratio: float = 1.0) -> float:
        return median(self.ways[what, name, ratio]["seconds"])

    def cpu_seconds(self, what: str, name: str, ratio: float = 1.0) -> float:
        """Return the seconds that the threads of rank 0 computed, which other work hardly moves."""
        return median(self.ways[what, name, ratio]["cpu_seconds"])

    def temporaries(self, what: str, name: str, ratio: float = 1.0) -> int:
        return self.ways[what, name, ratio]["temporaries"]

    def fastest_peer(self) -> float:
        """Return the seconds of the fastest loss that is not ours, but computes the same."""
        same = self.ways["loss", "ours", 1.0]["computes"]
        return min(
            self.seconds(*key)
            for key, way in self.ways.items()
            if way.get("computes") == same and not key[1].startswith("ours")
        )

    def flops(self, what: str) -> int:
        """Return the operations of the matmuls alone, on all rows."""
        width = {"scores": self.setup["hidden"], "loss": 3 * self.setup["hidden"]}[what]
        return 2 * self.setup["rows"] * self.setup["vocab"] * (width + self.setup["teacher_hidden"])

    def best_matmul_flops(self) -> float:
        """Return the best rate of matmuls, by themselves or in a row, in FLOP/s."""
        floors = (key for key in self.ways if key[1] == "matmuls alone")
        rates = (self.flops(key[0]) / min(self.ways[key]["seconds"]) for key in floors)
        return max(self.measured["best_matmul_flops"], *rates)

    def matmul_fraction(self, what: str) -> float:
        """Return the rate at which our matmuls get done, with all the rest, over the best one."""
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
        if what == "loss":
            table.add_column("computes", no_wrap=True)
        for header in ("rows", "s", "÷ matmuls", "CPU ÷", "MB", "collectives", "B/row", *errors):
            table.add_column(header, justify="right", no_wrap=True)
        for way in measured["ways"]:
            if way["what"] == what:
                table.add_row(*cells(way, results))
        yield table


def cells(way: dict, results: Results) -> list[str]:
    name = way["name"] + (f", ρ = {100 * way['ratio']:g} %" if way["ratio"] < 1 else "")
    if way["skipped"]:
        return [f"{name} ({way['skipped']})"]
    computes = [way.get("computes", "")] if way["what"] == "loss" else []
    key, floor = (way["what"], way["name"], way["ratio"]), (way["what"], "matmuls alone", 1.0)
    seconds, errors = results.seconds(*key), way.get("error", {})
    return [
        name,
        *computes,
        f"{way['rows']:,}",
        f"{seconds:.3g}",
        f"{seconds / results.seconds(*floor):.2f}" if floor in results.ways else "",
        f"{results.cpu_seconds(*key) / results.cpu_seconds(*floor):.2f}"
        if floor in results.ways and not on_cuda(results.setup)
        else "",
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
