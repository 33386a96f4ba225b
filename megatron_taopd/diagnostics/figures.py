"""The figures of the diagnostic, after Figures 2 to 5 of the paper, drawn from its tables."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

from megatron_taopd.diagnostics.gains import Row, Tables
from megatron_taopd.diagnostics.q3 import PROXIES
from megatron_taopd.diagnostics.selectors import PLACES, SELECTOR_NAMES
from megatron_taopd.diagnostics.shapes import CELLS
from megatron_taopd.formats.files import file_written_aside

# The light palette of report.html; in a page these become its variables.
THEME = {"#16150f": "text", "#57554c": "soft", "#e6e4dc": "rule"}
PALETTE = ("#2a78d6", "#e0632c", "#1a9a6c", "#5b46b8", "#d49a00", "#d0558f", "#5f7a8a", "#9a6b3f")
THEME |= {color: str(i) for i, color in enumerate(PALETTE, 1)}
TEXT, SOFT, RULE = list(THEME)[:3]
BLUE, ORANGE, GREEN, PURPLE, YELLOW, PINK, SLATE, BROWN = PALETTE
VARIABLE_COLORS = {"D^L": BLUE, "D^I": ORANGE, "C": GREEN, "D": SLATE}
MODEST = (
    "TA-OPD",
    "TA-OPD+Ent.",
    "Q3+TA (high D^L)",
    "TIP",
    "Raw KL",
    "Entropy",
    "C-only",
    "Random",
)

DIVERGING = LinearSegmentedColormap.from_list("gain", [ORANGE, "#f3f1ea", BLUE])
BLUES = LinearSegmentedColormap.from_list("learnable", ["#f3f1ea", BLUE, "#123a6b"])
ORANGES = LinearSegmentedColormap.from_list("incompatible", ["#f3f1ea", ORANGE, "#7a2c0c"])
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": TEXT,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": RULE,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "taopd",
    "pdf.fonttype": 42,
}


def draw(tables: Tables, k: int) -> dict[str, Figure]:
    """Return every figure by file name; with several training seeds their mean is drawn."""
    several = any(row["seed"] == "mean" for row in tables["table5_bank"])
    main = {
        name: [row for row in rows if (row.get("seed", "mean") == "mean") or not several]
        for name, rows in tables.items()
    }
    with matplotlib.rc_context(STYLE):
        return {
            "figure2_decomposition": decomposition(main),
            "figure3_evidence": evidence(main, k),
            "figure4_q3_controls": q3_controls(main, tables, k),
            "figure5_robustness": robustness(main, tables, k),
            "figure6_budget_and_position": budget_and_position(main, k),
        }


def save(figures: dict[str, Figure], out: Path) -> None:
    """Write each figure as OUT/NAME.png and, without a date, as OUT/NAME.pdf."""
    with matplotlib.rc_context(STYLE):
        for name, figure in figures.items():
            for kind, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
                with file_written_aside(out / f"{name}.{kind}") as aside:
                    figure.savefig(aside, format=kind, dpi=160, metadata=metadata)


def as_svg(figure: Figure, title: str) -> str:
    """Return inline SVG whose text and lines take the colours of the page."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for color, variable in THEME.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids are unique within a figure only.
    prefix = re.sub(r"\W", "", title)
    svg = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\1{prefix}-", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def pretty(text: str) -> str:
    """Write D^L and D^I with superscript letters, for text that readers see."""
    return text.replace("D^L", "Dᴸ").replace("D^I", "Dᴵ")


