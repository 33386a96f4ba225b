"""What rank 0 does for all: done once, and what comes of it, errors included, on every rank."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch.distributed as dist
from support.ranks import run_ranks

from megatron_taopd.parallel.objects import on_rank_0


class Late(Exception):
    """No ValueError."""


def outcome(raised: type[Exception] | None, in_future: bool) -> tuple[str, object, int]:
    """What `on_rank_0` does of a work: (kind, result or message, how often it was done here)."""
    times = []

    def work():
        times.append(1)
        if not in_future:
            if raised is not None:
                raise raised("why")
            return dist.get_rank()
        future: Future = Future()
        if raised is None:
            future.set_result(dist.get_rank())
        else:
            future.set_exception(raised("why"))
        return future

    try:
        return "result", on_rank_0(work), len(times)
    except Exception as error:
        return type(error).__name__, str(error), len(times)


@pytest.mark.parametrize("in_future", [False, True])
@pytest.mark.parametrize(
    ("raised", "kind"),
    [(None, "result"), (ValueError, "ValueError"), (Late, "RuntimeError"),
     (TimeoutError, "RuntimeError")],
)  # fmt: skip
def test_all_ranks_have_what_one_did_once(raised, kind, in_future):
    """A time-out that the work raises is its error: it is no reason to wait, or to do it again."""
    first, second = run_ranks(2, outcome, raised, in_future)
    assert first == (kind, 0 if raised is None else "why", 1)
    assert second == (*first[:2], 0)
