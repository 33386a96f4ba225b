"""Routers of a student of experts: whether they learn, what balances them, and what they have done.

Shapes: L layers of the whole model · E experts of a layer
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_taopd.models.gpt import Trunk

AUX_LOSS = "load_balancing_loss"  # Megatron's name of it in its log


def routers(trunk: Trunk) -> list[TopKRouter]:
    """Return the routers of this stage's layers; none of a dense model."""
    return [module for module in trunk.modules() if isinstance(module, TopKRouter)]


def weigh_aux_loss(config: TransformerConfig, weight: float, rows: int, tokens: int) -> None:
    """Let a step's gradient be that of its loss plus `weight` times the mean auxiliary loss.

    Megatron adds the auxiliary loss of a micro-batch up over the tokens that a rank routes, which
    under sequence parallelism are 1/TP of them, and what is added up is divided by the step's rows.

    Args:
        rows, tokens: that the step trains on, over all ranks.
    """
    ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
    config.moe_aux_loss_coeff = weight * ranks * rows / max(tokens, 1)


class ExpertLoad:
    """Counts what the routers of a trunk do in every forward pass, until it is asked."""

    def __init__(self, trunk: Trunk):
        config, device = trunk.config, next(trunk.parameters()).device
        self._topk, self._tp = config.moe_router_topk, trunk.layout.tp
        self._load = torch.zeros(
            config.num_layers, config.num_moe_experts, dtype=torch.float64, device=device
        )
        # Tokens that came to a router; micro-batches that had an auxiliary loss; the sum of these.
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        for router in routers(trunk):
            router.register_forward_hook(partial(self._count, router.layer_number - 1))

    def _count(self, layer: int, router: TopKRouter, _inputs, output: tuple[Tensor, Tensor]):
        routing_map = output[1]  # [tokens, E] bool
        self._load[layer] += routing_map.sum(0)
        self._sums[0] += len(routing_map)
        self._sums[1] += router.training and torch.is_grad_enabled()

    def take(self) -> dict[str, float]:
        """Return what the log says of the passes since the last call, the same on every rank.

        Returns:
            `moe/load_max` and `moe/load_min`: the most and the fewest tokens of an expert in any
            layer, over what they would be if all had as many. `moe/dropped_tokens`: how many times
            a token did not come to an expert that it should. `moe/aux_loss`, if there is one: its
            mean over layers and micro-batches, 1 if all experts have as many tokens.

        Collectives: an all-reduce of 8 · (L · E + 3) bytes over all ranks.
        """
        if tracked := get_moe_layer_wise_logging_tracker().get(AUX_LOSS):
            self._sums[2] = tracked["values"].double().sum()
            clear_aux_losses_tracker()
        counts = torch.cat([self._load.flatten(), self._sums])
        self._load.zero_()
        self._sums.zero_()
        dist.all_reduce(counts)
        load, (tokens, losses, aux_loss) = counts[:-3].view_as(self._load), counts[-3:].tolist()
        relative = load / load.mean(1, keepdim=True)
        metrics = {
            "moe/load_max": relative.max().item(),
            "moe/load_min": relative.min().item(),
            "moe/dropped_tokens": tokens * self._topk - load.sum().item(),
        }
        return metrics | ({"moe/aux_loss": aux_loss / losses * self._tp} if aux_loss else {})
