"""A batch of responses that SGLang servers are generating, on every rank."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_taopd.parallel import progress, watchdog
from megatron_taopd.parallel.objects import SIGN_OF_LIFE_S
from megatron_taopd.rollout.engine import NOTHING, Response, Sampling, batch_of
from megatron_taopd.rollout.places import Places
from megatron_taopd.serving.answers import Answer, Meta, VersionSpan
from megatron_taopd.serving.client import Elsewhere
from megatron_taopd.types import RolloutBatch

POLL_S = 0.1  # how often rank 0 looks for what other ranks have, and replicas without weights
COUNTS = (
    *("tokens", "prompt", "cached", "retractions", "verifications", "milliseconds"),
    *("interruptions", "retries", "timeouts", "restarts"),
)
FAILED = -1  # instead of COUNTS
NO_PARCEL = torch.empty(0, dtype=torch.int32)


class News(NamedTuple):
    """What rank 0 has heard; nothing, if that takes longer than SIGN_OF_LIFE_S.

    Attributes:
        stale: servers have come back without weights.
        rung: of the batches that were waited for those, by number, of which responses have come, or
            failed, on some rank.
    """

    stale: bool = False
    rung: tuple[int, ...] = ()


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
    stirred: threading.Event

    def request(self, prompt: Sequence[int], sampling: Sampling, cache_key: str) -> dict: ...

    def stop_ids(self, sampling: Sampling) -> frozenset[int]: ...

    def on_rank_0(self, work: Callable[[], Any]) -> Any: ...

    def places(self, places: Sequence[int]) -> Places: ...

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
        so_far: Sequence[Response] | None = None,
    ):
        self.engine, self.sampling = engine, sampling
        self.prompts = [prompt for prompt in prompts for _ in range(sampling.samples)]
        self.indices = [index for index in prompt_indices for _ in range(sampling.samples)]
        # What there is of each, as far as this rank knows.
        self.so_far = list(so_far or [NOTHING] * len(self.prompts))
        self.responses = [r if r.finished else None for r in self.so_far]
        self.missing = self.responses.count(None)
        self.unread: list[int] = []  # places that `parts` has not handed out
        self.seconds = 0.0  # from the first request to the last answer, on rank 0
        self.heard = 0  # how many times a rank had rung when rank 0 last looked
        self.cache_key = uuid.uuid4().hex
        self.places = engine.places([i for i, r in enumerate(self.responses) if r is None])
        self.finished: queue.SimpleQueue = queue.SimpleQueue()  # of this rank
        self.started = time.monotonic()
        self.tasks = []
        if not self.missing:
            return
        engine.pending += 1
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
                advance(self.engine, [self])
            if self.unread:
                places, self.unread = self.unread, []
                yield torch.tensor(places), self._batch(places)

    def result(self) -> RolloutBatch:
        """See `Pending.result`. Before `parts` or after; collective and errors likewise."""
        while self.missing:
            advance(self.engine, [self])
        return self._batch(range(len(self.prompts)))

    def take_in(self) -> None:
        """Give every rank what the ranks that ask have got. Collective: see `parts`."""
        for parcel in self.engine.from_sources(self._pack()):
            self._unpack(parcel)

    def everything_so_far(self) -> list[Response]:
        """Return what there is of each response, finished or not, the same on every rank.

        Collective: as for a part, with all that was begun and is not known to be finished.
        """
        open_places = [place for place, known in enumerate(self.responses) if known is None]
        begun = [(place, self.so_far[place]) for place in open_places]
        begun = [(place, response) for place, response in begun if len(response.tokens)]
        found: dict[int, Response] = dict.fromkeys(open_places, NOTHING)
        for parcel in self.engine.from_sources(packed(begun) if begun else NO_PARCEL):
            for place, response in unpacked(parcel.numpy()):
                # Of a place that was handed on both ranks know something, and one knows more.
                if len(response.tokens) > len(found[place].tokens):
                    found[place] = response
        return [known or found[place] for place, known in enumerate(self.responses)]

    def _batch(self, places: Iterable[int]) -> RolloutBatch:
        places = list(places)
        return batch_of(
            [self.prompts[place] for place in places],
            [self.indices[place] for place in places],
            [self.responses[place] for place in places],
        )

    def has_rung(self) -> bool:
        """Tell, on rank 0, whether a rank has rung since this was last asked."""
        rung = self.places.rung()
        self.heard, before = rung, self.heard
        return rung > before

    def stop(self) -> None:
        """End what this rank still does for the batch: it waits for places, or has failed."""
        self.engine.pending -= 1
        for task in self.tasks:
            task.cancel()

    # What a rank has, as one array

    def _pack(self) -> Tensor:
        """Return [n] int32: what this rank has seen since it was last asked; nothing, if nothing.

        COUNTS and what is `packed`. Or FAILED and why, by letters.
        """
        finished = []
        while not self.finished.empty():
            finished.append(self.finished.get())
            if isinstance(finished[-1], Exception):
                why = str(finished[-1]) or repr(finished[-1])
                letters = np.frombuffer(why.encode("utf-32-le"), np.int32)
                return torch.from_numpy(np.concatenate([[FAILED], letters]).astype(np.int32))
        if not finished:
            return NO_PARCEL
        counts = sum((counted for *_, counted in finished), self.engine.asks.take_counts())
        counts["milliseconds"] = max(counted["milliseconds"] for *_, counted in finished)
        numbers = torch.tensor([counts[name] for name in COUNTS], dtype=torch.int32)
        return torch.cat([numbers, packed([item[:2] for item in finished])])

    def _unpack(self, parcel: Tensor) -> None:
        """Take what a rank has packed.

        Raises:
            RuntimeError: a response failed there.
        """
        values = parcel.numpy()
        if values[0] == FAILED:
            raise RuntimeError(values[1:].tobytes().decode("utf-32-le"))
        numbers, values = np.split(values, [len(COUNTS)])
        if self.engine.replicas is not None:
            counts = dict(zip(COUNTS, numbers.tolist(), strict=True))
            self.seconds = max(self.seconds, counts.pop("milliseconds") / 1000)
            self.engine.counts.update(counts)
        for place, response in unpacked(values):
            assert self.responses[place] is None, f"response {place} came twice"
            self.responses[place] = response
            self.missing -= 1
            self.unread.append(place)
        self.unread.sort()
        if not self.missing:
            self.engine.counts["milliseconds"] += round(1000 * self.seconds)
            self.stop()

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
                    self.places.hand_on(place, error.made, as_json(self.so_far[place]))
            if engine.alone or not await engine.asks.any_ready():
                return
            taken = await self.places.take(lambda: engine.asks.troubles is None)
            if taken is None:
                return
            place, made, so_far = taken
            if so_far:
                self.so_far[place] = of_json(so_far)

    async def _respond(self, place: int, made: int) -> tuple[Response, Counter[str]]:
        """Ask for one response; return it and COUNTS of it.

        Each is a request of its own, so that it is finished and repeated alone. The prompt that
        samples share comes from SGLang's prefix cache. A response that new weights interrupt is
        asked for once more, with what there is of it as a part of the prompt.
        """
        engine, counts = self.engine, Counter[str]()
        while True:
            so_far = self.so_far[place]
            left = self.sampling.max_new_tokens - len(so_far.tokens)
            sampling = replace(self.sampling, max_new_tokens=left)
            prompt = [*self.prompts[place], *so_far.tokens.tolist()]
            request = engine.request(prompt, sampling, self.cache_key)
            answer = await engine.asks.complete(request, made, engine.alone)
            watchdog.heartbeat()
            meta = answer.meta_info
            rest = read(answer, sampling, engine.vocab_size, engine.stop_ids(sampling))
            counts.update(
                tokens=len(rest.tokens),
                prompt=meta.prompt_tokens,
                cached=meta.cached_tokens,
                retractions=meta.num_retractions,
                verifications=meta.spec_verify_ct,
                interruptions=not rest.finished,
            )
            self.so_far[place] = so_far.followed_by(rest)
            if rest.finished:
                counts["milliseconds"] = round(1000 * (time.monotonic() - self.started))
                return self.so_far[place], counts
            made = 0

    def _put(self, item: Any) -> None:
        self.finished.put(item)
        self.places.ring()
        self.engine.stirred.set()

    async def _show(self) -> None:
        """Show on rank 0 how many responses have come."""
        seen = 0
        missing = self.missing
        with progress.phase("responses", missing) as shown:
            while seen < missing:
                rung = self.places.rung()
                shown.advance(rung - seen)
                seen = rung
                await asyncio.sleep(POLL_S)


def advance(engine: Engine, batches: Sequence[Generating]) -> None:
    """Wait for what rank 0 hears next of these batches, and act on it.

    Collective: a broadcast of some bytes, and `take_in` of each batch that has responses.

    Raises:
        RuntimeError: of a rank that asks, on every rank.
    """
    try:
        news = engine.on_rank_0(lambda: _next(engine, batches))
        for number in news.rung:
            batches[number].take_in()
    except RuntimeError:
        for batch in batches:
            batch.stop()
        raise
    if news.stale:
        engine.resync()


def _next(engine: Engine, batches: Sequence[Generating]) -> News:
    """Return what rank 0 hears next; nothing, if that is more than SIGN_OF_LIFE_S away."""
    deadline = time.monotonic() + SIGN_OF_LIFE_S
    while time.monotonic() < deadline:
        if engine.replicas.stale:
            return News(stale=True)
        engine.stirred.clear()
        if rung := tuple(i for i, batch in enumerate(batches) if batch.has_rung()):
            return News(rung=rung)
        engine.stirred.wait(POLL_S)
    return News()


def packed(responses: Sequence[tuple[int, Response]]) -> Tensor:
    """Return [n] int32: responses and their places.

    How many, of each place, length, and whether it is finished and cut off; of all of them tokens,
    log-probabilities and versions.
    """
    numbers = [
        len(responses),
        *(place for place, _ in responses),
        *(len(r.tokens) for _, r in responses),
        *(r.finished for _, r in responses),
        *(r.truncated for _, r in responses),
    ]
    arrays = [
        np.array(numbers, np.int32),
        *(r.tokens for _, r in responses),
        *(r.log_probs.view(np.int32) for _, r in responses),
        *(r.versions for _, r in responses),
    ]
    return torch.from_numpy(np.concatenate(arrays))


def unpacked(values: np.ndarray) -> Iterator[tuple[int, Response]]:
    """Yield what was `packed`."""
    count, values = int(values[0]), values[1:]
    head, values = np.split(values, [4 * count])
    places, lengths, finished, truncated = head.reshape(4, count)
    ends = lengths.cumsum()[:-1]
    arrays = [np.split(part, ends) for part in np.split(values, 3)]
    for i, (tokens, log_probs, versions) in enumerate(zip(*arrays, strict=True)):
        ended = bool(finished[i]), bool(truncated[i])
        yield int(places[i]), Response(tokens, log_probs.view(np.float32), versions, *ended)


def as_json(so_far: Response) -> list:
    """Return what there is of an unfinished response as `of_json` reads it."""
    return [so_far.tokens.tolist(), so_far.log_probs.tolist(), so_far.versions.tolist()]


def of_json(values: list) -> Response:
    """Return an unfinished response that was made `as_json`."""
    tokens, log_probs, versions = values
    return Response(
        np.array(tokens, np.int32),
        np.array(log_probs, np.float32),
        np.array(versions, np.int32),
        finished=False,
    )


def read(answer: Answer, sampling: Sampling, vocab_size: int, stop_ids: frozenset[int]) -> Response:
    """Read a server's answer to one request; an aborted one has what was generated until then.

    Raises:
        RuntimeError: it is not what was asked for.
    """
    meta, reason = answer.meta_info, answer.meta_info.finish_reason.type
    tokens, log_probs = meta.output_token_logprobs.ids, meta.output_token_logprobs.log_probs
    # SGLang says "abort" also where the last token would have ended it.
    stopped = len(tokens) > 0 and int(tokens[-1]) in stop_ids
    finished = reason == "stop" or stopped or len(tokens) == sampling.max_new_tokens
    whole = reason == "abort" or (len(tokens) and finished)
    values = np.isfinite(log_probs).all() and (tokens < vocab_size).all()
    if not whole or not values:
        raise RuntimeError(
            f"a server's answer is not what was asked for: {len(tokens)} tokens of "
            f"{sampling.max_new_tokens} (finish reason {reason}), the highest id "
            f"{max(tokens, default=None)} of {vocab_size}, {np.isfinite(log_probs).sum()} finite "
            "log-probabilities"
        )
    versions = _versions(meta, len(tokens), answer.replica_version)
    truncated = finished and reason != "stop" and not stopped
    return Response(tokens, log_probs, versions, finished, truncated)


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
