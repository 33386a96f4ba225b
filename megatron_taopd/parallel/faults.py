"""What is wrong with a step, found by some ranks and raised by all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_taopd.parallel.objects import gather

MOST_NAMED = 5  # ranks, sequences or parameters in one line


class Fault(Exception):
    """What is wrong with a step; every rank raises the same one.

    Args:
        what: "the loss is not finite".
        ranks: global ranks on which it was seen.
        sequences: of the batch.
        key: of the configuration, if that is what to look at: the run says so once, not each time.
    """

    def __init__(
        self,
        what: str,
        ranks: Sequence[int] = (),
        sequences: Sequence[int] = (),
        key: str | None = None,
    ):
        super().__init__(what)
        self.what, self.ranks, self.sequences, self.key = what, ranks, sequences, key

    def describe(self, prompts: Tensor | None = None) -> str:
        """Return one line; prompts: [N] int64, the prompt of each sequence of the batch."""
        places = []
        if self.ranks:
            places.append(listed("rank", self.ranks))
        if self.sequences:
            indices = [int(prompts[i]) for i in self.sequences]
            places.append(f"{listed('sequence', self.sequences)} ({listed('prompt', indices)})")
        return f"{self.what}: {', '.join(places)}" if places else self.what


def listed(noun: str, values: Sequence) -> str:
    """Write "rank 3" or "ranks 0, 3 and 7 more": at most MOST_NAMED values by name."""
    text = ", ".join(map(str, values[:MOST_NAMED]))
    more = f" and {len(values) - MOST_NAMED} more" if len(values) > MOST_NAMED else ""
    return f"{noun}{'s' if len(values) > 1 else ''} {text}{more}"


def by_rank(found: Sequence) -> dict[int, list]:
    """Return, on every rank, what each rank has found that has found something.

    Collectives: an all-gather of the pickled objects; for the path that hardly any step takes.
    """
    return {rank: values for rank, values in enumerate(gather(list(found))) if values}
