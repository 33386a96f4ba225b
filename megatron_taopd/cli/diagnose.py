"""The fixed-context diagnostic: which token positions a student learns from, and what tells them.

    taopd diagnose bank --student DIR --prompts FILE --out BANK [--engine sglang]
    taopd diagnose score --bank BANK --checkpoint DIR --teacher DIR --out before.parquet
    taopd launch --nproc-per-node 4 -m megatron_taopd diagnose score --tp 2 --pp 2 …
    taopd diagnose gain --before before.parquet --after after.parquet --out gain.parquet
    taopd diagnose analyze gain_seed0.parquet gain_seed1.parquet --out DIR
    taopd diagnose alignment --bank BANK --checkpoint DIR --teacher DIR --out FILE

docs/diagnostics.md has what the columns are and how the figures of the paper follow from them.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from megatron_taopd.cli import common
from megatron_taopd.config.schema import DataSection, ServersSection
from megatron_taopd.diagnostics.alignment import align
from megatron_taopd.diagnostics.bank import Bank, OpenEngine, add_rollouts
from megatron_taopd.diagnostics.engines import local_engine, sglang_engine
from megatron_taopd.diagnostics.table import write_gain
from megatron_taopd.diagnostics.write import write_analysis
from megatron_taopd.formats.hf import DTYPES
from megatron_taopd.parallel import platform
from megatron_taopd.rollout.engine import Sampling


def main(arguments: list[str]) -> int:
    """Run one part of the diagnostic; the exit status is 0."""
    return common.run(work, parse(arguments))


def work(arguments: argparse.Namespace) -> int:
    """Run the subcommand on all ranks and print its tables on rank 0."""
    common.quiet_transformers()
    results, tables = arguments.run(arguments)
    common.show(*tables)
    common.write_json(arguments.json, results)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the arguments of all subcommands."""
    parser = common.Parser(prog="taopd diagnose", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name, help=(run.__doc__ or "").split("\n")[0])
        common.add_json(command)
        command.set_defaults(run=run)
        add_arguments(command)
    return parser.parse_args(arguments)


# ------------------------------------------------------------------------------------------- bank


