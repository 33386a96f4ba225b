"""Reference responses of a data set: where they stand in a record, and their tokens."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import test_context
from support.observed import STUDENT as TINY_STUDENT
from support.observed import TINY
from transformers import AutoTokenizer

from megatron_taopd.config import load as load_config
from megatron_taopd.config.schema import DataSection
from megatron_taopd.data.prompts import Prompts, open_prompts, tokenised
from megatron_taopd.data.references import Reference, ReferenceReader
from megatron_taopd.data.texts import training_prompts
from megatron_taopd.data.vocab_map import Vocabulary

STUDENT, END = test_context.STUDENT, 1  # one id a character, and </s>
ROWS = [
    {"prompt": "1+1?", "answer": "2", "says": {"text": "it is 2"}},
    {"prompt": "2+2?", "answer": "4", "says": {"text": "</s> 4"}},
]
CHATS = [
    {"prompt": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]}
    for ask, say in (("1+1?", "it is 2"), ("2+2?", "4"))
]
MESSAGES = {"response_column": "prompt"}


@pytest.fixture
def load(tmp_path):
    def load(rows, end=END, **section) -> Prompts:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataSection(**{"response_column": "says.text", **section})
        return open_prompts(tokenised(str(path), STUDENT, data, end=end))

    return load


def spelled(ids) -> str:
    return "".join(STUDENT.convert_ids_to_tokens(ids))


def test_references_are_text_and_what_ends_it(load):
    prompts = load(ROWS)
    assert [spelled(ids) for ids in prompts.references] == ["it is 2</s>", "</s> 4</s>"]
    # What a text spells stays text; the end alone is the special token.
    assert [ids.count(END) for ids in prompts.references] == [1, 1]
    assert prompts.valid is None and spelled(prompts.token_ids[0]) == "<s>u:1+1?</s><s>"
    assert load(ROWS, end=None).references is None  # not asked for


def test_the_last_turn_of_a_chat_is_taken_off_its_prompt(load):
    prompts = load(CHATS, **MESSAGES)
    assert [spelled(ids) for ids in prompts.references] == ["it is 2</s>", "4</s>"]
    assert [spelled(ids) for ids in prompts.token_ids] == ["<s>u:1+1?</s><s>", "<s>u:2+2?</s><s>"]
    assert [*prompts.texts] == ["1+1?", "2+2?"]
    rows = [{"prompt": "1+1?", "turns": chat["prompt"]} for chat in CHATS]
    apart = load(rows, response_column="turns")
    assert [spelled(ids) for ids in apart.references] == ["it is 2</s>", "4</s>"]


def test_what_is_excluded_is_read_and_not_valid(load):
    spans = [[[0, 2], [3, 5]], None]
    rows = [{**row, "not": own} for row, own in zip(ROWS, spans, strict=True)]
    prompts = load(rows, excluded_column="not")
    shown = [
        "".join(c if v else "_" for c, v in zip(spelled(ids[:-1]), own[:-1], strict=True))
        for ids, own in zip(prompts.references, prompts.valid, strict=True)
    ]
    assert shown == ["__ __ 2", "</s> 4"]
    assert all(own[-1] for own in prompts.valid)


def test_tokens_of_which_a_character_is_excluded_are_not_valid():
    """Six tokens of one word each; of the first and third one character, of the fifth all."""
    reader = ReferenceReader(AutoTokenizer.from_pretrained(TINY_STUDENT), 1)
    text = "Ann has 13 + 4 ."
    found = reader([Reference(text, ((13, 14), (9, 10), (1, 2))), Reference(text), Reference(".")])
    assert [len(ids) for ids, _ in found] == [7, 7, 2]
    assert found[0] == (found[1][0], [False, True, False, True, False, True, True])
    assert all(found[1][1]) and all(found[2][1])


def test_rows_that_differ_in_their_reference_are_no_duplicates(load):
    other = {**ROWS[0], "says": {"text": "two"}}
    assert load([ROWS[0], other, ROWS[0]]).duplicates == 1
    assert load([ROWS[0], other, ROWS[0]], end=None).duplicates == 2


def test_prompts_without_a_reference_are_counted_and_the_first_is_named(load):
    rows = [*ROWS, {**ROWS[0], "says": {"text": " "}}, {**ROWS[1], "says": {"text": None}}]
    with pytest.raises(ValueError, match=r"line 3: column 'says.text' .* 2 of 4 rows; give each"):
        load(rows)
    question = {"prompt": CHATS[0]["prompt"][:1]}
    with pytest.raises(ValueError, match=r"line 2: column 'prompt' .* 1 of 2 rows"):
        load([CHATS[0], question], **MESSAGES)


@pytest.mark.parametrize(
    ("row", "section", "message"),
    [
        (ROWS[0], {"response_column": "say"}, r"line 1: no column 'say'; columns: answer, prompt"),
        (ROWS[0], {"response_column": "says"}, r"column 'says' is \{\"text\".*; a reference respo"),
        ({**ROWS[0], "says": {"text": "\ud800"}}, {}, r"line 1: column 'says.text' has "),
        ({**ROWS[0], "x": [[0, 8]]}, {"excluded_column": "x"}, r"column 'x' is \[\[0, 8\]\]; a l"),
        ({**ROWS[0], "x": [[2, 2]]}, {"excluded_column": "x"}, r"of the response, which has 7$"),
        ({**ROWS[0], "x": "all"}, {"excluded_column": "x"}, r"column 'x' is all; a list of \[sta"),
        ({**ROWS[0], "x": [[0, True]]}, {"excluded_column": "x"}, r"column 'x' is \[\[0, True\]\]"),
        (ROWS[0], {"excluded_column": "x"}, r"line 1: no column 'x'"),
        ({"prompt": CHATS[0]["prompt"][1:]}, MESSAGES, r"is the assistant's: a prompt ends with a"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(load, row, section, message):
    with pytest.raises(ValueError, match=message) as error:
        load([row], **section)
    assert "\n" not in str(error.value)


def test_the_end_is_what_ends_the_students_own_responses(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "Ann has 3 nuts . ?", "says": "3 ."}) + "\n")
    config = load_config(
        TINY, ["run.dir=runs/none", f"data.prompts={path}", "data.response_column=says"]
    )
    student = Vocabulary.from_pretrained(TINY_STUDENT)
    prompts = training_prompts(config, student, {"teacher": student})
    assert prompts.references[0][-1] == 1 == student.tokenizer.eos_token_id
    endless = replace(student, eos_token_ids=())
    with pytest.raises(ValueError, match=r"data.response_column: 'says': no special token ends"):
        training_prompts(config, endless, {"teacher": student})
