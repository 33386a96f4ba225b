"""What is compared: selectors and what is more than one, on equal terms, each at its own rate.

Each run is judged by its last evaluation, and by its gain on a bank where there is one.

Terms are numbers of steps. What a step of an arm supervises and costs is measured by two short runs
of each arm, whose difference has neither the start of a process nor an evaluation in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from megatron_taopd.diagnostics.table import write_gain
from megatron_taopd.formats.files import file_written_aside

ONE_RANK = [f"{model}.parallel={{tp: 1, pp: 1}}" for model in ("student", "teacher")]
# Arms that are more than a selector.
COMPOSED = {
    "teachability_horizon": ["selection.selector=teachability", "rollout.horizon=auto"],
    "discrepancy": ["selection.selector=full", "loss.weights=discrepancy"],
}
PROBES = (8, 40)  # steps of the two short runs
EQUAL = ("steps", "supervision", "seconds")


def overrides_of(arm: str) -> list[str]:
    """Return what makes a run one of this arm: of COMPOSED, or a selector by its name."""
    return COMPOSED.get(arm, [f"selection.selector={arm}"])


@dataclass(frozen=True)
class Trainer:
    """Trains one configuration with overrides; what is finished is not done again.

    Attributes:
        config: its file.
        common: overrides of every run.
    """

    config: str
    common: Sequence[str]

    def __call__(self, directory: Path, overrides: Sequence[str]) -> Path:
        """Run the trainer to its end, and note the processor seconds that it took.

        Raises:
            SystemExit: it has failed.
        """
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / "student").is_dir():
            return directory
        words = [*ONE_RANK, *self.common, f"run.dir={directory}", *overrides]
        command = [sys.executable, "-m", "megatron_taopd.train", self.config, *words]
        with open(directory / "output.txt", "w") as output:
            child = subprocess.Popen(
                command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(
                f"{directory}: exit status {child.returncode}; see {directory / 'output.txt'}"
            )
        with file_written_aside(directory / "processor.json") as aside:
            aside.write_text(json.dumps({"seconds": used.ru_utime + used.ru_stime}))
        return directory


@dataclass(frozen=True)
class Scorer:
    """Scores the students of runs on one bank.

    Attributes:
        bank: of `taopd diagnose bank`.
        teacher, teacher_prompt: of the runs.
        before: the table of the student before training; made if it is not there.
    """

    bank: Path
    teacher: str
    teacher_prompt: str
    before: Path

    def begin(self, student: str) -> None:
        """Score the student that every run begins with."""
        if not self.before.is_file():
            self._score(student, self.before)

    def __call__(self, run: Path) -> None:
        """Write `gain.parquet` of a finished run, unless it is there."""
        if (run / "gain.parquet").is_file():
            return
        self._score(str(run / "student"), run / "after.parquet")
        write_gain(self.before, run / "after.parquet", run / "gain.parquet")
        (run / "after.parquet").unlink()

    def _score(self, student: str, out: Path) -> None:
        command = [
            *(sys.executable, "-m", "megatron_taopd", "diagnose", "score"),
            *("--bank", str(self.bank), "--checkpoint", student, "--teacher", self.teacher),
            *("--teacher-prompt", self.teacher_prompt, "--out", str(out)),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        scored = subprocess.run(command, env=environment, capture_output=True, text=True)
        if scored.returncode:
            raise SystemExit(f"{out}: not scored; {scored.stderr.strip()}")


def records_of(directory: Path) -> list[dict]:
    """Read what a run has logged."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def seconds_of(directory: Path) -> float | None:
    """Return the processor seconds of a run; None if they were not noted."""
    file = directory / "processor.json"
    return json.loads(file.read_text())["seconds"] if file.is_file() else None


def probe(train: Trainer, out: Path, arm: str) -> dict[str, float]:
    """Measure what a step of an arm supervises (rows) and costs (processor seconds)."""
    spent: dict[int, float] = {}
    for steps in PROBES:
        directory = train(
            out / f"{arm}-{steps}",
            [*overrides_of(arm), f"train.steps={steps}", "eval.prompts=null"],
        )
        seconds = seconds_of(directory)
        assert seconds is not None, directory
        spent[steps] = seconds
    fewer, more = PROBES
    rows = [record["kept_rows"] for record in records_of(directory) if record.get("kept_rows")]
    return {"supervision": mean(rows), "seconds": (spent[more] - spent[fewer]) / (more - fewer)}


def equal_steps(
    rates: dict[str, dict[str, float]], equal: str, reference: str, steps: int
) -> dict[str, int]:
    """Return the steps in which each arm comes to what the reference does in `steps`.

    Args:
        rates: of `probe`, by arm.
        equal: what they are to have in common, of EQUAL.
    """
    if equal == "steps":
        return dict.fromkeys(rates, steps)
    whole = steps * rates[reference][equal]
    return {arm: max(1, round(whole / rate[equal])) for arm, rate in rates.items()}


def best_rate(outcomes: dict[float, float]) -> float:
    """Return the learning rate with the best outcome; of equally good ones the lowest."""
    return max(sorted(outcomes), key=lambda lr: outcomes[lr])
