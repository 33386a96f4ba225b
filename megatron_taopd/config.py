"""The whole configuration: these dataclasses, a YAML file with the same keys, dotted overrides.

`load` reads a file, `check` refuses what cannot run, before any model is built. Both raise
ValueError with one line that names the key, its value and what would be right.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import partial, reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import AutoConfig

from megatron_taopd.loss import LOSSES
from megatron_taopd.models.hf_checkpoint import INDEX, SINGLE, weight_map
from megatron_taopd.models.hf_map import (
    check_architecture,
    check_layout,
    divisors,
    listed,
    num_experts,
)
from megatron_taopd.models.output_head import find_head
from megatron_taopd.prompts import read_texts
from megatron_taopd.selection import CONCENTRATES, SELECTORS
from megatron_taopd.vocab_map import MIN_SHARED, VocabMap, Vocabulary


@dataclass(frozen=True)
class RunSection:
    dir: str = MISSING  # logs, checkpoints, report; a run that is there already is resumed
    seed: int = 0
    name: str | None = None  # null: the directory's name


@dataclass(frozen=True)
class ParallelSection:
    """One model's layout; data parallelism is what remains of the ranks."""

    tp: int = 1  # tensor parallel
    pp: int = 1  # pipeline parallel
    # Sequence parallel, over the TP group. Without it, experts get each token tp times.
    sequence: bool = False
    ep: int = 1  # expert parallel: a teacher's experts, cut over data-parallel ranks


@dataclass(frozen=True)
class StudentSection:
    path: str = MISSING  # Hugging Face checkpoint directory
    parallel: ParallelSection = field(default_factory=ParallelSection)


@dataclass(frozen=True)
class ServersSection:
    """SGLang servers of one model: the run's own, or some that are there already."""

    urls: tuple[str, ...] = ()  # of servers that are there; none: the run starts its own
    replicas: int = 1  # of its own
    tp: int = 1  # of each of them
    # Devices of its own servers, replicas × tp of them, dealt out in this order; null: all of them
    # see every device of the machine (on a CPU machine there is nothing to deal).
    gpus: tuple[int, ...] | None = None
    host: str = "127.0.0.1"  # that its own servers listen on
    api_key_env: str | None = None  # environment variable with the key of every request
    concurrency: int = 64  # requests at a time, per server
    timeout_s: float = 1800.0  # of one request
    attempts: int = 4  # per request, on whichever server; then the step fails
    start_timeout_s: float = 900.0  # until they listen, whoever has started them
    context_length: int | None = None  # null: prompt and response of this run
    max_running_requests: int | None = None  # null: SGLang chooses
    max_total_tokens: int | None = None  # of the KV cache; null: what mem_fraction leaves
    mem_fraction: float | None = None  # of the device's memory; null: SGLang chooses
    args: tuple[str, ...] = ()  # further arguments of sglang.launch_server


@dataclass(frozen=True)
class TeacherSection:
    path: str = MISSING  # Hugging Face checkpoint directory
    engine: Literal["megatron", "sglang"] = "megatron"
    # sglang: its servers, and what they say of a row: the hidden state, from which scores and loss
    # are exact (the head is read from `path`), or log-probabilities of the `topk` likeliest tokens,
    # from which they are bounds (and `path` needs no weights).
    servers: ServersSection = field(default_factory=ServersSection)
    form: Literal["hidden_states", "topk"] = "hidden_states"
    topk: int = 64
    # Whose chat template and tokenizer render what the teacher reads before the response.
    prompt: Literal["own", "student"] = "own"
    parallel: ParallelSection = field(default_factory=ParallelSection)
    offload: bool = False  # weights in CPU memory between uses


@dataclass(frozen=True)
class DataSection:
    prompts: str = MISSING  # .jsonl or .parquet
    # Dots reach into nested columns. GSM8K: question and answer; DAPO-Math-17k: prompt (messages)
    # and reward_model.ground_truth.
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    template: Literal["auto", "chat", "plain"] = "auto"  # auto: chat if the tokenizer has one
    system: str | None = None  # system message of the chat template
    max_prompt_tokens: int = 1024  # prompts that are longer for either model are dropped
    shuffle: bool = True
    limit: int | None = None  # use the first prompts only


@dataclass(frozen=True)
class SyncSection:
    """How the student's weights reach the rollout servers."""

    # distributed: broadcast in a process group with the servers (NCCL, gloo on the CPU). tensor: in
    # the request, as handles to shared device memory where both are on one machine. disk: a
    # checkpoint in `dir` that the servers read.
    way: Literal["distributed", "tensor", "disk"] = "distributed"
    bucket_mib: int = 512  # weights that are on their way at a time
    dir: str | None = None  # disk: that both sides see; null: in run.dir
    # Colocated servers give their device memory back while the student trains.
    release_memory: bool = False
    # Mean |Δ log p| of engine and trainer on a few tokens after a sync, above which the run stops.
    max_gap: float = 0.3


