"""Ranks of a test file's own, for what changes a process for good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from support.ranks import RankPool

# On a path of ranks, it makes `import transformer_engine` find the stand-in.
TRANSFORMER_ENGINE = str(Path(__file__).parent / "stand_ins")


class Apart:
    """Pools that no other file's tests run in: `run` is `ranks.run_ranks` in them.

    Args:
        path: directories that their processes import from first.
    """

    def __init__(self, *path: str):
        self.path = path
        self._pools: dict[int, RankPool] = {}

    def run(self, world_size: int, function: Callable, *args, timeout: float = 600) -> list:
        """Call `function(*args)` on every rank; return its results, by rank.

        After a failure the next call starts another pool.
        """
        if world_size not in self._pools:
            self._pools[world_size] = RankPool(world_size, self.path)
        try:
            return self._pools[world_size].run(function, args, timeout)
        except BaseException:
            self._pools.pop(world_size).kill()
            raise

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_) -> None:
        while self._pools:
            self._pools.popitem()[1].kill()
