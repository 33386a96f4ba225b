"""Nodes of a run that is started again meet at the new start's store. Real stores, one process for
each start of a node's launcher."""

from __future__ import annotations

import argparse
import os
import signal
import time

import pytest
from support.forks import fork_context
from support.patience import known_patience, patience
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from megatron_taopd.parallel import rendezvous
from megatron_taopd.serving.ports import free_port


class Launcher:
    """A start of a node's launcher, in a process of its own."""

    def __init__(self, node: int, port: int):
        context = fork_context()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=meet, args=(node, port, theirs))
        self.process.start()
        assert self.hear() == "begins"

    def hear(self) -> str:
        assert self.pipe.poll(patience(60)), "silent"
        return self.pipe.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def meet(node, port, pipe):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
    given = {"rdzv_backend": "static", "rdzv_endpoint": "", "standalone": False, "rdzv_conf": ""}
    options = argparse.Namespace(
        nnodes="2", node_rank=node, master_addr="127.0.0.1", master_port=port, **given
    )
    rendezvous.use(options)
    handler = get_rendezvous_handler(
        RendezvousParameters(
            options.rdzv_backend, options.rdzv_endpoint, "none", 2, 2,
            **dict(pair.split("=") for pair in options.rdzv_conf.split(",")),
        )
    )  # fmt: skip
    pipe.send("begins")
    info = handler.next_rendezvous()
    assert (info.rank, info.world_size) == (node, 2)
    if node == 0:
        info.store.set("start", pipe.recv())
    pipe.send(info.store.get("start").decode())
    time.sleep(known_patience(600))


@pytest.fixture
def launcher():
    begun, port = [], free_port("127.0.0.1")

    def begin(node: int) -> Launcher:
        begun.append(Launcher(node, port))
        return begun[-1]

    yield begin
    for each in begun:
        each.end()


def test_a_node_that_comes_back_first_waits_for_the_new_start_of_node_0(launcher):
    first = [launcher(0), launcher(1)]
    first[0].pipe.send("first")
    assert [node.hear() for node in first] == ["first", "first"]
    first[1].end()  # as if its rank had died; node 0 is going to notice later
    again = launcher(1)
    assert not again.pipe.poll(2 * rendezvous.LOOK_S), "met at the store of the first start"
    first[0].end()
    second = launcher(0)
    second.pipe.send("second")
    assert [node.hear() for node in (again, second)] == ["second", "second"]


@pytest.mark.parametrize("node", [0, 1])
def test_a_launcher_that_waits_for_the_others_ends_when_it_is_asked(launcher, node):
    alone = launcher(node)
    assert not alone.pipe.poll(rendezvous.LOOK_S)
    alone.process.terminate()
    alone.process.join(patience(30))
    assert alone.process.exitcode == 3


@pytest.mark.parametrize(
    "given",
    [{"nnodes": "1"}, {"nnodes": "1:1"}, {"standalone": True}, {"rdzv_backend": "c10d"}],
    ids=str,
)
def test_what_is_not_several_nodes_with_a_static_store_stays_torchruns(given):
    options = argparse.Namespace(
        **{"nnodes": "2", "standalone": False, "rdzv_backend": "static", **given}
    )
    before = dict(vars(options))
    rendezvous.use(options)
    assert vars(options) == before
