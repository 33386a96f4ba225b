"""What each selector keeps of a bank, and the gain of these rows (Tables 2, 8 and 10)."""

from __future__ import annotations

import numpy as np

from megatron_taopd.diagnostics.bootstrap import interval, ratio
from megatron_taopd.diagnostics.gains import Row, ScoredBank, estimate_row
from megatron_taopd.step.batch_scores import BatchScores
from megatron_taopd.step.selection import SELECTORS, budget, keep_highest

# The paper's names.
SELECTOR_NAMES = {
    "full": "Full OPD",
    "random": "Random",
    "prefix": "Prefix",
    "prefix_share": "Prefix (share)",
    "entropy": "Entropy",
    "divergence": "Raw KL",
    "compatibility": "C-only",
    "tip": "TIP",
    "teachability": "TA-OPD",
    "teachability_entropy": "TA-OPD+Ent.",
    "q3": "Q3-only",
    "q3_high_c": "Q3+high-C",
    "q3_high_dl": "Q3+TA (high D^L)",
    "q3_low_dl": "Q3+low D^L",
    "q3_high_di": "Q3+high D^I",
}
RATIOS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5)
TOP_N_RATIOS = (0.03, 0.05, 0.1)
PLACES = 20  # equal parts of a response

Masks = dict[tuple[str, float], np.ndarray]


def kept_rows(bank: ScoredBank, k: int, seed: int) -> Masks:
    """Mark what `selection.select` keeps, [R] bool by (selector, budget)."""
    scores, masks = BatchScores.whole(bank.scores(k), bank.cu_rows()), {}
    for name, priority_of in SELECTORS.items():
        priority = priority_of(scores, seed)
        for share in RATIOS:
            kept = bank.num_rows if name == "full" else budget(share, bank.num_rows)
            masks[name, share] = keep_highest(priority, scores.held, kept).numpy()
    scores.refuse_nan()
    return masks


def selector_gains(bank: ScoredBank, gain, masks: Masks, counts: np.ndarray) -> list[Row]:
    """Tabulate the gain of the rows that each selector keeps (Tables 2, 8, 10).

    quantity: `total`, Σ gain in nats; `per kept`, over the number of kept rows; `per kept − all`,
    over the mean gain of all rows, which is what a random choice is expected to give. The rows are
    chosen once, on the whole bank; a resample of prompts takes those of its prompts.
    """
    everywhere = np.zeros(bank.num_rows, dtype=np.int64)
    average = bank.group_means(gain, everywhere, 1, counts)[:, 0]
    rows = []
    for (name, share), mask in masks.items():
        sums = (bank.group_sums(values, everywhere, 1)[:, 0] for values in (gain * mask, mask))
        total, kept = (counts @ of_prompts for of_prompts in sums)
        per_kept = ratio(total, kept)
        rows += [
            {"budget": share, "selector": SELECTOR_NAMES[name], "quantity": quantity}
            | {"rows": int(mask.sum()), **estimate_row(interval(values))}
            for quantity, values in (
                ("total", total),
                ("per kept", per_kept),
                ("per kept − all", per_kept - average),
            )
        ]
    return sorted(rows, key=lambda row: row["budget"])


def kept_positions(bank: ScoredBank, masks: Masks) -> list[Row]:
    """Count where in their responses the kept rows stand, in PLACES equal parts.

    share: of the kept rows; keep_rate: of the rows in that part of a response.
    """
    part = np.minimum((bank.place() * PLACES).astype(int), PLACES - 1)
    everything = np.bincount(part, minlength=PLACES)
    rows = []
    for (name, share), mask in masks.items():
        kept = np.bincount(part[mask], minlength=PLACES)
        shares, rates = ratio(kept, mask.sum()), ratio(kept, everything)
        rows += [
            {"budget": share, "selector": SELECTOR_NAMES[name], "from": i / PLACES}
            | {"rows": int(kept[i]), "share": float(shares[i]), "keep_rate": float(rates[i])}
            for i in range(PLACES)
        ]
    return rows
