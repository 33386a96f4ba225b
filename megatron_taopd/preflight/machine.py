"""This host: versions, devices, limits, environment variables."""

from __future__ import annotations

import os
import platform as host_platform
import re
import resource
import subprocess
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_taopd.config.schema import ProfileSection, RolloutSection
from megatron_taopd.preflight.findings import Finding, error, ok, warning

DISTRIBUTION = "megatron-taopd"
OPEN_FILES = 4096  # that a rank with its sockets, or a client of many servers, may come to
BUSY_GPU = 0.05  # share of a device's memory; contexts of this run's own processes stay below
# Set to this, they take something away that a run wants.
HARMFUL = {
    "CUDA_LAUNCH_BLOCKING": ("1", "every kernel is waited for"),
    "NCCL_P2P_DISABLE": ("1", "GPUs do not use NVLink or PCIe between them"),
    "NCCL_IB_DISABLE": ("1", "hosts do not use InfiniBand or RoCE"),
    "NCCL_SHM_DISABLE": ("1", "ranks of a host do not use its shared memory"),
}
_LISTED = re.compile(
    r"(NCCL|GLOO|SGLANG)_.*|OMP_NUM_THREADS|TOKENIZERS_PARALLELISM|"
    r"CUDA_(DEVICE_MAX_CONNECTIONS|VISIBLE_DEVICES)|PYTORCH_(CUDA_)?ALLOC_CONF"
)


def check_profile(section: ProfileSection) -> Iterator[Finding]:
    """Refuse a profile of CUDA where there is none."""
    if section.steps and section.kind != "torch" and not torch.cuda.is_available():
        yield error(
            f"train.profile.kind: {section.kind} needs CUDA, which this machine has not",
            "take torch, or leave train.profile.steps empty",
        )


def check_speculative(section: RolloutSection) -> Iterator[Finding]:
    """Refuse drafts where SGLang cannot verify them by sampling."""
    if section.speculative is not None and not torch.cuda.is_available():
        yield error(
            f"rollout.speculative: {section.speculative} needs CUDA, which this machine has not: "
            "on the CPU SGLang accepts the likeliest tokens only, whatever the temperature, and by "
            "compiled kernels that are not installed here",
            "leave it out",
        )


# ------------------------------------------------------------------------------------- versions


def versions() -> dict[str, str]:
    """Return the versions that have to be the same on every host of a run."""
    found = {"python": host_platform.python_version()}
    for name in (DISTRIBUTION, "torch", "megatron-core", "transformers", "sglang"):
        found[name] = installed(name) or "none"
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def driver() -> str:
    """Return the GPUs' driver as nvidia-smi names it; a call of it takes up to seconds."""
    return ", ".join(sorted({gpu["driver_version"] for gpu in gpus()})) or "none"


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def unmet(distribution: str, extra: str = "") -> list[tuple[Requirement, str | None]]:
    """List the unmet requirements of an installed distribution, with the version there instead."""
    found = []
    for line in metadata.requires(distribution) or ():
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        version = installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append((requirement, version))
    return found


def check_versions(sglang: bool) -> Iterator[Finding]:
    """Compare installed packages with what this one, and SGLang if it is to run, ask for."""
    if installed(DISTRIBUTION) is None:
        yield warning(
            f"{DISTRIBUTION}: not installed, so that its requirements are unknown",
            "pip install --editable . --no-deps",
        )
        return
    wanted_python = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    if not SpecifierSet(wanted_python).contains(host_platform.python_version(), prereleases=True):
        yield error(f"python: {host_platform.python_version()}", f"{wanted_python} is needed")
    yield ok(", ".join(f"{name} {version}" for name, version in versions().items()))
    for requirement, version in unmet(DISTRIBUTION, "sglang" if sglang else ""):
        remedy = f"pip install '{requirement.name}{requirement.specifier}'"
        if version is None:
            yield error(f"{requirement.name}: not installed", remedy)
        else:
            yield warning(
                f"{requirement.name}: {version}; setup.py has {requirement.specifier}, which was "
                "tried with the rest",
                remedy,
            )
    if sglang and installed("sglang"):
        yield from _check_sglang()


def _check_sglang() -> Iterator[Finding]:
    """Check what SGLang asks for itself. Without CUDA most of it has no build and is not needed."""
    cuda = torch.cuda.is_available()
    others = [
        f"{requirement.name} {version or 'missing'} ({requirement.specifier or 'any'})"
        for requirement, version in unmet("sglang")
        if cuda or requirement.name in ("torch", "transformers")
    ]
    if others:
        yield warning(
            f"sglang {installed('sglang')} asks for other versions: {', '.join(others)}",
            "pip install '.[sglang]' with CUDA, requirements/sglang-cpu.txt without",
        )


