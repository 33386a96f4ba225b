"""What each rank writes and reads of a student: the parameters' elements that its optimizer owns.

Megatron's distributed optimizer gives each data-parallel rank 1/DP of a stage's elements, so of
most parameters all or nothing, and of a few a range of the flattened tensor. A range is cut into
boxes of the whole tensor, and a box is a chunk of torch's distributed checkpoints. So every rank
writes its own elements and no others, a resume on the same layout reads them again and no others,
and one on another layout reads the chunks that its own elements lie in.

Keys and shapes are those of Megatron's `fully_reshardable`, which makes whole tensors of the same
state on every rank first: each of both loads what the other has saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_taopd.models import weights
from megatron_taopd.models.student import Student
from megatron_taopd.parallel.compat.megatron_internals import owned_states

Box = tuple[tuple[int, ...], tuple[int, ...]]  # corner, sizes
_STATE = "optimizer.state"


def of_optimizer(student: Student) -> list[ShardedTensor]:
    """Describe this rank's fp32 weights and moments, 12 bytes an element that it owns.

    They are the optimizer's own memory: what is loaded into them is loaded into the optimizer.
    """
    return [
        shard
        for owned, states, whole in _owned(student)
        for name, state in states.items()
        for shard in _cut(state, owned, whole, f"{_STATE}.{name}.")
    ]


def of_average(student: Student) -> list[ShardedTensor]:
    """Describe this rank's part of the moving average of the weights, 4 bytes an element it owns.

    It is the average's own memory; nothing where none is kept.
    """
    if student.average is None:
        return []
    return [
        shard
        for (owned, _states, whole), average in zip(
            _owned(student), student.average.shards, strict=True
        )
        for shard in _cut(average, owned, whole, "average.")
    ]


def of_weights(student: Student) -> list[ShardedTensor]:
    """Describe those elements of the model's weights that this rank owns, 4 or (bf16) 2 bytes each.

    They are the model's own memory.
    """
    return [
        shard
        for owned, _states, whole in _owned(student)
        for shard in _cut(whole.data.detach().flatten()[owned], owned, whole)
    ]


def of_frozen(student: Student) -> list[ShardedTensor]:
    """Describe the weights that do not learn, which no optimizer owns: each is written once.

    They are the model's own memory, and every rank reads its part of them.
    """
    frozen = {id(p) for p in student.trunk.parameters() if not p.requires_grad}
    return [whole for data, whole in _described(student).items() if data in frozen]


def _described(student: Student) -> dict[int, ShardedTensor]:
    """Return Megatron's words for each whole parameter, by the identity of its data."""
    model = weights.without_extra_states(weights.sharded_weights(student.trunk))
    return {id(whole.data): whole for whole in model.values()}


def _owned(student: Student) -> Iterator[tuple[slice, dict[str, Tensor], ShardedTensor]]:
    """Yield what is owned of each parameter, its flat state, and Megatron's words for the whole."""
    described = _described(student)
    for distributed in student.optimizer.chained_optimizers:
        for parameter, owned, states in owned_states(distributed):
            yield owned, states, described[id(parameter)]


def _cut(
    flat: Tensor, owned: slice, whole: ShardedTensor | ShardedTensorFactory, prefix: str = ""
) -> Iterator[ShardedTensor]:
    """Cut a range of a flattened parameter into boxes.

    Args:
        flat: [owned.stop − owned.start], a value for each element of the range.
        whole: the parameter, or Megatron's recipe that makes several tensors of it: of gates and up
            projections side by side, which are apart in a checkpoint.
    """
    parts = [whole]
    if isinstance(whole, ShardedTensorFactory):
        parts = whole.build_fn(whole.key, whole.data, whole.replica_id, None)
    for part in parts:
        first = part.data.storage_offset() - whole.data.storage_offset()
        last = first + part.data.numel()
        start, stop = max(owned.start, first), min(owned.stop, last)
        lead = (1,) * part.prepend_axis_num
        for corner, sizes in boxes(start - first, stop - first, tuple(part.local_shape)):
            offset = sum(
                c * prod(part.local_shape[d + 1 :]) for d, c in enumerate(corner)
            )  # of the box in the part, which is contiguous
            begin = first + offset - owned.start
            data = flat[begin : begin + prod(sizes)].view(*lead, *sizes)
            within = (*(0 for _ in lead), *corner)
            yield ShardedTensor(
                key=prefix + part.key,
                data=data,
                dtype=data.dtype,
                local_shape=tuple(data.shape),
                global_shape=part.global_shape,
                global_offset=tuple(a + b for a, b in zip(part.global_offset, within, strict=True)),
                axis_fragmentations=None,  # of any sizes
                replica_id=(*part.replica_id[:2], 0),  # (PP, TP, DP), and DP has no replicas
                allow_shape_mismatch=part.allow_shape_mismatch,
            )


def boxes(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """Cut the elements start ≤ i < stop of a tensor, row by row, into boxes, in that order.

    These are whole rows in the middle, and at both ends what a row is cut into: at most
    2 · len(shape) − 1.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first <= last:
        yield from _in_row(first - 1, start, first * row, shape)
        if first < last:
            yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
        start = last * row
    yield from _in_row(last, start, stop, shape)


def _in_row(index: int, start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Box]:
    row = prod(shape[1:])
    for corner, sizes in boxes(start - index * row, stop - index * row, shape[1:]):
        yield (index, *corner), (1, *sizes)
