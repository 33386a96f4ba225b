"""What the loop asks of whatever generates the responses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_taopd.types import RolloutBatch

# Columns that the in-process engine's cache has ahead of need: what is read moves once in so many.
CACHE_ROOM = 64


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        max_new_tokens: longest response, its stop token included.
        samples: responses per prompt.
        temperature: 0 is greedy.
        top_p, top_k: keep the smallest set of tokens with at least this mass, and this many tokens;
            1.0 and 0 keep all. Applied in the order temperature, top-k, top-p.
        stop_token_ids: end a response, besides the ids that the engine was given as ends.
    """

    max_new_tokens: int
    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Response:
    """A response, or what there is of it so far: n tokens.

    Attributes:
        tokens: [n] int32 ids.
        log_probs: [n] float32.
        versions: [n] int32, of the weights.
        finished: nothing comes after them.
        truncated: it was cut off at the longest length.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    versions: np.ndarray
    finished: bool = True
    truncated: bool = False

    def followed_by(self, rest: Response) -> Response:
        """Return this with the rest after it."""
        names = ("tokens", "log_probs", "versions")
        joined = [np.concatenate([getattr(self, name), getattr(rest, name)]) for name in names]
        return Response(*joined, rest.finished, rest.truncated)


NOTHING = Response(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int32), False)


class Pending(Protocol):
    """A batch that is being generated. Both methods are collective."""

    def parts(self) -> Iterator[tuple[Tensor, RolloutBatch]]:
        """Yield sequences as they finish, each of them once; the same on every rank.

        It has to be run to its end, once.

        Yields:
            (Their places in the batch, ascending; the sequences themselves.)
        """
        ...

    def result(self) -> RolloutBatch:
        """Return the whole batch, in (prompt, sample) order, the same on every rank, on the CPU.

        A stop token is the last token of its response, so its row is trained; a response without
        one is `truncated`.
        """
        ...


class RolloutEngine(Protocol):
    """Generates with the student's weights.

    Every method is collective: all ranks call it, with the same arguments, in the same order.

    Attributes:
        name: as `rollout.engine` calls it.
    """

    name: str

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_indices: Sequence[int],
        step: int,
        sampling: Sampling,
    ) -> Pending:
        """Begin to generate the responses to `prompts`.

        An engine with servers of its own returns at once, and generates while this process does
        other things. Weights may be updated meanwhile: what is not finished goes on with them.

        Args:
            prompts: token ids of each prompt.
            prompt_indices: the place of each prompt in the data, for the record and the randomness.
            step: of the run, for the randomness.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_indices: Sequence[int],
        step: int,
        sampling: Sampling,
    ) -> RolloutBatch:
        """Return the result of `submit`."""
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights by whole tensors under their Hugging Face names.

        Args:
            named_tensors: consumed one by one, so that they need not exist all at once.
            version: of the tokens generated from now on (`RolloutBatch.weight_versions`).

        Raises:
            ValueError: a name is unknown or missing, or a shape differs.
        """
        ...

    def offload(self) -> None:
        """Let an engine that shares the trainer's device give its memory back.

        Nothing is asked of it until the next weights are there.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Return what the log says of the generation since the last call; rank 0 writes it."""
        ...

    def close(self) -> None:
        """Release the engine's memory and processes. The engine cannot be used afterwards."""
        ...


def batch_of(
    prompts: Sequence[Sequence[int]], indices: Sequence[int], responses: Sequence[Response]
) -> RolloutBatch:
    """Call `make_rollout_batch` of N finished responses."""
    return make_rollout_batch(
        prompts,
        indices,
        [torch.from_numpy(r.tokens) for r in responses],
        [torch.from_numpy(r.log_probs) for r in responses],
        [r.truncated for r in responses],
        [torch.from_numpy(r.versions) for r in responses],
    )


def make_rollout_batch(
    prompts: Sequence[Sequence[int]],
    prompt_indices: Sequence[int],
    responses: Sequence[Tensor],
    log_probs: Sequence[Tensor],
    truncated: Sequence[bool],
    weight_versions: Sequence[Tensor],
    valid: Sequence[Tensor] | None = None,
) -> RolloutBatch:
    """Lay N sequences end to end.

    Args:
        prompts, prompt_indices: of each sequence (a prompt with n samples comes n times).
        responses: N tensors [n] of token ids.
        log_probs: N tensors [n], the log-probability of each of these tokens.
        weight_versions: N tensors [n], the weights that generated it.
        valid: N tensors [n] bool, the tokens that have rows; None: all.
    """
    pieces = [
        piece
        for prompt, response in zip(prompts, responses, strict=True)
        for piece in (torch.tensor(prompt, dtype=torch.int64), response.to("cpu", torch.int64))
    ]
    lengths = torch.tensor([0] + [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
    mask = None if valid is None else torch.cat([*valid])
    rows = slice(None) if mask is None else mask
    return RolloutBatch(
        tokens=torch.cat(pieces),
        cu_seqlens=lengths.cumsum(0),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
        log_probs=torch.cat([values.to("cpu", torch.float32) for values in log_probs])[rows],
        truncated=torch.tensor(truncated, dtype=torch.bool),
        prompts=torch.tensor(prompt_indices, dtype=torch.int64),
        weight_versions=torch.cat([versions.long() for versions in weight_versions])[rows],
        valid=mask,
    )
