"""report.html of the diagnostic: tables, figures and tokens to look at, self-contained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from megatron_taopd.diagnostics.gains import Row, ScoredBank, Tables, shape_variables
from megatron_taopd.monitoring.numbers import number
from megatron_taopd.monitoring.pages import environment

MOST_TOKENS = 1200  # of a response, shown


@dataclass(frozen=True)
class View:
    """One response to look at.

    Attributes:
        prompt: as a person reads it.
        tokens: of each position text, D, C, learnable, incompatible, gain, and student and teacher:
            the likeliest tokens of both models with their probabilities.
    """

    prompt: str
    tokens: list[dict[str, Any]]


def read_views(path: Path, bank: ScoredBank, gain: np.ndarray, k: int) -> list[View]:
    """Return the responses that `score --view` stored, joined with their scores.

    Raises:
        ValueError: not such a file, or one of another bank.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        fingerprint, sequences = stored["bank"], stored["sequences"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file that `score --view` wrote") from error
    if fingerprint != bank.fingerprint:
        raise ValueError(f"{path}: of bank {fingerprint}, the tables are of {bank.fingerprint}")
    shapes = shape_variables(bank, k)
    values = {"D": shapes["D"], "C": shapes["C"], "gain": gain}
    values |= {"learnable": shapes["D^L"], "incompatible": shapes["D^I"]}
    views = []
    for shown in sequences:
        rows = np.flatnonzero(bank.sequence == shown["sequence"])
        if len(rows) != len(shown["positions"]):
            raise ValueError(
                f"{path}: sequence {shown['sequence']} has {len(shown['positions'])} positions, "
                f"{len(rows)} in the tables"
            )
        tokens = [
            {key: position[key] for key in ("text", "student", "teacher")}
            | {name: round(float(column[row]), 5) for name, column in values.items()}
            for row, position in zip(rows, shown["positions"], strict=True)
        ]
        prompt = "\n\n".join(message["content"] for message in shown["messages"])
        views.append(View(prompt, tokens[:MOST_TOKENS]))
    return views


def render(tables: Tables, k: int, figures: Mapping[str, tuple[str, str]], views=()) -> str:
    """Render the page as HTML.

    Args:
        k: of the selectors and of what is shown for one K.
        figures: title → (what it shows, inline SVG).
        views: responses to look at.
    """
    seeds = list(dict.fromkeys(row["seed"] for row in tables["table5_bank"]))
    main = "mean" if "mean" in seeds else seeds[0]
    of_seed = {
        name: [row for row in rows if row["seed"] == main]
        for name, rows in tables.items()
        if name != "kept_positions"
    }
    about = {row["quantity"]: row for row in of_seed["table5_bank"]}
    return _TEMPLATES.get_template("diagnostic.html").render(
        k=k,
        about=about,
        seeds=[seed for seed in seeds if seed != "mean"],
        over="training seeds (t)" if main == "mean" else "prompts (bootstrap)",
        cards=_cards(of_seed, about, k),
        views=views,
        figures={title: (note, Markup(svg)) for title, (note, svg) in figures.items()},
        sections=_sections(of_seed),
    )


def _cards(tables: Tables, about: Mapping[str, Row], k: int) -> list[tuple[str, Row, str]]:
    """Choose the four figures that stand at the top: title, row and note."""

    def only(table: str, **keys) -> Row:
        return _pick(tables[table], **keys)[0]

    budget = {"budget": 0.1, "selector": "TA-OPD", "quantity": "per kept − all"}
    return [
        ("Mean gain", about["mean gain"], "nats per token; above 0: nearer to the teacher"),
        ("β(D^L) − β(D^I)", only("table9_regression", K=k, quantity="gap"), "standardised"),
        (
            "Support gap in Q3",
            only("table1_robustness", K=k, estimator="pooled"),
            "nats, high minus low C, pooled",
        ),
        (
            "TA-OPD − all tokens, 10 %",
            only("table10_budget_sweep", **budget),
            "nats per kept token",
        ),
    ]


def _sections(tables: Tables) -> list[tuple[str, str, str]]:
    """Lay out the tables of the page: title, note and HTML."""

    def proxies(estimator: str) -> str:
        rows = _pick(tables["table6_support_proxies"], estimator=estimator)
        return pivot(rows, "proxy", "K", "K = {}")

    def top_n(quantity: str) -> str:
        return pivot(
            _pick(tables["table8_top_n"], quantity=quantity), "selector", "budget", "{:.0%}"
        )

    return [
        (
            "Regression of the gain",
            "Table 9. All variables standardised in each resample; ΔR² over the "
            "baseline, in-sample and no test, so it is never bold.",
            pivot(tables["table9_regression"], "quantity", "K", "K = {}"),
        ),
        (
            "Teachability beside position",
            "The gain on where a row stands, disagreement and its two parts together; all "
            "standardised in each resample.",
            pivot(tables["position_regression"], "quantity", "K", "K = {}"),
        ),
        (
            "High − low learnable disagreement among rows that stand alike",
            "Mean gain of the half with more of it minus that of the other, nats: of all rows, "
            "inside tenths of the responses, and inside tenths where disagreement is alike, too.",
            pivot(_pick(tables["position_gaps"], variable="D^L"), "among", "K", "K = {}"),
        ),
        (
            "High − low support inside Q3, pooled",
            "Table 6. Mean gain of the half with more support minus that of the other, nats.",
            proxies("pooled"),
        ),
        (
            "High − low support inside Q3, prompt-matched",
            "The gap inside each prompt, then the mean over prompts.",
            proxies("matched"),
        ),
        (
            "Exact top-N: gain per kept token",
            "Table 8. Every selector keeps the same number of tokens (Full OPD all), nats.",
            top_n("per kept"),
        ),
        ("Exact top-N: total gain", "Sum over the kept tokens, nats.", top_n("total")),
        (
            "Exact top-N: gain per kept token minus that of all tokens",
            "What a random choice is expected to give is taken away; nats.",
            top_n("per kept − all"),
        ),
    ]


def _pick(rows: Sequence[Row], **keys) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in keys.items())]


