"""The files of requirements agree with each other, with setup.py, and with what packages ask."""

from __future__ import annotations

import re
import runpy
import subprocess
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
# Whose builds for CUDA, or whose neighbours there, want other versions than the tried ones.
DECIDED_BY_CUDA = {"numpy", "protobuf"}
MACHINE = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}


def lines(name: str) -> list[str]:
    bare = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in bare if line]


def pins(name: str) -> dict[str, str]:
    """The version of each package that a file pins."""
    found = {}
    for requirement in map(Requirement, lines(name)):
        (pin,) = requirement.specifier
        assert pin.operator == "==" and "*" not in pin.version, requirement
        found[canonicalize_name(requirement.name)] = pin.version
    return found


def asked(requirements, extra: str = "", python: str = "3.11") -> list[Requirement]:
    """Those requirements that hold on a Linux machine, of an extra or of none."""
    environment = default_environment() | MACHINE | {"extra": extra}
    environment |= {"python_version": python, "python_full_version": f"{python}.9"}
    parsed = [Requirement(str(requirement)) for requirement in requirements]
    return [r for r in parsed if r.marker is None or r.marker.evaluate(environment)]


def unmet(requirements: list[Requirement], have: dict[str, str]) -> dict[str, str | None]:
    """Each requirement that a set of versions lacks or breaks, with the version that it has."""
    found = {}
    for requirement in requirements:
        version = have.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found[str(requirement)] = version
    return found


@pytest.fixture(scope="module")
def package() -> dict:
    """setup.py's own lists."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture(scope="module")
def cuda() -> dict[str, str]:
    return pins("requirements/cuda.txt")


def test_all_of_it_is_pinned_and_comes_from_no_place_in_particular(cuda):
    assert len(cuda) > 200
    text = (ROOT / "requirements" / "cuda.txt").read_text()
    assert not re.search(r"https?:|--(extra-)?index|--find-links| @ |^-e", text, re.MULTILINE)


@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("name", ["sglang", "megatron-core", "transformers", "torch"])
def test_cuda_has_what_the_large_packages_ask_for(cuda, name, python):
    assert cuda[name] == metadata.version(name).partition("+")[0]
    needed = asked(metadata.requires(name), python=python)
    assert len(needed) > 2
    if name == "sglang":
        assert sum(requirement.specifier != SpecifierSet() for requirement in needed) > 20
    assert unmet(needed, cuda) == {}


def test_cuda_has_what_each_package_asks_for_that_is_installed_here_in_the_same_version(cuda):
    seen, broken = 0, {}
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        if cuda.get(name) == distribution.version:
            seen += 1
            broken |= unmet(asked(distribution.requires or ()), cuda)
    assert seen > 50
    assert broken == {}


def test_cuda_has_what_this_package_asks_for(cuda, package):
    needed = list(package["REQUIRED"])
    for extra in ("sglang", "math", "plots", "prometheus", "wandb"):
        needed += package["EXTRAS"][extra]
        assert f"--extra {extra}" in (ROOT / "Makefile").read_text()
    assert unmet(asked(needed), cuda) == {}


def test_cuda_has_the_versions_that_were_tried(cuda):
    tried = pins("constraints.txt")
    both = cuda.keys() & tried.keys()
    assert len(both) > 90
    assert {name for name in both if cuda[name] != tried[name]} == DECIDED_BY_CUDA


def test_the_tried_versions_are_those_that_sglang_pins():
    tried = pins("constraints.txt")
    broken = unmet(asked(metadata.requires("sglang")), tried)
    assert {name: have for name, have in broken.items() if have is not None} == {}


def test_sglang_on_the_cpu_is_installed_in_versions_that_were_tried():
    tried = pins("constraints.txt")
    assert {canonicalize_name(name) for name in lines("requirements/sglang-cpu.txt")} <= set(tried)


def test_every_megatron_core_that_is_allowed_was_tried(package):
    """What tests/versions.sh saw last; the README and docs/install.md have its table."""
    _head, *rows = [line.split("\t") for line in lines("tests/versions.tsv")]
    versions = [version for version, *_ in rows]
    assert [version.rpartition(".")[0] for version in versions] == ["0.16", "0.17", "0.18", "0.19"]
    (bound,) = [r.specifier for r in asked(package["REQUIRED"]) if r.name == "megatron-core"]
    assert [*bound.filter(["0.15.3", *versions, "0.20.0"])] == versions
    pythons = SpecifierSet(re.search('python_requires="(.*)"', (ROOT / "setup.py").read_text())[1])
    assert pythons == SpecifierSet(">=3.11,<3.13")
    assert {python.rpartition(".")[0] for _, python, *_ in rows} == {"3.11", "3.12"}
    for _version, _python, torch, passed, failed, _skipped in rows:
        assert torch == pins("constraints.txt")["torch"] and int(passed) > 200 and failed == "0"
    table = subprocess.run(
        ["bash", "tests/versions.sh", "--table"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    for page in ("README.md", "docs/install.md"):
        assert table in (ROOT / page).read_text()


def test_transformer_engine_is_bounded_as_megatron_core_bounds_it(package):
    def bounds(requirements) -> set[tuple[str, str]]:
        (engine,) = [r for r in requirements if r.name == "transformer-engine"]
        # 2.9.0a0 admits pre-releases of 2.9, too, which nobody needs.
        return {(s.operator, s.version.removesuffix(".0a0")) for s in engine.specifier} | {
            ("extras", ",".join(sorted(engine.extras)))
        }

    theirs = bounds(asked(metadata.requires("megatron-core"), extra="dev"))
    ours = bounds(asked(package["EXTRAS"]["te"]))
    assert {(op, v.removesuffix(".0")) for op, v in theirs} == ours
