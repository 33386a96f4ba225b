"""Time, memory and operations of one step: full OPD, TA-OPD in both schedules, TRL's trainer.

    python -m benchmarks.step --pair tiny
    TAOPD_DATA=DIR python -m benchmarks.step --pair smollm2 --prompts 8
    python -m benchmarks.step --pair slice --prompts 2 --cut 0.8

All arms run the same rollouts through the package's own functions, without the optimizer's step, so
that every repeat does the same. docs/step_cost.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state
from rich.console import Console

from benchmarks.step.measure import measure
from benchmarks.step.pairs import RATIO
from benchmarks.step.results import tables
from megatron_taopd.parallel import platform


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--pair", choices=["tiny", "smollm2", "slice"], default="tiny")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, help="default: of the pair; slice 192")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.3, RATIO, 0.05])
    parser.add_argument("--concentrate", type=float, default=0.4, help=f"beside 0, at {RATIO:.0%}")
    parser.add_argument(
        "--horizon", nargs="+", type=int, default=[], help="lengths beside what auto takes"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--head-memory-mib", type=int, default=256, help="logits at a time")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, help="of this rank; default: torch's")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL's trainer out")
    parser.add_argument(
        "--layers", nargs=2, type=int, default=[2, 4], help="slice: of student and teacher"
    )
    parser.add_argument("--cut", type=float, help="slice: share of tokens trained, as on smollm2")
    parser.add_argument("--rows-per-token", type=float, default=1.0, help="slice: rows over tokens")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    if RATIO not in arguments.ratios:
        parser.error(f"--ratios: {RATIO} is missing, which the targets are set for")
    if arguments.pair == "slice" and not arguments.cut:
        parser.error("--pair slice needs --cut: what --pair smollm2 says is trained at 10 %")
    if arguments.pair == "smollm2" and "TAOPD_DATA" not in os.environ:
        parser.error("--pair smollm2 needs gsm8k/train.jsonl under the directory TAOPD_DATA")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    os.environ.update(
        KINETO_LOG_LEVEL="99", TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_DISABLE_TELEMETRY="1"
    )
    joined = platform.initialize()
    transformers.utils.logging.set_verbosity_error()

    try:
        measured = measure(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    finally:
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        console = Console()
        if not console.is_terminal:
            console.width = 160
        for table in tables(measured):
            console.print(table)
        if arguments.json:
            arguments.json.write_text(json.dumps(measured, indent=2) + "\n")
    if joined:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
