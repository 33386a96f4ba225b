"""A rollout engine of which only the order of a push of weights is of interest."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from megatron_taopd.rollout.sglang import SGLangEngine, Updates


def engine_that_pushes(push: Callable[[], object], releases: bool) -> SGLangEngine:
    """An engine with one server, which takes all it is asked to.

    Args:
        push: called in place of sending the weights.
        releases: servers give their memory back between rollouts.
    """

    def take(*_) -> dict[str, str]:
        push()
        return {}  # none has failed

    sync = SimpleNamespace(push=take)
    server = SimpleNamespace(url="http://a", version=1)
    replicas = SimpleNamespace(
        live=[server],
        all=[server],
        ready=[server],
        run=lambda found: found,
        begin_update=lambda targets: targets,
        commit_update=lambda targets, version: None,
        leave_out=lambda troubles: [],
    )
    model = SimpleNamespace(vocab_size=8)
    return SGLangEngine(replicas, model, 8, [1], Updates(sync, list, release_memory=releases))
