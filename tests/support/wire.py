"""A cable that loses and delays: Ethernet frames from one TAP device to another, both ways.

    python tests/support/wire.py TAP OTHER LOSS DELAY_S [SEED]

Says "ready" once both are up, and runs until it is killed. Kernels for small machines have no
`netem`, which would do the same.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
FRAME = 65_536  # bytes, at most


def attach(name: str) -> int:
    """Open a TAP device, which is made if there is none, and which goes with this process."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return file


def relay(ends: tuple[int, int], loss: float, delay_s: float, generator: random.Random) -> None:
    """Pass every frame on after `delay_s`, but for a share of `loss`."""
    under_way: list[tuple[float, int, int, bytes]] = []  # when, in which order, where to, what
    other, count = dict(zip(ends, ends[::-1], strict=True)), 0
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for end in select.select(ends, (), (), wait_s)[0]:
            frame = os.read(end, FRAME)
            if generator.random() >= loss:
                count += 1
                heapq.heappush(under_way, (time.monotonic() + delay_s, count, other[end], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, end, frame = heapq.heappop(under_way)
            os.write(end, frame)


if __name__ == "__main__":
    names, (loss, delay_s, *seed) = sys.argv[1:3], sys.argv[3:]
    ends = attach(names[0]), attach(names[1])
    print("ready", flush=True)
    sys.stdin.readline()  # until both are part of a bridge
    relay(ends, float(loss), float(delay_s), random.Random(*map(int, seed)))
