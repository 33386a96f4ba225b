"""Numbers as people read them, in the terminal and in both reports."""

from __future__ import annotations


def number(value: float) -> str:
    """Write three significant digits, with k, M or G for the large, an exponent for the tiny."""
    if value == 0:
        return "0"
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * factor or (abs(value) >= factor and factor > 1e3):
            return f"{value / factor:.3g}{unit}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}".replace("e-0", "e−").replace("e-", "e−")


def percent(value: float) -> str:
    """Write a share, 1 for the whole, in percent."""
    value *= 100
    digits = f"{value:.1f}".removesuffix(".0") if abs(value) >= 0.1 else f"{value:.2g}"
    return f"{digits} %"


def seconds(value: float) -> str:
    """Write a duration in the largest unit of which it has one."""
    if value >= 3600:
        return f"{value / 3600:.3g} h"
    if value >= 60:
        return f"{value / 60:.3g} min"
    return f"{value:.3g} s" if value >= 1 or value == 0 else f"{1000 * value:.3g} ms"