@dataclass(frozen=True)
class RolloutSection:
    engine: Literal["local", "sglang"] = "local"
    servers: ServersSection = field(default_factory=ServersSection)
    sync: SyncSection = field(default_factory=SyncSection)
    gap_warning: float = 0.05  # mean |Δ log p| of engine and trainer above which a step warns
    prompts: int = 64  # per step
    samples: int = 1  # responses per prompt
    max_new_tokens: int = 64
    # Beyond the paper: training responses end after so many tokens; auto: where they stop to pay
    # (`rollout.horizon`), at least horizon_floor. Evaluations generate in full.
    horizon: int | str = "none"
    horizon_floor: int = 32
    horizon_prompt_weight: float = 0.5  # auto: cost of a prompt token; a response token's is 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own end-of-sequence ids
    batch_size: int = 64  # sequences that a rank generates at a time
    # Steps that rollouts run ahead of training, 0 (on policy) or 1: the next batch is generated
    # while this one trains.
    ahead: int = 0
    stream: bool = True  # the teacher reads responses as they finish; false: when all have


@dataclass(frozen=True)
class SelectionSection:
    selector: str = "teachability"  # one of SELECTORS
    ratio: float = 0.10  # ρ, the share of response rows that is trained on
    k: int = 16  # top-K of both models, for D and C
    # Beyond the paper: at least this share of the response tokens is left out of training. The same
    # number of rows is kept, from the prefixes of the responses that hold most of their priority.
    concentrate: float = 0.0


@dataclass(frozen=True)
class LossSection:
    kind: str = "reverse_kl"  # one of LOSSES
    beta: float = 0.5  # jsd: the teacher's share in the mixture
    alpha: float = 0.1  # skewed_reverse_kl: the student's share in the mixture


@dataclass(frozen=True)
class TrainSection:
    steps: int = 100  # rollout batches
    micro_batch_tokens: int = 4096  # the most tokens a rank runs at a time
    mini_batches: int = 1  # optimizer steps per rollout batch
    # two_pass: the student runs forward over everything for the scores, then forward and backward
    # over the cut sequences. replay: the layers' outputs of the first pass are kept, and the second
    # runs each layer in the backward pass only (pp 1, one mini-batch).
    schedule: Literal["two_pass", "replay"] = "two_pass"
    replay_memory_mib: int = 8192  # for those outputs, per rank; two_pass where they need more
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "selective", "full"] = "none"
    head_memory_mib: int = 1024  # for the logits of both models that exist at a time, per rank


@dataclass(frozen=True)
class OptimizerSection:
    lr: float = 1e-6
    min_lr: float | None = None  # where cosine or linear decay ends; null: constant
    decay: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 10
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    clip: float = 1.0  # global gradient norm; 0: off


@dataclass(frozen=True)
class CheckpointSection:
    every: int = 50  # steps; 0: at the end only
    keep: int = 3  # the newest ones
    # And the one with the best held-out accuracy: a step that beats all before it is saved.
    keep_best: bool = True
    # The next steps run while a checkpoint is written, from a copy in host memory.
    asynchronous: bool = True
    # Resume also from what has no checksums, or holds more than tensors and plain values: that
    # comes from somewhere else, and loading it may run code.
    trust: bool = False
    export_hf: bool = True  # the final student as a Hugging Face directory


@dataclass(frozen=True)
class EvalSection:
    every: int = 20  # steps; 0: at the start and the end only
    prompts: str | None = None  # null: no evaluation; columns and template as in `data`
    max_new_tokens: int | None = None  # null: as in `rollout`
    limit: int | None = None  # use the first prompts only
    samples: int = 1  # responses per prompt
    temperature: float = 0.0  # 0: greedy; else with top_p and top_k of `rollout`
    pass_at: tuple[int, ...] = ()  # k of pass@k
    # exact: the stated answer is the reference, spelling aside. math: or equal to it as mathematics
    # (Math-Verify). auto: math where that is installed.
    grader: Literal["auto", "exact", "math"] = "auto"
    at_start: bool = True


@dataclass(frozen=True)
class GuardSection:
    """Steps that are not taken, because their numbers mean nothing."""

    max_skipped: int = 3  # in a row; then the run ends
    # An update whose loss is so many times the median of the last 32 is not taken; 0: all are. Not
    # for sampled_token, whose values say nothing of how far it is.
    loss_spike: float = 10.0
    teacher_every: int = 50  # steps between checks of the teacher's weights; 0: at checkpoints only