def decomposition(tables: Tables) -> Figure:
    """Draw Figure 2: gain over (D^L, D^I); both on the plane of entropy and disagreement."""
    figure, axes = _panels(3, 3.6)
    facts = {row["quantity"]: row["estimate"] for row in tables["table5_bank"]}
    for axis, (plane, title, colors, labels) in zip(
        axes,
        (
            ("gain over (D^L, D^I)", "A  Mean gain, nats", DIVERGING, ("D^L", "D^I")),
            ("D^L over (H, D)", "B  Learnable D^L", BLUES, ("H̃", "D̃")),
            ("D^I over (H, D)", "C  Incompatible D^I", ORANGES, ("H̃", "D̃")),
        ),
        strict=True,
    ):
        grid = np.full((CELLS, CELLS), np.nan)
        for row in _pick(tables["planes"], plane=plane):
            grid[row["y"], row["x"]] = row["estimate"]
        options = {"vmin": 0, "vmax": 1}
        if colors is DIVERGING:
            most = max(float(np.nanquantile(np.abs(grid), 0.95)), 1e-12)
            options = {"norm": TwoSlopeNorm(0, -most, most)}
        edges = np.linspace(0, 1, CELLS + 1)
        mesh = axis.pcolormesh(edges, edges, grid, cmap=colors, **options)
        bar = figure.colorbar(
            mesh, ax=axis, shrink=0.85, extend="both" if "norm" in options else "neither"
        )
        bar.outline.set_visible(False)
        axis.set(title=pretty(title), xlabel=pretty(labels[0]), ylabel=pretty(labels[1]))
        axis.set_aspect("equal")
        axis.grid(False)
        if colors is not DIVERGING:
            x, y = facts["median H̃"], facts["median D̃"]
            axis.plot([0, x, x], [y, y, 1], color=TEXT, linewidth=1.2, linestyle="--")
            axis.text(0.02, 0.97, "Q3", va="top", weight="bold", color=TEXT)
    return figure


def evidence(tables: Tables, k: int) -> Figure:
    """Draw Figure 3: coefficients; parts of Q3 with as many kept rows; support gaps by K."""
    figure, axes = _panels(3, 3.3)
    ks = sorted({row["K"] for row in tables["table9_regression"]})
    for shift, name, color in ((-0.12, "D^L", BLUE), (0.12, "D^I", ORANGE)):
        rows = _pick(tables["table9_regression"], quantity=f"β({name})")
        _points(axes[0], np.arange(len(ks)) + shift, rows, color, pretty(name))
    axes[0].set(title="A  Standardised coefficients", xlabel="K", ylabel="β")
    axes[0].set_xticks(range(len(ks)), ks)

    parts = ("Q3+TA (high D^L)", "Q3+low D^L", "Q3+high D^I", "Random")
    rows = _pick(tables["table10_budget_sweep"], budget=0.1, quantity="per kept")
    rows = [_pick(rows, selector=name)[0] for name in parts]
    for i, (row, color) in enumerate(zip(rows, (BLUE, SLATE, ORANGE, SOFT), strict=True)):
        _points(axes[1], [i], [row], color)
    axes[1].set(title="B  Parts of Q3 at a budget of 10 %", ylabel="gain per kept token, nats")
    axes[1].set_xticks(range(4), [pretty(p).replace(" ", "\n", 1) for p in parts])
    axes[1].set_xlim(-0.5, 3.5)

    for shift, estimator, color in ((-0.12, "pooled", GREEN), (0.12, "matched", PURPLE)):
        rows = _pick(tables["table1_robustness"], estimator=estimator)
        label = "pooled" if estimator == "pooled" else "prompt-matched"
        _points(axes[2], np.arange(len(ks)) + shift, rows, color, label)
    axes[2].set(title="C  High − low support in Q3", xlabel="K", ylabel="gain gap, nats")
    axes[2].set_xticks(range(len(ks)), ks)
    for axis in (axes[0], axes[2]):
        axis.set_xlim(-0.5, len(ks) - 0.5)
    return _finish(figure, axes)


def q3_controls(tables: Tables, every: Tables, k: int) -> Figure:
    """Draw Figure 4: exact top-N selectors, total and per kept token; proxies; trends."""
    figure, axes = _panels(4, 4.2)
    names = [name for name in SELECTOR_NAMES.values() if name != "Full OPD"]
    for axis, quantity, title, label in (
        (axes[0], "total", "A  Total gain at 5 %", "nats"),
        (axes[1], "per kept", "B  Gain per kept token at 5 %", "nats"),
    ):
        rows = _pick(tables["table8_top_n"], budget=0.05, quantity=quantity)
        rows = [_pick(rows, selector=name)[0] for name in names]
        ours = [BLUE if "TA" in name else SLATE for name in names]
        _bars(axis, [pretty(name) for name in names], rows, ours)
        axis.set(title=title, xlabel=label)
    axes[1].set_yticklabels([])
    _proxies(axes[2], tables, (16, 32))
    axes[2].set_title("C  Support proxies in Q3")
    _bucket_trends(axes[3], every)
    axes[3].set(title="D  Bucket trends", xlabel="bucket, low to high", ylabel="mean gain, nats")
    return _finish(figure, axes[[0, 2, 3]], zero=axes[[3]])


