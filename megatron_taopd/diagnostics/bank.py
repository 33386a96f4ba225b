"""Student rollouts, frozen: the contexts on which every checkpoint is compared (Appendix C).

A bank is a directory of `shard_00000.parquet`, …, a row per sequence, and a `bank.json` that says
which of them belong to it, what made them and what their checksums are. It is written last, so that
a bank grows by whole additions or not at all.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from megatron_taopd.checkpoints.files import sum_of, sync
from megatron_taopd.config.schema import DataSection
from megatron_taopd.data.prompts import load_prompts, render
from megatron_taopd.data.vocab_map import Vocabulary
from megatron_taopd.formats.files import file_written_aside, reason_of
from megatron_taopd.formats.hf import HFCheckpoint, load_config
from megatron_taopd.formats.hf_map import longest_sequence
from megatron_taopd.parallel import progress
from megatron_taopd.parallel.objects import gather
from megatron_taopd.rollout.engine import RolloutEngine, Sampling, make_rollout_batch
from megatron_taopd.types import RolloutBatch

RECORD = "bank.json"
SEQUENCES_PER_SHARD = 1024
_SCHEMA = pa.schema(
    {
        "prompt": pa.int32(),
        "messages": pa.string(),
        "prompt_tokens": pa.list_(pa.int32()),
        "response": pa.list_(pa.int32()),
        "log_probs": pa.list_(pa.float32()),
        "truncated": pa.bool_(),
    }
)


@dataclass(frozen=True)
class Contexts:
    """Some sequences of a bank.

    Attributes:
        batch: the rollouts; its `prompts` are numbers in the bank.
        first: the number of its first sequence in the bank.
        messages: what each of its prompts says, by number.
        template: how the student's chat template was applied (`prompts.TEMPLATES`).
        template_kwargs: the variables that it was given.
    """

    batch: RolloutBatch
    first: int
    messages: dict[int, list[dict[str, str]]]
    template: str
    template_kwargs: dict[str, Any] | None = None

    @property
    def prompts(self) -> dict[int, list[int]]:
        """The token ids of each prompt, by number."""
        numbers, lengths = self.batch.prompts.tolist(), self.batch.prompt_lengths.tolist()
        pairs = enumerate(zip(numbers, lengths, strict=True))
        return {number: self.batch.sequence(i)[:n].tolist() for i, (number, n) in pairs}

    def prompts_for(self, tokenizer) -> dict[int, list[int]]:
        """Return each prompt's token ids in another tokenizer and its chat template, by number."""
        ids = render(self.messages.values(), tokenizer, self.template, self.template_kwargs)
        return dict(zip(self.messages, ids, strict=True))


class Bank:
    """A bank that is there.

    Attributes:
        record: the content of bank.json: `model` and `tokenizer`, {path, fingerprint} each, and
            `shards`.

    Raises:
        ValueError: there is no bank.
    """

    def __init__(self, directory: str | Path):
        self.dir = Path(directory)
        path = self.dir / RECORD
        try:
            self.record = json.loads(path.read_bytes())
            self.shards: list[dict] = self.record["shards"]
        except OSError as error:
            raise ValueError(f"{path}: {reason_of(error)}; `bank` makes one") from error
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: damaged; not the record of a bank") from None

    @property
    def fingerprint(self) -> str:
        """Return a digest of everything that is in the bank."""
        sums = [shard["sum"] for shard in self.shards]
        return digest([self.record["tokenizer"]["fingerprint"], sums])

    def summary(self) -> dict:
        totals = {key: sum(s[key] for s in self.shards) for key in ("sequences", "positions")}
        prompts = 1 + max(shard["last_prompt"] for shard in self.shards)
        about = {"bank": str(self.dir), "fingerprint": self.fingerprint, "prompts": prompts}
        return about | totals

    def check_tokenizer(self, vocabulary: Vocabulary, whose: str | Path) -> None:
        """Raise ValueError unless this is the tokenizer whose ids the bank holds."""
        made_with, other = self.record["tokenizer"], tokenizer_fingerprint(vocabulary)
        if made_with["fingerprint"] != other:
            raise ValueError(
                f"{self.dir}: holds token ids of the tokenizer of {made_with['path']} "
                f"({made_with['fingerprint']}), {whose} has another one ({other}); "
                "make a bank with its own"
            )

    def read(self, shard: int) -> Contexts:
        """Return one shard.

        Raises:
            ValueError: the file is missing or not as it was written.
        """
        first = sum(s["sequences"] for s in self.shards[:shard])
        about = self.shards[shard]
        return _contexts(self._table(shard), first, about["template"], about.get("template_kwargs"))

    def first(self, sequences: int) -> Contexts:
        """Return the first sequences, of as many shards as they take.

        Raises:
            ValueError: there are fewer, or several templates rendered them; as for `read`.
        """
        ends = list(accumulate(shard["sequences"] for shard in self.shards))
        if sequences > ends[-1]:
            raise ValueError(f"{self.dir}: has {ends[-1]} sequences; {sequences} are asked for")
        shards = range(1 + bisect_left(ends, sequences))
        templates = sorted({_template_of(self.shards[shard]) for shard in shards})
        if len(templates) > 1:
            raise ValueError(
                f"{self.dir}: the templates {' and '.join(templates)} rendered its first "
                f"{sequences} sequences; take fewer, of one template"
            )
        table = pa.concat_tables([self._table(shard) for shard in shards])
        about = self.shards[0]
        kwargs = about.get("template_kwargs")
        return _contexts(table.slice(0, sequences), 0, about["template"], kwargs)

    def _table(self, shard: int) -> pa.Table:
        about = self.shards[shard]
        path = self.dir / about["file"]
        try:
            found = sum_of(path)
        except OSError as error:
            raise ValueError(f"{path}: {reason_of(error)}; {RECORD} names it") from error
        if list(found) != about["sum"]:
            raise ValueError(f"{path}: damaged; {found[0]} bytes, not those that were written")
        return pq.read_table(path)

    def prompts(self) -> tuple[dict[tuple[int, ...], int], set[tuple[int, int]]]:
        """Return the number of each prompt, by its token ids; and the (number, seed) there are."""
        numbers, answered = {}, set()
        for shard, about in enumerate(self.shards):
            table = self._table(shard).select(["prompt", "prompt_tokens"]).to_pydict()
            for number, ids in zip(table["prompt"], table["prompt_tokens"], strict=True):
                numbers[tuple(ids)] = number
                answered.add((number, about["seed"]))
        return numbers, answered


