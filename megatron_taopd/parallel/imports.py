"""Imports of torch, Megatron and transformers without Python's garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def long_imports() -> Iterator[None]:
    """Import in here what takes seconds: without a search for garbage, two thirds as long.

    The collector goes through all objects again and again as there are more of them, and none is
    garbage. It leaves alone from then on what is there in the end.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
