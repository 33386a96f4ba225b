"""Several SGLang servers of one model behind one asynchronous client.

    replicas = Replicas([partial(Server, path, log, gpus=[6])], ServedModel.of(path, 4096))
    answer = replicas.run(replicas.complete({"input_ids": ids, "sampling_params": {...}}))

One process holds it; the requests run on an event loop in a thread of their own. A replica that
dies or hangs is restarted, where it is ours, and tried again later, where it is not; its requests
go elsewhere in the meantime.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
import time
import uuid
from asyncio import FIRST_COMPLETED
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from transformers import AutoConfig

from megatron_taopd.serving.server import Server

CONNECT_TIMEOUT_S = 10.0
CONTROL_TIMEOUT_S = 60.0  # pause, resume, flush
PULSE_S = 2.0  # how often a server that has not answered yet is looked at
FIRST_DELAY_S, LONGEST_DELAY_S = 0.25, 30.0  # of the exponential back-off
RESTARTS = 3  # in a row that may fail
# SGLang cuts a response off, without a word, two tokens before its context or its KV cache ends,
# and takes no prompt within the last seven: both must be this much longer than any sequence.
CONTEXT_MARGIN = 7
PROBES, PROBE_TOKENS = 4, 32
# Nats: mean |Δ log p| that kernels, batches and layouts may make between servers of one model.
SAME_MODEL = {"float32": 1e-3}
SAME_MODEL_NARROW = 0.05
# What tells two models of one family apart.
SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")


class State(Enum):
    READY = "ready"
    STALE = "stale"  # runs, and waits to be given the current weights
    DOWN = "down"  # being looked at, restarted, or tried again from time to time
    DEAD = "dead"  # given up


class ServedModel(NamedTuple):
    """The model that every replica has to serve.

    Attributes:
        path: its Hugging Face directory or name.
        sizes: the SIZES of its configuration.
        longest: sequence that will be asked for, prompt and response.
    """

    path: str
    sizes: dict[str, Any]
    longest: int

    @classmethod
    def of(cls, path: str | Path, longest: int) -> ServedModel:
        return cls(str(path), _sizes(path), longest)

    @property
    def vocab_size(self) -> int:
        return self.sizes["vocab_size"]

    def check(self, name: str, ids: Sequence[int], max_new_tokens: int, top_logprobs: int) -> None:
        """What a server would die of, or answer with something else than was asked for.

        Raises:
            ValueError: of the prompt `name` with these token ids.
        """
        if not len(ids):
            raise ValueError(f"{name} is empty: a server needs at least one token")
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(
                f"{name} has the token id {bad}; the model has 0 … {self.vocab_size - 1}"
            )
        if len(ids) + max_new_tokens > self.longest:
            raise ValueError(
                f"{name} has {len(ids)} tokens; with {max_new_tokens} new ones that is over the "
                f"servers' {self.longest}"
            )
        if top_logprobs > self.vocab_size:
            raise ValueError(
                f"{name}: top_logprobs {top_logprobs} is over the vocabulary of {self.vocab_size}"
            )


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
        trouble: what happened last.
    """

    def __init__(self, source: str | Callable[[], Server]):
        self.start = None if isinstance(source, str) else source
        self._url = source.rstrip("/") if isinstance(source, str) else None
        self.server: Server | None = None
        self.tp, self.dtype = 1, "auto"
        self.state = State.DOWN
        self.tokens = self.requests = 0
        self.version: int | None = None
        self.reported: str | None = None
        self.raw_logprobs = True
        self.remarks: list[str] = []
        self.generation = 0
        self.syncing = False
        self.trouble = "has not started"
        self.tasks: set[asyncio.Task] = set()
        self.alarm = asyncio.Event()  # it should be looked at

    @property
    def url(self) -> str:
        return self._url or self.server.url

    @property
    def alive(self) -> bool:
        return self.state in (State.READY, State.STALE)

    @property
    def gpus(self) -> list[int]:
        """Of our own server, the devices that it runs on, by tensor-parallel rank."""
        visible = self.server.environment.get("CUDA_VISIBLE_DEVICES")
        devices = range(self.tp) if visible is None else map(int, visible.split(","))
        return list(devices)[: self.tp]


