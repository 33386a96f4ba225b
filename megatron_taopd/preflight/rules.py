"""Rules of a run's models and layouts, each written once: for a start's checks and for the plan."""

from __future__ import annotations

import math

from transformers import PretrainedConfig

from megatron_taopd.config.schema import MoeSection, ParallelSection, StudentSection
from megatron_taopd.formats.hf_map import (
    check_architecture,
    check_layout,
    divisors,
    listed,
    num_experts,
)


def check_model(name: str, path: str, hf: PretrainedConfig) -> None:
    """Refuse a model that no trunk computes.

    Args:
        name: student or teacher.

    Raises:
        ValueError: one line with the key, the path and what would be right.
    """
    try:
        check_architecture(hf)
    except ValueError as error:
        raise ValueError(f"{name}.path: {path}: {error}") from None


def check_routers(student: StudentSection, hf: PretrainedConfig) -> None:
    """Refuse what is said of routers where there are none.

    Raises:
        ValueError: one line with the key, its value and the path.
    """
    for name, value in vars(student.moe).items():
        if value != getattr(MoeSection(), name) and not num_experts(hf):
            raise ValueError(
                f"student.moe.{name}: {value} with {student.path}, which has no experts; leave it "
                "out"
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
    if name == "student" and num_experts(hf) and parallel.tp > 1 and not parallel.sequence:
        raise ValueError(
            f"student.parallel.sequence: false with tp {parallel.tp} and the experts of {path}, "
            "whose gradients would count each token more than once; set it to true"
        )
    if name == "student" and num_experts(hf) and parallel.cp > 1:
        raise ValueError(
            f"student.parallel.cp: {parallel.cp} with the experts of {path}; it has to be 1"
        )
    data_parallel = ranks // (parallel.tp * parallel.cp * parallel.pp)
    if data_parallel % parallel.ep:
        choices = divisors(math.gcd(num_experts(hf), data_parallel))
        raise ValueError(
            f"{name}.parallel.ep: {parallel.ep} does not divide the {data_parallel} data-parallel "
            f"ranks; one of {listed(choices)}"
        )
    return data_parallel
