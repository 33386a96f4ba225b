"""A configuration compared with itself, with the models, the tokenizers and the files it names.

Nothing here builds a model or needs a process group.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig

from megatron_taopd.config.schema import (
    Config,
    EvalSection,
    ParallelSection,
    ServersSection,
    check_bounds,
)
from megatron_taopd.data.rendering import Renderer
from megatron_taopd.data.rows import read_texts
from megatron_taopd.data.sources import sources_of
from megatron_taopd.data.vocab_map import MIN_SHARED, VocabMap, Vocabulary
from megatron_taopd.formats.hf import INDEX, SINGLE, weight_map
from megatron_taopd.formats.hf_map import listed
from megatron_taopd.formats.output_head import find_head
from megatron_taopd.preflight import rules
from megatron_taopd.step.loss import LOSSES
from megatron_taopd.step.selection import CONCENTRATES, SELECTORS

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SAMPLED_RECORDS = 1000  # of the prompts, to see how much two tokenizers share


def check(config: Config, world_size: int) -> None:
    """Refuse a configuration that cannot run on `world_size` ranks.

    Reads config.json and the tokenizer of both models, and the first prompts if the tokenizers
    differ, and looks whether files are there; builds no model, needs no process group.

    Raises:
        ValueError: one line with the key, its value and what would be right.
    """
    _check_values(config)
    _check_files(config)
    _check_model("student", config, world_size)
    _check_model("teacher", config, world_size)
    _check_batch(config, world_size)
    _check_vocabulary(config)


def _check_values(config: Config) -> None:
    check_bounds(config)
    if (experts := config.student.parallel.ep) != 1:
        raise ValueError(
            f"student.parallel.ep: {experts}; it has to be 1: a mixture of experts can be a "
            "teacher only"
        )
    names = {
        "selection.selector": (config.selection.selector, SELECTORS),
        "loss.kind": (config.loss.kind, LOSSES),
    }
    for key, (name, known) in names.items():
        if name not in known:
            raise ValueError(f"{key}: {name!r} is unknown; one of {', '.join(known)}")
    selection = config.selection
    if selection.concentrate and selection.selector not in CONCENTRATES:
        raise ValueError(
            f"selection.concentrate: {selection.concentrate} with selector {selection.selector}, "
            f"which has no priorities to add up; one of {', '.join(CONCENTRATES)} is needed"
        )
    if selection.ratio > 1 - selection.concentrate:
        raise ValueError(
            f"selection.concentrate: {selection.concentrate} leaves fewer rows than "
            f"selection.ratio {selection.ratio} keeps; it has to be at most {1 - selection.ratio:g}"
        )
    rules.check_replay(config)
    rollout = config.rollout
    if rollout.horizon not in ("none", "auto"):
        if not isinstance(rollout.horizon, int) or rollout.horizon < 1:
            raise ValueError(
                f"rollout.horizon: {rollout.horizon!r}; none, auto or a number of tokens is needed"
            )
        if rollout.horizon > rollout.max_new_tokens:
            raise ValueError(
                f"rollout.horizon: {rollout.horizon} is more than rollout.max_new_tokens "
                f"{rollout.max_new_tokens}"
            )
    _check_engines(config)
    _check_evaluation(config.eval)
    if config.loss.kind == "sampled_token":
        plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        for name, wanted in plain.items():
            if (value := getattr(rollout, name)) != wanted:
                raise ValueError(
                    f"rollout.{name}: {value} with loss.kind sampled_token, whose importance ratio "
                    f"is that of unwarped sampling; it has to be {wanted}"
                )
    lr, min_lr, decay = config.optimizer.lr, config.optimizer.min_lr, config.optimizer.decay
    if (min_lr is None) != (decay == "constant"):
        raise ValueError(
            f"optimizer.min_lr: {min_lr} with optimizer.decay {decay}; "
            "cosine and linear need the rate they end at, constant needs null"
        )
    if min_lr is not None and min_lr > lr:
        raise ValueError(f"optimizer.min_lr: {min_lr} is above optimizer.lr {lr}")
    for model in ("student", "teacher"):
        rules.check_sequence_parallel(model, getattr(config, model).parallel)


def _check_evaluation(section: EvalSection) -> None:
    if section.samples > 1 and section.temperature == 0:
        raise ValueError(
            f"eval.samples: {section.samples} with eval.temperature 0, at which they are all the "
            "same; it has to be 1, or the temperature above 0"
        )
    for k in section.pass_at:
        if not 1 <= k <= section.samples:
            raise ValueError(
                f"eval.pass_at: {k}; it has to be between 1 and eval.samples {section.samples}"
            )
    if section.grader == "math" and find_spec("math_verify") is None:
        raise ValueError(
            "eval.grader: math, which needs Math-Verify: pip install '.[math]', or use exact"
        )


def _check_engines(config: Config) -> None:
    rollout, teacher = config.rollout, config.teacher
    if rollout.engine == "sglang":
        _check_servers("rollout", rollout.servers)
    elif rollout.ahead:
        raise ValueError(
            f"rollout.ahead: {rollout.ahead} with rollout.engine local, which generates in the "
            "ranks that train; it has to be 0, or the engine sglang"
        )
    if rollout.sync.release_memory and rollout.ahead:
        raise ValueError(
            "rollout.sync.release_memory: true with rollout.ahead 1: servers that generate while "
            "the student trains cannot give their memory back; one of them has to be off"
        )
    if teacher.engine == "megatron":
        return
    _check_servers("teacher", teacher.servers)
    if teacher.parallel != ParallelSection() or teacher.offload:
        raise ValueError(
            "teacher.parallel and teacher.offload are of teacher.engine megatron; leave them out "
            "with sglang, whose layout is teacher.servers.tp and replicas"
        )
    if teacher.form == "topk" and teacher.topk < config.selection.k:
        raise ValueError(
            f"teacher.topk: {teacher.topk} is less than selection.k {config.selection.k}; several "
            "times that is better"
        )
    shared = set(rollout.servers.gpus or ()) & set(teacher.servers.gpus or ())
    if rollout.engine == "sglang" and shared:
        raise ValueError(
            f"teacher.servers.gpus: {listed(sorted(shared))} are also in rollout.servers.gpus"
        )


# Of servers that a run starts itself. (With those that are there, the plan asks for `tp`.)
_OF_OWN_SERVERS = (
    "replicas", "gpus", "host", "context_length", "max_running_requests", "max_total_tokens",
    "mem_fraction", "args",
)  # fmt: skip


def _check_servers(model: str, servers: ServersSection) -> None:
    key = f"{model}.servers"
    if find_spec("sglang") is None:
        raise ValueError(
            f"{model}.engine: sglang, which is not installed: pip install '.[sglang]' with CUDA, "
            "requirements/sglang-cpu.txt without"
        )
    for name in _OF_OWN_SERVERS if servers.urls else ():
        value = getattr(servers, name)
        if value != getattr(ServersSection, name):
            value = listed(value) if isinstance(value, tuple) else value
            raise ValueError(
                f"{key}.{name}: {value} with {key}.urls, whose servers the run does not start; "
                "leave one of them out"
            )
    wanted = servers.replicas * servers.tp
    if servers.gpus is not None and len(set(servers.gpus)) != wanted:
        raise ValueError(
            f"{key}.gpus: {listed(servers.gpus)}; {key}.replicas {servers.replicas} × "
            f"tp {servers.tp} take {wanted} different ones"
        )
    for url in servers.urls:
        if not re.fullmatch(r"https?://[^/]+", url):
            raise ValueError(f"{key}.urls: {url!r}; http://HOST:PORT is expected")
    if servers.api_key_env is not None and servers.api_key_env not in os.environ:
        raise ValueError(f"{key}.api_key_env: {servers.api_key_env} is not set")


def _check_files(config: Config) -> None:
    if Path(config.run.dir).exists() and not Path(config.run.dir).is_dir():
        raise ValueError(f"run.dir: {config.run.dir} is a file; give a directory")
    for key, prompts in (
        ("data.prompts", config.data.prompts),
        ("eval.prompts", config.eval.prompts),
    ):
        if prompts is None:
            continue
        try:
            sources = sources_of(prompts)
            for source in sources:
                source.files()
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        if key == "eval.prompts" and len(sources) > 1:
            raise ValueError(
                f"{key}: {prompts}; weights say how often training draws from a file, and every "
                "held-out prompt is asked: give a list of paths"
            )
    for model in ("student", "teacher"):
        key, path = f"{model}.path", Path(getattr(config, model).path)
        wanted = "give a Hugging Face checkpoint directory"
        if not path.is_dir():
            raise ValueError(f"{key}: {path}: no such directory; {wanted}")
        if not (path / "config.json").is_file():
            raise ValueError(f"{key}: {path} has no config.json; {wanted}")
        if not any((path / name).is_file() for name in _TOKENIZER_FILES):
            raise ValueError(
                f"{key}: {path} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); "
                "copy the files of the model's own tokenizer there"
            )
        teacher = config.teacher
        if model == "teacher" and teacher.engine == "sglang" and teacher.form == "topk":
            continue  # nothing is read of its weights
        if (path / INDEX).is_file():
            _read_json(key, path / INDEX)
        elif not (path / SINGLE).is_file():
            raise ValueError(
                f"{key}: {path / SINGLE} is missing; {wanted} with safetensors weights"
            )
        try:
            weight_map(path)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None


def _check_model(model: str, config: Config, world_size: int) -> None:
    section = getattr(config, model)
    key, path, parallel = f"{model}.path", section.path, section.parallel

    _read_json(key, Path(path) / "config.json")
    read = partial(AutoConfig.from_pretrained, local_files_only=True, trust_remote_code=False)
    hf = _read_pretrained(read, key, path)
    served = model == "teacher" and section.engine == "sglang"  # whatever SGLang can run
    if not served:
        rules.check_model(model, path, hf)
        rules.check_grid(model, path, parallel, hf, world_size, "the number of ranks,")
    else:
        hf = hf.get_text_config()
        if section.form == "hidden_states":
            _check_head(key, path)
        rules.check_ranks(model, parallel, hf, world_size, "the number of ranks,")

    responses = {"rollout.max_new_tokens": config.rollout.max_new_tokens}
    if model == "student" and config.eval.max_new_tokens is not None:
        responses["eval.max_new_tokens"] = config.eval.max_new_tokens
    for response_key, response in responses.items():
        longest = config.data.max_prompt_tokens + response
        if longest > (getattr(hf, "max_position_embeddings", None) or longest):  # or no limit
            raise ValueError(
                f"{response_key}: {response} after data.max_prompt_tokens "
                f"{config.data.max_prompt_tokens} make {longest} tokens; {path} takes "
                f"{hf.max_position_embeddings}"
            )
    rules.check_micro_batch(config, parallel)


def _check_head(key: str, path: str) -> None:
    try:
        find_head(path)
    except ValueError as error:
        raise ValueError(f"{key}: {error}; take teacher.form: topk") from None


def _read_json(key: str, path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{key}: {path}: not JSON: {error}") from None


def _read_pretrained(read: Callable, key: str, path: str):
    try:
        return read(path)
    except Exception as error:  # whatever transformers trips over in the user's files
        reason = " ".join(str(error).split())
        raise ValueError(f"{key}: {path}: transformers cannot read it: {reason}") from error


def _check_batch(config: Config, world_size: int) -> None:
    sequences = config.rollout.prompts * config.rollout.samples
    data_parallel = world_size // (config.student.parallel.tp * config.student.parallel.pp)
    rules.check_sequences(config, data_parallel)
    if config.train.mini_batches > sequences:
        raise ValueError(
            f"train.mini_batches: {config.train.mini_batches} is more than the {sequences} "
            "sequences of a step (rollout.prompts × rollout.samples)"
        )


def _check_vocabulary(config: Config) -> None:
    vocabularies = []
    for model in ("student", "teacher"):
        key, path = f"{model}.path", getattr(config, model).path
        vocabulary = _read_pretrained(Vocabulary.from_pretrained, key, path)
        if (last := max(vocabulary.tokenizer.get_vocab().values())) >= vocabulary.size:
            raise ValueError(
                f"{key}: {path}: the tokenizer's id {last} lies outside the model's vocabulary of "
                f"{vocabulary.size}"
            )
        vocabularies.append(vocabulary)
    student, teacher = vocabularies
    vocab_map = VocabMap.between(student.ending_at(config.rollout.stop_token_ids), teacher)
    for index in config.rollout.stop_token_ids:
        if not 0 <= index < vocab_map.size:
            raise ValueError(
                f"rollout.stop_token_ids: {index} is not an id of the vocabulary, "
                f"0 … {vocab_map.size - 1}"
            )
    if config.teacher.prompt == "student" and not vocab_map.is_identity:
        raise ValueError(
            f"teacher.prompt: student, but ids of {config.student.path} mean something else to "
            f"{config.teacher.path}; it has to be own"
        )
    data, own = config.data, config.teacher.template_kwargs
    rendering = {config.student.path: (student, data.template_kwargs, "data")}
    if config.teacher.prompt == "own":
        kwargs = data.template_kwargs if own is None else own
        rendering[config.teacher.path] = (teacher, kwargs, "teacher")
    elif own is not None:
        raise ValueError(
            f"teacher.template_kwargs: {own}, but the teacher reads the student's rendering "
            "(teacher.prompt: student); take it out"
        )
    for path, (vocabulary, kwargs, section) in rendering.items():
        if data.template == "chat" and not vocabulary.tokenizer.chat_template:
            raise ValueError(
                f"data.template: chat, but the tokenizer of {path} has no chat template; use plain"
            )
        Renderer(vocabulary.tokenizer, data.template, kwargs, f"{section}.template_kwargs")
    if not vocab_map.is_identity:
        _check_shared_tokens(config, student, vocab_map)
    if config.selection.k > len(vocab_map.common):
        raise ValueError(
            f"selection.k: {config.selection.k} is more than the {len(vocab_map.common)} ids that "
            "both vocabularies have"
        )


def _check_shared_tokens(config: Config, student: Vocabulary, vocab_map: VocabMap) -> None:
    """Refuse a pair whose tokenizers cut text differently, by the first prompts and answers."""
    data = config.data
    texts = read_texts(data.prompts, data.prompt_column, data.answer_column, _SAMPLED_RECORDS)
    encode = partial(student.tokenizer, add_special_tokens=False, split_special_tokens=True)
    ids = [i for text in texts for i in encode(text)["input_ids"]]
    shared = int((vocab_map.to_teacher(torch.tensor(ids, dtype=torch.int64)) >= 0).sum())
    if shared < MIN_SHARED * len(ids):
        raise ValueError(
            f"teacher.path: {config.teacher.path}: of {len(ids)} tokens of prompts and answers in "
            f"data.prompts, {shared} ({shared / len(ids):.2%}) have a counterpart in its "
            f"vocabulary; at least {MIN_SHARED:.0%} have to"
        )
