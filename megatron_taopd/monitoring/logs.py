"""Where the package's log lines go: what rank 0 tells to stdout, what goes wrong to stderr.

Modules take `logging.getLogger(__name__)`; entry points call `set_up` once they know the rank.
Without it, as in a program that imports the package, Python's own rules for loggers hold.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

PACKAGE = "megatron_taopd"  # of a module that runs as __main__, too: its __name__ is not its name
LEVELS = ("debug", "info", "warning", "error")
LEVEL = "TAOPD_LOG_LEVEL"
# logger.error(line, extra=OF_THE_RUN): a line that rank 0 says for all ranks names none.
OF_THE_RUN = {"of_the_run": True}
# Megatron says so six times on every rank when it is imported; `taopd doctor` says it once.
_OPTIONAL = r"(Transformer Engine and Apex are|Apex is) not installed"


def set_up(level: str | None = None, rank: int | None = None, ranks: int | None = None) -> None:
    """Show the package's log lines in the terminal; a further call replaces what the last one set.

    Lines below WARNING are those of rank 0 and go to stdout as they are. Warnings and errors go to
    stderr and begin with `warning: ` or `error: `, or, where there are several ranks, with
    `error on rank 3: `, unless they are `OF_THE_RUN`. That optional libraries are not there is
    shown at level debug alone.

    Args:
        level: one of LEVELS; None for that of the environment variable TAOPD_LOG_LEVEL, or info.
        rank: of this process; None for what torchrun has set (RANK), or 0.
        ranks: how many there are; None for what torchrun has set (WORLD_SIZE), or 1.

    Raises:
        ValueError: there is no such level.
    """
    source = "level" if level else LEVEL
    name = level or os.environ.get(LEVEL) or "info"
    if name.lower() not in LEVELS:
        raise ValueError(f"{source}: {name}; it has to be one of {', '.join(LEVELS)}")
    logger = logging.getLogger(PACKAGE)
    logger.setLevel(name.upper())
    logger.propagate = False  # a library that configures the root logger would show lines twice
    if logger.level > logging.DEBUG:
        warnings.filterwarnings("ignore", message=_OPTIONAL)
    logger.handlers = [
        TerminalHandler(
            int(os.environ.get("RANK", 0)) if rank is None else rank,
            int(os.environ.get("WORLD_SIZE", 1)) if ranks is None else ranks,
        )
    ]


class TerminalHandler(logging.Handler):
    """Writes the lines of one rank to what stdout and stderr are when the line comes.

    Looked up anew each time, since a progress bar and tests put their own in place of them.
    """

    def __init__(self, rank: int, ranks: int):
        super().__init__()
        self.rank, self.ranks = rank, ranks

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line and flush it."""
        try:
            if record.levelno >= logging.WARNING:
                print(f"{self.head(record)}: {self.format(record)}", file=sys.stderr, flush=True)
            elif self.rank == 0:
                print(self.format(record), flush=True)
        except Exception:
            self.handleError(record)

    def head(self, record: logging.LogRecord) -> str:
        """Name the level and, of several ranks, the one that the line is of."""
        level = record.levelname.lower()
        alone = self.ranks == 1 or getattr(record, "of_the_run", False)
        return level if alone else f"{level} on rank {self.rank}"
