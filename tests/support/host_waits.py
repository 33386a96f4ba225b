"""How often the host waits for the device, by phase and line."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import megatron_taopd

# Whose line a wait is: the innermost one of the first of these that is on the stack.
_PLACES = (f"{Path(megatron_taopd.__file__).parent}/", "/megatron/core/", "/transformers/", "")
SYNCHRONIZING = "called a synchronizing CUDA operation"
_NOT_THEIRS = ("/torch/", f"{Path(__file__).parent}/")


class Wait(NamedTuple):
    """Where the host waits, and for what."""

    phase: str
    kind: str
    line: str


class HostWaits:
    """A counter of waits, each of them reported by a call from wherever it happens.

    waits = pretend_cuda()
    with waits.phase("training"):
        ...
    assert waits.by_phase()["training"] <= 4, waits.by_line("training")

    Attributes:
        debug_mode: that of `torch.cuda.set_sync_debug_mode`, which does not see `synchronize`.
    """

    def __init__(self) -> None:
        self.counts: Counter[Wait] = Counter()
        self.debug_mode: str | int = "default"
        self._phase = ""

    def __call__(self, kind: str) -> None:
        self.counts[Wait(self._phase, kind, _line())] += 1
        if kind != "synchronize" and self.debug_mode in ("error", 2):
            raise RuntimeError(SYNCHRONIZING)
        if kind != "synchronize" and self.debug_mode in ("warn", 1):
            warnings.warn(SYNCHRONIZING, stacklevel=2)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the waits of a block under this name; an inner block counts its own."""
        outer, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = outer

    def of_span(self, span: Callable) -> Callable:
        """Return `Monitor.span` with each span as a phase."""

        @contextmanager
        def counted(monitor, name: str) -> Iterator[None]:
            with self.phase(name), span(monitor, name):
                yield

        return counted

    def by_phase(self) -> Counter[str]:
        return self._total(lambda wait: wait.phase)

    def by_line(self, phase: str) -> Counter[str]:
        """The waits of a phase by `file:line function`, and the library's that the line called."""
        return self._total(lambda wait: wait.line, phase)

    def _total(self, key: Callable[[Wait], str], phase: str | None = None) -> Counter[str]:
        total: Counter[str] = Counter()
        for wait, count in self.counts.items():
            if phase in (None, wait.phase):
                total[key(wait)] += count
        return total


def _line() -> str:
    """Name the line that made the host wait: the product's, else Megatron's, else a library's.

    What the product's has called in Megatron or a library, to wait there, is named after it.
    """
    innermost: dict[int, FrameType] = {}
    deeper: FrameType | None = None  # the innermost of all
    frame = sys._getframe()
    while frame:
        file = frame.f_code.co_filename
        if not any(part in file for part in _NOT_THEIRS):
            place = next(i for i, part in enumerate(_PLACES) if part in file)
            innermost.setdefault(place, frame)
            deeper = deeper or frame
        frame = frame.f_back
    named = [_name(innermost[min(innermost)])]
    if deeper is not innermost[min(innermost)]:
        named.append(f"in {_name(deeper)}")
    return " ".join(named)


def _name(frame: FrameType) -> str:
    file = "/".join(Path(frame.f_code.co_filename).parts[-2:])
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
