"""The engine on SGLang servers.

Rank 0 talks to them; the other ranks are told. Which responses come from which server is left to
their load, and SGLang's sampling is not reproducible (`sampling_seed` does nothing without its
deterministic mode): two runs of one seed differ in their samples.
"""

from __future__ import annotations

import queue
import time
from asyncio import create_task, gather
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.parallel import watchdog
from megatron_taopd.rollout.engine import Sampling, make_rollout_batch
from megatron_taopd.rollout.weight_sync import Probe, WeightSync
from megatron_taopd.serving.client import Replicas
from megatron_taopd.serving.model import ServedModel
from megatron_taopd.serving.replica import Replica
from megatron_taopd.types import RolloutBatch

POLL_S = 0.1  # how often rank 0 looks for replicas without weights while it waits for responses
SIGN_OF_LIFE_S = 60.0  # rank 0's to the others while nothing happens; gloo gives up after minutes
FAILED_SYNCS = 3  # in a row, each explained by a server's end
MOST_BANNED = 8192  # ids that each request can name
BANNED = -1e9  # bias of a token that must not be drawn; JSON has no infinity


class SGLangEngine:
    """A `RolloutEngine` over SGLang servers of the student.

    Args:
        replicas: on rank 0; None on the others. The engine closes it.
        model: that they serve; its `longest` is the longest sequence.
        vocab_size: tokens with this id or above are never drawn and take no probability.
        eos_token_ids: end a response.
        sync: how weights get to the servers; None: the replicas have `fixed_weights`.
        weights: the student's named tensors as they are now, from the first; collective. For
            servers that come back without them, so None with fixed weights.
        version: of these weights; None: the last update's.
        probe: looks after each sync whether it took effect; None: nothing does.
        release_memory: `offload` has the servers give back their device memory.

    Collective: makes a gloo group.
    """

    name = "sglang"

    def __init__(
        self,
        replicas: Replicas | None,
        model: ServedModel,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        sync: WeightSync | None = None,
        weights: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
        version: Callable[[], int] | None = None,
        probe: Probe | None = None,
        release_memory: bool = False,
    ):
        banned = range(vocab_size, model.vocab_size)
        if len(banned) > MOST_BANNED:
            raise ValueError(
                f"rollout.engine: the student has {len(banned)} tokens that must not be drawn; "
                f"SGLang can be kept from {MOST_BANNED}: take the engine local"
            )
        self.replicas, self.model, self.vocab_size = replicas, model, vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.sync, self.weights = sync, weights
        self.logit_bias = {str(token): BANNED for token in banned} or None
        self.probe, self.release_memory = probe, release_memory
        self.version = 0
        self.current_version = version or (lambda: self.version)
        self.pending = 0  # batches
        self.failed_syncs = 0
        self.counts: Counter[str] = Counter()
        self.leads = replicas is not None
        shared = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo") if shared else None
        assert self.leads == (not shared or dist.get_rank() == 0)

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_indices: Sequence[int],
        step: int,
        sampling: Sampling,
    ) -> Generating:
        """See `RolloutEngine.submit`; `step` does not matter here.

        Collective: a broadcast of 16 bytes, and where a server came back, its weights.

        Raises:
            ValueError: a prompt that does not fit, on every rank.
        """
        if sampling.top_logprobs > self.vocab_size:
            raise ValueError(
                f"top_logprobs {sampling.top_logprobs} is over the vocabulary of {self.vocab_size}"
            )
        for prompt, index in zip(prompts, prompt_indices, strict=True):
            name = f"prompt {index}"
            self.model.check(name, prompt, sampling.max_new_tokens, sampling.top_logprobs)
        if self.broadcast(Word.RESYNC if self.leads and self.replicas.stale else Word.NOTHING)[0]:
            self.resync()
        self.pending += 1
        return Generating(self, prompts, prompt_indices, sampling)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_indices: Sequence[int],
        step: int,
        sampling: Sampling,
    ) -> RolloutBatch:
        """See `RolloutEngine.generate`."""
        return self.submit(prompts, prompt_indices, step, sampling).result()

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `RolloutEngine.update_weights`. A server that is down gets them when it is back.

        Raises:
            RuntimeError: a server refused them, on every rank.
        """
        assert not self.pending, "weights are updated between batches"
        self.version = version
        self._push(self.replicas.live if self.leads else None, lambda: named_tensors, version)

    def resync(self) -> None:
        """Give the trainer's weights to the servers that came back without. Collective."""
        self.counts["resyncs"] += 1
        version = self.current_version()
        self._push(self.replicas.stale if self.leads else None, self.weights, version)

    def _push(
        self,
        targets: Sequence[Replica] | None,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        version: int,
    ) -> None:
        """Sync and probe. Collective: a broadcast before and after."""
        if self.leads:
            targets = self.replicas.run(self.replicas.begin_update(targets))
        if not self.broadcast(Word.RESYNC if targets else Word.NOTHING)[0]:
            return
        trouble = None
        try:
            self.sync.push(self.replicas, targets, weights(), version)
            if self.probe is not None:
                self.probe.check(self.replicas, targets)
        except RuntimeError as error:
            trouble = str(error)
        if self.leads and trouble is None:
            self.replicas.run(self.replicas.commit_update(targets, version))
        self._settle(trouble, targets, f"weights of version {version}")
        if trouble is None:
            self.failed_syncs = 0

    def _settle(self, trouble: str | None, targets: Sequence[Replica] | None, what: str) -> None:
        """Go on after a trouble with these servers if one of them is in trouble itself.

        Collective: a broadcast of 16 bytes and what is wrong.

        Raises:
            RuntimeError: none is, or it was so for FAILED_SYNCS in a row, on every rank.
        """
        excused = False
        if self.leads and trouble is not None:
            excused = self.replicas.run(self.replicas.abort_update(targets))
            excused = excused and self.failed_syncs + 1 < FAILED_SYNCS
        word = Word.NOTHING if trouble is None else Word.RESYNC if excused else Word.ERROR
        word, message = self.broadcast(word, _encoded(trouble or ""))
        self.failed_syncs += word != Word.NOTHING
        if word == Word.ERROR:
            raise RuntimeError(f"{what}: {_decoded(message)}")

    def broadcast(self, word: Word, payload: np.ndarray | None = None) -> tuple[Word, np.ndarray]:
        """Rank 0's word and its int32 numbers, on every rank.

        Collective: a broadcast of 16 bytes, and one of the numbers if there are any.
        """
        payload = np.zeros(0, np.int32) if payload is None else payload
        if self.group is None:
            return word, payload
        header = torch.tensor([word, len(payload)])
        dist.broadcast(header, src=0, group=self.group)
        word, size = Word(int(header[0])), int(header[1])
        numbers = torch.from_numpy(payload) if self.leads else torch.zeros(size, dtype=torch.int32)
        if size:
            dist.broadcast(numbers, src=0, group=self.group)
        return word, numbers.numpy()

    def request(self, prompt: Sequence[int], sampling: Sampling) -> dict:
        """What /generate is asked for one response; nothing is left to a server's defaults."""
        return {
            "input_ids": list(prompt),
            "sampling_params": {
                "max_new_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1,
                "min_p": 0.0,
                "frequency_penalty": 0.0,
                "presence_penalty": 0.0,
                "repetition_penalty": 1.0,
                "min_new_tokens": 0,
                "n": 1,
                "stop": None,
                "stop_token_ids": sorted(self.stop_ids(sampling)),
                "ignore_eos": False,
                "logit_bias": self.logit_bias,
            },
            "return_logprob": True,
            "top_logprobs_num": sampling.top_logprobs,
            "stream": False,
        }

    def stop_ids(self, sampling: Sampling) -> frozenset[int]:
        return self.eos_token_ids.union(sampling.stop_token_ids)

    def metrics(self) -> dict[str, float]:
        """Of the time since the last call, on rank 0; empty on the others."""
        if not self.leads:
            return {}
        counts, self.counts = self.counts, Counter()
        served = self.replicas.take_counts()
        return {
            "rollout/retries": served["retries"],
            "rollout/timeouts": served["timeouts"],
            "rollout/restarts": served["restarts"],
            "rollout/resyncs": counts["resyncs"],
            "rollout/retractions": counts["retractions"],
            "rollout/cached_share": counts["cached"] / max(counts["prompt"], 1),
            "rollout/tokens_per_second": counts["tokens"] / max(counts["seconds"], 1e-9),
        }

    def offload(self) -> None:
        """See `RolloutEngine.offload`. Collective if memory is released.

        A server that is lost on the way does without; the others wait for weights.
        """
        if not self.release_memory:
            return
        targets, trouble = self.replicas.live if self.leads else None, None
        try:
            self.sync.release(self.replicas, targets)
        except RuntimeError as error:
            trouble = str(error)
        self._settle(trouble, targets, "release of memory")

    def close(self) -> None:
        if self.leads:
            self.replicas.close()


