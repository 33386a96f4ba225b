"""Tokenizers, templates and prompts: what a run would see only in its curves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from megatron_taopd.config.schema import RolloutSection, TeacherSection
from megatron_taopd.data.prompts import Prompts
from megatron_taopd.data.rendering import special_tokens
from megatron_taopd.data.vocab_map import VocabMap, Vocabulary
from megatron_taopd.preflight.findings import Finding, error, ok, warning

MANY_DROPPED = 0.05
SHOWN = 240  # characters of the example


def check_vocabularies(
    student: Vocabulary, teacher: Vocabulary, key: str = "teacher"
) -> Iterator[Finding]:
    """Check how ids are paired, and which of them end a turn.

    Args:
        student: ends at the run's stop ids, too.
        key: of the teacher's section.

    Raises:
        ValueError: the pair cannot be mapped.
    """
    vocab_map = VocabMap.between(student, teacher)
    vocabularies = "vocabularies" if key == "teacher" else f"vocabularies of student and {key}"
    if vocab_map.is_identity:
        yield ok(f"{vocabularies}: the same {vocab_map.size} ids")
    else:
        common = len(vocab_map.common)
        roles = teacher.roles()
        by_role = ", ".join(
            f"{role} {_names(student, [i])} = {_names(teacher, [roles[role]])}"
            for role, i in student.roles().items()
            if role in roles
        )
        yield ok(
            f"{vocabularies}: {common} ids in common, {vocab_map.size - common} of the student's "
            f"masked; by their role: {by_role or 'none'}"
        )
    templates = [bool(v.tokenizer.chat_template) for v in (student, teacher)]
    if templates[0] != templates[1]:
        without = key if templates[0] else "student"
        yield warning(
            f"{without}.path: no chat template, which the other model has",
            "data.template: plain for both, or a checkpoint with its template",
        )
    own = [*check_ends("student", student, "rollout.stop_token_ids")]
    yield from own
    if all(finding.level == "ok" for finding in own):
        yield from check_taught_end(student, teacher, vocab_map)
    if (
        teacher.eos_token_ids
    ):  # it writes no responses: its ends say which of its tokens are the student's
        yield from check_ends(key, teacher, "eos_token_id in its generation_config.json")


def check_taught_end(
    student: Vocabulary, teacher: Vocabulary, vocab_map: VocabMap
) -> Iterator[Finding]:
    """Check whether a response of the student ends where the teacher teaches it to.

    Those of a base model do not.
    """
    if (end_of_turn := teacher.after_an_answer()) is None:
        return
    taught = (vocab_map.teacher_ids == end_of_turn).nonzero()[:, 0].tolist()
    if taught and taught[0] not in student.eos_token_ids:
        yield warning(
            f"student.path: the teacher ends an answer with {_names(teacher, [end_of_turn])}, "
            f"which ends no response of the student, as {_names(student, taught)}: the more it "
            "learns, the more of them grow to rollout.max_new_tokens",
            f"add {taught[0]} to rollout.stop_token_ids",
        )


def check_ends(model: str, vocabulary: Vocabulary, remedy_key: str) -> Iterator[Finding]:
    """Compare what ends a response with what the chat template and the tokenizer say does."""
    key, tokenizer = f"{model}.path", vocabulary.tokenizer
    if not vocabulary.eos_token_ids:
        yield error(
            f"{key}: no id ends a response: every one runs to rollout.max_new_tokens",
            f"set {remedy_key}",
        )
        return
    yield ok(f"{key}: responses end at {_names(vocabulary, vocabulary.eos_token_ids)}")
    end_of_turn = vocabulary.after_an_answer()
    if end_of_turn is not None and end_of_turn not in vocabulary.eos_token_ids:
        yield warning(
            f"{key}: its chat template ends an answer with {_names(vocabulary, [end_of_turn])}, "
            "which ends no response: they grow to rollout.max_new_tokens",
            f"add {end_of_turn} to {remedy_key}",
        )
    eos = tokenizer.eos_token_id
    if eos is not None and eos not in vocabulary.eos_token_ids and eos != end_of_turn:
        yield warning(
            f"{key}: the tokenizer's end {_names(vocabulary, [eos])} ends no response",
            f"add {eos} to {remedy_key}, if the model writes it",
        )


def _names(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    tokens = vocabulary.tokenizer.convert_ids_to_tokens(list(ids))
    return ", ".join(f"{token!r} ({i})" for token, i in zip(tokens, ids, strict=True))


def check_prompts(
    key: str,
    prompts: Prompts,
    student: Vocabulary,
    teacher: Vocabulary,
    max_tokens: int,
    teacher_max_tokens: int | None = None,
) -> Iterator[Finding]:
    """Check lengths, doubles, special tokens, and the first one as the student reads it.

    Args:
        key: of the file.
        prompts: all of them, whatever their length.
        max_tokens: above which the run drops one.
        teacher_max_tokens: for the teacher; None: the same.
    """
    limits = {"student": max_tokens, "teacher": teacher_max_tokens or max_tokens}
    lengths = {"student": list(map(len, prompts.token_ids))}
    if prompts.teacher_token_ids is not None:
        lengths["teacher"] = list(map(len, prompts.teacher_token_ids))
    over = [[n > limits[model] for n in counts] for model, counts in lengths.items()]
    dropped = sum(map(any, zip(*over, strict=True)))
    longest = ", ".join(f"{max(each)} for the {model}" for model, each in lengths.items())
    yield ok(f"{key}: {len(prompts)} prompts; the longest has {longest} tokens")
    if dropped:
        each = ", ".join(
            f"{sum(counts)} for the {model}" for model, counts in zip(lengths, over, strict=True)
        )
        limit = "data.max_prompt_tokens"
        if teacher_max_tokens and sum(over[-1]) > sum(over[0]):
            limit = "teacher.max_prompt_tokens"
        most = teacher_max_tokens if limit.startswith("teacher") else max_tokens
        seen = f"{key}: {dropped / len(prompts):.1%} are over {limit} {most}"
        if dropped == len(prompts):
            yield error(f"{seen} ({each})", f"a larger {limit}: none is left")
        elif dropped > MANY_DROPPED * len(prompts):
            yield warning(f"{seen} ({each}) and dropped", f"a larger {limit}")
        else:
            yield ok(f"{seen} ({each}) and dropped")
    if prompts.duplicates:
        yield ok(f"{key}: {prompts.duplicates} rows repeat another with its answer; left out")
    if empty := sum(not text.strip() for text in prompts.texts):
        yield warning(f"{key}: {empty} prompts have no text", "take them out")
    if doubles := len(prompts) - len(set(prompts.texts)):
        most, times = Counter(prompts.texts).most_common(1)[0]
        yield warning(
            f"{key}: {doubles} prompts repeat another one ({most[:40]!r} comes {times} times)",
            "intended? else take them out",
        )
    specials = special_tokens(student.tokenizer)
    if spelled := sum(any(token in text for token in specials) for text in prompts.texts):
        yield ok(f"{key}: {spelled} prompts spell a special token, which stays text")
    ids = torch.tensor([i for each in prompts.token_ids[:1000] for i in each])
    vocab_map = VocabMap.between(student, teacher)
    if not vocab_map.is_identity:
        share = (vocab_map.to_teacher(ids) >= 0).float().mean()
        yield ok(f"{key}: the teacher has {share:.2%} of the tokens of the first prompts")
    first, bos = prompts.token_ids[0], student.tokenizer.bos_token_id
    if bos is not None and first[:2] == [bos, bos]:
        yield warning(
            f"{key}: prompts begin with {_names(student, [bos])} twice",
            "take it out of the chat template, or of the tokenizer (add_bos_token)",
        )
    yield ok(f"{key}: the first one reads {_shown(student, first)}")


def _shown(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    text = vocabulary.tokenizer.decode(ids, skip_special_tokens=False)
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
    return repr(text)


def check_references(section: RolloutSection, prompts: Prompts) -> Iterator[Finding]:
    """Tell how long reference responses are, and what share of the sequences they will be."""
    if prompts.references is None:
        return
    lengths, longest = prompts.references.lengths(), section.max_new_tokens
    share, warmup = (section.mix or {}).get("dataset", 0.0), section.warmup_steps
    valid = "all valid"
    if prompts.valid is not None:
        valid = f"{prompts.valid.values.mean():.1%} valid"
    yield ok(
        f"data.response_column: {lengths.mean():.0f} tokens on average, {valid}; "
        f"{share:.1%} of the sequences are references"
        + (f", and all of the first {warmup} steps" if warmup else "")
    )
    over = int((lengths > longest).sum())
    if over > MANY_DROPPED * len(lengths):
        yield warning(
            f"data.response_column: {over / len(lengths):.1%} are longer than "
            f"rollout.max_new_tokens {longest} and cut there",
            "more of these",
        )
    elif over:
        yield ok(f"data.response_column: {over} are cut at rollout.max_new_tokens {longest}")


def check_contexts(
    key: str, section: TeacherSection, prompts: Prompts, teacher: Vocabulary, max_tokens: int
) -> Iterator[Finding]:
    """Tell how many prompts have a context, how many of them are too long, and what one reads.

    Args:
        key: of the teacher's section.
        prompts: all of them, whatever their length.
        max_tokens: of a prompt for the teacher.
    """
    if (column := section.context_column) is None or prompts.teacher_token_ids is None:
        return
    key = f"{key}.context_column"
    yield ok(f"{key}: {prompts.contexts} of {len(prompts)} have a {column!r}")
    if over := sum(len(ids) > max_tokens for ids in prompts.teacher_token_ids):
        what = "cut" if section.context_overflow == "cut" else "dropped"
        seen = f"{key}: {over} make the prompt longer than {max_tokens} tokens"
        tell = warning if over > MANY_DROPPED * len(prompts) else ok
        remedy = (
            (f"a larger {key.replace('context_column', 'max_prompt_tokens')}",)
            if tell is warning
            else ()
        )
        yield tell(f"{seen}; they are {what}", *remedy)
    first = _shown(teacher, prompts.teacher_token_ids[0])
    yield ok(f"{key}: the teacher reads the first one as {first}")


def check_held_out(prompts: Prompts, held_out: Prompts) -> Iterator[Finding]:
    """Find held-out prompts that are trained on, too."""
    if both := len(set(held_out.texts) & set(prompts.texts)):
        yield warning(
            f"eval.prompts: {both} of {len(held_out)} are in data.prompts, too",
            "take them out of one of the files: accuracy on them is no measure",
        )
