"""Weights by broadcast, in process groups that trainer and servers share."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.parallel import platform
from megatron_taopd.parallel.compat.torch_internals import bare_backend
from megatron_taopd.parallel.objects import (
    first_rank_of_node,
    gather,
    in_background,
    on_rank_0,
)
from megatron_taopd.rollout.weight_sync.buckets import Bucket
from megatron_taopd.rollout.weight_sync.sequence import BucketSync, Client, Replica
from megatron_taopd.serving.model import ServedModel
from megatron_taopd.serving.protocol import Unreachable
from megatron_taopd.serving.remote import Remote
from megatron_taopd.serving.server import Workers
from megatron_taopd.serving.sources import deal, is_loopback

GRACE_S = 5.0  # for the server's own word on a transfer that has broken off
POLL_S = 0.001
SLACK_S = 60.0  # after our own time-out NCCL's would end the process


class Target(NamedTuple):
    """A server as a rank that does not hold the replicas knows it."""

    url: str
    tp: int
    workers: Workers | None = None  # its processes, if it is on this host


def as_target(replica: Replica) -> Target:
    """Return what the source of a server has to know of it."""
    server = getattr(replica, "server", None)  # of our own, on this node
    near = server is not None and is_loopback(replica.url)
    return Target(replica.url, replica.tp, server.workers if near else None)


@dataclass
class _Group:
    """The trainer's end of a process group with one server, and the version it last had there."""

    name: str
    backend: dist.Backend
    version: str | None = None


