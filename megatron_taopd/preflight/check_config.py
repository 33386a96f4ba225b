"""A configuration compared with what the models' own files say: sizes, tokenizers, vocabularies.

Nothing here builds a model or needs a process group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import AutoConfig

from megatron_taopd.config.schema import Config, StudentSection, TeacherSection
from megatron_taopd.data.rendering import Renderer
from megatron_taopd.data.rows import read_texts
from megatron_taopd.data.texts import teacher_reader
from megatron_taopd.data.vocab_map import MIN_SHARED, VocabMap, Vocabulary
from megatron_taopd.formats.hf_map import longest_sequence
from megatron_taopd.formats.output_head import find_head
from megatron_taopd.preflight import rules

_SAMPLED_RECORDS = 1000  # of the prompts, to see how much two tokenizers share


def check(config: Config, world_size: int) -> None:
    """Refuse a configuration that cannot run on `world_size` ranks.

    Comes after `config.values.check_values`: reads config.json and the tokenizer of every model,
    and the first prompts if the tokenizers differ; builds no model, needs no process group.

    Raises:
        ValueError: one line with the key, its value and what would be right.
    """
    for model in config.models:
        _check_model(model, config, world_size)
    student = _read_vocabulary("student", config)
    for key in config.each_teacher:
        _check_vocabulary(config, key, student)


def _check_model(model: str, config: Config, world_size: int) -> None:
    section = config.models[model]
    key, path, parallel = f"{model}.path", section.path, section.parallel

    read = partial(AutoConfig.from_pretrained, local_files_only=True, trust_remote_code=False)
    hf = _read_pretrained(read, key, path)
    if not (isinstance(section, TeacherSection) and section.engine == "sglang"):
        rules.check_model(model, path, hf)
        rules.check_grid(model, path, parallel, hf, world_size)
        if isinstance(section, StudentSection):
            rules.check_routers(section, hf)
    else:  # whatever SGLang can run
        hf = hf.get_text_config()
        if section.form == "hidden_states":
            _check_head(key, path)

    responses = {"rollout.max_new_tokens": config.rollout.max_new_tokens}
    if model == "student" and config.eval.max_new_tokens is not None:
        responses["eval.max_new_tokens"] = config.eval.max_new_tokens
    prompt_key, prompt = config.prompt_limit(model)
    for response_key, response in responses.items():
        longest = prompt + response
        if longest > longest_sequence(hf):
            raise ValueError(
                f"{response_key}: {response} after {prompt_key} {prompt} make {longest} tokens; "
                f"{path} takes {longest_sequence(hf)}"
            )


def _check_head(key: str, path: str) -> None:
    try:
        find_head(path)
    except ValueError as error:
        form = key.replace(".path", ".form")
        raise ValueError(f"{key}: {error}; take {form}: topk") from None


def _read_pretrained(read: Callable, key: str, path: str):
    try:
        return read(path)
    except Exception as error:  # whatever transformers trips over in the user's files
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{key}: {path}: transformers cannot read it: {reason}; fetch the model's own "
            "file again"
        ) from error


def _read_vocabulary(model: str, config: Config) -> Vocabulary:
    key, path = f"{model}.path", config.models[model].path
    vocabulary = _read_pretrained(Vocabulary.from_pretrained, key, path)
    if (last := max(vocabulary.tokenizer.get_vocab().values())) >= vocabulary.size:
        raise ValueError(
            f"{key}: {path}: the tokenizer's id {last} lies outside the model's vocabulary of "
            f"{vocabulary.size}"
        )
    return vocabulary


def _check_vocabulary(config: Config, key: str, student: Vocabulary) -> None:
    section, teacher = config.each_teacher[key], _read_vocabulary(key, config)
    vocab_map = VocabMap.between(student.ending_at(config.rollout.stop_token_ids), teacher)
    for index in config.rollout.stop_token_ids:
        if not 0 <= index < vocab_map.size:
            raise ValueError(
                f"rollout.stop_token_ids: {index} is not an id of the vocabulary; give one of "
                f"0 … {vocab_map.size - 1}"
            )
    if section.prompt == "student" and not vocab_map.is_identity:
        raise ValueError(
            f"{key}.prompt: student, but ids of {config.student.path} mean something else to "
            f"{section.path}; it has to be own"
        )
    data, own = config.data, section.template_kwargs
    rendering = [(config.student.path, student, data.template_kwargs, "data")]
    if (reader := teacher_reader(section, teacher)) is not None:
        reader.context.check()
        kwargs = data.template_kwargs if own is None else own
        rendering.append((section.path, teacher, kwargs, key))
    for path, vocabulary, kwargs, whose in rendering:
        if data.template == "chat" and not vocabulary.tokenizer.chat_template:
            raise ValueError(
                f"data.template: chat, but the tokenizer of {path} has no chat template; use plain"
            )
        Renderer(vocabulary.tokenizer, data.template, kwargs, f"{whose}.template_kwargs")
    if not vocab_map.is_identity:
        _check_shared_tokens(config, key, student, vocab_map)
    if config.selection.k > len(vocab_map.common):
        raise ValueError(
            f"selection.k: {config.selection.k} is more than the {len(vocab_map.common)} ids that "
            f"the vocabularies of student and {key} have; give at most that"
        )


def _check_shared_tokens(
    config: Config, key: str, student: Vocabulary, vocab_map: VocabMap
) -> None:
    """Refuse a pair whose tokenizers cut text differently, by the first prompts and answers."""
    data = config.data
    texts = read_texts(data.prompts, data.prompt_column, data.answer_column, _SAMPLED_RECORDS)
    encode = partial(student.tokenizer, add_special_tokens=False, split_special_tokens=True)
    ids = [i for text in texts for i in encode(text)["input_ids"]]
    shared = int((vocab_map.to_teacher(torch.tensor(ids, dtype=torch.int64)) >= 0).sum())
    if shared < MIN_SHARED * len(ids):
        raise ValueError(
            f"{key}.path: {config.models[key].path}: of {len(ids)} tokens of prompts and answers "
            f"in data.prompts, {shared} ({shared / len(ids):.2%}) have a counterpart in its "
            f"vocabulary; at least {MIN_SHARED:.0%} have to"
        )
