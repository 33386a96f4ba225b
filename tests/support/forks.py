"""Fork servers: processes that import once what those forked from them need.

context = fork_context()                    # the one that all share, with Megatron and the rest
context.Process(target=…).start()

ForkServer(("somewhere",), PRELOAD).start(context.Process(target=…))     # one with another path
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from unittest import mock

PRELOAD = (
    *("megatron_taopd.start", "megatron_taopd.preflight.check_config"),
    *("megatron_taopd.preflight.models", "transformers.models.qwen3.modeling_qwen3", "pytest"),
)


def fork_context() -> ForkServerContext:
    """The context of processes that have imported `PRELOAD`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD])
    return context


class ForkServer(forkserver.ForkServer):
    """A fork server beside the shared one; it ends with this process.

    Args:
        path: directories that it imports from first, as do those that are forked from it.
        preload: modules.
        environment: variables that it has besides, likewise.
    """

    def __init__(
        self,
        path: Sequence[str],
        preload: Sequence[str],
        environment: Mapping[str, str] | None = None,
    ):
        super().__init__()
        self.set_forkserver_preload([*preload])
        found = os.pathsep.join(filter(None, (*path, os.environ.get("PYTHONPATH"))))
        self.environment = {**(environment or {}), "PYTHONPATH": found}

    def start(self, process: BaseProcess) -> None:
        """Start a process of `fork_context` here."""
        with (
            mock.patch.dict(os.environ, self.environment),
            mock.patch.object(forkserver, "connect_to_new_process", self.connect_to_new_process),
        ):
            process.start()


@cache
def fork_server(path: tuple[str, ...]) -> ForkServer:
    """The fork server of this process that has imported `PRELOAD` with that path."""
    return ForkServer(path, PRELOAD)


def keep_imports_frozen() -> None:
    """Spare the garbage collector what this process was forked with, for good.

    Going through a million objects takes half a second, and copies every page that they are on.
    Every run freezes its heap and unfreezes it, which would be these, too.
    """
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None
