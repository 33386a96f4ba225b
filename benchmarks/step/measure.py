"""Agreement and memory once, then times, everything taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.step.pairs import RATIO, K, Models, pair_on_disk, qwen3_slice
from benchmarks.step.peer import trl_phases
from benchmarks.step.results import extrapolate
from benchmarks.step.step import Arm, Step, arms, metered, say, seconds
from megatron_taopd import score_hidden
from megatron_taopd.config.schema import LossSection
from megatron_taopd.monitoring.accounting import ModelCost, Work, step_operations
from megatron_taopd.parallel import platform
from megatron_taopd.step.extensions.horizon import Horizon
from megatron_taopd.step.selection import budget
from megatron_taopd.types import WantedRows


def measure(arguments) -> dict:
    """Agreement and memory once, then times, everything taking turns."""
    build_pair = qwen3_slice if arguments.pair == "slice" else pair_on_disk
    models, batch, rollout = build_pair(arguments)
    step = Step(models, batch)
    every = arms(arguments.ratios, arguments.concentrate)
    measured = {
        "setup": {
            **{k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
            "layout": str(models.layout),
            "threads": torch.get_num_threads(),
            "sequences": batch.num_sequences,
            "tokens": int(step.assigned.lengths.sum()),
            "rows": batch.num_rows,
            "chunk_rows": models.heads.chunk_rows,
            "micro_batches": len(step.assigned.micro_batches),
        },
    }
    if rollout is not None:  # the slice has no memory to spare for a second gradient
        measured["agreement"] = agreement(step)
        say(f"agreement: {measured['agreement']}")
    measured["memory"] = memory_of_phases(step)
    measured["arms"] = [asdict(arm) | {"name": str(arm)} | facts(step, arm) for arm in every]
    measured["full_opd_loss"] = step.train(step.everything, "single_pass", "none")["loss"]
    measured["concentration"] = concentration(step)
    measured["heads"] = heads = measure_heads(step)

    # What arms have in common is timed once a repeat.
    timed: dict[tuple, Callable] = {("teacher",): step.read}
    for schedule in ("two_pass", "replay"):
        timed["scoring", schedule] = partial(step.score, schedule)
    for arm in every:
        timed["training", arm] = partial(step.select_and_train, arm)
    for head in heads:
        for what in ("score", "loss"):
            timed["head", what, head["rows"]] = partial(
                run_head, models, what, head["rows"], models.heads.chunk_rows
            )
    if rollout is not None:
        timed |= horizon_phases(step, rollout, measured)
    if not arguments.no_trl and dist.get_world_size() == 1 and find_spec("trl"):
        timed |= trl_phases(step, measured)
    times: dict[tuple, list[float]] = {key: [] for key in timed}
    layers = []
    for repeat in range(arguments.repeats):
        for key, run in timed.items():
            with models.without_gradients() if key[0] == "trl" else nullcontext():
                times[key].append(seconds(run))
        layers.append(layer_seconds(step))
        say(f"timed {repeat + 1} of {arguments.repeats}")

    for arm, row in zip(every, measured["arms"], strict=True):
        row["seconds"] = {"teacher": times["teacher",], "training": times["training", arm]}
        if arm.schedule != "single_pass":
            row["seconds"]["scoring"] = times["scoring", arm.schedule]
    for head in heads:
        head["seconds"] = {what: times["head", what, head["rows"]] for what in ("score", "loss")}
    for name in ("horizon", "trl"):
        for row in measured.get(name, ()):
            own = (name, row["name"])
            row["seconds"] = {key[2]: spent for key, spent in times.items() if key[:2] == own}
    measured["layer_seconds"] = {key: [run[key] for run in layers] for key in layers[0]}
    if arguments.pair == "slice":
        measured["extrapolation"] = extrapolate(measured)
    return measured


def agreement(step: Step) -> dict[str, float]:
    """Relative differences of loss and gradient that ought to be rounding."""
    kept, everything = step.select(RATIO), step.everything

    def difference(rows: WantedRows, other: str) -> float:
        """Return the relative difference of a replay from another schedule."""
        loss = step.train(rows, other, "none")["loss"]
        buffers = step.models.student.model.buffers
        reference = [buffer.grad_data.clone() for buffer in buffers]
        replayed = step.train(rows, "replay", "full")["loss"]
        pairs = zip(buffers, reference, strict=True)
        apart = sum((buffer.grad_data - one).norm() ** 2 for buffer, one in pairs) ** 0.5
        norm = sum(one.norm() ** 2 for one in reference) ** 0.5
        return max(abs(replayed / loss - 1), float(apart / norm))

    return {
        f"{100 * RATIO:g} %: replay from two_pass": difference(kept, "two_pass"),
        "everything kept: replay from full OPD": difference(everything, "single_pass"),
    }


def memory_of_phases(step: Step) -> dict[str, int]:
    """Peak bytes of the phases before training, results included, and bytes of what they leave;
    bytes of the gradients that training adds to."""
    buffers = step.models.student.model.buffers
    outputs = [output for outputs in step.scored.kept_outputs for output in outputs]
    return {
        "teacher": metered(step.read)["peak"],
        "two_pass": metered(partial(step.score, "two_pass"))["peak"],
        "replay": metered(partial(step.score, "replay"))["peak"],
        "teacher_rows": sum(shard.rows.nbytes for shard in step.teacher_rows.values()),
        "kept_outputs": sum(output.nbytes for output in outputs),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
    }


def facts(step: Step, arm: Arm) -> dict:
    """What no clock is needed for: peak memory of the training pass, operations, mass, tokens."""
    batch, models = step.batch, step.models
    selection = step.selection(arm.ratio, arm.concentrate)
    kept = selection.kept
    operations = step_operations(
        ModelCost.of(models.student.trunk.hf),
        ModelCost.of(models.teacher.trunk.hf),
        Work(
            scored=step.assigned.lengths,
            read=step.teacher_inputs.reach(),
            trained=kept.lengths,
            num_rows=batch.num_rows,
            kept_rows=kept.num_rows,
            replayed=arm.schedule == "replay",
            recompute=arm.recompute,
            generated=batch.response_lengths,
        ),
    )
    if arm.schedule == "single_pass":
        operations["flops/scoring"], operations["flops/of_full_opd"] = 0.0, 1.0
    # Without the reduction over data-parallel ranks: there is one, and gloo's would still copy all
    # gradients for it.
    config = models.student.config
    with ExitStack() as patches:
        for what, name in [
            (config, "finalize_model_grads_func"),
            *((group, "start_grad_sync") for group in models.student.model.bucket_groups),
        ]:
            patches.enter_context(mock.patch.object(what, name, lambda *_, **__: None))
        memory = metered(partial(step.train, kept, arm.schedule, arm.recompute))["temporaries"]
    say(f"{arm}, recompute {arm.recompute}: {memory / 1e6:,.0f} MB")
    return {
        "training_temporaries": memory,
        "kept_rows": kept.num_rows,
        "tokens_trained": int(kept.lengths.sum()),
        **operations,
        "mass_retained": selection.metrics["selection/mass_retained"],
    }


def concentration(step: Step) -> list[dict[str, float]]:
    """What is kept and what is trained at ρ = 10 % as the budget is drawn together."""
    rows = []
    for c in (0.0, 0.2, 0.3, 0.4, 0.5, 0.6):
        selected = step.selection(RATIO, c).metrics
        names = ("mass_retained", "mass_of_best", "trained_share")
        rows.append({"concentrate": c} | {name: selected[f"selection/{name}"] for name in names})
    return rows


def run_head(models: Models, what: str, rows: int, chunk_rows: int) -> tuple[Tensor, ...]:
    """Both heads on rows of noise: scores, or the loss and the student's gradients; the inputs."""
    heads, dtype = models.heads, models.student.dtype
    student_hidden, teacher_hidden = (
        torch.randn(rows, weight.shape[1], device=weight.device, dtype=dtype)
        for weight in (heads.student, heads.teacher)
    )
    weight = heads.student.detach()
    if what == "score":
        score_hidden(
            student_hidden, weight, teacher_hidden, heads.teacher, K, heads.shard, chunk_rows
        )
    else:
        own = replace(heads, student=weight.requires_grad_(), chunk_rows=chunk_rows)
        hidden = student_hidden.requires_grad_()
        weights = torch.ones(rows, device=hidden.device)
        own.divergence(hidden, teacher_hidden, LossSection(), weights).backward()
    return student_hidden, weight, teacher_hidden


