"""Rules of a run's models and layouts, each written once: for a start's checks and for the plan."""

from __future__ import annotations

import math

from transformers import PretrainedConfig

from megatron_taopd.config.schema import ParallelSection
from megatron_taopd.formats.hf_map import (
    check_architecture,
    check_layout,
    divisors,
    listed,
    num_experts,
)


def check_model(name: str, path: str, hf: PretrainedConfig) -> None:
    """Refuse a model that no trunk computes, and experts in a student.

    Args:
        name: student or teacher.

    Raises:
        ValueError: one line with the key, the path and what would be right.
    """
    try:
        check_architecture(hf)
    except ValueError as error:
        raise ValueError(f"{name}.path: {path}: {error}") from None
    if num_experts(hf) and name == "student":
        raise ValueError(
            f"{name}.path: {path}: a mixture of experts is supported as a teacher only"
        )


def check_grid(
    name: str, path: str, parallel: ParallelSection, hf: PretrainedConfig, ranks: int
) -> int:
    """Refuse a layout that does not divide the model; return its data-parallel ranks.

    Args:
        ranks: of the run, which tensor and pipeline parallelism divide (`config.values`).

    Raises:
        ValueError: one line with the key, its value and what would be right.
    """
    try:
        check_layout(hf, path, parallel.tp, parallel.pp, parallel.ep)
    except ValueError as error:
        raise ValueError(f"{name}.parallel.{error}") from None
    data_parallel = ranks // (parallel.tp * parallel.cp * parallel.pp)
    if data_parallel % parallel.ep:
        choices = divisors(math.gcd(num_experts(hf), data_parallel))
        raise ValueError(
            f"{name}.parallel.ep: {parallel.ep} does not divide the {data_parallel} data-parallel "
            f"ranks; one of {listed(choices)}"
        )
    return data_parallel