class DistributedSync(BucketSync):
    """Broadcasts each bucket in a group for each server: the trainer's rank 0 and its workers.

    Args: those of `BucketSync`, and
        address: of this host, where the servers find it; None: the one that a connection to the
            server would come from, 127.0.0.1 for a server on 127.0.0.1.
        api_key: that the servers ask for.

    The servers are dealt over the ranks, which all have each whole tensor (`sources.deal`): the
    source of a server makes the group with it, posts to it, sends, and waits for it. So the time
    does not grow with the servers, as long as there are ranks. While a bucket is on its way the
    ranks gather the next one.

    One group for each server, not one for all. A server that dies within a collective takes the
    group with it, and the others' workers would wait there till NCCL's watchdog ends them, too.
    So a failure is that server's alone: its transfer is aborted when its request fails, those to
    the others come to their end, and a restarted one gets a new group while the others keep theirs.

    A group is made on the first push to a server and again when the server is another process than
    it was (its weight version is not what was pushed last; asking costs one token's generation) or
    the last push to it failed. SGLang's end of an abandoned group stays until it exits.

    Bytes: the weights, once for every server, from its source. Buckets are flat uint8 (SGLang's
    "flattened_bucket"), so gloo carries bfloat16, too.
    """

    def __init__(
        self,
        *args,
        address: str | None = None,
        api_key: str | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.address = address
        self.api_key = api_key
        self._client: Client | None = None  # of this rank, once it is a source
        self._nodes: list[int] = []  # of each rank its node's first rank, once it is asked for
        self._dealt: dict[str, int] = {}  # on rank 0, the ranks of all servers that were dealt
        self._own: list[Replica] = []  # that this rank is the source of in this push
        self._sending: list[tuple[Replica, Future, str]] = []  # the bucket that is on its way
        # Of this rank: its groups by the server's url, and stores by this host's address.
        self._groups: dict[str, _Group] = {}
        self._stores: dict[str, dist.TCPStore] = {}

    def _keeps_bytes(self) -> bool:
        return bool(self._own)

    def _prepare(
        self, client: Client | None, targets: Sequence[Replica] | None, version: int
    ) -> None:
        self._take_own(client, targets)
        self._drop_groups_of_restarted()
        self._join()
        self._share_lost()

    def _take_own(self, client: Client | None, targets: Sequence[Replica] | None) -> None:
        """Learn which servers this rank is the source of. Collective."""
        self._nodes = self._nodes or gather(first_rank_of_node())

        def work() -> list[tuple[Target, int]]:
            self._dealt = deal((r.url for r in targets), self._nodes, self._dealt)
            return [(as_target(r), self._dealt[r.url]) for r in targets]

        own = [target for target, rank in on_rank_0(work) if rank == dist.get_rank()]
        if targets is not None:  # rank 0 has the replicas themselves
            known = {replica.url: replica for replica in targets}
            own = [known[target.url] for target in own]
        self._own, self._sending = own, []
        if client is not None:
            self._client = client
        elif own and self._client is None:
            self._client = Remote(ServedModel.of(self.hf_dir, 0), self.api_key)

    def _share_lost(self) -> None:
        """Tell every rank which servers have fallen out on any. Collective."""
        self._lost = {url: why for lost in gather(self._lost) for url, why in lost.items()}

    def _drop_groups_of_restarted(self) -> None:
        """Drop the groups that a server does not know: SGLang dies of an update in one."""
        known = [replica for replica in self._own if replica.url in self._groups]
        request = {"input_ids": [0], "sampling_params": {"max_new_tokens": 0}}
        path = "/generate"
        answers = [
            self._client.spawn(self._client.post(r, path, request, self.control_s)) for r in known
        ]
        for replica, answer in zip(known, answers, strict=True):
            if error := answer.exception():
                self._drop(replica)
                self._note(replica, error)
            elif (
                answer.result()["meta_info"]["weight_version"] != self._groups[replica.url].version
            ):
                self._drop(replica)

    def _join(self) -> None:
        """Make the groups that are missing; servers with which that fails fall out."""
        calls, device = [], platform.device()
        for replica in self._own:
            if replica.url in self._groups or replica.url in self._lost:
                continue
            try:
                address = self.address or local_address(replica.url)
                store = self._store(address)
            except OSError as error:
                self._note(
                    replica, Unreachable(f"{replica.url}: no way there from this host: {error}")
                )
                continue
            name, world_size = f"weights-{uuid.uuid4().hex}", 1 + replica.tp
            request = {
                "master_address": address,
                "master_port": store.port,
                "rank_offset": 1,
                "world_size": world_size,
                "group_name": name,
                "backend": backend_of(device),
            }
            path = "/init_weights_update_group"
            answer = self._client.spawn(self._client.post(replica, path, request, self.timeout_s))
            join = partial(join_group, store, name, world_size, address, device, self.timeout_s)
            joined = in_background(join)
            wait_for = partial(self._wait_for, replica, answer, joined, self.timeout_s)
            calls.append((replica, name, joined, in_background(wait_for)))
        for replica, name, joined, waiting in calls:
            error = waiting.exception()
            self._note(replica, error)
            if error is None:
                self._groups[replica.url] = _Group(name, joined.result())

    def _store(self, address: str) -> dist.TCPStore:
        """Return the store where groups meet; it listens on this address alone, at a free port."""
        if address not in self._stores:
            family = socket.getaddrinfo(address, 0)[0][0]
            listener = socket.create_server((address, 0), family=family)
            port = listener.getsockname()[1]
            # Not torch's rendezvous: under torchrun that takes the agent's store for its own.
            self._stores[address] = dist.TCPStore(
                address,
                port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        return self._stores[address]

    def _send(
        self,
        client: Client | None,
        targets: Sequence[Replica] | None,
        bucket: Bucket,
        where: str = "",
    ) -> None:
        self._wait_for_last()
        if bucket.data is None:
            return
        if bucket.data.is_cuda:  # it is filled; the device may still have a dead server's transfer
            torch.cuda.current_stream().synchronize()
        for replica in self._own:
            if replica.url not in self._lost:
                sent = in_background(partial(self._send_to, replica, bucket))
                self._sending.append((replica, sent, where))

    def _send_to(self, replica: Replica, bucket: Bucket) -> None:
        """Send a bucket to a server, and return when it has it.

        Raises:
            RuntimeError: it failed. The group with it is dropped.
        """
        group, timeout_s = self._groups[replica.url], self._time_for(bucket)
        request = {
            "names": [entry.name for entry in bucket.entries],
            "dtypes": [str(entry.dtype).removeprefix("torch.") for entry in bucket.entries],
            "shapes": [list(entry.shape) for entry in bucket.entries],
            "group_name": group.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        path = "/update_weights_from_distributed"
        answer = self._client.spawn(self._client.post(replica, path, request, timeout_s))
        sent = in_background(partial(broadcast, group.backend, bucket.data, timeout_s))
        self._wait_for(replica, answer, sent, timeout_s)

    def _wait_for_last(self) -> None:
        """Wait until the bucket on its way is with every server of this rank; the others fall out.

        Each is waited for by itself: one that fails is given up at once, while the transfers to the
        others come to their end.
        """
        for replica, sent, where in self._sending:
            self._note(replica, sent.exception(), where)
        self._sending = []

    def _close(self) -> None:
        self._wait_for_last()
        self._share_lost()

    def _wait_for(self, replica: Replica, answer: Future, own: Future, timeout_s: float) -> None:
        wait((answer, own), timeout_s, FIRST_EXCEPTION)
        if succeeded(answer) and succeeded(own):
            return
        wait((answer,), GRACE_S)  # the server's own word goes before torch's
        reason = own.exception() if own.done() else None
        self._drop(replica)  # which ends this side's waiting, too
        if answer.done() and (error := answer.exception()):
            raise error
        answer.cancel()
        reason = reason or f"no end within {timeout_s:g} s"
        raise Unreachable(f"{replica.url}: the weight transfer failed: {reason}")

    def _succeeded(self, version: int) -> None:
        for replica in self._own:
            if replica.url in self._lost:
                self._drop(replica)  # a paused server cannot be asked whether it was restarted
            else:
                self._groups[replica.url].version = str(version)

    def _abandon(self) -> None:
        self._own, abandoned = [], self._own
        for replica in abandoned:
            self._drop(replica)

    def _drop(self, replica: Replica) -> None:
        if group := self._groups.pop(replica.url, None):
            in_background(group.backend.abort)  # in its own time


def succeeded(future: Future) -> bool:
    """Tell whether a future has ended, neither cancelled nor with an exception."""
    return future.done() and not future.cancelled() and future.exception() is None


def backend_of(device: torch.device) -> str:
    """Return the backend of torch.distributed for tensors of a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def join_group(
    store: dist.Store,
    name: str,
    world_size: int,
    address: str,
    device: torch.device,
    timeout_s: float,
) -> dist.Backend:
    """Join, as rank 0, a group whose other ranks run SGLang's `init_custom_process_group`.

    SGLang puts the group's name before its keys in the store; the rest is torch's (`bare_backend`).
    """
    named = dist.PrefixStore(name, store)
    return bare_backend(named, name, world_size, address, device, timeout_s + SLACK_S)


def broadcast(backend: dist.Backend, data: Tensor, timeout_s: float) -> None:
    """Send the bytes from rank 0 of the group, and return when they have left.

    This one transfer is looked at, nothing is waited for by a stream: what waits on the device for
    a dead server would hold up all that is queued behind it, transfers to the others included.

    Raises:
        RuntimeError: the transfer failed, or has not ended within timeout_s.

    Collectives: a broadcast of data over the backend's group.
    """
    if data.is_cuda:
        torch.cuda.set_device(data.device)  # threads do not inherit it
    options = dist.BroadcastOptions()
    options.rootRank, options.timeout = 0, timedelta(seconds=timeout_s + SLACK_S)
    work = backend.broadcast([data], options)
    deadline = time.monotonic() + timeout_s
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no end within {timeout_s:g} s")
        time.sleep(POLL_S)
    work.wait()  # raises what went wrong


def local_address(url: str) -> str:
    """Return this host's address as the server sees it."""
    parts = urlsplit(url)
    family, kind, _, _, place = socket.getaddrinfo(
        parts.hostname, parts.port, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing
        return probe.getsockname()[0]
