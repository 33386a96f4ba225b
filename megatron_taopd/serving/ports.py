"""Ports of this host that can be listened on."""

from __future__ import annotations

import random
import socket

PORTS = range(20000, 32768)  # below those that the kernel hands out by itself


def free_port(host: str) -> int:
    """Return one of PORTS that nobody listens on now."""
    # Not the kernel's choice, which it may repeat for somebody else before the server binds, and
    # not `random`'s generator, which ranks seed alike.
    ports = random.SystemRandom().sample(PORTS, 100)
    return next(port for port in ports if is_free(host, port))


def is_free(host: str, port: int) -> bool:
    """Tell whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
