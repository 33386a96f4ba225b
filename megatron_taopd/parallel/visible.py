"""Which devices of its host a process sees, by the names that CUDA_VISIBLE_DEVICES gives them."""

from __future__ import annotations

from collections.abc import Mapping

Name = int | str  # a device's number on its host, or its UUID ("GPU-…"), as a scheduler may set it


def names(environment: Mapping[str, str]) -> list[Name] | None:
    """Return the names of the devices that a process with this environment sees, in its order.

    None: it sees all, under their numbers.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if not visible:
        return None
    devices = [name.strip() for name in visible.split(",")]
    return [int(name) if name.isdecimal() else name for name in devices]