class Replicas:
    """Starts or finds the servers of one model, and returns when all of them can be used.

    Methods that are coroutines run on its event loop: `run` waits for one, `spawn` does not.

    Args:
        sources: of each replica its URL, or a function that starts a server of our own.
        model: what they have to serve.
        api_key: asked for by all of them.
        concurrency: requests at a time, per replica.
        timeout_s: of one request.
        attempts: per request, on whichever replica.
        fixed_weights: the servers' own weights are the right ones. Otherwise a server that has been
            restarted, and one that is not ours, serves only after `commit_update`.
        health_every_s, health_timeout_s: how often a replica is looked at, and how long it may take
            to answer; it may miss that once.
        patience_s: before a replica that is not ours is given up.
        start_timeout_s: how long one that is not ours, but perhaps still loading, may not listen.
        dtype: that weights and activations should have, as SGLang names it; None: any. It is a
            remark if they do not.

    Raises:
        ValueError: a URL serves another model, or other weights than the rest, or cannot take the
            longest sequence.
        RuntimeError: a server did not start, or a URL does not answer.
    """

    def __init__(
        self,
        sources: Sequence[str | Callable[[], Server]],
        model: ServedModel,
        *,
        api_key: str | None = None,
        concurrency: int = 64,
        timeout_s: float = 1800.0,
        attempts: int = 4,
        fixed_weights: bool = False,
        health_every_s: float = 5.0,
        health_timeout_s: float = 30.0,
        patience_s: float = 600.0,
        start_timeout_s: float = 0.0,
        dtype: str | None = None,
    ):
        self.model, self.dtype = model, dtype
        self.concurrency, self.timeout_s, self.attempts = concurrency, timeout_s, attempts
        self.fixed_weights = fixed_weights
        self.health_every_s, self.health_timeout_s = health_every_s, health_timeout_s
        self.patience_s = patience_s
        self.start_timeout_s = start_timeout_s
        self.counts: Counter[str] = Counter()
        # With fixed weights: one that has them, and what it said of the tokens of `log_probs`.
        self._reference: tuple[Replica, np.ndarray] | None = None
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._closing = False
        self.all = [Replica(source) for source in sources]
        self._watches: list[asyncio.Task] = []
        self._errands: set[asyncio.Task] = set()
        self._loop = asyncio.new_event_loop()
        # Waiting for a server takes a thread.
        self._loop.set_default_executor(ThreadPoolExecutor(max_workers=len(sources) + 4))
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self.run(self._open())
        except BaseException:
            self.close()
            raise

    def run(self, coroutine: Coroutine) -> Any:
        """The result of a coroutine on the event loop. Not to be called on the loop itself."""
        return self.spawn(coroutine).result()

    def spawn(self, coroutine: Coroutine) -> Future:
        """Start a coroutine on the event loop, from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """End our servers and the event loop. Idempotent."""
        if self._closing:
            return
        self._closing = True
        self.run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def live(self) -> list[Replica]:
        """Those that can be given weights."""
        return [replica for replica in self.all if replica.alive]

    @property
    def remarks(self) -> list[str]:
        """What a user should know of how the replicas were started."""
        return [f"{replica.url} {remark}" for replica in self.all for remark in replica.remarks]

    @property
    def stale(self) -> list[Replica]:
        """Those that wait for weights."""
        return [r for r in self.all if r.state is State.STALE and not r.syncing]

    # Requests

    async def complete(self, request: dict) -> dict:
        """The answer to a /generate request with one prompt as `input_ids`, from the replica with
        the fewest outstanding tokens.

        A request that fails for no fault of its own, or that the server aborts, begins anew, on
        another replica if there is one. The answer's `replica_version` is the replica's when the
        request was sent.

        Raises:
            ValueError: the request is one that kills a server or that it would not do as asked.
            RuntimeError: refused (4xx), failed `attempts` times, or no replica is left.
        """
        ids, sampling = request["input_ids"], request.get("sampling_params", {})
        new = sampling.get("max_new_tokens", 128)
        self.model.check("the prompt", ids, new, request.get("top_logprobs_num", 0))
        failure = last = None
        for attempt in range(self.attempts):
            if attempt:
                self.counts["retries"] += 1
                await asyncio.sleep(_delay(attempt))
            last = await self._reserve(len(ids) + new, avoid=last)
            try:
                answer = await self._ask(last, request)
            except Failed as error:
                failure = error
                continue
            finally:
                await self._release(last, len(ids) + new)
            if answer["meta_info"]["finish_reason"]["type"] != "abort":
                return answer
            failure = Failed(f"{last.url}/generate: aborted")
        raise RuntimeError(f"a request failed {self.attempts} times, the last time: {failure}")

    async def _reserve(self, tokens: int, avoid: Replica | None) -> Replica:
        def free() -> list[Replica]:
            if all(replica.state is State.DEAD for replica in self.all):
                raise RuntimeError("no server is left: " + "; ".join(self._troubles()))
            return [
                replica
                for replica in self.all
                if replica.state is State.READY and replica.requests < self.concurrency
            ]

        async with self._changed:
            candidates = await self._changed.wait_for(free)
            replica = min(candidates, key=lambda r: (r is avoid, r.tokens))
            replica.tokens += tokens
            replica.requests += 1
        return replica

    async def _release(self, replica: Replica, tokens: int) -> None:
        async with self._changed:
            replica.tokens -= tokens
            replica.requests -= 1
            self._changed.notify()

    async def _ask(self, replica: Replica, request: dict) -> dict:
        """Raises Failed where another attempt may succeed, else RuntimeError."""
        url, rid = f"{replica.url}/generate", uuid.uuid4().hex
        generation, version = replica.generation, replica.version
        task = asyncio.ensure_future(self._client.post(url, json={**request, "rid": rid}))
        replica.tasks.add(task)  # `_lose` cancels them
        try:
            await asyncio.wait([task], timeout=self.timeout_s)
        finally:
            replica.tasks.discard(task)
            answered = task.done()
            task.cancel()
        if not answered:
            self.counts["timeouts"] += 1
            self._run_errand(self._abort(replica, rid))
            replica.alarm.set()
            raise Failed(f"{url}: no answer within {self.timeout_s:g} s")
        if task.cancelled():
            raise Failed(f"{replica.url} was lost: {replica.trouble}")
        try:
            response = task.result()
        except httpx.TransportError as error:
            if replica.generation == generation and replica.alive:
                # Otherwise it would have the fewest outstanding tokens, and draw all requests.
                replica.state = State.DOWN
                replica.alarm.set()
            raise Failed(f"{url}: {error!r}") from error
        if response.status_code >= 500:
            raise Failed(f"{url}: {_message(response)}")
        return {**_parsed(url, response), "replica_version": version}

    async def _abort(self, replica: Replica, rid: str) -> None:
        with suppress(RuntimeError):
            await self.post(replica, "/abort_request", {"rid": rid}, self.health_timeout_s)

    def _run_errand(self, coroutine: Coroutine) -> None:
        task = asyncio.ensure_future(coroutine)
        self._errands.add(task)  # the loop itself holds only a weak reference
        task.add_done_callback(self._errands.discard)

    # Control

    async def post(
        self, replica: Replica, path: str, payload: dict, timeout: float = CONTROL_TIMEOUT_S
    ) -> Any:
        """The JSON (else text) that a replica answers a POST with; no retries.

        A replica that cannot answer any more, because it is dead, stopped or out of reach, is not
        waited for.

        Raises:
            RuntimeError: with the address and the server's message.
        """
        url = replica.url + path
        request = asyncio.ensure_future(self._client.post(url, json=payload))
        loss = asyncio.ensure_future(self._until_lost(replica))
        try:
            await asyncio.wait({request, loss}, timeout=timeout, return_when=FIRST_COMPLETED)
            if request.done():
                return _parsed(url, request.result())
            why = loss.result() if loss.done() else f"no answer within {timeout:g} s"
            raise RuntimeError(f"{url}: {why}")
        except httpx.TransportError as error:
            raise RuntimeError(f"{url}: {error!r}") from error
        finally:
            request.cancel()
            loss.cancel()

    async def _until_lost(self, replica: Replica) -> str:
        """Return when a replica has twice in a row shown no sign of life, and what is missing.

        The scheduler may be busy with the very request that is waited for: nothing is asked of it.
        """
        missed = 0
        while missed < 2:
            await asyncio.sleep(PULSE_S)
            trouble = None
            try:
                await self._fetch(replica, "/model_info")
            except RuntimeError as error:
                trouble = str(error)
            if replica.server is not None:
                trouble = await asyncio.to_thread(replica.server.trouble) or trouble
            missed = 0 if trouble is None else missed + 1
        return f"the server is lost: {trouble}"

    async def post_all(
        self,
        path: str,
        payload: dict,
        targets: Iterable[Replica] | None = None,
        timeout: float = CONTROL_TIMEOUT_S,
    ) -> list:
        """`post` to these replicas at once, or to all live ones; what failed, once all are done."""
        targets = self.live if targets is None else targets
        return await all_of(self.post(r, path, payload, timeout) for r in targets)

    async def pause(self, mode: str, targets: Iterable[Replica] | None = None) -> None:
        """Stop generating; what is under way is aborted (and comes back to begin anew), retracted,
        or stays in place: mode "abort", "retract" or "in_place"."""
        await self.post_all("/pause_generation", {"mode": mode}, targets)

    async def resume(self, targets: Iterable[Replica] | None = None) -> None:
        await self.post_all("/continue_generation", {}, targets)

    async def flush(self, targets: Iterable[Replica] | None = None) -> None:
        """Empty the prefix cache; refused where anything is running."""
        await self.post_all("/flush_cache", {}, targets)

    async def begin_update(self, targets: Iterable[Replica]) -> list[Replica]:
        """These, as far as they live, are about to be given weights: nothing new is sent there, and
        nobody looks whether they answer."""
        held = [replica for replica in targets if replica.alive]
        for replica in held:
            replica.syncing, replica.state = True, State.STALE
        return held

    async def commit_update(self, targets: Iterable[Replica], version: int) -> None:
        """These have been given the current weights, with str(version) as their weight_version, and
        serve."""
        async with self._changed:
            for replica in targets:
                replica.syncing = False
                if replica.alive:
                    replica.version, replica.state = version, State.READY
            self._changed.notify_all()

    async def abort_update(self, targets: Sequence[Replica]) -> bool:
        """These were not given the weights after all: they stay stale. Whether any of them is in
        trouble itself, which would explain it."""
        healthy = await asyncio.gather(*(self._healthy(replica) for replica in targets))
        for replica, well in zip(targets, healthy, strict=True):
            replica.syncing = False
            replica.version = None
            replica.state = State.STALE if well else State.DOWN
            replica.alarm.set()
        return not all(healthy)

    # Life and death

    async def _open(self) -> None:
        self._changed = asyncio.Condition()
        self._client = httpx.AsyncClient(
            headers=self._headers,
            trust_env=False,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            # The server closes a connection that has idled for 5 s, perhaps as we write to it.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2),
        )
        for replica in self.all:
            if replica.start is not None:
                replica.server = replica.start()
        starts = (asyncio.to_thread(r.server.wait_until_ready) for r in self.all if r.server)
        await all_of(starts)
        await all_of(self._wait_until_listens(r) for r in self.all if not r.server)
        await all_of(self._check(replica) for replica in self.all)
        for replica in self.all:
            own = replica.server is not None
            replica.version = 0 if own or self.fixed_weights else None
            replica.state = State.STALE if replica.version is None else State.READY
        await self._compare()
        self._watches = [asyncio.ensure_future(self._watch(replica)) for replica in self.all]

    async def _compare(self) -> None:
        """Raises ValueError if one of those that have their weights serves others than the rest."""
        serving = [replica for replica in self.all if replica.version is not None]
        if len(serving) > 1 or (serving and self.fixed_weights):
            self._reference = agreed(serving, await all_of(map(self.log_probs, serving)))

    async def log_probs(self, replica: Replica) -> np.ndarray:
        """[n] float64, what a server says of some tokens, the same in every run."""
        return await probe_log_probs(self.post, replica, self.model)

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        servers = [replica.server for replica in self.all if replica.server is not None]
        await asyncio.gather(*(asyncio.to_thread(_stop, server) for server in servers))
        if client := getattr(self, "_client", None):
            await client.aclose()

    async def _watch(self, replica: Replica) -> None:
        while replica.state is not State.DEAD:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(replica.alarm.wait(), self.health_every_s)
            replica.alarm.clear()
            if replica.server is not None:
                replica.server.bound_log()
            if not replica.syncing:
                await self._examine(replica)

    async def _examine(self, replica: Replica) -> None:
        healthy = await self._healthy(replica)
        has_weights = self._has_weights(replica)
        if replica.syncing:
            return
        if not healthy:
            await (self._wait_for_return if replica.start is None else self._restart)(replica)
        elif replica.state is State.READY and not has_weights:
            await self._lose(replica, State.STALE)  # somebody has restarted it
        elif replica.state is State.DOWN:
            await self._revive(replica, has_weights)

    async def _healthy(self, replica: Replica) -> bool:
        """/server_info asks the scheduler, generates nothing, and so never disturbs an update."""
        for _ in range(2):
            try:
                own = replica.server
                if own is not None and (trouble := await asyncio.to_thread(own.trouble)):
                    raise RuntimeError(trouble)
                await self._get(replica, "/server_info")
                if own is None:
                    info = await self._get(replica, "/model_info")
                    replica.reported = info.get("weight_version")
                return True
            except RuntimeError as error:
                replica.trouble = str(error)
            await asyncio.sleep(FIRST_DELAY_S)
        return False

    def _has_weights(self, replica: Replica) -> bool:
        """Whether a replica that runs still has what it was given last."""
        if self.fixed_weights or replica.server is not None:
            return replica.version is not None
        return replica.reported == str(replica.version)

    async def _revive(self, replica: Replica, has_weights: bool) -> None:
        async with self._changed:
            replica.state = State.READY if has_weights else State.STALE
            self._changed.notify_all()

    async def _lose(self, replica: Replica, state: State) -> None:
        replica.state = state
        replica.generation += 1
        for task in replica.tasks:
            task.cancel()
        async with self._changed:
            self._changed.notify_all()

    async def _restart(self, replica: Replica) -> None:
        await self._lose(replica, State.DOWN)
        for attempt in range(1, RESTARTS + 1):
            self.counts["restarts"] += 1
            try:
                await asyncio.to_thread(_stop, replica.server, 0)
                replica.version = 0 if self.fixed_weights else None
                replica.server = replica.start()
                await asyncio.to_thread(replica.server.wait_until_ready)
                await self._check_weights(replica)
                return await self._revive(replica, self.fixed_weights)
            except Exception as error:  # whatever it is, the watch goes on
                replica.trouble = str(error) or repr(error)
                await asyncio.sleep(_delay(attempt))
        await self._lose(replica, State.DEAD)

    async def _wait_for_return(self, replica: Replica) -> None:
        await self._lose(replica, State.DOWN)
        deadline = time.monotonic() + self.patience_s
        attempt = 1
        while True:
            await asyncio.sleep(_delay(attempt))
            attempt += 1
            try:
                await self._check(replica)
                await self._check_weights(replica)
                return await self._revive(replica, self._has_weights(replica))
            except Exception as error:  # whatever it is, the watch goes on
                replica.trouble = str(error) or repr(error)
            if time.monotonic() > deadline and replica.state is not State.DEAD:
                await self._lose(replica, State.DEAD)

    async def _check_weights(self, replica: Replica) -> None:
        """Raises ValueError if one that was away has come back with others than the fixed ones."""
        if self._reference is not None and self.fixed_weights:
            first, log_probs = self._reference
            agreed([first, replica], [log_probs, await self.log_probs(replica)])

    def _troubles(self) -> list[str]:
        return [f"{r.url} {r.trouble}" for r in self.all]

    # What a server is

    async def _wait_until_listens(self, replica: Replica) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        while time.monotonic() < deadline:
            try:
                await self._client.get(replica.url + "/model_info", timeout=self.health_timeout_s)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                await asyncio.sleep(1)
                continue
            except httpx.TransportError:
                pass  # `_check` says what is wrong with it
            return

    async def _get(self, replica: Replica, path: str) -> dict:
        return _parsed(replica.url + path, await self._fetch(replica, path))

    async def _fetch(self, replica: Replica, path: str) -> httpx.Response:
        """Whatever it answers; RuntimeError if nothing."""
        url = replica.url + path
        try:
            return await asyncio.wait_for(self._client.get(url), self.health_timeout_s)
        except asyncio.TimeoutError:
            raise RuntimeError(f"{url}: no answer within {self.health_timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise RuntimeError(f"{url}: {error!r}") from error

    async def _check(self, replica: Replica) -> None:
        """Whether a server is there, and is one of our model.

        Raises:
            ValueError, RuntimeError: as the class.
        """
        info = await self._get(replica, "/model_info")
        server = await self._get(replica, "/server_info")
        replica.tp, replica.dtype = server.get("tp_size", 1), server.get("dtype", "auto")
        replica.reported = info.get("weight_version")
        expected, path = self.model, info["model_path"]
        found = {"model_type": info.get("model_type"), "vocab_size": await self._vocab(replica)}
        found = {key: value for key, value in found.items() if value is not None}
        # A path of this machine tells all; where it means nothing here, its name has to do.
        if (Path(path) / "config.json").is_file():
            found |= _sizes(path)
        elif Path(path).name != Path(expected.path).name:
            found |= {"path": path}
        wrong = {k: v for k, v in found.items() if v != expected.sizes.get(k)}
        if not info.get("is_generation", True):
            raise ValueError(f"{replica.url} embeds, it does not generate ({path})")
        if self.fixed_weights and info.get("load_format") == "dummy":
            raise ValueError(f"{replica.url} has random weights (--load-format dummy)")
        if wrong:
            wanted = {k: expected.sizes.get(k, expected.path) for k in wrong}
            raise ValueError(
                f"{replica.url} serves another model ({path}): found {_listed(wrong)}, expected "
                f"{_listed(wanted)} ({expected.path})"
            )
        longest = server.get("max_req_input_len", expected.longest + 1) - 1
        if longest < expected.longest:
            raise ValueError(
                f"{replica.url} takes sequences of {longest} tokens, the run has some of "
                f"{expected.longest}: start it with --context-length and --max-total-tokens of "
                f"{expected.longest + CONTEXT_MARGIN} or more"
            )
        replica.remarks = remarks(server, self.dtype)
        if self.fixed_weights and os.path.realpath(path) != os.path.realpath(expected.path):
            replica.remarks.append(f"serves {path}, which has the sizes of {expected.path}")
        if replica.server is None:
            replica.raw_logprobs = await self._reports_raw(replica)

    async def _vocab(self, replica: Replica) -> int | None:
        """The size of its vocabulary, as the refusal of a bias outside of it names it."""
        sampling = {"max_new_tokens": 0, "logit_bias": {"-1": 0.0}}
        with suppress(RuntimeError):
            try:
                await self.post(
                    replica, "/generate", {"input_ids": [0], "sampling_params": sampling}
                )
            except RuntimeError as error:
                if match := re.search(r"keys in \[0, (\d+)\]", str(error)):
                    return int(match.group(1)) + 1
        return None

    async def _reports_raw(self, replica: Replica) -> bool:
        """Whether the log-probabilities of output tokens are those at temperature 1: then they are
        as far apart at another temperature."""
        spreads = []
        for temperature in (1.0, 4.0):
            request = {
                "input_ids": [0],
                "sampling_params": {"max_new_tokens": 1, "temperature": temperature},
                "return_logprob": True,
                "top_logprobs_num": 8,
            }
            answer = await self.post(replica, "/generate", request)
            top = answer["meta_info"]["output_top_logprobs"][0]
            spreads.append(top[0][0] - top[-1][0])
        return spreads[1] > spreads[0] / 2


def remarks(server: Mapping[str, Any], dtype: str | None) -> list[str]:
    """What makes a server of the right model answer otherwise than its weights in this dtype would.

    Args:
        server: its /server_info.
        dtype: as SGLang names it; None: any.
    """
    found = []
    if dtype is not None and (other := server.get("dtype", "auto")) not in ("auto", dtype):
        found.append(f"computes in {other}, the run in {dtype}")
    if quantization := server.get("quantization"):
        found.append(f"has quantised weights ({quantization})")
    if (cache := server.get("kv_cache_dtype", "auto")) not in ("auto", server.get("dtype")):
        found.append(f"keeps keys and values in {cache}")
    if server.get("enable_lora") or server.get("lora_paths"):
        found.append("takes LoRA adapters, of which requests here name none")
    if (overrides := server.get("json_model_override_args") or "{}") != "{}":
        found.append(f"overrides config.json: {overrides}")
    return found


def probe_tokens(model: ServedModel) -> list[list[int]]:
    """A few sequences of random tokens, the same in every run."""
    shape = PROBES, min(PROBE_TOKENS, model.longest - 1)
    return np.random.default_rng(0).integers(model.vocab_size, size=shape).tolist()


async def probe_log_probs(post: Callable, replica: Any, model: ServedModel) -> np.ndarray:
    """[n] float64, the log-probability of every token but the first of `probe_tokens`."""
    request = {
        "input_ids": probe_tokens(model),
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answers = await post(replica, "/generate", request)
    rows = [answer["meta_info"]["input_token_logprobs"][1:] for answer in answers]
    return np.array([lp for row in rows for lp, *_ in row], dtype=np.float64)  # null is nan


def agreed(replicas: Sequence[Any], log_probs: Sequence[np.ndarray]) -> tuple[Any, np.ndarray]:
    """The replica that is closest to most of them, and what it says.

    Args:
        replicas: with `url` and `dtype`.
        log_probs: [n] of each of them, as `probe_log_probs` has them.

    Raises:
        ValueError: one is further from that than rounding explains, or says no numbers.
    """
    table = np.stack(log_probs)
    for replica, row in zip(replicas, table, strict=True):
        if not np.isfinite(row).all():
            raise ValueError(f"{replica.url}: log-probabilities that are not finite")
    gaps = np.abs(table[:, None] - table).mean(2)
    middle = int(np.median(gaps, axis=1).argmin())
    bound = same_model(replicas)
    if odd := [i for i, gap in enumerate(gaps[middle]) if gap > bound]:
        names = ", ".join(replicas[i].url for i in odd)
        others = len(replicas) - len(odd)
        rest = f" and {others - 1} others" if others > 1 else ""
        raise ValueError(
            f"{names}: other weights than {replicas[middle].url}{rest}: log-probabilities of the "
            f"same tokens differ by {max(gaps[middle][odd]):.3g} on average, rounding explains "
            f"{bound:g}"
        )
    return replicas[middle], log_probs[middle]


def same_model(replicas: Iterable[Any]) -> float:
    """Mean |Δ log p| that rounding explains between these replicas of one model."""
    return max(SAME_MODEL.get(replica.dtype, SAME_MODEL_NARROW) for replica in replicas)


class Failed(Exception):
    """An attempt that says nothing about the request."""


def _delay(attempt: int) -> float:
    return min(FIRST_DELAY_S * 2 ** (attempt - 1), LONGEST_DELAY_S)


async def all_of(awaitables: Iterable[Awaitable]) -> list:
    """Wait for all of them; their results, or one error that has what each of the failed ones says.

    Raises:
        ValueError, RuntimeError: the first one's kind.
    """
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if not errors:
        return results
    if len(errors) == 1 or not all(isinstance(e, ValueError | RuntimeError) for e in errors):
        raise errors[0]
    kind = ValueError if isinstance(errors[0], ValueError) else RuntimeError
    raise kind("; ".join(dict.fromkeys(map(str, errors)))) from errors[0]


def _parsed(url: str, response: httpx.Response) -> Any:
    if response.status_code != 200:
        raise RuntimeError(f"{url}: {_message(response)}")
    try:
        body = response.json()
    except ValueError:
        return response.text
    if isinstance(body, dict) and body.get("success") is False:
        raise RuntimeError(f"{url}: {body.get('message', body)}")
    return body


def _message(response: httpx.Response) -> str:
    """What the server says is wrong."""
    message = response.text
    with suppress(ValueError, KeyError, TypeError):
        error = json.loads(message)["error"]
        message = error if isinstance(error, str) else error["message"]
    return f"{response.status_code} {message.strip()[:500]}"


def _sizes(path: str | Path) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(path)
    text = config.get_text_config()
    return {key: getattr(text, key, None) for key in SIZES} | {"model_type": config.model_type}


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _stop(server: Server, grace_s: float = 10) -> None:
    if server.alive:  # its supervisor may have been stopped with it, and would not hear
        os.kill(server.pid, signal.SIGCONT)
    server.stop(grace_s)
