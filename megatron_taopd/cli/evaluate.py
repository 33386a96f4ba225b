"""Evaluate checkpoints on the paper's six benchmarks, by EvalScope on an SGLang server.

    taopd evaluate RUN/student --data DIR --out eval --seeds 0 1 2 3 4 --run-code
    taopd evaluate RUN/checkpoints/step_00000040 QWEN --benchmarks math_500 …
    taopd evaluate --url http://127.0.0.1:30000 …

A checkpoint is a Hugging Face directory or a Megatron checkpoint of a run, which is converted into
a temporary directory. docs/evaluation.md has the layout of --data and how to install EvalScope.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import httpx
from rich.console import Console

from megatron_taopd.checkpoints.files import sum_of
from megatron_taopd.cli import common
from megatron_taopd.data.vocab_map import Vocabulary
from megatron_taopd.evaluation import benchmarks, tables
from megatron_taopd.evaluation.benchmarks import PAPER, Endpoint, Missing
from megatron_taopd.formats.convert import to_hf
from megatron_taopd.formats.directory import weight_map
from megatron_taopd.parallel import progress
from megatron_taopd.serving.server import Server


def main(arguments: list[str]) -> int:
    """Evaluate; the exit status is 0, or 1 if a checkpoint has no score at all."""
    return common.run(work, parse(arguments))


def work(arguments: argparse.Namespace) -> int:
    """Evaluate; that a server does not start, or dies, is one line as well."""
    try:
        return evaluate(arguments)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the arguments."""
    parser = common.Parser(prog="taopd evaluate", description=__doc__)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--url", help="of a server that is there, instead of checkpoints")
    parser.add_argument("--model", help="as that server calls it; default: the first it names")
    parser.add_argument("--api-key-env", help="environment variable with that server's key")
    parser.add_argument("--benchmarks", nargs="+", default=list(PAPER), choices=PAPER)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--data", type=Path, required=True, help="a directory for each benchmark")
    parser.add_argument("--limit", type=int, help="the first rows of each benchmark only")
    parser.add_argument("--out", type=Path, required=True, help="answers, logs and tables")
    common.add_json(parser, "the scores")
    parser.add_argument("--run-code", action="store_true", help="run what HumanEval's answers are")
    parser.add_argument("--max-tokens", type=int, default=32768, help="of an answer")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument(
        "--stop-token-ids", nargs="+", type=int, default=[],
        help="that end an answer, beside those of the checkpoint, as rollout.stop_token_ids",
    )  # fmt: skip
    common.add_template_kwargs(parser)
    parser.add_argument("--concurrency", type=int, default=64, help="requests at a time")
    parser.add_argument("--tp", type=int, default=1, help="GPUs of the server")
    parser.add_argument("--dtype", default="auto", help="of the server")
    parser.add_argument("--context-length", type=int, help="of the server; default: the model's")
    parser.add_argument(
        "--mem-fraction",
        type=float,
        help="of the device's memory, for the server; default: its own",
    )
    parser.add_argument("--python", default=sys.executable, help="of EvalScope's environment")
    return parser.parse_args(arguments)


def evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate all checkpoints, and return the exit status."""
    check(arguments)
    console = common.open_console()
    seeds, results = arguments.seeds, []
    with tempfile.TemporaryDirectory(prefix="evaluate-") as scratch:
        prepared, missing = prepare(arguments, Path(scratch) / "data")
        for name, why in missing.items():
            console.print(f"{name}  missing: {why}", highlight=False, soft_wrap=True)
        if not prepared:
            raise ValueError(f"--data: {arguments.data} has none of the benchmarks")
        for number, checkpoint in enumerate(arguments.checkpoints or [None], 1):
            label = str(checkpoint or arguments.url)
            out = arguments.out / f"{number}-{Path(label).name}"
            with serve(checkpoint, arguments, Path(scratch), out) as endpoint:
                scores = benchmarks.evaluate(
                    label, endpoint, prepared, missing, seeds, out, arguments.python
                )
            results.append(scores)
            title = f"{label}, in %" + (f", first {arguments.limit} rows" * bool(arguments.limit))
            show(console, out / "scores", title, *benchmarks.table(scores, seeds))
    if len(results) > 1:
        title = f"mean ± std over {len(seeds)} seeds, in %"
        compared = benchmarks.comparison(results, arguments.benchmarks)
        show(console, arguments.out / "comparison", title, *compared)
    figures = [
        asdict(scores)
        | dict(zip(("average_of", "average"), benchmarks.average(scores), strict=True))
        for scores in results
    ]
    for path in (arguments.out / "scores.json", arguments.json):
        common.write_json(path, {"seeds": seeds, "scores": figures})
    return 0 if all(scores.by_benchmark for scores in results) else 1


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for what would otherwise fail after a server has started."""
    if bool(arguments.checkpoints) == bool(arguments.url):
        raise ValueError("give either checkpoints or --url")
    if len(arguments.seeds) > 1 and arguments.temperature == 0:
        raise ValueError(
            f"--temperature: 0 with {len(arguments.seeds)} seeds, which would all answer the same; "
            "it has to be above 0, or --seeds one"
        )
    if arguments.api_key_env and arguments.api_key_env not in os.environ:
        raise ValueError(f"--api-key-env: {arguments.api_key_env} is not set")
    for checkpoint in arguments.checkpoints:
        if kind_of(checkpoint) == "hf":
            weight_map(checkpoint)
    if shutil.which(arguments.python) is None:
        raise ValueError(f"--python: {arguments.python}: no such program")
    found = subprocess.run(
        [arguments.python, "-c", "import evalscope"], capture_output=True, text=True
    )
    if found.returncode:
        why = (found.stderr.strip().splitlines() or [f"exit status {found.returncode}"])[-1]
        raise ValueError(
            f"--python: {arguments.python} cannot import EvalScope ({why}); "
            "docs/evaluation.md has how to install it"
        )


