"""Variables that CUDA's driver and torch's allocator read once, when they start.

So an entry point sets them before anything asks whether there is a GPU.
"""

from __future__ import annotations

from collections.abc import MutableMapping

CONNECTIONS, ALLOCATOR = "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF"
EXPANDABLE = "expandable_segments:True"


def set_connections(environment: MutableMapping[str, str]) -> None:
    """Give the device one queue, unless the user has set how many.

    Megatron overlaps its communication by the order of launches, which needs a single one.
    """
    environment.setdefault(CONNECTIONS, "1")


def set_allocator(environment: MutableMapping[str, str], transport: str) -> None:
    """Let torch's segments grow, unless the user has set something: packed micro-batches have new
    sizes all the time, between which memory would be lost.

    Args:
        transport: `rollout.sync.transport`. With tensor, servers open the trainer's memory by CUDA
            IPC, for which such segments need rights that containers lack (pidfd_getfd).
    """
    if transport != "tensor" and "PYTORCH_CUDA_ALLOC_CONF" not in environment:
        environment.setdefault(ALLOCATOR, EXPANDABLE)


def leave_out(environment: MutableMapping[str, str]) -> None:
    """Take out what a server is not to inherit: its memory saver refuses segments that grow."""
    if environment.get(ALLOCATOR) == EXPANDABLE:
        del environment[ALLOCATOR]
