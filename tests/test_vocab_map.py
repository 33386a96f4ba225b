"""Teachers with another tokenizer: what is the same token, and what the teacher reads."""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.ranks import run_ranks
from support.step import (
    assert_gradients,
    dense_gradients,
    dense_step,
    make_batch,
    make_model,
    step_on_ranks,
)
from test_step import FIELDS, LAYOUTS, assert_agrees
from test_train import curve, train
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_taopd.config.schema import DataSection
from megatron_taopd.data.prompts import TeacherReader, load_prompts
from megatron_taopd.data.vocab_map import VocabMap, Vocabulary
from megatron_taopd.rollout.engine import make_rollout_batch

# ------------------------------------------------------------------------- which token is which

CHAT = (
    "{{% for m in messages %}}{start}{{{{ m['role'] }}}}:{{{{ m['content'] }}}}{end}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{start}assistant:{{% endif %}}"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # how a byte-level vocabulary writes a byte


def byte_level(words: list[str], specials: list[str], eos: str | None = None, chat=None):
    """A byte-level BPE with these words, each merged from left to right, on top of the bytes."""
    merges = [(word[:i], word[i]) for word in map(as_bytes, words) for i in range(1, len(word))]
    pieces = dict.fromkeys([*BYTES, *(a + b for a, b in merges)])
    backend = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, list(dict.fromkeys(merges)))
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, chat_template=chat)


def as_bytes(text: str) -> str:
    ((word, _),) = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)
    return word


def vocabulary(tokenizer, *ends: str, padding: int = 0) -> Vocabulary:
    ids = tuple(tokenizer.convert_tokens_to_ids(end) for end in ends)
    return Vocabulary(tokenizer, len(tokenizer) + padding, ids)


def counterparts(student, teacher) -> dict[str, str]:
    """The map in tokens, checked for being one to one."""
    vocab_map = VocabMap.between(student, teacher)
    ids = vocab_map.teacher_ids[vocab_map.common]
    assert len(ids.unique()) == len(ids)
    ours, theirs = student.tokenizer, teacher.tokenizer
    return dict(
        zip(
            ours.convert_ids_to_tokens(vocab_map.common.tolist()),
            theirs.convert_ids_to_tokens(ids.tolist()),
            strict=True,
        )
    )


STUDENT = byte_level(
    ["the", " cat"],
    ["<|text|>", "<|start|>", "<|turn|>", "<think>"],
    eos="<|turn|>",
    chat=CHAT.format(start="<|start|>", end="<|turn|>\n"),
)


def test_ordinary_tokens_are_matched_by_string():
    student = vocabulary(byte_level([" cat", "the", "dog"], []))
    teacher = vocabulary(byte_level(["the", " cat", " bird"], []))
    same = counterparts(student, teacher)
    assert all(token == other for token, other in same.items())
    assert {"Ġcat", "the", "a"} <= same.keys() and "dog" not in same


def test_tokens_that_end_a_response_are_matched_by_role():
    teacher = byte_level(
        ["the", " cat"],
        ["<think>", "</s>", "[/INST]"],
        "</s>",
        CHAT.format(start="", end="[/INST]"),
    )
    ours = vocabulary(STUDENT, "<|text|>", "<|turn|>")
    same = counterparts(ours, vocabulary(teacher, "</s>", "[/INST]"))
    assert same["<|turn|>"] == "[/INST]" and same["<|text|>"] == "</s>"
    assert same["<think>"] == "<think>" and "<|start|>" not in same


def test_a_teacher_with_one_end_takes_it_for_the_end_of_a_turn():
    """Its end of text has the name of the student's: the role comes first."""
    teacher = byte_level(["the"], ["<|text|>"], eos="<|text|>")
    ours = vocabulary(STUDENT, "<|text|>", "<|turn|>")
    same = counterparts(ours, vocabulary(teacher, "<|text|>"))
    assert same["<|turn|>"] == "<|text|>" and "<|text|>" not in same


def test_a_base_student_ends_a_turn_where_it_ends_a_text():
    """Its chat template ends turns with a token at which the model does not stop."""
    teacher = byte_level(["the"], ["</s>"], eos="</s>")
    assert counterparts(vocabulary(STUDENT, "<|text|>"), vocabulary(teacher, "</s>"))[
        "<|text|>"
    ] == "</s>"  # fmt: skip
    stopped = vocabulary(STUDENT, "<|text|>").ending_at(
        [STUDENT.convert_tokens_to_ids("<|turn|>"), STUDENT.convert_tokens_to_ids("the")]
    )
    assert counterparts(stopped, vocabulary(teacher, "</s>"))["<|turn|>"] == "</s>"


