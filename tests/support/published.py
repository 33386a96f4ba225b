"""The shapes of published models, as their config.json has them."""

from __future__ import annotations

from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig

QWEN3 = dict(
    vocab_size=151936,
    head_dim=128,
    num_key_value_heads=8,
    max_position_embeddings=40960,
    architectures=["Qwen3ForCausalLM"],
)
MODELS = {
    "Qwen3-1.7B": Qwen3Config(
        **QWEN3, hidden_size=2048, num_hidden_layers=28, num_attention_heads=16,
        intermediate_size=6144, tie_word_embeddings=True,
    ),
    "Qwen3-4B": Qwen3Config(
        **QWEN3, hidden_size=2560, num_hidden_layers=36, num_attention_heads=32,
        intermediate_size=9728, tie_word_embeddings=True,
    ),
    "Qwen3-8B": Qwen3Config(
        **QWEN3, hidden_size=4096, num_hidden_layers=36, num_attention_heads=32,
        intermediate_size=12288, tie_word_embeddings=False,
    ),
    "Qwen3-14B": Qwen3Config(
        **QWEN3, hidden_size=5120, num_hidden_layers=40, num_attention_heads=40,
        intermediate_size=17408, tie_word_embeddings=False,
    ),
    "Qwen3-32B": Qwen3Config(
        **QWEN3, hidden_size=5120, num_hidden_layers=64, num_attention_heads=64,
        intermediate_size=25600, tie_word_embeddings=False,
    ),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        **{**QWEN3, "num_key_value_heads": 4, "architectures": ["Qwen3MoeForCausalLM"]},
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, intermediate_size=6144,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, decoder_sparse_step=1,
        norm_topk_prob=True, tie_word_embeddings=False,
    ),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        **{**QWEN3, "num_key_value_heads": 4, "architectures": ["Qwen3MoeForCausalLM"]},
        hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, intermediate_size=12288,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536, decoder_sparse_step=1,
        norm_topk_prob=True, tie_word_embeddings=False,
    ),
    "Qwen2.5-3B": Qwen2Config(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, intermediate_size=11008, max_position_embeddings=32768,
        tie_word_embeddings=True, architectures=["Qwen2ForCausalLM"],
    ),
    "DeepSeek-R1-Distill-Qwen-14B": Qwen2Config(
        vocab_size=152064, hidden_size=5120, num_hidden_layers=48, num_attention_heads=40,
        num_key_value_heads=8, intermediate_size=13824, max_position_embeddings=131072,
        tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"],
    ),
}  # fmt: skip
# Parameters of each one's checkpoint.
BILLIONS = {
    "Qwen3-1.7B": 1.72,
    "Qwen3-4B": 4.02,
    "Qwen3-8B": 8.19,
    "Qwen3-14B": 14.77,
    "Qwen3-32B": 32.76,
    "Qwen3-30B-A3B": 30.53,
    "Qwen3-235B-A22B": 235.09,
    "Qwen2.5-3B": 3.09,
    "DeepSeek-R1-Distill-Qwen-14B": 14.77,
}
