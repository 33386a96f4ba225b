"""Rules of a run's layouts and sizes, each written once: for a start's checks and for the plan."""

from __future__ import annotations

import math

from transformers import PretrainedConfig

from megatron_taopd.config.schema import Config, ParallelSection
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
    name: str, path: str, parallel: ParallelSection, hf: PretrainedConfig, ranks: int, whose: str
) -> int:
    """Refuse a layout that does not divide model and ranks; return its data-parallel ranks.

    Args:
        ranks: of the run.
        whose: names them in the line: "the number of ranks," or an option.

    Raises:
        ValueError: one line with the key, its value and what would be right.
    """
    try:
        check_layout(hf, path, parallel.tp, parallel.pp, parallel.ep)
    except ValueError as error:
        raise ValueError(f"{name}.parallel.{error}") from None
    return check_ranks(name, parallel, hf, ranks, whose)


def check_ranks(
    name: str, parallel: ParallelSection, hf: PretrainedConfig, ranks: int, whose: str
) -> int:
    """Refuse a layout that does not divide the ranks; return how many data-parallel ranks it has.

    Raises and takes what `check_grid` does.
    """
    size = parallel.tp * parallel.pp
    if ranks % size:
        raise ValueError(
            f"{name}.parallel: tp {parallel.tp} × pp {parallel.pp} = {size} does not divide "
            f"{whose} {ranks}; start a multiple of {size}"
        )
    data_parallel = ranks // size
    if data_parallel % parallel.ep:
        choices = divisors(math.gcd(num_experts(hf), data_parallel))
        raise ValueError(
            f"{name}.parallel.ep: {parallel.ep} does not divide the {data_parallel} data-parallel "
            f"ranks; one of {listed(choices)}"
        )
    return data_parallel


def check_sequence_parallel(name: str, parallel: ParallelSection) -> None:
    """Refuse sequence parallelism without tensor parallelism. Raises ValueError."""
    if parallel.sequence and parallel.tp == 1:
        raise ValueError(f"{name}.parallel.sequence: true needs {name}.parallel.tp > 1, which is 1")


def check_replay(config: Config) -> None:
    """Refuse a replay over several stages or mini-batches. Raises ValueError."""
    if config.train.schedule != "replay":
        return
    for key, value in (
        ("student.parallel.pp", config.student.parallel.pp),
        ("train.mini_batches", config.train.mini_batches),
    ):
        if value != 1:
            raise ValueError(
                f"train.schedule: replay with {key} {value}; it has to be 1, or the schedule "
                "two_pass"
            )


def check_micro_batch(config: Config, parallel: ParallelSection) -> None:
    """Refuse micro-batches that cannot hold the longest sequence. Raises ValueError."""
    multiple = parallel.tp if parallel.sequence else 1
    capacity = config.train.micro_batch_tokens // multiple * multiple
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > capacity:
        raise ValueError(
            f"train.micro_batch_tokens: {config.train.micro_batch_tokens} does not hold "
            f"data.max_prompt_tokens {config.data.max_prompt_tokens} + rollout.max_new_tokens "
            f"{config.rollout.max_new_tokens}; give at least {-(-longest // multiple) * multiple}"
        )


def check_sequences(config: Config, data_parallel: int) -> None:
    """Refuse fewer sequences a step than data-parallel ranks of the student. Raises ValueError."""
    rollout = config.rollout
    if rollout.prompts * rollout.samples < data_parallel:
        raise ValueError(
            f"rollout.prompts: {rollout.prompts} × rollout.samples {rollout.samples} are fewer "
            f"than the {data_parallel} data-parallel ranks of the student"
        )
