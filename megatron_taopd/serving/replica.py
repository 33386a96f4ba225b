"""One server of a pool: what is known of it, and requests to it."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from asyncio import FIRST_COMPLETED
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import httpx
import numpy as np

from megatron_taopd.parallel import visible
from megatron_taopd.serving import identity
from megatron_taopd.serving.answers import Answer, answer_of
from megatron_taopd.serving.model import ServedModel
from megatron_taopd.serving.protocol import (
    CONTROL_TIMEOUT_S,
    Failed,
    Unreachable,
    body_of,
    message_of,
)
from megatron_taopd.serving.server import Server, Workers

# How often a server that has not answered yet is looked at, and how long a connection may take: its
# kernel makes that, however busy the server is. A packet that gets lost is sent again after 1 s.
PULSE_S, CONNECT_S = 2.0, 2.0


class State(Enum):
    """What a replica can be asked for."""

    READY = "ready"
    STALE = "stale"  # runs, and waits to be given the current weights
    DOWN = "down"  # being looked at, restarted, or tried again from time to time
    DEAD = "dead"  # given up


@dataclass
class Limits:
    """The limits of a pool: how much its servers are asked for, and how long they may take.

    Attributes:
        concurrency: requests at a time, per replica.
        timeout_s: of one request.
        attempts: per request, on whichever replica.
        health_every_s, health_timeout_s: how often a replica is looked at, and how long it may take
            to answer; it may miss that once.
        patience_s: before a replica that is not ours is given up.
        start_timeout_s: how long one that is not ours, but perhaps still loading, may not listen.
    """

    concurrency: int = 64
    timeout_s: float = 1800.0
    attempts: int = 4
    health_every_s: float = 5.0
    health_timeout_s: float = 30.0
    patience_s: float = 600.0
    start_timeout_s: float = 0.0


@dataclass
class Shared:
    """The values that the replicas of one pool share. Only the pool's event loop changes it.

    Attributes:
        fixed_weights: the servers' own weights are the right ones.
        dtype: that weights and activations should have, as SGLang names it; None: any.
        http: carries all requests.
        changed: notified when the state or the load of a replica changes.
        counts: of retries, timeouts and restarts since they were last taken.
        reference: with fixed weights, a replica that has them and what it said of the probe's
            tokens.
    """

    model: ServedModel
    limits: Limits
    fixed_weights: bool
    dtype: str | None
    http: httpx.AsyncClient
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    counts: Counter[str] = field(default_factory=Counter)
    reference: tuple[Replica, np.ndarray] | None = None


class Replica:
    """One server. Only the event loop of `Replicas` changes it.

    Attributes:
        start: starts it anew; None: it is not ours.
        tp: its tensor parallelism; dtype: of its weights and activations, as SGLang names it.
        tokens, requests: outstanding, prompt and longest response; their requests.
        version: of the weights that it was given last.
        reported: what somebody else's server calls its weights.
        raw_logprobs: output log-probabilities are those at temperature 1.
        remarks: what a user should know of how it was started.
        generation: counts its losses, to tell what was sent before one from what was sent after.
        syncing: it is being given weights, and may not answer for a while.
        fell_out: how many times in a row it was to be given weights and was not.
        trouble: what happened last.
        tasks: requests under way, which its loss cancels.
        errands: that nobody waits for; an event loop itself holds only a weak reference.
        alarm: set when it should be looked at.
    """

    def __init__(self, source: str | Callable[[], Server], shared: Shared):
        self.start = None if isinstance(source, str) else source
        self._url = source.rstrip("/") if isinstance(source, str) else None
        self.shared = shared
        self.server: Server | None = None
        self.workers: Workers | None = None  # of a server that another rank has started here
        self.tp, self.dtype = 1, "auto"
        self.state = State.DOWN
        self.tokens = self.requests = 0
        self.version: int | None = None
        self.reported: str | None = None
        self.raw_logprobs = True
        self.remarks: list[str] = []
        self.generation = 0
        self.syncing = False
        self.fell_out = 0
        self.trouble = "has not started"
        self.tasks: set[asyncio.Task] = set()
        self.errands: set[asyncio.Task] = set()
        self.alarm = asyncio.Event()

    @property
    def url(self) -> str:
        return self._url or self.server.url

    @property
    def alive(self) -> bool:
        """Tell whether it can be given weights."""
        return self.state in (State.READY, State.STALE)

    @property
    def gpus(self) -> list[visible.Name]:
        """List the devices that our own server runs on, by tensor-parallel rank."""
        return (visible.names(self.server.environment) or [*range(self.tp)])[: self.tp]

    @property
    def has_weights(self) -> bool:
        """Tell whether it has, if it runs, what it was given last."""
        if self.shared.fixed_weights or self.server is not None:
            return self.version is not None
        return self.reported == str(self.version)

    def stop(self, grace_s: float = 10) -> None:
        """End our own server. Blocks until none of its processes is left."""
        if self.server.alive:  # its supervisor may have been stopped with it, and would not hear
            os.kill(self.server.pid, signal.SIGCONT)
        self.server.stop(grace_s)

    # Requests

    async def fetch(self, path: str) -> httpx.Response:
        """Return whatever it answers a GET with.

        Raises:
            RuntimeError: there is no answer.
        """
        url, timeout_s = self.url + path, self.shared.limits.health_timeout_s
        try:
            return await asyncio.wait_for(self.shared.http.get(url), timeout_s)
        except TimeoutError:
            raise RuntimeError(f"{url}: no answer within {timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise RuntimeError(f"{url}: {error!r}") from error

    async def connect(self) -> None:
        """Make a new connection and close it: packets to a host that is gone, or from it, get lost.

        Raises:
            RuntimeError: there is none within CONNECT_S.
        """
        url = httpx.URL(self.url)
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(url.host, port), CONNECT_S)
            writer.close()
        except TimeoutError:
            raise RuntimeError(f"{self.url}: no connection within {CONNECT_S:g} s") from None
        except OSError as error:
            raise RuntimeError(f"{self.url}: {error!r}") from error

    async def get(self, path: str) -> dict:
        """Return the JSON that it answers a GET with.

        Raises:
            RuntimeError: it does not answer, or refuses.
        """
        return body_of(self.url + path, await self.fetch(path))

    async def post(self, path: str, payload: dict, timeout: float = CONTROL_TIMEOUT_S) -> Any:
        """Return the JSON (else text) that it answers a POST with; no retries.

        A replica that cannot answer any more, because it is dead, stopped or out of reach, is not
        waited for.

        Raises:
            Unreachable: there is no answer.
            RuntimeError: it refuses; with the address and the server's message.
        """
        url = self.url + path
        request = asyncio.ensure_future(self.shared.http.post(url, json=payload))
        loss = asyncio.ensure_future(self._until_lost())
        try:
            await asyncio.wait({request, loss}, timeout=timeout, return_when=FIRST_COMPLETED)
            if request.done():
                return body_of(url, request.result())
            why = loss.result() if loss.done() else f"no answer within {timeout:g} s"
            raise Unreachable(f"{url}: {why}")
        except httpx.TransportError as error:
            raise Unreachable(f"{url}: {error!r}") from error
        finally:
            request.cancel()
            loss.cancel()

    async def _until_lost(self) -> str:
        """Return, once it has twice in a row shown no sign of life, what is missing.

        The scheduler may be busy with the very request that is waited for: nothing is asked of it.
        """
        missed = 0
        while missed < 2:
            await asyncio.sleep(PULSE_S)
            trouble = None
            try:
                await self.connect()
                await self.fetch("/model_info")
            except RuntimeError as error:
                trouble = str(error)
            if (watched := self.server or self.workers) is not None:
                trouble = await asyncio.to_thread(watched.trouble) or trouble
            missed = 0 if trouble is None else missed + 1
        return f"the server is lost: {trouble}"

    async def generate(self, request: dict) -> Answer:
        """Return the answer to a /generate request.

        Raises:
            Failed: another attempt may succeed.
            RuntimeError: the server refuses the request, or does not answer as SGLang does.
        """
        url, rid, timeout_s = f"{self.url}/generate", uuid.uuid4().hex, self.shared.limits.timeout_s
        generation, version = self.generation, self.version
        task = asyncio.ensure_future(self.shared.http.post(url, json={**request, "rid": rid}))
        self.tasks.add(task)
        try:
            await asyncio.wait([task], timeout=timeout_s)
        finally:
            self.tasks.discard(task)
            answered = task.done()
            task.cancel()
        if not answered:
            self.shared.counts["timeouts"] += 1
            errand = asyncio.ensure_future(self._abort(rid))
            self.errands.add(errand)
            errand.add_done_callback(self.errands.discard)
            self.alarm.set()
            raise Failed(f"{url}: no answer within {timeout_s:g} s")
        if task.cancelled():
            raise Failed(f"{self.url} was lost: {self.trouble}")
        try:
            response = task.result()
        except httpx.TransportError as error:
            if self.generation == generation and self.alive:
                # Otherwise it would have the fewest outstanding tokens, and draw all requests.
                self.state = State.DOWN
                self.alarm.set()
            raise Failed(f"{url}: {error!r}") from error
        if response.status_code >= 500:
            raise Failed(f"{url}: {message_of(response)}")
        answer = answer_of(url, response)
        answer.replica_version = version
        return answer

    async def _abort(self, rid: str) -> None:
        with suppress(RuntimeError):
            await self.post("/abort_request", {"rid": rid}, self.shared.limits.health_timeout_s)

    # Identity

    async def check(self) -> None:
        """Compare the server with the model that it should serve, and learn how it was started.

        Raises:
            ValueError: it serves another model, or cannot take the longest sequence.
            RuntimeError: it does not answer.
        """
        shared, model = self.shared, self.shared.model
        info = await self.get("/model_info")
        server = await self.get("/server_info")
        self.tp, self.dtype = server.get("tp_size", 1), server.get("dtype", "auto")
        self.reported = info.get("weight_version")
        if self.server is None and not shared.fixed_weights:
            # A run that was killed while it sent weights left it paused: no question would end.
            await self.post("/continue_generation", {})
        vocab = await identity.vocab_size(self._ask)
        identity.check_description(self.url, info, vocab, model, shared.fixed_weights)
        identity.check_length(self.url, server, model)
        self.remarks = identity.remarks(server, shared.dtype)
        if shared.fixed_weights:
            self.remarks += identity.path_remarks(info["model_path"], model)
        if self.server is None:
            self.raw_logprobs = await identity.reports_raw(self._ask)

    async def check_weights(self) -> None:
        """Compare the weights of a server that was away with the fixed ones.

        Raises:
            ValueError: it has come back with others.
            RuntimeError: it does not answer.
        """
        if self.shared.reference is not None and self.shared.fixed_weights:
            first, log_probs = self.shared.reference
            identity.agreed([first, self], [log_probs, await self.log_probs()])

    async def log_probs(self) -> np.ndarray:
        """Return what it says of some tokens, the same in every run: [n] float64."""
        return await identity.probe_log_probs(Replica.post, self, self.shared.model)

    async def _ask(self, request: dict) -> Any:
        return await self.post("/generate", request)