def pivot(rows: Sequence[Row], down: str, across: str, header: str) -> str:
    """Render an HTML table of estimates and intervals; what excludes 0 is bold, but for R².

    Args:
        down, across: the keys of the rows that name the table's rows and columns.
        header: of a column, a format of its name.
    """
    return Markup(
        _TEMPLATES.get_template("pivot.html").render(
            names=list(dict.fromkeys(row[down] for row in rows)),
            columns={row[across]: header.format(row[across]) for row in rows},
            cells={(row[down], row[across]): row for row in rows},
        )
    )


def stands_out(row: Row) -> bool:
    """Say whether the interval excludes 0 and that means something."""
    # An in-sample R² moves with the number of variables, also without an effect.
    return (row["low"] > 0 or row["high"] < 0) and "R²" not in row.get("quantity", "")


def bounds(row: Row) -> str:
    """Write the interval of a row."""
    return f"[{signed(row['low'])}, {signed(row['high'])}]"


def signed(value: float) -> str:
    """Write a number with its sign, a dash for NaN."""
    if value != value:
        return "–"
    return ("+" if value > 0 else "") + number(value).replace("-", "−")


def pretty(text: str) -> Markup:
    """Write D^L and D^I with superscripts."""
    shown = str(escape(text))
    return Markup(shown.replace("D^L", "D<sup>L</sup>").replace("D^I", "D<sup>I</sup>"))


_TEMPLATES = environment(Path(__file__).with_name("templates"))
_TEMPLATES.filters |= {"bounds": bounds, "pretty": pretty, "signed": signed}
_TEMPLATES.tests["standing_out"] = stands_out
