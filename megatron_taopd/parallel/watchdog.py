"""A rank that dies, hangs or raises ends the job within seconds, and is named.

Each rank has a thread that writes a heartbeat to the job's store, through a connection of its own:
where the rank is, and a count of what it has done there. Rank 0's thread reads them all and says
what is wrong in one key, which every rank polls; whoever raises writes that key itself. All others
then print the line and leave with status ENDED, wherever their main thread is stuck.

Where a rank is, is module state, as it is of a log: `phase` and `at_step` say it, and `heartbeat`
says that work goes on (micro-batches, tokens, responses, prompts, blocks of a file).
`file_io` does so for a library call that cannot.

Cost: every PERIOD_S seconds each rank writes about 150 bytes and reads 300, and rank 0 reads 150
per rank: of 1,024 ranks, 1,024 requests a second and 230 KB/s at the store.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

ENDED = 4  # exit status of a rank that has not failed itself
PERIOD_S = 2.0  # between heartbeats, at most
NOTHING = "-"  # is wrong
_SOME_BYTES = 1 << 20  # more than looking at them and a log move in a period
# Of errors that tell of another rank's end, in gloo's and NCCL's collectives and in the store.
_CONNECTION = re.compile(r"gloo/|NCCL|[Cc]onnection (reset|closed|refused)|Broken pipe")


class Place:
    """Where this rank is."""

    def __init__(self):
        self.name, self.step = "build", 0
        self.moves = self.beats = 0  # phases begun and ended; what was done since
        self.since = time.monotonic()

    def move(self, name: str) -> None:
        self.name, self.since, self.beats = name, time.monotonic(), 0
        self.moves += 1

    def __str__(self) -> str:
        return _place(self.name, self.step)


_here = Place()


def heartbeat() -> None:
    """Note that work goes on in this phase."""
    _here.beats += 1


@contextmanager
def file_io() -> Iterator[None]:
    """Count the bytes of files as signs of life, while a call inside does not say how far it is.

    It reads or writes files: that the kernel counts more bytes for this process shows that work
    goes on (Linux; elsewhere nothing does).
    """
    ended = threading.Event()

    def look() -> None:
        seen = _bytes_moved()
        while not ended.wait(PERIOD_S):
            if (now := _bytes_moved()) - seen >= _SOME_BYTES:
                seen = now
                heartbeat()

    looking = threading.Thread(target=look, daemon=True, name="watchdog file_io")
    looking.start()
    try:
        yield
    finally:
        ended.set()
        looking.join()


def _bytes_moved() -> int:
    """Sum this process's bytes through calls (rchar, wchar) and to or from disks (mapped files)."""
    with suppress(OSError):
        return sum(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines())
    return 0


