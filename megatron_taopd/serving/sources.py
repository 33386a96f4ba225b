"""Which rank has to do with which server: sends it the weights, asks it and reads its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

import torch
from torch import Tensor


def deal(
    urls: Iterable[str], nodes: Sequence[int], known: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return the rank that is the source of each server.

    Each server gets the rank that has the fewest so far: one a node as long as there are nodes
    without, the last rank of each node first, and rank 0 after all others, which has more to do
    than they. A server on the loopback address can be reached from rank 0's node alone.

    Args:
        nodes: [ranks], a number for each rank's node.
        known: ranks that were dealt before, which stay: group and address are theirs.
    """
    dealt, load = dict(known or {}), Counter((known or {}).values())
    position = {rank: place for place, rank in enumerate(in_order(nodes))}
    for url in urls:
        if url in dealt:
            continue
        near = is_loopback(url)
        ranks = (rank for rank in position if nodes[rank] == nodes[0] or not near)
        dealt[url] = min(ranks, key=lambda rank: (load[rank], position[rank]))
        load[dealt[url]] += 1
    return dealt


def share_out(sizes: Tensor, servers: Sequence[int]) -> Tensor:
    """Return [n] int64, the rank that has each piece of work done.

    Each rank gets a run of neighbours, in proportion to its servers.

    Args:
        sizes: [n] int64, how large each piece is; none is 0.
        servers: [ranks], how many servers each rank can ask; at least one can.
    """
    ends = torch.tensor(servers, dtype=torch.int64).cumsum(0)
    middle = 2 * sizes.cumsum(0) - sizes
    # In integers, so that every rank finds the same.
    return torch.searchsorted(2 * sizes.sum() * ends, middle * ends[-1], right=True)


def in_order(nodes: Sequence[int]) -> list[int]:
    """Return the ranks in the order in which they become sources."""
    after = Counter(nodes)
    place = {}
    for rank, node in enumerate(nodes):
        after[node] -= 1
        place[rank] = after[node]  # ranks of its node that come after it
    return sorted(place, key=lambda rank: (place[rank], rank == 0, rank))


def is_loopback(url: str) -> bool:
    """Tell whether a url names this host to itself alone."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
