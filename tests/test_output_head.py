"""Output heads of every causal language model that transformers has, and of damaged checkpoints."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.families import save_random
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatron_taopd.formats.output_head import find_head, head_of
from megatron_taopd.models.weights import load_head
from megatron_taopd.monitoring.accounting import ModelCost

SIZES = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=48,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, n_group=1, topk_group=1, first_k_dense_replace=1,
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64, mamba_d_state=8, mamba_n_groups=1,
    mamba_chunk_size=16, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=1,
    chunk_size=16, state_size=8, rotary_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    layer_types=None,
)  # fmt: skip
# Of which these sizes make no small model, or none without images or a package that is not here.
UNBUILT = {
    "blenderbot", "blt", "dbrx", "deepseek_v32", "dots1", "emu3", "gemma3", "gemma3n",
    "gemma3n_text", "gemma4", "gemma4_assistant", "gemma4_text", "gemma4_unified",
    "gemma4_unified_assistant", "git", "glm_moe_dsa", "got_ocr2", "gpt_neo", "lfm2_moe", "llama4",
    "longcat_flash", "mamba2", "mllama", "musicgen", "musicgen_melody", "phi4_multimodal",
    "plbart", "qwen3_5", "qwen3_5_moe", "reformer", "roc_bert", "whisper", "xlnet", "xmod",
    "zamba", "zamba2",
}  # fmt: skip
BUILT = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in UNBUILT]
# What transformers' modelling code does to head · hidden. By family: a key and a value, and the
# factor of the logits, or what is said of why there is none.
RULES = [
    ("granite", {"logits_scaling": 6.0}, 1 / 6),
    ("granitemoe", {"logits_scaling": 6.0}, 1 / 6),
    ("granitemoeshared", {"logits_scaling": 6.0}, 1 / 6),
    ("granitemoehybrid", {"logits_scaling": 6.0}, 1 / 6),
    ("hyperclovax", {"logits_scaling": 6.0}, 6),
    ("cohere", {"logit_scale": 0.3}, 0.3),
    ("cohere2", {}, 0.0625),
    ("cohere2_moe", {}, 0.0625),
    ("falcon_h1", {"lm_head_multiplier": 0.02}, 0.02),
    ("gemma", {}, 1),
    ("gemma2", {"final_logit_softcapping": None}, 1),
    ("gemma2", {}, "final_logit_softcapping 30"),
    ("gemma3_text", {"final_logit_softcapping": 900.0}, "final_logit_softcapping 900"),
    ("gemma3n_text", {}, "final_logit_softcapping 30"),
    ("gemma4_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30"),
    ("vaultgemma", {}, "final_logit_softcapping 30"),
    ("nanochat", {}, "final_logit_softcapping 15"),
    ("recurrent_gemma", {}, "logits_soft_cap 30"),
    ("xlstm", {}, "output_logit_soft_cap 30"),
    ("phi", {}, "its output head has a bias"),
    ("gptj", {}, "its output head has a bias"),
    ("codegen", {}, "its output head has a bias"),
    ("phimoe", {"lm_head_bias": True}, "its output head has a bias"),
    ("ernie4_5_moe", {"use_bias": True}, "its output head has a bias"),
    ("bert", {}, "no output head is to be had of it"),
    ("opt", {}, "no output head is to be had of it"),
]


def tiny(model_type: str, **changes) -> PretrainedConfig:
    """A small configuration, by whatever names the family has for sizes."""
    kind = CONFIG_MAPPING[model_type]
    names = kind().to_dict().keys() | (kind.attribute_map.keys() - {"layer_types"})
    known = {key: value for key, value in SIZES.items() if key in names}
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return kind(**known | changes, architectures=[architecture])


@torch.no_grad()
def run(config: PretrainedConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, 12, V] (logits, head · hidden) of a random model, the latter up to 50."""
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])._from_config(config).eval()
    head = model.get_output_embeddings().weight
    given = {"input_ids": torch.randint(3, 64, (1, 12)), "use_cache": False}
    trunk = model.base_model if model.base_model is not model else model.model
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases, which begin as ones and zeros
            parameter += 0.3 * torch.randn_like(parameter)
    for _ in range(2):  # a tied head changes the hidden states, too
        product = trunk(**given)[0] @ head.T
        head *= 50 / product.abs().max()
    return model(**given).logits, trunk(**given)[0] @ head.T


@pytest.mark.parametrize("model_type", BUILT)
def test_a_head_is_what_the_model_makes_of_it(model_type):
    """Accepted: logits are its product with the trunk's last hidden states, times the factor."""
    config = tiny(model_type)
    try:
        _, shape, factor = head_of(config)
    except ValueError as error:
        if "no output head is to be had" not in str(error):
            logits, product = run(config)
            best = (logits * product).sum() / product.square().sum()
            assert (logits - best * product).abs().max() > 1e-3 * logits.abs().max()
        return
    logits, product = run(config)
    assert shape == (64, 32)
    assert ModelCost.of(config).per_row > 0
    torch.testing.assert_close(logits, factor * product, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("model_type", "changes", "expected"), RULES)
