"""What a start must have in common with the one that it resumes, and whether it has.

A checkpoint holds, as `start`, the configuration that made it and what identifies the files that
this names. All else of a configuration may change from start to start, and counts from there on:
docs/reliability.md has a line for every key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from megatron_taopd.checkpoints import files as checkpoint_files
from megatron_taopd.config.load import with_new_names
from megatron_taopd.data.records import content_of
from megatron_taopd.data.sources import sources_of, written
from megatron_taopd.formats.hf import HFCheckpoint
from megatron_taopd.formats.megatron import SIDE_FILES

MOST_NAMED = 4  # differences of two config.json in one line
LONGEST = 60  # characters of a value there
_PROMPTS = "prompts and their order follow from it"
# Keys whose value has to stay, and why; those of `teacher` for each of several, too.
FIXED = {
    "run.seed": "rollouts and the order of the prompts follow from it",
    "student.moe.router": "the optimizer that is resumed has moments of routers or none",
    "data.shuffle": _PROMPTS,
    "data.limit": _PROMPTS,
    "data.prompt_column": _PROMPTS,
    "data.response_column": _PROMPTS,
    "data.template": _PROMPTS,
    "data.template_kwargs": _PROMPTS,
    "data.deduplicate": _PROMPTS,
    "data.system": _PROMPTS,
    "data.max_prompt_tokens": _PROMPTS,
    "data.teacher_column": _PROMPTS,
    "teacher.source": "a run has one teacher",
    "rollout.partial": "responses under way are kept with it, and begun again without",
    "teacher.prompt": _PROMPTS,
    "teacher.template_kwargs": _PROMPTS,
    "teacher.system": _PROMPTS,
    "teacher.context_column": _PROMPTS,
    "teacher.context_template": _PROMPTS,
    "teacher.context_overflow": _PROMPTS,
    "teacher.max_prompt_tokens": _PROMPTS,
}
# What keys were before they existed.
_ONCE = {"teacher.source": "path"}
# Keys whose files have to stay as they were, wherever they lie, and why.
FIXED_FILES = {
    "student.path": "the weights that are resumed are that one's",
    "teacher.path": "a run has one teacher",
    "data.prompts": "prompts would come twice or never",
}
# What transformers and people change in a config.json without changing the model.
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache")
_TOKENIZER = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt",
    "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "vocab.json", "vocab.txt", "*.tiktoken",
)  # fmt: skip


def start_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of the start that makes it: plain values.

    Args:
        config: the configuration as nested dicts; its files are there.

    Returns:
        config, as given; files: under the keys of FIXED_FILES, of each teacher's path and
        `eval.prompts`, if that is given, the path, and what identifies what is there.
    """
    files = {
        "student.path": model(config["student"]["path"]),
        "data.prompts": _prompts(config["data"]["prompts"]),
    }
    for key in teachers(config):
        teacher = value(config, key)
        no_weights = teacher["engine"] == "sglang" and teacher["form"] == "topk"
        files[f"{key}.path"] = model(teacher["path"], weights=not no_weights)
    if (held_out := config["eval"]["prompts"]) is not None:
        files["eval.prompts"] = _prompts(held_out)
    return {"config": config, "files": files}


def model(hf_dir: str | Path, weights: bool = True) -> dict[str, Any]:
    """What identifies a model: its config.json, its tokenizer's files, and its weights by a sample
    of their bytes (`HFCheckpoint.fingerprint`).
    """
    hf_dir = Path(hf_dir)
    config = json.loads((hf_dir / "config.json").read_text())
    tokenizer = hashlib.sha256()
    for file in sorted({f for pattern in _TOKENIZER for f in hf_dir.glob(pattern)}):
        tokenizer.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    parts = {
        "config.json": {k: v for k, v in config.items() if k not in _NOT_THE_MODEL},
        "tokenizer": f"SHA-256 {tokenizer.hexdigest()[:16]}…",
    }
    if weights:
        parts["weights"] = f"SHA-256 {HFCheckpoint(hf_dir).fingerprint()[:16]}…"
    return {"path": str(hf_dir), **parts}


def _prompts(prompts: Any) -> dict[str, Any]:
    """What identifies prompts: what is in their files, in this order, and the files' weights."""
    sources = sources_of(prompts)
    size, digest = content_of([file for source in sources for file in source.files()])
    parts: dict[str, Any] = {"content": f"{size:,} bytes, SHA-256 {digest[:16]}…"}
    if len(sources) > 1:
        parts["weights"] = " : ".join(str(source.weight) for source in sources)
    if any(source.teacher is not None for source in sources):
        parts["teachers"] = ", ".join(str(source.teacher) for source in sources)
    return {"path": written(prompts), **parts}


