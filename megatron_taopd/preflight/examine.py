"""What can be known before a run: `examine` looks at everything, `before_run` at what is cheap.

Each check takes small values and returns findings (`findings.py`); this file alone knows the
configuration. A check that raises is an error of its own, and the others still run.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_taopd import config as configuration
from megatron_taopd.checkpoints import end
from megatron_taopd.checkpoints import files as checkpoint_files
from megatron_taopd.config import Config
from megatron_taopd.config.values import check_files, check_values
from megatron_taopd.data.texts import held_out_prompts, training_prompts, vocabularies
from megatron_taopd.formats.hf import DTYPES, HFCheckpoint, load_config
from megatron_taopd.monitoring.accounting import ModelCost
from megatron_taopd.monitoring.logs import OF_THE_RUN
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.objects import on_rank_0
from megatron_taopd.preflight import machine, network, storage, texts
from megatron_taopd.preflight.check_config import check
from megatron_taopd.preflight.findings import (
    Finding,
    error,
    examined,
    of_all_hosts,
    ok,
    warning,
)

logger = logging.getLogger(__name__)


def fewest_ranks(config: Config) -> int:
    """Return how many ranks the layouts of all models take at least."""
    layouts = [section.parallel for section in config.models.values()]
    return math.lcm(*(each.tp * each.pp * each.ep for each in layouts))


def examine(config: Config, ranks: int, quick: bool) -> Iterator[tuple[str, list[Finding]]]:
    """Examine everything, a group of checks at a time; the same on every rank.

    Alone, or under torchrun, which every rank then calls. Nothing is left in run.dir.

    Args:
        ranks: of the run.
        quick: without the models.

    Collectives: small gathers and broadcasts of findings; those of `check_ranks` and the models.
    """
    together, host = "RANK" in os.environ, socket.gethostname()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    run_dir = Path(config.run.dir)

    if together:
        joining = examined(_join)
        if joining:  # the others cannot be told
            yield "ranks", joining
            return

    def hosts(*checks: tuple) -> list[Finding]:
        found = [f for each in checks for f in examined(*each)] if local_rank == 0 else []
        return of_all_hosts(found, host, local_rank == 0)

    def first(*checks: tuple) -> list[Finding]:
        return on_rank_0(lambda: [f for each in checks for f in examined(*each)])

    all_found = first((_check_config, config, ranks))
    # What is wrong with a file is said once, not again by each check that reads it.
    there = on_rank_0(lambda: _are_there(config))
    if there:
        all_found += first((_check_weights, config))
    yield "configuration", all_found
    sglang = bool(config.served)
    yield "versions", hosts((machine.check_versions, sglang), (machine.check_kernels,))
    yield "machine", hosts((machine.check_devices, local_ranks), (machine.check_limits,))
    servers = [] if not sglang else [*_check_servers(config)]
    servers += _check_ports(config)
    yield "network", hosts((network.check_loopback,)) + first((network.check_rendezvous,), *servers)
    if together:
        yield "ranks", network.check_ranks(host)

    write = storage.check_shared(run_dir, host) if together else first(_write(config)[0])
    disk = (*_write(config)[1:], *([(_check_space, config)] if there else []))
    yield "disk", write + first(*disk) + hosts((storage.check_shared_memory,))
    found = []
    if there:
        yield "run.dir", first((_check_resume, config))
        found = first((_check_texts, config))
        yield "texts", found
    all_found = all_found + write + found
    if torch.cuda.is_available() and not _failed(all_found):
        yield "memory", first((_check_memory, config, ranks, local_ranks))
    if quick:
        return
    from megatron_taopd.preflight import agreement  # it takes Megatron, for which no start waits

    if _failed(all_found):
        why = "not compared: there is an error in the configuration, run.dir or the texts"
        yield "models", [warning(why, "put that right first")]
    elif together:
        # A rank that fails alone cannot be waited for: it ends the others by torchrun.
        yield "models", list(agreement.check_models(config))
    else:
        platform.initialize()
        yield "models", examined(agreement.check_models, agreement.alone(config))


def before_run(config: Config) -> bool:
    """Make the cheap checks when a run starts: a line is logged for each warning, up to the first
    error.

    They are rank 0's alone but for one: whether all nodes see the same run.dir, where there are
    several. Without it every save would fail, and the run go on.

    Returns:
        Whether the run can start; the same on every rank.

    Collectives: a broadcast of some bytes; on several nodes those of `check_shared`, and another.
    """
    sglang = bool(config.served)
    checks = [
        (machine.check_profile, config.train.profile),
        (machine.check_speculative, config.rollout),
        *_check_ports(config),
        *([] if not sglang else _check_servers(config, listening=False)),
        (_check_weights, config),
        (_check_resume, config),
        (machine.check_versions, sglang),
        *_write(config),
        (_check_space, config),
        (_check_start_of_texts, config),
    ]

    def told(findings: Iterable[Finding]) -> list[Finding]:
        for finding in findings:
            if finding.level != "ok":
                say = logger.error if finding.level == "error" else logger.warning
                say("%s; %s", finding.what, finding.remedy, extra=OF_THE_RUN)
            if finding.level == "error":
                return [finding]
        return []

    if _failed(on_rank_0(lambda: told(f for each in checks for f in examined(*each)))):
        return False
    if not dist.is_initialized() or dist.get_world_size() == platform.local_world_size():
        return True
    shared = storage.check_shared(Path(config.run.dir), socket.gethostname())
    return not _failed(on_rank_0(lambda: told(shared)))


def _failed(findings: Sequence[Finding]) -> bool:
    return any(f.level == "error" for f in findings)


def _are_there(config: Config) -> bool:
    """Tell whether the files are there that the checks read."""
    try:
        check_files(config)
    except ValueError:
        return False
    return True


def _join() -> Iterator[Finding]:
    platform.initialize()
    yield from ()


def _check_config(config: Config, ranks: int) -> Iterator[Finding]:
    try:
        check_values(config, ranks)
        check(config, ranks)
    except ValueError as problem:
        yield error(str(problem), "the first that is wrong; put it right and look again")
    else:
        yield ok(f"{ranks} ranks: it can run")


def _check_weights(config: Config) -> Iterator[Finding]:
    """Compare the header of each file of weights that ranks load with config.json."""
    for model, section in config.models.items():
        if model in config.served:
            continue  # of a served one `check` has looked at the head
        path = section.path
        try:
            HFCheckpoint(path).check(load_config(path))
        except ValueError as problem:
            yield error(f"{model}.path: {problem}", "no model is built before that is right")
        else:
            yield ok(f"{model}.path: {path}: the weights are those of its config.json")


def _check_ports(config: Config) -> list[tuple]:
    log = config.log
    if log.prometheus_port is None:
        return []
    return [
        (network.check_listening, "log.prometheus_port", log.prometheus_host, log.prometheus_port)
    ]


def _check_servers(config: Config, listening: bool = True) -> Iterator[tuple]:
    for key, served in config.served.items():
        if not served.servers.urls:
            yield network.check_own_servers, f"{key}.servers", served.servers.host
        else:
            yield network.check_urls, f"{key}.servers", served.servers.urls, listening
    if config.rollout.engine == "sglang" and config.rollout.sync.transport == "distributed":
        section = config.rollout.servers
        if not section.urls:
            yield network.check_own_nccl, "rollout.servers", section.args
        elif listening:
            key_env = section.api_key_env
            yield network.check_nccl_of_urls, "rollout.servers", section.urls, key_env


def _write(config: Config) -> list[tuple]:
    checks = [(storage.check_write, "run.dir", Path(config.run.dir))]
    if config.rollout.engine == "sglang" and config.rollout.sync.dir is not None:
        checks.append((storage.check_write, "rollout.sync.dir", Path(config.rollout.sync.dir)))
    return checks


def _check_space(config: Config) -> Iterator[Finding]:
    sync = config.rollout.sync
    by_disk = config.rollout.engine == "sglang" and sync.transport == "disk" and sync.dir is None
    return storage.check_space(
        Path(config.run.dir),
        parameters(config.student.path),
        DTYPES[config.train.precision].itemsize,
        config.checkpoint.keep_last
        + (config.checkpoint.keep_best and config.eval.prompts is not None),
        config.checkpoint.export_hf,
        by_disk,
        config.teacher.source == "student_ema",
    )


def parameters(hf_dir: str) -> int:
    """Count a dense model's parameters by its config.json; norms and biases are left out."""
    hf = load_config(hf_dir)
    cost = ModelCost.of(hf)  # two operations for each weight that a token meets
    return (cost.per_token + cost.per_row * (1 if hf.tie_word_embeddings else 2)) // 2


