"""Compare two checkpoints, tensor by tensor and by logits: `taopd convert verify`, for short."""

from __future__ import annotations

from megatron_taopd.cli import convert


def main(arguments: list[str]) -> int:
    """Compare; the exit status is 0 if they are the same, 1 if not."""
    return convert.main(["verify", *arguments])
