"""Logits of the rows asked for, a bounded number at a time, and the way back to the head.

Three matmuls a row and model are all that a head needs (one for the teacher's and for scores): bf16
operands, fp32 accumulation and output. Gradients of the weight add up over the chunks in fp32, in
place in Megatron's gradient buffer where there is one, on CUDA within the matmul itself. The
gradient of the hidden states is summed over the vocabulary in fp32, too, however cuBLAS splits it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_taopd.parallel.vocab.shard import ALIGNMENT, VocabShard

# Per row and column of a shard: fp32 logits of both models, and on CUDA a narrow gradient.
_BYTES_PER_LOGIT = 4 + 4 + 2
_WEIGHT_BLOCK = 8192  # rows of a head that are widened at a time, on the CPU


def rows_within(budget_bytes: int, num_columns: int) -> int:
    """Count the rows whose logits of both models fit the budget, at least one.

    All ranks of a group must come to the same number, as every chunk is a collective: num_columns
    is that of the widest shard.
    """
    rows = budget_bytes // (_BYTES_PER_LOGIT * max(1, num_columns))
    return max(1, rows // 64 * 64 or rows)


def logits_bytes(num_rows: int, chunk_rows: int, num_columns: int) -> int:
    """Count the bytes that the logits of both models take at a time, of num_rows rows in chunks."""
    return _BYTES_PER_LOGIT * min(num_rows, chunk_rows) * num_columns


def chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Cut num_rows rows into as few slices of at most chunk_rows as it takes, in order.

    They differ by at most one row: a short last one would leave most of a GPU idle.
    """
    assert chunk_rows > 0, chunk_rows
    count = -(-num_rows // chunk_rows)
    start = 0
    for i in range(count):
        stop = start + (num_rows + count - 1 - i) // count
        yield slice(start, stop)
        start = stop


def is_narrow(dtype: torch.dtype) -> bool:
    """Tell a dtype whose logits have to be computed in a wider one, fp32."""
    return dtype in (torch.bfloat16, torch.float16)


class Projection:
    """Logits of the rows asked for, [n, padded_width] of one shard, masked, at least fp32.

    On the CPU they lie in one buffer, so that each answer overwrites the one before.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, shard: VocabShard, chunk_rows: int):
        self.hidden, self.weight, self.shard = hidden, shard.rows(weight), shard
        self.buffer = None
        if not hidden.is_cuda:
            rows = min(chunk_rows, len(hidden))
            wide = torch.promote_types(hidden.dtype, torch.float32)
            self.buffer = hidden.new_empty(rows, len(self.weight), dtype=wide)

    def __call__(self, rows: slice) -> Tensor:
        hidden = self.hidden[rows]
        if self.buffer is None:
            if is_narrow(hidden.dtype):
                logits = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
            else:
                logits = torch.mm(hidden, self.weight.t())
        else:
            logits = self.buffer[: len(hidden)]
            if is_narrow(hidden.dtype):  # the head is widened block by block, never as a whole
                hidden = hidden.float()
                for start in range(0, len(self.weight), _WEIGHT_BLOCK):
                    block = slice(start, start + _WEIGHT_BLOCK)
                    logits[:, block] = hidden @ self.weight[block].float().t()
            else:
                torch.mm(hidden, self.weight.t(), out=logits)
        return self.shard.mask(logits)


class HeadGradients:
    """Gradients of hidden [R, D] and weight [V, D], filled chunk by chunk where they are needed.

    The weight's is added to main_grad, [V, D], if that is given. Columns that take no part have
    zero gradients, whatever is in their rows of the head.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        shard: VocabShard,
        needed: tuple,
        main_grad: Tensor | None,
    ):
        wide = torch.promote_types(weight.dtype, torch.float32)  # chunks add up in fp32
        assert main_grad is None or main_grad.dtype == wide, (main_grad.dtype, weight.dtype)
        self.inputs, self.head, self.width = hidden, shard.rows(weight), shard.width
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight, self.in_place = None, main_grad is not None
        if needed[1]:
            self.weight = main_grad if self.in_place else torch.zeros_like(weight, dtype=wide)
        self.narrow = is_narrow(weight.dtype)

    def buffer(self, logits: Tensor) -> Tensor:
        """Return where the gradient of these logits, [n, padded_width], is to be written.

        It is written in their place, unless it has to be an operand of another dtype.
        """
        if self.narrow and logits.is_cuda:
            return torch.empty_like(logits, dtype=self.head.dtype)
        return logits

    def add(self, logits_grad: Tensor, rows: slice) -> None:
        """Add what these rows give to the gradients of hidden states and head.

        Args:
            logits_grad: [n, padded_width] of these rows, as it was written to `buffer`.
            rows: which rows of the hidden states they are.
        """
        if self.hidden is not None:
            self.hidden[rows] = self._hidden(logits_grad)
        if self.weight is None:
            return
        total, inputs = self.weight[: len(self.head)], self.inputs[rows]
        if self.narrow and logits_grad.is_cuda:
            _add_product(total, logits_grad.t(), inputs)
        else:
            total.addmm_(logits_grad.t(), inputs.to(logits_grad.dtype))

    def _hidden(self, logits_grad: Tensor) -> Tensor:
        """Return [n, D], fp32 at least: the gradient of these rows' hidden states."""
        grad, head = logits_grad[:, : self.width], self.head[: self.width]
        if not self.narrow:
            return grad @ head
        if not grad.is_cuda:
            pairs = zip(grad.split(_WEIGHT_BLOCK, dim=1), head.split(_WEIGHT_BLOCK), strict=True)
            return sum(g @ h.float() for g, h in pairs)
        # A sum over an odd number of columns would misalign the matmul: the rest is added apart.
        cut = self.width // ALIGNMENT * ALIGNMENT
        total = torch.mm(grad[:, :cut], head[:cut], out_dtype=torch.float32)
        return _add_product(total, grad[:, cut:], head[cut:]) if cut < self.width else total

    def get(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of hidden states and head that autograd is told.

        Of a weight whose gradient is where it belongs already that is an empty sparse one, which
        takes no memory and yet lets the hook fire by which DDP counts gradients.
        """
        if self.weight is None:
            return self.hidden, None
        if self.in_place:
            return self.hidden, _empty_sparse(self.weight.shape, self.head)
        return self.hidden, self.weight.to(self.head.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a·b of half precision to the fp32 total, in place, within the matmul; CUDA only."""
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _empty_sparse(shape: torch.Size, like: Tensor) -> Tensor:
    """Return [V, D], sparse, of which no row is there."""
    return torch.sparse_coo_tensor(
        torch.empty(1, 0, dtype=torch.int64, device=like.device),
        like.new_empty(0, shape[1]),
        shape,
        check_invariants=False,
    )


class Head(torch.autograd.Function):
    """hidden [R, D] → logits → a value a row [R], or Σ row_weight·value, chunk by chunk.

    Without row_weight the backward pass computes the logits again. With it, a chunk's gradient is
    formed while its logits are there; only one factor, the gradient of the sum, comes later.

    `open_targets()` gives a function from a slice of rows to what `value` compares their logits
    with. It is called anew for each pass, since it may hold a buffer.
    """

    @staticmethod
    def forward(ctx, hidden, weight, value, open_targets, cut, row_weight, main_grad):
        shard, chunk_rows = cut
        needed = ctx.needs_input_grad[:2]
        at_once = row_weight is not None and any(needed)
        grads = HeadGradients(hidden, weight, shard, needed, main_grad) if at_once else None
        project, targets = Projection(hidden, weight, shard, chunk_rows), open_targets()
        values = [hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))]
        saved = []
        for rows in chunks(len(hidden), chunk_rows):
            logits, chunk_targets = project(rows), targets(rows)
            chunk_values, chunk_saved = value.forward(logits, chunk_targets)
            values.append(chunk_values)
            if at_once:
                grad, out = row_weight[rows].to(logits.dtype), grads.buffer(logits)
                grads.add(value.gradient(logits, chunk_targets, chunk_saved, grad, out), rows)
            else:
                saved.append(chunk_saved)
        ctx.at_once, ctx.main_grad = row_weight is not None, main_grad if needed[1] else None
        if ctx.at_once:
            ctx.save_for_backward(*(grads.get() if grads else ()))
            return torch.cat(values).mul_(row_weight).sum()
        ctx.save_for_backward(hidden, weight, *saved)
        ctx.value, ctx.open_targets, ctx.shard, ctx.chunk_rows = (
            value, open_targets, shard, chunk_rows,
        )  # fmt: skip
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.at_once:
            # In place: the head's gradient is as large as the head. (A second backward pass through
            # the same graph is refused by autograd, which sees that a saved tensor has changed.)
            if ctx.main_grad is not None:  # what is there cannot be multiplied any more
                torch._assert_async(grad == 1, "the sum must be what is differentiated")
            grads = (g if g is None or g.is_sparse else g.mul_(grad) for g in ctx.saved_tensors)
            return *grads, None, None, None, None, None
        hidden, weight, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        grads = HeadGradients(hidden, weight, ctx.shard, needed, ctx.main_grad)
        project = Projection(hidden, weight, ctx.shard, ctx.chunk_rows)
        targets = ctx.open_targets()
        slices = chunks(len(hidden), ctx.chunk_rows)
        for rows, chunk_saved in zip(slices, saved, strict=True):
            logits = project(rows)
            out = grads.buffer(logits)
            grads.add(ctx.value.gradient(logits, targets(rows), chunk_saved, grad[rows], out), rows)
        return *grads.get(), None, None, None, None, None


def through_head(hidden, weight, value, open_targets, shard, chunk_rows, row_weight=None) -> Tensor:
    """Apply `Head`; with a weight of Megatron's DDP, its gradient goes to its `main_grad`."""
    main_grad = getattr(weight, "main_grad", None)  # of a parameter under Megatron's DDP
    if not torch.is_grad_enabled():  # which needs_input_grad does not tell
        hidden, weight = hidden.detach(), weight.detach()
    return Head.apply(
        hidden, weight, value, open_targets, (shard, chunk_rows), row_weight, main_grad
    )
