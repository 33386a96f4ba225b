"""Stands in for torchvision, whose published build does not load beside the CPU build of torch.

SGLang imports it unconditionally, and transformers then takes it for real; a text-only server uses
nothing of it. On the path of the server's process alone (`serving.server`).
"""

from __future__ import annotations

import sys
from enum import Enum

__version__ = "0"  # transformers compares it

InterpolationMode = Enum(
    "InterpolationMode", "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS"
)


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)

    def function(*args, **kwargs):
        raise NotImplementedError(f"torchvision.{name} is not installed: only text is served")

    return function


# Every submodule that is imported is this module.
io = transforms = v2 = functional = sys.modules[__name__]
for _path in ["io", "transforms", "transforms.functional", "transforms.v2"]:
    sys.modules[f"torchvision.{_path}"] = io
sys.modules["torchvision.transforms.v2.functional"] = io
