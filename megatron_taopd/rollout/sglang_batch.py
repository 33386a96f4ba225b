"""A batch of responses that SGLang servers are generating, on every rank."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_taopd.parallel import progress, watchdog
from megatron_taopd.parallel.objects import SIGN_OF_LIFE_S
from megatron_taopd.rollout.engine import Sampling, make_rollout_batch
from megatron_taopd.rollout.places import Places
from megatron_taopd.serving.answers import Answer, Meta, VersionSpan
from megatron_taopd.serving.client import Elsewhere
from megatron_taopd.types import RolloutBatch

POLL_S = 0.1  # how often rank 0 looks for what other ranks have, and replicas without weights
COUNTS = (
    *("tokens", "prompt", "cached", "retractions", "verifications", "milliseconds"),
    *("retries", "timeouts", "restarts"),
)
FAILED = -1  # instead of a number of responses


@dataclass(frozen=True)
class Response:
    """A response of n tokens.

    Attributes:
        tokens: [n] int32 ids.
        log_probs: [n] float32.
        versions: [n] int32, of the weights.
        truncated: it was cut off at the longest length.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    versions: np.ndarray
    truncated: bool


class News(Enum):
    """What rank 0 has heard."""

    NONE = "nothing, for SIGN_OF_LIFE_S"
    RESPONSES = "responses have come, or failed, on some rank"
    STALE = "servers have come back without weights"


class Engine(Protocol):
    """What a batch asks of its `SGLangEngine`.

    `replicas` are all servers, on rank 0; `asks` those that this rank asks, None if none.
    """

    replicas: Any
    asks: Any
    alone: bool
    sources: Sequence[int]
    vocab_size: int
    pending: int
    counts: Counter[str]

    def request(self, prompt: Sequence[int], sampling: Sampling) -> dict: ...

    def stop_ids(self, sampling: Sampling) -> frozenset[int]: ...

    def on_rank_0(self, work: Callable[[], Any]) -> Any: ...

    def places(self, count: int) -> Places: ...

    def from_sources(self, own: Tensor) -> list[Tensor]: ...

    def resync(self) -> None: ...


