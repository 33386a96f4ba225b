"""What the log says of a batch, as dictionaries of plain numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_taopd.types import RolloutBatch


def rollout_metrics(batch: RolloutBatch, gap: Tensor, step: int) -> dict[str, float]:
    """Describe the responses of a step and the engine that made them.

    `rollout/…` are of the student's own responses; without one there are none.

    Args:
        gap: [r] float, |log p_trainer − log p_engine| of some sampled tokens, in nats; NaN of
            references.
        step: that the batch is for; its tokens are `step` − 1 − their version steps old.
    """
    own = ~batch.is_reference
    metrics = {"valid_rows": batch.num_rows, "tokens_rolled_out": int(batch.lengths.sum())}
    versions = batch.weight_versions[own[batch.row_sequences()]]
    if not len(versions):
        return metrics
    gap = gap[~gap.isnan()]
    if len(gap):  # some of the sampled tokens are the student's own
        metrics |= {
            "rollout/logprob_gap_mean": gap.mean().item(),
            "rollout/logprob_gap_max": gap.max().item(),
        }
    lengths = batch.response_lengths[own].double()
    middle, long = lengths.quantile(torch.tensor([0.5, 0.9], dtype=torch.float64)).tolist()
    oldest = int(versions.min())
    return metrics | {
        "rollout/response_length_mean": lengths.mean().item(),
        "rollout/response_length_p50": middle,
        "rollout/response_length_p90": long,
        "rollout/response_length_max": lengths.max().item(),
        "rollout/truncated_share": batch.truncated[own].double().mean().item(),
        "rollout/weight_version": oldest,
        "rollout/staleness_mean": ((step - 1) * len(versions) - int(versions.sum()))
        / len(versions),
        "rollout/staleness_max": float(step - 1 - oldest),
    }


def source_metrics(
    batch: RolloutBatch, kept: Tensor, loss: float, of_references: float
) -> dict[str, float]:
    """Describe both sources of a batch that has references.

    Args:
        kept: [N] int64, the kept rows of each sequence.
        loss: the mean over the kept rows.
        of_references: what the kept rows of references add to it.

    Returns:
        rollout/dataset_share: the share of the sequences that are references. tokens_generated: of
        the student's own responses. selection/kept_share_{dataset,rollout} and
        loss/{dataset,rollout}: kept rows over rows, and the mean loss of the kept ones, of a source
        that has some.
    """
    references = batch.is_reference
    metrics = {
        "rollout/dataset_share": references.double().mean().item(),
        "tokens_generated": int(batch.response_lengths[~references].sum()),
    }
    for name, of, added in (
        ("dataset", references, of_references),
        ("rollout", ~references, loss - of_references),
    ):
        rows, own = int(batch.cu_rows.diff()[of].sum()), int(kept[of].sum())
        if rows:
            metrics[f"selection/kept_share_{name}"] = own / rows
        if own:
            metrics[f"loss/{name}"] = added * int(kept.sum()) / own
    return metrics
