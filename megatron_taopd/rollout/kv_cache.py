"""Attention of rows that enter and leave a batch while it is decoded.

All rows end in the same column, as if they were padded on the left, so a token is one slice:

    row 0    . . . a b c d e      `end` is the column of the next token, of every row
    row 1    . f g h i j k l      columns before `start`, the longest row's first, are not read
    row 2    . . . . . . m n      entered when row 0 was long under way

A pass of the model is over one sequence: a token of each row that is there, then the prompts that
enter, padded to one width. Attention alone knows about rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from megatron_taopd.rollout.engine import CACHE_ROOM

# B rows, P prompts that enter, W their padded width, T = B + P·W tokens of a pass,
# H heads, G heads of keys, D their width, C columns

ATTENTION = "columns"


class ColumnCache:
    """The keys and values of at most `capacity` rows; memory grows with the longest of them.

    It holds 2 · capacity · (longest row + CACHE_ROOM) · G · D elements per layer, and those of one
    layer twice while it is moved.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.rows = self.start = self.end = self.columns = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # of shape [capacity, G, columns, D]
        self._mask: Tensor | None = None
        self._entering: Tensor | None = None

    def begin(self, lengths: Tensor, prompts: Tensor | None, places: Tensor | None) -> None:
        """Begin a pass of the model.

        Args:
            lengths: [B] integers, the tokens here of each row that is there.
            prompts: [P, W] bool, false where a prompt is padded, which is on its left.
            places: [rows that enter] int64, the prompt of each; samples of a prompt share it.
        """
        width = 0 if prompts is None else prompts.shape[1]
        read = self.end - self.start
        if self.end == self.columns or self.end + 1 < width:
            self._move(max(read, width))
        columns = torch.arange(read, -1, -1, device=lengths.device)
        self._mask = (columns <= lengths[:, None])[:, None, None]
        self._entering = places
        if prompts is not None:
            causal = torch.ones(width, width, dtype=torch.bool, device=prompts.device).tril()
            # A padded token sees itself: an empty row of the softmax would not be a number.
            diagonal = torch.eye(width, dtype=torch.bool, device=prompts.device)
            self._prompt_mask = (causal & prompts[:, None] | diagonal)[:, None]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
    ) -> Tensor:
        """Return [1, T, H, D], what query, [1, H, T, D], sees in the rows and in key and value.

        Args:
            key, value: [1, G, T, D], which are added to the rows.
        """
        if layer not in self._layers:
            shape = self.capacity, key.shape[1], self.columns, key.shape[3]
            # Zeros, as a column that is masked must be finite.
            self._layers[layer] = key.new_zeros(shape), key.new_zeros(shape)
        stores, rows, out = self._layers[layer], self.rows, []
        if rows:
            for store, states in zip(stores, (key, value), strict=True):
                store[:rows, :, self.end] = states[0, :, :rows].transpose(0, 1)
            keys, values = (s[:rows, :, self.start : self.end + 1] for s in stores)
            # The heads that share keys are queries of one head, and keys need no copy for each.
            grouped = (
                query[0, :, :rows].transpose(0, 1).reshape(rows, key.shape[1], -1, key.shape[3])
            )
            seen = scaled_dot_product_attention(grouped, keys, values, self._mask, scale=scaling)
            out.append(seen.reshape(rows, query.shape[1], -1))
        if self._entering is not None:
            count, _, _, width = self._prompt_mask.shape
            query, key, value = (
                states[0, :, rows:].unflatten(1, (count, width)).transpose(0, 1)
                for states in (query, key, value)
            )
            entered = slice(rows, rows + len(self._entering))
            for store, states in zip(stores, (key, value), strict=True):
                store[entered, :, self.end + 1 - width : self.end + 1] = states[self._entering]
            groups = query.shape[1] // key.shape[1]
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
            seen = scaled_dot_product_attention(query, key, value, self._prompt_mask, scale=scaling)
            out.append(seen.transpose(1, 2).flatten(0, 1))
        return (out[0] if len(out) == 1 else torch.cat(out))[None]

    def finish(self) -> None:
        """End the pass: every layer has its tokens."""
        self.end += 1
        if self._entering is not None:
            self.rows += len(self._entering)
            self.start = min(self.start, self.end - self._prompt_mask.shape[3])

    def keep(self, rows: int, holes: Tensor, fillers: Tensor, longest: int) -> None:
        """Keep the first `rows` rows, once those at `fillers` have moved to `holes`.

        Args:
            longest: tokens that the longest of them has here.
        """
        if len(holes):
            for stores in self._layers.values():
                for store in stores:
                    read = store[:, :, self.start : self.end]
                    read[holes] = read[fillers]
        self.rows, self.start = rows, self.end - longest

    def _move(self, width: int) -> None:
        """Move what is read to new memory, where it ends before column `width`."""
        read, columns = self.end - self.start, width + CACHE_ROOM
        for layer, stores in self._layers.items():
            moved = []
            for store in stores:
                new = store.new_zeros(*store.shape[:2], columns, store.shape[3])
                old = store[: self.rows, :, self.start : self.end]
                new[: self.rows, :, width - read : width] = old
                moved.append(new)
            self._layers[layer] = moved[0], moved[1]
        self.start, self.end, self.columns = width - read, width, columns


def column_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    cache: ColumnCache | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend for a model of transformers that is called with the keyword `cache`."""
    assert cache is not None and attention_mask is None and sliding_window is None
    return cache.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(ATTENTION, column_attention)