def check_kernels() -> Iterator[Finding]:
    """Check CUDA, and the libraries with kernels that are used where they are."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            yield ok("no CUDA: torch is a CPU build, ranks run on the CPU over gloo")
        else:
            yield warning(
                f"torch is built for CUDA {torch.version.cuda} and sees no GPU",
                "look at nvidia-smi and CUDA_VISIBLE_DEVICES; without a GPU ranks run on the CPU",
            )
        return
    yield ok(f"driver {driver()}")
    if find_spec("transformer_engine") is None:
        yield warning(
            "TransformerEngine: not installed; Megatron's plain layers run, without its fused "
            "norms, RoPE and grouped experts",
            "pip install --no-build-isolation '.[te]'",
        )
    if find_spec("amp_C") is None or find_spec("fused_weight_gradient_mlp_cuda") is None:
        yield warning(
            "Apex: not installed with its CUDA extensions; weight gradients are not fused into "
            "their accumulation, and clipping runs in more kernels",
            "build github.com/NVIDIA/apex with --cuda_ext (PyPI's apex is another project)",
        )


# -------------------------------------------------------------------------------------- devices


def gpus() -> list[dict[str, str]]:
    """Return what nvidia-smi says of each GPU of the machine; [] where there is no nvidia-smi."""
    fields = "index,uuid,driver_version,memory.total,memory.used"
    fields += ",ecc.errors.uncorrected.volatile.total"
    return parse_gpus(fields, _nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits"))


def parse_gpus(fields: str, text: str) -> list[dict[str, str]]:
    """Read the CSV of `nvidia-smi --query-gpu=FIELDS`: a GPU a line, by the names of the fields."""
    rows = (re.split(r",\s*", line.strip()) for line in text.splitlines() if line.strip())
    return [dict(zip(fields.split(","), row, strict=True)) for row in rows]


def links(topology: str) -> Counter[str]:
    """Count the pairs of GPUs by their link (NV18, PIX, …), from `nvidia-smi topo -m`."""
    rows = [line.split() for line in topology.splitlines() if re.match(r"GPU\d+\s", line)]
    rows = [row[1:] for row in rows if "X" in row]
    return Counter(row[j] for i, row in enumerate(rows) for j in range(i + 1, len(rows)))


def _nvidia_smi(*args: str) -> str:
    try:
        run = subprocess.run(["nvidia-smi", *args], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout if run.returncode == 0 else ""


def check_devices(local_ranks: int) -> Iterator[Finding]:
    """Check for a GPU for each rank of this host, free and sound; or enough cores."""
    memory = psutil.virtual_memory()
    seen = f"memory: {memory.total / 2**30:.0f} GiB"
    if memory.available < memory.total / 2:
        free = f"{seen}, of which {memory.available / 2**30:.0f} are available"
        yield warning(free, "end what else runs here, or plan for what is left")
    else:
        yield ok(seen)
    if not torch.cuda.is_available():
        yield from check_cores(local_ranks, len(os.sched_getaffinity(0)), torch.get_num_threads())
        return
    count = torch.cuda.device_count()
    names = Counter(torch.cuda.get_device_name(i) for i in range(count))
    yield ok(", ".join(f"{n} × {name}" for name, n in names.items()))
    if local_ranks > count:
        yield error(
            f"{local_ranks} ranks on this host for {count} GPUs: NCCL wants one for each",
            f"torchrun --nproc-per-node {count}, or look at CUDA_VISIBLE_DEVICES",
        )
    if count > 1:
        pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
        reached = sum(torch.cuda.can_device_access_peer(i, j) for i, j in pairs)
        kinds = ", ".join(f"{n} × {k}" for k, n in links(_nvidia_smi("topo", "-m")).items())
        seen = f"peer access: {reached} of {len(pairs)} pairs of GPUs ({kinds or 'links unknown'})"
        slow = "pairs without go through host memory; keep each TP group on linked GPUs"
        yield ok(seen) if reached == len(pairs) else warning(seen, slow)
    visible = {str(torch.cuda.get_device_properties(i).uuid) for i in range(count)}
    yield from check_gpus([gpu for gpu in gpus() if gpu["uuid"].removeprefix("GPU-") in visible])


def check_gpus(found: list[dict[str, str]]) -> Iterator[Finding]:
    """Check the rows of `gpus`: whose memory is taken, and which has lost bits."""
    for gpu in found:
        # MiB; where nvidia-smi does not know, it says so in words.
        numbers = [int(n) for n in (gpu["memory.total"], gpu["memory.used"]) if n.isdecimal()]
        if len(numbers) == 2 and numbers[1] > BUSY_GPU * numbers[0]:
            total, used = (n / 1024 for n in numbers)
            yield warning(
                f"GPU {gpu['index']}: {used:.1f} of {total:.1f} GiB are in use",
                "nvidia-smi shows by whom: end it, or leave the GPU out (CUDA_VISIBLE_DEVICES)",
            )
        if (errors := gpu["ecc.errors.uncorrected.volatile.total"]).isdecimal() and int(errors):
            yield error(
                f"GPU {gpu['index']}: {errors} uncorrected memory errors since its driver started",
                "reset or replace it",
            )


def check_cores(local_ranks: int, cores: int, threads: int) -> Iterator[Finding]:
    """Check for a core for each rank of this host, and for each of a rank's threads."""
    seen = f"{local_ranks} ranks × {threads} threads on {cores} cores"
    if local_ranks > cores:
        yield warning(seen, f"ranks wait for each other; start at most {cores}")
    elif local_ranks * threads > cores:
        yield warning(seen, f"OMP_NUM_THREADS={cores // local_ranks}")
    else:
        yield ok(seen)


# ----------------------------------------------------------------------- limits and environment


def check_limits() -> Iterator[Finding]:
    """Check the limit of open files; show and check the variables that matter."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        yield warning(
            f"open files: at most {soft} (ulimit -n; hard limit {hard})",
            f"ulimit -n {OPEN_FILES} or more, for the sockets of ranks and servers",
        )
    else:
        yield ok(f"open files: at most {soft}")
    present = {name: value for name, value in sorted(os.environ.items()) if _LISTED.fullmatch(name)}
    yield ok("environment: " + (", ".join(f"{k}={v}" for k, v in present.items()) or "none set"))
    for name, (value, cost) in HARMFUL.items():
        if os.environ.get(name) == value:
            yield warning(f"{name}={value}: {cost}", f"unset {name}")
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available() and connections != "1":
        yield warning(
            f"CUDA_DEVICE_MAX_CONNECTIONS={connections}",
            "1, or leave it unset: Megatron overlaps communication by the order of launches",
        )
