"""What all ways share: the order of requests, and errors that reach every rank."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from megatron_taopd.formats.hf import load_config, tensor_shapes
from megatron_taopd.parallel.objects import on_rank_0
from megatron_taopd.rollout.weight_sync.buckets import Bucket, buckets, checked
from megatron_taopd.serving.protocol import Unreachable, all_of

TIMEOUT_S = 600.0  # at most: a whole checkpoint to be read
CONTROL_TIMEOUT_S = 60.0  # of a request that moves no weights
BUCKET_TIMEOUT_S, SLOWEST = 120.0, 10e6  # of a bucket, and bytes a second beyond
CACHE_TAGS = ("kv_cache", "cuda_graph")  # of SGLang's memory, in addition to "weights"


class Replica(Protocol):
    """A server and its tensor-parallel size.

    TensorSync on CUDA also asks for `gpus`, the devices of this host that it runs on, by
    tensor-parallel rank, named as in CUDA_VISIBLE_DEVICES.
    """

    @property
    def url(self) -> str: ...

    @property
    def tp(self) -> int: ...


# `await post(replica, path, payload, timeout)`: the answer's JSON, if it is any.
Post = Callable[[Any, str, dict, float], Awaitable[Any]]


class Client(Protocol):
    """Requests to servers, on an event loop in another thread (`serving.client.Replicas`)."""

    async def post(self, replica: Any, path: str, payload: dict, timeout: float) -> Any:
        """Post, or raise RuntimeError with url, path and the server's message."""
        ...

    def spawn(self, coroutine: Coroutine) -> Future: ...


class WeightSync(Protocol):
    """A way to give the student's weights to the rollout's servers."""

    def push(
        self,
        client: Client | None,
        targets: Sequence[Replica] | None,
        named_tensors: Iterable[tuple[str, Tensor]],
        version: int,
    ) -> dict[str, str]:
        """Give these weights to the servers and let them go on with them. Every rank calls this.

        A server that fails falls out: it stays paused, and the others go on.

        Args:
            client, targets: None except on global rank 0.
            named_tensors: whole tensors under their Hugging Face names, the same on every rank,
                consumed one by one. If it can be iterated over more than once (`Repeatable`), the
                first push goes through it once more, before anything is sent, to check it. Of a
                generator a wrong tensor is found when it comes, before its bucket is sent; and that
                one is missing at the end. Both leave the servers paused.
            version: what servers report as weight_version from now on.

        Returns:
            Of each server that fell out, by url, what went wrong; on every rank.

        Raises:
            ValueError: the names and shapes are not those of the model, or dtypes differ.
            RuntimeError: all servers failed, or a disk; on every rank. The servers stay paused.

        Memory: one tensor, and on ranks that send at most two buckets.

        Collectives: those of named_tensors; broadcasts and gathers of some 100 bytes.
        """
        ...


class Silence(str):
    """What went wrong with a server that was `Unreachable`; ranks tell it each other."""


