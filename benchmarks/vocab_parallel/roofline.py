"""What the bytes and the operations of scoring and loss allow on a GPU, with no GPU there.

Both heads' matrix products bound a pass from below: their operations over a rate that a product of
that size attains. The kernels between them read the logits of a chunk from memory, and the products
write them there first. None of it overlaps, so the times add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:  # which has Triton's compiler
    from benchmarks.vocab_parallel.ahead_of_time import Compiled

# TFLOP/s of bf16 products of this size on an H100, as the best published linear cross-entropy has
# them, and GB/s of its memory by its data sheet.
ATTAINED, MEMORY = 740.0, 3350.0
# Of each pass the kernels, in their turn; the loss is reverse KL.
PASSES = {
    "scoring": ("entropy_sums", "entropy_sums"),
    "loss": ("log_normalizer", "log_normalizer", "kl_within", "logits_gradient"),
}
# How many logits of a row and column each kernel reads.
READS = {
    **{"entropy_sums": 1, "log_normalizer": 1},
    **{"kl_within": 2, "mixture_sums": 2, "logits_gradient": 2},
}


@dataclass(frozen=True)
class Problem:
    """Rows of a student and a teacher of these widths over a whole vocabulary."""

    rows: int
    vocab: int
    hidden: int
    teacher_hidden: int

    def operations(self, name: str) -> float:
        """Count the operations of a pass's products: both heads, and the two gradients of one."""
        widths = self.hidden + self.teacher_hidden + (2 * self.hidden if name == "loss" else 0)
        return 2.0 * self.rows * self.vocab * widths

    def kernel_bytes(self, kernel: str) -> int:
        """Count the bytes that a kernel reads, fp32 logits, and writes, if it writes columns."""
        written = 2 if kernel == "logits_gradient" else 0  # in bf16
        return self.rows * self.vocab * (4 * READS[kernel] + written)

    def product_bytes(self, name: str) -> int:
        """Count the bytes of logits that products write, and of gradients that they read."""
        return self.rows * self.vocab * (2 * 4 + (2 * 2 if name == "loss" else 0))


def milliseconds(problem: Problem, name: str) -> tuple[float, dict[str, float]]:
    """Return the time of a pass's products, and that of everything around them."""
    products = problem.operations(name) / (ATTAINED * 1e12) * 1e3
    around = {"logits to and from the products": problem.product_bytes(name)}
    for kernel in PASSES[name]:
        around[kernel] = around.get(kernel, 0) + problem.kernel_bytes(kernel)
    return products, {what: size / (MEMORY * 1e9) * 1e3 for what, size in around.items()}


def rooflines(problem: Problem, compiled: Sequence[Compiled]) -> Iterator[Table]:
    """Yield the kernels as compiled, and the passes."""
    table = Table(title="Kernels as compiled for sm_90 (rows aligned to 16 bytes, or odd)")
    names = ("kernel", "variant", "registers", "spills", "occupancy", "16-byte loads", "narrower")
    for name in (*names, "MB a row", "operations a row"):
        table.add_column(name, justify="left" if name in names[:2] else "right")
    for each in compiled:
        table.add_row(
            each.kernel,
            each.variant,
            str(each.registers),
            str(each.spills),
            f"{each.occupancy:.0%}",
            str(each.loads_128),
            str(each.loads_narrow),
            f"{problem.kernel_bytes(each.kernel) / problem.rows / 1e6:.2f}",
            f"{each.operations_a_column * problem.vocab / 1e6:.1f} M",
        )
    yield table

    table = Table(
        title=f"ms of {problem.rows:,} rows, {problem.hidden} ← {problem.teacher_hidden}, "
        f"V = {problem.vocab:,}: products at {ATTAINED:.0f} TFLOP/s, memory at {MEMORY:,.0f} GB/s"
    )
    for name in ("pass", "products", "around them", "together", "of the products' ceiling"):
        table.add_column(name, justify="left" if name == "pass" else "right")
    for name in PASSES:
        products, around = milliseconds(problem, name)
        rest = sum(around.values())
        table.add_row(
            name,
            f"{products:.1f}",
            ", ".join(f"{what} {ms:.1f}" for what, ms in around.items()),
            f"{products + rest:.1f}",
            f"{products / (products + rest):.0%}",
        )
    yield table
