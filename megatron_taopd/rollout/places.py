"""The places of a batch, dealt over the ranks that ask servers, through the job's store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_taopd.serving.sources import share_out

POLL_S = 0.1  # how often a rank without work looks for some


class Places:
    """The places of a batch whose responses this rank asks for.

    A rank begins with as many as its servers take at a time. The rest waits for whichever rank has
    a server free first, as it would before one pool of servers; and so does what a rank has handed
    on, since its own servers cannot do it.

    Only the rank's event loop takes and hands on. Each of that is one or two requests to the store,
    of some bytes.

    Args:
        store: of all ranks that ask.
        name: of the batch there.
        places: of the batch, those that are to be asked for.
        slots: [ranks], how many requests the servers of each take at a time.
        rank: this one.

    Attributes:
        first: places that this rank begins with.
    """

    def __init__(
        self,
        store: dist.Store,
        name: str,
        places: Sequence[int],
        slots: Sequence[int],
        rank: int,
    ):
        self._store, self._name = store, name
        begun = min(len(places), sum(slots))
        self.first: list[int] = []
        if begun:
            owner = share_out(torch.ones(begun, dtype=torch.int64), slots)
            self.first = [places[i] for i in (owner == rank).nonzero()[:, 0].tolist()]
        self._rest = places[begun:]
        self._seen = 0  # of those handed on
        self._taking = asyncio.Lock()  # one looks for all

    async def take(self, may: Callable[[], bool]) -> tuple[int, int, list] | None:
        """Wait for a place that no rank works on.

        Args:
            may: this rank can still do it.

        Returns:
            The place, the attempts at it so far, and what there is of its response, as it was
            handed on; None: this rank may not any more.
        """
        async with self._taking:
            while may():
                if self._rest:
                    if (number := self._count("taken") - 1) < len(self._rest):
                        return self._rest[number], 0, []
                    self._rest = []
                while self._seen < self._count("handed on", 0):
                    self._seen += 1
                    if self._count(f"{self._seen} taken") == 1:
                        return tuple(json.loads(self._store.get(f"{self._name}/{self._seen}")))
                await asyncio.sleep(POLL_S)
        return None

    def hand_on(self, place: int, made: int, so_far: list) -> None:
        """Leave a place to other ranks, after so many attempts, with what there is (JSON)."""
        number = self._count("handed on")
        self._store.set(f"{self._name}/{number}", json.dumps([place, made, so_far]))

    def give_up(self) -> int:
        """Note that this rank has no servers left; return how many ranks have none."""
        return self._count("given up")

    def ring(self) -> None:
        """Note that a response has come, or failed."""
        self._count("rung")

    def rung(self) -> int:
        """Return how many times any rank has rung."""
        return self._count("rung", 0)

    def _count(self, what: str, more: int = 1) -> int:
        return self._store.add(f"{self._name}/{what}", more)
