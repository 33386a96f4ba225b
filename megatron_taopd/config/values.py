"""A configuration compared with itself, with this environment and with the files that it names.

Neither torch nor transformers is imported here, nor is anything read that takes long: a mistake of
a user is told before either is waited for. `preflight/check_config` compares the rest with what the
models' own files say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import fields
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

from megatron_taopd.config.schema import (
    CONCENTRATES,
    Config,
    EvalSection,
    Growth,
    LogSection,
    ParallelSection,
    RolloutSection,
    ServersSection,
    TeacherSection,
    check_bounds,
)
from megatron_taopd.config.speculative import check_speculative
from megatron_taopd.data.sources import sources_of
from megatron_taopd.formats.directory import check_directory
from megatron_taopd.formats.hub import is_model
from megatron_taopd.parallel.packing import batch_multiple


def check_values(config: Config, ranks: int | None = None) -> None:
    """Refuse a configuration that cannot run, as far as that is known without a model.

    Args:
        ranks: of the run; None where they are not known.

    Raises:
        ValueError: one line with the key, its value and what would be right.
    """
    check_sections(config)
    check_environment(config)
    check_files(config)
    check_layouts(config, ranks)


# ------------------------------------------------------------------------------------ the sections


def check_sections(config: Config) -> None:
    """Compare values with their bounds and with each other. Raises as `check_values`."""
    check_bounds(config)
    _check_routing(config)
    for key, teacher in config.each_teacher.items():
        _check_source(key, teacher, config.student.path)
        _check_context(key, teacher)
    _check_selection(config)
    _check_replay(config)
    _check_profile(config)
    _check_rollout(config)
    _check_patience(config)
    _check_engines(config)
    _check_evaluation(config.eval)
    _check_optimizer(config)
    for model, section in config.models.items():
        parallel = section.parallel
        if parallel.sequence and parallel.tp == 1:
            raise ValueError(
                f"{model}.parallel.sequence: true needs {model}.parallel.tp > 1, which is 1"
            )
    sequences = config.rollout.prompts * config.rollout.samples
    if config.train.mini_batches > sequences:
        raise ValueError(
            f"train.mini_batches: {config.train.mini_batches} is more than the {sequences} "
            "sequences of a step (rollout.prompts × rollout.samples); give at most that"
        )


def _check_selection(config: Config) -> None:
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


def _check_replay(config: Config) -> None:
    """Refuse a replay over several stages or mini-batches."""
    if config.train.schedule != "replay":
        return
    for key, value in (
        ("student.parallel.pp", config.student.parallel.pp),
        ("train.mini_batches", config.train.mini_batches),
    ):
        if value != 1:
            raise ValueError(
                f"train.schedule: replay with {key} {value}; it has to be 1, or the schedule "
                "two_pass"
            )


def _check_profile(config: Config) -> None:
    profile, steps = config.train.profile, config.train.steps
    for step in profile.steps:
        if not 1 <= step <= steps:
            raise ValueError(
                f"train.profile.steps: {step}; it has to be between 1 and train.steps {steps}"
            )
    for rank in profile.ranks:
        if rank < 0:
            raise ValueError(f"train.profile.ranks: {rank}; ranks are numbered from 0 on")


def _check_rollout(config: Config) -> None:
    rollout = config.rollout
    _check_horizon(rollout.horizon, rollout.max_new_tokens)
    check_speculative(rollout)
    _check_mix(config)
    if config.loss.kind == "sampled_token":
        plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        for name, wanted in plain.items():
            if (value := getattr(rollout, name)) != wanted:
                raise ValueError(
                    f"rollout.{name}: {value} with loss.kind sampled_token, whose importance ratio "
                    f"is that of unwarped sampling; it has to be {wanted}"
                )


def _check_mix(config: Config) -> None:
    """Refuse references that nobody has, and losses that need to know how they were sampled."""
    rollout, data = config.rollout, config.data
    for name in rollout.mix or ():
        if name != "dataset":
            raise ValueError(f"rollout.mix.{name}: unknown key; known here: dataset")
    if rollout.mix is not None and not 0 < (share := rollout.mix.get("dataset", 0.0)) <= 1:
        raise ValueError(f"rollout.mix.dataset: {share}; it has to be in (0, 1]")
    if data.excluded_column is not None and data.response_column is None:
        raise ValueError(
            f"data.excluded_column: {data.excluded_column!r}, but there are no reference "
            "responses; name data.response_column"
        )
    for key in ("mix", "warmup_steps"):
        if not (value := getattr(rollout, key)):
            continue
        if data.response_column is None:
            raise ValueError(
                f"rollout.{key}: {value} takes reference responses; name data.response_column"
            )
        if config.loss.kind == "sampled_token":
            raise ValueError(
                f"loss.kind: sampled_token with rollout.{key}: {value}: nobody has sampled a "
                "reference response, so that it has no importance ratio; take a divergence, or "
                "leave the references out"
            )


def _check_horizon(horizon: Any, longest: int) -> None:
    """Refuse a horizon that is none, or more than the longest response."""
    if horizon in ("none", "auto"):
        return
    if isinstance(horizon, dict):
        _check_growth(horizon)
        horizon = horizon["end"]
    elif not _is_count(horizon):
        raise ValueError(
            f"rollout.horizon: {horizon!r}; none, auto, a number of tokens or "
            "{start, end, steps} is needed"
        )
    if horizon > longest:
        raise ValueError(
            f"rollout.horizon: {horizon} is more than rollout.max_new_tokens {longest}; give at "
            "most that"
        )


def _check_growth(horizon: dict) -> None:
    needed = ("start", "end", "steps")
    names = [field.name for field in fields(Growth)]
    for name in horizon:
        if name not in names:
            raise ValueError(f"rollout.horizon.{name}: unknown key; known here: {', '.join(names)}")
    for name in needed:
        if not _is_count(value := horizon.get(name)):
            raise ValueError(
                f"rollout.horizon.{name}: {value!r}; a whole number from 1 on is needed"
            )
    if horizon["start"] > horizon["end"]:
        raise ValueError(
            f"rollout.horizon.start: {horizon['start']} is more than rollout.horizon.end "
            f"{horizon['end']}; a horizon grows"
        )
    if horizon["steps"] < 2:
        raise ValueError("rollout.horizon.steps: 1; growing takes 2 steps or more")
    if (growth := horizon.get("growth", "linear")) not in ("linear", "geometric"):
        raise ValueError(f"rollout.horizon.growth: {growth!r}; it has to be linear or geometric")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_patience(config: Config) -> None:
    """Refuse to wait for a request as long as for a whole run that hangs."""
    stall = config.watchdog.stall_timeout_s
    if not (stall and config.watchdog.heartbeat_timeout_s):
        return
    for name, section in config.served.items():
        if section.servers.timeout_s >= stall:
            raise ValueError(
                f"{name}.servers.timeout_s: {section.servers.timeout_s:g} is not less than "
                f"watchdog.stall_timeout_s {stall:g}, so that one request that hangs could end the "
                "run before it is sent again; give less, or more of the latter"
            )


def _check_optimizer(config: Config) -> None:
    lr, min_lr, decay = config.optimizer.lr, config.optimizer.min_lr, config.optimizer.decay
    if (min_lr is None) != (decay == "constant"):
        raise ValueError(
            f"optimizer.min_lr: {min_lr} with optimizer.decay {decay}; "
            "cosine and linear need the rate they end at, constant needs null"
        )
    if min_lr is not None and min_lr > lr:
        raise ValueError(
            f"optimizer.min_lr: {min_lr} is above optimizer.lr {lr}, from which it decays"
        )


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


def _check_engines(config: Config) -> None:
    rollout = config.rollout
    for key, section in config.served.items():
        _check_servers(key, section.servers)
    if rollout.ahead and rollout.engine != "sglang":
        raise ValueError(
            f"rollout.ahead: {rollout.ahead} with rollout.engine local, which generates in the "
            "ranks that train; it has to be 0, or the engine sglang"
        )
    if rollout.sync.release_memory and rollout.ahead:
        raise ValueError(
            f"rollout.sync.release_memory: true with rollout.ahead {rollout.ahead}: servers that "
            "generate while the student trains cannot give their memory back; one of them has to "
            "be off"
        )
    if rollout.partial:
        _check_partial(rollout)
    for key, teacher in config.each_teacher.items():
        if teacher.engine != "sglang":
            continue
        if teacher.parallel != ParallelSection() or teacher.offload:
            raise ValueError(
                f"{key}.parallel and {key}.offload are of {key}.engine megatron; leave them out "
                f"with sglang, whose layout is {key}.servers.tp and replicas"
            )
        if teacher.form == "topk" and teacher.topk < config.selection.k:
            raise ValueError(
                f"{key}.topk: {teacher.topk} is less than selection.k {config.selection.k}; "
                "several times that is better"
            )
    for (one, section), (other, its) in combinations(config.served.items(), 2):
        if shared := set(section.servers.gpus or ()) & set(its.servers.gpus or ()):
            raise ValueError(
                f"{other}.servers.gpus: {_listed(sorted(shared))} are also in {one}.servers.gpus; "
                "give each model its own"
            )


def _check_partial(rollout: RolloutSection) -> None:
    if rollout.engine != "sglang":
        raise ValueError(
            "rollout.partial: true with rollout.engine local, which generates nothing while the "
            "student trains; it has to be false, or the engine sglang"
        )
    if not rollout.ahead:
        raise ValueError(
            "rollout.partial: true with rollout.ahead 0, where a step needs every response that is "
            "under way; give rollout.ahead 1 or more"
        )
    if rollout.max_staleness <= rollout.ahead:
        raise ValueError(
            f"rollout.max_staleness: {rollout.max_staleness} with rollout.ahead {rollout.ahead}: a "
            "step would wait for all of its own prompts; give more than rollout.ahead, or "
            "rollout.partial: false"
        )
    for name, value in (("mix", rollout.mix), ("warmup_steps", rollout.warmup_steps)):
        if value:
            raise ValueError(
                f"rollout.{name}: {value} with rollout.partial: true, whose steps take whatever "
                "rollouts are finished; leave it out, or give rollout.partial: false"
            )
    if rollout.horizon == "auto":
        raise ValueError(
            "rollout.horizon: auto with rollout.partial: true, whose steps have responses of "
            "several horizons; give a number or one that grows, or rollout.partial: false"
        )


# Of servers that a run starts itself. (With those that are there, the plan asks for `tp`.)
_OF_OWN_SERVERS = (
    "replicas", "gpus", "host", "context_length", "max_running_requests", "max_total_tokens",
    "mem_fraction", "args",
)  # fmt: skip


def _check_servers(model: str, servers: ServersSection) -> None:
    key = f"{model}.servers"
    for name in _OF_OWN_SERVERS if servers.urls else ():
        value = getattr(servers, name)
        if value != getattr(ServersSection, name):
            value = _listed(value) if isinstance(value, tuple) else value
            raise ValueError(
                f"{key}.{name}: {value} with {key}.urls, whose servers the run does not start; "
                "leave one of them out"
            )
    wanted = servers.replicas * servers.tp
    if servers.gpus is not None:
        if not len(set(servers.gpus)) == len(servers.gpus) == wanted:
            raise ValueError(
                f"{key}.gpus: {_listed(servers.gpus)}; {key}.replicas {servers.replicas} × "
                f"tp {servers.tp} take {wanted} different ones"
            )
        if min(servers.gpus) < 0:
            raise ValueError(f"{key}.gpus: {_listed(servers.gpus)}; devices are numbered from 0 on")
    for url in servers.urls:
        if not re.fullmatch(r"https?://[^/:\s]+(:\d{1,5})?/?", url) or _port(url) > 65535:
            raise ValueError(f"{key}.urls: {url!r}; http://HOST:PORT is expected")
    given = [url.rstrip("/") for url in servers.urls]
    if twice := [url for url in given if given.count(url) > 1]:
        raise ValueError(f"{key}.urls: {twice[0]} is there twice; name each server once")


def _port(url: str) -> int:
    port = re.search(r":(\d+)/?$", url)
    return int(port[1]) if port else 80


def _check_micro_batch(config: Config, model: str) -> None:
    """Refuse micro-batches that cannot hold a model's longest sequence."""
    parallel = config.models[model].parallel
    multiple = batch_multiple(parallel.tp, parallel.cp, parallel.sequence)
    capacity = config.train.micro_batch_tokens // multiple * multiple
    key, prompt = config.prompt_limit(model)
    longest = prompt + config.rollout.max_new_tokens
    if longest > capacity:
        raise ValueError(
            f"train.micro_batch_tokens: {config.train.micro_batch_tokens} does not hold "
            f"{key} {prompt} + rollout.max_new_tokens {config.rollout.max_new_tokens}; give at "
            f"least {-(-longest // multiple) * multiple}"
        )


