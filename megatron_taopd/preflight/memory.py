"""Whether the run fits its devices, as `megatron_taopd.plan` reckons."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_taopd.plan.memory import GIB, peak, phases, places, problems
from megatron_taopd.plan.setup import Setup
from megatron_taopd.preflight.findings import Finding, ok, warning


def check_memory(setup: Setup, memory_gib: float, reserve_gib: float) -> Iterator[Finding]:
    """Yield one warning for each phase and kind of rank that does not fit.

    Args:
        memory_gib: of a device.
        reserve_gib: of it, for CUDA's and NCCL's own.
    """
    plan = {place: phases(setup, place, memory_gib) for place in places(setup)}
    usable = (memory_gib - reserve_gib) * GIB
    fits = True
    for place, by_phase in plan.items():
        for line in problems(place, by_phase, usable):
            fits = False
            what, _, remedy = line.rpartition(": change ")
            yield warning(f"by estimate {what}", f"change {remedy}")
    if fits:
        phase, size = max((peak(by_phase) for by_phase in plan.values()), key=lambda each: each[1])
        yield ok(f"by estimate at most {size / GIB:.1f} of {memory_gib:.1f} GiB, in {phase}")