@pytest.mark.parametrize(
    "config, generation, ends",
    [
        (1, 1, (1,)),
        (1, 7, (7, 1)),
        (1, [7, 1, 9], (7, 1, 9)),
        ([1, 2], 7, (7, 1, 2)),
        (1, None, (1,)),
        (None, [7], (7,)),
        (None, None, ()),
        (-1, 7, (7,)),
        (5, "no file", (5,)),
    ],
)
def test_responses_end_where_either_configuration_says(tmp_path, config, generation, ends):
    """What generation_config.json names comes first; SGLang joins both, transformers does not."""
    source = Path(__file__).parents[1] / "examples" / "tiny_pair" / "student"
    for file in source.iterdir():
        if file.name not in ("model.safetensors", "generation_config.json"):
            shutil.copyfile(file, tmp_path / file.name)
    tree = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree | {"eos_token_id": config}))
    if generation != "no file":
        text = json.dumps({"eos_token_id": generation})
        (tmp_path / "generation_config.json").write_text(text)
    assert Vocabulary.from_pretrained(tmp_path).eos_token_ids == ends


def test_a_template_that_takes_no_conversation_ends_no_turn():
    raising = "{{ raise_exception('only one message') }}"
    made = byte_level(["the"], ["<|text|>"], eos="<|text|>", chat=raising)
    assert vocabulary(made, "<|text|>").after_an_answer() is None


def test_tokenizers_that_agree_are_the_identity_with_the_padding_of_both():
    ends = ("<|text|>", "<|turn|>")
    ours, theirs = (vocabulary(STUDENT, *ends, padding=n) for n in (40, 30))
    vocab_map = VocabMap.between(ours, theirs)
    assert vocab_map.is_identity and vocab_map.absent is None
    assert vocab_map.size == theirs.size
    assert vocab_map.columns(theirs.size - 2, theirs.size + 2).tolist() == [
        theirs.size - 2, theirs.size - 1, -1, -1,
    ]  # fmt: skip


def test_ids_without_a_token_have_no_counterpart_when_tokenizers_differ():
    teacher = vocabulary(byte_level(["the"], []), padding=30)
    vocab_map = VocabMap.between(vocabulary(STUDENT, "<|turn|>", padding=40), teacher)
    assert vocab_map.size == len(STUDENT)
    assert vocab_map.teacher_ids.max() < len(teacher.tokenizer)
    assert len(vocab_map.common) + len(vocab_map.absent) == vocab_map.size
    assert (vocab_map.columns(len(STUDENT), len(STUDENT) + 40) == -1).all()


def test_a_teacher_that_cannot_spell_everything_is_refused():
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    teacher = vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(ValueError, match=r"teacher\.path: .* gives no ids for U\+FFFD; it needs"):
        VocabMap.between(vocabulary(STUDENT), teacher)


# ------------------------------------------------------------------------- what the teacher reads


def response_batch(prompts: list[list[int]], responses: list[list[int]]):
    return make_rollout_batch(
        prompts,
        range(len(prompts)),
        [torch.tensor(r) for r in responses],
        [torch.zeros(len(r)) for r in responses],
        [False] * len(responses),
        [torch.zeros(len(r), dtype=torch.int64) for r in responses],
    )


# 0 and 1 have counterparts, 2 is spelled in three ids, 3 has no text.
BY_HAND = VocabMap(torch.tensor([10, 11, -1, -1]), {2: [20, 21, 22]}, stand_in=[30])


