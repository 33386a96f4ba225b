"""Start a run's ranks, and end as they did.

    taopd launch [torchrun's options] CONFIG.yaml section.key=value …
    taopd launch [torchrun's options] -m MODULE … | SCRIPT.py …

This is torchrun, which starts `megatron_taopd.train` where nothing else is named. A mistake in the
configuration or in an option is told in one line before a rank is started. SIGTERM, SIGINT
(Ctrl-C) and SIGUSR1 are passed on to the ranks, which finish the phase at hand, save and exit with
3, however long that takes; a second Ctrl-C ends them at once, a third kills them. The exit status
is that of the rank that failed first:

    0  done
    1  an error, told above
    2  a mistake in the configuration: trying again is of no use
    3  asked to end; the same command resumes
    4  a rank died or hung, and the others noticed
    130  ended at once by a second Ctrl-C; the same command resumes from the last checkpoint
    128 + n  a worker died of signal n

TAOPD_LOG_LEVEL=debug shows torchrun's own lines, too.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

from megatron_taopd.config.load import load
from megatron_taopd.config.values import check_values
from megatron_taopd.monitoring import logs
from megatron_taopd.parallel import nccl
from megatron_taopd.parallel.imports import long_imports
from megatron_taopd.serving.ports import is_free

logger = logging.getLogger("megatron_taopd.launch")  # its __name__ may be __main__
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
MISTAKE, INTERRUPTED, ENDED_AT_ONCE = 2, 3, 130
TRAIN = "megatron_taopd.train"
# torchrun's options: those that take no value, and the others.
_FLAGS = {"standalone", "no-python", "run-path", "virtual-local-rank", "m", "module"}
_VALUED = {
    *("nnodes", "nproc-per-node", "node-rank", "master-addr", "master-port", "local-addr"),
    *("rdzv-backend", "rdzv-endpoint", "rdzv-id", "rdzv-conf", "max-restarts", "monitor-interval"),
    *("start-method", "event-log-handler", "role", "log-dir", "logs-specs", "r", "redirects", "t"),
    *("tee", "local-ranks-filter", "duplicate-stdout-filters", "duplicate-stderr-filters"),
    *("numa-binding", "signals-to-handle", "shutdown-timeout"),
}


@dataclass(frozen=True)
class Asked:
    """A command line, taken apart as far as it has to be known before torch is imported.

    Attributes:
        options: of torchrun, by name without dashes; "" for one without a value.
        script: what the ranks run, and its arguments.
    """

    options: dict[str, str] = field(default_factory=dict)
    script: Sequence[str] = ()

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Asked:
        """Take the options off the front; their values are not looked at."""
        options, rest = {}, [*arguments]
        while rest and rest[0].startswith("-"):
            name, equals, value = rest.pop(0).lstrip("-").partition("=")
            name = name.replace("_", "-")
            if not equals and name not in _FLAGS and rest:
                value = rest.pop(0)
            options[name] = value
        return cls(options, rest)

    @property
    def is_config(self) -> bool:
        """Whether the ranks are to train with a configuration, without saying so."""
        named = self.options.keys() & {"m", "module", "no-python"}
        return bool(self.script) and not named and self.script[0].endswith((".yaml", ".yml"))

    @property
    def trains(self) -> bool:
        """Whether the ranks are to train, by whatever form of the command."""
        named = self.options.keys() & {"m", "module"}
        return self.is_config or bool(named and self.script and self.script[0] == TRAIN)

    @property
    def config(self) -> Sequence[str]:
        """The training's own arguments: CONFIG.yaml and overrides."""
        return self.script if self.is_config else self.script[1:]

    @property
    def per_node(self) -> str:
        return self.options.get("nproc-per-node", os.environ.get("PET_NPROC_PER_NODE", "1"))

    @property
    def nodes(self) -> str:
        return self.options.get("nnodes", os.environ.get("PET_NNODES", "1"))

    @property
    def ranks(self) -> int | None:
        """How many ranks there will be; None where that is for torchrun to find out."""
        fewest, _, most = self.nodes.partition(":")
        if not self.per_node.isdecimal() or most not in ("", fewest):
            return None
        return int(fewest) * int(self.per_node)

    def check(self) -> None:
        """Refuse options that torchrun would end with a traceback for, or a port that is in use.

        Raises:
            ValueError: one line with the option, its value and what would be right.
        """
        for name in self.options:
            if name not in _FLAGS | _VALUED and not any(x.startswith(name) for x in _VALUED):
                raise ValueError(
                    f"--{name}: torchrun has no such option; `torchrun --help` has all, and "
                    "--nproc-per-node is the number of ranks"
                )
        if not self.script:
            raise ValueError("launch: nothing to start; give CONFIG.yaml, -m MODULE or SCRIPT.py")
        if not re.fullmatch("[1-9][0-9]*|auto|cpu|gpu|xpu", self.per_node):
            raise ValueError(
                f"--nproc-per-node: {self.per_node!r}; give the ranks of this node, or gpu for one "
                "on each device"
            )
        if not re.fullmatch("[1-9][0-9]*(:[1-9][0-9]*)?", self.nodes):
            raise ValueError(f"--nnodes: {self.nodes!r}; give the number of nodes")
        if (rank := self.options.get("node-rank")) is not None and not rank.isdecimal():
            raise ValueError(f"--node-rank: {rank!r}; give 0 … --nnodes − 1, another on each node")
        if (port := self.options.get("master-port")) is None:
            return
        if not port.isdecimal() or not 1 <= int(port) <= 65535:
            raise ValueError(f"--master-port: {port!r}; give one of 1 … 65535")
        static = self.options.get("rdzv-backend", "static") == "static"
        listens = static and "standalone" not in self.options and int(rank or 0) == 0
        if listens and not is_free("", int(port)):
            raise ValueError(
                f"--master-port: {port} is in use on this host; give another one on every node, or "
                "none on a single node"
            )


