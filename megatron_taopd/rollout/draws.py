"""How tokens are drawn: with noise that depends on the sample and the place alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_taopd.rollout.engine import Sampling


class DrawTokens:
    """Draws the next token of every row.

    argmax(log p + Gumbel noise) is a sample of p. Warping (temperature, top-k, top-p) comes before
    the noise; the log-probabilities are of the full distribution at temperature 1.

    Args:
        vocab_size: tokens with this id or above are never drawn and take no probability.
    """

    def __init__(self, sampling: Sampling, vocab_size: int | None = None):
        self.vocab_size = vocab_size
        self.greedy = sampling.greedy
        self.warp = LogitsProcessorList()
        if sampling.temperature not in (0, 1):
            self.warp.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            self.warp.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warp.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, logits: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Draw from the next token's logits.

        Args:
            logits: [B, V] float32; changed in place.
            keys: [B, 2] integers of 32 bits, `noise_key` of each sequence.
            positions: [B] integers, of the token within its response.

        Returns:
            ([B] int64 tokens, [B] float32 log-probabilities).
        """
        if self.vocab_size is not None:
            logits[:, self.vocab_size :] = -torch.inf
        scores = logits
        if not self.greedy:
            scores = self.warp(None, logits) + gumbel_noise(keys, positions, logits.shape[1])
        tokens = scores.argmax(dim=1)
        chosen = logits.gather(1, tokens[:, None]).squeeze(1)
        return tokens, chosen - logits.logsumexp(dim=1)


def noise_key(seed: int, step: int, prompt: int, sample: int) -> tuple[int, int]:
    """Return 64 well-mixed bits as two signed 32-bit integers."""
    digest = hashlib.blake2b(f"{seed}/{step}/{prompt}/{sample}".encode(), digest_size=8).digest()
    return (
        int.from_bytes(digest[:4], "little", signed=True),
        int.from_bytes(digest[4:], "little", signed=True),
    )


def gumbel_noise(keys: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Draw standard Gumbel noise for a position of each of B sequences, whatever batch and device.

    The generator is counter-based, without state: the bits are a hash of (key, position, token).

    Args:
        keys: [B, 2] integers of 32 bits, one pair per sequence.
        positions: [B] integers, of the token within its response.

    Returns:
        [B, V] float32, at most 22.9: 32 random bits, with the fine end of their range at the large
        values. (24-bit uniforms reach 0, that is infinite noise, once in 17 million draws: at
        V = 150k a few positions per response would be drawn at random.)
    """
    keys = _mix(keys.int() + _mix(positions.to(torch.int32, copy=True))[:, None])
    token = torch.arange(vocab_size, dtype=torch.int32, device=keys.device)
    noise = torch.empty(len(keys), vocab_size, device=keys.device)
    # Some thirty passes over each block: on a CPU it should stay in cache, on a GPU fill it.
    block_size = 2**17 if keys.device.type == "cpu" else 2**26
    rows = max(1, block_size // vocab_size)
    for key, block in zip(keys.split(rows), noise.split(rows), strict=True):
        bits = _mix(_mix(token ^ key[:, :1]).add_(key[:, 1:])).double()
        block.copy_(bits.add_(2**31 + 0.5).mul_(2.0**-32))
        block.neg_().log1p_().neg_().log_().neg_()
    return noise


def _mix(bits: Tensor) -> Tensor:
    """Apply MurmurHash3's finaliser, a bijection of 32-bit integers, with wrapping products.

    Args:
        bits: of any shape; overwritten, which takes half the time of new tensors.
    """
    for shift, factor in (16, -0x7A143595), (13, -0x3D4D51CB), (16, 1):
        bits ^= (bits >> shift).bitwise_and_(2 ** (32 - shift) - 1)
        bits *= factor
    return bits
