"""Everything that reads whole rows of the vocabulary, and every collective that this takes.

Both heads are cut along the same tensor-parallel group at the same columns, so that column v is the
same token in both. A rank works on its own columns and tells the others a few numbers a row; what
crosses the group is counted in each docstring, in bytes a row and rank with fp32 logits. Results
that are not a shard of something are the same, bit for bit, on every rank of the group.

    shard        which columns a rank holds
    normalizers  what turns logits into log-probabilities; the order of candidates
    reference    what a row comes down to within a shard, in torch
    kernels      the same in Triton, for CUDA
    reductions   the one of the two that a device takes
    scores       D, C, entropies and top-K sets of rows
    divergences  losses of rows of logits
    projection   hidden states to logits and back, chunk by chunk
    heads        the same scores and losses, from hidden states
    topk_teacher both, of a teacher that reports its top-n only

Shapes: R rows · V vocabulary columns of this shard · K top-k · D model width · tp ranks

Logits are fp32, from bf16 operands with fp32 accumulation where the model is bf16: rounded to bf16
they tie at the K-th place in many rows and move C by up to .04. What is summed over the vocabulary
is summed in fp32 at least, and the few numbers a row that are left are merged in float64.
"""

from megatron_taopd.parallel.vocab.divergences import DIVERGENCES, divergence
from megatron_taopd.parallel.vocab.heads import (
    Compared,
    compare_hidden,
    linear_divergence,
    score_hidden,
    score_sampled,
    token_log_probs,
)
from megatron_taopd.parallel.vocab.projection import logits_bytes, rows_within
from megatron_taopd.parallel.vocab.scores import score_rows
from megatron_taopd.parallel.vocab.shard import VocabShard
from megatron_taopd.parallel.vocab.topk_teacher import (
    linear_topk_divergence,
    participates,
    score_topk,
    topk_divergence,
)

__all__ = [
    "DIVERGENCES",
    "Compared",
    "VocabShard",
    "compare_hidden",
    "divergence",
    "linear_divergence",
    "linear_topk_divergence",
    "logits_bytes",
    "participates",
    "rows_within",
    "score_hidden",
    "score_rows",
    "score_sampled",
    "score_topk",
    "token_log_probs",
    "topk_divergence",
]
