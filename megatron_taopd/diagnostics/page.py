"""report.html of the diagnostic: tables, figures and tokens to look at, self-contained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_taopd.diagnostics.analysis import Bank, Row, Tables, shape_variables
from megatron_taopd.monitoring.report import CSS, number

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


def read_views(path: Path, bank: Bank, gain: np.ndarray, k: int) -> list[View]:
    """The responses that `score --view` stored, joined with their scores.

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
    """The page.

    Args:
        figures: title → (what it shows, inline SVG).
        views: responses to look at.
    """
    seeds = list(dict.fromkeys(row["seed"] for row in tables["table5_bank"]))
    main = "mean" if "mean" in seeds else seeds[0]
    about = {r["quantity"]: r for r in tables["table5_bank"] if r["seed"] == main}
    over = "training seeds (t)" if main == "mean" else "prompts (bootstrap)"
    count = "".join(
        f"<span>{label} <b>{number(about[name]['estimate'])}</b></span>"
        for name, label in (("prompts", "prompts"), ("sequences", "responses"))
    )
    drawn = "".join(
        f"<figure class=card><figcaption><h2>{escape(title)}</h2><p class=note>{escape(note)}</p>"
        f"</figcaption><div class=drawing tabindex=0 role=group aria-label='{escape(title)}'>{svg}"
        "</div></figure>"
        for title, (note, svg) in figures.items()
    )
    return (
        '<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="'
        'width=device-width, initial-scale=1"><title>Fixed-context diagnostic · TA-OPD</title>'
        f"<style>{CSS}{OWN_CSS}</style></head><body><main><header><p class=eyebrow>Megatron TA-OPD"
        "</p><h1>Fixed-context diagnostic</h1><p class=facts>"
        f"{count}<span>tokens <b>{number(about['prompts']['rows'])}</b></span>"
        f"<span>training seeds <b>{len([s for s in seeds if s != 'mean'])}</b></span>"
        f"<span>K <b>{k}</b></span><span>intervals 95 %, over {over}</span></p></header>"
        f"{_cards(tables, about, main, k)}{_token_views(views)}"
        f"<section class=drawings>{drawn}</section>{_table_sections(tables, main)}"
        f"</main><script>{SCRIPT}</script></body></html>\n"
    )


def _cards(tables: Tables, about: Mapping[str, Row], seed: str, k: int) -> str:
    def only(table: str, **keys) -> Row:
        keys |= {"seed": seed}
        return next(r for r in tables[table] if all(r[key] == v for key, v in keys.items()))

    cards = (
        ("Mean gain", about["mean gain"], "nats per token; above 0: nearer to the teacher"),
        ("β(D^L) − β(D^I)", only("table9_regression", K=k, quantity="gap"), "standardised"),
        (
            "Support gap in Q3",
            only("table1_robustness", K=k, estimator="pooled"),
            "nats, high minus low C, pooled",
        ),
        (
            "TA-OPD − all tokens, 10 %",
            only(
                "table10_budget_sweep",
                budget=0.1,
                selector="TA-OPD",
                quantity="per kept − all",
            ),
            "nats per kept token",
        ),
    )
    return (
        "<section class=figures>"
        + "".join(
            f"<div><h3>{pretty(title)}</h3><p class=value>{signed(row['estimate'])}</p>"
            f"<p class=note>{bounds(row)}<br>{note}</p></div>"
            for title, row, note in cards
        )
        + "</section>"
    )


def _table_sections(tables: Tables, seed: str) -> str:
    def rows(name: str, **keys) -> list[Row]:
        return [
            row
            for row in tables[name]
            if row["seed"] == seed and all(row[key] == value for key, value in keys.items())
        ]

    sections = (
        (
            "Regression of the gain",
            "Table 9. All variables standardised in each resample; ΔR² over the "
            "baseline, in-sample and no test, so it is never bold.",
            pivot(rows("table9_regression"), "quantity", "K", "K = {}"),
        ),
        (
            "High − low support inside Q3, pooled",
            "Table 6. Mean gain of the half with more support minus that of the other, nats.",
            pivot(rows("table6_support_proxies", estimator="pooled"), "proxy", "K", "K = {}"),
        ),
        (
            "High − low support inside Q3, prompt-matched",
            "The gap inside each prompt, then the mean over prompts.",
            pivot(rows("table6_support_proxies", estimator="matched"), "proxy", "K", "K = {}"),
        ),
        (
            "Exact top-N: gain per kept token",
            "Table 8. Every selector keeps the same number of tokens (Full OPD all), nats.",
            pivot(rows("table8_top_n", quantity="per kept"), "selector", "budget", "{:.0%}"),
        ),
        (
            "Exact top-N: total gain",
            "Sum over the kept tokens, nats.",
            pivot(rows("table8_top_n", quantity="total"), "selector", "budget", "{:.0%}"),
        ),
        (
            "Exact top-N: gain per kept token minus that of all tokens",
            "What a random choice is expected to give is taken away; nats.",
            pivot(rows("table8_top_n", quantity="per kept − all"), "selector", "budget", "{:.0%}"),
        ),
    )
    return "".join(
        f"<section class=card><h2>{title}</h2><p class=note>{note}</p>"
        f"<div class=scroll tabindex=0 role=group aria-label='{title}'>{table}</div></section>"
        for title, note, table in sections
    )


