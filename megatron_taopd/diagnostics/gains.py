"""Gains over a scored bank: what `gain` wrote, read for the statistics, and rows of a table.

A statistic is a table, a list of rows; a row has its keys (K, term, selector, …) and

    rows: how many response rows it rests on
    estimate, low, high: the value and its 95 % interval (prompt-cluster bootstrap)

Shapes, in addition to those of `types.py`: P prompts · W = 1 + resamples · G groups
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from megatron_taopd.diagnostics.bootstrap import group_sums, ratio
from megatron_taopd.diagnostics.table import KS, SUPPORT, read_table
from megatron_taopd.step.teachability import (
    bounded,
    incompatible_disagreement,
    learnable_disagreement,
)
from megatron_taopd.types import TokenScores

Row = dict[str, Any]
Tables = dict[str, list[Row]]


def estimate_row(triple) -> Row:
    """Name the three numbers of an interval."""
    return dict(zip(("estimate", "low", "high"), map(float, triple), strict=True))


@dataclass(frozen=True)
class ScoredBank:
    """Scores of the initial student and the teacher on every response row of the bank.

    Attributes:
        columns: [R] float64 each: the table's, by name; an infinite D counts as the largest finite.
        prompts: [R] int64, which of the P prompts, numbered from 0.
        sequence: [R] int64, the number of the row's sequence in the bank.
        ks: for which there are D, C and the other proxies.
        fingerprint: of the bank.
    """

    columns: dict[str, np.ndarray]
    prompts: np.ndarray
    sequence: np.ndarray
    ks: tuple[int, ...] = KS
    fingerprint: str = ""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.prompts)

    @property
    def num_prompts(self) -> int:
        """P."""
        return int(self.prompts.max()) + 1

    def scores(self, k: int) -> TokenScores:
        """Give the selectors what they get in training: float32 scores."""
        names = (f"D_{k}", f"C_{k}", "student_entropy", "teacher_entropy")
        return TokenScores(*(torch.from_numpy(self.columns[name]).float() for name in names))

    def cu_rows(self) -> torch.Tensor:
        """Return [N+1] int64: where each sequence's rows start."""
        starts = np.flatnonzero(np.diff(self.sequence, prepend=-1))
        return torch.from_numpy(np.append(starts, self.num_rows))

    def place(self) -> np.ndarray:
        """Compute [R] float64 in (0, 1), where in its response a row stands."""
        return (self.columns["position"] + 0.5) / self.columns["length"]

    def group_sums(self, values, groups: np.ndarray, num_groups: int) -> np.ndarray:
        """Sum values [R] or a number over the rows of each prompt and group: [P, G]."""
        values = np.broadcast_to(values, self.prompts.shape)
        return group_sums(values, self.prompts, self.num_prompts, groups, num_groups)

    def group_means(self, values, groups, num_groups: int, counts: np.ndarray) -> np.ndarray:
        """Average values [R] over the rows of each group in each resample: [W, G]."""
        sums = self.group_sums(values, groups, num_groups)
        return ratio(counts @ sums, counts @ self.group_sums(1.0, groups, num_groups))


def read_gains(paths: Sequence[str | Path]) -> tuple[ScoredBank, dict[str, np.ndarray]]:
    """Read the bank as initial student and teacher see it, and each seed's gain [R], by file.

    Raises:
        ValueError: a table is missing or none that `write_gain` wrote, a value is not a number, or
            the tables differ in more than the gain.
    """
    first, gains = None, {}
    for path in map(Path, paths):
        table, about = read_table(path)
        if "gain" not in table.column_names:
            raise ValueError(f"{path}: no column gain; `gain` makes such a table of two scores")
        name = path.stem if path.stem not in gains else str(path)
        gains[name] = _numbers(path, "gain", table)
        scores = table.drop_columns("gain")
        if first is None:
            first, bank = scores, _bank(path, table, about["bank"])
        elif not scores.equals(first):
            raise ValueError(
                f"{path}: its scores are not those of {paths[0]}; all gains are over one table"
            )
    return bank, gains


def _bank(path: Path, table: pa.Table, fingerprint: str) -> ScoredBank:
    prompts = np.unique(table["prompt"].to_numpy(), return_inverse=True)[1]
    if len(prompts) == 0 or prompts.max() == 0:
        raise ValueError(f"{path}: fewer than 2 prompts; intervals are over prompts")
    used = ("position", "length", "student_entropy", "teacher_entropy")
    used += tuple(f"{name}_{k}" for k in KS for name in SUPPORT)
    columns = {name: _numbers(path, name, table) for name in used}
    return ScoredBank(columns, prompts, table["sequence"].to_numpy(), KS, fingerprint)


def _numbers(path: Path, name: str, table: pa.Table) -> np.ndarray:
    """Read a column, [R] float64; D is infinite where the student rules an id of the union out."""
    values = torch.from_numpy(table[name].to_numpy().astype(np.float64))
    if name.startswith("D_"):
        values = bounded(values, f"{path}: {name}")
    if not values.isfinite().all():
        raise ValueError(f"{path}: {name}: has NaN or infinite values; they have to be finite")
    return values.numpy()


def shape_variables(bank: ScoredBank, k: int) -> dict[str, np.ndarray]:
    """Compute D, C, D^L and D^I [R] float64 at this K, by name."""
    d, c = (torch.from_numpy(bank.columns[f"{name}_{k}"]) for name in "DC")
    return {
        "D": d.numpy(),
        "C": c.numpy(),
        "D^L": learnable_disagreement(d, c).numpy(),
        "D^I": incompatible_disagreement(d, c).numpy(),
    }