class Word(IntEnum):
    """What rank 0 tells the others."""

    NOTHING = 0
    PART = auto()  # these responses are there
    RESYNC = auto()  # servers need weights
    ERROR = auto()


class Generating:
    """A `Pending` batch of an `SGLangEngine`."""

    def __init__(
        self,
        engine: SGLangEngine,
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

        Collective: for each part two broadcasts, of 16 bytes and of 12 a response and 12 + 8 k a
        response token with k recorded tokens.

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
        """Do what rank 0 says next. Collective."""
        word, payload = self.engine.broadcast(*(self._next() if self.engine.leads else (0,)))
        if word == Word.ERROR:
            self.engine.pending -= 1
            raise RuntimeError(_decoded(payload))
        if word == Word.RESYNC:
            self.engine.resync()
        if word == Word.PART:
            self._take(payload)

    def _next(self) -> tuple[Word, np.ndarray | None]:
        """What rank 0 has to say next."""
        deadline = time.monotonic() + SIGN_OF_LIFE_S
        while time.monotonic() < deadline:
            if self.engine.replicas.stale:
                return Word.RESYNC, None
            try:
                finished = [self.finished.get(timeout=POLL_S)]
            except queue.Empty:
                continue
            while not self.finished.empty():
                finished.append(self.finished.get())
            for item in finished:
                if isinstance(item, BaseException):
                    return Word.ERROR, _encoded(str(item))
            return Word.PART, _packed(dict(finished), self.sampling.top_logprobs)
        return Word.NOTHING, None

    def _take(self, payload: np.ndarray) -> None:
        responses = _unpacked(payload, self.sampling.top_logprobs)
        for place, response in responses.items():
            assert self.responses[place] is None, f"response {place} came twice"
            self.responses[place] = response
        self.missing -= len(responses)
        self.engine.pending -= not self.missing
        self.unread = sorted([*self.unread, *responses])

    def _batch(self, places: Iterable[int]) -> RolloutBatch:
        places = list(places)
        responses = [self.responses[place] for place in places]
        tops = None
        if k := self.sampling.top_logprobs:
            tops = [
                (
                    torch.from_numpy(r.top_ids).view(-1, k),
                    torch.from_numpy(r.top_log_probs).view(-1, k),
                )
                for r in responses
            ]
        return make_rollout_batch(
            [self.prompts[place] for place in places],
            [self.indices[place] for place in places],
            [torch.from_numpy(r.tokens) for r in responses],
            [torch.from_numpy(r.log_probs) for r in responses],
            [r.truncated for r in responses],
            [torch.from_numpy(r.versions) for r in responses],
            tops,
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
            await gather(*tasks)
        except Exception as error:
            self.finished.put(error)
        finally:
            for task in tasks:
                task.cancel()
            engine.counts["seconds"] += time.monotonic() - started

    async def _respond(self, place: int) -> None:
        """One response; each is a request of its own, so that it is finished and repeated alone.
        The prompt that samples share comes from SGLang's prefix cache."""
        engine = self.engine
        request = engine.request(self.prompts[place], self.sampling)
        answer = await engine.replicas.complete(request)
        watchdog.heartbeat()
        meta = answer["meta_info"]
        response = read(answer, self.sampling, engine.vocab_size, engine.stop_ids(self.sampling))
        engine.counts["tokens"] += len(response.tokens)
        engine.counts["prompt"] += meta.get("prompt_tokens", 0)
        engine.counts["cached"] += meta.get("cached_tokens", 0)
        engine.counts["retractions"] += meta.get("num_retractions", 0)
        self.finished.put((place, response))


@dataclass(frozen=True)
class Response:
    """n tokens: int32 ids [n], float32 log-probabilities [n], int32 weight versions [n], and k tops
    of each, [n k]."""

    tokens: np.ndarray
    log_probs: np.ndarray
    versions: np.ndarray
    top_ids: np.ndarray
    top_log_probs: np.ndarray
    truncated: bool


def read(answer: dict, sampling: Sampling, vocab_size: int, stop_ids: frozenset[int]) -> Response:
    """What a server's answer says.

    Raises:
        RuntimeError: not what it was asked for.
    """
    meta, reason = answer["meta_info"], answer["meta_info"]["finish_reason"]["type"]
    log_probs, tokens = _columns(meta["output_token_logprobs"])
    top_log_probs, top_ids = np.zeros(0, np.float32), np.zeros(0, np.int32)
    if k := sampling.top_logprobs:
        top_log_probs, top_ids = _columns(
            [triple for position in meta["output_top_logprobs"] for triple in position[:k]]
        )
    stopped = len(tokens) > 0 and int(tokens[-1]) in stop_ids
    whole = reason == "stop" or len(tokens) == sampling.max_new_tokens
    values = np.isfinite(log_probs).all() and (tokens < vocab_size).all()
    if not len(tokens) or not whole or not values or len(top_ids) != k * len(tokens):
        raise RuntimeError(
            f"a server's answer is not what was asked for: {len(tokens)} tokens of "
            f"{sampling.max_new_tokens} (finish reason {reason}), the highest id "
            f"{max(tokens, default=None)} of {vocab_size}, {np.isfinite(log_probs).sum()} finite "
            f"log-probabilities, {len(top_ids)} tops of {k} a token"
        )
    return Response(
        tokens,
        log_probs,
        _versions(meta, len(tokens), answer["replica_version"]),
        top_ids,
        top_log_probs,
        truncated=reason != "stop" and not stopped,
    )


def _columns(triples: Sequence[Sequence]) -> tuple[np.ndarray, np.ndarray]:
    """(log-probabilities, ids) of [log-probability, id, text] triples."""
    return (
        np.array([triple[0] for triple in triples], np.float32),
        np.array([triple[1] for triple in triples], np.int32),
    )


def _versions(meta: dict, tokens: int, replica_version: int) -> np.ndarray:
    """[n] int32. A server whose weights came from its disk calls them "default"."""
    spans = meta.get("weight_versions") or [
        {"version": meta.get("weight_version"), "start": 0, "end": tokens}
    ]
    versions = np.full(tokens, replica_version, np.int32)
    for span in spans:
        if str(span["version"]).isdecimal():
            versions[span["start"] : span["end"]] = int(span["version"])
    return versions


def _packed(responses: dict[int, Response], k: int) -> np.ndarray:
    """int32: n | places [n] | lengths [n] | truncated [n] | of each response its tokens, bits of
    log-probabilities, versions, tops, bits of their log-probabilities."""
    found = [responses[place] for place in sorted(responses)]
    heads = [
        [len(found)],
        sorted(responses),
        [len(r.tokens) for r in found],
        [r.truncated for r in found],
    ]
    arrays = [np.array(head, np.int32) for head in heads]
    for r in found:
        arrays += [r.tokens, r.log_probs.view(np.int32), r.versions]
        arrays += [r.top_ids, r.top_log_probs.view(np.int32)]
    return np.concatenate(arrays)


def _unpacked(payload: np.ndarray, k: int) -> dict[int, Response]:
    count = int(payload[0])
    places, lengths, truncated = payload[1 : 1 + 3 * count].reshape(3, count).tolist()
    rest = iter(np.split(payload[1 + 3 * count :], _ends(lengths, k)))
    responses = {}
    for place, cut in zip(places, truncated, strict=True):
        tokens, log_probs, versions, top_ids, top_log_probs = islice(rest, 5)
        responses[place] = Response(
            tokens,
            log_probs.view(np.float32),
            versions,
            top_ids,
            top_log_probs.view(np.float32),
            bool(cut),
        )
    return responses


def _ends(lengths: Sequence[int], k: int) -> np.ndarray:
    """Where each array of each response ends."""
    return np.cumsum([size for n in lengths for size in (n, n, n, n * k, n * k)])


def _encoded(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def _decoded(numbers: np.ndarray) -> str:
    return numbers.astype(np.uint8).tobytes().decode()
