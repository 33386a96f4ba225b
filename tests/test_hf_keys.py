"""Keys of config.json: computed with, without effect, or refused; none that nobody looked at."""

from __future__ import annotations

import ast
import json
from math import log
from pathlib import Path

import pytest
import torch
import transformers
from support.families import CONFIGS, save_random
from support.ranks import run_ranks
from test_models import trunk_on_ranks
from transformers import AutoModelForCausalLM

from megatron_taopd.formats.convert import read_config
from megatron_taopd.formats.hf import tensor_shapes
from megatron_taopd.formats.hf_map import longest_sequence
from megatron_taopd.models import gpt

# What transformers 5.12 reads of a config where it computes logits with these families.
COMPUTED_WITH = {  # by the trunk, too
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "vocab_size",
}
WITHOUT_EFFECT = {  # on logits of given weights
    "_attn_implementation",
    "initializer_range",
    "output_router_logits",
    "pad_token_id",
    "router_aux_loss_coef",
}
REFUSED = {  # at this value
    "attention_bias": True,
    "attention_chunk_size": 8,
    "attention_dropout": 0.1,
    "decoder_sparse_step": 2,
    "hidden_act": "gelu",
    "is_causal": False,
    "layer_types": ["sliding_attention"] * 4,
    "mlp_bias": True,
    "mlp_only_layers": [0],
    "num_kv_shared_layers": 2,
    "sliding_window": 4,
}
NOT_KEYS = {"get_text_config", "standardize_rope_params", "validate_rope", "head_dim_key"}
READERS = [
    *(f"models/{name}/modeling_{name}.py" for name in ("llama", "qwen2", "qwen3", "qwen3_moe")),
    "masking_utils.py",
    "cache_utils.py",
    "modeling_rope_utils.py",
]


def keys_read(source: str) -> set[str]:
    """Attributes of anything called a config, and names given to getattr and hasattr of one."""

    def is_config(node) -> bool:
        named = isinstance(node, ast.Name) and node.id.endswith("config")
        return named or (isinstance(node, ast.Attribute) and node.attr.endswith("config"))

    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            found.add(node.attr)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr", "setattr")
            and is_config(node.args[0])
        ):
            name = node.args[1]
            found.add(name.value if isinstance(name, ast.Constant) else ast.unparse(name))
    return found


def test_the_derivation_sees_each_way_to_read_a_key():
    source = """
def f(config, self, model):
    a = config.plain + self.config.own + getattr(config, "maybe", None)
    if hasattr(self.text_config, "there"):
        return getattr(self.config, named), config.method().x
"""
    assert keys_read(source) == {"plain", "own", "maybe", "there", "named", "method"}


@pytest.mark.parametrize("file", READERS)
def test_every_key_that_transformers_reads_has_been_looked_at(file):
    """A new one comes with a new transformers: compute with it, or refuse it in formats/hf_keys."""
    read = keys_read((Path(transformers.__file__).parent / file).read_text())
    assert read - NOT_KEYS - COMPUTED_WITH - WITHOUT_EFFECT - REFUSED.keys() == set()


def directory_of(family: str, path: Path, **changes) -> str:
    """A tiny random model whose config.json has these keys, as a user's has."""
    save_random(CONFIGS[family], path)
    config = json.loads((path / "config.json").read_text()) | changes
    if "num_experts" in changes:  # which transformers writes as
        config.pop("num_local_experts", None)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


# ----------------------------------------------------------------------------------------- refused

