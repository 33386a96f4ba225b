"""Where each rank stands in a model's grid of tensor, context, data and pipeline parallelism.

Student and teacher have a layout each, over the same ranks. The student's process groups are
Megatron's own (`parallel_state`); the teacher's are its own `ProcessGroupCollection`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed


@dataclass(frozen=True)
class Layout:
    """One model's layout. Ranks are numbered tensor first, then context, data and pipeline.

    A *data rank* is a context-parallel rank of a data-parallel one: ranks of different data ranks
    have different tokens.

    Attributes:
        tp, pp, dp: tensor-, pipeline- and data-parallel sizes; with cp, their product is the world
            size.
        sequence: sequence parallelism, activations cut along the sequence over the TP group.
        rank: this process.
        groups: the process groups that contain this process.
        ep: expert-parallel size; it divides dp, and consecutive data-parallel ranks share a layer's
            experts.
        cp: context-parallel size: ranks that share the tokens of long sequences.
    """

    tp: int
    pp: int
    dp: int
    sequence: bool
    rank: int
    groups: ProcessGroupCollection
    ep: int = 1
    cp: int = 1

    def __str__(self) -> str:
        context = f"-CP({self.cp})" if self.cp > 1 else ""
        experts = f"-EP({self.ep})" if self.ep > 1 else ""
        sequence = "-SP" if self.sequence else ""
        return f"TP({self.tp}){context}-PP({self.pp})-DP({self.dp}){experts}{sequence}"

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def data_ranks(self) -> int:
        return self.dp * self.cp

    @property
    def data_rank(self) -> int:
        return self.rank // self.tp % self.data_ranks

    @property
    def cp_rank(self) -> int:
        return self.data_rank % self.cp

    @property
    def dp_rank(self) -> int:
        return self.data_rank // self.cp

    @property
    def ep_rank(self) -> int:
        return self.dp_rank % self.ep

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tp * self.data_ranks)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    def last_stage_rank(self, data_rank, tp_rank):
        """Return the global rank at these places of the last stage; takes ints or tensors."""
        return tp_rank + self.tp * (data_rank + self.data_ranks * (self.pp - 1))


def data_parallel_size(tp: int, pp: int, ep: int, cp: int = 1) -> int:
    """Return how many data-parallel ranks a layout leaves of the world.

    Raises:
        ValueError: tp × cp × pp does not divide the world size, or ep what it leaves.
    """
    world_size, size = dist.get_world_size(), tp * cp * pp
    sizes = f"tp {tp} × " + (f"cp {cp} × " if cp > 1 else "") + f"pp {pp}"
    if world_size % size:
        raise ValueError(
            f"{sizes} does not divide the world size {world_size}: start a multiple of "
            f"{size} processes or change the layout"
        )
    dp = world_size // size
    if dp % ep:
        raise ValueError(
            f"ep {ep} does not divide the data-parallel size {dp}, which is the world size "
            f"{world_size} / ({sizes})"
        )
    return dp


def student_layout(
    tp: int, pp: int, sequence: bool = False, seed: int = 0, ep: int = 1, cp: int = 1
) -> Layout:
    """Create Megatron's global process groups and random states for the model that trains.

    Raises:
        ValueError: tp × cp × pp does not divide the world size, or ep the data-parallel size.
    """
    dp = data_parallel_size(tp, pp, ep, cp)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
    )
    model_parallel_cuda_manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return _checked(Layout(tp, pp, dp, sequence, dist.get_rank(), groups, ep, cp))


def forward_layout(tp: int, pp: int, sequence: bool = False, ep: int = 1, cp: int = 1) -> Layout:
    """Create process groups for a model that only runs forward, next to those of the student.

    Raises:
        ValueError: tp × cp × pp does not divide the world size, or ep the data-parallel size.
    """
    dp = data_parallel_size(tp, pp, ep, cp)
    grid = HyperCommGrid([tp, cp, ep, dp // ep, pp], ["tp", "cp", "ep", "expt_dp", "pp"])
    groups = ProcessGroupCollection(
        tp=grid.create_pg("tp"),
        cp=grid.create_pg("cp"),
        dp=grid.create_pg(["ep", "expt_dp"]),
        pp=grid.create_pg("pp"),
        ep=grid.create_pg("ep"),
        tp_ep=grid.create_pg(["tp", "ep"]),
        expt_dp=grid.create_pg("expt_dp"),
        # Only training needs embedding groups, and the balance of experts over all ranks.
        embd=None,
        pos_embd=None,
        tp_dp_cp=None,
    )
    groups.dp_cp = grid.create_pg(["cp", "ep", "expt_dp"]) if cp > 1 else groups.dp
    groups.tp_cp = grid.create_pg(["tp", "cp"]) if cp > 1 else groups.tp
    groups.expt_tp = groups.tp
    return _checked(Layout(tp, pp, dp, sequence, dist.get_rank(), groups, ep, cp))


def _checked(layout: Layout) -> Layout:
    """Return the layout if its arithmetic agrees with the groups that Megatron works with."""
    groups = layout.groups
    for group, size, rank in (
        (groups.tp, layout.tp, layout.tp_rank),
        (groups.cp, layout.cp, layout.cp_rank),
        (groups.dp, layout.dp, layout.dp_rank),
        (groups.ep, layout.ep, layout.ep_rank),
        (groups.pp, layout.pp, layout.pp_rank),
    ):
        assert (group.size(), group.rank()) == (size, rank), layout
    return layout