def at_step(step: int) -> None:
    """Note that this rank begins a step of the run; "build" is over."""
    _here.step = step
    _here.move("between phases")


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Note that this rank is in a phase. An exception leaves it there: there it happened."""
    outer = _here.name
    _here.move(name)
    yield
    _here.move(outer)


def _place(name: str, step: int) -> str:
    return f"{name}, step {step}" if step else name


class Watchdog:
    """Watches from its construction until `stop`; the ranks of a world of one are not watched.

    As a context manager it reports what is raised inside (`report`).

    Args:
        store: the job's, a TCPStore; None: nothing is watched, errors are reported all the same.
        rank, world_size: of this process.
        heartbeat_timeout_s: seconds without a heartbeat after which a rank is taken for dead. One
            whose connection breaks does not wait for so long: it asks for a verdict within three
            periods.
        stall_timeout_s: seconds without progress of any rank after which the job is taken for
            stuck; 0: never.
        directory: for `hang/rank_N.txt`, the stacks of a stuck job.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        world_size: int,
        heartbeat_timeout_s: float,
        stall_timeout_s: float,
        directory: str | Path,
    ):
        self.rank, self.world_size, self.directory = rank, world_size, Path(directory)
        self.heartbeat_timeout_s, self.stall_timeout_s = heartbeat_timeout_s, stall_timeout_s
        self.period = min(PERIOD_S, heartbeat_timeout_s / 10)
        self.count, self.lost, self.reporting, self.first = 0, False, False, None
        self._stop, self._threads, self._ending = threading.Event(), [], threading.Lock()
        if store is None:
            return
        self.store = dist.PrefixStore("watchdog", store.clone())
        self.store.set_timeout(timedelta(seconds=max(heartbeat_timeout_s, 1)))
        now = time.monotonic()
        self.heard = {r: (0, now) for r in (range(world_size) if rank == 0 else (0,))}
        self.progress: tuple[list, float] = ([], now)
        self._send()
        if rank == 0:
            for other in range(1, world_size):  # so that one that has not come yet can be read
                self.store.compare_set(f"beat/{other}", "", json.dumps(self._record() | {"n": 0}))
            self.store.set("verdict", NOTHING)
        # Two threads: a store that does not answer holds up the one that asks it.
        self._threads = [
            threading.Thread(target=work, daemon=True, name=f"watchdog {work.__name__}")
            for work in (self._exchange, self._wait_for_rank_0)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, _type, error: BaseException | None, _traceback) -> None:
        if isinstance(error, Exception):
            self.report(error)

    def stop(self, together: bool = True) -> None:
        """Watch no longer.

        Args:
            together: every rank calls this; none stops before the last has come. Collective: a
                barrier.
        """
        if self._threads and together:
            dist.barrier()
        self._stop.set()
        for thread in self._threads:
            thread.join(self.period)
        self._threads = []

    def report(self, error: Exception) -> None:
        """Say on this rank and to the others that it failed; returns when they have had the time to
        read it. Does not return if the error only tells of another rank's end.
        """
        place = str(_here)
        if self._threads and _tells_of_another(error):
            self.lost = True
            time.sleep(8 * self.period)  # in which the threads will have found out whose
        self.reporting = True
        text = str(error).strip().split("\n")[0]
        if not isinstance(error, ValueError):  # which is a user's, and says it all
            text = traceback.format_exception_only(error)[-1].strip().split("\n")[0]
        print(f"error on rank {self.rank} in {place}: {text}", file=sys.stderr, flush=True)
        if not self._threads:
            return
        try:
            self._publish(f"rank {self.rank} ({socket.gethostname()}) failed in {place}: {text}")
            time.sleep(2 * self.period)
        except dist.DistError as lost:
            print(f"rank {self.rank} cannot tell the others: {lost}", file=sys.stderr, flush=True)
        self.stop(together=False)

    # -- the threads ---------------------------------------------------------------------------

    def _exchange(self) -> None:
        while not self._stop.wait(self.period):
            try:
                self._send()
                verdict = self._read_verdict() or (self._examine() if self.rank == 0 else None)
            except dist.DistNetworkError:
                self.lost = True  # a connection does not come back
                return
            except dist.DistError:
                continue  # the store is late
            if verdict and not (self.reporting or self._stop.is_set()):
                self._end(verdict)

    def _wait_for_rank_0(self) -> None:
        while not self._stop.wait(self.period):
            if verdict := self._missed():
                self._end(verdict)

    def _record(self) -> dict:
        here = _here
        return {
            "n": self.count,
            "phase": here.name,
            "step": here.step,
            "at": [here.moves, here.beats],
            "seconds": round(time.monotonic() - here.since, 1),
            "host": socket.gethostname(),
            "lost": self.lost,
        }

    def _send(self) -> None:
        self.count += 1
        self.store.set(f"beat/{self.rank}", json.dumps(self._record()))

    def _read_verdict(self) -> dict | None:
        """Read the verdict; also hear rank 0, and itself on rank 0: then the store is there."""
        text, first = self.store.multi_get(["verdict", "beat/0"])
        self.first = json.loads(first)
        self._hear(0, self.first)
        return None if text.decode() == NOTHING else json.loads(text)

    def _hear(self, rank: int, record: dict) -> None:
        if record["n"] != self.heard[rank][0]:
            self.heard[rank] = (record["n"], time.monotonic())

    def _silence(self, rank: int) -> float:
        return time.monotonic() - self.heard[rank][1]

    def _missed(self) -> dict | None:
        """Return what to say if rank 0, or the store, has been silent for too long, or None."""
        silence = self._silence(0)
        if silence <= (3 * self.period if self.lost else self.heartbeat_timeout_s):
            return None
        store = f"the store of the job on {os.environ.get('MASTER_ADDR', 'the host of rank 0')}"
        whose = f"{_named(0, self.first)} or {store}" if self.first and self.rank else store
        return {"line": f"{whose} has been silent for {silence:.0f} s", "hang": False}

    def _examine(self) -> dict | None:
        """Publish, on rank 0, what is wrong with any rank, and return it; None if nothing is."""
        keys = [f"beat/{rank}" for rank in range(self.world_size)]
        records = [json.loads(text) for text in self.store.multi_get(keys)]
        for rank, record in enumerate(records):
            self._hear(rank, record)
        limit = 3 * self.period if any(r["lost"] for r in records) else self.heartbeat_timeout_s
        silent = [rank for rank in range(self.world_size) if self._silence(rank) > limit]
        if silent:
            rank = max(silent, key=self._silence)
            more = f", and {len(silent) - 1} others" if len(silent) > 1 else ""
            return self._publish(
                f"{_named(rank, records[rank])} has been silent for "
                f"{self._silence(rank):.0f} s{more}"
            )
        places = [record["at"] for record in records]
        if places != self.progress[0]:
            self.progress = (places, time.monotonic())
        stuck = time.monotonic() - self.progress[1]
        if self.stall_timeout_s and stuck > self.stall_timeout_s:
            rank = places.index(min(places))
            behind = f"behind is {_named(rank, records[rank])}"
            if min(places) == max(places):
                behind = f"all are in {_place(records[0]['phase'], records[0]['step'])}"
            line = f"no rank has got any further for {stuck:.0f} s; {behind}"
            return self._publish(f"{line}; stacks in {self.directory / 'hang'}", hang=True)
        return None

    def _publish(self, line: str, hang: bool = False) -> dict:
        """Say what is wrong, unless someone already has; what is said."""
        said = self.store.compare_set("verdict", NOTHING, json.dumps({"line": line, "hang": hang}))
        return json.loads(said)

    def _end(self, verdict: dict) -> None:
        """Leave, from whatever the main thread is doing."""
        self._ending.acquire()  # the first thread leaves for both
        print(f"rank {self.rank} ends: {verdict['line']}", file=sys.stderr, flush=True)
        if verdict["hang"]:
            folder = self.directory / "hang"
            with suppress(OSError):  # a full disk holds nobody up
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / f"rank_{self.rank}.txt", "w") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
        # The store can be in the process of rank 0; and in stacks, the collective of one that has
        # not written them yet should not have failed because another one is gone.
        if self.rank == 0 or verdict["hang"]:
            time.sleep(2 * self.period)
        sys.stdout.flush()
        os._exit(ENDED)


def _named(rank: int, record: dict) -> str:
    place = _place(record["phase"], record["step"])
    return f"rank {rank} ({record['host']}; in {place} for {record['seconds']:.0f} s)"


def _tells_of_another(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and bool(_CONNECTION.search(str(error)))
    )
