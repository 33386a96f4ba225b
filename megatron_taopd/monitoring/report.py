"""report.html: one self-contained page about a run, drawn from what the run has left."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from omegaconf import MISSING as REQUIRED

from megatron_taopd.config.schema import leaf_keys
from megatron_taopd.evaluation.in_loop import Example
from megatron_taopd.monitoring import charts
from megatron_taopd.monitoring.numbers import number, percent, seconds
from megatron_taopd.monitoring.pages import environment
from megatron_taopd.monitoring.plane import SIDE, drawn_plane
from megatron_taopd.monitoring.samples import KINDS, Answers, Response, Samples, shortened
from megatron_taopd.monitoring.summary import Record, column, summarize

# libyaml's, ten times faster, where PyYAML was built with it; the page is written again and again.
FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Kept:
    """What a run has left besides its records.

    Attributes:
        sessions: each start of the run (`sessions.Sessions.entries`).
        best: what the run says of its best checkpoint: step, accuracy, path.
        newest: the directory of the newest checkpoint.
        student: whether the student was exported.
    """

    samples: Samples = field(default_factory=Samples)
    sessions: Sequence[Mapping[str, Any]] = ()
    best: Mapping[str, Any] | None = None
    newest: str | None = None
    student: bool = False

    @classmethod
    def of(
        cls, run_dir: Path, samples: Samples, sessions: Sequence[Mapping[str, Any]] = ()
    ) -> Kept:
        """Look at what is in the directory of a run."""
        folder, best = run_dir / "checkpoints", None
        with suppress(OSError, ValueError):  # there is none yet
            best = json.loads((folder / "best.json").read_text())
        saved = sorted(path.name for path in folder.glob("step_*") if path.name[5:].isdecimal())
        student = (run_dir / "student" / "config.json").is_file()
        return cls(samples, sessions, best, saved[-1] if saved else None, student)


def write_report(
    path: str | Path,
    records: Sequence[Record],
    name: str,
    config_yaml: str = "",
    kept: Kept | None = None,
) -> None:
    """Write the page in one move, so that a reader never finds half of it."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(render_report(records, name, config_yaml, kept), encoding="utf-8")
    os.replace(temporary, path)


def render_report(
    records: Sequence[Record], name: str, config_yaml: str = "", kept: Kept | None = None
) -> str:
    """Render the page as HTML.

    Args:
        records: those of metrics.jsonl, by step; what they lack is left out of the page.
        name: of the run.
        config_yaml: the whole configuration.
        kept: tokens, answers, machines and checkpoints to show.
    """
    kept = kept or Kept()
    config = yaml.load(config_yaml, FAST_LOADER) or {}
    summary, drawn_as = summarize(records), sampling(config)
    ranks = [(session["first_step"], session["ranks"]) for session in kept.sessions]
    snapshots = [
        {
            "step": snapshot.step,
            "plane": drawn_plane(snapshot),
            "responses": [(response, tooltips(response)) for response in snapshot.responses],
        }
        for snapshot in kept.samples.steps
    ]
    templates = environment()
    templates.filters["shortened"] = shortened
    page = templates.get_template("report.html")
    return page.render(
        name=name,
        facts=_facts(config, summary["steps"]),
        cards=_cards(summary, records, drawn_as, kept),
        charts=charts.charts_of(records, config, drawn_as, ranks),
        size=(charts.WIDTH, charts.HEIGHT),
        side=SIDE,
        snapshots=snapshots,
        kinds=KINDS,
        pairs=paired(kept.samples.evaluations),
        evaluated=[answers.step for answers in kept.samples.evaluations],
        sampling=drawn_as,
        phases=summary["phases"],
        colors=charts.COLORS,
        about=_about(config, kept),
        changed=changed_keys(config),
        config_yaml=config_yaml,
        thinned=thinned(records, kept),
    )


def tooltips(response: Response) -> dict[str, Any]:
    """Return what the script shows of a response's tokens: names, and a column of values each."""
    scores = response.scores
    return {
        "kept": [int(kept) for kept in response.kept],
        "kinds": response.kinds,
        **{name: values for name, values in scores.items() if values is not None},
    }


def paired(evaluations: Sequence[Answers]) -> list[tuple[str, str, list[Example | None]]]:
    """Put what was answered to the same prompt side by side: prompt, reference, answers."""
    if not evaluations:
        return []
    answered = [{example.prompt: example for example in each.examples} for each in evaluations]
    return [
        (
            shortened(example.prompt),
            example.gold,
            [found.get(example.prompt) for found in answered],
        )
        for example in evaluations[-1].examples
    ]


