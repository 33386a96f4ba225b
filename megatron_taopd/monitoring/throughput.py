"""Tokens per second and GPU, and the share of the peak that the models' operations attain (MFU).

One arithmetic for the log of a run and for its plan: seconds, tokens and operations of a step go
in, `perf/*` comes out. docs/launch.md says what is counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_taopd.config.schema import Config, ServersSection

PHASES = ("rollout", "teacher", "scoring", "training")

# Dense bf16 and fp32 peaks in 10^12 operations a second, by a pattern of the device's name. The
# first that is found counts, so boards that are slower than their family come before it.
PEAKS = {
    r"H[18]00 PCIe": (756.0, 51.0),
    r"H[12]00 NVL": (835.0, 60.0),
    r"H100|H800|G?H200": (989.0, 67.0),
    r"H20\b": (148.0, 44.0),
    r"A100|A800": (312.0, 19.5),
    r"L40S": (362.0, 91.6),
    r"L40\b": (181.0, 90.5),
    r"A40\b": (149.7, 37.4),
    r"A10\b": (125.0, 31.2),
}


def device_peak(name: str, precision: str) -> float | None:
    """Return a device's dense peak in 10^12 operations a second; None if it is not known.

    Args:
        name: as torch.cuda.get_device_name has it.
        precision: bf16 or fp32.
    """
    for pattern, (bf16, fp32) in PEAKS.items():
        if re.search(rf"\b(?:{pattern})", name):
            return fp32 if precision == "fp32" else bf16
    return None


@dataclass(frozen=True)
class Devices:
    """How many GPUs do what.

    Attributes:
        ranks: train.
        rollout, teacher: generate, and read: the ranks, or servers, which may be on devices of
            ranks.
        apart: devices of servers that no rank is on.
    """

    ranks: int
    rollout: int
    teacher: int
    apart: int = 0

    @classmethod
    def of(cls, config: Config, ranks: int, local_ranks: int) -> Devices:
        """Count the devices of a run.

        Args:
            local_ranks: of the first node, whose devices the run's own servers may share.
        """
        counts = {
            key: (len(section.servers.urls) or section.servers.replicas) * section.servers.tp
            for key, section in config.served.items()
        }
        apart = sum(devices_apart(each.servers, local_ranks) for each in config.served.values())
        reading = [counts.get(key, ranks) for key in config.each_teacher]
        # Teachers read one after the other, but for those on servers of their own.
        return cls(ranks, counts.get("rollout", ranks), max(reading), apart)


def devices_apart(servers: ServersSection, local_ranks: int) -> int:
    """Count the devices of servers that no rank shares: all of those that were there already."""
    if servers.urls:
        return len(servers.urls) * servers.tp
    return sum(gpu >= local_ranks for gpu in devices_of(servers))


def devices_of(servers: ServersSection) -> tuple[int, ...]:
    """List the devices of a run's own servers on the first node.

    Without `gpus` every server begins at the first device of the machine.
    """
    return tuple(servers.gpus if servers.gpus is not None else range(servers.tp))


def throughput(
    record: Mapping[str, float], devices: Devices, peak_tflops: float | None
) -> dict[str, float]:
    """Compute the `perf/*` of a step.

    Args:
        record: with `time/step`, `time/<phase>`, `flops/<phase>`, `flops/recomputed`,
            `tokens_rolled_out`, `tokens_read`, `tokens_scored`, `tokens_trained`, and
            `tokens_generated` or else `valid_rows`, as far as the step has them.
        peak_tflops: of one GPU in the run's precision; None: there will be no MFU.

    Returns:
        perf/tokens_per_second_per_gpu[_<phase>] and perf/mfu[_<phase>]: without suffix those of the
        whole step on all devices, with it those of a phase on the devices that do it. What the
        record does not tell is left out.
    """
    tokens = {
        "rollout": record.get("tokens_generated", record.get("valid_rows")),
        "teacher": record.get("tokens_read"),
        "scoring": record.get("tokens_scored"),
        "training": record.get("tokens_trained"),
        "": record.get("tokens_rolled_out"),
    }
    operations = {phase: record.get(f"flops/{phase}") for phase in PHASES}
    if operations["training"] is not None:  # what is computed twice does not count twice
        operations["training"] -= record.get("flops/recomputed", 0.0)
    known = [count for count in operations.values() if count is not None]
    operations[""] = sum(known) if len(known) == len(PHASES) else None
    gpus = {
        "rollout": devices.rollout,
        "teacher": devices.teacher,
        "scoring": devices.ranks,
        "training": devices.ranks,
        "": devices.ranks + devices.apart,
    }
    found = {}
    for phase, seconds in _seconds(record).items():
        suffix = f"_{phase}" if phase else ""
        device_seconds = seconds * gpus[phase]
        if (count := tokens[phase]) is not None:
            found[f"perf/tokens_per_second_per_gpu{suffix}"] = count / device_seconds
        if peak_tflops and (count := operations[phase]) is not None:
            found[f"perf/mfu{suffix}"] = count / (device_seconds * peak_tflops * 1e12)
    return found


def _seconds(record: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each phase that took any; `""` is the step.

    An engine, and a teacher on servers, say at which rate they worked: their spans are what was
    waited for them, which is less where other things were done meanwhile.
    """
    times = {phase: record.get(f"time/{phase}") for phase in PHASES}
    generated = record.get("tokens_generated", record.get("valid_rows", 0))
    for phase, tokens in ("rollout", generated), ("teacher", record.get("tokens_read", 0)):
        if rate := record.get(f"{phase}/tokens_per_second"):
            times[phase] = tokens / rate
        elif phase == "rollout":
            times[phase] = None
    times[""] = record.get("time/step")
    return {phase: seconds for phase, seconds in times.items() if seconds}
