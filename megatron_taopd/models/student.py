"""The model that learns: trunk and head, distributed optimizer, learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_taopd.config.schema import MoeSection, OptimizerSection
from megatron_taopd.data.batching import MicroBatch
from megatron_taopd.formats.hf import load_config
from megatron_taopd.models import experts, gpt, pipeline, replay, weights
from megatron_taopd.models.average import WeightAverage
from megatron_taopd.parallel.compat.megatron_internals import keep_norms_on_the_device
from megatron_taopd.parallel.faults import Fault, by_rank, listed
from megatron_taopd.parallel.layout import Layout
from megatron_taopd.parallel.vocab import rows_within

keep_norms_on_the_device()


class FrozenStudent:
    """A student that scores: trunk and head, without gradients and optimizer.

    Args:
        hf_dir: Hugging Face directory of its config, and of its weights.
        layout: from `student_layout`.
        dtype: of the parameters.
        common_vocabulary: ids from here on never take part (the teacher does not have them).
        megatron: a Megatron distributed checkpoint, to take the weights from.

    Attributes:
        shard: the columns of the vocabulary that this rank's part of the head has.
    """

    def __init__(
        self,
        hf_dir: str | Path,
        layout: Layout,
        dtype: torch.dtype,
        common_vocabulary: int,
        megatron: str | Path | None = None,
    ):
        self._open(hf_dir, layout, dtype, "none", megatron)
        self.trunk.requires_grad_(False).eval()
        self.shard = self.trunk.vocab_shard(common_vocabulary)

    def _open(
        self,
        hf_dir: str | Path,
        layout: Layout,
        dtype: torch.dtype,
        recompute: str,
        megatron: str | Path | None = None,
    ) -> None:
        """Build the trunk and read its weights."""
        hf = load_config(hf_dir)
        self.hf_dir, self.layout, self.dtype = hf_dir, layout, dtype
        self.config = gpt.transformer_config(hf, layout, dtype, recompute)
        self.trunk = gpt.Trunk(hf, self.config, layout)
        if megatron is None:
            weights.load_weights(self.trunk, hf_dir)
        else:
            weights.load_megatron(self.trunk, megatron)

    @property
    def head_weight(self) -> Tensor:
        """Return [V, D], this rank's columns of the vocabulary; on the last stage."""
        return self.trunk.head_weight

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield whole tensors by Hugging Face name, on every rank (`weights.export_weights`)."""
        return weights.export_weights(self.trunk)

    def forward(self, micro_batches: Sequence[MicroBatch], collect: Callable) -> list:
        """Run `pipeline.forward` on the trunk."""
        return pipeline.forward(self.trunk, self.layout, micro_batches, collect)

    def keep_outputs(self):
        """Keep the trunk's outputs in the block (`replay.keep_outputs`)."""
        return replay.keep_outputs(self.trunk)

    def rows_within(self, head_memory_mib: int) -> int:
        """Return how many rows of logits of both models fit this much memory."""
        return rows_within(head_memory_mib << 20, self.shard.stop - self.shard.start)


