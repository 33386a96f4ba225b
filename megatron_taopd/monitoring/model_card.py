"""The model card of an exported student: the README.md that the Hugging Face hub shows."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from megatron_taopd.config.schema import Config, TeacherSection
from megatron_taopd.data.sources import sources_of
from megatron_taopd.evaluation.in_loop import grader_name
from megatron_taopd.formats.hf import CARD
from megatron_taopd.formats.hub import is_model
from megatron_taopd.monitoring.numbers import number, percent
from megatron_taopd.monitoring.summary import summarize

_TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
# What the student inherits from the model that it was, where that has a card.
_INHERITED = ("license", "license_name", "license_link", "language")
# A name in the hub's cache, models--OWNER--NAME/snapshots/…, and the address of a data set.
_CACHED = re.compile(r".*/(?:models|datasets)--(.+?)--([^/]+)/.*")
_DATA = re.compile(r"hf://datasets/([\w.-]+)/([\w.-]+).*")
# The label of each figure, the hub's type of metric, how it is written.
_FIGURES: dict[str, tuple[str, str | None, Callable[[float], str]]] = {
    "eval/accuracy": ("accuracy", "accuracy", percent),
    "eval/accuracy_low": ("accuracy, lower end of 95 %", None, percent),
    "eval/accuracy_high": ("accuracy, upper end of 95 %", None, percent),
    "eval/truncated_share": ("responses cut off", None, percent),
    "eval/response_length_mean": ("tokens per response", None, number),
}


def model_card(
    config: Config, records: Sequence[Mapping[str, Any]], step: int, num_prompts: int
) -> str:
    """Write the card of the student after a step, in Markdown with YAML front matter.

    It has no paths: models and files are called by their names on the hub where they lie in its
    cache, and by the last part of their path otherwise.

    Args:
        records: of the run's steps, as metrics.jsonl has them; those after `step` are left out.
        num_prompts: that the run trains on.
    """
    records = [record for record in records if record["step"] <= step]
    before, now = (_evaluation(records, at) for at in (0, step))
    name = config.run.name or Path(config.run.dir).name
    student = hub_name(config.student.path)
    held_out = ", ".join(_data_names(config.eval.prompts)) if config.eval.prompts else None
    data_sets = [name for name in _data_names(config.data.prompts) if "/" in name]
    data = ModelCardData(
        base_model=student,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["on-policy-distillation", "knowledge-distillation", "ta-opd"],
        base_model_relation="finetune",
        datasets=data_sets or None,
        model_name=name,
        eval_results=_eval_results(now, held_out) or None,
        **_inherited(config.student.path),
    )
    card = ModelCard.from_template(
        data,
        str(_TEMPLATE),
        name=name,
        student=student,
        teacher=teachers_of(config),
        step=step,
        steps=config.train.steps,
        held_out=held_out,
        evaluation=[
            (label, shown(before[key]) if key in before else "–", shown(now[key]))
            for key, (label, _, shown) in _figures(now).items()
        ],
        drawn=_drawn(config),
        unmeasured=f"Not evaluated after step {step}." if held_out else "Not evaluated.",
        training=_training(config, records, num_prompts),
        chats=_chats(Path(config.student.path)),
        longest=config.eval.max_new_tokens or config.rollout.max_new_tokens,
        versions=_versions(config),
    )
    return card.content


def _teacher(section: TeacherSection) -> str:
    """Name the teacher, or say which of the student's own weights it has."""
    if section.source == "student":
        return "its own weights before training"
    if section.source == "student_ema":
        return f"a moving average of its own weights ({section.ema:g} stays at each update)"
    return hub_name(section.path)


def hub_name(path: str) -> str:
    """Name a model or a data set as the hub does, OWNER/NAME, if it comes from there.

    Anything else is called by the last part of its path.
    """
    if is_model(path):
        return path.partition("@")[0]
    if found := _CACHED.fullmatch(path) or _DATA.fullmatch(path):
        return "/".join(found.groups())
    return Path(path).name


