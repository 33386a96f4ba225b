"""Small objects told from rank to rank, pickled. One process alone needs no process group.

Tensors do not go this way: parallel/exchange.py.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_taopd.parallel import watchdog
from megatron_taopd.parallel.compat.torch_internals import default_store

SIGN_OF_LIFE_S = 30.0  # the longest that the ranks hear nothing from one that works for all

T = TypeVar("T")


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list:
    """Return what every rank of the group says, by rank, on every rank of it.

    Collectives: an all-gather of the sizes, one of the pickled values.
    """
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: Any, src: int = 0, group: dist.ProcessGroup | None = None) -> Any:
    """Return what global rank `src` says, on every rank of the group; other values do not count.

    Collectives: a broadcast of the size, one of the pickled value.
    """
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=src, group=group)
    return values[0]


def comes_first(where: str) -> bool:
    """Tell whether this is the first rank at this place: what several find, one should say.

    Not a collective, since others may be stuck in one, or dead: it counts in the group's store.
    """
    if not dist.is_initialized():
        return True
    return default_store().add(where, 1) == 1


def anyone_was(where: str) -> bool:
    """Tell whether a rank has called `comes_first` here. No collective."""
    return dist.is_initialized() and default_store().add(where, 0) > 0


def on_rank_0(
    work: Callable[[], T | Future[T]], group: dist.ProcessGroup | None = None, tell: bool = True
) -> T:
    """Do the work on global rank 0 alone, and give every rank of the group what comes of it.

    Args:
        work: returns the result, or a future of it. While a future is not done, the ranks hear of
            it every SIGN_OF_LIFE_S and count that as a heartbeat, so that neither a collective's
            timeout nor the watchdog ends them.
        tell: send the result; without, the other ranks get None and only errors are shared.

    Raises:
        ValueError, RuntimeError: what the work raised, on every rank: a ValueError as one, anything
            else as a RuntimeError.

    Collectives: those of `broadcast_object`, once and for every sign of life; without a process
    group none.
    """
    if not dist.is_initialized():
        result = work()
        return result.result() if isinstance(result, Future) else result
    result: Any = None
    cause: Exception | None = None
    pending: Future[T] | None = None
    leads = dist.get_rank() == 0
    while True:
        word: tuple[str, Any] | None = None
        if leads:
            try:
                if pending is None:
                    result = work()
                    pending = result if isinstance(result, Future) else None
                if pending is not None and not wait([pending], SIGN_OF_LIFE_S).done:
                    word = "wait", None
                else:
                    result = result if pending is None else pending.result()
                    word = "done", result if tell else None
            except Exception as error:
                kind = "ValueError" if isinstance(error, ValueError) else "RuntimeError"
                cause, word = error, (kind, str(error) or repr(error))
        state, value = broadcast_object(word, group=group)
        if state == "done":
            return result if leads else value
        if state != "wait":
            raise (ValueError if state == "ValueError" else RuntimeError)(value) from cause
        watchdog.heartbeat()


def first_rank_of_node() -> int:
    """Return the first rank of this rank's node, as the launcher has numbered them."""
    rank = dist.get_rank()
    return rank - min(int(os.environ.get("LOCAL_RANK", rank)), rank)


def once_per_node(work: Callable[[], T]) -> T:
    """Do the work on the first rank of every node, and give it to the others there.

    Meanwhile the ranks hear of it every SIGN_OF_LIFE_S, as in `on_rank_0`.

    Raises:
        ValueError, RuntimeError: see `of_all_ranks`.

    Collectives: those of `of_all_ranks`; without a process group none.
    """
    if not dist.is_initialized():
        return work()
    first = first_rank_of_node()
    pending = in_background(work) if first == dist.get_rank() else None
    return of_all_ranks(pending)[first]


def of_all_ranks(pending: Future | None, group: dist.ProcessGroup | None = None) -> list:
    """Wait for what some ranks do in the background, and return it by rank, on every rank.

    Meanwhile the ranks hear of it every SIGN_OF_LIFE_S, as in `on_rank_0`.

    Args:
        pending: this rank's work; None: it has none, which gives None.

    Raises:
        ValueError, RuntimeError: what the work raised on the first rank that failed, on every rank:
            a ValueError as one, anything else as a RuntimeError. Others' work goes on.

    Collectives: those of `gather`, once and for every sign of life; without a process group none.
    """
    while True:
        word: tuple[str, Any] = "done", None
        if pending is not None:
            if not wait([pending], SIGN_OF_LIFE_S).done:
                word = "wait", None
            elif (error := pending.exception()) is None:
                word = "done", pending.result()
            else:
                kind = "ValueError" if isinstance(error, ValueError) else "RuntimeError"
                word = kind, str(error) or repr(error)
        words = gather(word, group)
        for state, value in words:
            if state not in ("done", "wait"):
                cause = pending.exception() if pending is not None and pending.done() else None
                raise (ValueError if state == "ValueError" else RuntimeError)(value) from cause
        if all(state == "done" for state, _ in words):
            return [value for _, value in words]
        watchdog.heartbeat()


def in_background(function: Callable[[], Any]) -> Future:
    """Run a function in a thread that nobody has to wait for, not even the end of the process."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
