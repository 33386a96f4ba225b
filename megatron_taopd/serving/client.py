"""Several SGLang servers of one model behind one asynchronous client.

    replicas = Replicas([partial(Server, path, log, gpus=[6])], ServedModel.of(path, 4096))
    answer = replicas.run(replicas.complete({"input_ids": ids, "sampling_params": {...}}))

One process holds it; the requests run on an event loop in a thread of their own. A replica that
dies or hangs is restarted, where it is ours, and tried again later, where it is not; its requests
go elsewhere in the meantime.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from megatron_taopd.serving.answers import Answer
from megatron_taopd.serving.health import is_healthy, wait_until_up, watch
from megatron_taopd.serving.identity import agreed
from megatron_taopd.serving.model import ServedModel
from megatron_taopd.serving.protocol import (
    CONTROL_TIMEOUT_S,
    Failed,
    all_of,
    delay_before,
    new_client,
)
from megatron_taopd.serving.replica import Limits, Replica, Shared, State
from megatron_taopd.serving.server import Server

INTERRUPT_S = 0.5  # between aborts of requests that come to a server's scheduler only after one
CANCEL_S = 0.2  # between cancellations of a task that does not end
PUSHES = 3  # of weights, in a row, that a server may fall out of


class Elsewhere(Exception):
    """Another rank's servers should be asked: none of these can be, or none other than has failed.

    Attributes:
        made: attempts at the request so far.
    """

    def __init__(self, made: int):
        super().__init__(made)
        self.made = made


class Replicas:
    """Starts or finds the servers of one model, and returns when all of them can be used.

    Methods that are coroutines run on its event loop: `run` waits for one, `spawn` does not.

    Args:
        sources: of each replica its URL, or a function that starts a server of our own.
        model: what they have to serve.
        limits: see there.
        api_key: asked for by all of them.
        fixed_weights: the servers' own weights are the right ones. Otherwise a server that has been
            restarted, and one that is not ours, serves only after `commit_update`.
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
        limits: Limits | None = None,
        *,
        api_key: str | None = None,
        fixed_weights: bool = False,
        dtype: str | None = None,
    ):
        self.model, self.limits = model, limits or Limits()
        self.shared = Shared(model, self.limits, fixed_weights, dtype, new_client(api_key))
        self.all = [Replica(source, self.shared) for source in sources]
        self._watches: list[asyncio.Task] = []
        self._closing = False
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

    async def _open(self) -> None:
        fixed, own = self.shared.fixed_weights, [r for r in self.all if r.start is not None]
        for replica in own:
            replica.server = replica.start()
        await all_of(map(wait_until_up, own))
        await all_of(wait_until_up(replica) for replica in self.all if replica not in own)
        await all_of(replica.check() for replica in self.all)
        for replica in self.all:
            replica.version = 0 if replica in own or fixed else None
            replica.state = State.STALE if replica.version is None else State.READY
        serving = [replica for replica in self.all if replica.version is not None]
        if len(serving) > 1 or (serving and fixed):
            answers = await all_of(replica.log_probs() for replica in serving)
            self.shared.reference = agreed(serving, answers)
        self._watches = [asyncio.ensure_future(watch(replica)) for replica in self.all]

    def run(self, coroutine: Coroutine) -> Any:
        """Return the result of a coroutine on the event loop. Not to be called on the loop."""
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

    async def _close(self) -> None:
        # More than once: `asyncio.wait_for` loses a cancellation that comes in the moment in which
        # what it waits for is done (Python 3.11), and a watch would then go on for ever.
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            done, _ = await asyncio.wait(tasks, timeout=CANCEL_S)
            await asyncio.gather(*done, return_exceptions=True)
        own = [replica for replica in self.all if replica.server is not None]
        await asyncio.gather(*(asyncio.to_thread(replica.stop) for replica in own))
        await self.shared.http.aclose()

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def live(self) -> list[Replica]:
        """List those that can be given weights."""
        return [replica for replica in self.all if replica.alive]

    @property
    def stale(self) -> list[Replica]:
        """List those that wait for weights."""
        return [r for r in self.all if r.state is State.STALE and not r.syncing]

    @property
    def ready(self) -> list[Replica]:
        """List those that can be asked."""
        return [replica for replica in self.all if replica.state is State.READY]

    @property
    def troubles(self) -> str | None:
        """Say what became of all of them; None while one can come back."""
        if any(replica.state is not State.DEAD for replica in self.all):
            return None
        return "; ".join(f"{replica.url} {replica.trouble}" for replica in self.all)

    @property
    def remarks(self) -> list[str]:
        """List what a user should know of how the replicas were started."""
        return [f"{replica.url} {remark}" for replica in self.all for remark in replica.remarks]

    @property
    def counts(self) -> Counter[str]:
        """Count retries, timeouts and restarts since the last `take_counts`."""
        return self.shared.counts

    def take_counts(self) -> Counter[str]:
        """Return the counts and begin new ones."""
        counts, self.shared.counts = self.shared.counts, Counter()
        return counts

    @property
    def hopeful(self) -> list[Replica]:
        """List those that can be asked, or will be in a moment: they are being given weights."""
        return [r for r in self.all if r.syncing or r.state is State.READY]

    # Requests

    def slots_of(self, replicas: Sequence[Replica]) -> int:
        """Count the requests that these take at a time."""
        return len(replicas) * self.limits.concurrency

    async def any_ready(self) -> bool:
        """Wait until a replica can be asked; False: all of them are given up."""
        async with self.shared.changed:
            await self.shared.changed.wait_for(lambda: self.ready or self.troubles is not None)
        return bool(self.ready)

    async def complete(self, request: dict, made: int = 0, alone: bool = True) -> Answer:
        """Answer a /generate request with one prompt as `input_ids`.

        The replica with the fewest outstanding tokens does it. A request that fails for no fault of
        its own, or that the server aborts, begins anew, on another replica if there is one. One
        that is aborted because its server gets weights is answered with what there is
        (`finish_reason` abort).

        Args:
            made: attempts so far, on replicas of other ranks.
            alone: no other rank has replicas of the model.

        Raises:
            ValueError: the request is one that kills a server or that it would not do as asked.
            RuntimeError: it was refused (4xx), failed `attempts` times, or no replica is left.
            Elsewhere: unless alone, no replica is hopeful, but the one that has failed.
        """
        ids, sampling = request["input_ids"], request.get("sampling_params", {})
        new, attempts = sampling.get("max_new_tokens", 128), self.limits.attempts
        self.model.check("the prompt", ids, new, request.get("top_logprobs_num", 0))
        failure = last = None
        for attempt in range(made, attempts):
            if not alone and all(replica is last for replica in self.hopeful):
                raise Elsewhere(attempt)
            if attempt:
                self.counts["retries"] += 1
                await asyncio.sleep(delay_before(attempt))
            last = await self._reserve(len(ids) + new, avoid=last, alone=alone)
            if last is None:
                raise Elsewhere(attempt)
            try:
                answer = await last.generate(request)
            except Failed as error:
                failure = error
                continue
            finally:
                await self._release(last, len(ids) + new)
            if answer.meta_info.finish_reason.type != "abort" or last.syncing:
                return answer
            failure = Failed(f"{last.url}/generate: aborted")
        raise RuntimeError(f"a request failed {attempts} times, the last time: {failure}")

    async def _reserve(self, tokens: int, avoid: Replica | None, alone: bool) -> Replica | None:
        """Wait for a replica that is free; None, unless alone, if none is hopeful."""

        def free() -> list[Replica | None]:
            if not alone and not self.hopeful:
                return [None]
            if (troubles := self.troubles) is not None:
                raise RuntimeError(f"no server is left: {troubles}")
            return [r for r in self.ready if r.requests < self.limits.concurrency]

        async with self.shared.changed:
            candidates = await self.shared.changed.wait_for(free)
            if candidates == [None]:
                return None
            replica = min(candidates, key=lambda r: (r is avoid, r.tokens))
            replica.tokens += tokens
            replica.requests += 1
        return replica

    async def _release(self, replica: Replica, tokens: int) -> None:
        async with self.shared.changed:
            replica.tokens -= tokens
            replica.requests -= 1
            if replica.syncing:  # `interrupt` waits for this, and may not be the first to wait
                self.shared.changed.notify_all()
            else:
                self.shared.changed.notify()

    # Control

    async def post(
        self, replica: Replica, path: str, payload: dict, timeout: float = CONTROL_TIMEOUT_S
    ) -> Any:
        """Call `Replica.post`.

        Raises:
            RuntimeError: with the address and the server's message.
        """
        return await replica.post(path, payload, timeout)

    async def post_all(
        self,
        path: str,
        payload: dict,
        targets: Iterable[Replica] | None = None,
        timeout: float = CONTROL_TIMEOUT_S,
    ) -> list:
        """Call `post` of these replicas, or of all live ones, at once.

        Raises:
            ValueError, RuntimeError: what failed, once all are done.
        """
        targets = self.live if targets is None else targets
        return await all_of(self.post(r, path, payload, timeout) for r in targets)

    async def pause(self, mode: str, targets: Iterable[Replica] | None = None) -> None:
        """Stop generating.

        Args:
            mode: what becomes of requests under way: "abort" (they come back to begin anew),
                "retract", or "in_place" (they stay).
        """
        await self.post_all("/pause_generation", {"mode": mode}, targets)

    async def resume(self, targets: Iterable[Replica] | None = None) -> None:
        """Go on generating."""
        await self.post_all("/continue_generation", {}, targets)

    async def flush(self, targets: Iterable[Replica] | None = None) -> None:
        """Empty the prefix cache; refused where anything is running."""
        await self.post_all("/flush_cache", {}, targets)

    async def begin_update(self, targets: Iterable[Replica]) -> list[Replica]:
        """Hold those that live, which are about to be given weights, and return them.

        Nothing new is sent there, and nobody looks whether they answer.
        """
        held = [replica for replica in targets if replica.alive]
        for replica in held:
            replica.syncing, replica.state = True, State.STALE
        return held

    async def interrupt(
        self, targets: Sequence[Replica], timeout_s: float = CONTROL_TIMEOUT_S
    ) -> None:
        """Have these, which are held, answer what they are asked with what there is so far.

        Returns when none is asked anything any more, or after `timeout_s`, or when it cannot be
        told to: then the push that follows aborts the rest.
        """

        async def one(replica: Replica) -> None:
            while replica.requests:
                await self.post(replica, "/abort_request", {"abort_all": True}, timeout_s)
                async with self.shared.changed:
                    idle = self.shared.changed.wait_for(lambda: not replica.requests)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(idle, INTERRUPT_S)

        requests = asyncio.gather(*map(one, targets), return_exceptions=True)
        with suppress(TimeoutError):
            await asyncio.wait_for(requests, timeout_s)

    async def commit_update(self, targets: Iterable[Replica], version: int) -> None:
        """Let these serve: they have the current weights, with str(version) as weight_version."""
        async with self.shared.changed:
            for replica in targets:
                replica.syncing, replica.fell_out = False, 0
                if replica.alive:
                    replica.version, replica.state = version, State.READY
            self.shared.changed.notify_all()

    async def follow_update(self, versions: Mapping[str, int | None]) -> None:
        """Take over, by url, which weights another rank has given each of these; None: none."""
        async with self.shared.changed:
            for replica in self.all:
                replica.syncing, replica.version = False, versions[replica.url]
                if replica.alive:
                    replica.state = State.STALE if replica.version is None else State.READY
                replica.alarm.set()  # it may have lost them meanwhile
            self.shared.changed.notify_all()

    async def abort_update(self, targets: Sequence[Replica]) -> bool:
        """Leave these stale, which were not given the weights after all.

        Returns:
            Whether any of them is in trouble itself, which would explain it.
        """
        healthy = await asyncio.gather(*map(is_healthy, targets))
        for replica, well in zip(targets, healthy, strict=True):
            replica.syncing = False
            replica.version = None
            replica.state = State.STALE if well else State.DOWN
            replica.alarm.set()
        return not all(healthy)

    async def leave_out(self, troubles: Mapping[Replica, str]) -> list[Replica]:
        """Go on without these, which were not given the weights; they are looked at meanwhile.

        One that is well waits for weights. One that this happens to PUSHES times in a row is given
        up, and no longer looked at.

        Returns:
            Those that are given up.
        """
        async with self.shared.changed:
            for replica, trouble in troubles.items():
                replica.syncing, replica.version = False, None
                replica.fell_out, replica.trouble = replica.fell_out + 1, trouble
                replica.state = State.DOWN if replica.fell_out < PUSHES else State.DEAD
                replica.alarm.set()
            self.shared.changed.notify_all()
        return [replica for replica in troubles if replica.state is State.DEAD]
