"""A configuration is read from a YAML file and dotted overrides, and written as YAML."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from megatron_taopd.config.schema import Config, TeacherSection, leaf_keys, types_of
from megatron_taopd.data.sources import with_paths
from megatron_taopd.formats.hub import is_model

logger = logging.getLogger(__name__)

# Old names of keys, which are accepted until version 0.2, and their new ones.
RENAMED = {
    "checkpoint.keep": "checkpoint.keep_last",
    "rollout.servers.attempts": "rollout.servers.max_retries",
    "rollout.sync.way": "rollout.sync.transport",
    "teacher.servers.attempts": "teacher.servers.max_retries",
    "watchdog.silent_s": "watchdog.heartbeat_timeout_s",
    "watchdog.stuck_s": "watchdog.stall_timeout_s",
}
_INPUT_PATHS = ("student.path", "teacher.path", "data.prompts", "eval.prompts")
_OUTPUT_PATHS = ("run.dir", "data.cache_dir")


def load(path: str | os.PathLike, overrides: Sequence[str] = (), tell: bool = True) -> Config:
    """Read a YAML file, then `section.key=value` overrides (YAML values); defaults fill the rest.

    A relative path is relative to where it is written: an input in the file to the file's
    directory, one on the command line to the working directory. `run.dir` and `data.cache_dir` are
    outputs and always relative to the working directory. `~` is the home directory,
    `${oc.env:NAME}` an environment variable, `${section.key}` another key. A key under its old name
    (`RENAMED`) is accepted, with a warning from rank 0.

    Args:
        tell: give these warnings; one of several readers does.

    Raises:
        ValueError: no such file, not YAML, an unknown key, a value of the wrong type, a required
            key without a value, a key under both its old and its new name.
    """
    written, given = (
        _under_new_names(tree, tell)
        for tree in (_read_yaml(Path(path)), _read_overrides(overrides))
    )
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.merge(written, given))
    except TypeError:
        raise ValueError(
            f"{' '.join(overrides)}: a list for what is a mapping in {path}; write {{…}} there"
        ) from None
    _check_keys(tree, Config)
    _share_keys_of_teachers(tree)
    students = _teachers_that_are_the_student(tree)
    try:
        values: Any = OmegaConf.to_container(
            OmegaConf.merge(_schema(), tree), resolve=True, throw_on_missing=True
        )
        inputs = [*_INPUT_PATHS, *(f"teachers.{name}.path" for name in values["teachers"] or ())]
        for key in (*_OUTPUT_PATHS, *inputs):
            *sections, name = key.split(".")
            section = reduce(getitem, sections, values)
            in_file = key in inputs and OmegaConf.select(given, key) is None
            if value := section[name]:
                base = Path(path).parent if in_file else Path()
                section[name] = _absolute(key, value, base)
        for key in students:  # wherever that is written
            reduce(getitem, key.split("."), values)["path"] = values["student"]["path"]
        config: Any = OmegaConf.to_object(OmegaConf.merge(_schema(), values))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        if OmegaConf.is_missing(error.parent_node, error.key):
            reason = "required; set it in the file or on the command line"
        elif isinstance(error, InterpolationResolutionError | InterpolationKeyError):
            reason += "; set it, or write the value itself"
        raise ValueError(f"{error.full_key}: {reason}") from None
    return config


@functools.cache
def _schema() -> Any:
    """Return the defaults of all keys and the types of their values; a merge leaves them alone."""
    return OmegaConf.structured(Config)


def _absolute(key: str, value: Any, base: Path) -> Any:
    """Make a path absolute, or those of a list of prompts; a model's name on the hub stays."""
    if key.endswith(".path") and is_model(value) and not (base / value).exists():
        return value
    try:
        return with_paths(value, lambda path: os.path.abspath(base / Path(path).expanduser()))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def with_new_names(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Rename the keys of a configuration that are under an old name (`RENAMED`).

    Args:
        tree: nested plain dicts, as much of a configuration as was given; it stays as it is.

    Returns:
        A copy under the new names, and one line for each key that was renamed.

    Raises:
        ValueError: a key is given under both names; a value that cannot be converted.
    """
    renamed, lines = deepcopy(dict(tree)), []
    for old, new in RENAMED.items():
        *sections, old_name = old.split(".")
        section: Any = renamed
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict) or old_name not in section:
            continue
        new_name, value = new.rpartition(".")[2], section.pop(old_name)
        if new_name in section:
            raise ValueError(
                f"{old}: {value} is given, and {new}: {section[new_name]} too, which is its new "
                f"name; remove {old}"
            )
        section[new_name] = _retries(old, value) if old_name == "attempts" else value
        lines.append(
            f"{old}: {value} is accepted until version 0.2 only; write {new}: {section[new_name]}"
        )
    return renamed, lines


def _retries(key: str, attempts: Any) -> Any:
    """Return the retries after a first attempt; an open value stays one."""
    if attempts == MISSING:
        return attempts
    if isinstance(attempts, int) and not isinstance(attempts, bool) and attempts >= 1:
        return attempts - 1
    raise ValueError(
        f"{key}: {attempts}; it has to be a whole number of at least 1, and is now called "
        f"{RENAMED[key]}, which is one less"
    )


def _under_new_names(given: Any, tell: bool) -> Any:
    plain: Any = OmegaConf.to_container(given)
    tree, lines = with_new_names(plain)
    if tell and int(os.environ.get("RANK", 0)) == 0:
        for line in lines:
            logger.warning(line)
    return OmegaConf.create(tree)


def to_yaml(config: Config) -> str:
    """Return the configuration as a YAML file that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_tree(config: Config) -> dict[str, Any]:
    """Return the configuration as nested plain dicts and lists."""
    tree: Any = OmegaConf.to_container(OmegaConf.structured(config))
    return tree


def _read_yaml(path: Path):
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a YAML configuration")
    try:
        written = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not YAML: {reason}; correct that place") from None
    if not OmegaConf.is_dict(written):
        raise ValueError(f"{path}: a list; sections such as student: and train: are expected")
    return written


def _read_overrides(overrides: Sequence[str]):
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"{override}: not an override; write section.key=value")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except yaml.YAMLError as error:
        message = f"{' '.join(overrides)}: a value is not YAML: {' '.join(str(error).split())}"
        raise ValueError(message) from None


