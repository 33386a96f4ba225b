"""report.html: one self-contained page about a run, drawn from the records of metrics.jsonl."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

from megatron_taopd.monitoring import charts
from megatron_taopd.monitoring.numbers import number, percent, seconds
from megatron_taopd.monitoring.pages import environment
from megatron_taopd.monitoring.summary import PHASES, Record, summarize
from megatron_taopd.types import RolloutBatch

if TYPE_CHECKING:
    from megatron_taopd.evaluation.in_loop import Example


@dataclass(frozen=True)
class Sample:
    """One response to show, token by token.

    Attributes:
        prompt: as a person reads it.
        tokens: the text of each response token.
        kept: whether each of them was trained on; None: it is an answer to a held-out prompt.
        scores: a number of each token to show under the pointer (its teachability, say).
        correct: whether the answer was right, if known.
        note: further words on it.
    """

    prompt: str
    tokens: Sequence[str]
    kept: Sequence[bool] | None
    scores: Sequence[float] | None = None
    correct: bool | None = None
    note: str = ""


def sample_rollouts(
    batch: RolloutBatch,
    kept: Tensor,
    tokenizer,
    count: int = 6,
    scores: Tensor | None = None,
    most_tokens: int = 400,
) -> list[Sample]:
    """Pick the first `count` sequences of a batch of which a row was kept, for the report.

    Args:
        kept: [R] bool, the rows trained on.
        scores: [R] float32, what to show of each row under the pointer.
        most_tokens: shown of a response.
    """
    samples = []
    cu_rows = batch.cu_rows.tolist()
    for i in range(batch.num_sequences):
        if len(samples) == count:
            break
        rows = slice(cu_rows[i], min(cu_rows[i + 1], cu_rows[i] + most_tokens))
        if not kept[rows].any():
            continue
        prompt, response = batch.sequence(i).tensor_split([int(batch.prompt_lengths[i])])
        # A token's text can depend on those before it (spaces, bytes of one character).
        texts = [tokenizer.decode(response[:n]) for n in range(len(kept[rows]) + 1)]
        samples.append(
            Sample(
                prompt=tokenizer.decode(prompt, skip_special_tokens=True),
                tokens=[after[len(before) :] for before, after in pairwise(texts)],
                kept=kept[rows].tolist(),
                scores=None if scores is None else scores[rows].tolist(),
            )
        )
    return samples


def answered(example: Example, most_characters: int = 2000) -> Sample:
    """Turn an example of an evaluation into what the report shows of it."""
    response = example.response
    if len(response) > most_characters:
        half = most_characters // 2
        response = f"{response[:half]} … {response[-half:]}"
    stated = f"it says {example.answer}" if example.answer else "it states no answer"
    note = f"{stated}; the reference is {example.gold}"
    return Sample(example.prompt, [response], None, correct=example.correct, note=note)


def write_report(
    path: str | Path,
    records: Sequence[Record],
    name: str,
    config_yaml: str = "",
    samples: Sequence[Sample] = (),
) -> None:
    """Write the page in one move, so that a reader never finds half of it."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(render_report(records, name, config_yaml, samples), encoding="utf-8")
    os.replace(temporary, path)


