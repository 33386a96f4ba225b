"""Whether engine, trainer and teacher compute what they should, on one prompt."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_taopd.config.schema import Config, ParallelSection, teacher_name
from megatron_taopd.data.texts import training_prompts, vocab_maps, vocabularies
from megatron_taopd.data.vocab_map import Vocabulary
from megatron_taopd.formats.hf import DTYPES, load_config, tensor_shapes
from megatron_taopd.models.student import FrozenStudent
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.faults import Fault
from megatron_taopd.parallel.layout import student_layout
from megatron_taopd.parallel.objects import gather
from megatron_taopd.preflight.findings import Finding, error, ok, warning
from megatron_taopd.rollout.engine import RolloutEngine, Sampling
from megatron_taopd.rollout.local import LocalEngine
from megatron_taopd.rollout.opening import begin_rollout_servers
from megatron_taopd.rollout.sglang import SGLangEngine
from megatron_taopd.serving.begin import wait_for_servers
from megatron_taopd.step.distiller import Distiller
from megatron_taopd.step.guard import Guard
from megatron_taopd.step.output_heads import open_heads
from megatron_taopd.step.scoring import sequence_log_probs, whole_scores
from megatron_taopd.teacher.opening import begin_teacher_servers, head_directory, open_teacher
from megatron_taopd.teacher.teachers import Teachers
from megatron_taopd.types import RolloutBatch

NEW_TOKENS = 8
# Mean |Δ log p| of two correct implementations, by dtype.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
ROUNDING = 1e-4  # below zero, that a divergence may come out


def answer(
    engine: RolloutEngine, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]
) -> RolloutBatch:
    """Generate a few greedy tokens."""
    width = min(NEW_TOKENS, max_new_tokens)
    sampling = Sampling(width, temperature=0, stop_token_ids=tuple(stop_ids))
    return engine.generate([prompt], [0], 0, sampling)


def check_engine(
    batch: RolloutBatch,
    student: FrozenStudent,
    micro_batch_tokens: int,
    chunk_rows: int,
    engine: str,
) -> list[Finding]:
    """Compare what the engine says of its tokens with what the trainer says of them."""
    (tokens,) = (batch.sequence(i) for i in range(batch.num_sequences))
    trainer = sequence_log_probs(student, [tokens.tolist()], micro_batch_tokens, chunk_rows)
    gap = (trainer[-batch.num_rows :] - batch.log_probs).abs()
    tolerance = TOLERANCE[student.dtype]
    seen = (
        f"engine {engine} and trainer ({student.layout}): log p of {batch.num_rows} greedy tokens "
        f"differs by {gap.mean():.1e} on average, {gap.max():.1e} at most"
    )
    if gap.mean() <= tolerance:  # not of NaN
        return [ok(seen)]
    return [
        error(
            f"{seen}; {tolerance:g} on average is rounding",
            "the same weights on both sides? a server that an earlier run has trained has others; "
            "else a model that one side does not support",
        )
    ]


def check_teacher(batch: RolloutBatch, distiller: Distiller) -> list[Finding]:
    """Have the teacher read the same response: scores are numbers, no divergence is negative.

    Args:
        distiller: of a student that only scores, and one teacher.
    """
    [(name, engine)] = distiller.teachers.engines.items()
    what = f"{name} ({engine.layout})"
    remedy = "taopd verify compares its weights with transformers; bf16 may overflow"
    parts, assigned = distiller.read(batch), distiller.assign(batch)
    teacher_rows = distiller.dispatch(parts, batch, assigned)
    try:
        scores = whole_scores(distiller.score(batch, assigned, teacher_rows))
    except Fault as fault:
        return [error(f"{what}: {fault.what}", remedy)]
    least, most = scores.disagreement.aminmax()
    seen = f"{what}: D of those rows is {least:.3g} … {most:.3g}"
    if least < -ROUNDING:
        return [error(f"{seen}; a divergence is not negative", remedy)]
    return [ok(f"{seen}, its entropy up to {scores.teacher_entropy.max():.3g}")]


def weight_bytes(hf_dir: str | Path, dtype: torch.dtype) -> int:
    """Count the bytes of a whole model's weights."""
    shapes = tensor_shapes(load_config(hf_dir))
    return sum(map(prod, shapes.values())) * dtype.itemsize


def available_bytes(local_ranks: int) -> int:
    """Return the memory that each rank may take, the least of all ranks.

    Collective: an all-gather of some bytes.
    """
    free = psutil.virtual_memory().available // local_ranks
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
    return min(gather(free))


def alone(config: Config) -> Config:
    """Return the configuration for one rank."""
    teachers = {
        key: replace(section, parallel=ParallelSection())
        for key, section in config.each_teacher.items()
    }
    student = replace(config.student, parallel=ParallelSection())
    return replace(config.with_teachers(teachers), student=student)


