"""Single tokens and answers for the report: of the first step and evaluation, and of the newest.

They are kept in samples.json, which is replaced as a whole, so that its size does not grow with the
run. Each rank looks at the rows that it holds, and rank 0 writes down what all have seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.evaluation.in_loop import Example
from megatron_taopd.formats.files import file_written_aside
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.objects import gather
from megatron_taopd.parallel.order import all_reduce
from megatron_taopd.step.distiller import Selection
from megatron_taopd.types import RolloutBatch

MOST_TOKENS = 1600  # of all responses of a step; each has an equal share
MOST_POINTS = 400  # of kept tokens in the D–C plane, and as many of the others
MOST_CHARACTERS = 2000  # of a prompt or an answer
KINDS = {"l": "learnable", "i": "incompatible", "a": "agreement"}
LETTERS = list(KINDS)
AGREEMENT = 2  # its place there
COLUMNS = ("D", "C", "d", "c", "log_q", "student", "teacher")  # of a token's scores
EVEN = 0.5  # of C̃, where D^L = D̃·C̃ and D^I = D̃·(1 − C̃) are equal
UNRANKED = ("full", "random")  # selectors whose priorities say nothing of a token


@dataclass(frozen=True)
class Response:
    """One response, token by token.

    Attributes:
        tokens: the text of each that has a row.
        kinds: a key of KINDS for each.
        kept: whether each was trained on.
        scores: of each token D, C, d and c (D̃ and C̃), rank, log_p and log_q (the engine's and the
            teacher's log-probability of it, in nats), and student and teacher (entropies, in nats).
            `rank` is None where the selector has none; one log_q where only the student knows the
            token.
        length: how many these are in the whole response, of which the first are shown.
    """

    prompt: str
    tokens: list[str]
    kinds: str
    kept: list[bool]
    scores: dict[str, list[float | None] | None]
    length: int


@dataclass(frozen=True)
class Snapshot:
    """What the selector saw in one step.

    Attributes:
        split: D̃ above which a token disagrees.
        counts: of each of KINDS, all tokens of the batch and those that were kept.
        points: some tokens in the D–C plane: C̃, D̃, kind, kept (0 or 1), C, D, text.
    """

    step: int
    split: float
    counts: dict[str, tuple[int, int]]
    points: list[list]
    responses: list[Response]

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.counts.values())

    @property
    def kept(self) -> int:
        return sum(kept for _, kept in self.counts.values())

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Snapshot:
        """Read what `asdict` has made of one, and JSON of that."""
        responses = [Response(**response) for response in tree["responses"]]
        counts = {kind: tuple(pair) for kind, pair in tree["counts"].items()}
        return cls(**{**tree, "counts": counts, "responses": responses})


@dataclass(frozen=True)
class Answers:
    """What the student answered to the first held-out prompts, after a step."""

    step: int
    examples: list[Example]

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Answers:
        """Read what `asdict` has made of one."""
        return cls(tree["step"], [Example(**example) for example in tree["examples"]])


@dataclass
class Samples:
    """The first and the newest of each; either list has two entries at most."""

    steps: list[Snapshot] = field(default_factory=list)
    evaluations: list[Answers] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, before: int) -> Samples:
        """Read what a run has kept of the steps before one; nothing if it has kept nothing.

        Raises:
            ValueError: the file is not what `write` writes.
        """
        if not path.exists():
            return cls()
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            steps = [Snapshot.of(each) for each in tree["steps"]]
            evaluations = [Answers.of(each) for each in tree["evaluations"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from error
        return cls(
            [each for each in steps if each.step < before],
            [each for each in evaluations if each.step < before],
        )

    def write(self, path: Path) -> None:
        """Replace the file. Raises ValueError if there is no space."""
        with file_written_aside(path) as aside:
            aside.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")

    @staticmethod
    def keep(entries: list, new: Any) -> None:
        """Let the new one follow the first one, in place of the newest until now."""
        entries[1:] = []
        entries.append(new)


def take(
    step: int, batch: RolloutBatch, selection: Selection, tokenizer, count: int
) -> Snapshot | None:
    """Look at the tokens of a step.

    A token disagrees where D is above the median of the batch, as in TIP's quadrants. Its
    disagreement is learnable where D^L, and incompatible where D^I is the larger part of D̃ (Eq. 5).

    Args:
        count: of responses: the first ones of which a row was kept.

    Returns:
        The same whoever holds which rows; None but on the first rank.

    Collectives: every rank takes part. It says, pickled, which of its rows are to be shown, and
    then their scores; together at most 2·MOST_POINTS + MOST_TOKENS rows. All-reduces of 48 bytes
    and of 8 for each token.
    """
    rows = _Rows(batch, selection)
    most = MOST_TOKENS // count
    offers = rows.gather((rows.points(), rows.begun_well(most)[:count], rows.nearest_median()))
    points = sorted(row for found, _, _ in offers for row in found)
    first = sorted(i for _, found, _ in offers for i in found)[:count]
    split = min(nearest for _, _, nearest in offers)[-1]
    starts = batch.cu_rows.tolist()
    spans = {i: range(starts[i], min(starts[i + 1], starts[i] + most)) for i in first}
    shown = [row for span in spans.values() for row in span]
    seen = {
        row: scores for part in rows.gather(rows.scores({*points, *shown})) for row, scores in part
    }
    ranks = None
    if selection.choice.selector not in UNRANKED:
        ranks = dict(
            zip(shown, rows.ranks(shown, [seen[row]["priority"] for row in shown]), strict=True)
        )
    counts = rows.kinds_counted()
    if not rows.first_rank:
        return None

    tokens, plane = batch.row_tokens(), []
    for row in points:
        of = seen[row]
        place, raw = ([of[name] for name in names] for names in (("c", "d"), ("C", "D")))
        text = tokenizer.decode(tokens[row : row + 1])
        rounded = [round(value, 4) for value in place]
        plane.append([*rounded, of["kind"], of["kept"], *map(_short, raw), text])

    responses = []
    for i, span in spans.items():
        prompt, response = batch.sequence(i).tensor_split([int(batch.prompt_lengths[i])])
        places = (batch.positions_of(torch.tensor(span)) - len(prompt) + 1).tolist()
        texts = texts_of(response[: places[-1] + 1], tokenizer)
        columns = {name: [_short(seen[row][name]) for row in span] for name in COLUMNS}
        columns["rank"] = ranks and [ranks[row] for row in span]
        columns["log_p"] = [_short(p) for p in batch.log_probs[span.start : span.stop].tolist()]
        responses.append(
            Response(
                shortened(tokenizer.decode(prompt, skip_special_tokens=True)),
                [texts[place] for place in places],
                "".join(seen[row]["kind"] for row in span),
                [bool(seen[row]["kept"]) for row in span],
                columns,
                starts[i + 1] - starts[i],
            )
        )
    return Snapshot(step, split, counts, plane, responses)


class _Rows:
    """The rows of a batch that this rank holds, on the CPU: what a look asks of each."""

    def __init__(self, batch: RolloutBatch, selection: Selection):
        choice, self.kept_of = selection.choice, selection.kept.counts
        self.batch, self.held = batch, choice.scores.held
        self.ids, self.mask = self.held.ids(), choice.mask.cpu()
        self.priority = choice.priority.cpu()
        scores = choice.scores
        self.columns = {
            "D": scores.bounded("disagreement"),
            "C": scores.rows.compatibility,
            "d": scores.d,
            "c": scores.c,
            "log_q": scores.rows.teacher_log_prob,
            "student": scores.rows.student_entropy,
            "teacher": scores.rows.teacher_entropy,
        }
        self.columns = {name: column.cpu() for name, column in self.columns.items()}
        [known] = scores.describe("disagreement")
        self.median = float(known.quantiles[1])
        self.kinds = kinds_of(self.columns["D"], self.columns["c"], self.median)

    @property
    def first_rank(self) -> bool:
        return self.held.group is None or dist.get_rank() == 0

    def gather(self, value):
        """Return what every rank says, by rank."""
        return [value] if self.held.group is None else gather(value)

    def points(self) -> list[int]:
        """Return those held of at most MOST_POINTS kept rows, evenly spread, and of the others."""
        found = []
        for marked, of in (
            (self.mask, self.kept_of),
            (~self.mask, self.batch.cu_rows.diff() - self.kept_of),
        ):
            ids = self.ids[marked]
            sequence = self.batch.sequences_of(ids)
            within = torch.arange(len(ids)) - torch.searchsorted(sequence, sequence)
            place = (of.cumsum(0) - of)[sequence] + within  # among all marked rows of the batch
            stride = -(-int(of.sum()) // MOST_POINTS) or 1
            found += ids[place % stride == 0].tolist()
        return found

    def begun_well(self, most: int) -> list[int]:
        """Return the sequences held that have a kept row among their first ones."""
        kept = self.ids[self.mask]
        sequence = self.batch.sequences_of(kept)
        return sequence[kept - self.batch.cu_rows[sequence] < most].unique().tolist()

    def nearest_median(self) -> tuple[float, int, float]:
        """Return how far the nearest D held is from the median, of which row, and its D̃."""
        if not len(self.ids):
            return math.inf, 0, 0.0
        away = (self.columns["D"] - self.median).abs()
        i = int((away == away.min()).nonzero()[0])
        return float(away[i]), int(self.ids[i]), round(float(self.columns["d"][i]), 4)

    def scores(self, rows: set[int]) -> list[tuple[int, dict]]:
        """Return what is known of those of these rows that are held."""
        wanted = torch.isin(self.ids, torch.tensor(sorted(rows), dtype=torch.int64))
        at = wanted.nonzero()[:, 0]
        columns = {name: column[at].tolist() for name, column in self.columns.items()}
        columns["priority"] = self.priority[at].tolist()
        columns["kind"] = [LETTERS[kind] for kind in self.kinds[at].tolist()]
        columns["kept"] = self.mask[at].int().tolist()
        return [
            (row, {name: column[i] for name, column in columns.items()})
            for i, row in enumerate(self.ids[at].tolist())
        ]

    def ranks(self, rows: list[int], priorities: list[float]) -> list[int]:
        """Return, 1 for the row that the selector would keep first, the rank of these rows."""
        ordered = self.priority.sort(descending=True, stable=True)
        ids, asked = self.ids[ordered.indices], torch.tensor(priorities, dtype=self.priority.dtype)
        rising = ordered.values.flip(0)
        higher = len(ids) - torch.searchsorted(rising, asked, right=True)
        as_high = len(ids) - torch.searchsorted(rising, asked)
        before = [
            first + int(torch.searchsorted(ids[first:end], row))  # ties: the earlier rows
            for row, first, end in zip(rows, higher.tolist(), as_high.tolist(), strict=True)
        ]
        return [place + 1 for place in self._sums(before)]

    def kinds_counted(self) -> dict[str, tuple[int, int]]:
        """Return, by letter, all tokens of the batch, and the kept ones."""
        both = [self.kinds.bincount(minlength=3), self.kinds[self.mask].bincount(minlength=3)]
        counts = self._sums(torch.cat(both).tolist())
        return dict(zip(LETTERS, zip(counts[:3], counts[3:], strict=True), strict=True))

    def _sums(self, numbers: list[int]) -> list[int]:
        told = torch.tensor(numbers, dtype=torch.int64, device=platform.device())
        return all_reduce(told, self.held.group).tolist()


def kinds_of(d: Tensor, normal_c: Tensor, median: float) -> Tensor:
    """Return [r] int64, the place in KINDS of each row.

    Args:
        d: [r] finite D.
        normal_c: [r] C̃.
        median: of D over the batch, which is exact where many rows have the same D̃.
    """
    return torch.where(d > median, (normal_c < EVEN).long(), AGREEMENT)


def texts_of(tokens: Tensor, tokenizer) -> list[str]:
    """Return the text of each token, which can depend on those before it (spaces, bytes)."""
    texts = [tokenizer.decode(tokens[:n]) for n in range(len(tokens) + 1)]
    return [after[len(before) :] for before, after in pairwise(texts)]


def shortened(text: str) -> str:
    """Leave out the middle of a long text."""
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"


def _short(value: float) -> float | int | None:
    """Round to three digits, which is what a person reads; None if it is not finite."""
    if isinstance(value, int):
        return value
    return float(f"{value:.3g}") if math.isfinite(value) else None
