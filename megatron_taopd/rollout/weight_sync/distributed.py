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
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.parallel import platform
from megatron_taopd.parallel.compat.torch_internals import bare_backend
from megatron_taopd.parallel.objects import in_background, on_rank_0
from megatron_taopd.rollout.weight_sync.buckets import Bucket
from megatron_taopd.rollout.weight_sync.sequence import BucketSync, Client, Replica

GRACE_S = 5.0  # for the server's own word on a transfer that has broken off
POLL_S = 0.001
SLACK_S = 60.0  # after our own time-out NCCL's would end the process


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

    One group for each server, not one for all. A server that dies within a collective takes the
    group with it, and the others' workers would wait there till NCCL's watchdog ends them, too.
    So a failure is that server's alone: its transfer is aborted when its request fails, those to
    the others come to their end, and a restarted one gets a new group while the others keep theirs.
    The price: rank 0 sends the weights once for every server (all at a time), where a common ring
    would send them once.

    A group is made on the first push to a server and again when the server is another process than
    it was (its weight version is not what was pushed last; asking costs one token's generation) or
    the last push to it failed. SGLang's end of an abandoned group stays until it exits.

    Bytes: the weights, once for every server. Buckets are flat uint8 (SGLang's "flattened_bucket"),
    so gloo carries bfloat16, too.
    """

    def __init__(self, *args, address: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.address = address
        self._groups: dict[str, _Group] = {}  # by the server's url
        self._stores: dict[str, dist.TCPStore] = {}  # by this host's address

    def _prepare(self, client: Client, targets: Sequence[Replica], version: int) -> None:
        self._drop_groups_of_restarted(client, targets)
        calls, names, device = [], {}, platform.device()
        for replica in targets:
            if replica.url in self._groups:
                continue
            address = self.address or local_address(replica.url)
            store, world_size = self._store(address), 1 + replica.tp
            name = names[replica.url] = f"weights-{uuid.uuid4().hex}"
            request = {
                "master_address": address,
                "master_port": store.port,
                "rank_offset": 1,
                "world_size": world_size,
                "group_name": name,
                "backend": backend_of(device),
            }
            path = "/init_weights_update_group"
            answer = client.spawn(client.post(replica, path, request, self.timeout_s))
            join = partial(join_group, store, name, world_size, address, device, self.timeout_s)
            calls.append((replica, answer, in_background(join)))
        try:
            self._wait(calls, self.timeout_s)
        finally:  # those that joined although another one did not have to be abandoned, too
            for replica, answer, joined in calls:
                if succeeded(answer) and succeeded(joined):
                    self._groups[replica.url] = _Group(names[replica.url], joined.result())

    def _drop_groups_of_restarted(self, client: Client, targets: Sequence[Replica]) -> None:
        """Drop the groups that a server does not know: SGLang dies of an update in one."""
        known = [replica for replica in targets if replica.url in self._groups]
        request = {"input_ids": [0], "sampling_params": {"max_new_tokens": 0}}
        answers = [
            client.spawn(client.post(r, "/generate", request, self.control_s)) for r in known
        ]
        for replica, answer in zip(known, answers, strict=True):
            version = answer.result()["meta_info"]["weight_version"]
            if version != self._groups[replica.url].version:
                self._drop(replica)

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
        self, client: Client | None, targets: Sequence[Replica] | None, bucket: Bucket
    ) -> None:
        on_rank_0(lambda: self._broadcast(client, targets, bucket))

    def _broadcast(self, client: Client, targets: Sequence[Replica], bucket: Bucket) -> None:
        if bucket.data.is_cuda:  # it is filled; the device may still have a dead server's transfer
            torch.cuda.current_stream().synchronize()
        calls, timeout_s = [], self._time_for(bucket)
        for replica in targets:
            group = self._groups[replica.url]
            request = {
                "names": [entry.name for entry in bucket.entries],
                "dtypes": [str(entry.dtype).removeprefix("torch.") for entry in bucket.entries],
                "shapes": [list(entry.shape) for entry in bucket.entries],
                "group_name": group.name,
                "load_format": "flattened_bucket",
                "flush_cache": False,
            }
            path = "/update_weights_from_distributed"
            answer = client.spawn(client.post(replica, path, request, timeout_s))
            sent = in_background(partial(broadcast, group.backend, bucket.data, timeout_s))
            calls.append((replica, answer, sent))
        self._wait(calls, timeout_s)

    def _wait(self, calls: Sequence[tuple[Replica, Future, Future]], timeout_s: float) -> None:
        """Wait until every server has answered and this side is done with it, or either failed.

        Each is waited for by itself: one that fails is given up at once, while the transfers to the
        others come to their end.

        Raises:
            RuntimeError: what failed, of every server with which something did.
        """
        waiting = [in_background(partial(self._wait_for, *call, timeout_s)) for call in calls]
        errors = [str(error) for error in (future.exception() for future in waiting) if error]
        if errors:
            raise RuntimeError("; ".join(errors))

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
        raise RuntimeError(f"{replica.url}: the weight transfer failed: {reason}")

    def _succeeded(self, targets: Sequence[Replica], version: int) -> None:
        for replica in targets:
            self._groups[replica.url].version = str(version)

    def _abandon(self, targets: Sequence[Replica]) -> None:
        """Drop all groups: a paused server cannot be asked whether it was restarted."""
        for replica in targets:
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