def kind_of(checkpoint: Path) -> str:
    """Tell a Hugging Face directory ("hf") from a Megatron checkpoint ("megatron")."""
    for file, kind in (("config.json", "hf"), ("metadata.json", "megatron")):
        if (checkpoint / file).is_file():
            return kind
    raise ValueError(
        f"{checkpoint}: neither a Hugging Face directory (config.json) nor a Megatron checkpoint "
        "(metadata.json)"
    )


def prepare(
    arguments: argparse.Namespace, out: Path
) -> tuple[dict[str, tuple[Path, int]], dict[str, str]]:
    """Write the rows of the benchmarks that are there, and say why the others are missing."""
    prepared, missing = {}, {}
    for name in arguments.benchmarks:
        try:
            if PAPER[name].runs_code and not arguments.run_code:
                raise Missing("it runs programs that the model writes; --run-code allows that")
            rows = benchmarks.prepare(name, arguments.data, out / name, arguments.limit)
            prepared[name] = (out / name, rows)
        except Missing as reason:
            missing[name] = str(reason)
    not_asked = {name: "not asked for" for name in PAPER if name not in arguments.benchmarks}
    return prepared, missing | not_asked


@contextmanager
def serve(
    checkpoint: Path | None, arguments: argparse.Namespace, scratch: Path, out: Path
) -> Iterator[Endpoint]:
    """Start a server of this checkpoint, or take the one that is there."""
    generation = (
        arguments.max_tokens,
        arguments.temperature,
        arguments.top_p,
        arguments.concurrency,
    )
    template_kwargs = arguments.template_kwargs or {}
    if checkpoint is None:
        key = arguments.api_key_env and os.environ[arguments.api_key_env]
        url = arguments.url.rstrip("/").removesuffix("/v1")
        model = arguments.model or first_model(url, key)
        ends = tuple(arguments.stop_token_ids)
        yield Endpoint(url, model, *generation, key, None, ends, template_kwargs)
        return
    sums = {f.name: sum_of(f) for f in sorted(checkpoint.iterdir()) if f.is_file()}
    hf_dir = checkpoint
    if kind_of(checkpoint) == "megatron":
        hf_dir = scratch / "model"
        to_hf(checkpoint, hf_dir)
    ends = Vocabulary.from_pretrained(hf_dir).ending_at(arguments.stop_token_ids).eos_token_ids
    server = Server(
        hf_dir,
        out / "server.log",
        tp=arguments.tp,
        dtype=arguments.dtype,
        context_length=arguments.context_length,
        mem_fraction=arguments.mem_fraction,
        token_ids_only=False,
    )
    with ExitStack() as stack:
        with progress.phase(f"starting {server.url}", seconds=server.start_timeout):
            stack.enter_context(server)
        yield Endpoint(server.url, str(hf_dir), *generation, None, sums, ends, template_kwargs)


def first_model(url: str, key: str | None) -> str:
    """Ask a server for the first model that it names."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{url}/v1/models", headers=headers, timeout=30).raise_for_status()
        return answer.json()["data"][0]["id"]
    except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"--url: {url}/v1/models names no model ({error}); see --model") from None


def show(console: Console, stem: Path, title: str, header: list[str], rows: list) -> None:
    """Print a table and write it next to the scores."""
    tables.write(stem, title, header, rows)
    console.print(tables.for_terminal(title, header, rows))