def pivot(rows: Sequence[Row], down: str, across: str, header: str) -> str:
    """An HTML table of estimates and intervals; what excludes 0 is bold, but for R²."""
    columns = list(dict.fromkeys(row[across] for row in rows))
    cells = {(row[down], row[across]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row[down] for row in rows):
        values = "".join(f"<td class=num>{_cell(cells[name, column])}</td>" for column in columns)
        lines.append(f"<tr><th scope=row>{pretty(escape(name))}</th>{values}</tr>")
    heads = "".join(f"<th scope=col class=num>{header.format(column)}</th>" for column in columns)
    return f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _cell(row: Row) -> str:
    clear = row["low"] > 0 or row["high"] < 0
    in_sample = "R²" in row.get("quantity", "")  # moves with the variables, also without an effect
    value = signed(row["estimate"])
    if clear and not in_sample:
        value = f"<b>{value}</b>"
    return f"{value} <small>{bounds(row)}</small>"


def bounds(row: Row) -> str:
    return f"[{signed(row['low'])}, {signed(row['high'])}]"


def signed(value: float) -> str:
    if value != value:
        return "–"
    return ("+" if value > 0 else "") + number(value).replace("-", "−")


def pretty(text: str) -> str:
    return text.replace("D^L", "D<sup>L</sup>").replace("D^I", "D<sup>I</sup>")


def _token_views(views: Sequence[View]) -> str:
    if not views:
        return ""
    articles = []
    for i, view in enumerate(views):
        tokens = "".join(_token(j, token) for j, token in enumerate(view.tokens))
        data = json.dumps(view.tokens, ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
        articles.append(
            f"<article class=view><p class=prompt>{escape(view.prompt)}</p>"
            f"<div class=response role=listbox aria-label='Tokens of response {i + 1}'>{tokens}"
            f"</div><script type=application/json>{data}</script></article>"
        )
    return (
        "<section class='card tokens'><h2>Token by token</h2><p class=note>"
        "<span class=key style='--l:.9;--i:0'>learnable</span> disagreement D<sup>L</sup> · "
        "<span class='key off' style='--l:0;--i:.9'>incompatible</span> disagreement "
        "D<sup>I</sup> (dotted where it is the larger). Point at a token, click it, or walk with "
        "the arrow keys.</p><div class=split>"
        f"<div class=samples>{''.join(articles)}</div>"
        "<aside aria-live=polite><p class=note>No token chosen.</p></aside></div></section>"
    )


def _token(index: int, token: Mapping[str, Any]) -> str:
    text = escape(token["text"]).replace("\n", "⏎\n") or "␣"
    off = " off" if token["incompatible"] > max(token["learnable"], 0.1) else ""
    return (
        f"<span class='t{off}' role=option aria-selected=false tabindex={0 if index == 0 else -1} "
        f"style='--l:{token['learnable']:.2f};--i:{token['incompatible']:.2f}'>{text}</span>"
    )


OWN_CSS = """
.drawings { display: grid; gap: 12px; grid-template-columns: minmax(0, 1fr); }
.drawing, .scroll { overflow-x: auto; }
.drawing svg { min-width: 860px; margin-top: 10px; }
.drawing svg text { font-family: inherit !important; fill: var(--text); }
th {
  font-weight: 500; text-align: left; padding: 5px 16px 5px 0; border-top: 1px solid var(--rule);
}
tbody tr:first-child th { border-top: 0; }
thead th, thead td { border-top: 0; color: var(--soft); font-size: 13px; }
thead th.num { text-align: right; padding-right: 0; }
td small { color: var(--soft); }
sup { line-height: 0; }
.split { display: grid; grid-template-columns: minmax(0, 1fr) 300px; gap: 20px; }
.tokens .samples { display: block; }
.view + .view { margin-top: 12px; }
aside {
  position: sticky; top: 12px; align-self: start; min-height: 320px; margin-top: 12px;
  border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px;
}
.t, .key {
  border-radius: 3px; padding: 2px 0;
  background:
    linear-gradient(rgb(from var(--1) r g b / calc(.75 * var(--l))) 0 0),
    linear-gradient(rgb(from var(--2) r g b / calc(.75 * var(--i))) 0 0);
}
.t { cursor: pointer; }
.off { text-decoration: underline dotted 2px; text-underline-offset: 4px; }
.t:focus-visible, .t[aria-selected=true] { outline: 2px solid var(--text); outline-offset: 1px; }
.key { padding: 2px 5px; color: var(--text); }
aside h3 { font: 600 15px ui-monospace, Menlo, Consolas, monospace; color: var(--text); }
aside h3, aside td:first-child { white-space: pre-wrap; overflow-wrap: anywhere; }
aside h4 { margin: 12px 0 0; font-size: 13px; font-weight: 600; color: var(--soft); }
aside dl { display: grid; grid-template-columns: 1fr auto; gap: 0 12px; margin: 6px 0 0; }
aside dd { margin: 0; font-variant-numeric: tabular-nums; }
aside table { margin-top: 2px; font-size: 13px; }
aside td { padding: 2px 0; border: 0; }
aside td:first-child { font-family: ui-monospace, Menlo, Consolas, monospace; width: 40%; }
aside .bar { width: 35%; padding: 0 8px; }
@media (max-width: 800px) {
  .split { grid-template-columns: minmax(0, 1fr); }
  aside {
    top: auto; bottom: 8px; min-height: 0; max-height: 40vh; overflow-y: auto;
    background: var(--card);
  }
}
"""

SCRIPT = """
const panel = document.querySelector("aside");
const element = (name, text, parent) => {
  const made = parent.appendChild(document.createElement(name));
  made.textContent = text;
  return made;
};
const visible = (text) => text.replaceAll("\\n", "⏎").replaceAll(" ", "␣") || "∅";
function show(token) {
  panel.replaceChildren();
  element("h3", visible(token.text), panel);
  const list = element("dl", "", panel);
  const names = {learnable: "learnable", incompatible: "incompatible", D: "D, nats", C: "C",
    gain: "gain, nats"};
  for (const [key, name] of Object.entries(names)) {
    element("dt", name, list);
    element("dd", token[key].toFixed(3), list);
  }
  for (const [who, color, other] of [["student", 1, "teacher"], ["teacher", 3, "student"]]) {
    element("h4", `${who[0].toUpperCase()}${who.slice(1)}, likeliest`, panel);
    const table = element("table", "", panel);
    for (const [text, p] of token[who]) {
      const row = element("tr", "", table);
      const shared = token[other].some(([its]) => its === text);
      element("td", visible(text) + (shared ? "" : " ·"), row).title =
        shared ? "" : `not among the ${other}'s shown`;
      const bar = element("td", "", row);
      bar.className = "bar";
      element("span", "", bar).style.cssText = `width:${100 * p}%;background:var(--${color})`;
      const value = element("td", `${(100 * p).toFixed(1)} %`, row);
      value.className = "num";
    }
  }
}
let chosen = null;
for (const view of document.querySelectorAll(".view")) {
  const tokens = JSON.parse(view.querySelector("script").textContent);
  const spans = [...view.querySelectorAll(".t")];
  const choose = (span) => {
    chosen?.setAttribute("aria-selected", "false");
    spans.forEach((each) => (each.tabIndex = each === span ? 0 : -1));
    span.setAttribute("aria-selected", "true");
    chosen = span;
    show(tokens[spans.indexOf(span)]);
  };
  view.addEventListener("click", ({target}) => {
    if (spans.includes(target)) { target.focus(); choose(target); }
  });
  view.addEventListener("focusin", ({target}) => spans.includes(target) && choose(target));
  view.addEventListener("pointerover", ({target}) => {
    const at = spans.indexOf(target);
    if (at >= 0) show(tokens[at]);
  });
  view.addEventListener("pointerleave", () => {
    const of = chosen?.closest(".view");
    if (of === view) show(tokens[spans.indexOf(chosen)]);
  });
  view.addEventListener("keydown", (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1}[event.key];
    const next = step && spans[spans.indexOf(event.target) + step];
    if (next) { event.preventDefault(); next.focus(); }
  });
}
"""
