"""Runs a command whose processes all end with it, and with the process that asked for it (Linux).

    python supervise.py PARENT_PID COMMAND...

Started as a file, so that it imports nothing of this package: torch takes seconds and memory. It
exits when no descendant is left, with the command's exit code. SIGINT is passed on to the command;
SIGTERM kills everything at once, and so does the end of the parent, whatever ended it. A signal on
the parent's death (PR_SET_PDEATHSIG) would follow the thread that forked and reach the child alone,
and a pipe to the parent would stay open in the parent's other forks.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil

POLL_S = 0.2  # how often the parent is looked at
SIGNALS = {signal.SIGCHLD, signal.SIGINT, signal.SIGTERM}
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def supervised(command: list[str | os.PathLike]) -> list[str]:
    """Return the command that this process should start instead."""
    return [sys.executable, "-I", __file__, str(os.getpid()), *map(str, command)]


def main(parent: int, command: list[str]) -> int:
    """Run the command until it, or the parent, has ended; then end what it has left behind.

    Returns:
        The command's exit code as a shell says it: 128 + N if signal N ended it.
    """
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a dying process leaves becomes a child of this one
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        # Should this process be killed, the command goes with it. There is one thread here.
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # not before: the command would inherit it
    while child.poll() is None and os.getppid() == parent:
        received = signal.sigtimedwait(SIGNALS, POLL_S)
        if received and received.si_signo == signal.SIGTERM:
            break
        if received and received.si_signo == signal.SIGINT:
            child.send_signal(signal.SIGINT)
    code = -signal.SIGKILL if child.returncode is None else child.returncode
    kill_descendants()
    return code if code >= 0 else 128 - code  # as a shell says it


def kill_descendants() -> None:
    """Kill every process below this one, and return when none is left."""
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
