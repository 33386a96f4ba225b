"""Steps that have to be the same: replayed or not, with TransformerEngine or not, resumed or not.

What is compared are gradients, losses and weights. In half precision two ways to the same number
differ by rounding; each limit stands next to what rounding alone makes in the same run, or is a few
units of bf16's last place (2⁻⁸ of a number).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.first_gpu import apart
from benchmarks.first_gpu.result import Result, Setting
from benchmarks.first_gpu.runs import (
    STUDENT,
    TINY,
    has_transformer_engine,
    precision,
    rollouts,
    run_of,
    step_of,
)
from benchmarks.step.pairs import RATIO
from benchmarks.step.step import Step
from megatron_taopd.types import WantedRows

ENGINE = ("transformer_engine",)
LIMIT_S = 150.0  # of a call without TransformerEngine
SCHEDULES = ("two_pass", "replay")
LEARNING = ("optimizer={lr: 1.0e-3, warmup_steps: 0, weight_decay: 0.0}", "checkpoint.every=0")


def gradients(setting: Setting) -> Result:
    """Compare the gradients of a replayed step with those of two passes, in bf16.

    Rounding is what the same two passes differ by when their sequences are packed into
    micro-batches of half the size.
    """
    result = Result()
    with step_of(setting, "bf16") as step:
        models = step.models
        halves = replace(models, micro_batch_tokens=models.micro_batch_tokens // 2)
        repacked = Step(halves, step.batch)
        repacked.scored = step.scored  # the same rows are kept
        for kept, ratio in (("the kept rows", RATIO), ("all rows", 1.0)):
            rows = step.select(ratio)
            loss, gradient = gradient_of(step, rows, "two_pass", "none")
            for schedule, recompute in (("replay", "full"), ("two_pass", "full")):
                other, its = gradient_of(step, rows, schedule, recompute)
                apart_by = distance(its, gradient)
                result.figures[f"{schedule}, recompute {recompute}, {kept}"] = apart_by
                if schedule == "replay":
                    replayed = apart_by
                    result.most(f"loss, {kept}: relative difference", abs(other / loss - 1), 2**-7)
            _, its = gradient_of(repacked, rows, "two_pass", "none")
            rounding = distance(its, gradient)
            result.figures[f"two_pass, packed otherwise, {kept}"] = rounding
            result.most(
                f"gradient, {kept}: relative difference", replayed, max(3 * rounding, 2**-7)
            )
            del gradient, its
    return result


def gradient_of(
    step: Step, rows: WantedRows, schedule: str, recompute: str
) -> tuple[float, list[Tensor]]:
    """Return the loss and the gradients, a copy of each buffer."""
    loss = step.train(rows, schedule, recompute)["loss"]
    return loss, [buffer.grad_data.clone() for buffer in step.models.student.model.buffers]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return ‖ours − theirs‖ / ‖theirs‖ over all buffers."""
    pairs = list(zip(ours, theirs, strict=True))
    apart_by = sum(float((a - b).norm()) ** 2 for a, b in pairs)
    return (apart_by / sum(float(b.norm()) ** 2 for _, b in pairs)) ** 0.5


def learn(
    file: str, directory: str, schedule: str, precision: str, until: int, save: int = 0
) -> dict:
    """Teach a run of the tiny pair the same rollouts up to a step, from where it is.

    Args:
        file: of the rollout batch.
        save: the step after which a checkpoint is written; 0: none is.

    Returns:
        Losses and gradient norms of the steps, and the weights' way from the student's own,
        [n] float32, after the last of them.
    """
    losses, norms = [], []
    train = f"train={{schedule: {schedule}, precision: {precision}, steps: {until}}}"
    with run_of(TINY, directory, *LEARNING, train) as run:
        batch = torch.load(file, weights_only=False)
        for step in range(run.first_step + 1, until + 1):
            parts = run.distiller.read(batch)
            trained = run.distiller.learn(batch, parts, run.seed_of(step)).trained
            losses.append(trained["loss"])
            norms.append(trained["grad_norm"])
            if step == save:
                run.save_last(step)
        before = load_file(STUDENT / "model.safetensors")
        way = [
            (tensor.cpu().float() - before[name].float()).flatten()
            for name, tensor in run.student.named_tensors()
        ]
    return {"losses": losses, "norms": norms, "way": torch.cat(way).numpy()}