def _data_names(prompts: Any) -> list[str]:
    """Return the names of prompt files, each once."""
    paths = [path for source in sources_of(prompts) for path in source.paths]
    return list(dict.fromkeys(map(hub_name, paths)))


def _evaluation(records: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """Return what was measured on held-out prompts after exactly this step."""
    return {
        key: value
        for record in records
        if record["step"] == step
        for key, value in record.items()
        if key.startswith("eval/") and value is not None
    }


def _figures(evaluation: Mapping[str, float]) -> dict[str, tuple]:
    """Return the label, the metric's type and the way to write each figure that was measured."""
    at = {
        key: (f"pass@{key.removeprefix('eval/pass_at_')}", "pass@k", percent)
        for key in evaluation
        if key.startswith("eval/pass_at_")
    }
    return {key: figure for key, figure in (_FIGURES | at).items() if key in evaluation}


def _eval_results(evaluation: Mapping[str, float], held_out: str | None) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(held_out),
            dataset_name=str(held_out),
            metric_type=kind,
            metric_name=label,
            metric_value=evaluation[key],
        )
        for key, (label, kind, _) in _figures(evaluation).items()
        if kind
    ]


def _drawn(config: Config) -> str:
    section = config.eval
    how = f"At temperature {section.temperature:g}" if section.temperature else "Greedy"
    which = f"the first {section.limit:,} problems" if section.limit else "all problems"
    return f"{how}, {section.samples} × {which}, grader `{grader_name(section.grader)}`."


def teachers_of(config: Config) -> str:
    """Name the teacher, or all of them."""
    return ", ".join(map(_teacher, config.each_teacher.values()))


def _training(
    config: Config, records: Sequence[Mapping[str, Any]], num_prompts: int
) -> list[tuple[str, str]]:
    """Return what the student learned from, and how."""
    rollout, selection, train = config.rollout, config.selection, config.train
    total = summarize(records)
    budget = f"{percent(selection.ratio)} of the positions"
    if total["kept_rows"] is not None and total["valid_rows"]:
        budget += f": the loss fell on {total['kept_rows']:,} of {total['valid_rows']:,}"
    return [
        ("teacher", teachers_of(config)),
        ("student before", hub_name(config.student.path)),
        ("data", f"{', '.join(_data_names(config.data.prompts))}, {num_prompts:,} prompts"),
        ("steps", f"{total['steps']:,} of {train.steps:,}"),
        (
            "rollouts per step",
            f"{rollout.prompts:,} prompts × {rollout.samples}, at most {rollout.max_new_tokens:,} "
            f"tokens, temperature {rollout.temperature:g}",
        ),
        ("selector", f"{selection.selector}, k = {selection.k}"),
        ("budget", budget),
        ("loss", config.loss.kind),
        ("learning rate", f"{config.optimizer.lr:g}, {config.optimizer.decay}"),
        ("precision", train.precision),
        ("seed", str(config.run.seed)),
    ]


def _versions(config: Config) -> list[tuple[str, str]]:
    packages = ["megatron-taopd", "megatron-core", "torch", "transformers"]
    if config.served:
        packages.append("sglang")
    found = [("Python", platform.python_version())]
    for package in packages:
        with suppress(metadata.PackageNotFoundError):  # SGLang, where others run the servers
            found.append((package, metadata.version(package)))
    return found


def _chats(directory: Path) -> bool:
    """Tell whether the tokenizer of this directory has a chat template."""
    if (directory / "chat_template.jinja").is_file():
        return True
    config = directory / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_text()).get("chat_template"))


def _inherited(directory: str) -> dict[str, Any]:
    """Return the licence and languages of the model in this directory, as its own card has them."""
    try:
        data = ModelCard.load(Path(directory) / CARD, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # no card, or one that nobody can read: the run is not about that one
    return {key: value for key in _INHERITED if (value := getattr(data, key, None)) is not None}
