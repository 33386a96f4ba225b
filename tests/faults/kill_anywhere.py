"""kill -9 at random moments of every phase, again and again: is the run the one it would have been?

    python tests/faults/kill_anywhere.py --kills 100 --json figures.json

For each layout one run goes through undisturbed, and one whose ranks are killed (all of them, or
one by chance, which the others have to notice) in a phase chosen by turns, at a random moment of
it, and which is then started again, until it has been killed often enough and is let through. Both
must have the same record of every step, to the bit, and the same final weights; and every life has
to go on from the newest checkpoint that the one before it has left. Real torchrun, real ranks.
Outside the suite: 15 to 20 seconds a kill on two cores. docs/reliability.md has its outcome.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from megatron_taopd.checkpoints import files as checkpoint_files

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "examples" / "tiny_pair.yaml"
COMMON = [
    "rollout.prompts=16", "rollout.max_new_tokens=16", "eval.limit=16", "eval.every=3",
    "log.tensorboard=false", "checkpoint.every=1", "checkpoint.keep_last=2",
]  # fmt: skip
LAYOUTS = {  # ranks, further options
    "TP2 | PP2": (2, []),
    "DP2 | TP2, replay": (
        2,
        ["student.parallel.tp=1", "teacher.parallel={tp: 2, pp: 1}", "train.schedule=replay"],
    ),
    "PP2 | TP1": (2, ["student.parallel={tp: 1, pp: 2}", "teacher.parallel.pp=1"]),
    "one rank, horizon": (
        1,
        ["student.parallel.tp=1", "teacher.parallel.pp=1", "rollout.horizon=auto",
         "rollout.horizon_floor=4"],
    ),
}  # fmt: skip
PHASES = ["build", "rollout", "teacher", "scoring", "selection", "training", "sync", "checkpoint"]
PHASES += ["eval"]
# What a step took and how full the machine was is no part of what it computed.
UNREPEATABLE = (
    "time/", "perf/", "checkpoint/", "memory/most", "memory/least", "rollout/tokens_per_second",
)  # fmt: skip
END_WITHIN = 120  # seconds, for the ranks that are left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="over all layouts")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the outcome there, too")
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    outcomes = {}
    for place, layout in enumerate(arguments.layouts):
        turns = range(place, arguments.kills, len(arguments.layouts))
        with tempfile.TemporaryDirectory() as directory:
            outcomes[layout] = try_layout(layout, turns, generator, Path(directory))
        print(f"{layout}: {json.dumps(outcomes[layout])}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(outcomes, indent=2) + "\n")
    return 0 if all(outcome["lost"] == 0 for outcome in outcomes.values()) else 1


def try_layout(layout: str, turns: range, generator: random.Random, directory: Path) -> dict:
    """Kill a run once a turn, in that turn's phase; how often it went on as if nothing had been.

    The phases go on from one layout to the next: a few kills are then not all before a checkpoint.
    """
    started = time.monotonic()
    steps = 2 * len(turns) + 4  # a life makes up to three
    whole, broken = directory / "whole", directory / "broken"
    life = Life(layout, whole, steps)
    if (status := life.wait()) != 0:
        raise RuntimeError(f"{layout}: an undisturbed run ended with {status}:\n{life.output()}")

    phases, failures, unfinished, slowest, resumed = Counter(), [], 0, 0.0, Counter()
    newest = 0
    for kill in turns:
        life = Life(layout, broken, steps)
        wanted = PHASES[kill % len(PHASES)]
        struck = life.reach(wanted, generator)
        if struck is None:
            failures.append(f"before kill {kill}: {life.wait()}\n{life.output()[-3000:]}")
            continue
        unfinished += any(broken.glob("checkpoints/*.incomplete"))
        phases[struck] += 1
        slowest = max(slowest, life.kill(everyone=generator.random() < 0.7, generator=generator))
        resumed[life.went_on_after()] += 1
        if life.went_on_after() not in (newest, None):  # None: killed before it said so
            failures.append(f"kill {kill}: after {life.went_on_after()}, not {newest}")
        newest = max(checkpoint_files.steps(broken / "checkpoints"), default=0)
    life = Life(layout, broken, steps)
    if life.wait() != 0:
        failures.append(f"at the end: {life.output()[-2000:]}")
    elif newest == 0 or life.went_on_after() != newest:
        failures.append(f"at the end: after {life.went_on_after()}, not {newest}")
    elif curve(broken) != curve(whole):
        failures.append(f"records differ in {', '.join(differing(broken, whole))}")
    elif weights(broken) != weights(whole):
        failures.append("weights differ")
    for failure in failures:
        print(failure, file=sys.stderr)
    done = sum(phases.values())
    return {
        "kills": done,
        "survived": done if not failures else done - len(failures),
        "lost": len(failures),
        "while_a_checkpoint_was_written": unfinished,
        "phases": dict(phases),
        "lives_that_resumed": sum(count for step, count in resumed.items() if step) + 1,
        "steps": steps,
        "slowest_end_of_the_others_s": round(slowest, 1),
        "minutes": round((time.monotonic() - started) / 60, 1),
    }


class Life:
    """One start of a run, until its end or its death."""

    def __init__(self, layout: str, run_dir: Path, steps: int):
        self.ranks, options = LAYOUTS[layout]
        self.trace = run_dir.with_suffix(".trace")
        self.log = run_dir.with_suffix(".log")
        self.trace.mkdir(exist_ok=True)
        for file in self.trace.iterdir():
            file.unlink()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [
            "--nproc-per-node",
            str(self.ranks),
            Path(__file__).with_name("traced_train.py"),
        ]
        command += [CONFIG, *COMMON, *options, f"train.steps={steps}", f"run.dir={run_dir}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command], stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                     "TAOPD_TRACE": str(self.trace)},
            )  # fmt: skip

    def output(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        return self.process.wait(timeout=1800)

    def went_on_after(self) -> int | None:
        """The step of the checkpoint that it resumed, 0 for none; None while it was built."""
        if said := re.search(r"^resuming after step (\d+)$", self.output(), re.MULTILINE):
            return int(said[1])
        return 0 if self.phase()[1] not in ("", "build") else None

    def phase(self) -> tuple[int, str]:
        """The counter and name of the newest phase of rank 0."""
        path = self.trace / "rank_0"
        words = path.read_text().split() if path.exists() else []
        return (int(words[0]), words[1]) if len(words) == 2 else (-1, "")

    def reach(self, wanted: str, generator: random.Random) -> str | None:
        """Wait for a random moment of the wanted phase, or shortly after it.

        Returns:
            The phase at that moment; None if the run had ended.
        """
        # Not always its first time: a life that makes no step would be all that there is.
        skip = generator.randrange(3) if wanted not in ("build", "eval", "checkpoint") else 0
        seen = -1
        while True:
            if self.process.poll() is not None:
                return None
            counter, phase = self.phase()
            if phase == wanted and counter != seen:
                seen, skip = counter, skip - 1
                if skip < 0:
                    break
            time.sleep(0.001)
        longest = 8.0 if wanted == "build" else 0.15
        time.sleep(generator.uniform(0, longest) * generator.random())
        return self.phase()[1] if self.process.poll() is None else None

    def kill(self, everyone: bool, generator: random.Random) -> float:
        """SIGKILL for all ranks and torchrun, or for one rank; the seconds until all have ended."""
        parent = psutil.Process(self.process.pid)
        ranks = parent.children()
        family = [parent, *parent.children(recursive=True)]
        victims = family if everyone or not ranks else [generator.choice(ranks)]
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
        began = time.monotonic()
        _, alive = psutil.wait_procs(family, timeout=END_WITHIN)
        self.process.wait(timeout=1)
        if alive:
            raise RuntimeError(f"{len(alive)} processes did not end within {END_WITHIN} s")
        return time.monotonic() - began


def curve(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(UNREPEATABLE)}
        for line in lines
    ]


def differing(one: Path, other: Path) -> list[str]:
    pairs = zip(curve(one), curve(other), strict=False)
    return sorted({k for a, b in pairs for k in a.keys() | b.keys() if a.get(k) != b.get(k)})


def weights(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "student" / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
