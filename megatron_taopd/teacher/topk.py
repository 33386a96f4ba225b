"""What a teacher says of rows that only reports its most likely tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopkRows:
    """The teacher's top-K of some rows.

    Attributes:
        ids: [R, K] int64, in the student's ids; negative for tokens that the student lacks.
        log_probs: [R, K] float32, over the teacher's whole vocabulary (natural log).
        token_log_probs: [R] float32, likewise of the sampled token.
    """

    ids: Tensor
    log_probs: Tensor
    token_log_probs: Tensor

    def pack(self) -> Tensor:
        """Pack into [R, 2K+1] int32, which can travel as hidden states do: floats by their bits."""
        floats = torch.cat([self.log_probs, self.token_log_probs[:, None]], dim=1).float()
        return torch.cat([self.ids.int(), floats.view(torch.int32)], dim=1)

    @classmethod
    def unpack(cls, packed: Tensor) -> TopkRows:
        k = packed.shape[1] // 2
        floats = packed[:, k:].contiguous().view(torch.float32)
        return cls(packed[:, :k].long(), floats[:, :k], floats[:, k])
