"""The evaluation that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_taopd.config.schema import Config
from megatron_taopd.data.texts import Texts
from megatron_taopd.evaluation.in_loop import Evaluation, evaluate, open_grader
from megatron_taopd.rollout.engine import RolloutEngine
from megatron_taopd.rollout.opening import sampling_of


def open_evaluation(
    config: Config, engine: RolloutEngine, texts: Texts
) -> Callable[[int], Evaluation] | None:
    """Say how the student is evaluated after a step; None without `eval.prompts`."""
    held_out, section = texts.held_out, config.eval
    if held_out is None:
        return None
    sampling = replace(
        sampling_of(config.rollout),
        max_new_tokens=section.max_new_tokens or config.rollout.max_new_tokens,
        samples=section.samples,
        temperature=section.temperature,
    )
    grade, tokenizer = open_grader(section.grader), texts.student.tokenizer
    return lambda step: evaluate(
        engine, held_out, tokenizer, sampling, step, grade, section.pass_at, config.log.samples
    )
