"""Everything that moves a run, saved atomically and resumed on any layout.

A checkpoint is a directory `step_00000050/` in Megatron's distributed format: the model, the
distributed optimizer's state, the learning-rate schedule and the run's counters, and beside them
the model's config and tokenizer, so that it converts to Hugging Face by itself. It is written under
another name and renamed when whole, so that every directory of that name is complete.
"""

from __future__ import annotations

import queue
import re
import shutil
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor

from megatron_taopd.models.hf_checkpoint import copy_side_files
from megatron_taopd.models.megatron_checkpoint import SIDE_FILES
from megatron_taopd.student import Student

_OPTIMIZER = {"distrib_optim_sharding_type": "fully_reshardable"}


def path(directory: str | Path, step: int) -> Path:
    return Path(directory) / f"step_{step:08d}"


def steps(directory: str | Path) -> list[int]:
    """The steps of the complete checkpoints in a directory, ascending."""
    names = (entry.name for entry in Path(directory).glob("step_*"))
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step_(\d+)", name)))


def save(directory: str | Path, step: int, student: Student, state: dict, keep: int) -> Path:
    """Save the run after `step` steps, then delete all but the newest `keep` checkpoints.

    A checkpoint of that step that is there already is left as it is.

    Args:
        state: what the run needs besides the student; ints, floats and strings, equal on all ranks.

    Collectives: gathers of the optimizer state to data-parallel rank 0, and barriers.
    """
    final = path(directory, step)
    if final.exists():
        return final
    aside = final.with_name(final.name + ".incomplete")
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    sharded = _sharded_state(student, loading=False)
    # Saves are synchronous: results come back inside this process, for which Megatron would start a
    # manager process that imports everything anew.
    filesystem_async._results_queue = queue.Queue()
    sharded["run"] = {**state, "step": step, "rng": _random_states()}
    dist_checkpointing.save(sharded, str(aside), content_metadata=_OPTIMIZER)
    dist.barrier()
    if dist.get_rank() == 0:
        (aside / SIDE_FILES).mkdir()
        copy_side_files(student.hf_dir, aside / SIDE_FILES, [student.dtype])
        aside.rename(final)
        for old in steps(directory)[:-keep]:
            shutil.rmtree(path(directory, old))
    dist.barrier()
    return final


def load(directory: str | Path, step: int, student: Student) -> dict:
    """Put the student into the state of a checkpoint; return the `state` it was saved with.

    The layout may differ from the one that saved. Random states come back where the world size is
    the same; nothing that a step draws depends on them.
    """
    _allocate_optimizer_state(student)
    sharded = _sharded_state(student, loading=True)
    folder = str(path(directory, step))
    loaded = dist_checkpointing.load(sharded, folder, get_default_load_sharded_strategy(folder))
    student.trunk.load_state_dict(loaded["model"])
    _load_optimizer(student, loaded["optimizer"])
    student.scheduler.load_state_dict(loaded["scheduler"])
    run = loaded["run"]
    if len(run["rng"]) == dist.get_world_size():
        torch.set_rng_state(run["rng"][dist.get_rank()])
    return {key: value for key, value in run.items() if key != "rng"}


def _sharded_state(student: Student, loading: bool) -> dict:
    model = student.trunk.sharded_state_dict(metadata={"dp_cp_group": student.layout.groups.dp_cp})
    return {
        "model": model,
        "optimizer": student.optimizer.sharded_state_dict(
            model, is_loading=loading, metadata=_OPTIMIZER
        ),
        "scheduler": student.scheduler.state_dict(),
    }


def _random_states() -> list[Tensor]:
    states: list = [None] * dist.get_world_size()
    dist.all_gather_object(states, torch.get_rng_state())
    return states


# Megatron's distributed optimizer saves the state of torch's Adam but does not load it: it looks
# for Adam's `step` among the sharded tensors, where it is not, and then gives all parameters one
# shared `step` tensor, which every one of them increments. The three functions below repair that.
# (Apex's and TransformerEngine's Adam keep `step` elsewhere and need none of it.)


def _allocate_optimizer_state(student: Student) -> None:
    """Zero moments, so that there is something to load into before the first step."""
    (distributed,) = student.optimizer.chained_optimizers
    distributed.init_state_fn(distributed.optimizer, distributed.config)
    if isinstance(distributed.optimizer, torch.optim.AdamW):
        for parameter_state in distributed.optimizer.state.values():
            parameter_state.setdefault("step", torch.zeros((), dtype=torch.float32))


def _load_optimizer(student: Student, state: dict) -> None:
    (distributed,) = student.optimizer.chained_optimizers
    if not isinstance(distributed.optimizer, torch.optim.AdamW):
        student.optimizer.load_state_dict(state)
        return
    distributed._set_main_param_and_optimizer_states = partial(_set_state, distributed)
    student.optimizer.load_state_dict(state)
    for parameter_state in distributed.optimizer.state.values():
        parameter_state["step"] = parameter_state["step"].clone()


@torch.no_grad()
def _set_state(distributed, parameter: Tensor, tensors: dict[str, Tensor]) -> None:
    group, order = distributed.model_param_group_index_map[parameter]
    main = distributed.optimizer.param_groups[group]["params"][order]
    targets = {"param": main, **distributed.optimizer.state[main]}
    for name, tensor in tensors.items():
        targets[name].copy_(tensor)