ELSEWHERE = {  # keys that transformers passes over, and engines or other families do not
    "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
    "compression_config": {"format": "int-quantized"},
    "dual_chunk_attention_config": {"chunk_size": 262144},
    "embedding_multiplier": 12.0,
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.0625,
    "logits_scaling": 8.0,
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "quantization_config": {"quant_method": "fp8"},
    "residual_multiplier": 0.22,
    "rope_interleaved": True,
    "rope_is_neox_style": False,
    "shared_expert_intermediate_size": 64,
    "transformers_weights": "adapter_model.safetensors",
    "use_bidirectional_attention": True,
}
OF_A_FAMILY = [
    ("llama", "sliding_window", 4),  # of which no code of Llama's knows, but its cache does
    ("qwen3", "use_sliding_window", True),
    ("qwen3_moe", "use_sliding_window", True),
    ("qwen2", "layer_types", ["full_attention"] * 3 + ["chunked_attention"]),
    ("qwen3_moe", "decoder_sparse_step", 2),
    ("qwen3_moe", "mlp_only_layers", [3]),
    ("qwen3_moe", "num_experts", 0),
    ("qwen3_moe", "num_experts_per_tok", 9),
    ("llama", "use_qk_norm", True),
    ("qwen3", "use_qk_norm", False),
    ("llama", "qkv_bias", True),
    ("llama", "num_key_value_heads", 3),
    ("llama", "head_dim", 5),
    ("llama", "rms_norm_eps", 0.0),
    ("llama", "num_hidden_layers", 0),
    ("llama", "vocab_size", -1),
]
FOR_ALL = {k: v for k, v in REFUSED.items() if not k.startswith(("decoder", "mlp_only", "sliding"))}


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [(f, k, v) for k, v in (FOR_ALL | ELSEWHERE).items() for f in ("llama", "qwen3_moe")]
    + OF_A_FAMILY,
)
def test_a_key_that_the_trunk_does_not_compute_with_is_refused(tmp_path, family, key, value):
    window = {"max_window_layers": 0, "sliding_window": 8, "layer_types": None}
    more = window if key == "use_sliding_window" else {}
    hf_dir = directory_of(family, tmp_path / "hf", **{key: value} | more)
    named = "sliding-window" if "sliding" in f"{key} {value}" else key
    with pytest.raises(ValueError, match=f"{named}.* is not supported") as caught:
        read_config(hf_dir)
    assert "\n" not in str(caught.value)


def refusals_on_rank(hf_dirs):
    from types import SimpleNamespace

    from megatron_taopd.formats.hf import load_config
    from megatron_taopd.models.gpt import transformer_config

    found = []
    for hf_dir in hf_dirs:
        try:
            transformer_config(load_config(hf_dir), SimpleNamespace(), torch.float32)
        except ValueError as error:
            found.append(str(error))
    return found


def test_whoever_builds_a_trunk_is_refused(tmp_path):
    """Tools that do not go through a run's configuration, too."""
    window = {"use_sliding_window": True, "sliding_window": 8}
    changes = window, {"attention_bias": True}, {"logit_scale": 0.5}
    hf_dirs = [directory_of("qwen3_moe", tmp_path / str(i), **c) for i, c in enumerate(changes)]
    ((window, bias, scale),) = run_ranks(1, refusals_on_rank, hf_dirs)
    assert "sliding-window" in window and "attention_bias" in bias and "logit_scale" in scale


ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 12,  # the longest of LENGTHS is far behind it
}


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        (ROPE | {"rope_type": "proportional"}, "rope_type proportional"),
        (YARN | {"factor": None}, "factor null of rope_parameters"),
        (
            YARN | {"beta_fast": 1.0},
            r"beta_fast 1.0 of .* \(only above beta_slow null",
        ),
        (YARN | {"attention_factor": -1.0}, "attention_factor -1.0"),
        (YARN | {"truncate": "no"}, "truncate no of rope_parameters"),
        (
            YARN | {"low_freq_factor": 1.0},
            "low_freq_factor 1.0 .* of rope_type yarn",
        ),
        (ROPE | {"rope_type": "dynamic", "factor": 4.0}, "rope_type dynamic"),
        (ROPE | {"mrope_section": [2, 2, 4]}, "mrope_section"),
        (ROPE | {"factor": 4.0}, "factor 4.0 in rope_parameters of rope_type default"),
        (ROPE | {"type": "yarn"}, "type yarn contradict"),
        (ROPE | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (ROPE | {"rope_theta": -1.0}, "rope_theta -1.0"),
        (LLAMA3 | {"factor": 0.0}, "factor 0.0"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor 1.0"),
        (LLAMA3 | {"attention_factor": 1.2}, "attention_factor 1.2"),
        ({"full_attention": ROPE}, "rope_theta|full_attention"),
    ],
)
def test_rope_that_the_trunk_does_not_compute_is_refused(tmp_path, rope, named):
    hf_dir = directory_of("qwen3", tmp_path / "hf", rope_parameters=rope)
    with pytest.raises(ValueError, match=named) as caught:
        read_config(hf_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 2}),
        ("llama", {"rope_interleaved": False, "is_llama_config": True}),  # SmolLM2's
        ("qwen2", {"use_mrope": False, "sliding_window": 4096, "use_sliding_window": False}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}),
        ("qwen3", {"rope_scaling": None, "num_nextn_predict_layers": 0, "logit_scale": None}),
        ("qwen3", {"auto_map": {"AutoTokenizer": ["tokenization.Tokenizer", None]}}),
        ("qwen3_moe", {"mlp_only_layers": [], "shared_expert_intermediate_size": 0}),
    ],
)
def test_keys_that_are_off_are_no_obstacle(tmp_path, family, changes):
    read_config(directory_of(family, tmp_path / "hf", **changes))


