"""Convert checkpoints between Hugging Face and Megatron's distributed format, and compare them.

    taopd convert to-megatron --hf DIR --out DIR
    taopd convert to-hf --megatron DIR --out DIR
    taopd convert verify --hf DIR --megatron DIR
    taopd launch --nproc-per-node 8 -m megatron_taopd convert verify --hf DIR --megatron DIR --tp 4

Under torchrun the ranks share the work. docs/convert.md has sizes, memory and times.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from megatron_taopd.checkpoints.verify import check_layout, compare_logits, compare_tensors
from megatron_taopd.cli import common
from megatron_taopd.formats import convert
from megatron_taopd.formats.convert import Advance
from megatron_taopd.formats.hf import DTYPES, MAX_FILE_BYTES
from megatron_taopd.parallel import platform, progress

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}  # of logits, by the dtype they are in


def main(arguments: list[str]) -> int:
    """Convert or compare; the exit status is 0, or 1 if what was compared differs."""
    return common.run(work, parse(arguments))


def work(arguments: argparse.Namespace) -> int:
    """Run the subcommand on all ranks and print its figures on rank 0."""
    common.quiet_transformers()
    started = time.monotonic()
    join(arguments)
    results, passed = COMMANDS[arguments.command](arguments)
    results |= {"seconds": time.monotonic() - started, "peak_memory_bytes": peak_memory()}
    common.show(common.as_table(results))
    common.write_json(arguments.json, results)
    return 0 if passed else 1


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the arguments of all three subcommands."""
    parser = common.Parser(prog="taopd convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    layout = common.Parser(add_help=False)
    for size, what in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        layout.add_argument(f"--{size}", type=int, default=1, help=f"{what}-parallel size")
    always = common.Parser(add_help=False)
    common.add_json(always)
    always.add_argument("--quiet", action="store_true", help="no progress bar")
    writing = common.Parser(add_help=False)
    writing.add_argument("--out", type=Path, required=True)
    writing.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    writing.add_argument("--dtype", choices=DTYPES, help="of what is written; default: as it is")

    to_megatron = commands.add_parser("to-megatron", parents=[writing, layout, always])
    to_megatron.add_argument("--hf", type=Path, required=True)

    to_hf = commands.add_parser("to-hf", parents=[writing, always])
    to_hf.add_argument("--megatron", type=Path, required=True)
    to_hf.add_argument("--hf", type=Path, help="config and tokenizer; default: kept beside it")
    gigabytes = number(float, "above 0", lambda size: 0 < size < math.inf)
    to_hf.add_argument("--max-file-gb", type=gigabytes, default=MAX_FILE_BYTES / 1e9)

    verify = commands.add_parser("verify", parents=[layout, always])
    verify.add_argument("--hf", type=Path, required=True)
    verify.add_argument("--megatron", type=Path, required=True)
    verify.add_argument("--no-logits", action="store_true", help="compare tensors alone")
    verify.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the forward passes")
    tokens = number(int, "at least 3", lambda count: count >= 3)
    verify.add_argument("--tokens", type=tokens, default=64, help="of the forward passes")
    tolerance = number(float, "0 or more", lambda most: 0 <= most < math.inf)
    verify.add_argument(
        "--tolerance", type=tolerance, help=f"of logits; default by dtype: {TOLERANCE}"
    )
    return parser.parse_args(arguments)


def number(kind: type, right: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """Make a type of argument for argparse: a number that something holds for."""

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text}; it has to be {right}")
        return value

    return read


def join(arguments) -> None:
    """Join the group of ranks, if there is one or the command needs one."""
    if arguments.command == "verify" and not arguments.no_logits:
        platform.initialize()
    elif "RANK" in os.environ:
        dist.init_process_group("gloo")  # files and small objects alone, no device


def to_megatron(arguments) -> tuple[dict, bool]:
    """Write a Hugging Face directory in Megatron's format."""
    refuse_existing(arguments)
    layout = (arguments.tp, arguments.pp, arguments.ep)
    dtype = DTYPES.get(arguments.dtype)
    with shown("to Megatron", arguments) as bar:
        done = convert.to_megatron(arguments.hf, arguments.out, *layout, dtype, bar)
    return asdict(done), True


def to_hf(arguments) -> tuple[dict, bool]:
    """Write a Megatron checkpoint as a Hugging Face directory."""
    refuse_existing(arguments)
    dtype, file_bytes = DTYPES.get(arguments.dtype), int(arguments.max_file_gb * 1e9)
    with shown("to Hugging Face", arguments) as bar:
        done = convert.to_hf(
            arguments.megatron, arguments.out, arguments.hf, dtype, file_bytes, bar
        )
    return asdict(done), True


def verify(arguments) -> tuple[dict, bool]:
    """Compare all tensors and, unless told not to, the logits of a forward pass."""
    layout = (arguments.tp, arguments.pp, arguments.ep)
    if not arguments.no_logits:
        check_layout(arguments.hf, *layout)
    with shown("comparing", arguments) as bar:
        found = compare_tensors(arguments.hf, arguments.megatron, bar)
    results = asdict(found)
    passed = found.different == 0
    if not arguments.no_logits:
        difference, largest = compare_logits(
            arguments.hf,
            arguments.megatron,
            *layout,
            dtype=DTYPES[arguments.dtype],
            tokens=arguments.tokens,
        )
        tolerance = arguments.tolerance
        if tolerance is None:
            tolerance = TOLERANCE[arguments.dtype] * max(1.0, largest)
        results |= {
            "logits_largest_difference": difference,
            "logits_largest": largest,
            "logits_tolerance": tolerance,
        }
        passed &= difference <= tolerance
    return results | {"same": passed}, passed


COMMANDS = {"to-megatron": to_megatron, "to-hf": to_hf, "verify": verify}


def peak_memory() -> int:
    """Return the resident bytes of the worst rank at their most, mapped files included. Collective:
    an all-gather of 8 bytes, pickled.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not dist.is_initialized():
        return peak
    peaks: list = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, peak)
    return max(peaks)


def refuse_existing(arguments) -> None:
    """Raise ValueError if --out exists and is not to be replaced."""
    if arguments.out.exists() and not arguments.overwrite:
        raise ValueError(f"--out: {arguments.out} exists; give another, or --overwrite")


@contextmanager
def shown(title: str, arguments) -> Iterator[Advance]:
    """Show the bytes done; the work is known once the first of it is."""
    if arguments.quiet:
        yield convert.ignore
        return
    with progress.phase(title, unit="MB") as bar:
        yield lambda done, total: bar.advance(done / 1e6, total / 1e6)