@dataclass(frozen=True)
class WatchdogSection:
    """Ranks that die or hang end the job, in so many seconds."""

    silent_s: float = 60.0  # a process without a sign of life; 0: no watchdog
    stuck_s: float = 900.0  # no rank gets any further; 0: as long as the backend waits


@dataclass(frozen=True)
class LogSection:
    tensorboard: bool = True
    wandb_project: str | None = None  # null: no W&B
    prometheus_port: int | None = None  # the newest numbers at http://HOST:PORT/metrics; null: off
    prometheus_host: str = "127.0.0.1"  # that rank 0 listens on


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. `load` makes all its paths absolute."""

    run: RunSection = field(default_factory=RunSection)
    student: StudentSection = field(default_factory=StudentSection)
    teacher: TeacherSection = field(default_factory=TeacherSection)
    data: DataSection = field(default_factory=DataSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    selection: SelectionSection = field(default_factory=SelectionSection)
    loss: LossSection = field(default_factory=LossSection)
    train: TrainSection = field(default_factory=TrainSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    eval: EvalSection = field(default_factory=EvalSection)
    guard: GuardSection = field(default_factory=GuardSection)
    watchdog: WatchdogSection = field(default_factory=WatchdogSection)
    log: LogSection = field(default_factory=LogSection)


# ---------------------------------------------------------------------------------------- loading

_INPUT_PATHS = ("student.path", "teacher.path", "data.prompts", "eval.prompts")


def load(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, then `section.key=value` overrides (YAML values); defaults fill the rest.

    A relative path is relative to where it is written: an input in the file to the file's
    directory, one on the command line to the working directory. `run.dir` is an output and always
    relative to the working directory. `~` is the home directory, `${oc.env:NAME}` an environment
    variable, `${section.key}` another key.

    Raises:
        ValueError: no such file, not YAML, an unknown key, a value of the wrong type, a required
            key without a value.
    """
    written, given = _read_yaml(Path(path)), _read_overrides(overrides)
    tree = OmegaConf.to_container(OmegaConf.merge(written, given))
    context_parallel = _pop_context_parallel(tree)
    _check_keys(tree, Config)
    schema = OmegaConf.structured(Config)
    try:
        values = OmegaConf.to_container(
            OmegaConf.merge(schema, tree), resolve=True, throw_on_missing=True
        )
        for key in ("run.dir", *_INPUT_PATHS):
            section, name = key.split(".")
            in_file = key in _INPUT_PATHS and OmegaConf.select(given, key) is None
            if value := values[section][name]:
                base = Path(path).parent if in_file else Path()
                values[section][name] = os.path.abspath(base / Path(value).expanduser())
        config = OmegaConf.to_object(OmegaConf.merge(schema, values))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        if OmegaConf.is_missing(error.parent_node, error.key):
            reason = "required; set it in the file or on the command line"
        raise ValueError(f"{error.full_key}: {reason}") from None
    if context_parallel:
        tokens, prompt = config.train.micro_batch_tokens, config.data.max_prompt_tokens
        raise ValueError(
            f"{context_parallel}: context parallelism is not offered; without it the longest "
            f"response is train.micro_batch_tokens {tokens} − data.max_prompt_tokens {prompt} = "
            f"{tokens - prompt} tokens"
        )
    return config


