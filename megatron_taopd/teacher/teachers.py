"""All teachers of a run: each reads the sequences that are routed to it, by its own vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.data.batching import Placement
from megatron_taopd.data.vocab_map import VocabMap
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.exchange import RowShard
from megatron_taopd.parallel.layout import Layout
from megatron_taopd.teacher.dispatch import ReadRows, dispatch
from megatron_taopd.types import RolloutBatch, Sequences

# Of each teacher by its number: places in the batch, and what it made of the sequences there.
Parts = dict[int, list[tuple[Tensor, ReadRows]]]


class Teacher(Protocol):
    """A model that reads: `teacher.megatron` and `teacher.sglang`."""

    layout: object  # which a person reads

    @property
    def longest_sequence(self) -> int: ...

    @property
    def offloaded_bytes(self) -> int: ...

    def resident(self) -> AbstractContextManager: ...

    def read(self, sequences: Sequences) -> ReadRows: ...

    def fingerprint(self) -> int: ...

    def metrics(self) -> dict[str, float]: ...

    def close(self) -> None: ...


class Inputs(NamedTuple):
    """What a teacher reads of a batch.

    Attributes:
        teacher: its number.
        places: [n] int64, the batch's sequences that are routed to it.
        sequences: these, in its ids.
        metrics: of `VocabMap.read`.
    """

    teacher: int
    places: Tensor
    sequences: Sequences
    metrics: dict[str, float]


def inputs_metrics(inputs: Sequence[Inputs]) -> dict[str, float]:
    """Return the metrics of `VocabMap.read` of a whole batch."""
    rows = sum(each.sequences.num_rows for each in inputs)
    shared = sum(each.metrics["teacher/shared_tokens"] * each.sequences.num_rows for each in inputs)
    cut = sum(each.metrics["teacher/cut_spellings"] for each in inputs)
    return {"teacher/shared_tokens": shared / max(rows, 1), "teacher/cut_spellings": cut}


@dataclass
class Teachers:
    """The teachers of a run by name, numbered in their order, and which prompt is whose.

    Attributes:
        engines: of each, which runs it.
        vocab_maps: from the student's ids to those of each.
        prompts: the token ids of each prompt of the data as its own teacher reads it; None where
            they are the student's.
        of_prompt: [P] int64, the number of each prompt's teacher; None: there is one teacher.
    """

    engines: Mapping[str, Teacher]
    vocab_maps: Mapping[str, VocabMap]
    prompts: Sequence[Sequence[int]] | None = None
    of_prompt: Tensor | None = None

    def __post_init__(self) -> None:
        self.in_turn = self._largest_first()

    def __getitem__(self, number: int) -> Teacher:
        return [*self.engines.values()][number]

    def _largest_first(self) -> list[int]:
        """Number the offloaded trunks that have to take turns, the largest first.

        What has been read stays while others read, so that the largest trunk is there when the
        fewest rows are. A single one has no turn to wait for.

        Collectives: with several offloaded teachers, an all-reduce of 8 bytes each.
        """
        sizes = torch.tensor([engine.offloaded_bytes for engine in self.engines.values()])
        offloaded = sizes.nonzero()[:, 0].tolist()
        if len(offloaded) < 2:
            return []
        sizes = sizes.to(platform.device())
        dist.all_reduce(sizes, op=dist.ReduceOp.MAX)  # stages differ, and all ranks need one order
        return sorted(offloaded, key=lambda number: (-int(sizes[number]), number))

    # -- what is whose -------------------------------------------------------------------------

    def routed(self, batch: RolloutBatch) -> RolloutBatch:
        """Return a batch that says whose each sequence is; of one teacher, as it is."""
        if self.of_prompt is None:
            return batch
        return replace(batch, teachers=self.of_prompt[batch.prompts])

    def inputs(self, batch: RolloutBatch) -> list[Inputs]:
        """Return what each teacher reads of a batch, of those to which any of it is routed.

        Raises:
            RuntimeError: as `VocabMap.read`.
        """
        batch, found = self.routed(batch), []
        for number, (engine, vocab_map) in enumerate(
            zip(self.engines.values(), self.vocab_maps.values(), strict=True)
        ):
            own, places = batch, torch.arange(batch.num_sequences)
            if batch.teachers is not None:
                places = (batch.teachers == number).nonzero()[:, 0]
                own = batch.only(places)
            if len(places):
                read = vocab_map.read(own, self.prompts, engine.longest_sequence)
                found.append(Inputs(number, places, *read))
        return found

    # -- reading -------------------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Read a batch in the block, whole or in parts (`Reading`).

        The weights of teachers that take turns come when it is their turn, after the last part;
        those of all others are `resident` during the block.
        """
        with ExitStack() as stack:
            for number, engine in enumerate(self.engines.values()):
                if number not in self.in_turn:
                    stack.enter_context(engine.resident())
            yield Reading(self)

    def dispatch(
        self, parts: Parts, batch: RolloutBatch, student: Layout, scorers: Placement
    ) -> dict[int, RowShard]:
        """Send each teacher's rows to the ranks that score them: by its number (`dispatch`)."""
        return {
            number: dispatch(parts[number], batch, student, scorers) for number in sorted(parts)
        }

    # -- what the run asks ---------------------------------------------------------------------

    def fingerprints(self) -> dict[str, int]:
        """Return `Teacher.fingerprint` of each by name."""
        return {name: engine.fingerprint() for name, engine in self.engines.items()}

    def metrics(self) -> dict[str, float]:
        """Return what the log says of their work since the last call; of several, by name."""
        if len(self.engines) == 1:
            return self[0].metrics()
        return {
            key.replace("teacher/", f"teacher/{name}/"): value
            for name, engine in self.engines.items()
            for key, value in engine.metrics().items()
        }

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


class Reading:
    """A batch on its way through the teachers: its sequences come in, their rows stay.

    Args:
        teachers: `Teachers.reading` makes the weights ready.
    """

    def __init__(self, teachers: Teachers):
        self.teachers = teachers
        self.parts: Parts = {}
        self.waiting: list[tuple[Tensor, Inputs]] = []  # for a teacher's turn

    @torch.no_grad()
    def take(self, places: Tensor, batch: RolloutBatch) -> None:
        """Have sequences read, or put them by for the turn of their teacher.

        Args:
            places: [n] int64, of these sequences in the whole batch.

        Collectives: the teachers'.
        """
        for each in self.teachers.inputs(batch):
            own = places[each.places]
            if each.teacher in self.teachers.in_turn:
                self.waiting.append((own, each))
            else:
                self._read(own, each)

    @torch.no_grad()
    def finish(self) -> Parts:
        """Have those read that wait for a turn; return what the teachers made of the batch."""
        for number in self.teachers.in_turn:
            own = [(places, each) for places, each in self.waiting if each.teacher == number]
            if own:
                with self.teachers[number].resident():
                    for places, each in own:
                        self._read(places, each)
        self.waiting = []
        return self.parts

    def _read(self, places: Tensor, inputs: Inputs) -> None:
        rows = self.teachers[inputs.teacher].read(inputs.sequences)
        self.parts.setdefault(inputs.teacher, []).append((places, rows))
