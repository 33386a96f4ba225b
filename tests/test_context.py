"""Privileged context: what a teacher reads besides a prompt, and nobody else does."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_taopd.config.schema import DataSection
from megatron_taopd.data.context import TeacherContext
from megatron_taopd.data.prompts import Prompts, TeacherReader, load_prompts

ROWS = [
    {"prompt": "1+1?", "answer": "2", "hint": {"text": "one more than one"}},
    {"prompt": "2+2?", "answer": "4", "hint": {"text": None}},
    {"prompt": "3+3?", "answer": "6", "hint": {"text": "twice three"}},
    {"prompt": "4+4?", "answer": "8", "hint": {"text": " \n"}},
]
SOLUTION = TeacherContext("hint.text", "{{ prompt }} [{{ context }}]")


def characters(marks: tuple[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer of one id a character, whose template writes these before and after a message."""
    vocab = {token: i for i, token in enumerate([*marks, *(chr(c) for c in range(10, 127))])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="?"))
    backend.decoder = decoders.Fuse()
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
    template = (
        "{% for m in messages %}BEGIN{{ m['role'][0] }}:{{ m['content'] }}END{% endfor %}"
        "{% if add_generation_prompt %}BEGIN{% endif %}"
    ).replace("BEGIN", marks[0])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template.replace("END", marks[1]),
        unk_token="?",
        eos_token=marks[1],
        additional_special_tokens=[marks[0]],
    )


STUDENT, TEACHER = characters(("<s>", "</s>")), characters(("<t>", "</t>"))


@pytest.fixture
def load(tmp_path):
    def load(
        context: TeacherContext | None, rows=ROWS, most: int | None = None, **section
    ) -> Prompts:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        reader = None if context is None else TeacherReader(TEACHER, None, context, most)
        return load_prompts(str(path), STUDENT, DataSection(**section), "answer", reader)

    return load


def read(prompts: Prompts) -> list[str]:
    """What the teacher reads."""
    return [TEACHER.decode(ids) for ids in prompts.teacher_token_ids]


def test_the_teacher_reads_the_context_and_the_student_does_not(load):
    prompts, without = load(SOLUTION), load(None)
    assert read(prompts) == [
        "<t>u:1+1? [one more than one]</t><t>",
        "<t>u:2+2?</t><t>",
        "<t>u:3+3? [twice three]</t><t>",
        "<t>u:4+4?</t><t>",
    ]
    assert prompts.contexts == 2
    same = ("token_ids", "texts", "answers", "messages", "dropped")
    for name in same:
        ours, plain = getattr(prompts, name), getattr(without, name)
        assert ours == plain if name == "dropped" else [*ours] == [*plain], name
    assert not any("one more" in STUDENT.decode(ids) for ids in prompts.token_ids)


def test_a_context_counts_even_if_both_read_by_the_same_rules(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(ROWS[0]))
    reader = TeacherReader(STUDENT, None, SOLUTION)
    prompts = load_prompts(str(path), STUDENT, DataSection(), None, reader)
    assert STUDENT.decode(prompts.teacher_token_ids[0]).endswith("[one more than one]</s><s>")
    assert STUDENT.decode(prompts.token_ids[0]) == "<s>u:1+1?</s><s>"


@pytest.mark.parametrize(
    ("system", "ours", "theirs"),
    [
        (None, "<s>u:1+1?</s><s>", "<t>s:Be kind.</t><t>u:1+1?</t><t>"),
        ("Be brief.", "<s>s:Be brief.</s><s>u:1+1?</s><s>", "<t>s:Be kind.</t><t>u:1+1?</t><t>"),
    ],
)
def test_the_teacher_has_a_system_message_of_its_own(load, system, ours, theirs):
    prompts = load(TeacherContext(system="Be kind."), ROWS[:1], system=system)
    assert (STUDENT.decode(prompts.token_ids[0]), read(prompts)) == (ours, [theirs])


