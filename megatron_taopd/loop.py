"""TA-OPD (arXiv 2605.26844), one step after the other."""

from __future__ import annotations

import torch

from megatron_taopd.monitoring.observer import Samples
from megatron_taopd.parallel import watchdog
from megatron_taopd.parallel.faults import Fault
from megatron_taopd.rollout.engine import Pending
from megatron_taopd.run import Interrupted, Run
from megatron_taopd.teacher.teachers import Parts


def distill(run: Run) -> int:
    """Distil until `train.steps` are done, or until someone interrupts; return the steps done.

    Raises:
        Broken: there is no use in going on.
        NotSaved: it is done or interrupted, but its last checkpoint could not be written.
    """
    run.begin()
    done = run.first_step
    for step in range(run.first_step + 1, run.config.train.steps + 1):
        watchdog.at_step(step)
        try:
            with run.profiler.step(step), run.monitor.span("step"):
                metrics, samples = take_step(run, step)
        except Interrupted:
            run.rollouts.give_back(step)  # nothing was learned from its prompts: once more, then
            run.save_last(done)
            return done
        done = step
        if run.conclude(step, metrics, samples):
            break
    run.finish(done)
    return done


def take_step(run: Run, step: int) -> tuple[dict[str, float], Samples]:
    """Take one step of the method; return its metrics, and what picks samples for the report."""
    student, distiller = run.distiller.student, run.distiller

    # The student answers the next prompts, and its teacher reads each answer once it is there …
    with run.phase("rollout"):
        begun = run.rollouts.take(step)
    parts = read_parts(run, begun.pending)
    with run.monitor.span("rollout"):
        batch = begun.pending.result()
        run.engine.offload()
    with run.monitor.span("teacher"):
        read = distiller.teachers.inputs(batch)

    # … and the student learns from that, unless the numbers mean nothing.
    lesson, fault = None, None
    try:
        lesson = distiller.learn(batch, parts, run.seed_of(step), run.phase)
    except Fault as raised:
        fault = raised

    student.version = step
    with run.monitor.span("sync"):
        run.engine.update_weights(student.named_tensors(), version=step)
    with run.monitor.span("metrics"):
        return run.observe(step, begun, read, lesson, fault)


def read_parts(run: Run, pending: Pending) -> Parts:
    """Have the teachers read the responses, as they finish or all at the end."""
    finished = pending.parts()
    if not run.config.rollout.stream:
        with run.phase("rollout"):
            batch = pending.result()
        finished = iter([(torch.arange(batch.num_sequences), batch)])
    with run.distiller.teachers.reading() as reading:
        while True:
            with run.phase("rollout"):
                places, part = next(finished, (None, None))
            with run.monitor.span("teacher"):
                if part is None:
                    return reading.finish()
                reading.take(places, part)