ANYTHING = [None, "x", "full_attention", -1, 0, 7, 0.5, True, [], [1], [None], {}, {"a": 1}]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_whatever_a_key_is_there_is_a_model_or_one_line(tmp_path, family):
    hf_dir = Path(directory_of(family, tmp_path / "hf"))
    written = json.loads((hf_dir / "config.json").read_text())
    more = ("head_dim", "layer_types", "rope_scaling", "auto_map", "quantization_config", "dtype")
    refused = 0
    for key in {*written, *more}:
        for value in ANYTHING:
            (hf_dir / "config.json").write_text(json.dumps(written | {key: value}))
            try:
                tensor_shapes(read_config(hf_dir))
            except ValueError as error:
                assert "\n" not in str(error), (key, value)
                refused += 1
    assert refused > 100


# ----------------------------------------------------------------------------------- computed with

LENGTHS = [9, 4, 30]
ALL = ("llama", "qwen2", "qwen3", "qwen3_moe")
CHANGES = [  # away from the tiny models of tests/support/families.py, family by family
    *((family, {"vocab_size": 131}) for family in ALL),
    *((family, {"hidden_size": 48, "head_dim": 16}) for family in ALL),
    *((family, {"intermediate_size": 40}) for family in ("llama", "qwen2", "qwen3")),
    *((family, {"num_hidden_layers": 3, "layer_types": None}) for family in ALL),
    *((family, {"num_key_value_heads": 1}) for family in ALL),
    *((family, {"num_key_value_heads": 8}) for family in ALL),
    *((family, {"num_attention_heads": 4}) for family in ALL),
    *((family, {"head_dim": 6}) for family in ALL),
    *((family, {"rms_norm_eps": 0.3}) for family in ALL),
    *((family, {"rope_parameters": ROPE | {"rope_theta": 77.0}}) for family in ALL),
    *(
        (family, {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 3.0}})
        for family in ALL
    ),
    *((family, {"rope_parameters": LLAMA3}) for family in ALL),
    *((family, {"rope_parameters": YARN}) for family in ALL),
    ("qwen3", {"rope_parameters": YARN | {"attention_factor": 1.9}}),
    ("qwen3", {"rope_parameters": YARN | {"beta_fast": 3.0, "beta_slow": 0.5, "truncate": False}}),
    ("llama", {"rope_parameters": YARN | {"mscale": 3.0, "mscale_all_dim": 0.5}}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen3", {"tie_word_embeddings": False}),
    ("qwen3_moe", {"tie_word_embeddings": True}),
    ("qwen3_moe", {"num_experts": 5}),
    ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    ("qwen3_moe", {"num_experts_per_tok": 8}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_moe", {"moe_intermediate_size": 40}),
]


def changed_model(family: str, path: Path, changes: dict) -> str:
    """A random model of the family's tiny config with these keys."""
    config = CONFIGS[family].to_dict() | changes
    save_random(type(CONFIGS[family])(**config), path)
    return str(path)


def transformers_logits(hf_dir: str, vocab_size: int) -> torch.Tensor:
    from test_models import packed

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    tokens, _, _ = packed(LENGTHS, vocab_size)
    with torch.no_grad():
        return torch.cat([model(input_ids=t[None]).logits[0] for t in tokens.split(LENGTHS)])


def assert_logits_agree(hf_dir: str, tp: int) -> None:
    results = run_ranks(tp, trunk_on_ranks, hf_dir, tp, 1, False, LENGTHS)
    expected = transformers_logits(hf_dir, read_config(hf_dir).vocab_size)
    logits = torch.cat([shard for shard, _, _ in results], dim=1)[:, : expected.shape[1]]
    assert expected.abs().max() > 0.1
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("family", "changes"), CHANGES, ids=lambda value: str(value)[:40])
def test_keys_that_the_trunk_computes_with_give_transformers_logits(tmp_path, family, changes):
    assert_logits_agree(changed_model(family, tmp_path / "hf", changes), tp=1)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rms_norm_eps": 0.3, "head_dim": 6, "vocab_size": 131}),
        ("qwen2", {"num_key_value_heads": 1, "rope_parameters": LLAMA3}),
        ("qwen3", {"rope_parameters": YARN}),
        ("qwen3_moe", {"num_experts_per_tok": 3, "tie_word_embeddings": True}),
    ],
    ids=["llama", "qwen2", "qwen3", "qwen3_moe"],
)
def test_so_they_do_over_two_ranks(tmp_path, family, changes):
    assert_logits_agree(changed_model(family, tmp_path / "hf", changes), tp=2)


