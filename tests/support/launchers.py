"""Launchers on a cluster of stand-ins: each command that they start says where, and with what.

    started = launch(tmp_path, ["bash", script, …], servers=2)
    started[0].arguments, started[0].environment["NODE_RANK"]

`sbatch`, `scontrol`, `srun`, `python` and `taopd` are shell scripts on PATH. What is started ends
at once with `status`; what trains first waits for as many servers as there are to be.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

from support.patience import finish

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "examples" / "launch"
CORES = "96"

_RECORD = """
at="$CALLS/$(date +%s%N)-$$"
printf '%s\\0' "${0##*/}" "$@" > "$at.part"
env -0 > "$at.env"
mv "$at.part" "$at.args"
case " $* " in
    *" -m megatron_taopd.launch "*)
        served() { grep --files-with-matches --null-data --line-regexp serve "$CALLS"/*.args; }
        until [ "$(served | wc -l)" -ge "$SERVERS" ]; do sleep 0.05; done
        exit "$STATUS" ;;
esac
"""
STAND_INS = {
    "python": _RECORD,
    "taopd": _RECORD,
    "scontrol": """
if [ "$1" = show ]; then tr , '\\n' <<< "$3"; else echo "$@" >> "$CALLS.queue"; fi
""",
    # One task on each node, as --ntasks-per-node=1 has it; the worst status is the step's.
    "srun": """
while [ "$1" != bash ]; do
    case $1 in
        --nodelist) list=$2; shift 2 ;;
        --cpus-per-task) cores=$2; shift 2 ;;
        --nodes | --ntasks) shift 2 ;;
        *) shift ;;
    esac
done
place=0
for node in ${list//,/ }; do
    SLURM_PROCID=$place SLURMD_NODENAME=$node CORES_OF_TASK=$cores "$@" &
    place=$((place + 1))
done
worst=0
for task in $(jobs -p); do
    wait "$task" || worst=$?
done
exit "$worst"
""",
    "sbatch": f"""
while [ "${{1#--}}" != "$1" ]; do
    case $1 in
        --nodes) export SLURM_JOB_NUM_NODES=$2 ;;
        --gpus-per-node) export SLURM_GPUS_ON_NODE=$2 ;;
    esac
    shift 2
done
nodes=$(seq --format 'node%g' "$SLURM_JOB_NUM_NODES")
export SLURM_JOB_NODELIST=${{nodes//$'\\n'/,}} SLURM_JOB_ID=7 SLURM_CPUS_ON_NODE={CORES}
exec bash "$@"
""",
}


@dataclass(frozen=True)
class Started:
    """A command that a launcher has started somewhere."""

    arguments: list[str]
    environment: dict[str, str]


def launch(
    place: Path, command: list, status: int = 0, servers: int = 0, **environment
) -> tuple[int, str, list[Started]]:
    """Run a launcher's command; return its status, its output and what it has started.

    Args:
        place: a directory of this test's own.
        status: that what trains ends with.
        servers: commands that serve, without which nothing that trains ends.
    """
    bin_, calls = place / "bin", place / "calls"
    if not bin_.exists():
        bin_.mkdir()
        for name, body in STAND_INS.items():
            (bin_ / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (bin_ / name).chmod(0o755)
    calls.mkdir(exist_ok=True)
    before = set(calls.glob("*.args"))
    process = Popen(
        [str(part) for part in command], cwd=ROOT, start_new_session=True,
        stdout=PIPE, stderr=STDOUT, text=True,
        env={
            **os.environ, "PATH": f"{bin_}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CALLS": str(calls), "STATUS": str(status), "SERVERS": str(servers),
            "SLURM_SUBMIT_DIR": str(ROOT), **environment,
        },
    )  # fmt: skip
    output = finish(process)
    started = [
        Started(_parts(path), dict(p.split("=", 1) for p in _parts(path.with_suffix(".env"))))
        for path in sorted(set(calls.glob("*.args")) - before)
    ]
    return process.returncode, output, started


def _parts(path: Path) -> list[str]:
    return path.read_text().split("\0")[:-1]