class Student(FrozenStudent):
    """Megatron model, DDP and distributed optimizer under one roof.

    Args:
        hf_dir: Hugging Face checkpoint directory to start from.
        layout: from `student_layout`.
        dtype: of the parameters; bfloat16 keeps fp32 master weights and gradients.
        recompute: "none", "selective" or "full".
        optimizer: learning rate, decay, betas, clipping.
        steps: optimizer steps of the whole run, the end of the learning-rate decay.
        common_vocabulary: ids from here on never take part (the teacher does not have them).
        moe: how the routers of a mixture of experts learn; None: as by default.

    Attributes:
        average: of the weights over the updates; None unless `keep_average` is called.
    """

    def __init__(
        self,
        hf_dir: str | Path,
        layout: Layout,
        dtype: torch.dtype,
        recompute: str,
        optimizer: OptimizerSection,
        steps: int,
        common_vocabulary: int,
        moe: MoeSection | None = None,
    ):
        self._open(hf_dir, layout, dtype, recompute)
        self.moe, self.expert_load = moe or MoeSection(), None
        if self.config.num_moe_experts:
            self.expert_load = experts.ExpertLoad(self.trunk)
            if self.moe.router == "frozen":
                for router in experts.routers(self.trunk):
                    router.requires_grad_(False)
        self.shard = self.trunk.vocab_shard(common_vocabulary)
        self.version = 0  # the run's step whose weights these are; the loop counts
        self.last_step = steps
        min_lr = optimizer.lr if optimizer.min_lr is None else optimizer.min_lr
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
        )
        self.model = DistributedDataParallel(
            self.config, ddp, self.trunk, pg_collection=layout.groups
        )
        self.config.no_sync_func = self.model.no_sync
        self.config.finalize_model_grads_func = finalize_model_grads
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optimizer.lr,
                min_lr=min_lr,  # of the parameter groups, which the schedule asks first
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.eps,
                clip_grad=optimizer.clip,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=True,
            ),
            [self.model],
            use_gloo_process_groups=False,
        )
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=optimizer.lr,
            min_lr=min_lr,
            lr_warmup_steps=optimizer.warmup_steps,
            lr_decay_steps=max(steps, optimizer.warmup_steps + 1),
            lr_decay_style=optimizer.decay,
            start_wd=optimizer.weight_decay,
            end_wd=optimizer.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self.average: WeightAverage | None = None

    def keep_average(self, decay: float) -> WeightAverage:
        """Keep an exponential moving average of the weights, from what they are now on."""
        self.average = WeightAverage(self.model, self.optimizer.chained_optimizers, decay)
        return self.average

    def go_on_after(self, updates: int) -> None:
        """Go on with the schedule of the learning rate after so many updates."""
        self.scheduler.num_steps = updates
        self.scheduler.step(increment=0)

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], loss: Callable, rows: int = 0, tokens: int = 0
    ) -> list:
        """Run `pipeline.forward_backward`, from zeroed gradients to reduced and normalised ones.

        Args:
            rows, tokens: of the step over all ranks; they weigh the routers' auxiliary loss.
        """
        experts.weigh_aux_loss(self.config, self.moe.aux_loss, rows, tokens)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        return pipeline.forward_backward(self.model, self.layout, micro_batches, loss)

    def replay_outputs(self, kept: list[list[Tensor]], wanted: list[Tensor]):
        """Replay the trunk's outputs in the block (`replay.replay_outputs`)."""
        return replay.replay_outputs(self.trunk, kept, wanted)

    def step(self) -> tuple[float, float]:
        """Take an optimizer step; return (gradient norm before clipping, learning rate used).

        These are the parts of Megatron's `ChainedOptimizer.step`, so that its norm is seen in time.

        Raises:
            Fault: the norm is not finite, on every rank alike. Weights, moments and the schedule
                are what they were.
        """
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            # A rank sees its own gradients, and the sums over the data-parallel ranks of those
            # parameters whose optimizer state it holds.
            fault = self._not_finite("gradients", lambda parameter: parameter.main_grad)
            raise fault or Fault(f"the gradient norm is {grad_norm}, all gradients being finite")
        self.scheduler.step(increment=1)
        for optimizer in self.optimizer.chained_optimizers:
            parameters, most = optimizer.get_parameters(), optimizer.config.clip_grad
            if parameters and most > 0:
                clip_grad_by_total_norm_fp32(parameters, most, grad_norm)
        self.optimizer.step_with_ready_grads()
        if self.average is not None:
            self.average.update()
        return grad_norm, self.optimizer.param_groups[0]["lr"]

    def broken_weights(self) -> Fault | None:
        """Say which weights are not finite, if any. Collectives: as in `_not_finite`."""
        return self._not_finite("student weights", lambda parameter: parameter)

    def _not_finite(self, what: str, of: Callable[[Tensor], Tensor]) -> Fault | None:
        """Say on which ranks and of which parameters that learn `of(parameter)` is not finite.

        Collectives: an all-gather of their names (`guard.by_rank`).
        """
        named = [(n, p) for n, p in weights.named_parameters(self.trunk) if p.requires_grad]
        finite = torch.stack([of(parameter).isfinite().all() for _, parameter in named])
        found = by_rank([n for (n, _), ok in zip(named, finite.tolist(), strict=True) if not ok])
        if not found:
            return None
        names = sorted(set().union(*found.values()))
        return Fault(f"{what} are not finite ({listed('parameter', names)})", [*found])
