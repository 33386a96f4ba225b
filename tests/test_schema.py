"""Every key of the configuration refuses what it cannot be, in one line; its page is current."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_taopd.config import Config, load
from megatron_taopd.config.reference import reference
from megatron_taopd.config.schema import check_bounds, leaf_keys
from megatron_taopd.config.values import check_sections

ROOT = Path(__file__).parent.parent
REQUIRED = ["run.dir=d", "student.path=s", "teacher.path=t", "data.prompts=p"]
# Of each number: a value below what it may be and one above (None: there is none), and the words.
COUNT = ("0", None, "at least 1")
NOT_NEGATIVE = ("-1", None, "0 or more")
POSITIVE = ("0", ".inf", "more than 0")
SHARE = ("0", "1.1", "in (0, 1]")
INSIDE = ("0", "1", "strictly between 0 and 1")
DECAY = ("-0.1", "1", "in [0, 1)")
NUMBERS = {
    "run.seed": NOT_NEGATIVE,
    "data.max_prompt_tokens": COUNT,
    "teacher.max_prompt_tokens": COUNT,
    "data.limit": COUNT,
    "rollout.gap_warning": POSITIVE,
    "rollout.prompts": COUNT,
    "rollout.samples": COUNT,
    "rollout.max_new_tokens": COUNT,
    "rollout.horizon_floor": COUNT,
    "rollout.warmup_steps": NOT_NEGATIVE,
    "rollout.horizon_prompt_weight": NOT_NEGATIVE,
    "rollout.temperature": POSITIVE,
    "rollout.top_p": SHARE,
    "rollout.top_k": NOT_NEGATIVE,
    "rollout.batch_size": COUNT,
    "rollout.ahead": NOT_NEGATIVE,
    "rollout.max_staleness": COUNT,
    "rollout.sync.bucket_mib": COUNT,
    "rollout.sync.max_gap": POSITIVE,
    "teacher.ema": DECAY,
    "teacher.topk": COUNT,
    "selection.ratio": SHARE,
    "selection.k": COUNT,
    "selection.concentrate": DECAY,
    "loss.beta": INSIDE,
    "loss.alpha": INSIDE,
    "loss.gamma": POSITIVE,
    "loss.max_ratio": POSITIVE,
    "train.steps": COUNT,
    "train.micro_batch_tokens": COUNT,
    "train.mini_batches": COUNT,
    "train.replay_memory_mib": COUNT,
    "train.head_memory_mib": COUNT,
    "optimizer.lr": POSITIVE,
    "student.moe.aux_loss": NOT_NEGATIVE,
    "optimizer.min_lr": NOT_NEGATIVE,
    "optimizer.warmup_steps": NOT_NEGATIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.beta1": DECAY,
    "optimizer.beta2": DECAY,
    "optimizer.eps": POSITIVE,
    "optimizer.clip": NOT_NEGATIVE,
    "checkpoint.every": NOT_NEGATIVE,
    "checkpoint.keep_last": COUNT,
    "eval.every": NOT_NEGATIVE,
    "eval.max_new_tokens": COUNT,
    "eval.limit": COUNT,
    "eval.samples": COUNT,
    "eval.temperature": NOT_NEGATIVE,
    "guard.max_skipped": COUNT,
    "guard.loss_spike": ("1", ".inf", "0 or more than 1"),
    "guard.teacher_every": NOT_NEGATIVE,
    "watchdog.heartbeat_timeout_s": ("0.5", ".inf", "0 or at least 1"),
    "watchdog.stall_timeout_s": NOT_NEGATIVE,
    "log.prometheus_port": ("0", "65536", "in [1, 65535]"),
    "log.peak_tflops": POSITIVE,
    "log.samples": ("-1", "17", "in [0, 16]"),
    **{
        f"{model}.servers.{name}": bounds
        for model in ("rollout", "teacher")
        for name, bounds in {
            "replicas": COUNT,
            "tp": COUNT,
            "concurrency": COUNT,
            "timeout_s": POSITIVE,
            "max_retries": NOT_NEGATIVE,
            "start_timeout_s": POSITIVE,
            "context_length": COUNT,
            "max_running_requests": COUNT,
            "max_total_tokens": COUNT,
            "mem_fraction": INSIDE,
        }.items()
    },
    **{
        f"{m}.parallel.{name}": COUNT
        for m in ("student", "teacher")
        for name in ("tp", "pp", "cp", "ep")
    },
}
# Of each key that is no number, something of another type or another name, and the words.
SWITCHES = {
    **{f"{m}.parallel.sequence": ("maybe", "bool") for m in ("student", "teacher")},
    **{
        name: ("maybe", "bool")
        for name in (
            "teacher.offload", "data.shuffle", "data.deduplicate", "rollout.sync.release_memory",
            "rollout.partial", "rollout.stream", "checkpoint.keep_best", "checkpoint.asynchronous",
            "checkpoint.trust", "checkpoint.export_hf", "eval.at_start", "log.tensorboard",
        )
    },
    **{f"{name}.template_kwargs": ("5", "mapping") for name in ("data", "teacher")},
    **{f"rollout.{name}": ("NGRAM", "mapping") for name in ("speculative", "mix")},
    "teacher.source": ("itself", "['path', 'student', 'student_ema']"),
    "teacher.engine": ("vllm", "['megatron', 'sglang']"),
    "teacher.form": ("logits", "['hidden_states', 'topk']"),
    "teacher.prompt": ("mine", "['own', 'student']"),
    "student.moe.router": ("learn", "['train', 'frozen']"),
    "teacher.context_overflow": ("squeeze", "['drop', 'cut']"),
    "data.template": ("jinja", "['auto', 'chat', 'plain']"),
    "rollout.engine": ("vllm", "['local', 'sglang']"),
    "rollout.sync.transport": ("ftp", "['distributed', 'tensor', 'disk']"),
    "rollout.sync.cache": ("forget", "['recompute', 'keep']"),
    "loss.weights": ("iw", "['none', 'discrepancy']"),
    "selection.scope": ("rank", "['batch', 'teacher']"),
    "train.schedule": ("once", "['two_pass', 'replay']"),
    "train.precision": ("fp8", "['fp32', 'bf16']"),
    "train.profile.kind": ("rocprof", "['torch', 'nsys', 'memory']"),
    "train.recompute": ("some", "['none', 'selective', 'full']"),
    "optimizer.decay": ("step", "['constant', 'cosine', 'linear']"),
    "eval.grader": ("me", "['auto', 'exact', 'math']"),
    **{
        name: ("5", "list")
        for name in (
            "train.profile.steps", "train.profile.ranks",
            "rollout.stop_token_ids", "eval.pass_at", "rollout.servers.urls",
            "rollout.servers.args", "rollout.servers.gpus", "teacher.servers.urls",
            "teacher.servers.args", "teacher.servers.gpus",
        )
    },
}  # fmt: skip
# Any text will do; what it names is looked at later.
TEXTS = {
    "run.dir", "run.name", "student.path", "teacher.path", "data.prompts", "data.prompt_column",
    "data.answer_column", "data.response_column", "data.excluded_column", "data.system",
    "data.cache_dir", "eval.prompts", "rollout.sync.dir", "rollout.horizon",
    "teachers", "data.teacher_column",
    "selection.selector", "loss.kind", "log.wandb_project", "log.prometheus_host",
    "rollout.servers.host", "rollout.servers.api_key_env", "teacher.servers.host",
    "teacher.servers.api_key_env", "teacher.system", "teacher.context_column",
    "teacher.context_template",
}  # fmt: skip


def refused(tmp_path, override: str) -> str:
    """The one line that this override is refused with."""
    (tmp_path / "run.yaml").write_text("{}")
    with pytest.raises(ValueError) as caught:
        check_sections(load(tmp_path / "run.yaml", [*REQUIRED, override]))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_key_is_here():
    assert {name for name, _, _ in leaf_keys()} == NUMBERS.keys() | SWITCHES.keys() | TEXTS


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_that_are_refused(tmp_path, key):
    below, above, right = NUMBERS[key]
    for value in (below, above):
        if value is not None:
            message = refused(tmp_path, f"{key}={value}")
            assert message.startswith(f"{key}: {value.lstrip('.')}") and message.endswith(right)
    message = refused(tmp_path, f"{key}=many")
    assert message.startswith(f"{key}: Value 'many'") and (
        "Integer" in message or "Float" in message
    )


@pytest.mark.parametrize("key", SWITCHES)
def test_other_values_that_are_refused(tmp_path, key):
    value, right = SWITCHES[key]
    message = refused(tmp_path, f"{key}={value}")
    assert message.startswith(f"{key}: ") and value in message and right in message


@pytest.mark.parametrize("key", sorted(TEXTS))
def test_texts_that_are_refused(tmp_path, key):
    message = refused(tmp_path, f"{key}=[1, 2]")
    assert message.startswith(f"{key}: ") and "[1, 2]" in message


def test_defaults_are_within_their_bounds():
    check_bounds(Config())


def test_the_page_is_current():
    """`python -m megatron_taopd.config.reference > docs/configuration.md` makes it anew."""
    assert (ROOT / "docs" / "configuration.md").read_text() == reference()