def to_yaml(config: Config) -> str:
    """The configuration as a YAML file that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_tree(config: Config) -> dict[str, Any]:
    """The configuration as nested plain dicts and lists."""
    return yaml.safe_load(to_yaml(config))


def _read_yaml(path: Path):
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a YAML configuration")
    try:
        written = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(written):
        raise ValueError(f"{path}: a list; sections such as student: and train: are expected")
    return written


def _read_overrides(overrides: Sequence[str]):
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"{override}: not an override; write section.key=value")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except yaml.YAMLError as error:
        message = f"{' '.join(overrides)}: a value is not YAML: {' '.join(str(error).split())}"
        raise ValueError(message) from None


def _pop_context_parallel(tree: dict) -> str | None:
    """Take every key that asks for context parallelism out of the tree; return the first."""
    found = []
    for model in ("student", "teacher"):
        parallel = tree[model].get("parallel") if isinstance(tree.get(model), dict) else None
        for name in list(parallel) if isinstance(parallel, dict) else ():
            if name == "cp" or str(name).startswith("context"):
                found.append(f"{model}.parallel.{name}: {parallel.pop(name)}")
    return found[0] if found else None


def _check_keys(tree: dict, section: type, prefix: str = "") -> None:
    types = get_type_hints(section)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in types:
            raise ValueError(f"{key}: unknown key; {_suggestion(key, types, prefix)}")
        if is_dataclass(types[name]):
            if not isinstance(value, dict):
                inside = ", ".join(f"{key}.{f.name}" for f in fields(types[name]))
                raise ValueError(f"{key}: {value!r} is not a section; its keys are {inside}")
            _check_keys(value, types[name], f"{key}.")
        elif isinstance(value, dict):
            raise ValueError(f"{key}: {value!r} is a section; one value is expected")
        elif value == MISSING:  # which a merge takes for "as it was"
            raise ValueError(f"{key}: ??? is left open; set it on the command line")


def _suggestion(key: str, siblings: dict[str, Any], prefix: str) -> str:
    by_name: dict[str, list[str]] = {}
    for known in _leaf_keys(Config):
        by_name.setdefault(known.rpartition(".")[2], []).append(known)
    name = key.removeprefix(prefix)
    if name in by_name:
        return f"did you mean {' or '.join(by_name[name])}?"
    if close := get_close_matches(name, siblings, n=1, cutoff=0.7):
        return f"did you mean {prefix}{close[0]}?"
    if close := get_close_matches(name, by_name, n=1, cutoff=0.7):
        return f"did you mean {' or '.join(by_name[close[0]])}?"
    return f"known here: {', '.join(prefix + sibling for sibling in siblings)}"


def _leaf_keys(section: type, prefix: str = "") -> Iterator[str]:
    for name, kind in get_type_hints(section).items():
        if is_dataclass(kind):
            yield from _leaf_keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


# --------------------------------------------------------------------------------------- checking

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SAMPLED_RECORDS = 1000  # of the prompts, to see how much two tokenizers share

_Rule = tuple[Callable[[Any], bool], str]
_COUNT: _Rule = (lambda v: v >= 1, "at least 1")
_NOT_NEGATIVE: _Rule = (lambda v: 0 <= v < math.inf, "0 or more")
_SHARE: _Rule = (lambda v: 0 < v <= 1, "in (0, 1]")
_INSIDE: _Rule = (lambda v: 0 < v < 1, "strictly between 0 and 1")
_DECAY: _Rule = (lambda v: 0 <= v < 1, "in [0, 1)")
_POSITIVE: _Rule = (lambda v: 0 < v < math.inf, "more than 0")
_PORT: _Rule = (lambda v: 1 <= v < 1 << 16, "a port, 1 to 65535")
_ONE: _Rule = (lambda v: v == 1, "1: a mixture of experts can be a teacher only")

_RULES: dict[str, _Rule] = {
    "run.seed": _NOT_NEGATIVE,
    "student.parallel.tp": _COUNT,
    "student.parallel.pp": _COUNT,
    "student.parallel.ep": _ONE,
    "teacher.parallel.tp": _COUNT,
    "teacher.parallel.pp": _COUNT,
    "teacher.parallel.ep": _COUNT,
    "data.max_prompt_tokens": _COUNT,
    "data.limit": _COUNT,
    "rollout.prompts": _COUNT,
    "rollout.samples": _COUNT,
    "rollout.max_new_tokens": _COUNT,
    "rollout.horizon_floor": _COUNT,
    "rollout.horizon_prompt_weight": _NOT_NEGATIVE,
    "rollout.temperature": _POSITIVE,
    "rollout.top_p": _SHARE,
    "rollout.top_k": _NOT_NEGATIVE,
    "rollout.batch_size": _COUNT,
    "rollout.ahead": (lambda v: v in (0, 1), "0 or 1"),
    "rollout.gap_warning": _POSITIVE,
    **{
        f"{model}.servers.{name}": rule
        for model in ("rollout", "teacher")
        for name, rule in {
            "replicas": _COUNT,
            "tp": _COUNT,
            "concurrency": _COUNT,
            "timeout_s": _POSITIVE,
            "attempts": _COUNT,
            "start_timeout_s": _POSITIVE,
            "context_length": _COUNT,
            "max_running_requests": _COUNT,
            "max_total_tokens": _COUNT,
            "mem_fraction": _INSIDE,
        }.items()
    },
    "teacher.topk": _COUNT,
    "rollout.sync.bucket_mib": _COUNT,
    "rollout.sync.max_gap": _POSITIVE,
    "selection.ratio": _SHARE,
    "selection.k": _COUNT,
    "selection.concentrate": _DECAY,
    "loss.beta": _INSIDE,
    "loss.alpha": _INSIDE,
    "train.steps": _COUNT,
    "train.micro_batch_tokens": _COUNT,
    "train.mini_batches": _COUNT,
    "train.head_memory_mib": _COUNT,
    "train.replay_memory_mib": _COUNT,
    "optimizer.lr": _POSITIVE,
    "optimizer.min_lr": _NOT_NEGATIVE,
    "optimizer.warmup_steps": _NOT_NEGATIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.beta1": _DECAY,
    "optimizer.beta2": _DECAY,
    "optimizer.eps": _POSITIVE,
    "optimizer.clip": _NOT_NEGATIVE,
    "checkpoint.every": _NOT_NEGATIVE,
    "checkpoint.keep": _COUNT,
    "eval.every": _NOT_NEGATIVE,
    "eval.max_new_tokens": _COUNT,
    "eval.limit": _COUNT,
    "eval.samples": _COUNT,
    "eval.temperature": _NOT_NEGATIVE,
    "guard.max_skipped": _COUNT,
    "guard.loss_spike": (lambda v: v == 0 or 1 < v < math.inf, "0 or more than 1"),
    "guard.teacher_every": _NOT_NEGATIVE,
    "watchdog.silent_s": (lambda v: v == 0 or 1 <= v < math.inf, "0 or at least 1"),
    "watchdog.stuck_s": _NOT_NEGATIVE,
    "log.prometheus_port": _PORT,
}


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
    for key, (holds, right) in _RULES.items():
        value = reduce(getattr, key.split("."), config)
        if value is not None and not holds(value):
            raise ValueError(f"{key}: {value}; it has to be {right}")
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
    if config.train.schedule == "replay":
        for key, value in (
            ("student.parallel.pp", config.student.parallel.pp),
            ("train.mini_batches", config.train.mini_batches),
        ):
            if value != 1:
                raise ValueError(
                    f"train.schedule: replay with {key} {value}; it has to be 1, or the schedule "
                    "two_pass"
                )
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
        parallel = getattr(config, model).parallel
        if parallel.sequence and parallel.tp == 1:
            raise ValueError(
                f"{model}.parallel.sequence: true needs {model}.parallel.tp > 1, which is 1"
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
    for key, path in ("data.prompts", config.data.prompts), ("eval.prompts", config.eval.prompts):
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{key}: {path}: no such file; give a .jsonl or .parquet file")
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
    try:
        if not served:
            check_architecture(hf)
    except ValueError as error:
        raise ValueError(f"{key}: {path}: {error}") from None
    if served:
        hf = hf.get_text_config()
    if served and section.form == "hidden_states":
        _check_head(key, path)
    if num_experts(hf) and model == "student":
        raise ValueError(f"{key}: {path}: a mixture of experts is supported as a teacher only")

    try:
        if not served:
            check_layout(hf, path, parallel.tp, parallel.pp, parallel.ep)
    except ValueError as error:
        raise ValueError(f"{model}.parallel.{error}") from None
    if world_size % (ranks := parallel.tp * parallel.pp):
        raise ValueError(
            f"{model}.parallel: tp {parallel.tp} × pp {parallel.pp} = {ranks} does not divide the "
            f"number of ranks, {world_size}; start a multiple of {ranks}"
        )
    data_parallel = world_size // ranks
    if data_parallel % parallel.ep:
        choices = divisors(math.gcd(num_experts(hf), data_parallel))
        raise ValueError(
            f"{model}.parallel.ep: {parallel.ep} does not divide the {data_parallel} data-parallel "
            f"ranks; one of {listed(choices)}"
        )

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
    multiple = parallel.tp if parallel.sequence else 1
    capacity = config.train.micro_batch_tokens // multiple * multiple
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > capacity:
        raise ValueError(
            f"train.micro_batch_tokens: {config.train.micro_batch_tokens} does not hold "
            f"data.max_prompt_tokens {config.data.max_prompt_tokens} + rollout.max_new_tokens "
            f"{config.rollout.max_new_tokens}; give at least {-(-longest // multiple) * multiple}"
        )


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
    if sequences < data_parallel:
        raise ValueError(
            f"rollout.prompts: {config.rollout.prompts} × rollout.samples {config.rollout.samples} "
            f"are fewer than the {data_parallel} data-parallel ranks of the student"
        )
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
    rendering = {config.student.path: student}
    if config.teacher.prompt == "own":
        rendering[config.teacher.path] = teacher
    for path, vocabulary in rendering.items():
        if config.data.template == "chat" and not vocabulary.tokenizer.chat_template:
            raise ValueError(
                f"data.template: chat, but the tokenizer of {path} has no chat template; use plain"
            )
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
