"""Packed micro-batches through a trunk with Megatron's own pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from torch import Tensor

from megatron_taopd.data.batching import MicroBatch
from megatron_taopd.models.gpt import packed_forward
from megatron_taopd.parallel import platform, progress, watchdog
from megatron_taopd.parallel.layout import Layout


@torch.no_grad()
def forward(
    model, layout: Layout, micro_batches: Sequence[MicroBatch], collect: Callable[..., object]
) -> list:
    """Run the trunk forward; every data-parallel rank needs the same number of micro-batches.

    Args:
        collect: `collect(micro_batch, hidden_states)` is called on the last stage with the trunk's
            output; what it returns is kept.

    Returns:
        What `collect` returned, by micro-batch; an empty list on the other stages.
    """

    def last_stage(micro_batch: MicroBatch, hidden_states: Tensor, non_loss_data: bool):
        return collect(micro_batch, hidden_states)

    return _run(model, layout, micro_batches, last_stage, forward_only=True)


def forward_backward(
    model, layout: Layout, micro_batches: Sequence[MicroBatch], loss: Callable[..., tuple]
) -> list:
    """Run forward and backward, and finish the gradients as the model's config says.

    Args:
        loss: `loss(micro_batch, hidden_states) -> (sum over rows, number of rows, metrics)`, on the
            last stage. The gradient is that of all sums over all ranks, divided by all counts.

    Returns:
        The metrics by micro-batch; an empty list on the other stages.
    """
    return _run(model, layout, micro_batches, loss, forward_only=False)


def _run(model, layout, micro_batches, last_stage, forward_only: bool) -> list:
    def forward_step(iterator, model):
        watchdog.heartbeat()
        shown.advance()
        micro_batch = next(iterator).to(platform.device())
        hidden_states = packed_forward(
            model,
            micro_batch.tokens,
            micro_batch.position_ids,
            micro_batch.cu_seqlens,
            micro_batch.max_seqlen,
            micro_batch.pieces,
        )
        return hidden_states, lambda output, **kwargs: last_stage(micro_batch, output, **kwargs)

    run = forward_backward_no_pipelining
    communicator = None
    if layout.pp > 1:
        run = forward_backward_pipelining_without_interleaving
        communicator = P2PCommunicator(pp_group=layout.groups.pp, config=model.config)
    with progress.phase("micro-batches", len(micro_batches)) as shown:
        return run(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=model,
            num_microbatches=len(micro_batches),
            # Shapes travel with the tensors (variable_seq_lengths); these two are not used.
            seq_length=0,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            p2p_communicator=communicator,
            pg_collection=layout.groups,
        )