def measure_heads(step: Step) -> list[dict]:
    """Temporaries of the loss's heads: on all rows at once and in chunks, on the kept rows."""
    rows, chunk_rows = step.batch.num_rows, step.models.heads.chunk_rows
    measured = []
    for count in (rows, budget(RATIO, rows)):
        loss = partial(run_head, step.models, "loss", count)
        measured.append(
            {
                "rows": count,
                "unchunked": metered(partial(loss, count))["temporaries"],
                "chunked": metered(partial(loss, chunk_rows))["temporaries"],
            }
        )
    return measured


@contextmanager
def decoder_clock(trunk) -> Iterator[dict[str, float]]:
    """Seconds between the first layer's input and the last one's output, forward and backward."""
    spent, started = {"forward": 0.0, "backward": 0.0}, {}

    def start(which: str, *_) -> None:
        platform.synchronize()
        started[which] = time.perf_counter()

    def stop(which: str, *_) -> None:
        platform.synchronize()
        spent[which] += time.perf_counter() - started[which]

    def before(_module, _args, kwargs) -> None:
        if kwargs["hidden_states"].requires_grad:  # its gradient is the last thing computed
            kwargs["hidden_states"].register_hook(partial(stop, "backward"))
        start("forward")

    def after(_module, _args, output) -> None:
        stop("forward")
        if output.requires_grad:
            output.register_hook(partial(start, "backward"))

    hooks = [
        trunk.decoder.register_forward_pre_hook(before, with_kwargs=True),
        trunk.decoder.register_forward_hook(after),
    ]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def layer_seconds(step: Step) -> dict[str, float]:
    """Seconds of a layer per token."""
    models, tokens = step.models, int(step.assigned.lengths.sum())
    with decoder_clock(models.teacher.trunk) as teacher:
        step.read()
    with decoder_clock(models.student.trunk) as student:
        step.train(step.everything, "single_pass", "none")
    layers = {
        name: len(model.trunk.decoder.layers)
        for name, model in (("student", models.student), ("teacher", models.teacher))
    }
    return {
        "teacher forward": teacher["forward"] / layers["teacher"] / tokens,
        "student forward": student["forward"] / layers["student"] / tokens,
        "student backward": student["backward"] / layers["student"] / tokens,
    }


