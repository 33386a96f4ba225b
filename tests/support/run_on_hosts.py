"""A run of the tiny pair on hosts of its own (`support.hosts`), started by examples/launch/node.sh.

run = Run([hosts["train0"], hosts["train1"]], tmp_path / "run", ["train.steps=3"], {})
run.begin()
run.reach("training", rank=1, generator)  # a moment at which rank 1 is in this phase
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_taopd.checkpoints import files as checkpoint_files
from support.hosts import Host
from support.patience import Deadline

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "examples" / "tiny_pair.yaml"
NODE = ROOT / "examples" / "launch" / "node.sh"
TRACED = Path(__file__).with_name("traced")
PAUSE_S = 5  # of node.sh before it starts its ranks again
ON_S = 120  # in which a run has to go on, on a quiet machine; a lost push takes a minute
AGAIN = re.compile(r"^node \d: status (\d+); start \d", re.MULTILINE)
ENDS = re.compile(r"^(?:rank \d+ ends: |error on rank )(.*)$", re.MULTILINE)


class Node:
    """A training host's starts of the launcher.

    Args:
        rank: of the node, and of its one rank.
        command: of the launcher; env: of it.
        log: where all that it and its ranks write is added.
    """

    def __init__(self, host: Host, rank: int, command: list, env: dict[str, str], log: Path):
        self.host, self.rank, self.command, self.log = host, rank, command, log
        self.env = {**env, "NODE_RANK": str(rank), "ATTEMPTS": "2", "PAUSE": str(PAUSE_S)}
        self.process: subprocess.Popen | None = None
        self.seen = 0  # bytes of the log that belong to earlier lives

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start node.sh, unless it runs: it may be about to start the ranks again by itself."""
        if not self.running:
            with self.log.open("a") as log:
                self.process = self.host.start(self.command, self.env, stdout=log, stderr=log)

    def begin_life(self) -> None:
        """Forget what earlier starts of the ranks have written."""
        self.seen = self.log.stat().st_size if self.log.exists() else 0

    def output(self) -> str:
        """Return what was written since the life began."""
        data = self.log.read_bytes() if self.log.exists() else b""
        return data[self.seen :].decode(errors="replace")

    @property
    def life_is_over(self) -> bool:
        """Whether the ranks have ended, as node.sh says if it is going to start them again."""
        return not self.running or AGAIN.search(self.output()) is not None


class Run:
    """A run of the tiny pair, TP2 | PP2, on two hosts, through all its starts.

    Args:
        hosts: with a rank each, in their order.
        run_dir: its directory; traces and logs lie next to it.
        options: of the configuration.
        env: of its processes, next to `environment()`.
    """

    def __init__(
        self, hosts: Sequence[Host], run_dir: Path, options: Sequence[str], env: Mapping[str, str]
    ):
        self.dir, self.trace = run_dir, run_dir.with_name(f"{run_dir.name}-trace")
        self.trace.mkdir(exist_ok=True)
        env = environment() | env | {"TAOPD_TRACE": str(self.trace)}
        env["PYTHONPATH"] = os.pathsep.join([str(TRACED), env["PYTHONPATH"]])
        env |= {"NNODES": str(len(hosts)), "MASTER_ADDR": hosts[0].name, "NPROC": "1"}
        command = ["bash", NODE, CONFIG, *options, f"run.dir={run_dir}"]
        self.nodes = [
            Node(host, rank, command, env, run_dir.with_name(f"{run_dir.name}-{host.name}.log"))
            for rank, host in enumerate(hosts)
        ]

    def begin(self) -> None:
        """Begin a life: node.sh starts its ranks again, or is started where it has ended."""
        for path in self.trace.iterdir():
            path.unlink()
        for node in self.nodes:
            node.begin_life()
            node.start()

    def place(self, rank: int) -> tuple[int, str, int]:
        """Return the count, name and step of a rank's phase; -1 before there is a watchdog."""
        path = self.trace / f"rank_{rank}"
        words = path.read_text().split() if path.exists() else []
        return (int(words[0]), words[1], int(words[2])) if len(words) == 3 else (-1, "", 0)

    @property
    def step(self) -> int:
        """The step that rank 0 is in."""
        return self.place(0)[2]

    def reach(self, phase: str, rank: int, generator: random.Random) -> str | None:
        """Wait for a random moment of a rank's phase, or shortly after it.

        Returns:
            The phase at that moment; None if the life has ended.
        """
        often = phase not in ("build", "eval", "checkpoint")
        skip, seen = generator.randrange(3) if often else 0, -1
        deadline = Deadline(ON_S)
        while deadline.left():
            if any(node.life_is_over for node in self.nodes):
                return None
            count, now, _ = self.place(rank)
            if now == phase and count != seen:
                seen, skip = count, skip - 1
                if skip < 0:
                    longest = 8.0 if phase == "build" else 0.1
                    time.sleep(generator.uniform(0, longest) * generator.random())
                    return self.place(rank)[1]
            time.sleep(0.001)
        return None

    def wait(self, what: Callable[[], bool], seconds: float, ended: bool = False) -> float | None:
        """Wait for something; the seconds that it took, None if it has not come.

        Args:
            seconds: of a quiet machine.
            ended: that ranks end is no reason not to wait any longer.
        """
        began, deadline = time.monotonic(), Deadline(seconds)
        while not what():
            over = not ended and any(node.life_is_over for node in self.nodes)
            if over or not deadline.left():
                return None
            time.sleep(0.02)
        return time.monotonic() - began

    def sleep(self, seconds: float) -> None:
        """Let it run for so long, or until ranks end."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not any(node.life_is_over for node in self.nodes):
            time.sleep(0.02)

    @property
    def newest(self) -> int:
        """The step of the newest checkpoint; 0 if there is none."""
        return max(checkpoint_files.steps(self.dir / "checkpoints"), default=0)

    def went_on_after(self) -> int:
        """Return the step of the checkpoint that this life has resumed, 0 for none."""
        said = re.search(r"^resuming after step (\d+)$", self.nodes[0].output(), re.MULTILINE)
        return int(said[1]) if said else 0

    def ask_to_end(self) -> None:
        """Let both nodes save and end, as a scheduler would ask them to.

        Raises:
            RuntimeError: they do not, or not with 3.
        """
        for node in self.nodes:
            if node.running:
                node.process.send_signal(signal.SIGTERM)
        if self.wait(lambda: not any(node.running for node in self.nodes), ON_S, True) is None:
            raise RuntimeError("the run does not end when it is asked to")
        if any(status := [node.process.returncode - 3 for node in self.nodes]):
            raise RuntimeError(f"{status}: {[node.output()[-3000:] for node in self.nodes]}")

    def end(self, seconds: float) -> None:
        """Wait until both nodes have ended with 0.

        Raises:
            RuntimeError: they have not.
        """
        if self.wait(lambda: not any(node.running for node in self.nodes), seconds, True) is None:
            raise RuntimeError("the run does not end")
        if any(status := [node.process.returncode for node in self.nodes]):
            raise RuntimeError(f"{status}: {[node.output()[-3000:] for node in self.nodes]}")


def environment() -> dict[str, str]:
    """Return what every process on a host gets: `python` is this one."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    more = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **more}
