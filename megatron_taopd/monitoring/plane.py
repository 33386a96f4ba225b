"""The D–C plane of a step: which disagreement is learnable, and which of it was kept."""

from __future__ import annotations

from typing import Any

from megatron_taopd.monitoring.charts import dots
from megatron_taopd.monitoring.numbers import percent
from megatron_taopd.monitoring.samples import EVEN, KINDS, Snapshot

SIDE = 400  # units of both axes, from 0 to 1


def drawn_plane(snapshot: Snapshot) -> dict[str, Any]:
    """Prepare a plane for plane.html.

    Returns:
        `layers`, (class, kind, d) of paths of dots, the kept ones last; `split`, where the
        quadrants meet, from the top and the left; `quadrants`, by kind the shares of all tokens and
        of the kept ones, in words; `hover`, what tokens.js shows: percent from left and top, kind,
        kept, C, D, text; `words`, for those who do not see it.
    """
    layers = []
    for chosen in (0, 1):
        for kind in reversed(KINDS):
            points = [
                (SIDE * c, SIDE * (1 - d))
                for c, d, of, kept, *_ in snapshot.points
                if kept == chosen and of == kind
            ]
            if points and chosen:
                layers.append(("ring", kind, dots(points)))
            if points:
                layers.append(("kept" if chosen else "left", kind, dots(points)))
    quadrants = {
        kind: (
            percent(rows / max(1, snapshot.rows)),
            percent(kept / snapshot.kept) if snapshot.kept else "none",
        )
        for kind, (rows, kept) in snapshot.counts.items()
    }
    words = "; ".join(
        f"{KINDS[kind]}: {of_all} of all tokens, {of_kept} of the kept ones"
        for kind, (of_all, of_kept) in quadrants.items()
    )
    return {
        "layers": layers,
        "split": (round(SIDE * (1 - snapshot.split), 1), SIDE * EVEN),
        "quadrants": quadrants,
        "hover": [
            [round(100 * c, 1), round(100 * (1 - d), 1), kind, kept, *rest]
            for c, d, kind, kept, *rest in snapshot.points
        ],
        "words": words,
    }