def bank_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `bank`."""
    command.add_argument("--student", type=Path, required=True, help="Hugging Face directory")
    command.add_argument("--prompts", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True, help="a new bank, or one to append to")
    command.add_argument("--prompt-column", default="prompt")
    command.add_argument("--template", default="auto")
    common.add_template_kwargs(command)
    command.add_argument("--system")
    command.add_argument("--max-prompt-tokens", type=int, default=1024)
    command.add_argument("--limit", type=int, help="prompts; default: all")
    command.add_argument("--samples", type=int, default=1, help="responses to a prompt")
    command.add_argument("--max-new-tokens", type=int, default=1024)
    command.add_argument("--temperature", type=float, default=1.0)
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--top-k", type=int, default=0)
    command.add_argument(
        "--stop-token-ids", nargs="+", type=int, default=[],
        help="that end a response, beside the student's own, as rollout.stop_token_ids",
    )  # fmt: skip
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--batch-size", type=int, default=64, help="at once, per rank or server")
    command.add_argument("--dtype", choices=DTYPES, default="fp32")
    command.add_argument("--engine", choices=("local", "sglang"), default="local")
    command.add_argument("--server-tp", type=int, help="GPUs of the SGLang server; default: 1")
    command.add_argument(
        "--url", nargs="+", default=[],
        help="of SGLang servers that are there, with the student's weights",
    )  # fmt: skip


def engine_of(arguments) -> OpenEngine:
    """Return what opens the engine that the arguments ask for."""
    urls, tp, size = tuple(arguments.url), arguments.server_tp, arguments.batch_size
    if arguments.engine == "local" and (urls or tp):
        raise ValueError("--url, --server-tp: are of --engine sglang")
    if urls and tp:
        raise ValueError(f"--server-tp: {tp} with --url, whose servers are there already")
    common = {"student": arguments.student, "dtype": DTYPES[arguments.dtype]}
    if arguments.engine == "local":
        return partial(local_engine, **common, seed=arguments.seed, batch_size=size)
    servers = ServersSection(tp=tp or 1, concurrency=size)
    if urls:
        servers = ServersSection(urls=urls, concurrency=size, start_timeout_s=0)
    return partial(sglang_engine, **common, servers=servers, logs=arguments.out / "servers")


def run_bank(arguments) -> tuple[dict, list[Table]]:
    """Let a student answer prompts, and freeze the answers."""
    open_engine = engine_of(arguments)
    platform.initialize()
    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        samples=arguments.samples,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        stop_token_ids=tuple(arguments.stop_token_ids),
    )
    data = DataSection(
        prompt_column=arguments.prompt_column,
        template=arguments.template,
        template_kwargs=arguments.template_kwargs,
        system=arguments.system,
        max_prompt_tokens=arguments.max_prompt_tokens,
        limit=arguments.limit,
    )
    add_rollouts(
        arguments.out,
        arguments.student,
        arguments.prompts,
        sampling,
        arguments.seed,
        open_engine,
        data,
    )
    results = Bank(arguments.out).summary()
    return results, [common.as_table(results)]


# ------------------------------------------------------------------------------------------ score


def score_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `score`."""
    command.add_argument("--bank", type=Path, required=True)
    command.add_argument(
        "--checkpoint", type=Path, required=True,
        help="of the student: Hugging Face or Megatron, such as RUN/checkpoints/step_00000050",
    )  # fmt: skip
    command.add_argument("--teacher", type=Path, required=True, help="Hugging Face directory")
    command.add_argument("--out", type=Path, required=True, help="parquet, a row per position")
    command.add_argument("--hf", type=Path, help="config and tokenizer of a Megatron checkpoint")
    command.add_argument("--teacher-prompt", choices=("own", "student"), default="own")
    command.add_argument("--tp", type=int, default=1, help="tensor-parallel size of the student")
    command.add_argument("--pp", type=int, default=1, help="pipeline-parallel size of the student")
    command.add_argument("--teacher-tp", type=int, help="default: --tp")
    command.add_argument("--teacher-pp", type=int, help="default: --pp")
    command.add_argument("--teacher-ep", type=int, default=1, help="of a mixture of experts")
    command.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    command.add_argument("--micro-batch-tokens", type=int, default=4096)
    command.add_argument("--head-memory-mib", type=int, default=512, help="logits at a time")
    command.add_argument("--view", type=int, default=0, help="sequences to store with their top 5")


def run_score(arguments) -> tuple[dict, list[Table]]:
    """Compare a checkpoint with a teacher at every position of a bank."""
    # Megatron takes seconds to import, which the other subcommands do without.
    from megatron_taopd.diagnostics.score import PairOptions, score_bank

    platform.initialize()
    options = PairOptions(
        parallel=(arguments.tp, arguments.pp),
        teacher_parallel=(
            arguments.teacher_tp or arguments.tp,
            arguments.teacher_pp or arguments.pp,
            arguments.teacher_ep,
        ),
        dtype=DTYPES[arguments.dtype],
        micro_batch_tokens=arguments.micro_batch_tokens,
        head_memory_mib=arguments.head_memory_mib,
    )
    results = score_bank(
        arguments.bank,
        arguments.checkpoint,
        arguments.teacher,
        arguments.out,
        options,
        hf_dir=arguments.hf,
        teacher_prompt=arguments.teacher_prompt,
        view=arguments.view,
    )
    return results, [common.as_table(results)]


# ------------------------------------------------------------------------------------------- gain