def _check_routing(config: Config) -> None:
    """Refuse keys that tell several teachers apart where there is one."""
    if config.teachers:
        return
    if (column := config.data.teacher_column) is not None:
        raise ValueError(f"data.teacher_column: {column!r} needs teachers to choose from")
    prompts = config.data.prompts
    for item in prompts if isinstance(prompts, list | tuple) else ():
        if isinstance(item, dict) and item.get("teacher") is not None:
            raise ValueError(f"data.prompts: {item}: a teacher needs teachers to choose from")
    if config.selection.scope == "teacher":
        raise ValueError("selection.scope: teacher needs teachers; with one, it has to be batch")


def _check_source(key: str, teacher: TeacherSection, student: str) -> None:
    """Refuse a teacher that is the student and something else as well, or has nothing to teach."""
    if teacher.source != "path" and teacher.path != student:
        raise ValueError(
            f"{key}.path: {teacher.path} with {key}.source {teacher.source}, which takes the "
            f"weights of student.path {student}; leave one of them out"
        )
    if teacher.source == "student_ema":
        if key != "teacher":
            raise ValueError(
                f"{key}.source: student_ema is of a run with one teacher; give source student"
            )
        if teacher.engine == "sglang":
            raise ValueError(
                "teacher.source: student_ema with teacher.engine sglang, whose servers keep the "
                "weights that they start with; give teacher.engine megatron, or source student"
            )
    elif teacher.ema != TeacherSection.ema:
        raise ValueError(
            f"{key}.ema: {teacher.ema} with {key}.source {teacher.source}, which has no "
            f"average; give {key}.source student_ema, or leave it out"
        )
    own = teacher.context_column, teacher.system, teacher.template_kwargs
    if teacher.source != "path" and own == (None, None, None):
        raise ValueError(
            f"{key}.source: {teacher.source}, and the teacher reads what the student reads, so "
            f"that it has nothing to teach; name {key}.context_column, or give it its own "
            f"{key}.system or {key}.template_kwargs"
        )