def _share_keys_of_teachers(tree: dict) -> None:
    """Give each of several teachers the keys of `teacher` that it lacks, which then has no path.

    Raises:
        ValueError: `teacher.path` and `teachers` are both given.
    """
    if not (teachers := tree.get("teachers")):
        return
    shared = tree.setdefault("teacher", {})
    if path := shared.get("path"):
        names = ", ".join(teachers)
        raise ValueError(
            f"teacher.path: {path}, and teachers: {names} are given; a run has either one teacher "
            "or those of `teachers`"
        )
    shared["path"] = ""
    for name, section in teachers.items():
        own: Any = OmegaConf.to_container(OmegaConf.merge(shared, section))
        teachers[name] = own if own["path"] else {**own, "path": MISSING}


def _teachers_that_are_the_student(tree: dict) -> list[str]:
    """Give teachers that have the student's weights its path; return the keys of their sections."""
    several = tree.get("teachers") or {}
    sections = {f"teachers.{name}": section for name, section in several.items()}
    found = []
    for key, section in (sections or {"teacher": tree.get("teacher", {})}).items():
        own = section.get("source") in ("student", "student_ema")
        if own and section.get("path", MISSING) == MISSING:
            section["path"] = "${student.path}"
            found.append(key)
    return found


def _check_keys(tree: dict, section: type, prefix: str = "") -> None:
    types = types_of(section)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in types:
            raise ValueError(f"{key}: unknown key; {_suggestion(key, types, prefix)}")
        if is_dataclass(types[name]):
            if not isinstance(value, dict):
                inside = ", ".join(f"{key}.{f.name}" for f in fields(types[name]))
                raise ValueError(f"{key}: {value!r} is not a section; its keys are {inside}")
            _check_keys(value, types[name], f"{key}.")
        elif types[name] is Any:  # which others look at, `_absolute` and `values.py`
            kind = section.__dataclass_fields__[name].metadata["kind"]  # type: ignore[attr-defined]
            if kind and isinstance(value, list):
                raise ValueError(f"{key}: {value!r}; {kind} is expected")
        elif name == "teachers":
            _check_teachers(key, value)
        elif _takes_mapping(types[name]):
            if value is not None and not isinstance(value, dict):
                raise ValueError(
                    f"{key}: {value!r}; a mapping, such as {{name: value}}, is expected"
                )
        elif isinstance(value, dict):
            raise ValueError(f"{key}: {value!r} is a section; one value is expected")
        elif isinstance(value, list) != _takes_list(types[name]) and not _is_open(value):
            wanted = "one value is" if isinstance(value, list) else "a list, such as [1, 2], is"
            raise ValueError(f"{key}: {value!r}; {wanted} expected")
        elif isinstance(value, list):
            _check_items(key, value, types[name])
        elif value == MISSING:  # which a merge takes for "as it was"
            raise ValueError(f"{key}: ??? is left open; set it on the command line")