@pytest.mark.parametrize(
    "spelled",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1e4},  # transformers 4
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1e4},  # and before
        {"rope_parameters": YARN},
    ],
    ids=["rope_scaling", "type", "rope_parameters"],
)
def test_yarn_is_read_as_it_is_spelled(tmp_path, spelled):
    """What was trained with, 12 positions, is `max_position_embeddings` where nothing else says so;
    the model is stretched to 48, of which LENGTHS has 30."""
    hf_dir = directory_of("qwen3", tmp_path / "hf", max_position_embeddings=12)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    del written["rope_parameters"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(written | spelled))
    assert longest_sequence(read_config(hf_dir)) == 48
    assert_logits_agree(hf_dir, tp=1)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_yarns_factor_is_that_of_its_paper(scale):
    """arXiv 2309.00071: queries and keys are multiplied by .1 ln(s) + 1."""
    changes = {"rope_parameters": YARN | {"factor": scale}}
    config = type(CONFIGS["qwen3"])(**CONFIGS["qwen3"].to_dict() | changes)
    assert gpt.rope(config)[1] == pytest.approx(0.1 * log(scale) + 1, rel=1e-12)


def test_every_key_that_the_trunk_computes_with_is_tried():
    tried = {key for _, changes in CHANGES for key in changes}
    # The positions' limit is a length, not an input of the forward pass.
    assert COMPUTED_WITH - tried == {"max_position_embeddings"}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"initializer_range": 0.5, "pad_token_id": 3, "max_position_embeddings": 999}),
        ("qwen3_moe", {"output_router_logits": True, "router_aux_loss_coef": 0.5}),
        ("qwen3", {"attn_implementation": "eager", "pad_token_id": 3}),
    ],
)
def test_keys_without_effect_have_none(tmp_path, family, changes):
    plain = directory_of(family, tmp_path / "plain")
    changed = directory_of(family, tmp_path / "changed", **changes)
    expected, logits = (transformers_logits(d, 200) for d in (plain, changed))
    assert (logits - expected).abs().max() < 1e-5
    assert_logits_agree(changed, tp=1)