def render_report(
    records: Sequence[Record], name: str, config_yaml: str = "", samples: Sequence[Sample] = ()
) -> str:
    """Render the page as HTML.

    Args:
        records: those of metrics.jsonl, by step; what they lack is left out of the page.
        name: of the run.
        config_yaml: the whole configuration.
        samples: responses to show; those with `kept` are rollouts, the others held-out answers.
    """
    config = yaml.safe_load(config_yaml) or {}
    summary, drawn_as = summarize(records), sampling(config)
    frame = {
        "width": charts.WIDTH,
        "height": charts.HEIGHT,
        "left": charts.LEFT,
        "right": charts.WIDTH - charts.RIGHT,
        "top": charts.TOP,
        "bottom": charts.HEIGHT - charts.BOTTOM,
    }
    page = environment().get_template("report.html")
    return page.render(
        name=name,
        facts=_facts(config),
        cards=_cards(summary, drawn_as),
        charts=charts.charts_of(records, config, drawn_as),
        frame=frame,
        rollouts=[sample for sample in samples if sample.kept is not None],
        held_out=[sample for sample in samples if sample.kept is None],
        sampling=drawn_as,
        phases=summary["phases"],
        colors={phase: color for color, phase in enumerate(PHASES, 1)},
        config_yaml=config_yaml,
    )


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Collect what was run for the line below the title; None where the YAML does not say."""

    def get(key: str) -> Any:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def model(role: str) -> dict[str, str] | None:
        if not get(f"{role}.path"):
            return None
        layout = f"TP{get(f'{role}.parallel.tp') or 1} PP{get(f'{role}.parallel.pp') or 1}"
        if (experts := get(f"{role}.parallel.ep") or 1) > 1:
            layout += f" EP{experts}"
        if get(f"{role}.engine") == "sglang":
            bounds = f", top {get(f'{role}.topk')} (scores are bounds)"
            layout = "SGLang" + (bounds if get(f"{role}.form") == "topk" else "")
        return {"name": Path(get(f"{role}.path")).name, "layout": layout}

    ratio = get("selection.ratio")
    settings = (
        ("K", "selection.k"),
        ("loss", "loss.kind"),
        ("lr", "optimizer.lr"),
        ("prompts", "rollout.prompts"),
        ("seed", "run.seed"),
    )
    return {
        "teacher": model("teacher"),
        "student": model("student"),
        "selector": get("selection.selector"),
        "ratio": None if ratio is None else float(ratio),
        "settings": [(label, get(key)) for label, key in settings if get(key) is not None],
    }


def sampling(config: Mapping[str, Any]) -> str:
    """Say how evaluations draw their responses; empty if the configuration does not."""
    section, rollout = config.get("eval") or {}, config.get("rollout") or {}
    if (temperature := section.get("temperature")) is None:
        return ""
    if temperature == 0:
        return "greedy"
    words = [f"temperature {temperature:g}"]
    if (top_p := rollout.get("top_p", 1)) < 1:
        words.append(f"top-p {top_p:g}")
    if top_k := rollout.get("top_k"):
        words.append(f"top-k {top_k}")
    if (samples := section.get("samples", 1)) > 1:
        words.append(f"mean of {samples} responses")
    return ", ".join(words)


@dataclass(frozen=True)
class Card:
    """A figure of the run; `before` is what it was at the start, if that is of interest."""

    title: str
    value: str
    note: str
    before: str = ""


def _cards(s: Mapping[str, Any], drawn_as: str) -> list[Card]:
    """Choose the figures that stand at the top.

    Args:
        s: of `summarize`.
        drawn_as: how evaluations draw their responses, in words.
    """
    cards = []
    if s["accuracy_last"] is not None:
        first, last = s["accuracy_first"], s["accuracy_last"]
        note = ", ".join(filter(None, [f"{100 * (last - first):+.1f} points", drawn_as]))
        cards.append(Card("Held-out accuracy", percent(last), note, percent(first)))
    if s["loss_first"] is not None:
        note = "means of the first and last tenth"
        cards.append(Card("Loss", number(s["loss_last"]), note, number(s["loss_first"])))
    for title, part, whole, of in (
        ("Rows kept", "kept_rows", "valid_rows", "response rows"),
        ("Tokens trained", "tokens_trained", "tokens_rolled_out", "rolled out"),
    ):
        if s[part] and s[whole]:
            note = f"{number(s[part])} of {number(s[whole])} {of}"
            cards.append(Card(title, percent(s[part] / s[whole]), note))
    if s["operations"] is not None:
        note = "of full OPD's, with the same recomputation"
        cards.append(Card("Operations", percent(s["operations"]), note))
    if s["step_time"] is not None:
        cards.append(Card("Step", seconds(s["step_time"]), f"median of {s['steps']} steps"))
    if s["gap"] is not None:
        cards.append(Card("Engine gap", number(s["gap"]), "mean |Δ log p| to the trainer"))
    return cards