def _check_context(key: str, teacher: TeacherSection) -> None:
    """Refuse keys of a teacher's own reading that would have no effect."""
    own = {
        "template_kwargs": teacher.template_kwargs,
        "system": teacher.system,
        "context_column": teacher.context_column,
        "max_prompt_tokens": teacher.max_prompt_tokens,
    }
    for name, value in own.items():
        if value is not None and teacher.prompt == "student":
            raise ValueError(
                f"{key}.{name}: {value!r}, but the teacher reads the student's rendering "
                f"({key}.prompt: student); take out one of them"
            )
    if teacher.context_column is None:
        for name in ("context_template", "context_overflow"):
            value = getattr(teacher, name)
            if value != TeacherSection.__dataclass_fields__[name].default:
                raise ValueError(
                    f"{key}.{name}: {value!r}, but there is no context; name {key}.context_column"
                )


# ------------------------------------------------------------------------------ ranks, environment


def check_layouts(config: Config, ranks: int | None, whose: str = "the number of ranks,") -> None:
    """Refuse layouts that do not divide the ranks, or leave some without work.

    Args:
        ranks: of the run; None where they are not known.
        whose: names the ranks in the line: as it is here, or an option.

    Raises:
        ValueError: one line with the key, its value and what would be right.
    """
    for rank in config.train.profile.ranks:
        if ranks is not None and rank >= ranks:
            raise ValueError(
                f"train.profile.ranks: {rank}; {whose} {ranks} has those from 0 to {ranks - 1}"
            )
    for model, section in config.models.items():
        parallel = section.parallel
        _check_micro_batch(config, model)
        size = parallel.tp * parallel.cp * parallel.pp
        if ranks is not None and ranks % size:
            raise ValueError(
                f"{model}.parallel: {parallel.sizes} = {size} does not divide "
                f"{whose} {ranks}; start a multiple of {size}"
            )
    if ranks is None:
        return
    rollout, parallel = config.rollout, config.student.parallel
    data_parallel = ranks // (parallel.tp * parallel.cp * parallel.pp)
    if rollout.prompts * rollout.samples < data_parallel:
        raise ValueError(
            f"rollout.prompts: {rollout.prompts} × rollout.samples {rollout.samples} are fewer "
            f"than the {data_parallel} data-parallel ranks of the student; each needs one"
        )


