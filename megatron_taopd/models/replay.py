"""One forward pass for scores and gradients both.

The selection needs scores of every row, so the student runs forward over whole sequences before it
is known which tokens training needs. Instead of a graph, that pass keeps what each layer put out:
what full recomputation keeps anyway. The training pass then takes the outputs of the tokens it
needs from there, and each layer runs again, on these tokens alone, when the gradient reaches it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_taopd.models.gpt import Trunk
from megatron_taopd.parallel.copies import to_device


def kept_bytes(trunk: Trunk, num_tokens: int) -> int:
    """Count the bytes that a rank keeps of `num_tokens` packed tokens."""
    config = trunk.config
    ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
    element = torch.finfo(config.params_dtype).bits // 8
    return len(trunk.decoder.layers) * -(-num_tokens // ranks) * config.hidden_size * element


@contextmanager
def keep_outputs(trunk: Trunk) -> Iterator[list[list[Tensor]]]:
    """Keep the output of every layer in the forward passes of a block.

    Yields:
        By micro-batch, the layers' hidden states, [T, 1, D] or [T / tp, 1, D] under sequence
        parallelism.
    """
    kept: list[list[Tensor]] = []

    def keep(index: int, _layer, _inputs, output) -> None:
        if index == 0:
            kept.append([])
        kept[-1].append(output[0].detach())

    hooks = [
        layer.register_forward_hook(partial(keep, index))
        for index, layer in enumerate(trunk.decoder.layers)
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replay_outputs(trunk: Trunk, kept: list[list[Tensor]], wanted: list[Tensor]) -> Iterator[None]:
    """Let the forward passes of a block look their layers' outputs up instead of computing them.

    The backward pass computes each layer again, with gradients. The micro-batches have to come in
    the order in which they were kept; outputs are dropped as they are used.

    Args:
        kept: from `keep_outputs`, of a pass with the same weights.
        wanted: by micro-batch, [T'] int64, where each token of the new micro-batch stood in the
            kept one; −1 for padding; on any device. Under sequence parallelism T' is a multiple of
            tp. Tokens that a context-parallel group shares are counted through all its ranks.

    Collectives: under sequence parallelism, and over a context-parallel group that shares a
    micro-batch, an all-gather per layer of the kept outputs.
    """
    config, layers = trunk.config, trunk.decoder.layers
    turn = iter(zip(kept, wanted, strict=True))
    current: dict[str, list | Tensor] = {}

    def look_up(index: int, forward, hidden_states: Tensor, **options) -> tuple[Tensor, None]:
        if index == 0:
            outputs, places = next(turn)
            current["wanted"] = to_device(places, outputs[0].device)
            current["outputs"] = list(outputs)
            outputs.clear()
        shared = options["packed_seq_params"].cp_group
        output = _pick(trunk, current["outputs"].pop(0), current["wanted"], shared)
        return _Replayed.apply(hidden_states, output, partial(forward, **options)), None

    # Full recomputation would wrap the look-ups; each layer is recomputed as it is.
    granularity = config.recompute_granularity
    if granularity == "full":
        config.recompute_granularity = None
    for index, layer in enumerate(layers):
        layer.forward = partial(look_up, index, layer.forward)
    try:
        yield
    finally:
        config.recompute_granularity = granularity
        for layer in layers:
            del layer.forward


def _pick(trunk: Trunk, output: Tensor, wanted: Tensor, shared: dist.ProcessGroup | None) -> Tensor:
    """Return [T', 1, D], 0 for padding, or, under sequence parallelism, this rank's part of it."""
    group = trunk.layout.groups.tp
    with torch.no_grad():
        if trunk.layout.sequence:
            output = gather_from_sequence_parallel_region(output, group=group)
        if shared is not None:
            output = gather_from_sequence_parallel_region(output, group=shared)
        picked = output[wanted] * (wanted >= 0)[:, None, None]
        if trunk.layout.sequence:
            picked = scatter_to_sequence_parallel_region(picked, group=group)
    return picked


class _Replayed(torch.autograd.Function):
    """A layer whose output is known."""

    @staticmethod
    def forward(ctx, hidden_states, output, run):
        ctx.save_for_backward(hidden_states)
        ctx.run = run
        return output.detach()

    @staticmethod
    def backward(ctx, grad):
        hidden_states = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output, _context = ctx.run(hidden_states=hidden_states)
        torch.autograd.backward(output, grad)
        return hidden_states.grad, None, None
