"""What the other items ran on, and whether the doctor would let a run start there."""

from __future__ import annotations

import os
import platform as python_platform
from importlib import metadata

import torch

from benchmarks.first_gpu.result import Result, Setting

PACKAGES = (
    "torch", "triton", "megatron-core", "transformers", "transformer-engine", "apex", "sglang",
    "liger-kernel", "trl",
)  # fmt: skip


def facts() -> dict[str, str | int]:
    """Say which device, driver and packages there are. Imports torch alone."""
    found: dict[str, str | int] = {"python": python_platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found |= {"device": "cpu", "gpus": 0, "name": f"{os.cpu_count()} cores"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": "cuda", "gpus": torch.cuda.device_count(), "name": properties.name,
            "memory, GiB": round(properties.total_memory / 2**30),
            "compute capability": f"{properties.major}.{properties.minor}",
            "CUDA": str(torch.version.cuda),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        }  # fmt: skip
    return found


def doctor(setting: Setting) -> Result:
    """Let `taopd doctor` examine a run of the tiny pair, models included."""
    # Other packages than torch, which `facts` does not wait for.
    from benchmarks.first_gpu.runs import ONE_RANK, TINY, precision
    from megatron_taopd import config as configuration
    from megatron_taopd.preflight.examine import examine

    result = Result()
    asked = [*ONE_RANK, f"run.dir={setting.scratch}/run", f"train.precision={precision()}"]
    if setting.small:
        asked += ["data.limit=50", "eval.limit=50"]
    levels = {"ok": 0, "warning": 0, "error": 0}
    for check, findings in examine(configuration.load(TINY, asked), ranks=1, quick=False):
        for finding in findings:
            levels[finding.level] += 1
            if finding.level != "ok":
                line = f"{check}, {finding.level}: {finding.what}; {finding.remedy}"
                result.notes.append(line.strip("; "))
    result.figures |= {"ok": levels["ok"], "warnings": levels["warning"]}
    result.most("errors", levels["error"], 0)
    return result
