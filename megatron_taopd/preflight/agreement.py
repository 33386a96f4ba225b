"""Whether engine, trainer and teacher compute what they should, on one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import psutil
import torch

from megatron_taopd.formats.hf import load_config, tensor_shapes
from megatron_taopd.parallel.faults import Fault
from megatron_taopd.parallel.objects import gather
from megatron_taopd.preflight.findings import Finding, error, ok
from megatron_taopd.rollout.engine import RolloutEngine, Sampling
from megatron_taopd.step.scoring import sequence_log_probs
from megatron_taopd.types import RolloutBatch, Sequences

NEW_TOKENS = 8
# Mean |Δ log p| of two correct implementations, by dtype.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
ROUNDING = 1e-4  # below zero, that a divergence may come out


def answer(
    engine: RolloutEngine, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]
) -> RolloutBatch:
    """A few greedy tokens."""
    width = min(NEW_TOKENS, max_new_tokens)
    sampling = Sampling(width, temperature=0, stop_token_ids=tuple(stop_ids))
    return engine.generate([prompt], [0], 0, sampling)


def check_engine(
    batch: RolloutBatch,
    student: FrozenStudent,
    micro_batch_tokens: int,
    chunk_rows: int,
    engine: str,
) -> list[Finding]:
    """What the engine says of its tokens beside what the trainer says of them."""
    (tokens,) = (batch.sequence(i) for i in range(batch.num_sequences))
    trainer = sequence_log_probs(student, [tokens.tolist()], micro_batch_tokens, chunk_rows)
    gap = (trainer[-batch.num_rows :] - batch.log_probs).abs()
    tolerance = TOLERANCE[student.dtype]
    seen = (
        f"engine {engine} and trainer ({student.layout}): log p of {batch.num_rows} greedy tokens "
        f"differs by {gap.mean():.1e} on average, {gap.max():.1e} at most"
    )
    if gap.mean() <= tolerance:  # not of NaN
        return [ok(seen)]
    return [
        error(
            f"{seen}; {tolerance:g} on average is rounding",
            "the same weights on both sides? a server that an earlier run has trained has others; "
            "else a model that one side does not support",
        )
    ]


def check_teacher(
    batch: RolloutBatch, teacher_inputs: Sequences, distiller: Distiller
) -> list[Finding]:
    """Have the teacher read the same tokens: scores are numbers, no divergence is negative.

    Args:
        teacher_inputs: the batch as the teacher reads it.
        distiller: of a student that only scores.
    """
    what = f"teacher ({getattr(distiller.teacher, 'layout', 'served')})"
    remedy = "taopd verify compares its weights with transformers; bf16 may overflow"
    parts, assigned = distiller.read(teacher_inputs), distiller.assign(batch)
    teacher_rows = distiller.dispatch(parts, batch, assigned)
    try:
        scores = distiller.score(batch, assigned, teacher_rows).scores
    except Fault as fault:
        return [error(f"{what}: {fault.what}", remedy)]
    least, most = scores.disagreement.aminmax()
    seen = f"{what}: D of those rows is {least:.3g} … {most:.3g}"
    if least < -ROUNDING:
        return [error(f"{seen}; a divergence is not negative", remedy)]
    return [ok(f"{seen}, its entropy up to {scores.teacher_entropy.max():.3g}")]


def weight_bytes(hf_dir: str | Path, dtype: torch.dtype) -> int:
    """Of a whole model."""
    shapes = tensor_shapes(load_config(hf_dir))
    return sum(map(prod, shapes.values())) * dtype.itemsize


def available_bytes(local_ranks: int) -> int:
    """Memory that each rank may take, the least of all ranks.

    Collective: an all-gather of some bytes.
    """
    free = psutil.virtual_memory().available // local_ranks
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
    return min(gather(free))
