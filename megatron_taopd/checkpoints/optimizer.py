"""The state of the distributed optimizer, where Megatron does not load what it has saved.

Megatron's distributed optimizer saves the state of torch's Adam but does not load it: it looks for
Adam's `step` among the sharded tensors, where it is not, and then gives all parameters one shared
`step` tensor, which every one of them increments. This module repairs that. (Apex's and
TransformerEngine's Adam keep `step` elsewhere and need none of it.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_taopd.models.student import Student
from megatron_taopd.parallel.compat.megatron_internals import allocate_moments, load_with


def allocate(student: Student) -> None:
    """Make zero moments before the first update, so that there is something to load or save."""
    (distributed,) = student.optimizer.chained_optimizers
    allocate_moments(distributed)
    if isinstance(distributed.optimizer, torch.optim.AdamW):
        for parameter_state in distributed.optimizer.state.values():
            parameter_state.setdefault("step", torch.zeros((), dtype=torch.float32))


def load(student: Student, state: dict) -> None:
    """Put the optimizer into a state that `dist_checkpointing.load` has read."""
    (distributed,) = student.optimizer.chained_optimizers
    # The updates so far: a float where torch's Adam has saved them. The others' kernels want an
    # integer, and they have none before the first update.
    for group in state["optimizer"]["param_groups"]:
        group["step"] = int(group.get("step", 0))
    if not isinstance(distributed.optimizer, torch.optim.AdamW):
        student.optimizer.load_state_dict(state)
        return
    load_with(distributed, _set_state)
    student.optimizer.load_state_dict(state)
    for parameter_state in distributed.optimizer.state.values():
        parameter_state["step"] = parameter_state["step"].clone()


def _set_state(targets: dict[str, Tensor], loaded: dict[str, Tensor]) -> None:
    for name, tensor in loaded.items():
        targets[name].copy_(tensor)
