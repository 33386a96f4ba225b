"""Every refusal of a configuration, by example."""

import json
import re
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_taopd.config import Config, load, to_yaml
from megatron_taopd.config.load import RENAMED
from megatron_taopd.config.values import check_values
from megatron_taopd.preflight.check_config import check

WORDS = ["<eos>", *(f"w{i}" for i in range(99))]
ARCHITECTURES = {
    Qwen2Config: "Qwen2ForCausalLM",
    Qwen3Config: "Qwen3ForCausalLM",
    LlamaConfig: "LlamaForCausalLM",
    Qwen3MoeConfig: "Qwen3MoeForCausalLM",
}
EXPERTS = {"num_experts": 6, "moe_intermediate_size": 20, "num_experts_per_tok": 2}
YAML = """
run: {dir: runs/demo, seed: 1}
student: {path: ../models/student, parallel: {tp: 2}}
teacher: {path: ../models/teacher, parallel: {pp: 2}}
data: {prompts: train.jsonl, max_prompt_tokens: 32}
rollout: {prompts: 8, max_new_tokens: 16}
train: {steps: 3, micro_batch_tokens: 64}
optimizer: {lr: 1e-4}
eval: {prompts: test.jsonl}
"""


def make_model(directory: Path, config_class=Qwen3Config, words=WORDS, **changes) -> None:
    """A Hugging Face directory as far as `check` looks: config, tokenizer, a file for weights."""
    sizes = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    architectures = [ARCHITECTURES[config_class]]
    config_class(**(sizes | {"architectures": architectures} | changes)).save_pretrained(directory)
    tokenizer = Tokenizer(
        models.WordLevel(dict(zip(words, range(len(words)), strict=True)), words[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[0]).save_pretrained(
        directory
    )
    (directory / "model.safetensors").touch()


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A user with a configuration, a pair of models and prompts, who runs from `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.jsonl").touch()
    (tmp_path / "conf" / "test.jsonl").touch()
    (tmp_path / "conf" / "run.yaml").write_text(YAML)
    make_model(tmp_path / "models" / "student", num_hidden_layers=2)
    make_model(tmp_path / "models" / "teacher")

    def check_run(*overrides: str, world_size: int = 2) -> Config:
        config = load("conf/run.yaml", overrides)
        check_values(config, world_size)
        check(config, world_size)
        return config

    def write(text: str) -> None:
        (tmp_path / "conf" / "run.yaml").write_text(text)

    def ask(prompt: str, answer: str | None = None) -> None:
        record = {"prompt": prompt} | ({} if answer is None else {"answer": answer})
        (tmp_path / "conf" / "train.jsonl").write_text(json.dumps(record))

    def model(name: str, *args, **changes) -> None:
        make_model(tmp_path / "models" / name, *args, **changes)

    return SimpleNamespace(dir=tmp_path, check=check_run, write=write, ask=ask, model=model)


def refused(call, *parts: str) -> str:
    """`call()` raises ValueError; its message is one line and has the parts, in this order."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(".*".join(map(re.escape, parts)), message), message
    return message


# What works


def test_a_value_that_a_file_leaves_open_has_to_be_given(tmp_path):
    path = tmp_path / "open.yaml"
    path.write_text(
        "{student: {path: a}, teacher: {path: b}, run: {dir: c}, data: {prompts: d}, "
        "rollout: {servers: {urls: '???'}}}"
    )
    with pytest.raises(ValueError, match=r"rollout.servers.urls: \?\?\? is left open"):
        load(path)
    given = load(path, ["rollout.servers.urls=[http://node:30000]"])
    assert given.rollout.servers.urls == ("http://node:30000",)


def test_a_file_with_overrides(user):
    config = user.check("selection.ratio=0.05", "rollout.stop_token_ids=[3,4]", "run.name=a b")
    assert (config.student.parallel.tp, config.teacher.parallel.pp) == (2, 2)
    assert config.selection.ratio == 0.05
    assert config.rollout.stop_token_ids == (3, 4)
    assert config.run.name == "a b"
    assert config.optimizer.lr == 1e-4 and config.optimizer.min_lr is None
    assert config.selection.selector == "teachability" and config.selection.k == 16
    with pytest.raises(FrozenInstanceError):
        config.train.steps = 5


RENAMED_VALUES = {  # a key's old name, a value there, and what it is under the new name
    "checkpoint.keep": (2, 2),
    "rollout.servers.attempts": (4, 3),
    "rollout.sync.way": ("disk", "disk"),
    "teacher.servers.attempts": (1, 0),
    "watchdog.silent_s": (30, 30),
    "watchdog.stuck_s": (0, 0),
}


@pytest.mark.parametrize("where", ["file", "command line"])
@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_accepted_with_a_line_that_gives_the_new_one(
    user, caplog, monkeypatch, old, where
):
    new, (before, after) = RENAMED[old], RENAMED_VALUES[old]
    monkeypatch.setenv("RANK", "0")
    if where == "file":
        user.write(OmegaConf.to_yaml(OmegaConf.merge(yaml.safe_load(YAML), nested(old, before))))
        config = load("conf/run.yaml")
    else:
        config = load("conf/run.yaml", [f"{old}={before}"])
    assert OmegaConf.select(OmegaConf.structured(config), new) == after
    line = f"{old}: {before} is accepted until version 0.2 only; write {new}: {after}"
    assert [record.getMessage() for record in caplog.records] == [line]
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    load("conf/run.yaml", [f"{old}={before}"])
    load("conf/run.yaml", [f"{new}={after}"])
    assert not caplog.records


def nested(key: str, value) -> dict:
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={value}"]))


@pytest.mark.parametrize("old", RENAMED)
def test_the_command_line_wins_over_the_file_under_either_name(user, old):
    new, (before, after) = RENAMED[old], RENAMED_VALUES[old]
    other = {"disk": "tensor"}.get(after, 5)
    user.write(OmegaConf.to_yaml(OmegaConf.merge(yaml.safe_load(YAML), nested(new, other))))
    found = OmegaConf.structured(load("conf/run.yaml", [f"{old}={before}"]))
    assert OmegaConf.select(found, new) == after
    user.write(OmegaConf.to_yaml(OmegaConf.merge(yaml.safe_load(YAML), nested(old, before))))
    found = OmegaConf.structured(load("conf/run.yaml", [f"{new}={other}"]))
    assert OmegaConf.select(found, new) == other


@pytest.mark.parametrize("old", RENAMED)
def test_a_key_under_both_names_is_refused(user, old):
    new, (before, after) = RENAMED[old], RENAMED_VALUES[old]
    given = [f"{old}={before}", f"{new}={after}"]
    words = (f"{old}: {before} is given, and {new}: {after} too", f"remove {old}")
    refused(lambda: load("conf/run.yaml", given), *words)


@pytest.mark.parametrize("value", ["0", "-1", "many", "true", "1.5", "null", "'${run.seed}'"])
def test_attempts_that_cannot_be_counted_are_refused_under_the_name_that_was_given(user, value):
    key, shown = "rollout.servers.attempts", str(yaml.safe_load(value))
    words = (f"{key}: {shown}; it has to be a whole number of at least 1", "servers.max_retries")
    refused(lambda: load("conf/run.yaml", [f"{key}={value}"]), *words)


def test_attempts_that_a_file_leaves_open_have_to_be_given(user):
    user.write(YAML.replace("{path: ../models/teacher,", "{path: t, servers: {attempts: '???'},"))
    words = (r"teacher.servers.max_retries: ??? is left open", "command line")
    refused(lambda: load("conf/run.yaml"), *words)
    assert load("conf/run.yaml", ["teacher.servers.attempts=3"]).teacher.servers.max_retries == 2


GROWTH = "rollout.horizon."
SERVERS = "rollout.engine=sglang rollout.servers."
DRAFTS = "rollout.speculative."
DRAFT = f"{SERVERS}tp=1 {DRAFTS}algorithm=STANDALONE {DRAFTS}draft_model_path="


@pytest.mark.parametrize(("layout", "world_size"), [((1, 1), 1), ((4, 2), 8), ((2, 2), 12)])
def test_layouts(user, layout, world_size):
    tp, pp = layout
    user.check(
        f"student.parallel={{tp: {tp}, pp: {pp}, sequence: {str(tp > 1).lower()}}}",
        "teacher.parallel={tp: 1, pp: 1}",
        world_size=world_size,
    )


@pytest.mark.parametrize("config_class", ARCHITECTURES)
def test_families(user, config_class):
    experts = config_class is Qwen3MoeConfig
    for name in ("teacher",) if experts else ("student", "teacher"):
        user.model(name, config_class, vocab_size=128)  # Qwen2's tokenizer class adds an id
    user.check()


def test_a_served_teacher_whose_logits_are_more_than_its_head(user):
    """Known before anything is started; and a served teacher may be of any family."""
    served = ["teacher.engine=sglang", "teacher.parallel.pp=1"]
    cap = {"final_logit_softcapping": 30.0}
    for kind, changes, said in (
        (Gemma2Config, cap, ("Gemma2ForCausalLM", "final_logit_softcapping 30")),
        (PhiConfig, {}, ("PhiForCausalLM", "its output head has a bias")),
        (GraniteConfig, {"logits_scaling": 8.0}, ("damaged safetensors",)),  # what comes after
        (Qwen3Config, {}, ("damaged safetensors",)),
    ):
        ARCHITECTURES.setdefault(kind, kind.__name__.replace("Config", "ForCausalLM"))
        user.model("teacher", kind, **changes)
        said = "teacher.path", "models/teacher", *said, "take teacher.form: topk"
        refused(lambda: user.check(*served), *said)
        user.check(*served, "teacher.form=topk")


def test_experts_of_a_teacher_on_several_ranks(user):
    user.model("teacher", Qwen3MoeConfig, **EXPERTS, intermediate_size=3)  # of no layer
    user.check("teacher.parallel={tp: 2, pp: 2, ep: 3}", world_size=12)
    user.check("teacher.parallel={tp: 1, pp: 2, ep: 2}", world_size=12)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_rope_types(user, rope):
    user.model("teacher", LlamaConfig, rope_parameters=rope)
    user.check()


def test_vocabularies_may_be_padded_differently(user):
    user.model("teacher", vocab_size=128)
    user.check()


def test_weights_in_shards(user):
    directory = user.dir / "models" / "teacher"
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    index = {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(user.check, "teacher.path", "b.safetensors", "is missing")
    (directory / "b.safetensors").touch()
    user.check()


def test_weights_that_are_two_models(user):
    """Before anything is built, as wherever else a directory is read."""
    directory = user.dir / "models" / "teacher"
    (directory / "adapter_model.safetensors").touch()
    refused(user.check, "teacher.path", "adapter_model.safetensors", "move it elsewhere")
    (directory / "adapter_model.safetensors").rename(directory / "a.safetensors")
    index = {"weight_map": {"w": "a.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(user.check, "teacher.path", "an index of a.safetensors", "keep one of them")
    (directory / "model.safetensors").unlink()
    user.check()


def test_evaluation_may_be_left_out(user):
    assert user.check("eval.prompts=null").eval.prompts is None


# Paths


def test_inputs_are_relative_to_the_file_and_outputs_to_the_working_directory(user):
    config = user.check()
    assert config.student.path == str(user.dir / "models" / "student")
    assert config.data.prompts == str(user.dir / "conf" / "train.jsonl")
    assert config.run.dir == str(user.dir / "runs" / "demo")


def test_a_path_on_the_command_line_is_relative_to_the_working_directory(user):
    (user.dir / "mine.jsonl").touch()
    config = user.check("data.prompts=mine.jsonl", f"run.dir={user.dir}/elsewhere")
    assert config.data.prompts == str(user.dir / "mine.jsonl")
    assert config.run.dir == str(user.dir / "elsewhere")


def test_home_and_environment_and_other_keys_in_values(user, monkeypatch):
    monkeypatch.setenv("HOME", str(user.dir))
    monkeypatch.setenv("MODELS", str(user.dir / "models"))
    config = load(
        "conf/run.yaml",
        [
            "run.dir=~/out",
            "student.path=${oc.env:MODELS}/student",
            "teacher.path=${student.path}",
            "checkpoint.every=${train.steps}",
        ],
    )
    assert config.run.dir == str(user.dir / "out")
    assert config.student.path == config.teacher.path == str(user.dir / "models" / "student")
    assert config.checkpoint.every == 3


ITSELF = YAML.replace("path: ../models/teacher", "source: student, context_column: hint")


@pytest.mark.parametrize("source", ["student", "student_ema"])
def test_a_teacher_that_is_the_student_has_its_path(user, source):
    """Wherever that is written, and whatever it is relative to."""
    user.ask("w1 w2 w3")
    user.write(ITSELF)
    for override in [], ["student.path=models/teacher"]:
        config = user.check(f"teacher.source={source}", *override)
        name = "teacher" if override else "student"
        assert config.student.path == config.teacher.path == str(user.dir / "models" / name)
        assert (config.teacher.source, config.teacher.ema) == (source, 0.99)
        saved = user.dir / "saved.yaml"
        saved.write_text(to_yaml(config))
        assert load(saved) == config
    hub = load("conf/run.yaml", ["student.path=Qwen/Qwen3-4B"])
    assert hub.student.path == hub.teacher.path == "Qwen/Qwen3-4B"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["teacher.path=models/teacher"], ["teacher.path:", "models/teacher with teacher.source "
         "student", "student.path", "models/student; leave one of them out"]),
        (["teacher.ema=0.5"], ["teacher.ema: 0.5", "has no average", "source student_ema"]),
        (["teacher.context_column=null"], ["teacher.source: student", "nothing to teach",
         "name teacher.context_column"]),
        (["teacher.source=student_ema", "teacher.engine=sglang"], ["teacher.source: student_ema",
         "keep the weights", "teacher.engine megatron"]),
        (["teacher.source=path"], ["teacher.path: required"]),
        (["teacher.parallel.pp=4"], ["teacher.parallel: tp 1 × pp 4"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_teacher_that_is_the_student_and_something_else(user, overrides, parts):
    user.write(ITSELF)
    refused(lambda: user.check(*overrides), *parts)


def test_each_of_two_variables_is_looked_at_though_the_models_are_one(user):
    """The teacher's own are right."""
    user.write(ITSELF)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ mood }}"
    (user.dir / "models" / "student" / "chat_template.jinja").write_text(template)
    right = "teacher.template_kwargs={mood: w1}"
    user.check(right, "data.template_kwargs={mood: w2}")
    refused(
        lambda: user.check(right, "data.template_kwargs={moot: w2}"),
        "data.template_kwargs: the chat template of",
        "moot",
    )


def test_the_written_configuration_is_read_back_the_same_from_anywhere(user, tmp_path):
    config = user.check("rollout.stop_token_ids=[3]")
    saved = tmp_path / "runs" / "demo" / "config.yaml"
    saved.parent.mkdir(parents=True)
    saved.write_text(to_yaml(config))
    assert load(saved) == config


# The file and the command line


def test_no_such_file(user):
    refused(lambda: load("conf/rnu.yaml"), "conf/rnu.yaml: no such file", "YAML")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: [1", ("conf/run.yaml: not YAML",)),
        ("- a\n- b", ("conf/run.yaml: a list; sections", "student:")),
        ("run: {dir: a}\nrun: {dir: b}", ("conf/run.yaml: not YAML", "duplicate key run")),
        (YAML.replace("dir: runs/demo, ", ""), ("run.dir: required",)),
        (YAML.replace("path: ../models/teacher, ", ""), ("teacher.path: required",)),
        (YAML + "log: yes", ("log: True is not a section", "log.tensorboard, log.wandb_project")),
        (YAML + "log:", ("log: None is not a section",)),
        (YAML.replace("seed: 1", "seed: {a: 1}"), ("run.seed: {'a': 1} is a section", "one value")),
        (
            YAML.replace("train.jsonl", "'${oc.env:NOT_SET}/a'"),
            ("data.prompts", "'NOT_SET' not"),
        ),
        (YAML.replace("train.jsonl", "'${data.nope}'"), ("data.prompts", "'data.nope' not")),
    ],
)
def test_files_that_are_refused(user, text, parts):
    user.write(text)
    refused(user.check, *parts)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("selection.ratio", ("selection.ratio: not an override", "section.key=value")),
        ("train.steps=[1", ("train.steps=[1", "not YAML")),
        ("selection.ration=0.1", ("selection.ration: unknown key", "mean selection.ratio?")),
        ("--selection.ratio=0.1", ("--selection: unknown key", "did you mean selection?")),
        ("temprature=1", ("temprature: unknown key", "rollout.temperature or eval.temperature?")),
        ("rollout.limit=5", ("rollout.limit: unknown", "mean data.limit or eval.limit?")),
        ("ratio=0.1", ("ratio: unknown key", "did you mean selection.ratio?")),
        ("optimizer.momentum=0.9", ("optimizer.momentum: unknown key", "optimizer.lr,")),
        ("trian.steps=3", ("trian: unknown key", "did you mean train?")),
        ("train.steps=many", ("train.steps: Value 'many'", "Integer")),
        ("train.steps=1.5", ("train.steps: Value '1.5'", "Integer")),
        ("selection.ratio=null", ("selection.ratio: ", "None")),
        ("student.parallel.sequence=3x", ("student.parallel.sequence", "3x", "bool")),
        ("student.parallel=2", ("student.parallel: 2 is not a section", "student.parallel.tp")),
        ("rollout.stop_token_ids=5", ("rollout.stop_token_ids", "list")),
    ],
)
def test_overrides_that_are_refused(user, override, parts):
    refused(lambda: user.check(override), *parts)


# Values


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        # Not offered
        ("teacher.parallel.context=2", ("teacher.parallel.context: unknown key", "cp")),
        ("rollout.engine=vllm", ("rollout.engine", "'vllm'", "one of ['local', 'sglang']")),
        ("teacher.engine=vllm", ("teacher.engine", "'vllm'", "one of ['megatron', 'sglang']")),
        (
            "teacher.engine=sglang teacher.parallel.pp=1 teacher.form=topk teacher.topk=8",
            ("teacher.topk: 8", "selection.k 16"),
        ),
        ("teacher.engine=sglang", ("teacher.parallel", "engine megatron", "leave them out")),
        (
            "teacher.engine=sglang teacher.parallel.pp=1 teacher.servers.gpus=[1] "
            f"{SERVERS}gpus=[1]",
            ("teacher.servers.gpus: 1", "also in rollout.servers.gpus"),
        ),
        ("train.schedule=once", ("train.schedule", "'once'", "one of ['two_pass', 'replay']")),
        (
            "train.schedule=replay train.mini_batches=2",
            ("train.schedule: replay with train.mini_batches 2", "has to be 1"),
        ),
        (
            "train.schedule=replay student.parallel.pp=2",
            ("train.schedule: replay with student.parallel.pp 2", "has to be 1"),
        ),
        (
            "selection.concentrate=0.5 selection.selector=random",
            ("selection.concentrate: 0.5 with selector random", "one of entropy"),
        ),
        (
            "selection.concentrate=0.95 selection.ratio=0.1",
            ("selection.concentrate: 0.95", "selection.ratio 0.1", "at most 0.9"),
        ),
        ("rollout.horizon=soon", ("rollout.horizon: 'soon'", "none, auto, a number of tokens or")),
        ("rollout.horizon=true", ("rollout.horizon: True", "is needed")),
        ("rollout.horizon=99999", ("rollout.horizon: 99999", "rollout.max_new_tokens", "at most")),
        (f"{GROWTH}start=4 {GROWTH}end=8", ("rollout.horizon.steps: None", "whole number")),
        (f"{GROWTH}start=4 {GROWTH}end=8 {GROWTH}steps=1", ("rollout.horizon.steps: 1", "2 steps")),
        (f"{GROWTH}start=9 {GROWTH}end=8 {GROWTH}steps=2", ("rollout.horizon.start: 9", "end 8")),
        (f"{GROWTH}begin=9 {GROWTH}end=8", ("rollout.horizon.begin: unknown key", "start, end")),
        (
            f"{GROWTH}start=4 {GROWTH}end=8 {GROWTH}steps=2 {GROWTH}growth=slow",
            ("rollout.horizon.growth: 'slow'", "linear or geometric"),
        ),
        (
            f"{GROWTH}start=4 {GROWTH}end=99999 {GROWTH}steps=2",
            ("rollout.horizon: 99999", "more than rollout.max_new_tokens"),
        ),
        ("rollout.ahead=2", ("rollout.ahead: 2", "rollout.engine local", "has to be 0")),
        ("rollout.ahead=1", ("rollout.ahead: 1", "rollout.engine local", "has to be 0")),
        (
            f"{SERVERS}gpus=[6,7,7] {SERVERS}replicas=3",
            ("rollout.servers.gpus: 6, 7, 7", "replicas 3 × tp 1 take 3 different"),
        ),
        (
            f"{SERVERS}gpus=[6] {SERVERS}urls=[http://node:30000]",
            ("rollout.servers.gpus: 6", "rollout.servers.urls", "leave one of them out"),
        ),
        (
            f"{SERVERS}args=[--log-level,error] {SERVERS}urls=[http://node:30000]",
            ("rollout.servers.args: --log-level, error", "leave one of them out"),
        ),
        (
            f"{SERVERS}mem_fraction=0.5 {SERVERS}urls=[http://node:30000]",
            ("rollout.servers.mem_fraction: 0.5 with rollout.servers.urls", "leave one of them"),
        ),
        (f"{SERVERS}context_length=0", ("rollout.servers.context_length: 0", "at least 1")),
        (f"{SERVERS}max_total_tokens=0", ("rollout.servers.max_total_tokens: 0", "at least 1")),
        ("log.prometheus_port=0", ("log.prometheus_port: 0", "in [1, 65535]")),
        (f"{SERVERS}urls=[node:30000]", ("rollout.servers.urls: 'node:30000'", "http://HOST:PORT")),
        (f"{SERVERS}api_key_env=NO_SUCH_KEY", ("servers.api_key_env: NO_SUCH_KEY is not set",)),
        (
            "rollout.engine=sglang rollout.ahead=1 rollout.sync.release_memory=true",
            ("rollout.sync.release_memory: true", "rollout.ahead 1", "one of them has to be off"),
        ),
        ("rollout.mix.data=0.2", ("rollout.mix.data: unknown key", "dataset")),
        ("rollout.mix.dataset=0", ("rollout.mix.dataset: 0.0", "in (0, 1]")),
        ("rollout.mix.dataset=2", ("rollout.mix.dataset: 2.0", "in (0, 1]")),
        ("rollout.mix.dataset=half", ("rollout.mix.dataset: ", "half")),
        ("rollout.mix={}", ("rollout.mix.dataset: 0.0", "in (0, 1]")),
        (
            "rollout.mix.dataset=0.2",
            ("rollout.mix: {'dataset': 0.2} takes reference responses", "data.response_column"),
        ),
        ("rollout.warmup_steps=3", ("rollout.warmup_steps: 3 takes reference responses",)),
        ("data.excluded_column=spans", ("data.excluded_column: 'spans'", "data.response_column")),
        (
            "loss.kind=sampled_token data.response_column=says rollout.mix.dataset=0.2",
            ("loss.kind: sampled_token with rollout.mix", "no importance ratio"),
        ),
        (
            "loss.kind=sampled_token data.response_column=says rollout.warmup_steps=1",
            ("loss.kind: sampled_token with rollout.warmup_steps: 1", "no importance ratio"),
        ),
        (
            f"{DRAFTS}algorithm=NGRAM",
            ("rollout.speculative: {'algorithm': 'NGRAM'} with rollout.engine local", "sglang"),
        ),
        (
            f"{DRAFTS}algorithm=NGRAM {SERVERS}urls=[http://node:30000]",
            ("rollout.speculative: ", "with rollout.servers.urls", "start them with it"),
        ),
        (
            f"{SERVERS}tp=1 {DRAFTS}algorithm=MEDUSA",
            ("rollout.speculative.algorithm: 'MEDUSA'", "NGRAM, EAGLE, EAGLE3, STANDALONE"),
        ),
        (
            f"{SERVERS}tp=1 {DRAFTS}num_draft_tokens=4",
            ("rollout.speculative.algorithm: None", "is needed"),
        ),
        (
            f"{SERVERS}tp=1 {DRAFTS}algorithm=NGRAM {DRAFTS}accept_threshold_acc=0.5",
            ("rollout.speculative.accept_threshold_acc: unknown key", "known here: algorithm"),
        ),
        (
            f"{SERVERS}tp=1 {DRAFTS}algorithm=NGRAM {DRAFTS}num_draft_tokens=true",
            ("rollout.speculative.num_draft_tokens: True", "whole number from 1 on"),
        ),
        (
            f"{SERVERS}tp=1 {DRAFTS}algorithm=NGRAM {DRAFTS}num_steps=3",
            ("rollout.speculative.num_steps: 3", "not for the algorithm NGRAM"),
        ),
        (
            f"{SERVERS}tp=1 {DRAFTS}algorithm=NGRAM {DRAFTS}ngram_match_type=DFS",
            ("rollout.speculative.ngram_match_type: 'DFS'", "BFS or PROB"),
        ),
        (
            f"{SERVERS}tp=1 {DRAFTS}algorithm=NGRAM {DRAFTS}ngram_min_bfs_breadth=11",
            ("ngram_min_bfs_breadth: 11 is more than ngram_max_bfs_breadth 10",),
        ),
        (
            f"{SERVERS}tp=1 {DRAFTS}algorithm=EAGLE",
            ("rollout.speculative.draft_model_path: None", "EAGLE needs one"),
        ),
        (
            f"{DRAFT}/no/such/place",
            ("rollout.speculative.draft_model_path: /no/such/place: no such directory",),
        ),
        (
            f"{DRAFT}owner/draft {DRAFTS}num_steps=3 {DRAFTS}eagle_topk=1",
            ("rollout.speculative.num_steps: 3 without all of", "all three or chooses"),
        ),
        (
            f"{DRAFT}owner/draft {DRAFTS}num_steps=3 {DRAFTS}eagle_topk=1 "
            f"{DRAFTS}num_draft_tokens=6",
            ("rollout.speculative.num_draft_tokens: 6 with eagle_topk 1", "= 4; give that"),
        ),
        (
            f"{DRAFT}owner/draft {DRAFTS}ngram_capacity=9",
            ("rollout.speculative.ngram_capacity: 9", "not for the algorithm STANDALONE"),
        ),
        (
            f"{DRAFT}owner/draft rollout.sync.transport=disk",
            ("rollout.sync.transport: disk", "into the draft model", "has to be distributed"),
        ),
        (
            f"{DRAFT}owner/draft rollout.sync.release_memory=true",
            ("rollout.sync.release_memory: true", "nobody would send again"),
        ),
        (
            "rollout.engine=sglang rollout.ahead=3 rollout.sync.release_memory=true",
            ("rollout.sync.release_memory: true", "rollout.ahead 3", "one of them has to be off"),
        ),
        ("rollout.partial=true", ("rollout.partial: true", "rollout.engine local")),
        (
            "rollout.engine=sglang rollout.partial=true",
            ("rollout.partial: true with rollout.ahead 0", "give rollout.ahead 1 or more"),
        ),
        (
            "rollout.engine=sglang rollout.partial=true rollout.ahead=4",
            ("rollout.max_staleness: 4 with rollout.ahead 4", "give more than rollout.ahead"),
        ),
        (
            "rollout.engine=sglang rollout.partial=true rollout.ahead=1 rollout.horizon=auto",
            ("rollout.horizon: auto with rollout.partial: true", "one that grows"),
        ),
        (
            "rollout.engine=sglang rollout.partial=true rollout.ahead=1 "
            "data.response_column=says rollout.mix.dataset=0.2",
            ("rollout.mix: {'dataset': 0.2} with rollout.partial: true", "leave it out"),
        ),
        # Names
        ("selection.selector=tipp", ("selection.selector: ", "'tipp'", "'tip', 'teachability'")),
        ("loss.kind=kl", ("loss.kind: ", "'kl'", "'reverse_kl', 'forward_kl'")),
        ("train.precision=fp16", ("train.precision", "'fp16'", "['fp32', 'bf16']")),
        ("train.recompute=some", ("train.recompute", "'some'", "['none', 'selective', 'full']")),
        ("data.template=jinja", ("data.template", "'jinja'", "['auto', 'chat', 'plain']")),
        ("optimizer.decay=step", ("optimizer.decay", "'step'", "['constant', 'cosine', 'linear']")),
        # Ranges
        ("selection.ratio=0", ("selection.ratio: 0.0", "in (0, 1]")),
        ("selection.ratio=10", ("selection.ratio: 10.0", "in (0, 1]")),
        ("selection.ratio=.nan", ("selection.ratio: nan", "in (0, 1]")),
        ("selection.k=0", ("selection.k: 0", "at least 1")),
        ("rollout.temperature=0", ("rollout.temperature: 0.0", "more than 0")),
        ("rollout.top_p=0", ("rollout.top_p: 0.0", "in (0, 1]")),
        ("rollout.top_k=-1", ("rollout.top_k: -1", "0 or more")),
        ("rollout.prompts=0", ("rollout.prompts: 0", "at least 1")),
        ("train.steps=0", ("train.steps: 0", "at least 1")),
        ("train.head_memory_mib=0", ("train.head_memory_mib: 0", "at least 1")),
        ("student.parallel.tp=0", ("student.parallel.tp: 0", "at least 1")),
        ("loss.beta=1", ("loss.beta: 1.0", "strictly between 0 and 1")),
        ("optimizer.lr=0", ("optimizer.lr: 0.0", "more than 0")),
        ("optimizer.lr=.inf", ("optimizer.lr: inf", "more than 0")),
        ("optimizer.beta2=1", ("optimizer.beta2: 1.0", "in [0, 1)")),
        ("optimizer.clip=-1", ("optimizer.clip: -1.0", "0 or more")),
        ("checkpoint.keep_last=0", ("checkpoint.keep_last: 0", "at least 1")),
        ("eval.limit=0", ("eval.limit: 0", "at least 1")),
        ("eval.samples=4", ("eval.samples: 4 with eval.temperature 0", "temperature above 0")),
        ("eval.pass_at=[1,2]", ("eval.pass_at: 2", "between 1 and eval.samples 1")),
        ("guard.max_skipped=0", ("guard.max_skipped: 0", "at least 1")),
        ("guard.loss_spike=0.5", ("guard.loss_spike: 0.5", "0 or more than 1")),
        (
            "watchdog.heartbeat_timeout_s=0.1",
            ("watchdog.heartbeat_timeout_s: 0.1", "0 or at least 1"),
        ),
        # Combinations
        ("optimizer.decay=cosine", ("optimizer.min_lr: None with optimizer.decay cosine",)),
        (
            "rollout.engine=sglang rollout.servers.timeout_s=900",
            ("rollout.servers.timeout_s: 900 is not less than", "watchdog.stall_timeout_s 900"),
        ),
        (
            "teacher.engine=sglang watchdog.stall_timeout_s=60",
            ("teacher.servers.timeout_s: 600", "watchdog.stall_timeout_s 60"),
        ),
        ("optimizer.min_lr=0", ("optimizer.min_lr: 0.0 with optimizer.decay constant", "null")),
        ("optimizer.decay=linear optimizer.min_lr=1", ("1.0 is above optimizer.lr 0.0001",)),
        (
            "train.steps=3 train.profile.steps=[3,4]",
            ("train.profile.steps: 4", "between 1 and train.steps 3"),
        ),
        ("train.profile.steps=[0]", ("train.profile.steps: 0", "between 1 and train.steps")),
        ("train.profile.ranks=[-1]", ("train.profile.ranks: -1", "from 0 on")),
        ("train.profile.ranks=[0,99]", ("train.profile.ranks: 99", "from 0 to")),
        ("rollout.prompts=1 train.mini_batches=2", ("train.mini_batches: 2", "1 sequences")),
        # Lengths
        ("train.micro_batch_tokens=47", ("micro_batch_tokens: 47", "32", "16", "at least 48")),
        (
            "rollout.max_new_tokens=97 train.micro_batch_tokens=129",
            ("max_new_tokens: 97", "32 make 129", "student takes 128"),
        ),
        ("eval.max_new_tokens=97", ("eval.max_new_tokens: 97", "make 129", "takes 128")),
        # Vocabulary
        ("selection.k=101", ("selection.k: 101", "100 ids")),
        ("rollout.stop_token_ids=[5,100]", ("rollout.stop_token_ids: 100", "0 … 99")),
        ("data.template=chat", ("data.template: chat", "no chat template", "plain")),
        # Files
        ("student.path=nowhere", ("student.path", "nowhere: no such directory", "Hugging Face")),
        ("student.path=conf", ("student.path", "conf has no config.json", "Hugging Face")),
        ("data.prompts=nope.jsonl", ("data.prompts", "nope.jsonl: no such file", ".parquet")),
        ("eval.prompts=nope.jsonl", ("eval.prompts", "nope.jsonl: no such file")),
        ("run.dir=conf/run.yaml", ("run.dir", "conf/run.yaml is a file", "directory")),
    ],
)  # fmt: skip
def test_values_that_are_refused(user, overrides, parts):
    refused(lambda: user.check(*overrides.split()), *parts)


# Layouts


@pytest.mark.parametrize(
    ("overrides", "world_size", "parts"),
    [
        ("student.parallel.tp=3", 6, ("student.parallel.tp: 3", "4 attention heads", "1, 2, 4")),
        ("teacher.parallel.pp=3", 6, ("teacher.parallel.pp: 3", "4 layers", "1, 2, 4")),
        ("", 3, ("student.parallel: tp 2 × pp 1 = 2", "ranks, 3", "a multiple of 2")),
        ("teacher.parallel.tp=2", 2, ("teacher.parallel: tp 2 × pp 2 = 4", "ranks, 2")),
        ("teacher.parallel.sequence=true", 2, ("teacher.parallel.sequence: true", "tp > 1")),
        ("rollout.prompts=1", 4, ("rollout.prompts: 1 × rollout.samples 1", "the 2 data-parallel")),
    ],
)
def test_layouts_that_are_refused(user, overrides, world_size, parts):
    refused(lambda: user.check(*overrides.split(), world_size=world_size), *parts)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        (
            {"num_key_value_heads": 3, "num_attention_heads": 12},
            ("tp: 2 neither divides nor is a multiple of the 3 key-value heads", "one of 1"),
        ),
        ({"intermediate_size": 65}, ("tp: 2 does not divide the 65 MLP columns", "one of 1")),
    ],
)
def test_tensor_parallelism_needs_all_of_a_layer_to_be_divisible(user, sizes, parts):
    user.model("student", **sizes)
    refused(user.check, "student.parallel.", *parts)


@pytest.mark.parametrize("key_value_heads", [1, 2])
def test_tensor_parallel_ranks_may_share_a_key_value_head(user, key_value_heads):
    user.model("student", num_key_value_heads=key_value_heads)
    user.check("student.parallel.tp=4", world_size=4)


@pytest.mark.parametrize(
    ("parallel", "parts"),
    [
        ("{tp: 1, pp: 1, ep: 4}", ("teacher.parallel.ep: 4", "6 experts of", "one of 1, 2")),
        ("{tp: 1, pp: 1, ep: 3}", ("teacher.parallel.ep: 3", "4 data-parallel", "one of 1, 2")),
        ("{tp: 1, pp: 4, ep: 2}", ("teacher.parallel.ep: 2", "1 data-parallel", "one of 1")),
        ("{tp: 2, pp: 1, ep: 0}", ("teacher.parallel.ep: 0", "at least 1")),
    ],
)
def test_layouts_of_experts_that_are_refused(user, parallel, parts):
    user.model("teacher", Qwen3MoeConfig, **EXPERTS)
    refused(lambda: user.check(f"teacher.parallel={parallel}", world_size=4), *parts)


def test_experts_decide_which_columns_tensor_parallelism_cuts(user):
    user.model("teacher", Qwen3MoeConfig, **EXPERTS | {"moe_intermediate_size": 21})
    refused(
        lambda: user.check("teacher.parallel={tp: 2, pp: 1}"),
        "teacher.parallel.tp: 2 does not divide the 21 MLP columns",
    )


def test_expert_parallelism_is_for_a_model_that_has_experts(user):
    refused(
        lambda: user.check("teacher.parallel={pp: 1, ep: 2}"),
        "teacher.parallel.ep: 2 with", "models/teacher, which has no experts", "has to be 1",
    )  # fmt: skip
    refused(
        lambda: user.check("student.parallel={tp: 1, ep: 2}"),
        "student.parallel.ep: 2 with", "models/student, which has no experts", "has to be 1",
    )  # fmt: skip


@pytest.mark.parametrize("setting", ["router: frozen", "aux_loss: 0.1"])
def test_routers_are_of_a_student_that_has_experts(user, setting):
    refused(
        lambda: user.check(f"student.moe={{{setting}}}"),
        f"student.moe.{setting} with", "models/student, which has no experts",
    )  # fmt: skip
    user.model("student", Qwen3MoeConfig, **EXPERTS)
    user.check(f"student.moe={{{setting}}}", "student.parallel={tp: 1}")


def test_a_student_of_experts_needs_sequence_parallelism_with_tensor_parallelism(user):
    user.model("student", Qwen3MoeConfig, **EXPERTS)
    refused(
        lambda: user.check("student.parallel={tp: 2}"),
        "student.parallel.sequence: false with tp 2", "set it to true",
    )  # fmt: skip
    user.check("student.parallel={tp: 2, sequence: true}")


def test_ranks_do_not_share_sequences_of_a_student_of_experts(user):
    user.model("student", Qwen3MoeConfig, **EXPERTS)
    refused(
        lambda: user.check("student.parallel={tp: 1, cp: 2}", world_size=4),
        "student.parallel.cp: 2 with the experts of", "has to be 1",
    )  # fmt: skip


def test_sequence_parallel_padding_counts(user):
    """49 tokens fit 49, but TP2 with sequence parallelism runs even numbers of them."""
    overrides = ("train.micro_batch_tokens=49", "rollout.max_new_tokens=17")
    user.check(*overrides)
    refused(
        lambda: user.check(*overrides, "student.parallel.sequence=true"),
        "train.micro_batch_tokens: 49",
        "at least 50",
    )


def test_padding_of_shared_sequences_counts(user):
    """49 tokens in four equal chunks take 52, and 56 where TP2 halves those of a rank."""
    overrides = ("train.micro_batch_tokens=49", "rollout.max_new_tokens=17")
    for keys, least in (("{tp: 1, cp: 2}", 52), ("{tp: 4, cp: 2, sequence: true}", 56)):
        parallel = f"teacher.parallel={keys}"
        refused(lambda p=parallel: user.check(*overrides, p), f"give at least {least}")
    refused(
        lambda: user.check("student.parallel={tp: 2, cp: 2}", world_size=2),
        "student.parallel: tp 2 × cp 2 × pp 1 = 4 does not divide", "multiple of 4",
    )  # fmt: skip


# Models


@pytest.mark.parametrize(
    ("config_class", "changes", "parts"),
    [
        (Qwen3Config, {"architectures": ["MixtralForCausalLM"]}, ("MixtralForCausalLM", "Qwen2")),
        (Qwen3Config, {"architectures": None}, ("does not name", "supported: LlamaForCausalLM")),
        (Qwen3MoeConfig, {"mlp_only_layers": [0]}, ("a mixture of dense and expert layers",)),
        (Qwen3Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
         ("sliding-window attention (window 8)",)),
        (Qwen3Config, {"attention_bias": True}, ("attention_bias", "not supported")),
        (LlamaConfig, {"mlp_bias": True}, ("mlp_bias", "not supported")),
        (LlamaConfig, {"hidden_act": "gelu"}, ("hidden_act gelu (only silu)",)),
        (LlamaConfig,
         {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
         ("rope_type dynamic (only default, linear, llama3, yarn)",)),
        (Qwen2Config, {"quantization_config": {"quant_method": "awq"}}, ("quantised weights",)),
    ],
)  # fmt: skip
def test_models_that_are_refused(user, config_class, changes, parts):
    user.model("teacher", config_class, **changes)
    refused(user.check, "teacher.path", "models/teacher", *parts)


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("model.safetensors", ("model.safetensors is missing", "safetensors weights")),
        ("tokenizer.json", ("has no tokenizer (tokenizer.json", "copy")),
        ("config.json", ("has no config.json",)),
    ],
)
def test_files_of_a_model_that_are_missing(user, file, parts):
    (user.dir / "models" / "teacher" / file).unlink()
    refused(user.check, "teacher.path", *parts)


@pytest.mark.parametrize(
    ("file", "text", "parts"),
    [
        ("config.json", "{", ("config.json: not JSON",)),
        ("tokenizer.json", "{", ("transformers cannot read it",)),
        ("model.safetensors.index.json", "", ("model.safetensors.index.json: not JSON",)),
    ],
)
def test_files_of_a_model_that_are_damaged(user, file, text, parts):
    (user.dir / "models" / "teacher" / file).write_text(text)
    refused(user.check, "teacher.path", *parts)


# Vocabularies


@pytest.mark.parametrize(
    "words", [[*WORDS[:7], "other", *WORDS[8:]], [*WORDS, "more"], [WORDS[0], *WORDS[:0:-1]]]
)
def test_tokenizers_may_differ(user, words):
    """In a token, in length, in all ids."""
    user.ask("w1 w2 w3 w4 w5", answer="w6 w7 w8 w9 w10")
    user.model("teacher", words=words, vocab_size=101)
    user.check()


def test_tokenizers_that_share_too_little_are_refused_with_the_figure(user):
    """w6 is one of the eleven tokens of the question, w7 one of the answer's two."""
    user.model("teacher", words=[*WORDS[:7], "other", "another", *WORDS[9:]])
    user.ask("w1 w2 w3 w4 w5 w1 w2 w3 w4 w5 w6", answer="w1 w7")
    refused(
        user.check, "teacher.path", "models/teacher: of 13 tokens of prompts and answers",
        "11 (84.62%) have a counterpart", "at least 90%",
    )  # fmt: skip
    user.ask("w1 w2 w3 w4 w5 w1 w2 w3 w4 w5 w6", answer=None)  # 10 of 11
    user.check()


def test_the_students_prompt_is_for_a_teacher_with_the_same_ids(user):
    user.check("teacher.prompt=student")
    user.ask("w1 w2 w3 w4 w5")
    user.model("teacher", words=[WORDS[0], *WORDS[:0:-1]])
    refused(lambda: user.check("teacher.prompt=student"), "teacher.prompt: student", "to be own")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["teacher.prompt=student", "teacher.system=Hi"], ["teacher.system: 'Hi'", "take out one"]),
        (["teacher.prompt=student", "teacher.context_column=a"], ["teacher.context_column: 'a'"]),
        (["teacher.prompt=student", "teacher.max_prompt_tokens=9"], ["max_prompt_tokens: 9"]),
        (["teacher.prompt=student", "teacher.template_kwargs={a: 1}"], ["kwargs: {'a': 1}"]),
        (["teacher.context_overflow=cut"], ["overflow: 'cut'", "name teacher.context_column"]),
        (["teacher.context_template=x"], ["template: 'x'", "name teacher.context_column"]),
        (
            ["teacher.context_column=a", "teacher.context_template=x"],
            ["teacher.context_template: 'x' leaves out {{ context }}"],
        ),
        (
            ["train.micro_batch_tokens=64", "rollout.max_new_tokens=32",
             "data.max_prompt_tokens=16", "teacher.max_prompt_tokens=33"],
            ["micro_batch_tokens: 64", "teacher.max_prompt_tokens 33", "give at least 65"],
        ),
        (
            ["teacher.max_prompt_tokens=200", "train.micro_batch_tokens=4096"],
            ["rollout.max_new_tokens", "after teacher.max_prompt_tokens 200", "teacher takes"],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_teacher_reads_besides_goes_together(user, overrides, parts):
    user.ask("w1 w2 w3 w4 w5")
    user.check("teacher.context_column=hint", "teacher.system=Hi", "teacher.context_overflow=cut")
    refused(lambda: user.check(*overrides), *parts)


def test_a_chat_template_is_needed_of_those_who_render(user):
    (user.dir / "models" / "student" / "chat_template.jinja").write_text("{{ messages }}")
    refused(
        lambda: user.check("data.template=chat"),
        "data.template: chat, but the tokenizer of",
        "models/teacher has no chat template",
    )
    user.check("data.template=chat", "teacher.prompt=student")


def test_ids_without_a_counterpart_do_not_count_for_top_k(user):
    user.model("teacher", words=[*WORDS[:50], *(f"other{i}" for i in range(50))])
    user.check("selection.k=50")
    refused(lambda: user.check("selection.k=51"), "selection.k: 51", "the 50 ids")


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_a_tokenizer_with_more_ids_than_the_model_has_rows(user, model):
    user.model(model, vocab_size=99)
    refused(user.check, f"{model}.path", "id 99 lies outside the model's vocabulary of 99")


# What is shipped


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("examples/*.yaml")), ids=str)
def test_shipped_configurations_load(path, monkeypatch):
    for variable in ("TAOPD_DATA", "DATA", "MODELS", "RUNS"):
        monkeypatch.setenv(variable, "/data")
    served = "64gpu" in path.stem  # by servers whose URLs the launcher gives
    config = load(path, ["rollout.servers.urls=[http://node6:30000]"] if served else [])
    assert config.selection.selector == "teachability"
    assert Path(config.student.path).is_absolute()
    for teacher in config.each_teacher.values():
        itself = teacher.source != "path"
        assert (config.student.path == teacher.path) == itself


@pytest.mark.parametrize("warped", ["temperature=0.7", "top_p=0.9", "top_k=20"])
def test_the_policy_gradient_needs_unwarped_sampling(user, warped):
    refused(
        lambda: user.check("loss.kind=sampled_token", f"rollout.{warped}"),
        f"rollout.{warped.split('=')[0]}: ",
        "sampled_token",
        "has to be",
    )
    user.check("loss.kind=sampled_token")
