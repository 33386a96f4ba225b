"""A batch of responses that SGLang servers are generating, on every rank."""

from __future__ import annotations

import queue
import time
from asyncio import create_task, gather
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_taopd.parallel import progress, watchdog
from megatron_taopd.parallel.objects import SIGN_OF_LIFE_S
from megatron_taopd.rollout.engine import Sampling, make_rollout_batch
from megatron_taopd.serving.answers import Answer, Meta, VersionSpan
from megatron_taopd.types import RolloutBatch

POLL_S = 0.1  # how often rank 0 looks for replicas without weights while it waits for responses


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


@dataclass(frozen=True)
class Progress:
    """The part of a batch that rank 0 has seen.

    Attributes:
        responses: those that have come, by their place in the batch.
        resync: servers have come back without weights.
    """

    responses: dict[int, Response] = field(default_factory=dict)
    resync: bool = False


class Engine(Protocol):
    """What a batch asks of its `SGLangEngine`; `leads` on rank 0, which alone has the replicas."""

    leads: bool
    replicas: Any
    vocab_size: int
    pending: int
    counts: Counter[str]

    def request(self, prompt: Sequence[int], sampling: Sampling) -> dict: ...

    def stop_ids(self, sampling: Sampling) -> frozenset[int]: ...

    def on_rank_0(self, work: Callable[[], Any]) -> Any: ...

    def resync(self) -> None: ...


class Generating:
    """A `Pending` batch of an `SGLangEngine`. Rank 0 asks the servers; the others hear of it."""

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
        if engine.leads:
            self.finished: queue.SimpleQueue = queue.SimpleQueue()
            self.future = engine.replicas.spawn(self._generate())

    def parts(self) -> Iterator[tuple[Tensor, RolloutBatch]]:
        """See `Pending.parts`.

        Collective: for each part, and every SIGN_OF_LIFE_S without any, a broadcast: 200 to 500
        bytes a response, and 12 + 8 k a response token with k recorded tokens.

        Raises:
            RuntimeError: of rank 0, on every rank.
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
        """Wait for what rank 0 sees next, and act on it. Collective."""
        try:
            seen = self.engine.on_rank_0(self._next)
        except RuntimeError:
            self.engine.pending -= 1
            raise
        if seen.resync:
            self.engine.resync()
        if seen.responses:
            self._take(seen.responses)

    def _next(self) -> Progress:
        """Return what happens next, on rank 0; nothing, if that is more than SIGN_OF_LIFE_S away.

        Raises:
            RuntimeError: a response failed.
        """
        deadline = time.monotonic() + SIGN_OF_LIFE_S
        while time.monotonic() < deadline:
            if self.engine.replicas.stale:
                return Progress(resync=True)
            try:
                finished = [self.finished.get(timeout=POLL_S)]
            except queue.Empty:
                continue
            while not self.finished.empty():
                finished.append(self.finished.get())
            for item in finished:
                if isinstance(item, Exception):
                    raise RuntimeError(str(item)) from item
            return Progress(dict(finished))
        return Progress()

    def _take(self, responses: dict[int, Response]) -> None:
        for place, response in responses.items():
            assert self.responses[place] is None, f"response {place} came twice"
            self.responses[place] = response
        self.missing -= len(responses)
        self.engine.pending -= not self.missing
        self.unread = sorted([*self.unread, *responses])

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

    # On rank 0's event loop

    async def _generate(self) -> None:
        engine = self.engine
        started = time.monotonic()
        tasks = [create_task(self._respond(place)) for place in range(len(self.prompts))]
        try:
            if self.sampling.temperature not in (0, 1):
                for replica in engine.replicas.all:
                    if not replica.raw_logprobs:
                        raise ValueError(
                            f"rollout.temperature {self.sampling.temperature}: {replica.url} "
                            "reports log-probabilities at that temperature, not at 1; start it "
                            "with SGLANG_RETURN_ORIGINAL_LOGPROB=1 in its environment"
                        )
            with progress.phase("responses", len(tasks)) as shown:
                for task in tasks:
                    task.add_done_callback(lambda _: shown.advance())
                await gather(*tasks)
        except Exception as error:
            self.finished.put(error)
        finally:
            for task in tasks:
                task.cancel()
            engine.counts["seconds"] += time.monotonic() - started

    async def _respond(self, place: int) -> None:
        """Ask for one response.

        Each is a request of its own, so that it is finished and repeated alone. The prompt that
        samples share comes from SGLang's prefix cache.
        """
        engine = self.engine
        request = engine.request(self.prompts[place], self.sampling)
        answer = await engine.replicas.complete(request)
        watchdog.heartbeat()
        meta = answer.meta_info
        response = read(answer, self.sampling, engine.vocab_size, engine.stop_ids(self.sampling))
        engine.counts["tokens"] += len(response.tokens)
        engine.counts["prompt"] += meta.prompt_tokens
        engine.counts["cached"] += meta.cached_tokens
        engine.counts["retractions"] += meta.num_retractions
        self.finished.put((place, response))


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
