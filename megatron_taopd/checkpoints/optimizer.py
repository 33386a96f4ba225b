"""The state of the distributed optimizers that is not sharded: their count of updates.

Experts, which fewer ranks share, have an optimizer of their own; both count alike.

Torch's Adam keeps it with every parameter, Apex's and TransformerEngine's in the parameter groups.
Megatron saves it, but its loader gives all parameters of torch's Adam one shared tensor, which
every one of them increments, replaces learning rates and all other settings by a checkpoint's, and
since version 0.19 refuses others than these. So the count is put back here, and settings stay those
of the configuration. `shards` has the state that is sharded.
"""

from __future__ import annotations

import torch

from megatron_taopd.models.student import Student
from megatron_taopd.parallel.compat.megatron_internals import allocate_moments, publish_masters


def allocate(student: Student) -> None:
    """Make zero moments before the first update, so that there is something to load or save."""
    for distributed in student.optimizer.chained_optimizers:
        allocate_moments(distributed)
        if isinstance(distributed.optimizer, torch.optim.AdamW):
            for parameter_state in distributed.optimizer.state.values():
                parameter_state.setdefault("step", torch.zeros((), dtype=torch.float32))


def settings(student: Student) -> dict:
    """Return the count of updates and the settings, as the first optimizer has them."""
    return student.optimizer.chained_optimizers[0].state_dict()


def go_on_from(student: Student, state: dict) -> None:
    """Go on from the fp32 weights and moments that were loaded into the optimizer.

    Args:
        state: the rest of the optimizer's, as `settings` had it.

    Collectives: an all-gather of the weights over the data-parallel ranks, of the bytes of the
    stage's buffer, as after every step.
    """
    # A float where torch's Adam has saved it, the same in each group. The others' kernels want an
    # integer, and they have none before the first update.
    updates = int(state["optimizer"]["param_groups"][0].get("step", 0))
    for distributed in student.optimizer.chained_optimizers:
        if isinstance(distributed.optimizer, torch.optim.AdamW):
            for parameter_state in distributed.optimizer.state.values():
                parameter_state["step"] = torch.tensor(float(updates))
        else:
            for group in distributed.optimizer.param_groups:
                group["step"] = updates
        publish_masters(distributed)
    student.model.start_param_sync(force_sync=True)
