"""`python -m megatron_taopd.config.reference > docs/configuration.md`: the schema as a page."""

from __future__ import annotations

import sys
import types
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import MISSING

from megatron_taopd.config.schema import Config, types_of

INTRODUCTION = """# Configuration

A run is described by one YAML file with the sections below, and by `section.key=value` words on the
command line, which win. A relative input path in the file is relative to the file, one on the
command line to the working directory; `run.dir` and `data.cache_dir` are always relative to the
working directory. `~` is the home directory, `${oc.env:NAME}` an environment variable,
`${section.key}` another key. Keys that are *required* have no default.

This page is made of `megatron_taopd/config/schema.py`:
`python -m megatron_taopd.config.reference > docs/configuration.md`.
"""


def reference() -> str:
    """Return the whole page, Markdown: a table for every section."""
    return "\n".join([INTRODUCTION, *_tables(Config, "")])


def _tables(kind: type, prefix: str) -> list[str]:
    """Return the section's own keys first, then the sections within it."""
    hints = types_of(kind)
    own = [f for f in fields(kind) if not is_dataclass(hints[f.name])]
    lines: list[str] = []
    if own:
        lines += [f"## {prefix.rstrip('.')}", "", kind.__doc__ or "", ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [_row(f, hints[f.name], prefix) for f in own]
        lines += [""]
    for f in fields(kind):
        if is_dataclass(hints[f.name]):
            lines += _tables(hints[f.name], f"{prefix}{f.name}.")
    return lines


def _row(f: Field, hint: Any, prefix: str) -> str:
    doc, bounds = f.metadata["doc"], f.metadata["bounds"]
    meaning = f"{doc} *{str(bounds)[0].upper()}{str(bounds)[1:]}.*" if bounds else doc
    cells = (f"`{prefix}{f.name}`", _type(hint), _default(f), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _type(a) for a in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {_type(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "mapping"
    names = {int: "integer", float: "number", bool: "true, false", str: "text", Any: "text or list"}
    return names[hint]


def _default(f: Field) -> str:
    assert f.default is not NO_DEFAULT, f.name
    if f.default == MISSING:
        return "*required*"
    if f.default is None or isinstance(f.default, bool):
        return f"`{str(f.default).lower().replace('none', 'null')}`"
    if isinstance(f.default, tuple):
        return f"`{list(f.default)}`"
    return "`{}`".format(str(f.default).replace("\n", "\\n"))


if __name__ == "__main__":
    sys.stdout.write(reference())
