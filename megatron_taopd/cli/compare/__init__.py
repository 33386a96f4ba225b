"""Compare what has been trained: runs, selectors, students and what is known of a teacher."""

from __future__ import annotations

from megatron_taopd.cli import choose

COMMANDS = {
    "runs": (f"{__name__}.runs", "finished runs, at equal supervision and at equal compute time"),
    "selectors": (f"{__name__}.selectors", "train with several selectors and seeds: accuracy"),
    "students": (f"{__name__}.students", "how far each is from the teacher on the same contexts"),
    "teachers": (f"{__name__}.teachers", "what SGLang knows of a teacher, and the teacher itself"),
}


def main(arguments: list[str]) -> int:
    """Run the comparison that the first argument names, and return its exit status."""
    return choose("taopd compare", __doc__ or "", COMMANDS, arguments)
