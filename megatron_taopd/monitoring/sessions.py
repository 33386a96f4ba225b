"""What a run ran on, each time that it was started: machine, versions, how long."""

from __future__ import annotations

import json
import os
import platform as machine
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_taopd.formats.files import file_written_aside

PACKAGES = ("megatron-taopd", "torch", "megatron-core", "transformers", "sglang")


class Sessions:
    """The starts of a run, the present one last, in sessions.json.

    Attributes:
        entries: of each start `began` (UTC), `first_step`, `ranks`, `hosts`, `device`, `versions`,
            and `seconds`, that it has lasted so far.
    """

    def __init__(self, path: Path, first_step: int):
        self.path, self._began = path, time.monotonic()
        self.entries: list[dict[str, Any]] = []
        with suppress(OSError, ValueError):  # none yet, or what another program has left there
            self.entries = json.loads(path.read_text(encoding="utf-8"))
        self.entries.append({**about(), "first_step": first_step, "seconds": 0.0})

    def write(self) -> None:
        """Bring the file up to date. Raises ValueError if there is no space."""
        self.entries[-1]["seconds"] = round(time.monotonic() - self._began, 1)
        with file_written_aside(self.path) as aside:
            aside.write_text(json.dumps(self.entries, indent=1) + "\n", encoding="utf-8")


def about() -> dict[str, Any]:
    """Describe this process's job: its ranks, its device, the versions of what it runs."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "ranks": ranks,
        "hosts": max(1, ranks // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))),
        "device": device(),
        "versions": versions(),
    }


def device() -> str:
    """Name the device of a rank."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    name = machine.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"CPU ({name}, {os.cpu_count()} cores)"


def versions() -> dict[str, str]:
    """Return the versions of Python and of those of PACKAGES that are installed."""
    found = {"Python": machine.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