def robustness(tables: Tables, every: Tables, k: int) -> Figure:
    """Draw Figure 5: support gaps by seed and K; every proxy; gain by bucket."""
    figure, axes = _panels(3, 3.8)
    rows = every["table1_robustness"]
    labels = list(dict.fromkeys((row["seed"], row["K"]) for row in rows))
    grid = np.array(
        [
            [
                _pick(rows, seed=seed, K=each, estimator=e)[0]["estimate"]
                for e in ("pooled", "matched")
            ]
            for seed, each in labels
        ]
    )
    most = max(float(np.nanmax(np.abs(grid), initial=0.0)), 1e-12)
    axes[0].imshow(grid, cmap=DIVERGING, norm=TwoSlopeNorm(0, -most, most), aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        ink = "#ffffff" if abs(value) > 0.6 * most else "#16150e"
        axes[0].text(x, y, f"{value:+#.3g}", ha="center", va="center", color=ink)
    several = len({seed for seed, _ in labels}) > 1
    names = [f"{seed}, K = {each}" if several else f"K = {each}" for seed, each in labels]
    axes[0].set_yticks(range(len(labels)), names)
    axes[0].set_xticks(range(2), ("pooled", "prompt-matched"))
    axes[0].set_title("A  Gain gap by support in Q3")
    axes[0].grid(False)
    _proxies(axes[1], tables, sorted({row["K"] for row in rows}))
    axes[1].set_title("B  Support proxies in Q3")
    for name, color in VARIABLE_COLORS.items():
        rows = _pick(tables["bucket_gains"], variable=name, K=k)
        _band(axes[2], [row["bucket"] + 1 for row in rows], rows, color, pretty(name))
    axes[2].set(title=f"C  Gain by bucket, K = {k}", xlabel="bucket, low to high", ylabel="nats")
    return _finish(figure, axes[1:], zero=axes[[2]])


def budget_and_position(tables: Tables, k: int) -> Figure:
    """Draw a budget sweep, where kept tokens stand, and what lines leave of the gain."""
    figure, axes = _panels(3, 4.0)
    for name, color in zip(MODEST, PALETTE, strict=True):
        rows = _pick(tables["table10_budget_sweep"], selector=name, quantity="per kept")
        _line(axes[0], [100 * row["budget"] for row in rows], rows, color, pretty(name))
    ticks = [1, 2, 5, 10, 20, 50]
    axes[0].set_xscale("log")
    axes[0].set_xticks(ticks, ticks)
    axes[0].minorticks_off()
    axes[0].set(title="A  Budget sweep", xlabel="% of tokens", ylabel="gain per kept token, nats")

    names = [name for name in SELECTOR_NAMES.values() if name != "Full OPD"]
    rows = _pick(tables["kept_positions"], budget=0.1)
    grid = np.array([[r["share"] * PLACES for r in _pick(rows, selector=n)] for n in names])
    edges = np.linspace(0, 1, PLACES + 1)
    norm = TwoSlopeNorm(1, 0, max(2.0, float(np.nanmax(grid, initial=0.0))))
    mesh = axes[1].pcolormesh(edges, np.arange(len(names) + 1), grid, cmap=DIVERGING, norm=norm)
    bar = figure.colorbar(mesh, ax=axes[1], label="× an even spread", shrink=0.85)
    bar.outline.set_visible(False)
    axes[1].set_yticks(np.arange(len(names)) + 0.5, [pretty(name) for name in names])
    axes[1].invert_yaxis()
    axes[1].grid(False)
    axes[1].set(title="B  Where kept tokens stand, 10 %", xlabel="place in the response")

    for name in ("D^L", "D^I", "C"):
        rows = _pick(tables["spline_sanity_bins"], variable=name, K=k)
        for residual, dashes in (("controls", "--"), ("decomposed", "-")):
            of_residual = _pick(rows, residual=residual)
            x = [row["bucket"] + 1 for row in of_residual]
            y = [row["estimate"] for row in of_residual]
            label = (
                f"{pretty(name)}, behind {'controls' if residual == 'controls' else 'the model'}"
            )
            axes[2].plot(x, y, dashes, color=VARIABLE_COLORS[name], label=label, linewidth=1.6)
    axes[2].set(title="C  Residual gain", xlabel="bucket, low to high", ylabel="nats")
    return _finish(figure, axes[[0, 2]])


def _panels(count: int, height: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(12.6, height), layout="constrained")
    return figure, figure.subplots(1, count)


def _finish(figure: Figure, legends, zero=None) -> Figure:
    for axis in legends:
        if axis.get_legend_handles_labels()[0]:
            columns = 2 if len(axis.get_legend_handles_labels()[0]) > 5 else 4
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns)
    for axis in legends if zero is None else zero:
        axis.axhline(0, color=SOFT, linewidth=0.8, zorder=0.5)
    return figure