def main(arguments: list[str]) -> int:
    """Run torchrun with these arguments; the exit status of the worker that failed first, or 0."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else MISTAKE
    asked: list[int] = []

    def pass_on(number: int, _frame) -> None:
        asked.append(number)
        workers = psutil.Process().children()
        if not workers:  # not yet, and torch may be waiting for other nodes; or they have ended
            os.write(2, b"ended before a rank was started\n")
            os._exit(INTERRUPTED)
        kill = asked.count(signal.SIGINT) > 2
        for worker in workers:
            worker.send_signal(signal.SIGKILL if kill else number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        logs.set_up()
        command = Asked.of(arguments)
        command.check()
        if command.trains:
            if not command.config:
                raise ValueError(f"launch: -m {TRAIN} needs CONFIG.yaml")
            path, *overrides = command.config
            check_values(load(path, overrides, tell=False), command.ranks)
    except ValueError as error:
        for number, handler in before.items():
            signal.signal(number, handler)
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    if command.is_config:
        at = len(arguments) - len(command.script)
        arguments = [*arguments[:at], "-m", TRAIN, *arguments[at:]]
    if command.trains:
        _hold_back_ctrl_c()
    nccl.set_defaults(os.environ)  # of all workers, and of the servers that they start
    return _launch(arguments, command, asked)


def _hold_back_ctrl_c() -> None:
    """Let ranks be born with SIGINT blocked: one that came while Python starts would be told with a
    traceback. `train` unblocks it once it has its handler, and gets what has come until then.

    A process inherits the mask of the thread that starts it, which is the main one. The signal
    still comes to this process, by a thread that does not block it.
    """
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _launch(arguments: list[str], command: Asked, asked: Sequence[int]) -> int:
    """Run torchrun; asked: the signals that have come, of which more may come."""
    # They take seconds to import, for which a mistake does not wait.
    with long_imports():
        import torch
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        from megatron_taopd.parallel import rendezvous

    if logger.getEffectiveLevel() > logging.DEBUG:
        _silence_torchrun()
    if not torch.cuda.is_available():
        # Megatron decorates functions with torch.compile. Its import of the compiler takes a second
        # of each rank, and nothing calls those functions on a CPU.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        parser = run.get_args_parser()
        parser.error = _refuse
        # torchrun leaves the signals that it is not to handle to those who do.
        options = parser.parse_args(["--signals-to-handle", "SIGQUIT,SIGHUP", *arguments])
        rendezvous.use(options)
        run.run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        if asked.count(signal.SIGINT) > 1 and status != INTERRUPTED:
            return ENDED_AT_ONCE
        # A worker that was still starting died of the signal, and had nothing to save.
        if asked and status in (INTERRUPTED, *(128 + number for number in SIGNALS)):
            return INTERRUPTED
        told = status == INTERRUPTED or (status == MISTAKE and command.trains)
        if not told:
            logger.error("rank %s ended first, with status %s", rank, status)
        return status
    except (ValueError, RuntimeError, OSError) as error:  # ranks do not meet, say
        logger.debug("torchrun", exc_info=True)
        print(f"error: launch: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE if isinstance(error, ValueError) else 1
    return 0


def _refuse(message: str) -> None:
    """Leave with one line, in the place of argparse's page."""
    print(f"error: launch: {message}; `torchrun --help` has all options", file=sys.stderr)
    sys.exit(MISTAKE)


def _silence_torchrun() -> None:
    """Keep torchrun from telling, at length, what the ranks and the last line here have told."""
    for name in [*logging.root.manager.loggerDict]:
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")) or (
            name == "torch.distributed.run"
        ):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
