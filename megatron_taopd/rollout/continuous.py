"""A batch that rows enter and leave while it is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_taopd.parallel.copies import to_device
from megatron_taopd.rollout.draws import DrawTokens
from megatron_taopd.rollout.kv_cache import ColumnCache


@dataclass
class Row:
    """A response that is being generated.

    Attributes:
        key: of its noise.
        tokens, log_probs: what has been drawn so far.
    """

    prompt: Sequence[int]
    key: tuple[int, int]
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Count its tokens that the cache has: all but the last one."""
        return len(self.prompt) + len(self.tokens) - 1


class ContinuousBatch:
    """Rows of one model and their cache.

    Args:
        model: whose attention is `kv_cache.ATTENTION`.
        capacity: rows at once.

    Attributes:
        rows: that are not finished, as they lie in the cache.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, draw: DrawTokens):
        self.model, self.draw = model, draw
        self.rows: list[Row] = []
        self.cache = ColumnCache(capacity)
        # Of each row: its key, the position of the token to be drawn, the tokens in the cache.
        self._state = torch.empty(0, 4, dtype=torch.int64, device=model.device)
        self._last = torch.empty(0, dtype=torch.int64, device=model.device)

    def step(self, newcomers: list[Row], stop_ids: frozenset[int], longest: int) -> int:
        """Draw a token for every row, newcomers included; return how many of them are finished.

        Args:
            longest: tokens of a response.
        """
        logits = self._pass(newcomers)
        self._last, log_probs = self.draw(logits, self._state[:, :2], self._state[:, 2])
        self._state[:, 2] += 1
        # One copy to the host, which waits for it.
        drawn = torch.stack([self._last.int(), log_probs.view(torch.int32)]).cpu()
        self.rows = self.rows + newcomers
        going = []
        drawn = zip(drawn[0].tolist(), drawn[1].view(torch.float32).tolist(), strict=True)
        for place, (row, (token, log_prob)) in enumerate(zip(self.rows, drawn, strict=True)):
            row.tokens.append(token)
            row.log_probs.append(log_prob)
            if token not in stop_ids and len(row.tokens) < longest:
                going.append(place)
        finished = len(self.rows) - len(going)
        if finished:
            self._keep(going)
        return finished

    def _pass(self, newcomers: list[Row]) -> Tensor:
        """Return [B, V] float32 logits of each row's next token, newcomers last."""
        lengths = self._state[:, 3]
        ids, positions, rows = (
            self._last,
            lengths,
            torch.arange(len(lengths), device=lengths.device),
        )
        if not newcomers:
            self.cache.begin(lengths, None, None)
        else:
            prompts = list(dict.fromkeys(tuple(row.prompt) for row in newcomers))
            width = max(map(len, prompts))
            place = {prompt: i for i, prompt in enumerate(prompts)}
            padded = self._on_device([[0] * (width - len(p)) + list(p) for p in prompts])
            offsets = self._on_device([[len(p) - width] for p in prompts])
            places = self._on_device([place[tuple(row.prompt)] for row in newcomers])
            entering = self._on_device([[*row.key, 0, len(row.prompt)] for row in newcomers])
            counted = torch.arange(width, device=lengths.device) + offsets
            self.cache.begin(lengths, counted >= 0, places)
            rows = torch.cat([rows, len(rows) + (places + 1) * width - 1])
            ids = torch.cat([ids, padded.flatten()])
            positions = torch.cat([positions, counted.clamp(min=0).flatten()])
        logits = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=rows,
            cache=self.cache,
        ).logits[0]
        self.cache.finish()
        lengths += 1
        if newcomers:
            self._state = torch.cat([self._state, entering])
        return logits.float()

    def _keep(self, going: list[int]) -> None:
        """Let the other rows go; the last ones take the places that become free."""
        count = len(going)
        holes = sorted({*range(count)}.difference(going))
        fillers = going[count - len(holes) :]
        order = list(range(count))
        for hole, filler in zip(holes, fillers, strict=True):
            order[hole] = filler
        self.rows = [self.rows[place] for place in order]
        kept = self._on_device(order)
        self._state, self._last = self._state[kept], self._last[kept]
        longest = max((row.cached for row in self.rows), default=0)
        self.cache.keep(count, self._on_device(holes), self._on_device(fillers), longest)

    def _on_device(self, values: list) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.int64), self.model.device)
