"""Runs a module whose worker processes are forked instead of started from nothing.

    python -m forking sglang.launch_server --model-path ...

SGLang spawns its scheduler and detokenizer, and each imports SGLang again, for five seconds of a
core. Without CUDA, which does not survive a fork, they can have what the first has imported. Until
then nothing looks for garbage, a third of the time, nor among what was imported later.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys

if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda *_, **__: None  # SGLang would choose "spawn"
    gc.disable()
    os.register_at_fork(before=lambda: (gc.freeze(), gc.enable()))
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
