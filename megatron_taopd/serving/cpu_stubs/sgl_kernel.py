"""Stands in for SGLang's compiled kernels, which are built for CUDA only.

A server on the CPU imports some of them by name and computes in plain PyTorch. On the path of the
server's process alone (`serving.server`).
"""

from __future__ import annotations


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU build")

    return kernel
