"""What SGLang tells of a teacher, beside the teacher itself: scores, and the tokens that are kept.

    taopd compare teachers examples/tiny_pair.yaml --topk 16 64

The configuration's student answers its prompts, as it would in a run. The teacher reads the answers
in this process (transformers, fp32) and on the servers of `teacher.servers`: its hidden states, and
its top-K alone. One process; both models have to fit it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from megatron_taopd import config as configuration
from megatron_taopd.cli import common
from megatron_taopd.data.prompts import load_prompts
from megatron_taopd.data.texts import teacher_reader
from megatron_taopd.data.vocab_map import VocabMap, Vocabulary
from megatron_taopd.formats.hf import load_model
from megatron_taopd.models.weights import load_head
from megatron_taopd.parallel.vocab import VocabShard
from megatron_taopd.preflight.models import with_model_directories
from megatron_taopd.rollout.local import LocalEngine
from megatron_taopd.rollout.opening import sampling_of
from megatron_taopd.serving.begin import open_replicas
from megatron_taopd.serving.hidden_states import HOOK_ARGS
from megatron_taopd.serving.model import ServedModel
from megatron_taopd.step.output_heads import OutputHeads, TopkOutputHeads
from megatron_taopd.step.selection import select
from megatron_taopd.step.teachability import learnable_disagreement
from megatron_taopd.teacher.sglang import SGLangTeacher, SGLangTopkTeacher, student_ids_of
from megatron_taopd.types import Sequences, TokenScores

CHUNK_ROWS = 256


def main(arguments: list[str]) -> int:
    """Compare what is known of the teacher; the exit status is 0."""
    parser = common.Parser(prog="taopd compare teachers", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--topk", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--ratio", type=float, help="kept rows; default: selection.ratio")
    parser.add_argument("--url", nargs="+", help="instead of teacher.servers.urls")
    parser.add_argument(
        "--mem-fraction", type=float, help="instead of teacher.servers.mem_fraction"
    )
    common.add_json(parser)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="configuration")
    return common.run(work, parser.parse_args(arguments))


def work(arguments: argparse.Namespace) -> int:
    """Print what differs in the scores and in the tokens that are kept."""
    config = configuration.load(arguments.config, ["run.dir=unused", *arguments.set])
    if config.teachers:
        raise ValueError("teachers: one teacher's forms are compared; give it as teacher.path")
    config = with_model_directories(config)
    ratio = arguments.ratio or config.selection.ratio

    vocabularies = [Vocabulary.from_pretrained(m.path) for m in (config.student, config.teacher)]
    vocabularies[0] = vocabularies[0].ending_at(config.rollout.stop_token_ids)
    vocab_map = VocabMap.between(*vocabularies)
    batch, teacher_prompts = contexts(config, arguments.prompts, vocabularies, vocab_map.size)
    model = ServedModel.of(config.teacher.path, int(batch.lengths.max()) + 64)
    teacher_inputs, _ = vocab_map.read(batch, teacher_prompts, model.longest)

    shard = VocabShard(0, vocab_map.size, None, vocab_map.size, vocab_map.absent)
    student, teacher = (load(m.path) for m in (config.student, config.teacher))
    weight = student.get_output_embeddings().weight[: shard.size].detach()
    student_rows = hidden_rows(student, batch)
    head = load_head(config.teacher.path, vocab_map.columns(0, shard.size), torch.float32)
    heads = OutputHeads(weight, head, shard, CHUNK_ROWS)
    k = config.selection.k
    tokens = batch.response_tokens()
    exact = heads.scores(student_rows, hidden_rows(teacher, teacher_inputs), tokens, k)

    with tempfile.TemporaryDirectory() as logs:
        servers = replace(
            config.teacher.servers,
            urls=tuple(arguments.url or config.teacher.servers.urls),
            mem_fraction=arguments.mem_fraction or config.teacher.servers.mem_fraction,
        )
        with open_replicas(
            servers, model, torch.float32, Path(logs), fixed_weights=True, args=HOOK_ARGS
        ) as replicas:
            served = SGLangTeacher(replicas, model, head.shape[1], torch.float32)
            rows = served.read(teacher_inputs).held.rows
            found: dict[str, tuple[TokenScores, dict]] = {
                "hidden states": (heads.scores(student_rows, rows, tokens, k), {})
            }
            ids = None
            if not vocab_map.is_identity:
                ids = student_ids_of(vocab_map.teacher_ids, model.vocab_size)
            for n in arguments.topk:
                topk = SGLangTopkTeacher(replicas, model, n, ids)
                rows = topk.read(teacher_inputs).held.rows
                topk_heads = TopkOutputHeads(weight, shard, CHUNK_ROWS)
                scores = topk_heads.scores(student_rows, rows, tokens, k)
                found[f"top {n}"] = scores, {"mass": topk.metrics()["teacher/topk_mass"]}

    figures = {
        "prompts": batch.num_sequences,
        "rows": batch.num_rows,
        "k": k,
        "ratio": ratio,
        "forms": {
            name: compare(scores, exact, ratio) | extra for name, (scores, extra) in found.items()
        },
    }
    common.show(as_table(figures))
    common.write_json(arguments.json, figures)
    return 0


def load(path: str):
    """Load a Hugging Face model in fp32."""
    return load_model(path, torch.float32).eval()


def contexts(config, limit: int, vocabularies: Sequence[Vocabulary], size: int):
    """Return the student's answers, one to a prompt, and the prompts as the teacher reads them, or
    None if it reads the same.
    """
    student, teacher = vocabularies
    prompts = load_prompts(
        config.data.prompts,
        student.tokenizer,
        replace(config.data, limit=min(limit, config.data.limit or limit)),
        teachers=teacher_reader(config.teacher, teacher),
    )
    rollout = config.rollout
    engine = LocalEngine.from_hf(
        config.student.path,
        torch.float32,
        "cpu",
        batch_size=rollout.batch_size,
        seed=config.run.seed,
        vocab_size=size,
        eos_token_ids=vocabularies[0].eos_token_ids,
    )
    sampling = replace(sampling_of(rollout), samples=1)
    batch = engine.generate(prompts.token_ids, range(len(prompts)), 0, sampling)
    return batch, prompts.teacher_token_ids


@torch.no_grad()
def hidden_rows(model, sequences: Sequences) -> Tensor:
    """Return the normed hidden states at the response rows, [R, D]."""
    rows = []
    for i in range(sequences.num_sequences):
        picked = sequences.positions_of(sequences.rows_of(torch.tensor([i])))
        rows.append(model.model(sequences.sequence(i)[None]).last_hidden_state[0, picked])
    return torch.cat(rows)


def compare(scores: TokenScores, exact: TokenScores, ratio: float) -> dict:
    """Return the largest difference and both correlations of D, C and D̃C̃, and the overlap of the
    kept rows.
    """
    vectors = {
        "D": (scores.disagreement, exact.disagreement),
        "C": (scores.compatibility, exact.compatibility),
        "DC": tuple(
            learnable_disagreement(s.disagreement, s.compatibility) for s in (scores, exact)
        ),
    }
    kept, wanted = (select("teachability", s, ratio, 0) for s in (scores, exact))
    figures: dict = {"overlap": (kept & wanted).sum().item() / wanted.sum().item()}
    for name, (got, want) in vectors.items():
        figures[name] = {
            "max_difference": (got - want).abs().max().item(),
            "mean_difference": (got - want).double().mean().item(),
            "pearson": correlation(got, want),
            "spearman": correlation(ranks(got), ranks(want)),
        }
    return figures


def correlation(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation of two vectors."""
    return torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].item()


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each value; equal values share the mean of their ranks."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place]


def as_table(figures: dict) -> Table:
    """Lay out three lines for each form of the teacher."""
    table = Table(
        box=SIMPLE,
        title=f"{figures['prompts']} prompts, {figures['rows']} rows, K = {figures['k']}",
        caption=f"kept: share of the {figures['ratio']:.0%} most teachable rows that stays; "
        "mass: of the teacher, reported",
    )
    table.add_column("teacher", no_wrap=True)
    table.add_column("score", no_wrap=True)
    for header in ("max |Δ|", "mean Δ", "Pearson", "Spearman", "kept", "mass"):
        table.add_column(header, justify="right", no_wrap=True)
    for form, row in figures["forms"].items():
        for name, label in (("D", "D"), ("C", "C"), ("DC", "D̃C̃")):
            values, last = row[name], name == "DC"
            table.add_row(
                form if name == "D" else "",
                label,
                f"{values['max_difference']:.2g}",
                f"{values['mean_difference']:+.2g}",
                f"{values['pearson']:.4f}",
                f"{values['spearman']:.4f}",
                f"{row['overlap']:.1%}" if last else "",
                f"{row['mass']:.4f}" if last and "mass" in row else "",
            )
    return table