def check_models(config: Config) -> Iterator[Finding]:
    """Compare engine, trainer and teacher on the first prompt. Every rank calls this."""
    with tempfile.TemporaryDirectory(prefix="doctor-") as directory:
        try:
            yield from _compare(_with_one_server(config, directory))
        finally:
            parallel_state.destroy_model_parallel()


def _with_one_server(config: Config, directory: str) -> Config:
    """Return a configuration with one server of each model, whose log is in another directory.

    Of a teacher's servers that are there already, all stay, for they have to agree. (Rollout
    servers will be given weights.)
    """

    def one(servers, urls=None):
        gpus = None if servers.gpus is None else servers.gpus[: servers.tp]
        return replace(servers, replicas=1, gpus=gpus, urls=servers.urls[:urls])

    teachers = {
        key: replace(section, servers=one(section.servers))
        for key, section in config.each_teacher.items()
    }
    return replace(
        config.with_teachers(teachers),
        run=replace(config.run, dir=directory),
        rollout=replace(config.rollout, servers=one(config.rollout.servers, urls=1)),
    )


def _compare(config: Config) -> Iterator[Finding]:
    dtype, rollout = DTYPES[config.train.precision], config.rollout
    micro_batch_tokens = config.train.micro_batch_tokens
    student_vocabulary, theirs = vocabularies(config)
    maps = vocab_maps(config, student_vocabulary, theirs)
    limit = config.data.limit if config.teachers else 1  # one has to be found for each of several
    some = replace(config, data=replace(config.data, limit=limit))
    prompts = training_prompts(some, student_vocabulary, theirs)

    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = available_bytes(local_ranks)
    share = config.student.parallel.tp * config.student.parallel.pp
    whole = weight_bytes(config.student.path, dtype)
    needed = whole // share + (whole if rollout.engine == "local" else 0)
    more_ranks = "start the doctor by torchrun with the run's ranks, or --quick"
    if needed > free:
        what = f"engine and trainer not compared: they need {needed / 1e9:.1f} GB a rank"
        yield warning(f"{what}, {free / 1e9:.1f} are free", more_ranks)
        return
    layout = student_layout(**vars(config.student.parallel), seed=config.run.seed)
    common = min(vocab_map.size for vocab_map in maps.values())
    student = FrozenStudent(config.student.path, layout, dtype, common)
    engine = _engine(config, student_vocabulary)
    try:
        prompt, stops = prompts.token_ids[0], rollout.stop_token_ids
        batch = answer(engine, prompt, rollout.max_new_tokens, stops)
    finally:
        engine.close()
    rows = student.rows_within(config.train.head_memory_mib)
    yield from check_engine(batch, student, micro_batch_tokens, rows, rollout.engine)

    for number, (key, section) in enumerate(config.each_teacher.items()):
        parallel = section.parallel
        needed = weight_bytes(section.path, dtype) // (parallel.tp * parallel.pp)
        if key not in config.served and needed > (free := available_bytes(local_ranks)):
            what = f"{key} not run: it needs {needed / 1e9:.1f} GB a rank"
            yield warning(f"{what}, {free / 1e9:.1f} are free", more_ranks)
            continue
        vocab_map = maps[teacher_name(key)]
        engine = open_teacher(config, key, begin_teacher_servers(config, key), vocab_map)
        try:
            heads = open_heads(student, head_directory(section), vocab_map, rows)
            teachers = Teachers({key: engine}, {key: vocab_map}, prompts.teacher_token_ids)
            guard = Guard(config.guard.max_skipped, 0)
            scoring_only = replace(config.train, schedule="two_pass")  # nothing is trained on
            distiller = Distiller(
                student, teachers, heads, guard, config.selection, config.loss, scoring_only
            )
            first = 0 if prompts.teachers is None else [*prompts.teachers].index(number)
            own = replace(batch, prompts=torch.full_like(batch.prompts, first))
            yield from check_teacher(own, distiller)
        finally:
            engine.close()


def _engine(config: Config, vocabulary: Vocabulary):
    """Open the run's engine; its log-probabilities are over all tokens, as the trainer's are."""
    dtype = DTYPES[config.train.precision]
    if config.rollout.engine == "local":
        return LocalEngine.from_hf(
            config.student.path,
            dtype,
            platform.device(),
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            eos_token_ids=vocabulary.eos_token_ids,
        )
    servers = begin_rollout_servers(config, fixed_weights=True)
    model, replicas = wait_for_servers(
        servers, "rollout.servers", config.rollout.servers.start_timeout_s
    )
    return SGLangEngine(replicas, model, model.vocab_size, vocabulary.eos_token_ids)
