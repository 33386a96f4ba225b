"""Every key of the configuration, at values other than its default, and the test that runs each.

`KEYS` maps a key to its values, as they are written on a command line, and each of them to a test
of this directory. The tests named `test_keys_…` take their overrides from here (`given`), so that
what is listed is what is run; others name the key in their own text. test_every_key.py sees to it
that no key is missing; tests/faults/lost_keys.py, that each is missed by its test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

ANY = "…"  # a value that the test chooses: a path, a port
LOST: str | None = None  # a key that no test gets (tests/faults/lost_keys.py)

GOES_ON = "test_partial.py::test_a_killed_run_loses_no_response_and_repeats_none"
STEP = "test_keys_step.py::test_a_step_is_that_of_dense_float64"
MINI_BATCHES = "test_keys_step.py::test_mini_batches_are_steps_with_their_own_means"
WEIGHTS = "test_keys_step.py::test_rows_count_by_the_discrepancy_before_them"
BF16 = "test_keys_step.py::test_everything_is_in_the_precision_of_the_run"
RECOMPUTE = "test_keys_step.py::test_recomputation_runs_parts_of_the_layers_twice"
BOUNDS = "test_keys_step.py::test_micro_batches_and_logits_stay_within_their_bounds"
OFFLOAD = "test_keys_step.py::test_an_offloaded_teacher_moves"
SELF = "test_keys_step.py::test_the_student_teaches_itself_with_its_first_weights"
AVERAGE = "test_keys_step.py::test_the_teacher_is_an_average_of_the_student"
ADAM = "test_keys_step.py::test_the_optimizer_is_adamw"
ROLLOUT = "test_keys_rollout.py::test_prompts_and_responses_are_those_asked_for"
SEED = "test_keys_rollout.py::test_the_seed_orders_prompts_and_draws_another_mask_each_step"
HORIZON = "test_keys_rollout.py::test_a_horizon_of_tokens_is_for_training_alone"
AUTO = "test_keys_rollout.py::test_the_horizon_is_where_a_token_stops_to_pay"
GROWTH = "test_keys_rollout.py::test_a_horizon_grows_and_a_resumed_run_grows_on"
CHAT = "test_keys_rollout.py::test_chat_needs_a_template"
KWARGS = "test_keys_rollout.py::test_variables_reach_the_template_of_each_model"
REPEATS = "test_keys_rollout.py::test_rows_that_repeat_are_kept_if_that_is_asked_for"
CONTEXT = "test_keys_rollout.py::test_a_context_is_read_by_the_teacher_alone"
PROMPT = "test_keys_rollout.py::test_a_teacher_reads_the_students_prompt"
GRADER = "test_keys_rollout.py::test_the_grader_that_was_asked_for"
STREAM = "test_keys_rollout.py::test_without_streaming_the_teacher_reads_once"
LAYOUT = "test_keys_run.py::test_models_lie_in_their_layouts"
SHARED = "test_keys_run.py::test_ranks_share_long_sequences"
EXPERTS = "test_keys_run.py::test_experts_lie_on_several_ranks"
CHECKPOINTS = "test_keys_run.py::test_checkpoints_come_and_go"
TRUST = "test_keys_run.py::test_a_checkpoint_without_checksums_has_to_be_trusted"
PROFILE = "test_profiling.py::test_a_trace_has_the_spans_of_the_step_that_was_asked_for"
NO_CUDA = "test_profiling.py::test_profiles_of_cuda_are_refused_without_it"
MIX = "test_mix.py::test_a_step_of_both_sources_is_that_of_dense_float64"
DRAFTS = "test_speculative.py::test_drafts_are_refused_without_cuda"
PEAK = "test_throughput.py::test_a_run_is_measured_against_a_peak"
LOGS = "test_keys_run.py::test_where_a_run_is_logged"
GAP = "test_keys_run.py::test_a_gap_above_its_bound_is_told"
SPIKE = "test_keys_run.py::test_a_loss_within_its_bound_is_no_spike"
WATCHDOG = "test_keys_run.py::test_silence_and_a_standstill_end_the_job_in_time"
OWN = "test_keys_servers.py::test_a_runs_own_servers"
COMMAND = "test_keys_servers.py::test_sglang_understands_their_command_lines"
FOUND = "test_keys_servers.py::test_servers_that_are_there"
PATIENCE = "test_keys_servers.py::test_requests_are_given_up_in_time"
START = "test_keys_servers.py::test_servers_that_do_not_start_are_given_up_in_time"
LATE = "test_keys_servers.py::test_servers_that_do_not_listen_are_given_up_in_time"

TEACHERS = "test_teachers.py::test_a_run_of_two_teachers_goes_on_bit_for_bit"

KEYS: dict[str, dict[str, str]] = {
    "run.dir": {ANY: "test_train.py::test_what_a_run_logs_and_leaves"},
    "run.seed": {"7": ROLLOUT, "5": SEED},
    "run.name": {"a name": LOGS},
    "student.path": {ANY: STEP},
    "student.parallel.tp": {"2": LAYOUT},
    "student.parallel.pp": {"2": LAYOUT},
    "student.parallel.cp": {"2": SHARED},
    "student.parallel.sequence": {"true": LAYOUT},
    "student.parallel.ep": {"2": EXPERTS},
    "student.moe.router": {"frozen": EXPERTS},
    "student.moe.aux_loss": {"0.3": EXPERTS},
    "teacher.path": {ANY: STEP},
    "teacher.source": {"student": SELF, "student_ema": AVERAGE},
    "teacher.ema": {"0.6": AVERAGE},
    "teacher.engine": {"sglang": OWN},
    "teacher.servers.urls": {ANY: FOUND},
    "teacher.servers.replicas": {"3": OWN},
    "teacher.servers.tp": {"2": OWN},
    "teacher.servers.gpus": {"[2,3,0,1,8,9]": OWN},
    "teacher.servers.host": {"127.0.0.3": OWN},
    "teacher.servers.api_key_env": {ANY: OWN},
    "teacher.servers.concurrency": {"2": OWN},
    "teacher.servers.timeout_s": {"0.3": PATIENCE},
    "teacher.servers.max_retries": {"2": PATIENCE},
    "teacher.servers.start_timeout_s": {"0.6": START, "0.7": LATE},
    "teacher.servers.context_length": {"600": COMMAND},
    "teacher.servers.max_running_requests": {"7": COMMAND},
    "teacher.servers.max_total_tokens": {"7000": COMMAND},
    "teacher.servers.mem_fraction": {"0.6": COMMAND},
    "teacher.servers.args": {"[--log-level, error]": OWN},
    "teacher.form": {"topk": OWN},
    "teacher.topk": {"20": OWN},
    "teacher.prompt": {"student": PROMPT},
    "teacher.template_kwargs": {"{ends: then}": KWARGS},
    "teacher.system": {"Max has cards .": CONTEXT},
    "teacher.context_column": {"task.shows": CONTEXT},
    "teacher.context_template": {"'{{ prompt }} so {{ context }}'": CONTEXT},
    "teacher.context_overflow": {"cut": CONTEXT},
    "teacher.max_prompt_tokens": {"26": CONTEXT},
    "teacher.parallel.tp": {"2": LAYOUT},
    "teacher.parallel.pp": {"2": LAYOUT},
    "teacher.parallel.cp": {"2": SHARED},
    "teacher.parallel.sequence": {"true": LAYOUT},
    "teacher.parallel.ep": {"2": EXPERTS},
    "teacher.offload": {"true": OFFLOAD},
    "teachers": {ANY: TEACHERS},
    "data.prompts": {ANY: ROLLOUT},
    "data.prompt_column": {"task.asks": ROLLOUT},
    "data.answer_column": {"task.says": ROLLOUT},
    "data.response_column": {"solution": MIX},
    "data.excluded_column": {"hidden": MIX},
    "data.template": {"plain": ROLLOUT, "chat": CHAT},
    "data.template_kwargs": {"{ends: gets}": KWARGS},
    "data.system": {"Tom has nuts .": ROLLOUT},
    "data.max_prompt_tokens": {"20": ROLLOUT},
    "data.teacher_column": {"skill": TEACHERS},
    "data.shuffle": {"false": ROLLOUT},
    "data.limit": {"6": ROLLOUT},
    "data.deduplicate": {"false": REPEATS},
    "data.cache_dir": {ANY: REPEATS},
    "rollout.engine": {"sglang": OWN},
    "rollout.servers.urls": {ANY: FOUND},
    "rollout.servers.replicas": {"2": OWN},
    "rollout.servers.tp": {"2": OWN},
    "rollout.servers.gpus": {"[4,5,7,6]": OWN},
    "rollout.servers.host": {"127.0.0.2": OWN},
    "rollout.servers.api_key_env": {ANY: OWN},
    "rollout.servers.concurrency": {"3": OWN},
    "rollout.servers.timeout_s": {"0.4": PATIENCE},
    "rollout.servers.max_retries": {"1": PATIENCE},
    "rollout.servers.start_timeout_s": {"0.6": START, "0.7": LATE},
    "rollout.servers.context_length": {"500": COMMAND},
    "rollout.servers.max_running_requests": {"5": COMMAND},
    "rollout.servers.max_total_tokens": {"6000": COMMAND},
    "rollout.servers.mem_fraction": {"0.4": COMMAND},
    "rollout.servers.args": {"[--log-level, warning]": OWN},
    "rollout.sync.transport": {"tensor": OWN, "disk": FOUND},
    "rollout.sync.bucket_mib": {"1": OWN},
    "rollout.sync.dir": {ANY: FOUND},
    "rollout.sync.release_memory": {"true": FOUND},
    "rollout.sync.cache": {"keep": GOES_ON},
    "rollout.sync.max_gap": {"0.9": OWN},
    "rollout.gap_warning": {"1.0e-09": GAP},
    "rollout.prompts": {"4": ROLLOUT},
    "rollout.samples": {"3": ROLLOUT},
    "rollout.max_new_tokens": {"10": ROLLOUT},
    "rollout.horizon": {
        "7": HORIZON,
        "auto": AUTO,
        "{start: 3, end: 12, steps: 4, growth: geometric}": GROWTH,
    },
    "rollout.horizon_floor": {"5": AUTO},
    "rollout.horizon_prompt_weight": {"0.01": AUTO},
    "rollout.temperature": {"1.6": ROLLOUT},
    "rollout.top_p": {"0.8": ROLLOUT},
    "rollout.top_k": {"6": ROLLOUT},
    "rollout.stop_token_ids": {"[7]": ROLLOUT},
    "rollout.batch_size": {"5": ROLLOUT},
    "rollout.ahead": {"1": OWN},
    "rollout.partial": {"true": GOES_ON},
    "rollout.max_staleness": {"3": GOES_ON},
    "rollout.stream": {"false": STREAM},
    "rollout.mix": {"{dataset: 0.25}": MIX},
    "rollout.warmup_steps": {"1": MIX},
    "rollout.speculative": {"{algorithm: NGRAM, num_draft_tokens: 8}": DRAFTS},
    "selection.selector": {
        name: STEP
        for name in (
            "full", "entropy", "divergence", "compatibility", "tip", "teachability_entropy",
            "q3", "q3_high_c", "q3_high_dl", "q3_low_dl", "q3_high_di", "prefix", "prefix_share",
        )
    } | {"random": SEED},
    "selection.ratio": {"0.35": STEP},
    "selection.scope": {"teacher": TEACHERS},
    "selection.k": {"5": STEP},
    "selection.concentrate": {
        "0.5": "test_train.py::test_a_run_that_saves_resumes_bit_for_bit_too"
    },
    "loss.kind": {
        kind: STEP for kind in ("forward_kl", "jsd", "skewed_reverse_kl", "sampled_token")
    },
    "loss.beta": {"0.2": STEP},
    "loss.alpha": {"0.4": STEP},
    "loss.max_ratio": {"0.9": STEP},
    "loss.weights": {"discrepancy": WEIGHTS},
    "loss.gamma": {"2.0": WEIGHTS},
    "train.steps": {"3": ROLLOUT},
    "train.micro_batch_tokens": {"100": BOUNDS},
    "train.mini_batches": {"3": MINI_BATCHES},
    "train.schedule": {"replay": "test_train.py::test_both_schedules_take_the_same_steps"},
    "train.replay_memory_mib": {
        "1": "test_train.py::test_layer_outputs_that_do_not_fit_are_not_kept"
    },
    "train.precision": {"bf16": BF16},
    "train.recompute": {"selective": RECOMPUTE, "full": RECOMPUTE},
    "train.head_memory_mib": {"1": BOUNDS},
    "train.profile.steps": {"[2]": PROFILE},
    "train.profile.kind": {"nsys": NO_CUDA, "memory": NO_CUDA},
    "train.profile.ranks": {"[1]": PROFILE},
    "optimizer.lr": {"0.002": ADAM},
    "optimizer.min_lr": {"0.0005": ADAM},
    "optimizer.decay": {"cosine": ADAM, "linear": ADAM},
    "optimizer.warmup_steps": {"2": ADAM},
    "optimizer.weight_decay": {"0.3": ADAM},
    "optimizer.beta1": {"0.8": ADAM},
    "optimizer.beta2": {"0.95": ADAM},
    "optimizer.eps": {"0.001": ADAM},
    "optimizer.clip": {"0.5": ADAM},
    "checkpoint.every": {"2": CHECKPOINTS},
    "checkpoint.keep_last": {"1": CHECKPOINTS},
    "checkpoint.keep_best": {"false": CHECKPOINTS},
    "checkpoint.asynchronous": {"false": CHECKPOINTS},
    "checkpoint.trust": {"true": TRUST},
    "checkpoint.export_hf": {"false": CHECKPOINTS},
    "eval.every": {"2": ROLLOUT},
    "eval.prompts": {ANY: ROLLOUT},
    "eval.max_new_tokens": {"6": ROLLOUT},
    "eval.limit": {"5": ROLLOUT},
    "eval.samples": {"4": ROLLOUT},
    "eval.temperature": {"0.7": ROLLOUT},
    "eval.pass_at": {"[2]": ROLLOUT},
    "eval.grader": {"exact": GRADER, "math": GRADER},
    "eval.at_start": {"false": ROLLOUT},
    "guard.max_skipped": {
        "1": "test_guard.py::test_a_broken_student_ends_the_run_and_the_last_good_checkpoint_stays"
    },
    "guard.loss_spike": {"60.0": SPIKE},
    "guard.teacher_every": {"2": "test_guard.py::test_a_teacher_that_changes_ends_the_run"},
    "watchdog.heartbeat_timeout_s": {"1.5": WATCHDOG},
    "watchdog.stall_timeout_s": {"1.0": WATCHDOG},
    "log.tensorboard": {"false": LOGS},
    "log.wandb_project": {"a project": LOGS},
    "log.prometheus_port": {ANY: LOGS},
    "log.prometheus_host": {"127.0.0.2": LOGS},
    "log.peak_tflops": {"0.25": PEAK},
    "log.samples": {"1": LOGS},
}  # fmt: skip


def given(test: str, chosen: Mapping[str, Any] = {}) -> dict[str, str]:
    """The keys that a test runs, each with its value as a command line has it.

    Args:
        chosen: values that the table leaves to the test, and of several of a key the one meant.
    """
    found = {}
    for key, values in KEYS.items():
        mine = [text for text, named in values.items() if named == test]
        if not mine:
            continue
        assert key in chosen or (len(mine) == 1 and mine != [ANY]), f"{key}: which value?"
        found[key] = str(chosen.get(key, mine[0]))
        assert found[key] in mine or mine == [ANY], f"{key}: {found[key]} is not in the table"
    assert chosen.keys() <= found.keys(), chosen.keys() - found.keys()
    return found


def written(keys: Mapping[str, str]) -> list[str]:
    """Overrides of a command line."""
    return [f"{key}={text}" for key, text in keys.items() if key != LOST]


def section(keys: Mapping[str, str], name: str) -> dict[str, Any]:
    """The values of a section's own keys."""
    parts = {key: key.rpartition(".") for key in keys}
    return {parts[key][2]: value(text) for key, text in keys.items() if parts[key][0] == name}


def value(text: str) -> Any:
    """What a value of the table is, read as YAML."""
    return yaml.safe_load(text)
