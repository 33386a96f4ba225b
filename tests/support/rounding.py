"""How far float32 may be from float64: a few times as far as float32, done plainly, is.

Instruction sets, libraries and numbers of threads round in other orders, so that a bound read off
one machine is that machine's. Here the measure is taken where the test runs: `plain` is the same
formula in dense float32, whole and without shards (`dense.in_float32`), and its error is of the
size that this data has on this machine. A mistake is not: the smallest ones are orders larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
MULTIPLE = 10  # of plain's error; the most that was seen, over instruction sets, is 3


def error(got: Tensor, exact: Tensor) -> float:
    """The largest |got − exact| of all elements; equal infinities agree, nan does not."""
    got, exact = got.detach().double(), exact.detach()
    return (got - exact).abs().masked_fill(got == exact, 0).amax().item() if got.numel() else 0.0


def assert_rounded(got: Tensor, exact: Tensor, plain: Tensor, what: str = "") -> None:
    """See that `got` is off by no more than MULTIPLE times what `plain` is.

    Plain's error counts as at least one rounding of the largest element: it may be right by luck.

    Args:
        got: float32.
        exact: float64, of the same shape.
        plain: the dense float32 computation of it.
    """
    assert got.shape == exact.shape == plain.shape, what
    largest = exact.detach().abs().amax().item() if exact.numel() else 0.0
    allowed = MULTIPLE * max(error(plain, exact), EPS * largest)
    assert error(got, exact) <= allowed, f"{what}: {error(got, exact):.3g}, {allowed:.3g} allowed"
