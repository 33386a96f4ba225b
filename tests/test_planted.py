"""Every planted mistake can be planted: its text stands in its file, its test is there."""

import ast
from pathlib import Path

import pytest
import yaml

TESTS = Path(__file__).parent
ROOT = TESTS.parent
AREAS = {
    file.stem: yaml.safe_load(file.read_text())
    for file in sorted((TESTS / "faults" / "planted").glob("*.yaml"))
}


@pytest.mark.parametrize("area", AREAS)
def test_mistakes_stand_where_they_are_planted(area):
    wrong = []
    for mistake in AREAS[area]:
        path = ROOT / mistake["file"]
        found = path.read_text().count(mistake["old"]) if path.is_file() else 0
        if found != 1:
            wrong.append(f"{mistake['name']}: its text stands {found} times in {mistake['file']}")
        if mistake["old"] == mistake["new"]:
            wrong.append(f"{mistake['name']}: nothing is changed")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("area", AREAS)
def test_the_tests_that_are_to_notice_are_there(area):
    wrong = []
    for mistake in AREAS[area]:
        file, _, name = mistake["test"].partition("::")
        function = name.partition("[")[0]
        if not (ROOT / file).is_file():
            wrong.append(f"{mistake['name']}: there is no {file}")
        elif function and function not in functions(ROOT / file):
            wrong.append(f"{mistake['name']}: there is no {function} in {file}")
    assert not wrong, "\n".join(wrong)


def test_no_two_mistakes_have_one_name():
    names = [f"{area}: {mistake['name']}" for area in AREAS for mistake in AREAS[area]]
    assert sorted(set(names)) == sorted(names)


def functions(file: Path) -> set[str]:
    """Return the names of a file's test functions, without importing it."""
    tree = ast.parse(file.read_text())
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