def _pick(rows: list[Row], **keys) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in keys.items())]


def _columns(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Return estimates [n], and how far the interval goes below and above them [2, n]."""
    values, low, high = np.array([[r["estimate"], r["low"], r["high"]] for r in rows]).T
    return values, np.abs(np.stack([values - low, high - values]))


def _points(axis: Axes, x, rows: list[Row], color: str, label: str | None = None) -> None:
    y, reach = _columns(rows)
    axis.errorbar(x, y, reach, fmt="o", color=color, label=label, markersize=5, linewidth=2)
    axis.axhline(0, color=SOFT, linewidth=0.8, zorder=0.5)


def _bars(axis: Axes, names: list[str], rows: list[Row], colors: list[str]) -> None:
    x, reach = _columns(rows)
    axis.barh(range(len(names)), x, color=colors, height=0.62)
    axis.errorbar(x, range(len(names)), xerr=reach, fmt="none", ecolor=TEXT, linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.axvline(0, color=SOFT, linewidth=0.8)
    axis.grid(axis="y", visible=False)


def _proxies(axis: Axes, tables: Tables, ks) -> None:
    names = list(PROXIES.values())
    for i, (k, color) in enumerate(zip(ks, (GREEN, PURPLE, YELLOW), strict=False)):
        rows = _pick(tables["table6_support_proxies"], K=k, estimator="pooled")
        x, reach = _columns([_pick(rows, proxy=name)[0] for name in names])
        y = np.arange(len(names)) + 0.2 * (i - (len(ks) - 1) / 2)
        axis.errorbar(x, y, xerr=reach, fmt="o", color=color, label=f"K = {k}", markersize=4.5)
    axis.set_yticks(range(len(names)), [_wrapped(name) for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.axvline(0, color=SOFT, linewidth=0.8)
    axis.set_xlabel("high − low gain gap, nats")


def _wrapped(name: str) -> str:
    """Break a text into two lines of about the same length."""
    middle = min(
        (abs(i - len(name) / 2), i) for i, letter in enumerate(name + " ") if letter == " "
    )[1]
    return name if len(name) < 16 else f"{name[:middle]}\n{name[middle + 1 :]}"


def _bucket_trends(axis: Axes, tables: Tables) -> None:
    """Draw each seed and K thin, and their mean bold."""
    for name, color in VARIABLE_COLORS.items():
        rows = [r for r in _pick(tables["bucket_gains"], variable=name) if r["seed"] != "mean"]
        for seed, k in dict.fromkeys((row["seed"], row["K"]) for row in rows):
            of_one = _pick(rows, seed=seed, K=k)
            x, y = zip(*((row["bucket"] + 1, row["estimate"]) for row in of_one), strict=True)
            axis.plot(x, y, color=color, linewidth=0.6, alpha=0.5)
        buckets = sorted({row["bucket"] for row in rows})
        means = [np.mean([r["estimate"] for r in _pick(rows, bucket=b)]) for b in buckets]
        axis.plot([b + 1 for b in buckets], means, color=color, linewidth=2.4, label=pretty(name))


def _line(axis: Axes, x, rows: list[Row], color: str, label: str) -> None:
    axis.plot(x, [row["estimate"] for row in rows], "o-", color=color, label=label, markersize=3)


def _band(axis: Axes, x, rows: list[Row], color: str, label: str) -> None:
    _line(axis, x, rows, color, label)
    low, high = ([row[edge] for row in rows] for edge in ("low", "high"))
    axis.fill_between(x, low, high, color=color, alpha=0.14, linewidth=0)
