"""Gates on the committed tiny pair: what the quickstart and other tests rely on."""

import json
from pathlib import Path

import pytest
import torch
from support import dense
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

PAIR = Path(__file__).parents[1] / "examples" / "tiny_pair"
NAMES = ("teacher", "student")


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (PAIR / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PAIR / "student")


@pytest.fixture(scope="module")
def models():
    load = AutoModelForCausalLM.from_pretrained
    return {name: load(PAIR / name, dtype=torch.float32).eval() for name in NAMES}


def generate(model, tokenizer, prompts: list[str], **sampling) -> tuple[torch.Tensor, int]:
    """[N, n] left-padded prompts with their responses, and the prompts' padded length."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=32, **sampling)
    return tokens, inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", NAMES)
def test_shapes_allow_the_layouts(models, name):
    config = models[name].config
    assert sum(p.numel() for p in models[name].parameters()) <= 1_500_000
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert config.num_attention_heads % 4 == 0  # TP 1, 2, 4
    assert config.num_key_value_heads % 4 == 0
    assert config.intermediate_size % 4 == 0
    assert config.vocab_size % 64 == 0  # no padding columns at any of them
    assert config.num_hidden_layers % (4 if name == "teacher" else 2) == 0  # PP 1, 2, 4 and 1, 2


def test_one_is_tied_and_one_is_not(models):
    assert models["student"].config.tie_word_embeddings
    assert not models["teacher"].config.tie_word_embeddings


def test_both_have_the_same_tokenizer(tokenizer):
    assert AutoTokenizer.from_pretrained(PAIR / "teacher").get_vocab() == tokenizer.get_vocab()


def test_numbers_are_single_tokens(tokenizer):
    assert tokenizer.vocab_size > 1000
    for n in range(1000):
        (token,) = tokenizer.encode(str(n), add_special_tokens=False)
        assert tokenizer.decode([token]) == str(n)


def test_tokenizer_round_trip(tokenizer):
    text = "Bob has 51 cards . gets 63 . loses 46 . ?"
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id and len(tokens) == 13
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode("51 + 63 = 114", add_special_tokens=False)) == (
        "51 + 63 = 114"
    )


def test_data_is_readable_solvable_and_disjoint(tokenizer):
    def arithmetic(row: dict) -> tuple[int, ...]:
        """The numbers with their signs: words aside, all there is to a problem."""
        start, *steps = row["prompt"].removesuffix(" ?").removesuffix(" .").split(" . ")
        losses = ("eats", "gives", "loses", "sells")
        signed = [int(n) * (-1 if verb in losses else 1) for verb, n in map(str.split, steps)]
        return (int(start.split()[2]), *signed)

    train, test = read("train.jsonl"), read("test.jsonl")
    assert len(train) >= 4096 and 512 <= len(test) <= 1024
    for row in train + test:
        assert sum(arithmetic(row)) == row["answer"]
        assert 0 <= row["answer"] <= 999
    assert not set(map(arithmetic, train)) & set(map(arithmetic, test))
    prompts = tokenizer([row["prompt"] for row in train + test])["input_ids"]
    assert max(map(len, prompts)) <= 32
    assert tokenizer.unk_token_id not in {token for prompt in prompts for token in prompt}


@pytest.mark.parametrize("name, low, high", [("teacher", 0.95, 1.0), ("student", 0.2, 0.5)])
def test_greedy_accuracy(models, tokenizer, name, low, high):
    problems = read("test.jsonl")[:256]
    tokens, start = generate(
        models[name], tokenizer, [row["prompt"] for row in problems], do_sample=False
    )
    texts = tokenizer.batch_decode(tokens[:, start:])
    endings = [text.split("<eos>")[0].split()[-2:] for text in texts]
    right = [e == ["#", str(row["answer"])] for e, row in zip(endings, problems, strict=True)]
    assert low <= sum(right) / len(right) <= high


def test_compatibility_is_graded(models, tokenizer):
    """On the student's own rollouts some rows are out of its reach, some halfway, most within."""
    torch.manual_seed(0)
    prompts = [row["prompt"] for row in read("test.jsonl")[:64]]
    tokens, start = generate(
        models["student"], tokenizer, prompts, do_sample=True, top_k=0, top_p=1.0
    )
    attention_mask = tokens != tokenizer.pad_token_id
    rows = attention_mask[:, start:]  # the position before each response token predicts it
    with torch.no_grad():
        student, teacher = (
            models[name](tokens, attention_mask=attention_mask).logits[:, start - 1 : -1][rows]
            for name in ("student", "teacher")
        )
    c = dense.compatibility(student, teacher, k=16)
    assert 0.05 <= (c < 0.5).double().mean() <= 0.15
    assert ((c > 0.1) & (c < 0.9)).double().mean() >= 0.05
    assert c.median() > 0.99