def same_losses(setting: Setting) -> Result:
    """Take three steps in either schedule, with TransformerEngine and without."""
    result, file = Result(), rollouts(setting)
    arms = {}
    for engine, schedule in product(_engines(result), SCHEDULES):
        directory = f"{setting.scratch}/{schedule}-{engine}"
        arguments = file, directory, schedule, precision(), 3
        arms[schedule, engine] = _with(engine, setting, *arguments)
    first = next(iter(arms.values()))
    for (schedule, engine), arm in arms.items():
        name = f"{schedule}, {engine}"
        result.figures[f"losses, {name}"] = ", ".join(f"{loss:.5f}" for loss in arm["losses"])
        result.figures[f"gradient norms, {name}"] = ", ".join(f"{n:.4f}" for n in arm["norms"])
        if arm is not first:
            difference = relative(arm["losses"], first["losses"])
            result.most(f"losses, {name}: relative difference", difference, _rounding())
    moved = abs(first["losses"][-1] / first["losses"][0] - 1)
    result.least("change of the loss over the steps", moved, 2 * _rounding())
    return result


def resumed(setting: Setting) -> Result:
    """Resume with TransformerEngine what was saved without, and the other way round.

    The run that goes on has to take the steps of one that never stopped: the same losses, and, of
    moments that were lost the surest sign, the same way of its weights.
    """
    result, file = Result(), rollouts(setting)
    engines = _engines(result)
    whole = {}
    for engine in engines:
        directory = f"{setting.scratch}/{engine}"
        whole[engine] = _with(engine, setting, file, directory, "two_pass", precision(), 4, 2)
    for saved in engines:
        resumes = engines[-1] if saved == engines[0] else engines[0]
        directory = f"{setting.scratch}/{saved}"
        found = _with(resumes, setting, file, directory, "two_pass", precision(), 4)
        expected, name = whole[saved], f"saved {saved}, resumed {resumes}"
        result.figures[f"losses of steps 3 and 4, {name}"] = ", ".join(
            f"{loss:.5f}" for loss in found["losses"]
        )
        exact = saved == resumes and not torch.cuda.is_available()
        result.most(
            f"losses, {name}: relative difference",
            relative(found["losses"], expected["losses"][2:]),
            0.0 if exact else _rounding(),
        )
        difference = np.linalg.norm(found["way"] - expected["way"])
        result.most(
            f"weights' way, {name}: relative difference",
            difference / np.linalg.norm(expected["way"]),
            0.0 if exact else 0.1,  # without its first moments a run is off by .3
        )
    return result


def relative(ours: list[float], theirs: list[float]) -> float:
    """Return the largest relative difference; infinite where one list is longer."""
    if len(ours) != len(theirs):
        return float("inf")
    return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))


def _rounding() -> float:
    """Return what rounding may change a loss of a few steps by."""
    return 2**-6 if precision() == "bf16" else 1e-4


def _engines(result: Result) -> list[str]:
    if has_transformer_engine():
        return ["with TE", "without TE"]
    result.notes.append(
        "TransformerEngine is not there, or there is no GPU for it: everything ran without."
    )
    return ["without TE"]


def _with(engine: str, setting: Setting, *arguments) -> dict:
    """Call `learn` here, or where TransformerEngine cannot be found if it is here."""
    if engine == "with TE" or not has_transformer_engine():
        return learn(*arguments)
    target = f"{__name__}:{learn.__name__}"
    outcome = apart.call(target, arguments, setting.log, LIMIT_S, setting.start, ENGINE)
    if outcome.trouble:
        raise RuntimeError(f"{engine}: {outcome.trouble}")
    return outcome.value
