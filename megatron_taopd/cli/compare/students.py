"""How far students are from the teacher on the same contexts, with an interval over prompts.

    taopd compare students --teacher DIR --students BEFORE AFTER --prompts test.jsonl

The first student answers the prompts once; on those answers every student is compared with the
teacher, so that the figures differ by the weights alone. A teacher with another tokenizer or chat
template reads them as in training. One process, plain transformers models.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from megatron_taopd.cli import common
from megatron_taopd.config.schema import DataSection
from megatron_taopd.data.prompts import TeacherReader, load_prompts
from megatron_taopd.data.vocab_map import VocabMap, Vocabulary
from megatron_taopd.formats.hf import load_model
from megatron_taopd.formats.hf_map import longest_sequence
from megatron_taopd.parallel.vocab import VocabShard, linear_divergence
from megatron_taopd.rollout.engine import Sampling
from megatron_taopd.rollout.local import LocalEngine
from megatron_taopd.types import RolloutBatch, Sequences

KINDS = {"reverse_kl": "KL(S‖T)", "forward_kl": "KL(T‖S)"}


def main(arguments: list[str]) -> int:
    """Compare students; the exit status is 0."""
    return common.run(work, parse(arguments))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the arguments."""
    parser = common.Parser(prog="taopd compare students", description=__doc__)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--students", nargs="+", required=True, help="the first one writes")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--teacher-prompt", choices=("own", "student"), default="own")
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--template", default="auto")
    common.add_template_kwargs(parser)
    parser.add_argument("--system")
    parser.add_argument("--limit", type=int, default=32, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    common.add_json(parser)
    return parser.parse_args(arguments)


def work(arguments: argparse.Namespace) -> int:
    """Print both divergences of each student, and how they differ from the first one's."""
    vocabularies = [Vocabulary.from_pretrained(arguments.students[0])]
    vocabularies.append(Vocabulary.from_pretrained(arguments.teacher))
    vocab_map = VocabMap.between(*vocabularies)
    teacher = load(arguments.teacher)
    batch, teacher_prompts = contexts(arguments, vocabularies, vocab_map.size)
    longest = longest_sequence(teacher.config)
    teacher_inputs, _ = vocab_map.read(batch, teacher_prompts, longest)
    rows = []
    first: dict[str, Tensor] = {}
    for path in arguments.students:
        divergences = compare(load(path), teacher, batch, teacher_inputs, vocab_map)
        first = first or divergences
        row: dict = {"student": path, "rows": batch.num_rows}
        for kind, values in divergences.items():
            row[kind] = values.mean().item()
            row[f"{kind}_change"] = interval(values - first[kind], batch)
        rows.append(row)
    common.show(as_table(rows, batch))
    common.write_json(arguments.json, rows)
    return 0


def load(path: str):
    """Load a Hugging Face model in fp32."""
    return load_model(path, torch.float32).eval()


def contexts(arguments, vocabularies: list[Vocabulary], size: int):
    """Return the first student's answers, and the prompts as the teacher reads them, or None."""
    student, teacher = (vocabulary.tokenizer for vocabulary in vocabularies)
    own = arguments.teacher_prompt == "own"
    prompts = load_prompts(
        arguments.prompts,
        student,
        DataSection(
            prompt_column=arguments.prompt_column,
            template=arguments.template,
            template_kwargs=arguments.template_kwargs,
            system=arguments.system,
            limit=arguments.limit,
        ),
        teachers=TeacherReader(teacher) if own else None,
    )
    engine = LocalEngine.from_hf(
        arguments.students[0],
        torch.float32,
        "cpu",
        seed=arguments.seed,
        vocab_size=size,
        eos_token_ids=vocabularies[0].eos_token_ids,
    )
    sampling = Sampling(max_new_tokens=arguments.max_new_tokens)
    batch = engine.generate(prompts.token_ids, range(len(prompts)), 0, sampling)
    return batch, prompts.teacher_token_ids


@torch.no_grad()
def compare(
    student, teacher, batch: RolloutBatch, teacher_inputs: Sequences, vocab_map: VocabMap
) -> dict[str, Tensor]:
    """Return the divergences over the common vocabulary at every response row, [R] in nats, by
    kind.
    """
    ids = vocab_map.common, vocab_map.teacher_ids[vocab_map.common]
    models = (student, teacher)
    heads = [m.get_output_embeddings().weight[i] for m, i in zip(models, ids, strict=True)]
    shard = VocabShard(0, len(ids[0]), None, len(ids[0]))
    values: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for i in range(batch.num_sequences):
        rows = batch.rows_of(torch.tensor([i]))
        hidden = [
            model.model(read.sequence(i)[None]).last_hidden_state[0, read.positions_of(rows)]
            for model, read in zip(models, (batch, teacher_inputs), strict=True)
        ]
        for kind, parts in values.items():
            parts.append(
                linear_divergence(hidden[0], heads[0], hidden[1], heads[1], shard, kind, 256)
            )
    return {kind: torch.cat(parts) for kind, parts in values.items()}


def interval(values: Tensor, batch: RolloutBatch, resamples: int = 2000) -> list[float]:
    """Return the mean over rows, and its 95 % bootstrap interval over prompts."""
    sums = torch.zeros(batch.num_sequences).index_add_(0, batch.row_sequences(), values)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(sums), (resamples, len(sums)), generator=generator)
    means = sums[drawn].sum(1) / batch.response_lengths[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return [values.mean().item(), low, high]


def as_table(rows: list[dict], batch: RolloutBatch) -> Table:
    """Lay out both divergences of each student."""
    table = Table(
        title=f"{batch.num_sequences} prompts, {batch.num_rows} rows, sampled by the first; nats",
        box=SIMPLE,
    )
    for header in ("student", "divergence", "mean", "change [95 %]"):
        table.add_column(header, justify="left" if header in ("student", "divergence") else "right")
    for i, row in enumerate(rows):
        for kind, formula in KINDS.items():
            change, low, high = row[f"{kind}_change"]
            table.add_row(
                "/".join(Path(row["student"]).parts[-2:]),
                formula,
                f"{row[kind]:.4f}",
                f"{change:+.4f} [{low:+.4f}, {high:+.4f}]" if i else "–",
            )
    return table
