"""Every key of the schema is run at a value other than its default, and names the test that does.

A new key fails here until `keys.KEYS` has it.
"""

from __future__ import annotations

import ast
import re
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import omegaconf
import pytest
from omegaconf import OmegaConf
from support import keys
from support.keys import ANY, KEYS
from support.observed import SMALL, TINY

from megatron_taopd.config import Config
from megatron_taopd.step.loss import LOSSES
from megatron_taopd.step.selection import SELECTORS

TESTS = Path(__file__).parent


def schema(section: type = Config, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """(type, default) of every key; MISSING where there is none."""
    found, types = {}, get_type_hints(section)
    for field in fields(section):
        key, kind = f"{prefix}{field.name}", types[field.name]
        if is_dataclass(kind):
            found |= schema(kind, f"{key}.")
            continue
        default = field.default
        assert default is not NO_DEFAULT, f"{key}: a default that is made anew each time"
        found[key] = kind, default
    return found


SCHEMA = schema()


def plain(thing) -> Any:
    """A list of any kind as a tuple."""
    return tuple(thing) if isinstance(thing, tuple | list | omegaconf.ListConfig) else thing


def parsed(key: str, text: str) -> Any:
    """The value that a command line with it would give, of the key's type."""
    given = OmegaConf.from_dotlist([f"{key}={text}"])
    return plain(OmegaConf.select(OmegaConf.merge(OmegaConf.structured(Config), given), key))


@cache
def sources(module: str) -> dict[str, str]:
    """The source of each test, its decorators included."""
    text = (TESTS / module).read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return found


@pytest.mark.parametrize("key", SCHEMA)
def test_a_key_has_a_value_and_a_test(key):
    assert key in KEYS, (
        f"{key}: say in tests/support/keys.py at which value it is run, and by which test"
    )
    _, default = SCHEMA[key]
    for text, test in KEYS[key].items():
        if text == ANY:
            assert default in (None, omegaconf.MISSING, ()), f"{key}: could be {default!r} again"
        else:
            assert parsed(key, text) not in (None, plain(default)), f"{key}: {text} is its default"
        module, _, name = test.partition("::")
        assert name in sources(module), f"{key}: there is no {test}"
        source = sources(module)[name]
        if module.startswith("test_keys_"):  # which takes its overrides from the table
            (constant,) = [name for name, named in vars(keys).items() if named == test]
            assert f"given({constant}" in squeezed(module), f"{test} is not given {key}"
        else:
            assert any(form in source for form in forms(key, text)), (
                f"{key}: {test} does not name it with the value {text}"
            )


def forms(key: str, text: str) -> list[str]:
    """How a test's own text may have it."""
    section, _, leaf = key.rpartition(".")
    if text == ANY:
        return [f"{key}="]
    return [f"{key}={text}", f"{section}={{{leaf}: {text}", f"{section}={{tp: 1, {leaf}: {text}"]


@cache
def squeezed(module: str) -> str:
    return re.sub(r"\s", "", (TESTS / module).read_text())


def test_no_other_key_is_listed():
    assert KEYS.keys() <= SCHEMA.keys()


def choices() -> list[tuple[str, str]]:
    """Every value but the default of the keys that have a few names for values."""
    found = []
    for key, (kind, default) in SCHEMA.items():
        known = get_args(kind) if get_origin(kind) is Literal else ()
        found += [(key, name) for name in known if name != default]
        if kind is bool:
            found.append((key, str(not default).lower()))
    return found


def test_the_schema_names_every_selector_and_loss():
    assert get_args(SCHEMA["selection.selector"][0]) == tuple(SELECTORS)
    assert get_args(SCHEMA["loss.kind"][0]) == LOSSES


@pytest.mark.parametrize(("key", "name"), choices())
def test_every_name_for_a_value_is_run(key, name):
    assert name in KEYS[key], f"{key}: {name} is run by no test"


def test_a_small_run_leaves_the_listed_values_to_the_tests():
    """A value that got lost would else be there all the same. Two can be only one thing or the
    other; their tests undo them."""
    only = ("checkpoint.export_hf", "log.tensorboard")
    written = OmegaConf.merge(OmegaConf.load(TINY), OmegaConf.from_dotlist([*SMALL]))
    for key, values in KEYS.items():
        small = OmegaConf.select(written, key)
        for text in values:
            if text != ANY and small is not None and key not in only:
                assert parsed(key, text) != plain(small), f"{key}: {text} is what SMALL has, too"