def _template_of(about: dict) -> str:
    """Name a shard's template, and the variables that it was given if there were any."""
    kwargs = about.get("template_kwargs")
    return about["template"] + (f" {json.dumps(kwargs, sort_keys=True)}" if kwargs else "")


def _contexts(
    table: pa.Table, first: int, template: str, kwargs: dict[str, Any] | None
) -> Contexts:
    columns = table.to_pydict()
    responses = [torch.tensor(tokens) for tokens in columns["response"]]
    batch = make_rollout_batch(
        columns["prompt_tokens"],
        columns["prompt"],
        responses,
        [torch.tensor(values) for values in columns["log_probs"]],
        columns["truncated"],
        [torch.zeros_like(tokens) for tokens in responses],
    )
    said = zip(columns["prompt"], columns["messages"], strict=True)
    messages = {prompt: json.loads(text) for prompt, text in said}
    return Contexts(batch, first, messages, template, kwargs)


FIRST_TO_LAST = DataSection()  # prompts of the column `prompt`, all of them
OpenEngine = Callable[[Vocabulary, int], AbstractContextManager[RolloutEngine]]


def add_rollouts(
    out: str | Path,
    student: str | Path,
    prompts: str | Path,
    sampling: Sampling,
    seed: int,
    open_engine: OpenEngine,
    data: DataSection = FIRST_TO_LAST,
) -> None:
    """Let a student answer prompts, and add that to the bank `out`, which is made if need be.

    A prompt has one number in the whole bank, however often it is asked, and a file's repeats of a
    prompt are asked once. Every rank calls this. From the in-process engine, responses depend on
    (seed, the prompt's number, sample) alone; SGLang's are not reproducible, and the seed only
    tells additions apart.

    Args:
        student: Hugging Face directory.
        sampling: `samples` responses to every prompt.
        seed: recorded; what samples with it is the engine.
        open_engine: makes the engine of the student (`engines.py`), from its vocabulary and the
            longest sequence to come; called once nothing is left that can be refused.
        data: how the prompts are read; of these the first `limit`.

    Raises:
        ValueError: what is wrong with the prompts or the place to write to; a prompt was answered
            with this seed before; the bank is of another student or tokenizer; a server has the
            weights of a later step. The bank is what it was.

    Collectives: those of the engine.
    """
    hf, path = load_config(student), Path(out) / RECORD
    vocabulary = Vocabulary.from_pretrained(student)
    loaded = load_prompts(prompts, vocabulary.tokenizer, data)
    asked = {tuple(ids): said for ids, said in zip(loaded.token_ids, loaded.messages, strict=True)}
    for name, value in (("samples", sampling.samples), ("max_new_tokens", sampling.max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name}: {value}; at least 1")
    longest = max(map(len, asked)) + sampling.max_new_tokens
    if longest > longest_sequence(hf):
        raise ValueError(
            f"max_new_tokens: {sampling.max_new_tokens} after the longest prompt makes {longest} "
            f"tokens; {student} has {longest_sequence(hf)} positions"
        )
    record = {
        "model": {"path": str(student), "fingerprint": weights_fingerprint(student)},
        "tokenizer": {"path": str(student), "fingerprint": tokenizer_fingerprint(vocabulary)},
        "shards": [],
    }
    numbers, answered = {}, set()
    if path.exists():
        bank = Bank(out)
        bank.check_tokenizer(vocabulary, student)
        made_by = bank.record["model"]
        if made_by["fingerprint"] != record["model"]["fingerprint"]:
            raise ValueError(f"{out}: holds rollouts of {made_by['path']}, not of {student}")
        record = bank.record
        numbers, answered = bank.prompts()
    for ids in asked:
        numbers.setdefault(ids, len(numbers))
    if again := sum((numbers[ids], seed) in answered for ids in asked):
        raise ValueError(
            f"seed: {seed}; {out} has answers with it to {again} of the {len(asked)} prompts of "
            f"{prompts}; give another seed or other prompts"
        )

    writes = not dist.is_initialized() or dist.get_rank() == 0
    made_by = {"prompts": str(prompts), "seed": seed, "system": data.system}
    made_by |= {"template": data.template, "template_kwargs": data.template_kwargs}
    made_by |= {"sampling": asdict(sampling)}
    added = []
    with open_engine(vocabulary, longest) as engine:
        made_by["engine"] = engine.name
        parts = [*_parts(list(asked), max(1, SEQUENCES_PER_SHARD // sampling.samples))]
        for part in progress.track(parts, None, "generating shards"):
            batch = engine.generate(part, [numbers[ids] for ids in part], 0, sampling)
            if batch.weight_versions.any():
                raise ValueError(
                    f"a server has weights of step {int(batch.weight_versions.max())}, which a run "
                    f"gave it; start it anew with those of {student}"
                )
            if writes:
                file = f"shard_{len(record['shards']) + len(added):05d}.parquet"
                messages = {numbers[ids]: asked[ids] for ids in part}
                added.append(_write_shard(Path(out) / file, batch, messages) | made_by)
    if writes:
        record = {**record, "shards": [*record["shards"], *added]}
        with file_written_aside(path) as aside:
            aside.write_text(json.dumps(record, indent=1) + "\n")
            sync(aside)
    gather(None)  # no rank reads the bank before that


def _parts(items: Sequence, size: int) -> Iterable[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _write_shard(path: Path, batch: RolloutBatch, messages: dict[int, list]) -> dict:
    """Write sequences; what bank.json says of the file."""
    prompts, rows = batch.prompts.tolist(), batch.cu_rows.tolist()
    sequences = [batch.sequence(i).tolist() for i in range(batch.num_sequences)]
    lengths = batch.prompt_lengths.tolist()
    log_probs = batch.log_probs.tolist()
    table = pa.table(
        {
            "prompt": prompts,
            "messages": [json.dumps(messages[i], ensure_ascii=False) for i in prompts],
            "prompt_tokens": [ids[:n] for ids, n in zip(sequences, lengths, strict=True)],
            "response": [ids[n:] for ids, n in zip(sequences, lengths, strict=True)],
            "log_probs": [log_probs[a:b] for a, b in pairwise(rows)],
            "truncated": batch.truncated.tolist(),
        },
        schema=_SCHEMA,
    )
    with file_written_aside(path) as aside:
        pq.write_table(table, aside, compression="zstd")
        sync(aside)
    return {
        "file": path.name,
        "sum": list(sum_of(path)),
        "sequences": batch.num_sequences,
        "positions": batch.num_rows,
        "longest": int(batch.lengths.max()),
        "last_prompt": max(prompts),
    }


# ------------------------------------------------------------------------------------ fingerprints


def digest(value) -> str:
    """Return 16 hexadecimal digits that change with anything in a JSON value."""
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def tokenizer_fingerprint(vocabulary: Vocabulary) -> str:
    """Return a digest of a tokenizer's tokens and their ids."""
    return digest(vocabulary.tokenizer.get_vocab())


def weights_fingerprint(hf_dir: str | Path) -> str:
    """Return a digest of a model's files of weights, every byte of which is read."""
    files = sorted(set(HFCheckpoint(hf_dir).files.values()))
    return digest({file: sum_of(Path(hf_dir) / file) for file in files})
