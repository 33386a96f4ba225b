"""Step time with rollouts on an SGLang server: one thing after the other, and at the same time.

    python -m benchmarks.overlap                  # the tiny pair, a server on this machine

    sequential   the teacher reads when all responses are there (rollout.stream: false)
    stream       the teacher reads responses as they finish
    ahead        the next batch is generated while this one trains (rollout.ahead: 1)
    partial      and a step takes the first responses that finish (rollout.partial: true)

Each arm is a run of its own with the same configuration; arms take turns, and the first steps of
each run do not count. Waiting is what the trainer spends in `time/rollout`.

    python -m benchmarks.overlap --token-ms 120 --prompts 24 --arms sequential ahead
    python -m benchmarks.overlap --token-ms 120 --prompts 24 --lengths heavy

With `--token-ms`, what answers is no SGLang but `benchmarks.slow_server`: each request has a token
after so many milliseconds, whatever the others do, and takes no time of the trainer's processor. It
takes `--prompts` requests at a time. Its responses are all of LONGEST tokens, or heavy-tailed:
14 tokens or fewer for half of the prompts, LONGEST for one in fourteen. They are noise, so that
this shows time alone; weights stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.slow_server import SlowServer

STUDENT = Path(__file__).parent.parent / "examples" / "tiny_pair" / "student"
CONFIG = Path(__file__).parent.parent / "examples" / "tiny_pair_sglang.yaml"
ARMS = {
    "sequential": ["rollout.stream=false"],
    "stream": ["rollout.stream=true"],
    "ahead": ["rollout.stream=true", "rollout.ahead=1"],
    "partial": [
        "rollout.stream=true",
        "rollout.ahead=1",
        "rollout.partial=true",
        "rollout.max_staleness=6",
    ],
}
WARM_UP = 3  # steps
LONGEST = 96  # tokens of a response of the stand-in


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--steps", type=int, default=15, help=f"of a run; {WARM_UP} warm up")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each arm")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--token-ms", type=float, help="a stand-in that decodes at this rate")
    parser.add_argument("--lengths", choices=LENGTHS, default="equal", help="of the stand-in's")
    parser.add_argument("--prompts", type=int, default=64, help="a step, with the stand-in")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("overrides", nargs="*", help="section.key=value for all arms")
    arguments = parser.parse_args()
    records: dict[str, list[dict]] = {arm: [] for arm in arguments.arms}
    with stand_in(arguments) as server:
        given = [] if server is None else on_stand_in(server, arguments.prompts)
        for _ in range(arguments.repeats):
            for arm in records:
                records[arm] += run(arguments, [*given, *ARMS[arm], *arguments.overrides])
    rows = {arm: summary(steps) for arm, steps in records.items()}
    Console().print(as_table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def heavy(prompt: Sequence[int]) -> int:
    """Return a length with a heavy tail (Pareto, exponent 1), cut off at LONGEST."""
    return min(LONGEST, int(7 * random.Random(repr(list(prompt))).paretovariate(1.0)))


LENGTHS = {"equal": lambda _: LONGEST, "heavy": heavy}


def stand_in(arguments):
    """The stand-in, if it is asked for."""
    if arguments.token_ms is None:
        return nullcontext()
    seconds = arguments.token_ms / 1000
    return SlowServer(str(STUDENT), LONGEST, LENGTHS[arguments.lengths], token_s=seconds)


def on_stand_in(server: SlowServer, prompts: int) -> list[str]:
    """The overrides of a run on it, which may not mind that it takes no weights."""
    return [
        "rollout.servers.max_total_tokens=null",
        f"rollout.servers.urls=[{server.url}]",
        f"rollout.servers.concurrency={prompts}",
        "rollout.sync={transport: tensor, max_gap: 99}",
        f"rollout.prompts={prompts}",
        f"rollout.max_new_tokens={LONGEST}",
        "data.max_prompt_tokens=30",  # the tiny student has 128 positions
        "optimizer.lr=1e-30",
    ]


def run(arguments, overrides: list[str]) -> list[dict]:
    """The records of one run's steps, the first ones left out."""
    with tempfile.TemporaryDirectory() as directory:
        settings = [
            f"run.dir={directory}/run",
            f"train.steps={arguments.steps}",
            "checkpoint.every=0",
            "checkpoint.export_hf=false",
            "eval.prompts=null",
            "log.tensorboard=false",
        ]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        train = [*torchrun, str(arguments.ranks), "-m", "megatron_taopd.train", arguments.config]
        subprocess.run(
            [sys.executable, *train, *settings, *overrides],
            check=True,
            stdout=subprocess.DEVNULL,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        lines = (Path(directory) / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    return [record for record in steps if record["step"] > WARM_UP]


def summary(steps: list[dict]) -> dict[str, float]:
    def mean(key: str) -> float:
        return statistics.fmean(record.get(key, 0.0) for record in steps)

    phases = ("step", "rollout", "teacher", "scoring", "training", "sync")
    figures = {phase: mean(f"time/{phase}") for phase in phases}
    staleness = statistics.mean(record["rollout/staleness_mean"] for record in steps)
    return {**figures, "staleness": staleness, "steps": len(steps)}


def as_table(rows: dict[str, dict]) -> Table:
    table = Table(title="means, seconds", box=SIMPLE)
    first = next(iter(rows.values()))
    for header in ("", "step", "÷ sequential", *list(first)[1:]):
        table.add_column(header, justify="right" if header else "left")
    for arm, row in rows.items():
        values = [f"{value:.2f}" for value in list(row.values())[1:-1]]
        ratio = row["step"] / first["step"]
        table.add_row(arm, f"{row['step']:.2f}", f"{ratio:.2f}", *values, str(row["steps"]))
    return table


if __name__ == "__main__":
    main()
