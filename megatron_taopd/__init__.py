"""Megatron TA-OPD: on-policy distillation on the tokens that the student can learn from."""

from megatron_taopd.parallel.vocab import (
    VocabShard,
    divergence,
    linear_divergence,
    linear_topk_divergence,
    score_hidden,
    score_rows,
    token_log_probs,
    topk_divergence,
)
from megatron_taopd.step.selection import SELECTORS, select
from megatron_taopd.step.teachability import robust_normalize
from megatron_taopd.types import RolloutBatch, TokenScores

__all__ = [
    "SELECTORS",
    "RolloutBatch",
    "TokenScores",
    "VocabShard",
    "divergence",
    "linear_divergence",
    "linear_topk_divergence",
    "robust_normalize",
    "score_hidden",
    "score_rows",
    "select",
    "token_log_probs",
    "topk_divergence",
]
