"""Whether a server computes with the weights that it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

from megatron_taopd.parallel.objects import on_rank_0
from megatron_taopd.rollout.weight_sync.sequence import Client, Post, Replica
from megatron_taopd.serving.protocol import all_of

SEQUENCES, TOKENS = 4, 48  # of the run's prompts


class Probe:
    """Compares each server that was given weights with the trainer, on the same few tokens.

    Args:
        log_probs: the trainer's of every token but the first of each sequence, concatenated;
            collective, the same on every rank.
        max_gap: see `check_probe`.
        prompts: of the run, whose first tokens are asked about from its first sync on.
    """

    def __init__(
        self,
        log_probs: Callable[[Sequence[Sequence[int]]], Tensor],
        max_gap: float,
        prompts: Iterable[Sequence[int]],
    ):
        self.log_probs, self.max_gap = log_probs, max_gap
        long_enough = (list(ids[:TOKENS]) for ids in prompts if len(ids) > 1)
        self.sequences = list(islice(long_enough, SEQUENCES))
        # By url, what a server and the trainer answered after the server's last weights.
        self.answers: dict[str, tuple[Tensor, Tensor]] = {}

    def check(self, client: Client | None, targets: Sequence[Replica] | None) -> None:
        """Ask the servers that were just given the trainer's weights. Every rank calls this.

        Raises:
            RuntimeError: see `check_probe`; on every rank.
        """
        if not self.sequences:
            return
        trainer = self.log_probs(self.sequences)

        def work() -> None:
            asking = all_of(probe_replica(client.post, r, self.sequences) for r in targets)
            for replica, engine in zip(targets, client.spawn(asking).result(), strict=True):
                before = self.answers.get(replica.url, (None, None))
                check_probe(replica.url, engine, trainer, *before, self.max_gap)
                self.answers[replica.url] = engine, trainer

        on_rank_0(work)


async def probe_replica(
    post: Post, replica: Replica, sequences: Sequence[Sequence[int]], timeout_s: float = 120
) -> Tensor:
    """[Σ(n−1)] float32, the server's log-probability of every token but the first.

    Sequence by sequence: in one batch with others, rounding would differ from call to call. No
    prefix cache is used: with a `logprob_start_len` of 0 SGLang computes the whole prompt.
    """
    values = []
    for tokens in sequences:
        request = {
            "input_ids": list(tokens),
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = await post(replica, "/generate", request, timeout_s)
        values += [value for value, *_ in answer["meta_info"]["input_token_logprobs"][1:]]
    return torch.tensor(values, dtype=torch.float32)


def check_probe(
    url: str,
    engine: Tensor,
    trainer: Tensor,
    engine_before: Tensor | None,
    trainer_before: Tensor | None,
    max_gap: float,
) -> None:
    """Whether a server has the weights that it was given.

    Args:
        engine, trainer: log-probabilities of the same tokens after the push.
        engine_before, trainer_before: before it; None if that is not known.
        max_gap: mean |Δ| between engine and trainer that rounding explains.

    Raises:
        RuntimeError: the mean |Δ| is larger. Or the server answers as before (to 1 % of the
            trainer's move), although the trainer has moved: somewhere by more than 1e-6, and than
            the two lay apart before, since smaller steps can vanish in a bf16 engine's rounding.
    """
    gap = (engine - trainer).abs()
    mean = float(gap.mean())
    figures = f"mean |Δ log p| {mean:.3g}, max {float(gap.max()):.3g} between engine and trainer"
    if not mean <= max_gap:  # NaN is not
        raise RuntimeError(f"{url}: {figures} after a weight update; max_gap is {max_gap:g}")
    if engine_before is None or trainer_before is None:
        return
    moved = float((trainer - trainer_before).abs().max())
    engine_moved = float((engine - engine_before).abs().max())
    apart = float((engine_before - trainer_before).abs().mean())
    if moved > max(1e-6, apart) and engine_moved <= 0.01 * moved:
        raise RuntimeError(
            f"{url}: the weight update had no effect: answers moved by {engine_moved:.3g} at most, "
            f"the trainer's by {moved:.3g} ({figures})"
        )
