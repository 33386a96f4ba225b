"""What the reductions share: a row's normalizers, and the order of its candidates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_COLUMNS = 64  # columns of which a first look at the top-K knows only the highest logit

# Sorts behind every real id among candidates of equal logit.
NO_ID = torch.iinfo(torch.int32).max


class Normalizers(NamedTuple):
    """What turns logits of both models into log p and log(p_S/p_T), [R, 1] each.

    A model's max z and log Σ exp(z − max) stay apart: their fp32 sum would have no digits left for
    log p when logits are around 1e4. The teacher's log-sum is given by how much the student's
    exceeds it. Near agreement that is a small number with all its digits, while rounding either
    log-sum to fp32 would put an error of up to 5e-7 on every log-ratio of the row.
    """

    student_top: Tensor
    teacher_top: Tensor
    log_sum: Tensor
    excess: Tensor

    def student_log_probs(self, logits: Tensor) -> Tensor:
        return (logits - self.student_top).sub_(self.log_sum)

    def teacher_log_probs(self, logits: Tensor) -> Tensor:
        return (logits - self.teacher_top).sub_(self.log_sum - self.excess)

    def log_ratio(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return log p_S − log p_T; nan where both are −inf."""
        shifted = teacher_logits - self.teacher_top
        return (student_logits - self.student_top).sub_(shifted).sub_(self.excess)


def order_key(logits: Tensor, ids: Tensor) -> Tensor:
    """Return int64 keys, all different, that sort by (logit, lowest id), so that topk is exact.

    An fp32 number's bits, read as an integer, sort like the number, once those of negative numbers
    are flipped (all but the sign). Adding 0 turns −0 into 0, which would differ. A nan, whatever
    its bits, sorts like +inf: a row that has one has it among its top-K.
    """
    bits = (logits + 0.0).nan_to_num(torch.inf, torch.inf, -torch.inf).view(torch.int32)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) - ids
