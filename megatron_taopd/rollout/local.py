"""The in-process engine: a transformers copy of the student on every rank.

It needs no server and no GPU, and its samples are reproducible: the noise behind each one is a
function of (seed, step, prompt, sample) alone, whatever the batch, the rank or the world size.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_taopd.data.vocab_map import end_ids
from megatron_taopd.formats.hf import load_model
from megatron_taopd.parallel import progress, watchdog
from megatron_taopd.rollout.engine import Sampling, make_rollout_batch
from megatron_taopd.types import RolloutBatch


class LocalEngine:
    """A `RolloutEngine` over transformers' batched `generate` with its KV cache.

    The (prompt, sample) pairs are dealt over all ranks by prompt length, and the responses
    exchanged, so every rank returns the whole batch.

    Args:
        model: a causal language model, on the device it shall run on; taken over by the engine.
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
        # generate() takes what its caller leaves open (a repetition penalty, say) from here.
        model.generation_config = GenerationConfig()

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
        comes twice gets different ones. Batching moves logits by rounding only; a token can differ
        between batch sizes where two noisy logits agree to that.

        Collective: one all-gather of (8 max_new_tokens + 4) bytes per sequence.
        """
        prompts = [prompt for prompt in prompts for _ in range(sampling.samples)]
        prompt_indices = [index for index in prompt_indices for _ in range(sampling.samples)]
        keys, seen = [], Counter()
        for index in prompt_indices:
            keys.append(noise_key(self.seed, step, index, seen[index]))
            seen[index] += 1

        # Dealt by length, every rank gets an equal share, and its batches hold little padding.
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        mine = by_length[self.rank :: self.world_size]
        stop_ids = self.eos_token_ids.union(sampling.stop_token_ids)
        stops = torch.tensor(sorted(stop_ids), dtype=torch.int64)
        width = sampling.max_new_tokens
        share = -(-len(prompts) // self.world_size)
        # Columns: token ids | log-probabilities, by their bits | length.
        payload = torch.zeros(share, 2 * width + 1, dtype=torch.int32)
        starts = range(0, len(mine), self.batch_size)
        for start in progress.track(starts, None, "batches of responses"):
            batch = mine[start : start + self.batch_size]
            tokens, log_probs = self._generate_batch(
                [prompts[i] for i in batch], [keys[i] for i in batch], stops, sampling
            )
            rows = payload[start : start + len(batch)]
            rows[:, : tokens.shape[1]] = tokens
            rows[:, width : width + tokens.shape[1]] = log_probs.view(torch.int32)
            rows[:, -1] = _lengths(tokens, stops)

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

    def _generate_batch(
        self, prompts: list, keys: list[tuple[int, int]], stops: Tensor, sampling: Sampling
    ) -> tuple[Tensor, Tensor]:
        """Return [B, W] int64 tokens and [B, W] float32 log-probabilities, on the CPU.

        What comes after a sequence's stop token means nothing.
        """
        device = self.model.device
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(p)) + list(p) for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        draw = DrawTokens(torch.tensor(keys, device=device), sampling, self.vocab_size)
        tokens = self.model.generate(
            torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,
                eos_token_id=stops.tolist() or None,
                pad_token_id=0,
            ),
            logits_processor=LogitsProcessorList([draw]),
        )
        return tokens[:, longest:].cpu(), torch.stack(draw.log_probs, dim=1).cpu()

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
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
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


class Generated:
    """A `Pending` batch that is there already."""

    def __init__(self, batch: RolloutBatch):
        self.batch = batch

    def parts(self) -> Iterator[tuple[Tensor, RolloutBatch]]:
        yield torch.arange(self.batch.num_sequences), self.batch

    def result(self) -> RolloutBatch:
        return self.batch


def _lengths(tokens: Tensor, stops: Tensor) -> Tensor:
    """Count the tokens of each row up to and including its first stop token: [B] int64."""
    is_stop = torch.isin(tokens, stops)
    first = is_stop.int().argmax(dim=1) + 1
    return torch.where(is_stop.any(dim=1), first, tokens.shape[1])


class DrawTokens(LogitsProcessor):
    """Makes generate's argmax a draw, and records the log-probability of what it drew.

    argmax(log p + Gumbel noise) is a sample of p. Warping (temperature, top-k, top-p) comes before
    the noise; the recorded log-probabilities are of the full distribution at temperature 1.

    Args:
        keys: [B, 2] int64, `noise_key` of each sequence.
    """

    def __init__(self, keys: Tensor, sampling: Sampling, vocab_size: int | None = None):
        self.keys = keys
        self.vocab_size = vocab_size
        self.greedy = sampling.greedy
        self.log_probs: list[Tensor] = []
        self.warp = LogitsProcessorList()
        if sampling.temperature not in (0, 1):
            self.warp.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            self.warp.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warp.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Turn the next token's logits, [B, V] float32, into [B, V] scores; their argmax is drawn.

        The log-probabilities of the tokens that are drawn, [B], are appended to `log_probs`.
        """
        watchdog.heartbeat()
        if self.vocab_size is not None:
            logits[:, self.vocab_size :] = -torch.inf
        scores = logits
        if not self.greedy:
            noise = gumbel_noise(self.keys, len(self.log_probs), logits.shape[1])
            scores = self.warp(input_ids, logits) + noise
        chosen = logits.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
        self.log_probs.append(chosen - logits.logsumexp(dim=1))
        return scores


def noise_key(seed: int, step: int, prompt: int, sample: int) -> tuple[int, int]:
    """Return 64 well-mixed bits as two signed 32-bit integers."""
    digest = hashlib.blake2b(f"{seed}/{step}/{prompt}/{sample}".encode(), digest_size=8).digest()
    return (
        int.from_bytes(digest[:4], "little", signed=True),
        int.from_bytes(digest[4:], "little", signed=True),
    )


def gumbel_noise(keys: Tensor, position: int, vocab_size: int) -> Tensor:
    """Draw standard Gumbel noise for one position of B sequences, whatever batch and device.

    The generator is counter-based, without state: the bits are a hash of (key, position, token).

    Args:
        keys: [B, 2] integers of 32 bits, one pair per sequence.
        position: of the token within its response.

    Returns:
        [B, V] float32, at most 22.9: 32 random bits, with the fine end of their range at the large
        values. (24-bit uniforms reach 0, that is infinite noise, once in 17 million draws: at
        V = 150k a few positions per response would be drawn at random.)
    """
    keys = _mix(keys.int() + _mix(torch.tensor(position, dtype=torch.int32, device=keys.device)))
    token = torch.arange(vocab_size, dtype=torch.int32, device=keys.device)
    noise = torch.empty(len(keys), vocab_size, device=keys.device)
    # Some thirty passes over each block: on a CPU it should stay in cache, on a GPU fill it.
    block_size = 2**18 if keys.device.type == "cpu" else 2**26
    rows = max(1, block_size // vocab_size)
    for key, block in zip(keys.split(rows), noise.split(rows), strict=True):
        bits = _mix(_mix(token ^ key[:, :1]) + key[:, 1:])
        block.copy_((bits.double() + (2**31 + 0.5)) * 2.0**-32)
        block.neg_().log1p_().neg_().log_().neg_()
    return noise


def _mix(bits: Tensor) -> Tensor:
    """Apply MurmurHash3's finaliser, a bijection of 32-bit integers, with wrapping products."""
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits = bits * -0x7A143595
    bits = bits ^ ((bits >> 13) & 0x7FFFF)
    bits = bits * -0x3D4D51CB
    return bits ^ ((bits >> 16) & 0xFFFF)
