"""A bank whose gain follows a known law, with what rows of one prompt have in common."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_taopd.diagnostics.gains import ScoredBank
from megatron_taopd.diagnostics.table import KS, SUPPORT


def planted_columns(
    seed: int,
    prompts: int,
    rows: int,
    learnable: float = 0.0,
    incompatible: float = 0.0,
    ks: tuple[int, ...] = KS,
) -> dict[str, np.ndarray]:
    """gain = (learnable + prompt's slope)·D̃·C̃ + incompatible·D̃·(1 − C̃) + prompt + noise.

    Each prompt has two responses, of a quarter to a half of its rows and of the rest, and its own
    level and slope: the rows of a prompt are alike. D̃ and C̃ are uniform variables, of which D and
    C are simple functions.
    """
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(prompts), rows)
    first = rows // 2 - np.arange(prompts) % (rows // 4)
    lengths = np.stack([first, rows - first], axis=1).ravel()
    n = len(prompt)
    d, c = rng.random(n), rng.random(n)
    level, slope = rng.normal(size=prompts), 2 * rng.normal(size=prompts)
    gain = (learnable + slope[prompt]) * d * c + incompatible * d * (1 - c)
    gain += level[prompt] + rng.standard_t(5, size=n)
    entropy = rng.gamma(1.0, size=n)
    columns = {
        "prompt": prompt,
        "sequence": np.repeat(np.arange(2 * prompts), lengths),
        "position": np.concatenate([np.arange(length) for length in lengths]),
        "length": np.repeat(lengths, lengths),
        "token": rng.integers(100, size=n),
        "student_entropy": entropy,
        "teacher_entropy": 0.5 * entropy + rng.gamma(1.0, size=n),
        **dict.fromkeys(("forward_kl", "reverse_kl", "student_log_prob", "teacher_log_prob"), d),
        "gain": gain,
    }
    for k in ks:
        columns |= {f"D_{k}": 4 * d, f"C_{k}": 0.2 + 0.8 * c, f"shared_{k}": 0.9 * c}
        columns |= {f"overlap_{k}": np.round(c * k) / k, f"jaccard_{k}": np.round(c * k) / (2 * k)}
        columns |= {f"cbc_{k}": (c > 0.3).astype(float)}
    return columns


def planted_bank(
    *arguments, ks: tuple[int, ...] = (16,), **options
) -> tuple[ScoredBank, np.ndarray]:
    """The bank and its gain [R]."""
    columns = planted_columns(*arguments, ks=ks, **options)
    names = ["position", "length", "student_entropy", "teacher_entropy"]
    names += [f"{name}_{k}" for k in ks for name in SUPPORT]
    bank = ScoredBank(
        {name: columns[name].astype(float) for name in names},
        columns["prompt"],
        columns["sequence"],
        ks,
    )
    return bank, columns["gain"]


def write_table(path, columns: dict[str, np.ndarray]):
    pq.write_table(pa.table(columns).replace_schema_metadata({"bank": "planted"}), path)
    return path
