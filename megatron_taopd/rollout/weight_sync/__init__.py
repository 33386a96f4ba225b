"""The student's weights on their way to SGLang servers: one interface, three ways.

    DistributedSync   a broadcast in a process group with each server (NCCL; gloo on the CPU)
    TensorSync        in the request: handles to device memory; on the CPU the bytes themselves
    DiskSync          a Hugging Face directory that the servers read

Every way is the same sequence, so that no token is ever generated with half-updated weights, or
from a cache of the old ones:

    pause (running requests are aborted) → weights, bucket by bucket → flush the cache → new version
    → continue

A server with which anything fails in between stays paused, because it holds parts of two models;
the others go on. A later push that succeeds mends it. `probe` then compares log-probabilities:
SGLang calls much a success.

    sequence      what the ways share, requests in their order; release and resume of device memory
    buckets       tensors checked and laid end to end
    distributed, tensor, disk
    probe
"""

from megatron_taopd.rollout.weight_sync.buckets import Repeatable
from megatron_taopd.rollout.weight_sync.disk import DiskSync
from megatron_taopd.rollout.weight_sync.distributed import DistributedSync
from megatron_taopd.rollout.weight_sync.probe import Probe, check_probe, probe_replica
from megatron_taopd.rollout.weight_sync.sequence import WeightSync, release
from megatron_taopd.rollout.weight_sync.tensor import TensorSync

__all__ = [
    "DiskSync",
    "DistributedSync",
    "Probe",
    "Repeatable",
    "TensorSync",
    "WeightSync",
    "check_probe",
    "probe_replica",
    "release",
]