def gain_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `gain`."""
    command.add_argument("--before", type=Path, required=True, help="scored table")
    command.add_argument("--after", type=Path, required=True, help="scored table")
    command.add_argument("--out", type=Path, required=True)


def run_gain(arguments) -> tuple[dict, list[Table]]:
    """Subtract two tables of one bank: G (Eq. 1) of every position."""
    results = write_gain(arguments.before, arguments.after, arguments.out)
    return results, [common.as_table(results)]


# -------------------------------------------------------------------------------------- alignment


def alignment_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignment`."""
    command.add_argument("--bank", type=Path, required=True)
    command.add_argument("--checkpoint", type=Path, required=True, help="Hugging Face directory")
    command.add_argument("--teacher", type=Path, required=True, help="Hugging Face directory")
    command.add_argument("--out", type=Path, required=True, help="parquet, a row per token and lr")
    command.add_argument("--sequences", type=int, default=8, help="the first ones of the bank")
    command.add_argument("--tokens", type=int, default=64, help="evenly spread over their rows")
    command.add_argument("--lr", type=float, default=1e-5, help="η of the largest step")
    command.add_argument("--halvings", type=int, default=2, help="further steps, each of half η")
    command.add_argument("--teacher-prompt", choices=("own", "student"), default="own")


def run_alignment(arguments) -> tuple[dict, list[Table]]:
    """Measure Proposition 1 (Eq. 2) token by token, on a small model and one process."""
    rows = align(
        arguments.bank,
        arguments.checkpoint,
        arguments.teacher,
        arguments.out,
        arguments.sequences,
        arguments.tokens,
        [arguments.lr / 2**i for i in range(arguments.halvings + 1)],
        arguments.teacher_prompt,
    )
    table = Table(
        box=SIMPLE,
        title=f"G = η⟨∇L_fix, ∇ℓ_t⟩ + R over {rows[0]['tokens']} tokens",
        caption="explained: of G's variance, by the first term; falls: R, as η is halved",
    )
    headers = {
        "lr": "η",
        "gain_mean": "G",
        "predicted_mean": "η⟨∇,∇⟩",
        "explained": "explained",
        "same_sign": "sign",
        "remainder_mean": "|R|",
        "remainder_falls": "falls",
        "smoothness_max": "β",
    }
    for header in headers.values():
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*("–" if row[key] is None else f"{row[key]:.3g}" for key in headers))
    return {"rows": rows}, [table]


# ---------------------------------------------------------------------------------------- analyze


def analyze_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `analyze`."""
    command.add_argument("gains", nargs="+", type=Path, help="tables of `gain`, one per seed")
    command.add_argument("--out", type=Path, required=True, help="directory")
    command.add_argument("--view", type=Path, help="of `score --view`: responses to show")
    command.add_argument("--k", type=int, default=16, help="of selectors and figures")
    command.add_argument("--resamples", type=int, default=2000, help="of prompts")
    command.add_argument("--seed", type=int, default=0, help="of resamples and `random`")


def run_analyze(arguments) -> tuple[dict, list[Table]]:
    """Turn gain tables into the paper's regressions, Q3 gaps, selectors and figures."""
    tables = write_analysis(
        arguments.gains,
        arguments.out,
        arguments.view,
        arguments.k,
        arguments.resamples,
        arguments.seed,
    )
    rows = [row for row in tables["table9_regression"] if row["K"] == arguments.k]
    table = Table(box=SIMPLE, title=f"Regression of the gain, K = {arguments.k}")
    for header in ("seed", "quantity", "estimate", "95 %"):
        table.add_column(header, justify="left" if header in ("seed", "quantity") else "right")
    for row in rows:
        bounds = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
        table.add_row(row["seed"], row["quantity"], f"{row['estimate']:+.4f}", bounds)
    return {"report": str(arguments.out / "report.html"), "regression": rows}, [table]


# name → (what adds its arguments, what runs it: arguments → (figures for --json, tables to print))
COMMANDS = {
    "bank": (bank_arguments, run_bank),
    "score": (score_arguments, run_score),
    "gain": (gain_arguments, run_gain),
    "analyze": (analyze_arguments, run_analyze),
    "alignment": (alignment_arguments, run_alignment),
}