def test_rows_stand_before_the_teachers_version_of_their_token():
    batch = response_batch(
        [[5, 5], [6]],
        [[0, 1, 2, 1, 0, 0, 0, 0, 0, 0], [1] * 8 + [3, 0]],
    )
    teacher_inputs, metrics = BY_HAND.read(batch, [[7, 8, 9], [7]], max_tokens=100)
    first, second = teacher_inputs.sequence(0).tolist(), teacher_inputs.sequence(1).tolist()
    assert first == [7, 8, 9, 10, 11, 20, 21, 22, 11, 10, 10, 10, 10, 10, 10]
    assert second == [7, *[11] * 8, 30, 10]
    positions = teacher_inputs.row_positions.split(batch.response_lengths.tolist())
    #   row of token     0  1  2  1  0 …    the last id before it: 9, 10, 11, 22, 11 …
    assert positions[0].tolist() == [2, 3, 4, 7, 8, 9, 10, 11, 12, 13]
    assert positions[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert torch.equal(teacher_inputs.cu_rows, batch.cu_rows)
    assert metrics == {"teacher/shared_tokens": 0.9, "teacher/cut_spellings": 0}


def test_spellings_without_room_are_cut_to_their_first_id():
    response = [2, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    batch = response_batch([[5], [5]], [response * 2, response * 2])
    teacher_inputs, metrics = BY_HAND.read(batch, [[7], [7, 7, 7]], max_tokens=24)
    assert teacher_inputs.sequence(0).tolist() == [7, 20, 21, 22, *[11] * 9, 20, *[11] * 9]
    assert teacher_inputs.sequence(1).tolist() == [7, 7, 7, 20, *[11] * 9, 20, *[11] * 9]
    assert metrics["teacher/cut_spellings"] == 3
    assert teacher_inputs.lengths.max() <= 24


def test_a_teacher_that_reads_the_same_ids_reads_the_same_batch():
    batch = response_batch([[0, 1]], [[1, 1, 0]])
    teacher_inputs, _ = VocabMap(torch.arange(4)).read(batch, None, max_tokens=100)
    assert teacher_inputs is batch
    teacher_inputs, _ = VocabMap(torch.arange(4)).read(batch, [[3, 2, 1]], max_tokens=100)
    assert teacher_inputs.sequence(0).tolist() == [3, 2, 1, 1, 1, 0]


def test_a_step_that_shares_too_little_stops_with_the_figure():
    batch = response_batch([[0]], [[0] * 89 + [2] * 11])
    with pytest.raises(RuntimeError, match=r"of 100 response tokens, 89 \(89\.00%\) have a count"):
        BY_HAND.read(batch, None, max_tokens=1000)


def test_what_is_spelled_is_the_same_text_in_parts_of_characters_too():
    """The student merges the first two bytes of 中, and a word; the teacher has neither."""
    teacher = byte_level(["ca"], ["</s>"], eos="</s>")
    part = byte_level(["中"], []).convert_ids_to_tokens(len(BYTES))
    assert part == as_bytes("中")[:2]
    student = byte_level(["中", "cat", "a"], ["<|turn|>", "<|start|>"], eos="<|turn|>")
    vocab_map = VocabMap.between(vocabulary(student, "<|turn|>"), vocabulary(teacher, "</s>"))

    text = "a cat 中"
    tokens = student.convert_tokens_to_ids(
        [part, as_bytes("中")[2], "cat", "<|start|>", "<|turn|>"]
    )
    spelled = [vocab_map.spellings.get(i) or [int(vocab_map.teacher_ids[i])] for i in tokens]
    assert teacher.decode(spelled[0] + spelled[1]) == "中" and len(spelled[0]) == 2
    assert teacher.convert_ids_to_tokens(spelled[2]) == ["ca", "t"]
    assert teacher.decode(spelled[3]) == "<|start|>"
    assert teacher.convert_ids_to_tokens(spelled[4]) == ["</s>"]

    response = student(text * 10)["input_ids"]
    # The bound is about shared text; this is about the spelling of what is not shared.
    teacher_inputs = [
        i for t in response for i in vocab_map.spellings.get(t) or [vocab_map.teacher_ids[t]]
    ]
    assert teacher.decode(torch.tensor(teacher_inputs)) == text * 10


# --------------------------------------------------------------------------- the real Qwen pair

R1_TOKENS = {
    151643: "<｜end▁of▁sentence｜>",
    151644: "<｜User｜>",
    151645: "<｜Assistant｜>",
    151646: "<｜begin▁of▁sentence｜>",
    151647: "<|EOT|>",
    151648: "<think>",
    151649: "</think>",
}
R1_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def data():
    if "TAOPD_DATA" not in os.environ:
        pytest.skip("the real tokenizer is not here: set TAOPD_DATA to the data's directory")
    return Path(os.environ["TAOPD_DATA"])


@pytest.fixture(scope="module")
def qwen(data):
    return PreTrainedTokenizerFast.from_pretrained(data / "tokenizers" / "qwen")


@pytest.fixture(scope="module")
def r1(data, tmp_path_factory):
    """Qwen's tokenizer with the special tokens of DeepSeek-R1's distillations."""
    description = json.loads((data / "tokenizers" / "qwen" / "tokenizer.json").read_text())
    description["added_tokens"] = [
        t | {"content": R1_TOKENS.get(t["id"], t["content"])}
        for t in description["added_tokens"]
        if t["id"] < 151665  # the later ones, <think> among them, came with Qwen3
    ]
    path = tmp_path_factory.mktemp("r1") / "tokenizer.json"
    path.write_text(json.dumps(description))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        bos_token=R1_TOKENS[151646],
        eos_token=R1_TOKENS[151643],
        chat_template=R1_TEMPLATE,
    )


@pytest.fixture(scope="module")
def qwen_to_r1(qwen, r1):
    return VocabMap.between(
        Vocabulary(qwen, 151936, (151645, 151643)), Vocabulary(r1, 152064, (151643,))
    )


def test_qwen_to_r1_differs_in_the_special_tokens_alone(qwen_to_r1):
    changed = qwen_to_r1.teacher_ids != torch.arange(qwen_to_r1.size)
    changed = changed.nonzero()[:, 0]
    assert dict(zip(changed.tolist(), qwen_to_r1.teacher_ids[changed].tolist(), strict=True)) == {
        151643: -1,  # <|endoftext|>: the teacher's only end is that of a turn
        151644: -1,  # <|im_start|>
        151645: 151643,  # <|im_end|>
        151646: -1,
        151647: -1,
        151648: -1,
        151649: -1,
        151665: -1,  # <tool_response>
        151666: -1,
        151667: 151648,  # <think>
        151668: 151649,  # </think>
    }
    assert qwen_to_r1.size == 151669
    assert (qwen_to_r1.columns(151669, 152064) == -1).all()


def test_qwen_and_r1_each_get_their_own_prompt_and_the_same_answer(data, qwen, r1, qwen_to_r1):
    path = data / "gsm8k" / "train.jsonl"
    prompts = load_prompts(
        path, qwen, DataSection(prompt_column="question", limit=3), "answer", TeacherReader(r1)
    )
    question = prompts.texts[1]
    assert qwen.decode(prompts.token_ids[1]) == (
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert r1.decode(prompts.teacher_token_ids[1]) == (
        f"<｜begin▁of▁sentence｜><｜User｜>{question}<｜Assistant｜><think>\n"
    )

    responses = [[*qwen(answer)["input_ids"], 151645] for answer in prompts.answers]
    batch = response_batch(prompts.token_ids, responses)
    teacher_inputs, metrics = qwen_to_r1.read(batch, prompts.teacher_token_ids, 2048)
    assert metrics == {"teacher/shared_tokens": 1.0, "teacher/cut_spellings": 0}
    for i, answer in enumerate(prompts.answers):
        read = teacher_inputs.sequence(i).tolist()
        prompt = prompts.teacher_token_ids[i]
        assert read[: len(prompt)] == prompt
        assert r1.decode(read[len(prompt) :]) == answer + "<｜end▁of▁sentence｜>"
    rows = teacher_inputs.row_positions.split(batch.response_lengths.tolist())
    assert rows[1].tolist() == list(
        range(len(prompts.teacher_token_ids[1]) - 1, teacher_inputs.lengths[1] - 1)
    )


def test_a_special_token_of_qwen_in_an_answer_is_text_to_r1(qwen, r1, qwen_to_r1):
    answer = qwen("The answer, with 中文 and 12 × 34 = 408, is plain enough to all of us.")[
        "input_ids"
    ]
    batch = response_batch([[0]], [[*answer, 151644, 151645]])
    teacher_inputs, metrics = qwen_to_r1.read(batch, None, 2048)
    assert r1.decode(teacher_inputs.sequence(0)[1:]) == (
        qwen.decode(answer) + "<|im_start|><｜end▁of▁sentence｜>"
    )
    assert metrics["teacher/shared_tokens"] == 1 - 1 / (len(answer) + 2)


# --------------------------------------------------------------------------------- whole steps


def relabel(model: str, out: Path, teacher_ids: torch.Tensor) -> str:
    """A copy of a checkpoint in which the token of id v has the id teacher_ids[v]."""
    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
        tensors[name] = torch.empty_like(tensors[name]).index_copy_(0, teacher_ids, tensors[name])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return str(out)


SIZE = 200  # of the student; the teacher has 216 ids
RELABELLED = torch.randperm(216, generator=torch.Generator().manual_seed(5))
PAIRS = {name: LAYOUTS[name] for name in ("one rank", "TP2 | PP2", "PP2 | TP2", "TP2 DP2 | PP2")}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    teacher = make_model(root / "teacher", 216, 48, layers=4, seed=1, tied=False)
    return {
        "student": make_model(root / "student", SIZE, 32, layers=4, seed=0),
        "teacher": teacher,
        "relabelled teacher": relabel(teacher, root / "relabelled", RELABELLED),
        "relabelled twin": relabel(
            make_model(root / "twin", 216, 32, layers=4, seed=0), root / "twin2", RELABELLED
        ),
        "twin": str(root / "twin"),
    }


def in_teacher_ids(batch):
    """The prompts of the batch, relabelled."""
    return [
        RELABELLED[batch.sequence(i)[:n]].tolist()
        for i, n in enumerate(batch.prompt_lengths.tolist())
    ]


@pytest.mark.parametrize("name", PAIRS)
def test_a_relabelled_teacher_is_the_same_teacher(pair, name):
    """Bit for bit: scores, selection, loss and gradients."""
    world_size, *layouts = PAIRS[name]
    batch = make_batch(SIZE)
    student = pair["student"]
    plain = run_ranks(world_size, step_on_ranks, student, pair["teacher"], *layouts, batch, SIZE)
    step = partial(
        step_on_ranks,
        vocab_map=VocabMap(RELABELLED[:SIZE]),
        teacher_prompts=in_teacher_ids(batch),
    )
    relabelled = run_ranks(
        world_size, step, student, pair["relabelled teacher"], *layouts, batch, SIZE
    )
    for ours, reference in zip(relabelled, plain, strict=True):
        assert ours["metrics"] == reference["metrics"]
        assert torch.equal(ours["mask"], reference["mask"])
        for field in FIELDS:
            assert torch.equal(getattr(ours["scores"], field), getattr(reference["scores"], field))
        for parameter, gradient in ours["gradients"].items():
            assert torch.equal(gradient, reference["gradients"][parameter]), parameter


@pytest.mark.parametrize("name", ["one rank", "TP2 | PP2", "PP2 | TP2"])
def test_self_distillation_through_a_relabelling_is_zero(pair, name):
    world_size, *layouts = PAIRS[name]
    batch = make_batch(216)
    step = partial(
        step_on_ranks, vocab_map=VocabMap(RELABELLED), teacher_prompts=in_teacher_ids(batch)
    )
    for result in run_ranks(
        world_size, step, pair["twin"], pair["relabelled twin"], *layouts, batch, 216
    ):
        assert result["scores"].disagreement.abs().max() <= 1e-5
        assert abs(result["metrics"]["loss"]) <= 1e-5
        assert max(g.abs().max().item() for g in result["gradients"].values()) <= 1e-5


# On two shards there are ids without a counterpart on both; some of them are in the responses.
WITH_ABSENT = VocabMap(
    RELABELLED[:SIZE].index_fill(0, torch.tensor([0, 7, 99, 100, 123, 198, 199]), -1),
    {7: [3, 4], 99: [5], 100: [6, 7, 8], 123: [9, 10], 198: [11], 199: [12, 12, 12, 12]},
    stand_in=[13],
)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_ids_without_a_counterpart_take_part_in_nothing(pair, name, kind):
    """Against dense float64 on the columns of both; own prompts of other lengths, and spellings."""
    world_size, *layouts = PAIRS[name]
    batch = make_batch(SIZE)
    teacher_prompts = [[17 * i % 216, *range(i % 5)] for i in range(batch.num_sequences)]
    assert WITH_ABSENT.read(batch, teacher_prompts, 128)[1]["teacher/shared_tokens"] < 1
    given = {"vocab_map": WITH_ABSENT, "teacher_prompts": teacher_prompts, "loss": {"kind": kind}}
    models = pair["student"], pair["relabelled teacher"]
    expected = dense_step(*models, batch, SIZE, **given)
    step = partial(step_on_ranks, **given)
    for result in run_ranks(world_size, step, *models, *layouts, batch, SIZE):
        assert_agrees(result, expected)
        assert torch.isfinite(result["gap"]).all()


def test_the_policy_gradient_leaves_out_samples_without_a_counterpart(pair):
    """Σ over the others of −(p_S/μ)·A·∇log p_S, A = −(log p_S − log p_T) among common tokens."""
    batch = make_batch(SIZE)
    given = {"vocab_map": WITH_ABSENT, "teacher_prompts": in_teacher_ids(batch)}
    models = pair["student"], pair["relabelled teacher"]
    everything = torch.ones(batch.num_rows, dtype=torch.bool)
    step = partial(step_on_ranks, **given, loss={"kind": "sampled_token"}, mask=everything)
    results = run_ranks(2, step, *models, (2, 1, False), (1, 2, False), batch, SIZE)

    tokens = batch.response_tokens()
    known = WITH_ABSENT.to_teacher(tokens) >= 0
    column = torch.searchsorted(WITH_ABSENT.common, tokens[known])[:, None]
    assert not known.all()

    def loss(z_s, z_t):
        log_p, log_q = (z[known].log_softmax(-1).gather(1, column)[:, 0] for z in (z_s, z_t))
        ratio = (log_p - batch.log_probs[known].to(log_p.dtype)).exp()
        return -(ratio * (log_q - log_p).detach()).sum() / batch.num_rows

    _, *expected = dense_gradients(loss, *models, batch, SIZE, **given)
    for result in results:
        assert_gradients(result["gradients"], *expected)


# ----------------------------------------------------------------------------------- whole runs

TINY_PAIR = Path(__file__).parents[1] / "examples" / "tiny_pair"


def relabel_tiny_teacher(out: Path, renamed: dict[str, str], seed: int | None) -> str:
    """The tiny pair's teacher with some tokens under other names and, given a seed, all of its 1100
    tokens under other ids."""
    teacher_ids = torch.arange(1152)
    if seed is not None:
        teacher_ids[:1100] = torch.randperm(1100, generator=torch.Generator().manual_seed(seed))
    relabel(str(TINY_PAIR / "teacher"), out, teacher_ids)

    def edit(file, change):
        description = json.loads((out / file).read_text())
        change(description)
        (out / file).write_text(json.dumps(description))

    def edit_tokenizer(tokenizer):
        words = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = {
            renamed.get(token, token): int(teacher_ids[index]) for token, index in words.items()
        }
        for token in tokenizer["added_tokens"]:
            token["id"] = int(teacher_ids[token["id"]])
            token["content"] = renamed.get(token["content"], token["content"])
        bos = tokenizer["post_processor"]["special_tokens"]["<bos>"]
        bos["ids"] = [int(teacher_ids[i]) for i in bos["ids"]]

    def edit_config(config):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            config[key] = int(teacher_ids[config[key]])

    edit("tokenizer.json", edit_tokenizer)
    edit("config.json", edit_config)
    edit("generation_config.json", edit_config)
    edit("tokenizer_config.json", lambda c: c.update(eos_token=renamed.get("<eos>", "<eos>")))
    return str(out)


def run_with_teacher(teacher: str, run_dir: Path) -> list[dict]:
    (status, records), _ = run_ranks(
        2, train, [f"run.dir={run_dir}", f"teacher.path={teacher}", "train.steps=3"]
    )
    assert status == 0
    return records


def test_a_run_with_a_relabelled_teacher_takes_the_same_steps(tmp_path):
    """Bit for bit: where the end of a turn has another name, all ids may be others, too."""
    plain, permuted = (
        run_with_teacher(
            relabel_tiny_teacher(tmp_path / f"teacher{seed}", {"<eos>": "</s>"}, seed),
            tmp_path / f"run{seed}",
        )
        for seed in (None, 6)
    )
    assert curve(permuted) == curve(plain)
    assert permuted[-1]["teacher/shared_tokens"] == 1


def test_a_run_with_tokens_that_the_teacher_lacks(tmp_path):
    """Style words of the student's under other names: the teacher reads them as unknown."""
    lacking = {word: word.upper() for word in ("well", "okay", "so", "then")}
    teacher = relabel_tiny_teacher(tmp_path / "teacher", lacking, seed=6)
    records = run_with_teacher(teacher, tmp_path / "run")
    for record in records[1:]:
        assert 0.9 <= record["teacher/shared_tokens"] < 1
        assert record["rollout/logprob_gap_max"] < 1e-4  # the engine draws them, and is right to
        assert record["loss"] > 0


def test_a_run_whose_responses_share_too_little_stops_with_the_figure(tmp_path):
    """The student calculates in signs that are in none of the questions."""
    lacking = {sign: f"<{sign}>" for sign in "+-=#"}
    teacher = relabel_tiny_teacher(tmp_path / "teacher", lacking, seed=6)
    options = [f"run.dir={tmp_path}/run", f"teacher.path={teacher}", "train.steps=1"]
    first, second = run_ranks(2, stopped, options)
    assert re.match(r"of \d+ response tokens, \d+ \([67]\d\.\d\d%\) have a counterpart", first)
    assert first == second


def stopped(overrides: list[str]) -> str:
    try:
        train(overrides)
    except RuntimeError as error:
        return str(error)
