"""What the log says of a batch, as dictionaries of plain numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_taopd.types import RolloutBatch


def rollout_metrics(batch: RolloutBatch, gap: Tensor, step: int) -> dict[str, float]:
    """Describe the responses of a step and the engine that made them.

    Args:
        gap: [r] float, |log p_trainer − log p_engine| of some sampled tokens, in nats.
        step: that the batch is for; its tokens are `step` − 1 − their version steps old.
    """
    lengths = batch.response_lengths.double()
    middle, long = lengths.quantile(torch.tensor([0.5, 0.9], dtype=torch.float64)).tolist()
    versions = batch.weight_versions
    oldest = int(versions.min())
    return {
        "valid_rows": batch.num_rows,
        "tokens_rolled_out": int(batch.lengths.sum()),
        "rollout/response_length_mean": lengths.mean().item(),
        "rollout/response_length_p50": middle,
        "rollout/response_length_p90": long,
        "rollout/response_length_max": lengths.max().item(),
        "rollout/truncated_share": batch.truncated.double().mean().item(),
        "rollout/weight_version": oldest,
        "rollout/staleness_mean": ((step - 1) * len(versions) - int(versions.sum()))
        / len(versions),
        "rollout/staleness_max": float(step - 1 - oldest),
        "rollout/logprob_gap_mean": gap.mean().item(),
        "rollout/logprob_gap_max": gap.max().item(),
    }
