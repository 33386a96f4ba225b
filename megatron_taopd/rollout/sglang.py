"""The engine on SGLang servers.

Rank 0 looks after them and gives them weights. Where they are dealt over several ranks
(`serving.sources`), each of these asks its own, reads what they answer and gives it to all ranks;
else rank 0 asks all. Which responses come from which server is left
to their load, and SGLang's sampling is not reproducible (`sampling_seed` does nothing without its
deterministic mode): two runs of one seed differ in their samples.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from megatron_taopd.parallel import platform
from megatron_taopd.parallel.arrays import from_sources
from megatron_taopd.parallel.compat.torch_internals import default_store
from megatron_taopd.parallel.objects import broadcast_object, gather, on_rank_0
from megatron_taopd.rollout.engine import Response, Sampling
from megatron_taopd.rollout.places import Places
from megatron_taopd.rollout.sglang_batch import Generating, advance
from megatron_taopd.rollout.weight_sync import Probe, WeightSync
from megatron_taopd.serving.client import PUSHES, Replicas
from megatron_taopd.serving.model import ServedModel
from megatron_taopd.serving.protocol import Unreachable
from megatron_taopd.serving.replica import Replica
from megatron_taopd.types import RolloutBatch

FAILED_SYNCS = 3  # in a row, each explained by a server's end
MOST_BANNED = 8192  # ids that each request can name
BANNED = -1e9  # bias of a token that must not be drawn; JSON has no infinity

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Updates:
    """The way on which the servers of an engine get the student's weights.

    Attributes:
        sync: carries them.
        weights: the student's named tensors as they are now, from the first; collective. For
            servers that come back without them.
        version: of these weights; None: the last update's.
        probe: looks after each sync whether it took effect; None: nothing does.
        release_memory: `offload` has the servers give back their device memory.
        keep_cache: responses that an update interrupts go on with the cache that the weights before
            it have made; False: it is computed anew.
    """

    sync: WeightSync
    weights: Callable[[], Iterable[tuple[str, Tensor]]]
    version: Callable[[], int] | None = None
    probe: Probe | None = None
    release_memory: bool = False
    keep_cache: bool = False


class SGLangEngine:
    """A `RolloutEngine` over SGLang servers of the student.

    Args:
        replicas: on rank 0; None on the others. The engine closes it.
        model: that they serve; its `longest` is the longest sequence.
        vocab_size: tokens with this id or above are never drawn and take no probability.
        eos_token_ids: end a response.
        updates: how weights get to the servers; None: the replicas have `fixed_weights`.
        own: those of the servers that this rank asks; None on every rank: rank 0 asks all. The
            engine closes it.

    Collective: makes a gloo group.
    """

    name = "sglang"

    def __init__(
        self,
        replicas: Replicas | None,
        model: ServedModel,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        updates: Updates | None = None,
        own: Replicas | None = None,
    ):
        banned = range(vocab_size, model.vocab_size)
        if len(banned) > MOST_BANNED:
            raise ValueError(
                f"rollout.engine: the student has {len(banned)} tokens that must not be drawn; "
                f"SGLang can be kept from {MOST_BANNED}: take the engine local"
            )
        self.replicas, self.model, self.vocab_size = replicas, model, vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.updates = updates
        self.logit_bias = {str(token): BANNED for token in banned} or None
        self.version = 0  # of the last update
        self.pending = 0  # batches that are not complete
        self.stirred = threading.Event()  # this rank has something to tell
        self.failed_syncs = 0
        self.counts: Counter[str] = Counter()
        self.leads = replicas is not None
        shared = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo") if shared else None
        assert self.leads == (not shared or dist.get_rank() == 0)
        owners = gather(own is not None, self.group) if shared else [False]
        self.alone = not any(owners)  # rank 0 asks all
        self.sources = [0] if self.alone else [r for r, owns in enumerate(owners) if owns]
        self.asks = replicas if self.alone else own
        # What ranks tell each other of places; without others, this process itself.
        self.store = dist.HashStore() if self.alone else default_store()
        self.prefix = "" if self.alone else broadcast_object(uuid.uuid4().hex, group=self.group)
        self.batches = 0

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_indices: Sequence[int],
        step: int,
        sampling: Sampling,
        so_far: Sequence[Response] | None = None,
    ) -> Generating:
        """See `RolloutEngine.submit`; `step` does not matter here.

        Args:
            so_far: of each response what there is of it, where they were begun before.

        Collective: a broadcast of some bytes, with several sources a gather of some bytes a rank,
        and where a server came back, its weights.

        Raises:
            ValueError: a prompt that does not fit, on every rank.
        """
        for prompt, index in zip(prompts, prompt_indices, strict=True):
            name = f"prompt {index}"
            self.model.check(name, prompt, sampling.max_new_tokens)
        if self.on_rank_0(lambda: bool(self.replicas.stale)):
            self.resync()
        return Generating(self, prompts, prompt_indices, sampling, so_far)

    def wait_for_any(self, batches: Sequence[Generating]) -> None:
        """Wait until responses of any of these batches have come, or some time.

        Collective and errors: see `sglang_batch.advance`.
        """
        advance(self, batches)

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

        Responses under way are interrupted and go on with the new weights, each of their tokens
        with its own version.

        Raises:
            RuntimeError: a server refused them, on every rank.
        """
        self.version = version
        self._push(self.replicas.live if self.leads else None, lambda: named_tensors, version)

    def resync(self) -> None:
        """Give the trainer's weights to the servers that came back without. Collective."""
        self.counts["resyncs"] += 1
        updates = self.updates
        version = self.version if updates.version is None else updates.version()
        self._push(self.replicas.stale if self.leads else None, updates.weights, version)

    def _push(
        self,
        targets: Sequence[Replica] | None,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        version: int,
    ) -> None:
        """Sync and probe. A server that is not given the weights is left out if another serves.

        Collective: broadcasts of some bytes before and after.

        Raises:
            RuntimeError: no server is left to go on with, see `_settle`.
        """
        if self.leads:
            targets = self.replicas.run(self.replicas.begin_update(targets))
        urls = self.on_rank_0(lambda: [replica.url for replica in targets])
        if not urls:
            return
        self._hold(urls)
        if self.updates.release_memory:
            self._make_room()
        lost, trouble, silent = {}, None, False
        try:
            lost = self.updates.sync.push(self.replicas, targets, weights(), version)
            if self.updates.probe is not None:
                going = [r for r in targets if r.url not in lost] if self.leads else None
                self.updates.probe.check(self.replicas, going)
        except RuntimeError as error:
            trouble = str(error)
            # On rank 0, who judges, the cause is what was raised there.
            silent = any(isinstance(e, Unreachable) for e in (error, error.__cause__))
        if self.leads and trouble is None:
            going = [r for r in targets if r.url not in lost]
            self.replicas.run(self.replicas.commit_update(going, version))
            targets = [r for r in targets if r.url in lost]
        try:
            if self.on_rank_0(lambda: bool(self.replicas.ready)):  # there are servers to go on with
                self.failed_syncs = 0
                if self.leads:
                    self._leave_out({r: lost.get(r.url, trouble) for r in targets}, version)
            else:
                trouble = trouble or "; ".join(lost.values()) or None
                self._settle(trouble, targets, f"weights of version {version}", silent)
        finally:
            self._follow()

    def _leave_out(self, troubles: dict[Replica, str], version: int) -> None:
        """Go on without the servers that were not given the weights, a line for each."""
        given_up = self.replicas.run(self.replicas.leave_out(troubles))
        for replica, trouble in troubles.items():
            first, *_ = trouble.splitlines()
            where = f"{replica.url} fell out of the push of weights {version}"
            logger.warning(f"{where}, the others go on: {first}")
        for replica in given_up:
            logger.error(f"{replica.url} fell out of {PUSHES} pushes in a row; it is given up")

    def _hold(self, urls: Sequence[str]) -> None:
        """Have the ranks that ask these servers leave them alone while they get weights.

        What they are asked they answer with what there is.
        """
        if self.asks is None:
            return
        targets = [replica for replica in self.asks.all if replica.url in urls]
        if not self.alone:
            self.asks.run(self.asks.begin_update(targets))
        if self.pending:
            self.asks.run(self.asks.interrupt(targets))

    def _follow(self) -> None:
        """Tell the ranks that ask servers which weights each of them has.

        Collective: with several sources, a broadcast of the servers' urls.
        """
        if self.alone:
            return
        versions = self.on_rank_0(lambda: {r.url: r.version for r in self.replicas.all})
        if self.asks is not None:
            self.asks.run(self.asks.follow_update(versions))

    def _make_room(self) -> None:
        """Give back what torch has cached, on every rank, before servers take their memory again.

        Collective: a barrier.
        """
        platform.empty_cache()
        if self.group is not None:
            dist.barrier(self.group)

    def _settle(
        self, trouble: str | None, targets: Sequence[Replica] | None, what: str, silent: bool
    ) -> None:
        """Go on after a trouble with these servers if one of them is in trouble itself, or was.

        Args:
            trouble: what rank 0 says went wrong is what counts; None: nothing.
            silent: none of them refused anything, they were out of reach, perhaps for seconds.

        Collective: a broadcast of some bytes and what is wrong.

        Raises:
            RuntimeError: none is, or it was so for FAILED_SYNCS in a row, on every rank.
        """

        def judge() -> bool:
            if trouble is None:
                return False
            excused = self.replicas.run(self.replicas.abort_update(targets))
            if not (excused or silent) or self.failed_syncs + 1 >= FAILED_SYNCS:
                raise RuntimeError(f"{what}: {trouble}")
            return True

        try:
            self.failed_syncs += self.on_rank_0(judge)
        except RuntimeError:
            self.failed_syncs += 1
            raise

    def on_rank_0(self, work: Callable[[], T]) -> T:
        """Do the work on rank 0, which looks after the servers; return its result on every rank.

        Raises:
            RuntimeError: of the work, on every rank.

        Collective: `parallel.objects.on_rank_0`, of a small object; none in a world of one.
        """
        return work() if self.group is None else on_rank_0(work, self.group)

    def places(self, places: Sequence[int]) -> Places:
        """Deal these places of a batch over the ranks that ask servers.

        Collective: with several of them, a gather of some bytes a rank.
        """
        self.batches += 1
        name = f"{self.prefix}/{self.batches}"
        if self.alone:
            return Places(self.store, name, places, [len(places)], 0 if self.leads else 1)
        free = 0 if self.asks is None else self.asks.slots_of(self.asks.ready)
        return Places(self.store, name, places, gather(free, self.group), dist.get_rank())

    def from_sources(self, own: Tensor) -> list[Tensor]:
        """Call `parallel.arrays.from_sources`. Collective."""
        return from_sources(own, self.sources, self.group)

    def request(self, prompt: Sequence[int], sampling: Sampling, cache_key: str) -> dict:
        """Make the /generate request of one response; nothing is left to a server's defaults.

        Args:
            cache_key: of the responses that may share a cache which outlives its weights.
        """
        kept = self.updates is not None and self.updates.keep_cache
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
            "stream": False,
            **({"extra_key": cache_key} if kept else {}),
        }

    def stop_ids(self, sampling: Sampling) -> frozenset[int]:
        return self.eos_token_ids.union(sampling.stop_token_ids)

    def metrics(self) -> dict[str, float]:
        """Return the metrics since the last call, on rank 0; none on the others."""
        if not self.leads:
            return {}
        counts, self.counts = self.counts, Counter()
        counts.update(self.replicas.take_counts())
        accepted = {}
        if counts["verifications"]:
            accepted["rollout/acceptance_length"] = counts["tokens"] / counts["verifications"]
        return accepted | {
            "rollout/interruptions": counts["interruptions"],
            "rollout/retries": counts["retries"],
            "rollout/timeouts": counts["timeouts"],
            "rollout/restarts": counts["restarts"],
            "rollout/resyncs": counts["resyncs"],
            "rollout/retractions": counts["retractions"],
            "rollout/cached_share": counts["cached"] / max(counts["prompt"], 1),
            "rollout/tokens_per_second": 1000 * counts["tokens"] / max(counts["milliseconds"], 1),
        }

    def offload(self) -> None:
        """See `RolloutEngine.offload`. Collective if memory is released.

        A server that is lost on the way does without; the others wait for weights.
        """
        if self.updates is None or not self.updates.release_memory:
            return
        targets, trouble = self.replicas.live if self.leads else None, None
        try:
            self.updates.sync.release(self.replicas, targets)
        except RuntimeError as error:
            trouble = str(error)
        self._settle(trouble, targets, "release of memory", silent=False)

    def close(self) -> None:
        for replicas in (self.asks, self.replicas):
            if replicas is not None:
                replicas.close()
