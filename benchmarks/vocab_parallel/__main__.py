"""Time, memory, bytes on the wire and error of scoring and loss, ours beside the other ways.

    pip install '.[bench]'
    python -m benchmarks.vocab_parallel --tp 1 2 4 --rows 512 2048

Every way works on the same rows and the same heads and yields the same numbers: D, C and both
entropies of each row, or the mean reverse KL with the gradients of the student's hidden states and
head. docs/vocab_parallel.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import product
from pathlib import Path

import torch
import torch.multiprocessing
from rich.console import Console

from benchmarks.vocab_parallel.measure import measure
from benchmarks.vocab_parallel.problem import BLOCKS, Setup
from benchmarks.vocab_parallel.results import tables, targets_table
from benchmarks.vocab_parallel.roofline import Problem, rooflines


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vocab_parallel", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", nargs="+", type=int, default=[1024], help="of the student")
    parser.add_argument(
        "--teacher-hidden", nargs="+", type=int, default=[2560], help="one for each"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[2048])
    parser.add_argument("--tp", nargs="+", type=int, default=[1])
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.05, 0.1], help="kept rows")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--chunk-rows", type=int, default=256)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of all ranks together")
    parser.add_argument("--memory-limit", type=float, help="GB; default 70 %% of what is free")
    parser.add_argument("--only", nargs="+", choices=["scores", "loss"], default=["scores", "loss"])
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument(
        "--roofline", action="store_true",
        help="measure nothing: what an H100 allows by bytes and operations, and the kernels as "
        "compiled for it, which takes a minute and no GPU",
    )  # fmt: skip
    arguments = parser.parse_args()
    if len(arguments.hidden) != len(arguments.teacher_hidden):
        parser.error(
            "--hidden and --teacher-hidden go in pairs: give as many of one as of the other"
        )
    if arguments.vocab % BLOCKS or any(BLOCKS % tp for tp in arguments.tp):
        parser.error(f"--vocab must be a multiple of {BLOCKS}, and --tp a divisor of {BLOCKS}")
    if arguments.device == "cuda" and arguments.tp != [1]:
        parser.error("--device cuda measures one GPU: --tp 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")

    if arguments.roofline:
        print_rooflines(arguments)
        return

    torch.multiprocessing.set_forkserver_preload(["torch", "megatron_taopd.parallel.vocab"])
    # For the ranks, which start afresh: no chatter of the profiler and of others in the tables.
    os.environ.update(
        KINETO_LOG_LEVEL="99", TRL_EXPERIMENTAL_SILENCE="1", LOG_LEVEL="ERROR",
        PYTHONWARNINGS="ignore",
    )  # fmt: skip
    # Tests and CPU runs of the package do without torch.compile; here it is one of the ways.
    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    pairs = zip(arguments.hidden, arguments.teacher_hidden, strict=True)
    console, measured = open_console(160), []
    for (hidden, teacher_hidden), rows, tp in product(pairs, arguments.rows, arguments.tp):
        setup = Setup.of(arguments, hidden, teacher_hidden, rows, tp)
        console.print(str(setup), highlight=False)
        measured.append(measure(setup))
        console.print(*tables(measured[-1]))
        if arguments.json:
            arguments.json.write_text(json.dumps(measured, indent=2) + "\n")
    console.print(targets_table(measured))


def open_console(width: int) -> Console:
    """Open the terminal; what is none gets room for the tables."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console


def print_rooflines(arguments: argparse.Namespace) -> None:
    """Print the kernels as compiled, and what the passes of each pair of widths could take."""
    # Has Triton's compiler, which nothing else here needs.
    from benchmarks.vocab_parallel.ahead_of_time import compile_all

    compiled, console = compile_all(), open_console(190)
    pairs = zip(arguments.hidden, arguments.teacher_hidden, strict=True)
    for (hidden, teacher_hidden), rows in product(pairs, arguments.rows):
        console.print(*rooflines(Problem(rows, arguments.vocab, hidden, teacher_hidden), compiled))


if __name__ == "__main__":
    main()
