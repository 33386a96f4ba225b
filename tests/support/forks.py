"""Fork servers: processes that import once what those forked from them need.

    process = fork_context().Process(target=…)
    process.start()                               # in the fork server that all share, or
    fork_server(("stand_ins",)).start(process)    # in one that has imported from there first

Either has imported torch, Megatron and the package, and ends with the process that started it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

PRELOAD = (
    "support.uncollected",
    *("megatron_taopd.start", "megatron_taopd.preflight.check_config"),
    *("megatron_taopd.preflight.models", "transformers.models.qwen3.modeling_qwen3", "pytest"),
)
TESTS = str(Path(__file__).parents[1])


def fork_context() -> ForkServerContext:
    """The context of processes that have imported `PRELOAD`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD])
    with mock.patch.dict(os.environ, PYTHONPATH=_python_path(TESTS)):
        forkserver.ensure_running()
    return context


class ForkServer(forkserver.ForkServer):
    """A fork server beside the shared one.

    Args:
        path: directories that it imports from first, as do those that are forked from it.
    """

    def __init__(self, path: Sequence[str]):
        super().__init__()
        self.set_forkserver_preload([*PRELOAD])
        self.environment = {"PYTHONPATH": _python_path(*path, TESTS)}

    def start(self, process: BaseProcess) -> None:
        """Start a process of `fork_context` here."""
        with (
            mock.patch.dict(os.environ, self.environment),
            mock.patch.object(forkserver, "connect_to_new_process", self.connect_to_new_process),
        ):
            process.start()


@cache
def fork_server(path: tuple[str, ...]) -> ForkServer:
    """The fork server of this process with that path."""
    return ForkServer(path)


def keep_imports_frozen() -> None:
    """Spare the garbage collector what this process was forked with, for good.

    Going through a million objects takes half a second, and copies every page that they are on.
    Every run freezes its heap and unfreezes it, which would be these, too.
    """
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


def _python_path(*first: str) -> str:
    return os.pathsep.join(filter(None, (*first, os.environ.get("PYTHONPATH"))))
