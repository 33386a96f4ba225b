"""Requests to servers from a rank that does not hold their `Replicas`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

from megatron_taopd.serving.model import ServedModel
from megatron_taopd.serving.protocol import new_client
from megatron_taopd.serving.replica import Limits, Replica, Shared


class Remote:
    """Posts to servers of one model, on an event loop in a thread of its own.

    It starts and restarts none of them.

    Args:
        model: that they serve.
        api_key: asked for by all of them.
    """

    def __init__(self, model: ServedModel, api_key: str | None = None):
        self._shared = Shared(model, Limits(), False, None, new_client(api_key))
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    async def post(self, replica: Any, path: str, payload: dict, timeout: float) -> Any:
        """Call `Replica.post` of the server at `replica.url`.

        Args:
            replica: may have `workers`, the server's processes on this host.

        Raises:
            RuntimeError: with the address and the server's message.
        """
        target = Replica(replica.url, self._shared)
        target.workers = replica.workers
        return await target.post(path, payload, timeout)

    def spawn(self, coroutine: Coroutine) -> Future:
        """Start a coroutine on the event loop, from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
