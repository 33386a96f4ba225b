"""Weights in the request itself: handles to device memory, or bytes."""

from __future__ import annotations

import base64
import os
import pickle
import socket
from collections.abc import Awaitable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.parallel import platform, visible
from megatron_taopd.parallel.compat.torch_internals import ipc_handle
from megatron_taopd.rollout.weight_sync.buckets import Bucket
from megatron_taopd.rollout.weight_sync.sequence import (
    BucketSync,
    Client,
    Replica,
)


class TensorSync(BucketSync):
    """Buckets in the request itself, one pickle for each worker of a server.

    On the CPU they hold the weights: 4/3 of their bytes (base64) over HTTP, for every worker. Not
    by shared memory: torch passes that between strangers by file descriptors, which kills SGLang.

    On CUDA they hold a handle (CUDA IPC) to the bucket in device memory, some KB, so the servers
    have to be colocated: each worker runs on the device of a trainer rank on rank 0's host
    (`replica.gpus`; no two workers on one device) and reads the bucket of that rank. A bucket's
    memory is fresh and never written again: a server answers before its copies have run, and CUDA
    IPC keeps the memory until it has let go. **The CUDA path was written from SGLang's source and
    has not been run.**

    Collectives on CUDA: for every bucket a gather of the handles to rank 0, some KB a rank.
    """

    def _keeps_bytes(self) -> bool:
        return dist.get_rank() == 0 or platform.device().type == "cuda"

    def _send(
        self,
        client: Client | None,
        targets: Sequence[Replica] | None,
        bucket: Bucket,
        where: str = "",
    ) -> None:
        handles = gather_handles(bucket) if platform.device().type == "cuda" else None

        def update() -> None:
            going = self._going(targets)
            if handles is None:
                inline = pickled(bucket, bucket.data.clone())  # a pickle has the whole storage
                payloads = [[inline] * replica.tp for replica in going]
            else:
                payloads = [colocated(replica, handles) for replica in going]
            self._wait_all(client, going, map(one, going, payloads), where)

        def one(replica: Replica, payloads: list[str]) -> Awaitable:
            request = {
                "serialized_named_tensors": payloads,
                "load_format": "flattened_bucket",
                "flush_cache": False,
            }
            path = "/update_weights_from_tensor"
            return client.post(replica, path, request, self._time_for(bucket))

        self._on_rank_0(update)
        if handles is not None:
            torch.cuda.ipc_collect()


def pickled(bucket: Bucket, data: Any) -> str:
    """Return what SGLang's MultiprocessingSerializer reads as a flattened bucket, in base64."""
    metadata = [  # its own class for them would have to be imported
        SimpleNamespace(
            name=entry.name,
            shape=entry.shape,
            dtype=entry.dtype,
            start_idx=entry.start,
            end_idx=entry.end,
            numel=entry.end - entry.start,
        )
        for entry in bucket.entries
    ]
    return base64.b64encode(pickle.dumps({"flattened_tensor": data, "metadata": metadata})).decode()


class DeviceHandle:
    """Unpickles as the tensor itself, in another process that sees the same device."""

    def __init__(self, tensor: Tensor):
        # SGLang looks the device up by its UUID.
        device = str(torch.cuda.get_device_properties(tensor.device).uuid)
        self.reduced = ipc_handle(tensor, device)

    def __reduce__(self):
        return self.reduced


def gather_handles(bucket: Bucket) -> dict[int, str]:
    """Return, on rank 0, the pickled bucket of each rank on its host, by device number.

    Each is for one reader: CUDA IPC counts references. Collectives: a gather, some KB a rank.
    """
    torch.cuda.synchronize()
    own = (
        socket.gethostname(),
        device_name(bucket.data.device.index),
        pickled(bucket, DeviceHandle(bucket.data)),
    )
    gathered: list | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, gathered, dst=0)
    return {name: payload for host, name, payload in gathered or () if host == own[0]}


def device_name(index: int) -> visible.Name:
    """Return the name of this process's device on its host: its number, or its UUID."""
    devices = visible.names(os.environ)
    return index if devices is None else devices[index]


def colocated(replica: Replica, handles: Mapping[visible.Name, str]) -> list[str]:
    """Return the handles of the trainer's ranks on a server's GPUs, by tensor-parallel rank.

    Args:
        handles: by the device's name, as `gather_handles` returns them.

    Raises:
        ValueError: no rank of the trainer has one of the server's GPUs.
    """
    if strangers := [gpu for gpu in replica.gpus if gpu not in handles]:
        raise ValueError(
            f"{replica.url}: no trainer rank on its GPU {strangers[0]}, which "
            "rollout.sync.transport: tensor needs; take rollout.sync.transport: distributed"
        )
    return [handles[gpu] for gpu in replica.gpus]
