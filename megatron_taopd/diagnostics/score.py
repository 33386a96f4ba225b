"""A checkpoint next to a teacher at every position of a bank: the table of `table.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.data import batching
from megatron_taopd.data.vocab_map import VocabMap, Vocabulary
from megatron_taopd.diagnostics.bank import Bank, Contexts, weights_fingerprint
from megatron_taopd.diagnostics.table import KS, MEASURES, PLACE
from megatron_taopd.formats import hf_map
from megatron_taopd.formats.convert import read_config, side_directory
from megatron_taopd.formats.files import file_written_aside
from megatron_taopd.formats.hf import load_config
from megatron_taopd.formats.megatron import MegatronCheckpoint
from megatron_taopd.models import gpt
from megatron_taopd.models.student import FrozenStudent
from megatron_taopd.parallel import progress
from megatron_taopd.parallel.layout import forward_layout, student_layout
from megatron_taopd.parallel.vocab import Compared, compare_hidden
from megatron_taopd.step.output_heads import open_heads
from megatron_taopd.step.scoring import gather_rows
from megatron_taopd.teacher.megatron import MegatronTeacher
from megatron_taopd.types import RolloutBatch, Sequences, WantedRows

TOP = 5  # likeliest tokens that a view shows


# --------------------------------------------------------------------------------------- measures


def measures(compared: Compared) -> Tensor:
    """Return [len(MEASURES), R] float32, what the table says of each row."""
    tops = compared.tops
    columns = [tops.student_entropy, tops.teacher_entropy, *compared[1:]]
    for k in KS:
        columns += support_measures(compared, k)
    return torch.stack([column.float() for column in columns])


def support_measures(compared: Compared, k: int) -> list[Tensor]:
    """Return [R] each of SUPPORT: what the teacher wants that lies on the student's top-K (S_S).

    D and C are Eq. 9 and 10. With S_T the teacher's top-K: overlap is |S_S ∩ S_T| / K, jaccard
    |S_S ∩ S_T| / |S_S ∪ S_T|, shared the teacher's mass on S_S ∩ S_T. The paper names a contrastive
    binary compatibility and does not define it; here cbc is 1 where the token of S_S ∪ S_T whose
    probability the teacher would raise the most, argmax p_T − p_S, is in S_S, and 0 elsewhere.
    """
    tops = compared.tops.first(k)
    in_both = tops.student.ids[:, :, None] == tops.teacher.ids[:, None, :]
    common = in_both.sum((1, 2))
    at_student, at_teacher = tops.student, tops.teacher
    mass = tops.teacher_probs(at_student.other)
    raised = mass - tops.student_probs(at_student.own)
    raised_too = tops.teacher_probs(at_teacher.own) - tops.student_probs(at_teacher.other)
    return [
        tops.disagreement(),
        tops.compatibility(),
        common / k,
        common / (2 * k - common),
        mass.masked_fill(~in_both.any(2), 0).sum(1),
        raised.amax(1) >= raised_too.amax(1),  # a token of both sets has the same value in both
    ]


def likeliest(compared: Compared) -> Tensor:
    """Return [4·TOP, R] float32: ids and probabilities of the student's likeliest tokens, then
    the teacher's.
    """
    tops = compared.tops.first(TOP)
    parts = (
        tops.student.ids,
        tops.student_probs(tops.student.own),
        tops.teacher.ids,
        tops.teacher_probs(tops.teacher.own),
    )
    return torch.cat([part.float() for part in parts], dim=1).t()


# ------------------------------------------------------------------------------------------ models


@dataclass(frozen=True)
class PairOptions:
    """How a pair of models is computed.

    Attributes:
        parallel: (tp, pp) of the student.
        teacher_parallel: (tp, pp, ep) of the teacher.
        dtype: of both models' weights.
        micro_batch_tokens: the most tokens in a packed micro-batch.
        head_memory_mib: the most that logits may take.
    """

    parallel: tuple[int, int] = (1, 1)
    teacher_parallel: tuple[int, int, int] = (1, 1, 1)
    dtype: torch.dtype = torch.float32
    micro_batch_tokens: int = 4096
    head_memory_mib: int = 512


IN_ONE_PROCESS = PairOptions()


class Pair:
    """A checkpoint and a teacher on the ranks of this job, each in a layout of its own.

    Args:
        checkpoint: of the student, a Hugging Face directory or a Megatron distributed checkpoint.
        hf_dir: its config and tokenizer.
        teacher: Hugging Face directory.
        vocab_map: between both.

    Raises:
        ValueError: a model does not divide by its layout, or a checkpoint is not what it should be.
    """

    def __init__(
        self,
        checkpoint: Path,
        hf_dir: Path,
        teacher: Path,
        vocab_map: VocabMap,
        options: PairOptions,
    ):
        hf_map.check_layout(load_config(hf_dir), hf_dir, *options.parallel)
        hf_map.check_layout(load_config(teacher), teacher, *options.teacher_parallel)
        self.micro_batch_tokens = options.micro_batch_tokens
        layout = student_layout(*options.parallel)  # seeds what the teacher's layers draw from, too
        tp, pp, ep = options.teacher_parallel
        self.teacher = MegatronTeacher(
            teacher, forward_layout(tp, pp, ep=ep), options.dtype, options.micro_batch_tokens
        )
        self.student = FrozenStudent(
            hf_dir if not is_hf(checkpoint) else checkpoint,
            layout,
            options.dtype,
            vocab_map.size,
            None if is_hf(checkpoint) else checkpoint,
        )
        rows = self.student.rows_within(options.head_memory_mib)
        self.heads = open_heads(self.student, teacher, vocab_map, rows)

    def compare(
        self,
        batch: RolloutBatch,
        teacher_inputs: Sequences,
        describe: Callable[[Compared], Tensor],
        height: int,
    ) -> Tensor:
        """Collect what `describe` says of each row, [height, R] on the CPU of every rank.

        Args:
            teacher_inputs: the batch as the teacher reads it.
            describe: takes some rows and returns [height, r].

        Collectives: both trunks' forward; the teacher's rows to the student's last stage; those of
            `compare_hidden`; an all-reduce of 4·height bytes a row over all ranks.
        """
        layout = self.student.layout
        assigned = batching.assign(batch, WantedRows.all(batch), layout, self.micro_batch_tokens)
        teacher_rows = self.teacher.hidden_states(teacher_inputs, layout, assigned)

        def columns(micro_batch: batching.MicroBatch, hidden_states: Tensor) -> Tensor:
            chunks = compare_hidden(
                gpt.pick_rows(hidden_states, micro_batch.rows, layout),
                self.heads.student,
                teacher_rows.at(micro_batch.row_ids),
                self.heads.teacher,
                micro_batch.targets,
                max(KS),
                self.heads.shard,
                self.heads.chunk_rows,
            )
            return torch.cat([describe(chunk) for chunk in chunks], dim=1)

        found = self.student.forward(assigned.micro_batches, columns)
        return gather_rows(found, assigned, batch.num_rows, height, layout)


def is_hf(checkpoint: Path) -> bool:
    """Tell a Hugging Face directory from a Megatron checkpoint."""
    return (checkpoint / "config.json").is_file()


def hf_directory(checkpoint: Path, hf_dir: Path | None) -> Path:
    """Return the directory of a checkpoint's config and tokenizer.

    Raises:
        ValueError: it is no checkpoint, or keeps none while hf_dir is None.
    """
    if is_hf(checkpoint):
        return checkpoint
    MegatronCheckpoint(checkpoint)
    return side_directory(checkpoint, hf_dir)


# ----------------------------------------------------------------------------------------- scoring


def score_bank(
    bank_dir: Path,
    checkpoint: Path,
    teacher: Path,
    out: Path,
    options: PairOptions = IN_ONE_PROCESS,
    hf_dir: Path | None = None,
    teacher_prompt: str = "own",
    view: int = 0,
) -> dict:
    """Write the table of a checkpoint and a teacher on a bank, shard by shard; its means.

    Every rank calls this, in a process group (`platform.initialize`).

    Args:
        checkpoint, teacher, options: as for `Pair`.
        out: parquet; replaced if it is there.
        hf_dir: config and tokenizer of a Megatron checkpoint; None: kept next to it.
        teacher_prompt: own or student, whose rendering of the prompts the teacher reads.
        view: so many of the first sequences go to `out` with the suffix .view.json, with the TOP
            likeliest tokens of both models.

    Raises:
        ValueError: the bank, a checkpoint or the layout is not what it should be; the bank is of
            another tokenizer, or has fewer sequences than `view`; a number of the table is none.
    """
    bank = Bank(bank_dir)
    hf_dir = hf_directory(checkpoint, hf_dir)
    for directory in (hf_dir, teacher):
        read_config(directory)
    vocabulary, teacher_vocabulary = (Vocabulary.from_pretrained(d) for d in (hf_dir, teacher))
    bank.check_tokenizer(vocabulary, checkpoint)
    if (longest := max(shard["longest"] for shard in bank.shards)) > options.micro_batch_tokens:
        raise ValueError(
            f"micro_batch_tokens: {options.micro_batch_tokens} is too small for the {longest} "
            f"tokens of the longest sequence of {bank_dir}"
        )
    viewed = bank.first(view) if view else None
    vocab_map = VocabMap.between(vocabulary, teacher_vocabulary)
    pair = Pair(checkpoint, hf_dir, teacher, vocab_map, options)
    tokenizer = teacher_vocabulary.tokenizer if teacher_prompt == "own" else None
    about = {
        "bank": bank.fingerprint,
        "checkpoint": str(checkpoint),
        "teacher": str(teacher),
        "teacher_fingerprint": weights_fingerprint(teacher),
        "teacher_prompt": teacher_prompt,
        "ks": json.dumps(KS),
    }
    schema = pa.schema(
        {name: pa.int32() for name in PLACE} | {name: pa.float32() for name in MEASURES}, about
    )
    rows, totals = 0, torch.zeros(len(MEASURES), dtype=torch.float64)
    writes = dist.get_rank() == 0
    with ExitStack() as opened:
        if writes:
            aside = opened.enter_context(file_written_aside(out))
            writer = opened.enter_context(pq.ParquetWriter(aside, schema))
        for shard in progress.track(range(len(bank.shards)), None, "scoring shards"):
            contexts = bank.read(shard)
            teacher_inputs = teacher_inputs_of(contexts, vocab_map, tokenizer, pair.teacher)
            table = pair.compare(contexts.batch, teacher_inputs, measures, len(MEASURES))
            check_numbers(table, contexts)
            rows, totals = rows + table.shape[1], totals + table.double().sum(1)
            if writes:
                columns = place(contexts) | dict(zip(MEASURES, table.numpy(), strict=True))
                writer.write_table(pa.table(columns, schema=schema))
    if viewed:
        teacher_inputs = teacher_inputs_of(viewed, vocab_map, tokenizer, pair.teacher)
        tops = pair.compare(viewed.batch, teacher_inputs, likeliest, 4 * TOP)
        if writes:
            with file_written_aside(out.with_suffix(".view.json")) as aside:
                shown = {**about, "sequences": view_of(viewed, tops, vocabulary.tokenizer)}
                aside.write_text(json.dumps(shown, ensure_ascii=False) + "\n")
    means = dict(zip(MEASURES, (totals / rows).tolist(), strict=True))
    return {"out": str(out), "positions": rows, **means}


def teacher_inputs_of(
    contexts: Contexts, vocab_map: VocabMap, tokenizer, teacher: MegatronTeacher
) -> Sequences:
    """Return the contexts as the teacher reads them.

    Args:
        tokenizer: the teacher's, if it reads its own prompts.
    """
    batch, prompts = contexts.batch, None
    if tokenizer is not None:
        prompts = contexts.prompts_for(tokenizer)
        if prompts == contexts.prompts:  # it reads what the student does
            prompts = None
    try:
        teacher_inputs, _ = vocab_map.read(batch, prompts, teacher.longest_sequence)
    except RuntimeError as error:
        raise ValueError(f"teacher: {error}") from error
    if (longest := int(teacher_inputs.lengths.max())) > teacher.longest_sequence:
        raise ValueError(
            f"teacher: it reads sequences of {longest} tokens; micro-batches and its positions "
            f"take {teacher.longest_sequence}"
        )
    return teacher_inputs


def place(contexts: Contexts) -> dict[str, Tensor]:
    """Return the columns PLACE of the contexts, [R] int32 each, as numpy arrays."""
    batch = contexts.batch
    sequences = batch.row_sequences()
    columns = (
        batch.prompts[sequences],
        sequences + contexts.first,
        batch.row_positions - batch.prompt_lengths[sequences] + 1,
        batch.response_lengths[sequences],
        batch.row_tokens(),
    )
    return {name: c.int().numpy() for name, c in zip(PLACE, columns, strict=True)}


def check_numbers(table: Tensor, contexts: Contexts) -> None:
    """Refuse scores that are not numbers.

    Args:
        table: [columns, R], a column for each response row of the contexts.

    Raises:
        ValueError: a value is NaN; the line has how many rows, and the first sequence.
    """
    if (bad := table.isnan().any(0)).any():
        sequences = contexts.batch.row_sequences()[bad].unique() + contexts.first
        raise ValueError(
            f"checkpoint or teacher: not a number at {int(bad.sum())} of {len(bad)} positions, "
            f"first in sequence {int(sequences[0])}"
        )


def view_of(contexts: Contexts, tops: Tensor, tokenizer) -> list[dict]:
    """Return sequences for people: tokens, and what both models would have said there.

    Args:
        tops: [4·TOP, R] of `likeliest`.
    """
    batch = contexts.batch
    shown, tokens = [], batch.row_tokens().tolist()
    student, student_p, teacher, teacher_p = tops.t().split(TOP, dim=1)

    def candidates(ids: Tensor, probabilities: Tensor) -> list[list]:
        texts = tokenizer.batch_decode(ids.long()[:, None])
        return [[text, round(p, 6)] for text, p in zip(texts, probabilities.tolist(), strict=True)]

    for i in range(batch.num_sequences):
        number = int(batch.prompts[i])
        positions = [
            {
                "text": tokenizer.decode([tokens[row]]),
                "student": candidates(student[row], student_p[row]),
                "teacher": candidates(teacher[row], teacher_p[row]),
            }
            for row in range(*batch.cu_rows[i : i + 2].tolist())
        ]
        shown.append(
            {
                "sequence": contexts.first + i,
                "prompt": number,
                "messages": contexts.messages[number],
                "positions": positions,
            }
        )
    return shown
