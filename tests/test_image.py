"""The image's recipe, as far as it can be read: no registry of images is at hand to build it."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parent.parent


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each instruction of the Dockerfile, over all its lines."""
    text = (ROOT / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def arguments(name: str) -> list[str]:
    return [rest for kind, rest in instructions() if kind == name]


def copied() -> list[tuple[list[str], str]]:
    """Sources and destination of each COPY from the repository."""
    parts = [shlex.split(rest) for rest in arguments("COPY")]
    return [(part[:-1], part[-1]) for part in parts if not part[0].startswith("--from")]


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a file through: the last pattern that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        whole = pattern.removeprefix("**/")
        parts = Path(path).parts
        candidates = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        candidates += parts if pattern.startswith("**/") else []
        if any(fnmatch(candidate, whole) for candidate in candidates):
            sent = line.startswith("!")
    return sent


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # an unpacked archive
        pytest.skip("not a git repository")
    return listed.stdout.splitlines()


def test_every_source_is_in_the_repository_and_sent_to_the_builder():
    files = tracked()
    sources = [source for group, _ in copied() for source in group]
    assert "requirements/cuda.txt" in sources and "megatron_taopd" in sources
    for source in sources:
        inside = [f for f in files if f == source or f.startswith(f"{source}/")]
        assert inside, source
        assert all(map(is_sent, inside)), source


def test_nothing_else_is_sent():
    sources = tuple(source for group, _ in copied() for source in group)
    sent = [f for f in tracked() if is_sent(f)]
    assert [f for f in sent if not f.startswith(sources)] == []
    assert not is_sent("megatron_taopd/__pycache__/run.pyc") and not is_sent("runs/x/config.yaml")
    assert not is_sent(".git/config") and not is_sent("constraints.txt")


def test_the_requirements_that_it_installs_are_those_that_it_copies():
    ((_, at),) = [copy for copy in copied() if copy[0] == ["requirements/cuda.txt"]]
    installed = re.findall(r"pip install .*?--requirement (\S+)", " ".join(arguments("RUN")))
    assert installed == [at]


def test_its_cuda_is_that_of_the_wheels():
    (cuda,) = [a.partition("=")[2] for a in arguments("ARG") if a.startswith("CUDA=")]
    assert re.fullmatch(r"\d+\.\d+\.\d+-cudnn-devel-ubuntu24\.04", cuda)  # Python 3.12, pinned
    requirements = (ROOT / "requirements" / "cuda.txt").read_text()
    (wheels,) = re.findall(r"^nvidia-cuda-runtime==(\d+\.\d+)", requirements, re.MULTILINE)
    assert cuda.startswith(f"{wheels}.")
    said = (ROOT / "docs" / "install.md").read_text()
    assert f"| CUDA toolkit | {wheels}," in said and f"the least for CUDA {wheels} |" in said
    assert [a.split()[0] for a in arguments("FROM")] == ["nvidia/cuda:${CUDA}"] * 2


def test_it_is_nobodys_root_and_runs_what_it_is_told():
    order = [kind for kind, _ in instructions()]
    (user,) = arguments("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)  # a number, as runAsNonRoot asks
    assert order.index("USER") > max(i for i, kind in enumerate(order) if kind in ("RUN", "COPY"))
    assert arguments("ENTRYPOINT") == [] and arguments("CMD") == ['["taopd", "--help"]']


def test_it_loads_nothing_by_hand():
    text = " ".join(arguments("RUN"))
    assert not re.search(r"curl|wget|git clone|https?:|--(extra-)?index", text)
    assert arguments("ADD") == []


def test_transformer_engine_is_the_extras():
    with mock.patch("setuptools.setup"):
        (te,) = runpy.run_path(str(ROOT / "setup.py"))["EXTRAS"]["te"]
    assert f"'{te}'" in " ".join(arguments("RUN"))


@pytest.mark.slow
def test_the_package_installs_from_what_is_copied(tmp_path):
    """All of the package's files, data and templates among them, and the command."""
    build, target = tmp_path / "build", tmp_path / "target"
    build.mkdir()
    for sources, to in copied():
        if "setup.py" in sources or to == "megatron_taopd":
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, build / source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", target, build], check=True)
    assert (target / "bin" / "taopd").exists()
    missing = [
        f for f in tracked() if f.startswith("megatron_taopd/") and not (target / f).exists()
    ]
    assert missing == []
