"""A tiny random checkpoint of each family that is supported.

Where two families could have the same number, and it may be another in a real model, they have
different ones: what is read from no config would otherwise be right by luck.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SIZES = dict(
    vocab_size=200,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=256,
    initializer_range=0.2,
)
EXPERTS = dict(
    head_dim=16,
    tie_word_embeddings=False,
    num_experts=8,
    moe_intermediate_size=24,
)


def rope(theta: float, rope_type: str = "default", **scaling: float) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **scaling}}


CONFIGS = {
    "qwen2": Qwen2Config(**SIZES, **rope(1e6), rms_norm_eps=1e-6, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(
        **SIZES, **rope(1e4, "linear", factor=4.0), rms_norm_eps=1e-3, tie_word_embeddings=True
    ),
    "qwen3": Qwen3Config(
        **SIZES, **rope(5e3), head_dim=16, rms_norm_eps=3e-3, tie_word_embeddings=True
    ),
    "llama": LlamaConfig(
        **SIZES,
        **rope(
            5e5,
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, **EXPERTS, **rope(1e3), num_experts_per_tok=2, norm_topk_prob=True
    ),
    "qwen3_moe-unnormalised": Qwen3MoeConfig(
        **SIZES, **EXPERTS, **rope(1e7), num_experts_per_tok=3, norm_topk_prob=False
    ),
}


def save_random(
    config: PretrainedConfig, directory: str | Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write a checkpoint of random weights; norms and biases too are made non-trivial."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
