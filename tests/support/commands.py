"""Commands in processes that are forked from one that has imported everything.

    done = run_python("tools/plan.py", "run.yaml", "--ranks", "64")     # a CompletedProcess
    done = run_python("benchmarks.scaling", "counts", "run.yaml", seconds=300)
    done = run_python("tools/convert.py", "to-hf", *arguments, ranks=2)  # as torchrun would

A process that starts from nothing takes five seconds of a core until it has imported torch and
Megatron; one of these takes a tenth of one. It has its own standard streams, working directory and
exit status.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import wait
from pathlib import Path

import torch.distributed as dist

from support.forks import fork_context, keep_imports_frozen
from support.patience import Deadline, kill_family

ROOT = Path(__file__).parents[2]


def run_python(
    program: str | Path,
    *arguments,
    ranks: int = 1,
    seconds: float = 60,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Run a file of the repository, or a module, until it ends; all ranks, of which the worst.

    Args:
        env: what the environment has besides.
    """
    context = fork_context()
    words = [*map(str, arguments)]
    with tempfile.TemporaryDirectory(prefix="command-") as directory:
        streams = [Path(directory, name) for name in ("stdout", "stderr")]
        processes = []
        place, common = str(cwd or Path.cwd()), dict(env or {})
        if ranks > 1:  # as torchrun, whose store outlives the ranks
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            common |= {
                "MASTER_ADDR": store.host, "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            }  # fmt: skip
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            variables = common | own
            process = context.Process(
                target=_run, args=(str(program), words, streams, place, variables)
            )
            process.start()
            processes.append(process)
        try:
            _wait_for(processes, seconds)
        finally:
            for process in processes:
                if process.is_alive():
                    kill_family(process.pid)
                process.join()
        # One that a signal has ended counts only if none has failed by itself, which ends others.
        statuses = [process.exitcode for process in processes]
        status = max(statuses) or min(statuses)
        return subprocess.CompletedProcess(
            [program, *words], status, *(stream.read_text() for stream in streams)
        )


def _wait_for(processes: list, seconds: float) -> None:
    """Wait until all have ended, or one has failed, which leaves the others alone."""
    deadline = Deadline(seconds)
    while alive := [process for process in processes if process.is_alive()]:
        failed = any(process.exitcode for process in processes)
        ended = wait([process.sentinel for process in alive], 1 if failed else deadline.left())
        if not ended and (failed or not deadline.left()):
            assert failed, f"{seconds} s of a quiet machine are over"
            return


def _run(program: str, words: list[str], streams: list[Path], cwd: str, variables: dict) -> None:
    keep_imports_frozen()
    for descriptor, stream in enumerate(streams, 1):
        opened = os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(variables)
    file = ROOT / program
    sys.argv = [str(file), *words]
    os.chdir(cwd)
    if file.is_file():
        runpy.run_path(str(file), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
