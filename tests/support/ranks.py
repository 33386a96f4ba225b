"""A pool of gloo ranks that lives as long as the test session.

Importing torch, Megatron and this package takes seconds. So one server process does it, once, and
each world size gets one pool of ranks forked from it, on its first use:

    def total(x):                       # module level: ranks import it by name
        x = x * (dist.get_rank() + 1)
        dist.all_reduce(x)
        return x

    def test_total():
        assert [int(x) for x in run_ranks(2, total, torch.tensor(3))] == [9, 9]

Arguments and results are pickled; each rank gets its own copy. The default process group spans all
ranks. What a function leaves behind is still there for the next one, but for Megatron's groups.
"""

from __future__ import annotations

import atexit
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist

from megatron_taopd.monitoring import logs
from support.forks import fork_context, fork_server, keep_imports_frozen
from support.patience import Deadline, known_patience, took

START_S = 120
QUIET_START_S = 12.0  # of the first pool, which imports everything


class RankError(RuntimeError):
    """A rank raised, died or took too long. The message has that rank's traceback."""


def run_ranks(world_size: int, fn, *args, timeout: float = 120) -> list:
    """Run the module-level `fn(*args)` on every rank; its results, by rank.

    After a failure the other ranks may be stuck in a collective, so the pool is killed; the next
    call starts a fresh one. `timeout` excludes starting the pool; its seconds are `patience`'s.
    """
    if world_size not in _pools:
        _pools[world_size] = RankPool(world_size)
    try:
        return _pools[world_size].run(fn, args, timeout)
    except BaseException:
        _pools.pop(world_size).kill()
        raise


def close_pools() -> None:
    while _pools:
        _pools.popitem()[1].kill()


class RankPool:
    """Ranks that answer calls until they are killed.

    Args:
        path: directories that they import from first.
    """

    def __init__(self, world_size: int, path: tuple[str, ...] = ()):
        # Not forked from this process: torch's thread pools do not survive that. The fork server
        # only imports, so it has no threads.
        context = fork_context()
        self.directory = tempfile.mkdtemp(prefix="ranks-")
        self.connections, self.processes = [], []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                store = os.path.join(self.directory, "store")
                # Not daemonic: a daemon may have no children, and checkpoint writers fork.
                process = context.Process(
                    target=_serve, args=(rank, world_size, store, theirs, path)
                )
                fork_server(path).start(process) if path else process.start()
                theirs.close()
                self.connections.append(ours)
                self.processes.append(process)
            began = time.monotonic()
            self.collect(START_S)
            took(time.monotonic() - began, QUIET_START_S)
        except BaseException:
            self.kill()
            raise

    def run(self, fn, args: tuple, timeout: float) -> list:
        call = pickle.dumps((fn, args))
        for connection in self.connections:
            connection.send_bytes(call)
        return self.collect(timeout)

    def collect(self, timeout: float) -> list:
        """One answer from each rank, or RankError with the traceback of every rank that failed."""
        deadline = Deadline(timeout)
        answers, errors = {}, {}
        while waiting := [c for r, c in enumerate(self.connections) if r not in answers | errors]:
            # After a failure the others may never answer; but the first to fail need not be the
            # cause.
            ready = wait(waiting, known_patience(1) if errors else deadline.left())
            if not ready:
                break
            for rank in map(self.connections.index, ready):
                try:
                    answer, error = pickle.loads(self.connections[rank].recv_bytes())
                except (EOFError, ConnectionError):
                    self.processes[rank].join(5)
                    answer, error = None, f"died, exit code {self.processes[rank].exitcode}\n"
                if error is None:
                    answers[rank] = answer
                else:
                    errors[rank] = error
        world_size = len(self.connections)
        if errors:
            raise RankError("\n".join(f"rank {r} of {world_size}: {e}" for r, e in errors.items()))
        if len(answers) < world_size:
            late = sorted(set(range(world_size)) - set(answers))
            seconds = time.monotonic() - deadline.began
            raise RankError(f"no answer from ranks {late} of {world_size} within {seconds:.0f} s")
        return [answers[rank] for rank in range(world_size)]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        shutil.rmtree(self.directory, ignore_errors=True)


def _serve(
    rank: int, world_size: int, store: str, connection: Connection, path: tuple[str, ...]
) -> None:
    """The life of one rank: join the group, then answer calls until the pipe closes."""
    keep_imports_frozen()
    sys.path[:0] = path
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then kills us
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    logs.set_up()
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # host names need not resolve
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(days=1),  # a hang is the parent's to end
    )
    _share_groups()
    connection.send_bytes(pickle.dumps((None, None)))
    while True:
        try:
            call = connection.recv_bytes()
        except (EOFError, ConnectionError):
            os._exit(0)  # the session is over; peers may be gone, so leave without goodbyes
        try:
            fn, args = pickle.loads(call)
            answer = pickle.dumps((fn(*args), None))
        except BaseException:
            answer = pickle.dumps((None, traceback.format_exc()))
        if (megatron := sys.modules.get("megatron.core.parallel_state")) is not None:
            megatron.destroy_model_parallel()
        connection.send_bytes(answer)


def _share_groups() -> None:
    """Make one group of each set of ranks and hand it out again.

    A gloo group has three threads, Megatron makes some twenty-five for each model, and its DDP is
    never collected (a cycle through autograd's C++ nodes), so they would pile up over the tests.
    """
    create, groups = dist.new_group, {}

    def new_group(ranks=None, *args, **kwargs):
        key = None if ranks is None else tuple(ranks)
        if key not in groups:
            groups[key] = create(ranks, backend="gloo")
        return groups[key]

    dist.new_group = dist.distributed_c10d.new_group = new_group
    dist.destroy_process_group = lambda group=None: None


_pools: dict[int, RankPool] = {}
atexit.register(close_pools)