def _check_memory(config: Config, ranks: int, local_ranks: int) -> Iterator[Finding]:
    from megatron_taopd.plan.cluster import Cluster
    from megatron_taopd.plan.setup import Setup
    from megatron_taopd.preflight.memory import check_memory

    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return check_memory(Setup.of(config, ranks, local_ranks), gib, Cluster.reserve_gib)


def _check_resume(config: Config) -> Iterator[Finding]:
    tree, run_dir = configuration.to_tree(config), Path(config.run.dir)
    newest = max(checkpoint_files.steps(run_dir / "checkpoints"), default=0)
    missing = end.missing(config, newest)
    return storage.check_resume(run_dir, config.train.steps, tree, missing)


def _check_start_of_texts(config: Config) -> Iterator[Finding]:
    """Check the ids that end responses, and the prompts, which this tokenises for the cache."""
    student, teachers = vocabularies(config)
    for key, teacher in teachers.items():
        yield from texts.check_vocabularies(student, teacher, key)
    reading = {"data.prompts": lambda: training_prompts(config, student, teachers)}
    if config.eval.prompts is not None:
        reading["eval.prompts"] = lambda: held_out_prompts(config, student)
    for key, read in reading.items():
        try:
            read()
        except ValueError as problem:
            yield error(f"{key}: {problem}", "the run would end there")


def _check_texts(config: Config) -> Iterator[Finding]:
    student, teachers = vocabularies(config)
    sections = {key: replace(t, max_prompt_tokens=None) for key, t in config.each_teacher.items()}
    whole = replace(
        config.with_teachers(sections),
        data=replace(config.data, max_prompt_tokens=sys.maxsize),
    )
    prompts, most = training_prompts(whole, student, teachers), config.data.max_prompt_tokens
    for number, (key, section) in enumerate(config.each_teacher.items()):
        teacher, of_teacher = teachers[key], config.prompt_limit(key)[1]
        yield from texts.check_vocabularies(student, teacher, key)
        own = prompts.of_teacher(number)
        cut = section.context_overflow == "cut"  # `check_contexts` tells of these
        where = "data.prompts" if len(teachers) == 1 else f"data.prompts for {key}"
        yield from texts.check_prompts(
            where, own, student, teacher, most, sys.maxsize if cut else of_teacher
        )
        yield from texts.check_contexts(key, section, own, teacher, of_teacher)
    yield from texts.check_references(config.rollout, prompts)
    if config.eval.prompts is not None:
        held_out = held_out_prompts(whole, student)
        first, *_ = teachers.values()
        yield from texts.check_prompts("eval.prompts", held_out, student, first, most)
        yield from texts.check_held_out(prompts, held_out)