# ------------------------------------------------------------------------------- shorter responses


def horizon_phases(step: Step, rollout, measured: dict) -> dict[tuple, Callable]:
    """The phases of TA-OPD, replayed, with responses in full, cut at what `auto` chooses, and at
    the lengths asked for."""
    setup = measured["setup"]
    longest = setup["max_new_tokens"] or rollout.max_new_tokens
    horizon = Horizon("auto", longest, rollout.horizon_floor, rollout.horizon_prompt_weight)
    horizon.observe(step.batch, step.scored.scores.learnable, longest)
    lengths = {"none": longest, "auto": horizon.length(step=2)}
    lengths |= {str(length): min(length, longest) for length in setup["horizon"]}
    phases, measured["horizon"] = {}, []
    for name, length in lengths.items():
        batch = step.batch if name == "none" else step.models.generate(length)
        own = step if name == "none" else Step(step.models, batch)
        kept = own.select(RATIO)
        measured["horizon"].append(
            {
                "name": name,
                "length": length,
                "rows": batch.num_rows,
                "kept_rows": kept.num_rows,
                "mass": float(horizon.mass[:length].sum() / horizon.mass.sum()),
            }
        )
        phases |= {
            ("horizon", name, "rollout"): partial(step.models.generate, length),
            ("horizon", name, "teacher"): own.read,
            ("horizon", name, "scoring"): partial(own.score, "replay"),
            ("horizon", name, "training"): partial(own.train, kept, "replay", "full"),
        }
    return phases
