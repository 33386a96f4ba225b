"""torchrun that ends as its workers did, and lets them end in their own time.

    taopd launch [torchrun's options] -m megatron_taopd.train CONFIG.yaml …

torchrun itself exits with 1 whatever its workers' status was, gives them 30 s after a SIGTERM, and
dies of a SIGUSR1. Here SIGTERM, SIGINT and SIGUSR1 are passed on to the workers, which finish the
phase at hand, save and exit with 3, however long that takes; and the exit status is theirs:

    0  done
    1  an error, told above
    2  a mistake in the configuration: trying again is of no use
    3  asked to end; the same command resumes
    4  a rank died or hung, and the others noticed
    128 + n  a worker died of signal n
"""

from __future__ import annotations

import logging
import os
import signal
import sys

import psutil

from megatron_taopd.monitoring import logs
from megatron_taopd.parallel import nccl

logger = logging.getLogger("megatron_taopd.launch")  # its __name__ is __main__
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERRUPTED = 3


def main(arguments: list[str]) -> int:
    """Run torchrun with these arguments; the exit status of the worker that failed first, or 0."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        logs.set_up()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    asked = []

    def pass_on(number: int, _frame) -> None:
        asked.append(number)
        for worker in psutil.Process().children():
            worker.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    nccl.set_defaults(os.environ)  # of all workers, and of the servers that they start

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        # torchrun leaves the signals that it is not to handle to those who do.
        run.main(["--signals-to-handle", "SIGQUIT,SIGHUP", *arguments])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        # A worker that was still starting died of the signal, and had nothing to save.
        if asked and status in (INTERRUPTED, *(128 + number for number in SIGNALS)):
            return INTERRUPTED
        if status != INTERRUPTED:
            logger.error("rank %s ended first, with status %s", rank, status)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
