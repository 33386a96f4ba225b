"""Single tokens and answers for the report: of the first step and evaluation, and of the newest.

They are kept in samples.json, which is replaced as a whole, so that its size does not grow with the
run. Nothing is computed for it that the step has not: scores and masks are on every rank anyway.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_taopd.evaluation.in_loop import Example
from megatron_taopd.formats.files import file_written_aside
from megatron_taopd.step.selection import SELECTORS
from megatron_taopd.step.teachability import (
    bounded,
    normalize_compatibility,
    normalize_disagreement,
    quantiles,
)
from megatron_taopd.types import RolloutBatch, TokenScores

MOST_TOKENS = 1600  # of all responses of a step; each has an equal share
MOST_POINTS = 400  # of kept tokens in the D–C plane, and as many of the others
MOST_CHARACTERS = 2000  # of a prompt or an answer
KINDS = {"l": "learnable", "i": "incompatible", "a": "agreement"}
AGREEMENT = 2  # its place there
EVEN = 0.5  # of C̃, where D^L = D̃·C̃ and D^I = D̃·(1 − C̃) are equal
UNRANKED = ("full", "random")  # selectors whose priorities say nothing of a token


@dataclass(frozen=True)
class Response:
    """One response, token by token.

    Attributes:
        tokens: the text of each.
        kinds: a key of KINDS for each.
        kept: whether each was trained on.
        scores: of each token D, C, d and c (D̃ and C̃), rank, log_p and log_q (the engine's and the
            teacher's log-probability of it, in nats), and student and teacher (entropies, in nats).
            `rank` is None where the selector has none; one log_q where only the student knows the
            token.
        length: of the whole response, of which the first tokens are shown.
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
    step: int,
    batch: RolloutBatch,
    scores: TokenScores,
    mask: Tensor,
    tokenizer,
    selector: tuple[str, int],
    count: int,
) -> Snapshot:
    """Look at the tokens of a step.

    A token disagrees where D is above the median of the batch, as in TIP's quadrants. Its
    disagreement is learnable where D^L, and incompatible where D^I is the larger part of D̃ (Eq. 5).

    Args:
        scores: [R] each, on the CPU.
        mask: [R] bool, the rows that were kept.
        selector: its name and seed.
        count: of responses: the first ones of which a row was kept.
    """
    d, c = bounded(scores.disagreement), scores.compatibility
    normal_d, normal_c = normalize_disagreement(d), normalize_compatibility(c)
    kinds, split = kinds_of(d, normal_d, normal_c)
    columns = {
        "D": d,
        "C": c,
        "d": normal_d,
        "c": normal_c,
        "rank": _ranks(scores, *selector),
        "log_p": batch.log_probs,
        "log_q": scores.teacher_log_prob,
        "student": scores.student_entropy,
        "teacher": scores.teacher_entropy,
    }
    letters = list(KINDS)
    counts = {
        letter: (int((kinds == i).sum()), int((mask & (kinds == i)).sum()))
        for i, letter in enumerate(letters)
    }
    tokens, points = batch.response_tokens(), []
    for row in sorted([*_spread(mask), *_spread(~mask)]):
        place = [round(float(x), 4) for x in (normal_c[row], normal_d[row])]
        raw = [_short(float(x)) for x in (c[row], d[row])]
        text = tokenizer.decode(tokens[row : row + 1])
        points.append([*place, letters[kinds[row]], int(mask[row]), *raw, text])

    responses, starts = [], batch.cu_rows.tolist()
    for i, (start, end) in enumerate(pairwise(starts)):
        if len(responses) == count:
            break
        rows = slice(start, min(end, start + MOST_TOKENS // count))
        if not mask[rows].any():
            continue
        prompt, response = batch.sequence(i).tensor_split([int(batch.prompt_lengths[i])])
        responses.append(
            Response(
                shortened(tokenizer.decode(prompt, skip_special_tokens=True)),
                texts_of(response[: rows.stop - start], tokenizer),
                "".join(letters[kind] for kind in kinds[rows]),
                mask[rows].tolist(),
                {
                    name: None if values is None else [_short(v) for v in values[rows].tolist()]
                    for name, values in columns.items()
                },
                end - start,
            )
        )
    return Snapshot(step, split, counts, points, responses)


def kinds_of(d: Tensor, normal_d: Tensor, normal_c: Tensor) -> tuple[Tensor, float]:
    """Return [R] int64, the place in KINDS of each row, and D̃ at the median of D.

    Args:
        d: [R] finite D; its median is exact where many rows have the same D̃.
        normal_d, normal_c: [R] D̃ and C̃.
    """
    kinds = torch.full_like(d, AGREEMENT, dtype=torch.int64)
    if not len(d):
        return kinds, 0.0
    middle = float(quantiles(d, [0.5]))
    disagrees = d > middle
    kinds[disagrees] = (normal_c[disagrees] < EVEN).long()
    return kinds, round(float(normal_d[(d - middle).abs().argmin()]), 4)


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


def _ranks(scores: TokenScores, selector: str, seed: int) -> Tensor | None:
    """Return [R] int64, 1 for the row that the selector would keep first."""
    if selector in UNRANKED:
        return None
    order = SELECTORS[selector](scores, seed).sort(descending=True, stable=True).indices
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(1, len(order) + 1)
    return ranks


def _spread(mask: Tensor) -> Sequence[int]:
    """Return at most MOST_POINTS of the marked rows, evenly spread."""
    rows = mask.nonzero().flatten().tolist()
    stride = -(-len(rows) // MOST_POINTS) or 1
    return rows[::stride]


def _short(value: float) -> float | int | None:
    """Round to three digits, which is what a person reads; None if it is not finite."""
    if isinstance(value, int):
        return value
    return float(f"{value:.3g}") if math.isfinite(value) else None