def check_environment(config: Config) -> None:
    """Refuse what asks for a package that is not installed, or a variable that is not set.

    Raises:
        ValueError: one line with the key, its value and what would be right.
    """
    for model, section in config.served.items():
        if find_spec("sglang") is None:
            raise ValueError(
                f"{model}.engine: sglang, which is not installed: pip install '.[sglang]' with "
                "CUDA, requirements/sglang-cpu.txt without"
            )
        variable = section.servers.api_key_env
        if variable is not None and variable not in os.environ:
            raise ValueError(
                f"{model}.servers.api_key_env: {variable} is not set; export it with the servers' "
                "key"
            )
    if config.eval.grader == "math" and find_spec("math_verify") is None:
        raise ValueError(
            "eval.grader: math, which needs Math-Verify: pip install '.[math]', or use exact"
        )
    check_installed(config.log)


def check_installed(log: LogSection) -> None:
    """Check that the packages are there that the section asks for.

    Raises:
        ValueError: one of them is not installed.
    """
    for module, key, wanted in (
        ("tensorboard", "log.tensorboard: true", log.tensorboard),
        ("wandb", f"log.wandb_project: {log.wandb_project}", log.wandb_project is not None),
        ("prometheus_client", f"log.prometheus_port: {log.prometheus_port}", log.prometheus_port),
    ):
        if wanted and find_spec(module) is None:
            raise ValueError(
                f"{key}: {module} is not installed; pip install {module.replace('_', '-')}, or "
                "leave it out"
            )


# ------------------------------------------------------------------------------------------- files


def check_files(config: Config) -> None:
    """Look whether the files that a configuration names are there. Raises as `check_values`."""
    for key, path in ("run.dir", config.run.dir), ("rollout.sync.dir", config.rollout.sync.dir):
        if path is not None and Path(path).exists() and not Path(path).is_dir():
            raise ValueError(f"{key}: {path} is a file; give a directory")
    _check_prompts(config)
    for model, section in config.models.items():
        path = section.path
        if is_model(path) and not Path(path).exists():
            continue  # a name on the hub, which `preflight.models` asks for it
        try:
            check_directory(path, weights=reads_weights(config, model))
        except ValueError as error:
            raise ValueError(f"{model}.path: {error}") from None


def _check_prompts(config: Config) -> None:
    named = {"data.prompts": config.data.prompts, "eval.prompts": config.eval.prompts}
    for key, prompts in named.items():
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


def reads_weights(config: Config, model: str) -> bool:
    """Say whether the run itself reads weights of this model, by its key."""
    if model == "student":
        return True
    teacher = config.each_teacher[model]
    return teacher.engine == "megatron" or teacher.form == "hidden_states"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
