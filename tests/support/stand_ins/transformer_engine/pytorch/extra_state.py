"""What modules keep in a checkpoint besides their parameters: scales of FP8, so nothing here."""

from __future__ import annotations

import torch
from torch import Tensor


class WithExtraState(torch.nn.Module):
    """A module whose state has an `_extra_state`, which a strict load asks for."""

    fp8 = fp8_calibration = False

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta = {"fp8_checkpoint": False}

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is None:
            return
        if not isinstance(state, Tensor):
            raise RuntimeError("Unsupported checkpoint format.")
        assert state.numel() == 0, state

    def init_fp8_metadata(self, num_gemms: int = 1) -> None: ...
