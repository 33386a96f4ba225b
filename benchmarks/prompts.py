"""What it takes to read the prompts of a large file: seconds, memory, and the same a second time.

    python -m benchmarks.prompts [--rows 1791700] [--distinct 17398] [--format parquet]

DAPO-Math-17k as it is published has 1.79 million rows, which are 17,398 prompts about a hundred
times each. Such a file is made of the problems of GSM8K in $TAOPD_DATA, or of made-up ones, in
DAPO's columns. `one by one` is the plain way, a rendering and a tokenisation for every row, with
lists of ids in memory; it is run on some rows and scaled to all.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from megatron_taopd.config.schema import DataSection
from megatron_taopd.data.prompts import load_prompts
from megatron_taopd.data.rendering import Renderer
from megatron_taopd.data.rows import Rows

TINY = Path(__file__).parent.parent / "examples" / "tiny_pair" / "student"
ASKS = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
CHUNK = 20_000


def main(arguments: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_791_700)
    parser.add_argument("--distinct", type=int, default=17_398)
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet")
    parser.add_argument("--tokenizer", type=Path, help="default: Qwen's in $TAOPD_DATA, or a tiny")
    parser.add_argument("--plain-rows", type=int, default=20_000, help="that are read one by one")
    parser.add_argument("--keep", action="store_true", help="data.deduplicate: false")
    options = parser.parse_args(arguments)
    data = os.environ.get("TAOPD_DATA")
    tokenizer = options.tokenizer or (Path(data) / "tokenizers" / "qwen" if data else TINY)
    with tempfile.TemporaryDirectory(prefix="prompts-") as directory:
        file = Path(directory) / f"prompts.{options.format}"
        alone(make, file, options.rows, options.distinct, data)
        section = DataSection(
            cache_dir=f"{directory}/cache", deduplicate=not options.keep, template="auto"
        )
        table = Table("", "wall s", "CPU s", "peak MB", "prompts")
        plain = alone(one_by_one, file, tokenizer, section, options.plain_rows)
        scale = options.rows / plain[3]
        figures = [
            (f"one by one, {plain[3]:,} rows × {scale:.0f}", [v * scale for v in plain[:2]], plain),
            ("first start", None, alone(load, file, tokenizer, section)),
            ("second start", None, alone(load, file, tokenizer, section)),
        ]
        for name, seconds, (wall, cpu, peak, count) in figures:
            wall, cpu = seconds or (wall, cpu)
            table.add_row(name, f"{wall:.1f}", f"{cpu:.1f}", f"{peak:.0f}", f"{count:,}")
        size = file.stat().st_size / 1e6
        Console().print(f"{options.rows:,} rows, {size:.0f} MB, {options.format}; {tokenizer.name}")
        Console().print(table)
        Console().print(
            f"one by one / first start: {plain[1] * scale / figures[1][2][1]:.0f} × the CPU seconds"
        )
    return 0


def alone(work: Callable, *arguments) -> tuple[float, float, float, int]:
    """Work in a process of its own; (wall s, CPU s, peak MB, what it returns)."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        count = work(*arguments)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        send.send((wall, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, count))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    send.close()
    measured = receive.recv()
    process.join()
    return measured


def load(file: Path, tokenizer: Path, section: DataSection) -> int:
    """Read the file as a run does, and the prompts of its first thousand steps."""
    prompts = load_prompts(file, AutoTokenizer.from_pretrained(tokenizer), section)
    for i in range(0, len(prompts), max(1, len(prompts) // 64_000)):
        prompts.token_ids[i]
    return len(prompts)


def one_by_one(file: Path, tokenizer: Path, section: DataSection, rows: int) -> int:
    """Render and tokenise every row by itself, into lists."""
    renderer = Renderer(AutoTokenizer.from_pretrained(tokenizer))
    each = Rows([file], DataSection(deduplicate=False), None)
    return len([renderer(row.messages) for row in islice(each, rows)])


def make(file: Path, rows: int, distinct: int, data: str | None) -> int:
    """Write the file."""
    records = list(islice(problems(data), distinct))
    writer, lines = None, None
    for start in range(0, rows, CHUNK):
        numbers = range(start, min(start + CHUNK, rows))
        part = [records[i % len(records)] | {"extra_info": {"index": f"{i:032x}"}} for i in numbers]
        if file.suffix == ".parquet":
            table = pa.Table.from_pylist(part)
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
        else:
            lines = lines or open(file, "w")  # noqa: SIM115 (closed below)
            lines.writelines(json.dumps(record) + "\n" for record in part)
    (writer or lines).close()
    return rows


def problems(data: str | None) -> Iterator[dict]:
    """Yield records in the columns of DAPO-Math-17k, no two the same."""
    texts = [f"Tom has {i} apples and eats {i % 7}. How many are left?" for i in range(9000)]
    if data:
        files = [Path(data) / "gsm8k" / f"{name}.jsonl" for name in ("train", "test")]
        lines = [line for file in files for line in file.read_text().splitlines()]
        texts = [json.loads(line)["question"] for line in lines]
    turn = 0
    while True:
        for number, text in enumerate(texts):
            content = ASKS + text + f"\n\nVariant {turn}." * bool(turn)
            yield {
                "data_source": "math_dapo",
                "prompt": [{"role": "user", "content": content}],
                "ability": "MATH",
                "reward_model": {"ground_truth": str(number), "style": "rule-lighteval/MATH_v2"},
            }
        turn += 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
