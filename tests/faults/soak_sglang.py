"""A long run whose SGLang servers are killed again and again.

    python tests/faults/soak_sglang.py --steps 200 --every 20 --out figures.json

A real torchrun of the tiny pair with two servers; after every N steps one of them, by turns, is
killed with SIGKILL (its main process or one of its children), at a random moment of the step. The
run has to end by itself, with every step done once, and no server process may be left. Outside the
suite: it takes about ten minutes on two cores. docs/reliability.md has its outcome.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "examples" / "tiny_pair_sglang.yaml"
PROMPTS = 64


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between two kills")
    parser.add_argument("--ahead", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--timeout", type=float, default=2400, help="seconds")
    parser.add_argument("--out", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        outcome = soak(arguments, Path(directory) / "run")
    print(json.dumps(outcome, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(outcome, indent=2) + "\n")
    return 0 if outcome["survived"] else 1


def soak(arguments, run_dir: Path) -> dict:
    generator = random.Random(arguments.seed)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command += ["-m", "megatron_taopd.train", CONFIG, f"run.dir={run_dir}"]
    command += [f"train.steps={arguments.steps}", f"rollout.ahead={arguments.ahead}"]
    command += ["rollout.servers.replicas=2", f"rollout.prompts={PROMPTS}"]
    command += ["eval.every=0", "eval.limit=128", "checkpoint.every=0", "log.tensorboard=false"]
    log = open(run_dir.with_suffix(".log"), "wb")  # noqa: SIM115
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    family = psutil.Process(process.pid)
    kills, due, seen = [], arguments.every, set()
    while process.poll() is None and time.monotonic() - started < arguments.timeout:
        if steps_done(run_dir) >= due:
            due += arguments.every
            time.sleep(generator.uniform(0, 1.5))
            kills.append(kill_one(family, generator, len(kills)))
        seen.update(servers_of(family) if process.poll() is None else ())
        time.sleep(0.2)
    timed_out = process.poll() is None
    if timed_out:
        os.killpg(process.pid, signal.SIGKILL)
    records = [json.loads(line) for line in read_lines(run_dir / "metrics.jsonl")]
    steps = [record for record in records if record["step"] > 0]
    time.sleep(3)
    left = [server for server in seen if server.is_running()]
    complete = [record["step"] for record in steps] == list(range(1, arguments.steps + 1))
    # One life that has done them all, not a second one that went on after the first.
    complete &= "resuming after step" not in run_dir.with_suffix(".log").read_text()
    outcome = {
        "steps": len(steps),
        "kills": len([kill for kill in kills if kill]),
        "restarts": sum(record["rollout/restarts"] for record in steps),
        "retries": sum(record["rollout/retries"] for record in steps),
        "resyncs": sum(record["rollout/resyncs"] for record in steps),
        "largest_gap": max((record["rollout/logprob_gap_max"] for record in steps), default=None),
        "largest_staleness": max((r["rollout/staleness_max"] for r in steps), default=None),
        "accuracy": [r["eval/accuracy"] for r in records if "eval/accuracy" in r],
        "exit_status": process.returncode,
        "timed_out": timed_out,
        "every_step_once": complete,
        "processes_left": len(left),
        "minutes": (time.monotonic() - started) / 60,
    }
    outcome["survived"] = process.returncode == 0 and complete and not left
    if not outcome["survived"]:
        print(run_dir.with_suffix(".log").read_text()[-4000:], file=sys.stderr)
    return outcome


def steps_done(run_dir: Path) -> int:
    return len(read_lines(run_dir / "metrics.jsonl")) - 1  # step 0 is the first evaluation


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def servers_of(family: psutil.Process) -> list[psutil.Process]:
    """The main process of each server, lowest pid first."""
    found = []
    try:
        children = family.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for process in children:
        try:
            arguments = process.cmdline()
        except psutil.Error:
            continue
        if "sglang.launch_server" in arguments and "supervise.py" not in " ".join(arguments):
            found.append(process)
    return sorted(found, key=lambda process: process.pid)


def kill_one(family: psutil.Process, generator: random.Random, turn: int) -> str | None:
    servers = servers_of(family)
    if not servers:
        return None
    server = servers[turn % len(servers)]
    victims = [server, *server.children(recursive=True)]
    victim = generator.choice(victims)
    name = victim.name()
    victim.kill()
    return name


if __name__ == "__main__":
    sys.exit(main())