def test_what_families_do_to_their_logits(model_type, changes, expected):
    config = CONFIG_MAPPING[model_type](**changes)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)) as caught:
            head_of(config)
        assert config.architectures[0] in str(caught.value) and "\n" not in str(caught.value)
    else:
        assert head_of(config)[2] == pytest.approx(expected, rel=1e-7)


# Checkpoints


def checkpoint(directory, model_type="llama", **changes):
    save_random(tiny(model_type, **changes), directory)
    return directory, load_file(directory / "model.safetensors")


def rewrite(directory, tensors):
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("model_type", "tied", "name"),
    [
        ("llama", False, "lm_head.weight"),
        ("llama", True, "model.embed_tokens.weight"),
        ("gpt_neox", False, "embed_out.weight"),
        ("gpt2", True, "transformer.wte.weight"),
        ("olmo2", False, "lm_head.weight"),
    ],
)
def test_the_name_that_a_checkpoint_has_for_it(tmp_path, model_type, tied, name):
    directory, tensors = checkpoint(tmp_path, model_type, tie_word_embeddings=tied)
    assert find_head(directory) == (name, (64, 32), 1.0)
    ids = torch.tensor([5, 0, -1, 63])
    rows = load_head(directory, ids, torch.float32)
    assert torch.equal(rows[[0, 1, 3]], tensors[name][[5, 0, 63]]) and not rows[2].any()


def test_a_tied_head_that_is_stored_as_the_head(tmp_path):
    """As by whoever saves one of the two names of the same tensor, and not the embedding's."""
    directory, tensors = checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    weight = tensors.pop("model.embed_tokens.weight")
    rewrite(directory, tensors | {"lm_head.weight": weight})
    assert find_head(directory) == ("lm_head.weight", (64, 32), 1.0)
    assert torch.equal(load_head(directory, torch.arange(64), torch.float32), weight)


def test_names_of_older_checkpoints(tmp_path):
    directory, tensors = checkpoint(tmp_path, "gpt2", tie_word_embeddings=True)
    rewrite(directory, {n.removeprefix("transformer."): t.clone() for n, t in tensors.items()})
    assert find_head(directory).name == "wte.weight"


def test_the_name_in_a_model_for_images():
    config = transformers.LlavaConfig(text_config=tiny("llama"))
    config.architectures = ["LlavaForConditionalGeneration"]
    names, shape, factor = head_of(config)
    assert "language_model.lm_head.weight" in names and (shape, factor) == ((64, 32), 1.0)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("granite", {"logits_scaling": 6.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("hyperclovax", {"logits_scaling": 6.0}),
        ("phi3", {}),
    ],
)
def test_a_factor_is_in_the_rows(tmp_path, model_type, changes):
    directory, _ = checkpoint(tmp_path, model_type, **changes)
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden, logits = model.model(ids).last_hidden_state[0], model(ids).logits[0]
    rows = load_head(directory, torch.arange(64), torch.float32)
    torch.testing.assert_close(hidden @ rows.T, logits, rtol=1e-5, atol=1e-5)
    assert load_head(directory, torch.arange(64), torch.bfloat16).dtype == torch.bfloat16


def bias(tensors):
    tensors["lm_head.bias"] = torch.zeros(64)
    return r"more than lm_head.weight, there is lm_head.bias: it is quantised or has a bias"


def packed(tensors):
    tensors["lm_head.qweight"] = tensors.pop("lm_head.weight").int()
    return r"more than lm_head.weight, there is lm_head.qweight"


def scaled(tensors):
    tensors["lm_head.weight_scale"] = torch.ones(64, 1)
    return r"there is lm_head.weight_scale"


def narrowed(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    return r"the output head, lm_head.weight, is quantised"


def resized(tensors):
    tensors["lm_head.weight"] = torch.zeros(72, 32)
    return r"lm_head.weight, is \[72, 32\] where config.json asks for \[64, 32\]"


def gone(tensors):
    del tensors["lm_head.weight"]
    return r"tensor lm_head.weight is missing"


@pytest.mark.parametrize("damage", [bias, packed, scaled, narrowed, resized, gone])
def test_a_checkpoint_whose_head_is_no_plain_matrix(tmp_path, damage):
    directory, tensors = checkpoint(tmp_path)
    message = damage(tensors)
    rewrite(directory, tensors)
    for look in (find_head, lambda path: load_head(path, torch.arange(4), torch.float32)):
        with pytest.raises(ValueError, match=rf"^{directory}.*{message}"):
            look(directory)


def test_the_classs_default_decides_whether_it_is_tied(tmp_path):
    """Cohere's and Gemma's are tied where config.json says nothing, Llama's is not."""
    for model_type, name in (("cohere", "model.embed_tokens.weight"), ("llama", "lm_head.weight")):
        directory, _ = checkpoint(tmp_path / model_type, model_type)
        path = directory / "config.json"
        config = json.loads(path.read_text())
        config.pop("tie_word_embeddings", None)
        path.write_text(json.dumps(config))
        assert find_head(directory).name == name
