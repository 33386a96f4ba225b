"""Whether a run that has taken its last step has also ended: student and report are written."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_taopd.checkpoints import files
from megatron_taopd.config.schema import Config
from megatron_taopd.formats.files import file_written_aside

FINISHED = "finished.json"  # in run.dir, the last thing that a run writes


def mark_finished(run_dir: str | Path, step: int, exported: bool) -> None:
    """Note that a run has come to its end after so many steps; by one process.

    Args:
        exported: with the student in `student/`.

    Raises:
        ValueError: it cannot be written.
    """
    with file_written_aside(Path(run_dir) / FINISHED) as aside:
        aside.write_text(json.dumps({"step": step, "exported": exported}) + "\n")


def is_finished(config: Config) -> bool:
    """Tell whether all steps are done, and nothing of the run's end is missing."""
    step = max(files.steps(Path(config.run.dir) / "checkpoints"), default=0)
    return step >= config.train.steps and not missing(config, step)


def missing(config: Config, step: int) -> list[str]:
    """Name what a run whose newest checkpoint is of this step, the last or later, has not written.

    A student and a report that are there may be those of an earlier end, after fewer steps: that
    `finished.json` has this step says that they are not.
    """
    run_dir = Path(config.run.dir)
    try:
        mark = json.loads((run_dir / FINISHED).read_text())
        ended, exported = mark["step"] == step, bool(mark["exported"])
    except (OSError, ValueError, KeyError, TypeError):
        ended, exported = False, False
    found = []
    if not (ended and (run_dir / "report.html").is_file()):
        found.append("report.html")
    wanted = config.checkpoint.export_hf and step == config.train.steps  # as `Run.finish` has it
    if wanted and not (ended and exported and (run_dir / "student" / "config.json").is_file()):
        found.append("student/")
    return found
