"""Keys of a config.json that the trunk does not compute with, and the values that turn them off.

`gpt.Trunk` computes with a model's sizes, its norms' epsilon, RoPE of four types, tied embeddings
and top-K experts. Each other key that means something, to transformers' code of a family or to an
engine that loads the same directory, is refused unless it is off. tests/test_hf_keys.py derives
what transformers reads from its source, so that a new version shows its new keys there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from transformers import PretrainedConfig

ROPE_TYPES = {  # and the numbers that each is made of, besides rope_theta
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")  # if they like

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")

# The values, besides null, at which a key does nothing.
_OFF: dict[str, tuple] = {
    # Read by transformers' code of these families, or of their masks and caches.
    "attention_bias": (False,),
    "attention_chunk_size": (),
    "attention_dropout": (0,),
    "hidden_act": ("silu",),
    "is_causal": (True,),
    "mlp_bias": (False,),
    "num_kv_shared_layers": (0,),
    # Read by SGLang's.
    "bias": (False,),
    "dual_chunk_attention_config": (),
    "enable_lm_head_fp32": (False,),
    "final_logit_softcapping": (),
    "global_head_dim": (),
    "hybrid_layer_pattern": (),
    "is_hybrid_swa": (False,),
    "num_global_key_value_heads": (),
    "num_nextn_predict_layers": (0,),
    "original_num_attention_heads": (),
    "rope_is_neox_style": (True,),
    "scale_emb": (1,),
    "shared_expert_intermediate_size": (0,),
    "sparse_attention_config": (),
    "target_hidden_size": (),
    "use_bidirectional_attention": (False,),
    "v_head_dim": (),
    # What neighbours of these families have, under the names that exports of them keep.
    "add_cross_attention": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "first_k_dense_replace": (0,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "moe_layer_freq": (1,),
    "n_group": (1,),
    "n_routed_experts": (),
    "n_shared_experts": (0,),
    "no_rope_layers": ([],),
    "num_shared_experts": (0,),
    "partial_rotary_factor": (1,),
    "pruned_heads": ({},),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rotary_pct": (1,),
    "routed_scaling_factor": (1,),
    "scale_depth": (),
    "scoring_func": ("softmax",),
    "topk_group": (1,),
    "topk_method": ("greedy",),
    "transformers_weights": (),  # names other files than those that are read
    "use_rope": (True,),
    "vision_config": (),
}


def unsupported(config: PretrainedConfig) -> Iterator[str]:
    """Return what the trunk does not compute of this config: sentences with key and value.

    Args:
        config: of a family in `hf_map.FAMILIES`.
    """
    yield from _sizes(config)
    yield from _rope(config.rope_parameters or {})
    yield from _attention(config)
    if config.model_type == "qwen3_moe":
        yield from _experts(config)
    by_family = {
        "qkv_bias": (config.model_type == "qwen2",),
        **dict.fromkeys(
            ("use_qk_norm", "qk_norm", "qk_layernorm"), (config.model_type.startswith("qwen3"),)
        ),
    }
    for key, values in (_OFF | by_family).items():
        if (value := getattr(config, key, None)) is not None and value not in values:
            yield f"{key} {_written(value)} (only {_choices(values)}) is not supported"
    for key in ("quantization_config", "compression_config"):
        if getattr(config, key, None):
            yield f"{key}: a checkpoint of quantised weights is not supported; give the original"
    remote = [name for name in getattr(config, "auto_map", None) or {} if name != "AutoTokenizer"]
    if remote:
        yield f"auto_map with code of the model's own ({_written(remote)}) is not supported"


def _sizes(config: PretrainedConfig) -> Iterator[str]:
    sizes = _SIZES + (_EXPERT_SIZES if config.model_type == "qwen3_moe" else ())
    for key in sizes:
        value = getattr(config, key, None)
        if not isinstance(value, int) or value < 1:
            yield f"{key} {_written(value)} (only whole numbers above 0) is not supported"
            return  # the others are compared with it
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        yield (
            f"num_attention_heads {heads} with num_key_value_heads {groups}, which does not divide "
            "it, is not supported"
        )
    width = getattr(config, "head_dim", None)
    if width is None:
        width = config.hidden_size // heads
    if not isinstance(width, int) or width < 2 or width % 2:
        yield f"head_dim {_written(width)} (only even numbers) is not supported"
    if not config.rms_norm_eps > 0:
        yield f"rms_norm_eps {config.rms_norm_eps} (only numbers above 0) is not supported"


def _rope(rope: dict) -> Iterator[str]:
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        yield f"rope_type {kind} (only {', '.join(ROPE_TYPES)}) is not supported"
        return
    if (other := rope.get("type", kind)) != kind:
        yield f"rope_type {kind} with type {other} contradict each other, which is not supported"
    if (share := rope.get("partial_rotary_factor", 1)) not in (1, None):
        yield f"partial_rotary_factor {share} (only 1) is not supported"
    numbers = ["rope_theta", *ROPE_TYPES[kind]]
    given: tuple[str, ...] = ()
    if kind == "yarn":
        given = tuple(key for key in _YARN if rope.get(key) is not None)
        if not isinstance(rope.get("truncate", True), bool):
            yield (
                f"truncate {_written(rope['truncate'])} of rope_parameters (only true or false) is "
                "not supported"
            )
    for key in (*numbers, *given):
        value = rope.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            written = f"{key} {_written(value)} of rope_parameters"
            yield f"{written} (only numbers above 0) is not supported"
            return
    if kind == "llama3" and not rope["high_freq_factor"] > rope["low_freq_factor"]:
        yield (
            f"high_freq_factor {rope['high_freq_factor']} of rope_parameters (only above "
            f"low_freq_factor {rope['low_freq_factor']}) is not supported"
        )
    if kind == "yarn" and not (rope.get("beta_fast") or 32) > (rope.get("beta_slow") or 1):
        yield (
            f"beta_fast {_written(rope.get('beta_fast'))} of rope_parameters (only above "
            f"beta_slow {_written(rope.get('beta_slow'))}) is not supported"
        )
    known = {*numbers, *given, "rope_type", "type", "partial_rotary_factor"}
    known |= {"truncate"} if kind == "yarn" else set()
    for key, value in rope.items():
        if key not in known and value is not None:
            written = f"{key} {_written(value)} in rope_parameters of rope_type {kind}"
            yield f"{written} (only {', '.join(numbers)}) is not supported"


def _attention(config: PretrainedConfig) -> Iterator[str]:
    """Windows: of Qwen2 and Qwen3 by layer, of the others wherever there is one."""
    types = getattr(config, "layer_types", None) or ()
    window = getattr(config, "sliding_window", None)
    everywhere = config.model_type not in ("qwen2", "qwen3") and window is not None
    if everywhere or "sliding_attention" in types:
        yield (
            f"sliding-window attention (window {window}) is not supported; use_sliding_window has "
            "to be false, or sliding_window null"
        )
    for kind in sorted({*types} - {"sliding_attention", "full_attention"}):
        yield f"layer_types with {kind} (only full_attention) is not supported"


def _experts(config: PretrainedConfig) -> Iterator[str]:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        yield (
            f"a mixture of dense and expert layers (mlp_only_layers {config.mlp_only_layers}, "
            f"decoder_sparse_step {config.decoder_sparse_step}) is not supported"
        )
    chosen, experts = config.num_experts_per_tok, config.num_experts
    if chosen > experts:
        yield f"num_experts_per_tok {chosen} (only up to num_experts {experts}) is not supported"
    if chosen == 1 and config.norm_topk_prob:
        yield "num_experts_per_tok 1 with norm_topk_prob true, a weight of 1, is not supported"


def _choices(values: tuple) -> str:
    return " or ".join(map(_written, values)) if values else "null"


def _written(value) -> str:
    """Return a value as config.json has it, on one line."""
    written = value if isinstance(value, str) else json.dumps(value, default=str)
    return written if len(written) <= 60 else written[:57] + "…"