def _check_teachers(key: str, value: Any) -> None:
    """Refuse what is no mapping of names to sections of a teacher."""
    if value is None:
        return
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{key}: {value!r}; a mapping of names, such as {{math: {{path: …}}}}")
    for name, section in value.items():
        if not re.fullmatch(r"[A-Za-z][\w-]*", str(name)):
            raise ValueError(
                f"{key}: {name!r} is no name of a teacher; letters, digits, - and _ make one"
            )
        if not isinstance(section, dict):
            raise ValueError(f"{key}.{name}: {section!r} is not a section; give at least its path")
        _check_keys(section, TeacherSection, f"{key}.{name}.")


def _check_items(key: str, items: list, hint: Any) -> None:
    """Refuse an item of the wrong type, which OmegaConf does not name the key of."""
    whole = any(get_args(kind)[:1] == (int,) for kind in (hint, *get_args(hint)))
    for item in items:
        if _is_open(item) and item is not None:
            continue
        fits = (
            isinstance(item, int) and not isinstance(item, bool)
            if whole
            else (isinstance(item, str | int | float))
        )
        if not fits:
            kind = "whole numbers" if whole else "words"
            raise ValueError(f"{key}: {items!r}: {item!r} in a list of {kind}; it has to be one")


def _takes_list(hint: Any) -> bool:
    return any(get_origin(kind) is tuple for kind in (hint, *get_args(hint)))


def _takes_mapping(hint: Any) -> bool:
    return any(get_origin(kind) is dict for kind in (hint, *get_args(hint)))


def _is_open(value: Any) -> bool:
    """Tell whether what a value is will be seen later: null, or a reference to another one."""
    return value is None or (isinstance(value, str) and (value == MISSING or "${" in value))


def _suggestion(key: str, siblings: dict[str, Any], prefix: str) -> str:
    by_name: dict[str, list[str]] = {}
    for known, _, _ in leaf_keys():
        by_name.setdefault(known.rpartition(".")[2], []).append(known)
    name = key.removeprefix(prefix)
    if name in by_name:
        return f"did you mean {' or '.join(by_name[name])}?"
    if close := get_close_matches(name, siblings, n=1, cutoff=0.7):
        return f"did you mean {prefix}{close[0]}?"
    if close := get_close_matches(name, by_name, n=1, cutoff=0.7):
        return f"did you mean {' or '.join(by_name[close[0]])}?"
    return f"known here: {', '.join(prefix + sibling for sibling in siblings)}"