class Generating:
    """A `Pending` batch of an `SGLangEngine`. Some ranks ask the servers; all hear of it.

    Collective: that of `SGLangEngine.places`.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        prompt_indices: Sequence[int],
        sampling: Sampling,
    ):
        self.engine, self.sampling = engine, sampling
        self.prompts = [prompt for prompt in prompts for _ in range(sampling.samples)]
        self.indices = [index for index in prompt_indices for _ in range(sampling.samples)]
        self.responses: list[Response | None] = [None] * len(self.prompts)
        self.missing = len(self.prompts)
        self.unread: list[int] = []  # places that `parts` has not handed out
        self.seconds = 0.0  # from the first request to the last answer, on rank 0
        self.heard = 0  # how many times a rank had rung when rank 0 last looked
        self.places = engine.places(len(self.prompts))
        self.finished: queue.SimpleQueue = queue.SimpleQueue()  # of this rank
        self.started = time.monotonic()
        self.stirred = threading.Event()  # this rank has rung
        self.tasks = []
        if engine.asks is not None:
            self.tasks.append(engine.asks.spawn(self._generate()))
        if engine.replicas is not None:
            self.tasks.append(engine.replicas.spawn(self._show()))

    def parts(self) -> Iterator[tuple[Tensor, RolloutBatch]]:
        """See `Pending.parts`.

        Collective: for each part, and every SIGN_OF_LIFE_S without any, a broadcast of some bytes;
        for each part an all-reduce of 8 bytes a source, and of each source that has responses a
        broadcast of 36 bytes, and 12 for each response and each of its tokens.

        Raises:
            RuntimeError: of a rank that asks, on every rank.
        """
        while self.missing or self.unread:
            if not self.unread:
                self._advance()
            if self.unread:
                places, self.unread = self.unread, []
                yield torch.tensor(places), self._batch(places)

    def result(self) -> RolloutBatch:
        """See `Pending.result`. Before `parts` or after; collective and errors likewise."""
        while self.missing:
            self._advance()
        return self._batch(range(len(self.prompts)))

    def _advance(self) -> None:
        """Wait for what rank 0 hears next, and act on it. Collective."""
        try:
            news = self.engine.on_rank_0(self._next)
            if news is News.RESPONSES:
                for parcel in self.engine.from_sources(self._pack()):
                    self._unpack(parcel)
        except RuntimeError:
            self.engine.pending -= 1
            self._stop()
            raise
        if news is News.STALE:
            self.engine.resync()

    def _next(self) -> News:
        """Return what rank 0 hears next; nothing, if that is more than SIGN_OF_LIFE_S away."""
        deadline = time.monotonic() + SIGN_OF_LIFE_S
        while time.monotonic() < deadline:
            if self.engine.replicas.stale:
                return News.STALE
            self.stirred.clear()
            if (rung := self.places.rung()) > self.heard:
                self.heard = rung
                return News.RESPONSES
            self.stirred.wait(POLL_S)
        return News.NONE

    def _batch(self, places: Iterable[int]) -> RolloutBatch:
        places = list(places)
        responses = [self.responses[place] for place in places]
        return make_rollout_batch(
            [self.prompts[place] for place in places],
            [self.indices[place] for place in places],
            [torch.from_numpy(r.tokens) for r in responses],
            [torch.from_numpy(r.log_probs) for r in responses],
            [r.truncated for r in responses],
            [torch.from_numpy(r.versions) for r in responses],
        )

    def _stop(self) -> None:
        """End what this rank still does for the batch: it waits for places, or has failed."""
        for task in self.tasks:
            task.cancel()

    # What a rank has, as one array

    def _pack(self) -> Tensor:
        """Return [n] int32: what this rank has seen since it was last asked; nothing, if nothing.

        How many responses, COUNTS, of each response place, length and whether it is cut off, and
        of all of them tokens, log-probabilities and versions. Or FAILED and why, by letters.
        """
        finished = []
        while not self.finished.empty():
            finished.append(self.finished.get())
            if isinstance(finished[-1], Exception):
                why = str(finished[-1]) or repr(finished[-1])
                letters = np.frombuffer(why.encode("utf-32-le"), np.int32)
                return torch.from_numpy(np.concatenate([[FAILED], letters]).astype(np.int32))
        if not finished:
            return torch.empty(0, dtype=torch.int32)
        places, responses, counted = zip(*finished, strict=True)
        counts = sum(counted, self.engine.asks.take_counts())
        counts["milliseconds"] = max(each["milliseconds"] for each in counted)
        numbers = [
            *(len(places), *(counts[name] for name in COUNTS), *places),
            *(len(r.tokens) for r in responses),
            *(r.truncated for r in responses),
        ]
        arrays = [
            np.array(numbers, np.int32),
            *(r.tokens for r in responses),
            *(r.log_probs.view(np.int32) for r in responses),
            *(r.versions for r in responses),
        ]
        return torch.from_numpy(np.concatenate(arrays))

    def _unpack(self, parcel: Tensor) -> None:
        """Take what a rank has packed.

        Raises:
            RuntimeError: a response failed there.
        """
        values = parcel.numpy()
        count, values = int(values[0]), values[1:]
        if count == FAILED:
            raise RuntimeError(values.tobytes().decode("utf-32-le"))
        counts, values = np.split(values, [len(COUNTS)])
        if self.engine.replicas is not None:
            counts = dict(zip(COUNTS, counts.tolist(), strict=True))
            self.seconds = max(self.seconds, counts.pop("milliseconds") / 1000)
            self.engine.counts.update(counts)
        head, values = np.split(values, [3 * count])
        places, lengths, truncated = head.reshape(3, count)
        ends = lengths.cumsum()[:-1]
        arrays = [np.split(part, ends) for part in np.split(values, 3)]
        for place, cut, tokens, log_probs, versions in zip(
            places.tolist(), truncated.tolist(), *arrays, strict=True
        ):
            assert self.responses[place] is None, f"response {place} came twice"
            response = Response(tokens, log_probs.view(np.float32), versions, bool(cut))
            self.responses[place] = response
        self.missing -= count
        self.unread = sorted([*self.unread, *places.tolist()])
        if not self.missing:
            self.engine.pending -= 1
            self.engine.counts["milliseconds"] += round(1000 * self.seconds)
            self._stop()

    # On the event loop of a rank that asks

    async def _generate(self) -> None:
        engine, first = self.engine, self.places.first
        # As many workers as its servers take requests, if all of them are there.
        number = len(first) if engine.alone else engine.asks.slots_of(engine.asks.all)
        first = [*first, *[None] * (number - len(first))]
        tasks = [asyncio.create_task(self._work(place)) for place in first]
        try:
            if self.sampling.temperature not in (0, 1):
                for replica in engine.asks.all:
                    if not replica.raw_logprobs:
                        raise ValueError(
                            f"rollout.temperature {self.sampling.temperature}: {replica.url} "
                            "reports log-probabilities at that temperature, not at 1; start it "
                            "with SGLANG_RETURN_ORIGINAL_LOGPROB=1 in its environment"
                        )
            await asyncio.gather(*tasks)
            # They end where this rank's servers are given up.
            if not engine.alone and self.places.give_up() == len(engine.sources):
                raise RuntimeError(f"no server is left: {engine.asks.troubles}")
        except Exception as error:
            self._put(error)
        finally:
            for task in tasks:
                task.cancel()

    async def _work(self, place: int | None) -> None:
        """Have a response made, and then, with other ranks, one after the other of what is left."""
        engine, made = self.engine, 0
        while True:
            if place is not None:
                try:
                    self._put((place, *await self._respond(place, made)))
                except Elsewhere as error:
                    self.places.hand_on(place, error.made)
            if engine.alone or not await engine.asks.any_ready():
                return
            taken = await self.places.take(lambda: engine.asks.troubles is None)
            if taken is None:
                return
            place, made = taken

    async def _respond(self, place: int, made: int) -> tuple[Response, Counter[str]]:
        """Ask for one response; return it and COUNTS of it.

        Each is a request of its own, so that it is finished and repeated alone. The prompt that
        samples share comes from SGLang's prefix cache.
        """
        engine = self.engine
        request = engine.request(self.prompts[place], self.sampling)
        answer = await engine.asks.complete(request, made, engine.alone)
        watchdog.heartbeat()
        meta = answer.meta_info
        response = read(answer, self.sampling, engine.vocab_size, engine.stop_ids(self.sampling))
        counts = Counter(
            tokens=len(response.tokens),
            prompt=meta.prompt_tokens,
            cached=meta.cached_tokens,
            retractions=meta.num_retractions,
            verifications=meta.spec_verify_ct,
            milliseconds=round(1000 * (time.monotonic() - self.started)),
        )
        return response, counts

    def _put(self, item: Any) -> None:
        self.finished.put(item)
        self.places.ring()
        self.stirred.set()

    async def _show(self) -> None:
        """Show on rank 0 how many responses have come."""
        seen = 0
        with progress.phase("responses", len(self.prompts)) as shown:
            while seen < len(self.prompts):
                rung = self.places.rung()
                shown.advance(rung - seen)
                seen = rung
                await asyncio.sleep(POLL_S)


def read(answer: Answer, sampling: Sampling, vocab_size: int, stop_ids: frozenset[int]) -> Response:
    """Read a server's answer to one request.

    Raises:
        RuntimeError: it is not what was asked for.
    """
    meta, reason = answer.meta_info, answer.meta_info.finish_reason.type
    tokens, log_probs = meta.output_token_logprobs.ids, meta.output_token_logprobs.log_probs
    stopped = len(tokens) > 0 and int(tokens[-1]) in stop_ids
    whole = reason == "stop" or len(tokens) == sampling.max_new_tokens
    values = np.isfinite(log_probs).all() and (tokens < vocab_size).all()
    if not len(tokens) or not whole or not values:
        raise RuntimeError(
            f"a server's answer is not what was asked for: {len(tokens)} tokens of "
            f"{sampling.max_new_tokens} (finish reason {reason}), the highest id "
            f"{max(tokens, default=None)} of {vocab_size}, {np.isfinite(log_probs).sum()} finite "
            "log-probabilities"
        )
    return Response(
        tokens,
        log_probs,
        _versions(meta, len(tokens), answer.replica_version),
        truncated=reason != "stop" and not stopped,
    )


def _versions(meta: Meta, tokens: int, replica_version: int | None) -> np.ndarray:
    """Return the version of each token's weights, [n] int32.

    A server whose weights came from its disk calls them "default": they are `replica_version`.
    """
    spans = meta.weight_versions or [VersionSpan(meta.weight_version, 0, tokens)]
    versions = np.full(tokens, replica_version, np.int32)
    for span in spans:
        if str(span.version).isdecimal():
            versions[span.start : span.end] = int(span.version)
    return versions
