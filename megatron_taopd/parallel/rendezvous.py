"""Nodes of a run that is started again meet at its new store, not at that of the earlier start.

torchrun's static rendezvous is a store in the launcher of node 0, which the others join. When a
rank of another node dies, that node's launcher ends at once and its next start can be there before
node 0 has noticed. It would join the old store, find its ranks' addresses and the line that says
why they end, end with them, and use up its starts. Here a node that finds it has been in a store
before waits for that store to go.
"""

from __future__ import annotations

import argparse
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

logger = logging.getLogger(__name__)
BACKEND = "taopd-static"
TIMEOUT_S = 900  # torchrun's own
LOOK_S = 0.5
PORT = 29500  # torchrun's, where none is given


class Rendezvous(StaticTCPRendezvous):
    """torchrun's static rendezvous, for whose store every node but the first counts its starts."""

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the store, this node's rank and the number of nodes.

        Raises:
            torch.distributed.DistError: the nodes have not met in time.
        """
        if self._store is not None:  # torchrun's own restart
            return super().next_rendezvous()
        deadline = time.monotonic() + self.timeout.total_seconds()
        while True:
            # The store waits where no signal is handled: apart, so that Ctrl-C ends the waiting.
            with ThreadPoolExecutor(1) as apart:
                info = apart.submit(super().next_rendezvous).result()
            if self.rank == 0 or info.store.add(f"taopd/starts/{self.rank}", 1) == 1:
                return info
            logger.info(f"node {self.rank}: waiting for node 0 to end its earlier start")
            _wait_until_gone(info.store, deadline)
            self._store = None
            self.timeout = timedelta(seconds=max(1, deadline - time.monotonic()))


def _wait_until_gone(store: dist.Store, deadline: float) -> None:
    """Wait until a store's process has ended."""
    while True:
        try:
            store.check(["taopd"])
        except dist.DistError:
            return
        if time.monotonic() > deadline:
            raise dist.DistError("node 0 is still in an earlier start of this run; end it there")
        time.sleep(LOOK_S)


def use(options: argparse.Namespace) -> None:
    """Let torchrun's parsed options of several nodes name this rendezvous for its static one."""
    alone = options.standalone or options.nnodes.rpartition(":")[2] == "1"
    if alone or options.rdzv_backend != "static":
        return
    rendezvous_handler_registry.register(BACKEND, _create)
    address = f"{options.master_addr}:{options.master_port or PORT}"
    options.rdzv_backend = BACKEND
    options.rdzv_endpoint = options.rdzv_endpoint or address
    more = [options.rdzv_conf] if options.rdzv_conf else []
    options.rdzv_conf = ",".join([f"rank={options.node_rank}", *more])


def _create(parameters: RendezvousParameters) -> Rendezvous:
    address, port = parse_rendezvous_endpoint(parameters.endpoint, PORT)
    return Rendezvous(
        address,
        port,
        int(parameters.get("rank")),
        parameters.max_nodes,
        parameters.run_id,
        parameters.get_as_int("timeout", TIMEOUT_S),
    )
