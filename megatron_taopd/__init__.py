"""Megatron TA-OPD: on-policy distillation on the tokens that the student can learn from."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
_ELSEWHERE = {
    "SELECTORS": "step.selection",
    "select": "step.selection",
    "robust_normalize": "step.teachability",
    "RolloutBatch": "types",
    "TokenScores": "types",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `taopd --help` does not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f"{__name__}.{_ELSEWHERE.get(name, 'parallel.vocab')}")
    globals()[name] = getattr(home, name)
    return globals()[name]