def kept_run(folder: Path) -> dict[str, Any]:
    """Return the state of the run that a checkpoint holds (`checkpoints.saving.Checkpoints.save`).

    The configuration of its start is under the new names of keys (`config.load.RENAMED`). {} if
    the file cannot be read, which is for the one who loads it to say. Nothing in it is executed.
    """
    try:
        run = torch.load(folder / "common.pt", weights_only=True)["run"]
        if "start" in run:
            run["start"]["config"], _ = with_new_names(run["start"]["config"])
    except Exception:  # whatever torch trips over in a file that may be damaged, or not ours
        return {}
    return run


def last_start(checkpoints: Path) -> dict[str, Any]:
    """What made the newest checkpoint that can be read; of one from before such things were kept,
    the student's config and tokenizer alone, which are beside it. {} if there is none.
    """
    for step in reversed(checkpoint_files.steps(checkpoints)):
        folder = checkpoint_files.path(checkpoints, step)
        if run := kept_run(folder):
            beside = folder / SIDE_FILES
            known = {"student.path": model(beside, weights=False)} if beside.is_dir() else {}
            return run.get("start", {"config": {}, "files": known})
    return {}


def refusals(
    before: Mapping[str, Any], now: Mapping[str, Any], run_dir: str | Path
) -> Iterator[tuple[str, str]]:
    """What of a start cannot go on from the one before, and what would be right.

    Args:
        before, now: as `start_of` gives them. What either does not know is not compared.
    """
    those, begun_with = teachers(now["config"]), teachers(before["config"])
    if those != begun_with and before["config"]:
        yield (
            f"teachers: {', '.join(those)}, and {', '.join(begun_with)} when {run_dir} was begun: "
            "a run has the teachers that it began with",
            f"give {', '.join(begun_with)}, or another run.dir",
        )
    for key, reason in _of_each(FIXED, those):
        old, new = (_fixed_value(start["config"], key) for start in (before, now))
        if old is not _UNKNOWN and old != new:
            yield (
                f"{key}: {_written(new)}, and {_written(old)} when {run_dir} was begun: {reason}",
                f"give {_written(old)}, or another run.dir",
            )
    for key, reason in _of_each(FIXED_FILES, those):
        old, new = (start["files"].get(key, {}) for start in (before, now))
        parts = [part for part in old if part != "path" and part in new]
        differing = next((part for part in parts if old[part] != new[part]), None)
        if differing:
            was = "as it was" if old["path"] == new["path"] else f"{old['path']}, which it was"
            yield (
                f"{key}: {new['path']} is not {was} when {run_dir} was begun ({differing} "
                f"{_difference(old[differing], new[differing])}): {reason}",
                f"give {old['path']} as it was, or another run.dir",
            )


def _difference(old: Any, new: Any) -> str:
    if not isinstance(old, Mapping):
        return f"{old} → {new}"
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    return ", ".join(
        f"{name} {_written(old.get(name))} → {_written(new.get(name))}"
        for name in names[:MOST_NAMED]
    ) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")


def teachers(config: Mapping[str, Any]) -> list[str]:
    """Return the keys of the teachers' sections (`Config.each_teacher`) of nested dicts."""
    several = config.get("teachers")
    names = several if isinstance(several, Mapping) else ()
    return [f"teachers.{name}" for name in names] or ["teacher"]


def _of_each(keys: Mapping[str, str], sections: list[str]) -> Iterator[tuple[str, str]]:
    """Yield keys and reasons, those of `teacher` for each of these sections."""
    for key, reason in keys.items():
        model, _, name = key.partition(".")
        for section in sections if model == "teacher" else [model]:
            yield f"{section}.{name}", reason


_UNKNOWN = object()


def value(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, or _UNKNOWN."""

    def inside(tree: Any, name: str) -> Any:
        return tree.get(name, _UNKNOWN) if isinstance(tree, Mapping) else _UNKNOWN

    return reduce(inside, key.split("."), config)


def _fixed_value(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key of FIXED, whether or not it existed when the configuration was read."""
    found = value(config, key)
    return _ONCE.get(key, _UNKNOWN) if found is _UNKNOWN else found


def _written(setting: Any) -> str:
    """As a person writes it in YAML, unless it is long."""
    text = json.dumps(setting, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def loss_level(start: Mapping[str, Any]) -> Any:
    """On what the size of the loss depends: one of another start says nothing if that differs."""
    return [start["config"].get(section) for section in ("loss", "selection")]


def evaluation(start: Mapping[str, Any]) -> Any:
    """On what the held-out accuracy depends, but for the student: only accuracies of one evaluation
    can be compared.
    """
    held_out, rollout = start["config"].get("eval", {}), start["config"].get("rollout", {})
    names = ("limit", "samples", "temperature", "grader")
    return [
        start["files"].get("eval.prompts", {}).get("content"),
        value(start["config"], "data.answer_column"),
        [held_out.get(name) for name in names],
        held_out.get("max_new_tokens") or rollout.get("max_new_tokens"),
        rollout.get("stop_token_ids"),
        [rollout.get(name) for name in ("top_p", "top_k")] if held_out.get("temperature") else None,
    ]
