"""The in-process engine: a transformers copy of the student on every rank.

It needs no server and no GPU, and its samples are reproducible: the noise behind each one is a
function of (seed, step, prompt, sample) alone, whatever the batch, the rank or the world size.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from megatron_taopd.data.vocab_map import end_ids
from megatron_taopd.formats.hf import load_model
from megatron_taopd.parallel import progress, watchdog
from megatron_taopd.rollout.continuous import ContinuousBatch, Row
from megatron_taopd.rollout.draws import DrawTokens, noise_key
from megatron_taopd.rollout.engine import Sampling, make_rollout_batch
from megatron_taopd.rollout.kv_cache import ATTENTION
from megatron_taopd.types import RolloutBatch


class LocalEngine:
    """A `RolloutEngine` over a model of transformers, with continuous batches.

    The (prompt, sample) pairs are dealt over all ranks by prompt length, and the responses
    exchanged, so every rank returns the whole batch.

    Args:
        model: a causal language model, on the device it shall run on; taken over by the engine,
            which replaces its attention.
        batch_size: sequences generated at once on a rank.
        seed: of all sampling.
        rank, world_size, group: who shares the work; `group` None is the default process group.
        vocab_size: tokens with this id or above are never drawn and take no probability (where the
            model has more columns than tokens, or than the teacher).
        eos_token_ids: end a response; None: those that the model's configurations name.
    """

    name = "local"

    def __init__(
        self,
        model: PreTrainedModel,
        batch_size: int = 64,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | None = None,
        vocab_size: int | None = None,
        eos_token_ids: Iterable[int] | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world_size, self.group = rank, world_size, group
        self.vocab_size = vocab_size
        self.version = 0
        self.tokens, self.seconds = 0, 0.0  # of generation, since they were last asked for
        if eos_token_ids is None:
            eos_token_ids = end_ids(model.generation_config, model.config)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.model.set_attn_implementation(ATTENTION)

    @classmethod
    def from_hf(cls, path: str | Path, dtype: torch.dtype, device: torch.device | str, **kwargs):
        """Load a Hugging Face checkpoint directory; `kwargs` as for the class."""
        return cls(load_model(path, dtype).to(device), **kwargs)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_indices: Sequence[int],
        step: int,
        sampling: Sampling,
    ) -> RolloutBatch:
        """See `RolloutEngine.generate`.

        Samples of a prompt are numbered over its repeats within the step, so that a prompt that
        comes twice gets different ones. Who else is in the batch moves logits by rounding only; a
        token can differ where two noisy logits agree to that.

        Collective: one all-gather of (8 max_new_tokens + 4) bytes per sequence.
        """
        prompts = [prompt for prompt in prompts for _ in range(sampling.samples)]
        prompt_indices = [index for index in prompt_indices for _ in range(sampling.samples)]
        keys, seen = [], Counter()
        for index in prompt_indices:
            keys.append(noise_key(self.seed, step, index, seen[index]))
            seen[index] += 1

        # Dealt by length, every rank gets an equal share, and what enters together is alike.
        by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        mine = [Row(prompts[i], keys[i]) for i in by_length[self.rank :: self.world_size]]
        stop_ids = self.eos_token_ids.union(sampling.stop_token_ids)
        with progress.phase("responses", len(mine)) as shown:
            for finished in self._decode(mine, stop_ids, sampling):
                watchdog.heartbeat()
                shown.advance(finished)

        # Columns: token ids | log-probabilities, by their bits | length.
        width, share = sampling.max_new_tokens, -(-len(prompts) // self.world_size)
        payload = torch.zeros(share, 2 * width + 1, dtype=torch.int32)
        for values, row in zip(payload, mine, strict=False):
            length = len(row.tokens)
            values[:length] = torch.tensor(row.tokens)
            values[width : width + length] = torch.tensor(row.log_probs).view(torch.int32)
            values[-1] = length
        payload = self._all_gather(payload)[: len(prompts)]
        payload = payload[torch.tensor(by_length).argsort()]
        responses = [row[: row[-1]] for row in payload]
        log_probs = [row[width : width + row[-1]].view(torch.float32) for row in payload]
        truncated = [response[-1].item() not in stop_ids for response in responses]
        versions = [torch.full_like(response, self.version) for response in responses]
        return make_rollout_batch(
            prompts, prompt_indices, responses, log_probs, truncated, versions
        )

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_indices: Sequence[int],
        step: int,
        sampling: Sampling,
    ) -> Generated:
        """See `RolloutEngine.submit`; here the whole batch is generated before it returns."""
        started = time.perf_counter()
        batch = self.generate(prompts, prompt_indices, step, sampling)
        self.tokens += batch.num_rows
        self.seconds += time.perf_counter() - started
        return Generated(batch)

    def metrics(self) -> dict[str, float]:
        """See `RolloutEngine.metrics`; evaluations do not count."""
        if not self.tokens:
            return {}
        figures = {"rollout/tokens_per_second": self.tokens / self.seconds}
        self.tokens, self.seconds = 0, 0.0
        return figures

    @torch.no_grad()
    def _decode(
        self, queue: list[Row], stop_ids: frozenset[int], sampling: Sampling
    ) -> Iterator[int]:
        """Fill in the rows' responses, `batch_size` at a time; yield how many a token finished."""
        waiting = deque(queue)
        slots = min(self.batch_size, len(queue))
        batch = ContinuousBatch(self.model, slots, DrawTokens(sampling, self.vocab_size))
        while waiting or batch.rows:
            free = min(slots - len(batch.rows), len(waiting))
            newcomers = [waiting.popleft() for _ in range(free)]
            yield batch.step(newcomers, stop_ids, sampling.max_new_tokens)

    def _all_gather(self, share: Tensor) -> Tensor:
        """Return the rows of all ranks, in the order in which they were dealt."""
        if self.world_size == 1:
            return share
        share = share.to(self.model.device)
        ranks = share.new_empty(self.world_size * share.shape[0], share.shape[1])
        dist.all_gather_into_tensor(ranks, share, group=self.group)
        return ranks.view(self.world_size, *share.shape).transpose(0, 1).flatten(0, 1).cpu()

    @torch.no_grad()
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `RolloutEngine.update_weights`. Either name of a tied weight, or both, will do."""
        parameters = dict(checkpoint_parameters(self.model))
        updated = set()
        for name, tensor in named_tensors:
            if name not in parameters:
                raise ValueError(f"{name}: the rollout engine's model has no such weight")
            parameter = parameters[name]
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{name}: shape {list(tensor.shape)}; the rollout engine's model has "
                    f"{list(parameter.shape)}"
                )
            parameter.copy_(tensor)
            updated.add(parameter)
        missing = [name for name, parameter in parameters.items() if parameter not in updated]
        if missing:
            raise ValueError(
                f"{missing[0]}: missing from the weight update, with {len(missing) - 1} others"
            )
        self.version = version

    def offload(self) -> None:
        pass

    def close(self) -> None:
        del self.model


def checkpoint_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's parameters under the names that checkpoints have.

    transformers holds the experts of a layer in two parameters, [E, 2 I, D] and [E, D, I]; a
    checkpoint has gate, up and down projections of each expert. Tied weights come under each name.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        prefix, experts, projection = name.partition("mlp.experts.")
        if not experts:
            yield name, parameter
            continue
        names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
        for expert, weight in enumerate(parameter):
            for part, piece in zip(names, weight.chunk(len(names)), strict=True):
                yield f"{prefix}{experts}{expert}.{part}.weight", piece


class Generated:
    """A `Pending` batch that is there already."""

    def __init__(self, batch: RolloutBatch):
        self.batch = batch

    def parts(self) -> Iterator[tuple[Tensor, RolloutBatch]]:
        yield torch.arange(self.batch.num_sequences), self.batch

    def result(self) -> RolloutBatch:
        return self.batch
