"""Train a student on as many ranks as the launcher starts.

    taopd launch --nproc-per-node N CONFIG.yaml section.key=value …

Reads the configuration, builds both models, the rollout engine and the monitor, and runs the loop.
A rerun with the same `run.dir` resumes from its last checkpoint. Ctrl-C, SIGTERM and SIGUSR1 end
the run between two phases of a step, with a checkpoint; the exit status is then 3. A second Ctrl-C
ends it at once, with status 130.
"""

from __future__ import annotations

import os
import signal
import sys

from megatron_taopd.config.load import load
from megatron_taopd.config.values import check_values
from megatron_taopd.launch import INTERRUPTED, MISTAKE
from megatron_taopd.monitoring import logs
from megatron_taopd.parallel import cuda_variables
from megatron_taopd.parallel.imports import long_imports


def main(arguments: list[str]) -> int:
    """Run a training; return the exit status of the process."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else MISTAKE
    before = signal.signal(signal.SIGINT, leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # which the launcher has blocked
    try:
        logs.set_up()
        config = load(arguments[0], arguments[1:])
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        check_values(config, ranks)
        cuda_variables.set_connections(os.environ)
        cuda_variables.set_allocator(os.environ, config.rollout.sync.transport)
        # transformers takes seconds to import, Megatron too, which nobody should wait for to read
        # what is wrong with a value.
        with long_imports():
            from megatron_taopd.preflight.check_config import check
            from megatron_taopd.preflight.models import with_model_directories

        config = with_model_directories(config)
        check(config, ranks)
    except ValueError as error:
        # Every rank has come to the same line, which needs no traceback: one of them says it.
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        signal.signal(signal.SIGINT, before)
        return MISTAKE
    with long_imports():
        from megatron_taopd.start import start

    return start(config)


def leave(_number, _frame) -> None:
    """End this process by a Ctrl-C before there is a run, which leaves nothing to be saved.

    An exception would be told with a traceback by whatever is just being imported or waited for.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        os.write(2, b"ended before the first step; there was nothing to save\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
