"""Which module of the package may import which: the layers of CONTRIBUTING.md, and no circle.

The modules are read, not imported. Imports inside functions count like those at the top; those
under `if TYPE_CHECKING:` do not.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "megatron_taopd"
CPU_STUBS = ROOT / PACKAGE / "serving" / "cpu_stubs"  # modules of other packages, on another path
CORE = ("models", "parallel", "formats", "step")
RUN = ("config.load", "build", "run", "cli")  # what the core may not know
GROUND = ("types", "config.schema")


@cache
def modules() -> dict[str, Path]:
    """Return the package's modules by their names below it; "" is the package itself."""
    files = [f for f in (ROOT / PACKAGE).rglob("*.py") if CPU_STUBS not in f.parents]
    return {
        ".".join(f.relative_to(ROOT / PACKAGE).with_suffix("").parts)
        .removesuffix("__init__")
        .rstrip("."): f
        for f in files
    }


@cache
def imports() -> dict[str, set[str]]:
    """Return the modules of the package that each of its modules imports."""
    return {name: set(imported(path.read_text())) - {name} for name, path in modules().items()}


def imported(source: str) -> Iterator[str]:
    """Yield the modules of the package that a source imports, by their names below the package."""
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import: {ast.unparse(node)}"
            # Of `from package import name`, `name` may be a module, or something in the package.
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [n if below(n) in modules() else str(node.module) for n in named]
        else:
            continue
        yield from (below(n) for n in found if n.split(".")[0] == PACKAGE)


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield every node that is not for the type checker alone."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from nodes(ast.Module(child.orelse, []))
        else:
            yield child
            yield from nodes(child)


def below(name: str) -> str:
    return name.removeprefix(PACKAGE).lstrip(".")


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


@cache
def layers() -> list[tuple[str, ...]]:
    """Return the layers that CONTRIBUTING.md lists, from the ground up."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    [block] = re.findall(r"^## Who may import whom\n.*?^```text\n(.*?)^```", text, re.M | re.S)
    return [tuple(line.split("  ")[0].split(" · ")) for line in reversed(block.splitlines())]


def layer(name: str) -> int:
    """Return the layer of a module: that of the longest name in the list that it lies in."""
    if not name:  # the package itself: it offers what is below, and nothing imports it
        return len(layers())
    found = [
        (len(place), i)
        for i, places in enumerate(layers())
        for place in places
        if within(name, (place,))
    ]
    assert found, f"{name}: in no layer of CONTRIBUTING.md"
    return max(found)[1]


def test_what_counts_as_an_import():
    source = """
        import megatron_taopd.types, torch
        from megatron_taopd import build, say
        from megatron_taopd.config import load
        from megatron_taopd.config.schema import Config
        if TYPE_CHECKING:
            from megatron_taopd.loop import Run
        else:
            from megatron_taopd.parallel import layout
        def f():
            from megatron_taopd.models import gpt
    """
    found = set(imported("if True:\n" + source))
    expected = {"types", "build", "", "config.load", "config.schema", "parallel.layout"}
    assert found == expected | {"models.gpt"}


def test_there_is_no_circle():
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_nothing_of_a_higher_layer(name):
    higher = sorted(other for other in imports()[name] if layer(other) > layer(name))
    assert not higher, f"{name or PACKAGE} imports {', '.join(higher)}"


def test_the_core_knows_nothing_of_a_run():
    known = {
        name: found
        for name in modules()
        if within(name, CORE) and (found := {o for o in imports()[name] if within(o, RUN)})
    }
    assert not known


def test_the_ground_imports_nothing_of_the_package_but_itself():
    for name in GROUND:
        assert imports()[name] <= set(GROUND)


def test_every_place_of_the_map_exists():
    """A folder or module that is no more is no longer listed."""
    for place in (place for places in layers() for place in places):
        assert any(within(name, (place,)) for name in modules()), place
