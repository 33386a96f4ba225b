"""The items in their order: where each is, how long it may take, what it proves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One thing that a GPU has to show.

    Attributes:
        target: the function, `module:function` below this package.
        limit_s: after which its process is killed.
        proves: a sentence for the page.
        gpus: how many it needs.
        package: that it cannot do without.
    """

    name: str
    target: str
    limit_s: float
    proves: str
    gpus: int = 1
    package: str | None = None


ITEMS = (
    Item(
        "gradients", "steps:gradients", 120,
        "A replayed step has the gradients of two passes in bf16, up to rounding.",
    ),
    Item(
        "attention", "kernels:attention", 60,
        "Attention of packed sequences is its definition in float64, forward and backward: several "
        "query heads to a key-value head, a segment of one token, padding.",
    ),
    Item(
        "products", "kernels:products", 60,
        "`mm` and `addmm` with `out_dtype` take no rows and odd widths, and add up in fp32.",
    ),
    Item(
        "kernels", "kernels:kernels", 90,
        "The vocabulary's kernels are float64's at V = 151,936 and 75,697, a nan shows in its row "
        "and no other, and reading goes at the pace of a copy.",
    ),
    Item(
        "heads", "heads:against_peers", 180,
        "Scoring and loss at the widths of Qwen3-4B and 14B run near the matrix products' best "
        "rate, and not behind other projects' losses in the same process.",
    ),
    Item(
        "losses", "steps:same_losses", 150,
        "Three steps have the same losses in both schedules, with TransformerEngine and without.",
    ),
    Item(
        "resume", "steps:resumed", 150,
        "What was saved with TransformerEngine resumes without, and the other way round.",
    ),
    Item(
        "saves", "memory:saves", 120,
        "A save takes no more of the host's memory than 1.25 of the rank's own state, training "
        "waits for the copy alone, and the resumed student goes on bit for bit.",
    ),
    Item(
        "offload", "memory:offload", 90,
        "An offloaded teacher reads the same, gives its memory back, and is fetched while the "
        "device computes.",
    ),
    Item(
        "colocated", "servers:colocated", 180,
        "An SGLang server on the trainer's device gives its memory back and gets the weights, push "
        "after push.",
        package="sglang",
    ),
    Item(
        "waits", "waits:warm_step", 90,
        "The host waits for the device nowhere in a pass over micro-batches, and a few times a "
        "step elsewhere.",
    ),
    Item(
        "profile", "profile:profiled", 120,
        "`train.profile` shows kernels under the names of the phases; the device is seldom idle.",
    ),
    Item(
        "doctor", "machine:doctor", 90,
        "`taopd doctor` finds the machine fit, and engine and trainer of one opinion.",
    ),
    Item(
        "broadcast", "servers:broadcast", 240,
        "Weights are broadcast to servers on other devices. One that is killed meanwhile is given "
        "up soon, started anew and given the weights again; the run goes on.",
        gpus=2, package="sglang",
    ),
)  # fmt: skip
