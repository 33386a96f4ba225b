"""Single steps under a profiler: `train.profile`.

Each span of the loop is a `torch.profiler.record_function` (`Monitor.span`), which all three kinds
show under its name: torch's trace as a bar, Nsight Systems as an NVTX range, the memory snapshot as
an annotation between allocations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd.profiler import emit_nvtx
from torch.profiler import ProfilerActivity

from megatron_taopd.config.schema import ProfileSection
from megatron_taopd.formats.files import file_written_aside
from megatron_taopd.parallel import watchdog
from megatron_taopd.parallel.compat.torch_internals import memory_history

logger = logging.getLogger(__name__)


class StepProfiler:
    """Profiles the steps that a configuration names, on the ranks that it names.

    Args:
        directory: where `step_N_rank_R.…` is written; made when there is something to write.
    """

    def __init__(self, section: ProfileSection, directory: Path, rank: int):
        self.section, self.directory, self.rank = section, directory, rank

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Profile a step if it is one of those; of a step that raises, nothing is written."""
        section = self.section
        if step not in section.steps or self.rank not in section.ranks:
            yield
            return
        if section.kind == "nsys":
            # What is behind `nsys profile --capture-range=cudaProfilerApi` writes its own file.
            with torch.cuda.profiler.profile(), emit_nvtx():
                yield
        elif section.kind == "memory":
            with memory_history() as dump:
                yield
                self._write(step, "pickle", dump)
        else:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            with torch.profiler.profile(activities=activities) as profiler:
                yield
            self._write(step, "json", profiler.export_chrome_trace)

    def _write(self, step: int, suffix: str, write: Callable[[str], None]) -> None:
        """Write a step's file; a run does not end because it cannot be written."""
        out = self.directory / f"step_{step}_rank_{self.rank}.{suffix}"
        try:
            with watchdog.file_io(), file_written_aside(out) as aside:
                write(str(aside))
        except ValueError as error:  # which names the file
            logger.warning(f"train.profile: {error}")
        else:
            logger.info(f"profile of step {step}: {out}")
