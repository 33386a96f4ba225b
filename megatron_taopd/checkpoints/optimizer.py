"""The state of the distributed optimizer that is not sharded: its counts of updates.

Megatron saves the count of torch's Adam, but gives all parameters one shared `step` tensor when it
loads, which every one of them increments. This module repairs that. (Apex's and TransformerEngine's
Adam keep `step` elsewhere and need none of it.) `shards` has the state that is sharded.
"""

from __future__ import annotations

import torch

from megatron_taopd.models.student import Student
from megatron_taopd.parallel.compat.megatron_internals import allocate_moments, publish_masters


def allocate(student: Student) -> None:
    """Make zero moments before the first update, so that there is something to load or save."""
    (distributed,) = student.optimizer.chained_optimizers
    allocate_moments(distributed)
    if isinstance(distributed.optimizer, torch.optim.AdamW):
        for parameter_state in distributed.optimizer.state.values():
            parameter_state.setdefault("step", torch.zeros((), dtype=torch.float32))


def go_on_from(student: Student, state: dict) -> None:
    """Go on from the fp32 weights and moments that were loaded into the optimizer.

    Args:
        state: the rest of the optimizer's, as `state_dict` had it.

    Collectives: an all-gather of the weights over the data-parallel ranks, of the bytes of the
    stage's buffer, as after every step.
    """
    (distributed,) = student.optimizer.chained_optimizers
    # The updates so far: a float where torch's Adam has saved them. The others' kernels want an
    # integer, and they have none before the first update.
    for group in state["optimizer"]["param_groups"]:
        group["step"] = int(group.get("step", 0))
    student.optimizer.load_state_dict(state)
    if isinstance(distributed.optimizer, torch.optim.AdamW):
        for parameter_state in distributed.optimizer.state.values():
            parameter_state["step"] = parameter_state["step"].clone()
    publish_masters(distributed)
    student.model.start_param_sync(force_sync=True)