class BucketSync:
    """The sequence of one push; subclasses say how a bucket gets there.

    SGLang answers an unknown name with success, and a tensor of the wrong shape kills it: names,
    shapes and dtype are checked here.

    Args:
        hf_dir: Hugging Face directory of the model, for the names and shapes of its tensors.
        bucket_bytes: the most bytes on their way at a time; a larger tensor goes alone.
        timeout_s: the most that a request may take. A server may hang where nobody can see it, so
            those that move one bucket or nothing have less.
        keep_cache: servers keep what weights before have cached, for requests that go on with it.
    """

    def __init__(
        self,
        hf_dir: str | Path,
        bucket_bytes: int,
        timeout_s: float = TIMEOUT_S,
        keep_cache: bool = False,
    ):
        self.hf_dir = Path(hf_dir)
        self.shapes = tensor_shapes(load_config(hf_dir))
        self.bucket_bytes = bucket_bytes
        self.timeout_s, self.control_s = timeout_s, min(timeout_s, CONTROL_TIMEOUT_S)
        self.keep_cache = keep_cache
        self._checked_ahead = False
        self._lost: dict[str, str] = {}  # servers that fell out of this push, and why
        # Servers, by url, that gave memory back and are still without it.
        self._without_weights: set[str] = set()
        self._without_cache: set[str] = set()

    def push(
        self,
        client: Client | None,
        targets: Sequence[Replica] | None,
        named_tensors: Iterable[tuple[str, Tensor]],
        version: int,
    ) -> dict[str, str]:
        """See `WeightSync.push`."""
        if not self._checked_ahead and iter(named_tensors) is not named_tensors:
            for _ in checked(named_tensors, self.shapes):
                pass
            self._checked_ahead = True
        self._lost = {}
        try:
            self._prepare(client, targets, version)
            self._on_rank_0(lambda: self._begin(client, targets))
            tensors = checked(named_tensors, self.shapes)
            for bucket in buckets(tensors, self.shapes, self.bucket_bytes, self._keeps_bytes()):
                self._send(client, targets, bucket, f" (weights {version}, {bucket})")
                del bucket  # before the next one is filled
            self._close()
            self._on_rank_0(lambda: self._finish(client, targets, version))
            self._succeeded(version)
        except BaseException:
            self._abandon()
            raise
        return self._lost

    def release(self, client: Client | None, targets: Sequence[Replica] | None) -> None:
        """Let colocated servers give back their device memory. Every rank calls this.

        They wait, and the next push to them gives it to them again. Running requests are aborted.

        Raises:
            RuntimeError: a server failed, on every rank; the others have given theirs back.

        Collectives: a broadcast of some 100 bytes.
        """

        async def one(replica: Replica) -> None:
            await release(client.post, [replica], self.control_s)
            self._without_weights.add(replica.url)
            self._without_cache.add(replica.url)

        def work() -> None:
            client.spawn(all_of(map(one, targets))).result()

        on_rank_0(work)

    def _on_rank_0(self, work: Callable[[], None]) -> None:
        """Do the work on rank 0, and tell every rank which servers have fallen out so far.

        Raises:
            RuntimeError: all of them, or the work's own; on every rank.
        """

        def lost() -> dict[str, str]:
            work()
            return self._lost

        self._lost = on_rank_0(lost)

    def _going(self, targets: Sequence[Replica]) -> list[Replica]:
        """List those that have not fallen out.

        Raises:
            Unreachable: none is left, and none of them has refused anything.
            RuntimeError: none is left.
        """
        going = [replica for replica in targets if replica.url not in self._lost]
        if targets and not going:
            troubles = dict.fromkeys(self._lost[replica.url] for replica in targets)
            silent = all(isinstance(trouble, Silence) for trouble in troubles)
            raise (Unreachable if silent else RuntimeError)("; ".join(troubles))
        return going

    def _note(self, replica: Replica, outcome: Any, where: str = "") -> None:
        """Let a server fall out if this is what went wrong with it; an answer changes nothing."""
        if isinstance(outcome, RuntimeError):
            kind = Silence if isinstance(outcome, Unreachable) else str
            self._lost[replica.url] = kind(f"{outcome}{where}")
        elif isinstance(outcome, BaseException):
            raise outcome

    def _begin(self, client: Client, targets: Sequence[Replica]) -> None:
        self._post_all(client, targets, "/pause_generation", {"mode": "abort"})
        self._resume(client, targets, self._without_weights, ("weights",))

    def _finish(self, client: Client, targets: Sequence[Replica], version: int) -> None:
        self._last(client, targets)
        if not self.keep_cache:
            # Not with the update itself: there it asserts that the server is idle, and kills it.
            self._post_all(client, targets, f"/flush_cache?timeout={self.control_s:g}", {})
        new = {"new_version": str(version), "abort_all_requests": False}
        self._post_all(client, targets, "/update_weight_version", new)
        self._resume(client, targets, self._without_cache, CACHE_TAGS)
        self._post_all(client, targets, "/continue_generation", {})
        self._going(targets)

    def _resume(
        self, client: Client, targets: Sequence[Replica], without: set[str], tags: Sequence[str]
    ) -> None:
        waiting = [replica for replica in self._going(targets) if replica.url in without]
        # Forgotten first: SGLang dies of it if it was restarted meanwhile, and would again.
        without -= {replica.url for replica in waiting}
        path, payload = "/resume_memory_occupation", {"tags": list(tags)}
        if waiting:
            self._post_all(client, waiting, path, payload)

    def _post_all(
        self,
        client: Client,
        targets: Sequence[Replica],
        path: str,
        payload: dict,
        timeout_s: float | None = None,
    ) -> None:
        """Send the same request to all servers that have not fallen out; those that fail do."""
        timeout_s = self.control_s if timeout_s is None else timeout_s
        going = self._going(targets)
        self._wait_all(client, going, [client.post(r, path, payload, timeout_s) for r in going])

    def _wait_all(
        self,
        client: Client,
        targets: Sequence[Replica],
        requests: Iterable[Awaitable],
        where: str = "",
    ) -> None:
        """Wait for a request to each of these servers; those whose request fails fall out."""
        outcomes = client.spawn(outcomes_of(requests)).result()
        for replica, outcome in zip(targets, outcomes, strict=True):
            self._note(replica, outcome, where)

    def _time_for(self, bucket: Bucket) -> float:
        return min(self.timeout_s, BUCKET_TIMEOUT_S + bucket.entries[-1].end / SLOWEST)

    # What the ways differ in

    def _keeps_bytes(self) -> bool:
        """Tell whether this rank needs the buckets' bytes."""
        return dist.get_rank() == 0

    def _prepare(
        self, client: Client | None, targets: Sequence[Replica] | None, version: int
    ) -> None:
        """Get ready before the servers are paused; on every rank."""

    def _send(
        self,
        client: Client | None,
        targets: Sequence[Replica] | None,
        bucket: Bucket,
        where: str = "",
    ) -> None:
        """Send one bucket, or begin to; on every rank.

        Args:
            where: said after what goes wrong with it.
        """
        raise NotImplementedError

    def _close(self) -> None:
        """Wait until all buckets have been sent; on every rank."""

    def _last(self, client: Client, targets: Sequence[Replica]) -> None:
        """Act after the last bucket; on rank 0."""

    def _succeeded(self, version: int) -> None:
        """Note that the servers that have not fallen out go on; on every rank."""

    def _abandon(self) -> None:
        """Give up what a failed push has begun; on every rank."""


async def outcomes_of(awaitables: Iterable[Awaitable]) -> list[Any]:
    """Wait for all of them; return the result of each, or the exception that it raised."""
    return await asyncio.gather(*awaitables, return_exceptions=True)


async def post_all(
    post: Post, targets: Sequence[Replica], path: str, payload: dict, timeout_s: float
) -> None:
    """Send the same request to all servers at once; raise every failure, once all are done."""
    await all_of([post(replica, path, payload, timeout_s) for replica in targets])


async def release(
    post: Post, targets: Sequence[Replica], timeout_s: float = CONTROL_TIMEOUT_S
) -> None:
    """Pause servers and free their device memory: weights, KV cache, CUDA graphs.

    A paused server's requests wait, those of a health check that generates included.
    """
    await post_all(post, targets, "/pause_generation", {"mode": "abort"}, timeout_s)
    # Fails unless the server is idle; the release would not fail but kill it.
    await post_all(post, targets, f"/flush_cache?timeout={timeout_s:g}", {}, timeout_s)
    tags = {"tags": ["weights", *CACHE_TAGS]}
    await post_all(post, targets, "/release_memory_occupation", tags, timeout_s)