def changed_keys(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """List key, value and default of what is set to something else, required keys first."""
    required, others = [], []
    for dotted, kind, name in leaf_keys():
        given: Any = config
        for part in dotted.split("."):
            given = given.get(part, MISSING) if isinstance(given, dict) else MISSING
        if given is MISSING:
            continue
        its = kind.__dataclass_fields__[name]  # type: ignore[attr-defined]
        default = its.default if its.default_factory is MISSING else its.default_factory()
        if default == REQUIRED:
            required.append((dotted, _shown(given), "required"))
        elif given != (list(default) if isinstance(default, tuple) else default):
            others.append((dotted, _shown(given), _shown(default)))
    return required + others


def _shown(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def thinned(records: Sequence[Record], kept: Kept) -> list[str]:
    """Say what the page does not show of all that there is."""
    said = []
    if len(records) > charts.MOST_POINTS:
        said.append(
            f"lines of more than {charts.MOST_POINTS} steps are means of neighbouring steps "
            "(metrics.jsonl has all of them)"
        )
    for snapshot in kept.samples.steps:
        if len(snapshot.points) < snapshot.rows:
            taken = sum(point[3] for point in snapshot.points)
            said.append(
                f"the plane of step {snapshot.step} shows {taken:,} of {snapshot.kept:,} kept "
                f"tokens and {len(snapshot.points) - taken:,} of "
                f"{snapshot.rows - snapshot.kept:,} others"
            )
    if any(r.length > len(r.tokens) for s in kept.samples.steps for r in s.responses):
        said.append("of long responses the first tokens are shown")
    return said


def _about(config: Mapping[str, Any], kept: Kept) -> list[tuple[str, str]]:
    """Say what the run ran on, and where what it made is: (what, in words)."""
    rows = []
    if kept.sessions:
        last = kept.sessions[-1]
        hosts = f" on {last['hosts']} hosts" if last["hosts"] > 1 else ""
        ranks = "1 rank" if last["ranks"] == 1 else f"{last['ranks']} ranks"
        rows.append(("Hardware", f"{ranks}{hosts}, {last['device']}"))
        versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
        rows.append(("Versions", versions))
        rows.append(
            ("Started", str(kept.sessions[0]["began"]).replace("T", " ").replace("+00:00", " UTC"))
        )
        spent = sum(session["seconds"] for session in kept.sessions)
        starts = len(kept.sessions)
        rows.append(("Duration", seconds(spent) + (f" in {starts} starts" if starts > 1 else "")))
    place = (config.get("run") or {}).get("dir")
    place = f"{place}/" if place else ""
    if kept.best:
        accuracy = percent(kept.best["accuracy"])
        where = f"{place}checkpoints/{kept.best['path']}"
        rows.append(("Best checkpoint", f"step {kept.best['step']}, accuracy {accuracy}: {where}"))
    if kept.newest:
        rows.append(("Newest checkpoint", f"{place}checkpoints/{kept.newest}"))
    if kept.student:
        rows.append(("Student", f"{place}student (a Hugging Face directory)"))
    return rows


def _facts(config: Mapping[str, Any], step: int) -> dict[str, Any]:
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
    steps = get("train.steps")
    progress = f"{step} of {steps}" if steps and step < steps else str(steps or step)
    return {
        "steps": progress,
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


def _cards(
    s: Mapping[str, Any], records: Sequence[Record], drawn_as: str, kept: Kept
) -> list[Card]:
    """Choose the figures that stand at the top.

    Args:
        s: of `summarize`, records being what that was given.
        drawn_as: how evaluations draw their responses, in words.
    """
    cards = []
    if s["accuracy_last"] is not None:
        first, last = s["accuracy_first"], s["accuracy_last"]
        note = ", ".join(filter(None, [f"{100 * (last - first):+.1f} points", drawn_as]))
        ends = [column(records, f"eval/accuracy_{end}") for end in ("low", "high")]
        if all(ends):
            low, high = (percent(end[-1][1]).removesuffix(" %") for end in ends)
            note += f"; 95 % interval {low} – {high}"
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
    if throughput := [rate for _, rate in charts.tokens_per_second(records)]:
        middle, ranks = median(throughput), kept.sessions[-1]["ranks"] if kept.sessions else None
        note = "prompts and responses, median of steps"
        if ranks:
            note = f"{number(middle / ranks)} per device of {ranks}; median of steps"
        if s["tokens_per_gpu"] is not None:
            note = f"{number(s['tokens_per_gpu'])} per device; median of steps"
        cards.append(Card("Tokens per second", number(middle), note))
    if s["mfu"] is not None:
        cards.append(Card("MFU", percent(s["mfu"]), "of the devices' peak; median of steps"))
    if kept.sessions:
        spent = sum(session["seconds"] for session in kept.sessions)
        cards.append(Card("Duration", seconds(spent), "start-up and evaluations included"))
    if s["gap"] is not None:
        cards.append(Card("Engine gap", number(s["gap"]), "mean |Δ log p| to the trainer"))
    return cards
