"""Imported first by a fork server: its imports are not looked through for garbage.

What is forked from it collects what it makes itself.
"""

import gc
import os


def _collect_what_is_new() -> None:
    gc.freeze()
    gc.enable()


gc.disable()
os.register_at_fork(after_in_child=_collect_what_is_new)