def test_it_takes_the_place_of_a_prompts_own(load):
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    prompts = load(TeacherContext(system="Be kind."), [{"prompt": said, "answer": "2"}])
    assert read(prompts) == ["<t>s:Be kind.</t><t>u:1+1?</t><t>"]


def test_a_context_that_does_not_fit(load):
    """A prompt of n characters has n + 5 tokens for the teacher, and three more for brackets."""
    rows = [
        {"prompt": "1+1?", "answer": "2", "hint": {"text": "abcdef"}},
        {"prompt": "2+2?", "answer": "4", "hint": {"text": "abcdefg"}},
    ]
    whole = len("1+1? [abcdef]") + 5
    dropped = load(SOLUTION, rows, most=whole)
    assert ([*dropped.answers], dropped.dropped, dropped.cut) == (["2"], 1, 0)
    cutting = TeacherContext(SOLUTION.column, SOLUTION.template, cut=True)
    for most in range(whole - 5, whole + 2):
        prompts = load(cutting, rows, most=most)
        kept = [min(len(row["hint"]["text"]), 6 - (whole - most)) for row in rows]
        expected = [
            f"<t>u:{row['prompt']} [{row['hint']['text'][:n]}]</t><t>"
            for row, n in zip(rows, kept, strict=True)
        ]
        assert read(prompts) == expected
        whole_ones = [n == len(row["hint"]["text"]) for row, n in zip(rows, kept, strict=True)]
        assert prompts.cut == len(rows) - sum(whole_ones)
    with pytest.raises(ValueError, match="no prompt is left"):  # brackets around nothing
        load(cutting, rows, most=whole - 6)


def test_nothing_is_left_if_no_context_fits(load):
    with pytest.raises(ValueError, match=r"no prompt is left: 4 .* = 1024 or, for the"):
        load(SOLUTION, most=3)


def test_a_students_limit_holds_whatever_the_teachers_is(load):
    prompts = load(
        SOLUTION, [*ROWS, {**ROWS[0], "prompt": "1" * 30}], most=99, max_prompt_tokens=20
    )
    assert (len(prompts), prompts.dropped) == (4, 1)


def test_rows_that_differ_in_their_context_are_no_duplicates(load):
    other = {**ROWS[0], "hint": {"text": "a pair of ones"}}
    assert load(SOLUTION, [ROWS[0], other, ROWS[0]]).duplicates == 1
    assert load(None, [ROWS[0], other, ROWS[0]]).duplicates == 2


@pytest.mark.parametrize(
    ("context", "rows", "message"),
    [
        ({"template": "{{ prompt }}"}, ROWS, r"context_template: .* leaves out {{ context }}$"),
        ({"template": "{{ context }} {{ hint }}"}, ROWS, r"'hint' is unknown; it has `prompt` and"),
        ({"template": "{{ context "}, ROWS, r"^teacher.context_template: unexpected end"),
        ({"template": "{{ context.__class__ }}"}, ROWS, r"'prompt': teacher.context_template: "),
        ({"column": "hints"}, ROWS, r"line 1: no column 'hints'; columns: answer, hint, prompt"),
        ({"column": "hint"}, ROWS, r"line 1: column 'hint' is \{\"text\": .*; a context is text"),
        ({}, ROWS[1:2], r"column 'hint.text' \(teacher.context_column\) is null or blank in every"),
        ({}, [{**ROWS[0], "hint": {"text": "\ud800"}}], r"line 1: column 'hint.text' has "),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_line(load, context, rows, message):
    given = {"column": "hint.text", "template": "{{ context }}", **context}
    with pytest.raises(ValueError, match=message) as error:
        load(TeacherContext(**given), rows)
    assert "\n" not in str(error.value)


def test_another_context_is_another_entry_of_the_cache(load):
    """Or a run would go on with what an earlier one has tokenised."""
    contexts = [SOLUTION, TeacherContext("hint.text"), TeacherContext("answer")]
    assert len({str(read(load(context))) for context in [*contexts, SOLUTION]}) == 3
