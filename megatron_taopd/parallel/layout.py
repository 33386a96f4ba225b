"""Where each rank stands in a model's tensor-, pipeline- and data-parallel grid.

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
    """One model's layout. Ranks are numbered tensor first, then data, then pipeline.

    Attributes:
        tp, pp, dp: tensor-, pipeline- and data-parallel sizes; their product is the world size.
        sequence: sequence parallelism, activations cut along the sequence over the TP group.
        rank: this process.
        groups: the process groups that contain this process.
    """

    tp: int
    pp: int
    dp: int
    sequence: bool
    rank: int
    groups: ProcessGroupCollection

    def __str__(self) -> str:
        sequence = "-SP" if self.sequence else ""
        return f"TP({self.tp})-PP({self.pp})-DP({self.dp}){sequence}"

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp % self.dp

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tp * self.dp)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    def last_stage_rank(self, dp_rank, tp_rank):
        """The global rank at (dp_rank, tp_rank) of the last stage; takes ints or tensors."""
        return tp_rank + self.tp * (dp_rank + self.dp * (self.pp - 1))


def _data_parallel_size(tp: int, pp: int) -> int:
    world_size = dist.get_world_size()
    if world_size % (tp * pp):
        raise ValueError(
            f"tp {tp} × pp {pp} does not divide the world size {world_size}: start a multiple of "
            f"{tp * pp} processes or change the layout"
        )
    return world_size // (tp * pp)


def student_layout(tp: int, pp: int, sequence: bool = False, seed: int = 0) -> Layout:
    """Create Megatron's global process groups and random states for the model that trains.

    Raises:
        ValueError: tp × pp does not divide the world size.
    """
    dp = _data_parallel_size(tp, pp)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
    )
    model_parallel_cuda_manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Layout(tp, pp, dp, sequence, dist.get_rank(), groups)


def forward_layout(tp: int, pp: int, sequence: bool = False) -> Layout:
    """Create process groups for a model that only runs forward, beside those of the student.

    Raises:
        ValueError: tp × pp does not divide the world size.
    """
    dp = _data_parallel_size(tp, pp)
    grid = HyperCommGrid([tp, 1, dp, pp], ["tp", "cp", "dp", "pp"])
    groups = ProcessGroupCollection(
        tp=grid.create_pg("tp"),
        cp=grid.create_pg("cp"),
        dp=grid.create_pg("dp"),
        pp=grid.create_pg("pp"),
        # Of embedding groups, only training needs any.
        embd=None,
        pos_embd=None,
    )
    groups.dp_cp = groups.dp
    return Layout(tp, pp, dp, sequence, dist.get_rank(), groups)
