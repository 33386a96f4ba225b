"""A run of `megatron_taopd.train` on real ranks, and what can be seen of it.

    seen = observe([f"run.dir={tmp_path}", "selection.k=5"])
    seen.status, seen.records, seen.generated[0].batch

The run is the tiny pair's, on one rank and as small as it can be: `SMALL` says what is changed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from support.ranks import run_ranks

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "examples" / "tiny_pair.yaml"
STUDENT, TEACHER = (str(ROOT / "examples" / "tiny_pair" / name) for name in ("student", "teacher"))
# Steps that move no weight can be compared with models on disk, however many there are.
FROZEN = "optimizer.lr=1e-30"
SMALL = (
    "student.parallel={tp: 1, pp: 1}",
    "teacher.parallel={tp: 1, pp: 1}",
    "rollout={prompts: 8, max_new_tokens: 12}",
    "train.steps=1",
    "optimizer.warmup_steps=0",
    "checkpoint={every: 0, export_hf: false}",
    "eval.prompts=null",
    "log.tensorboard=false",
)


@dataclass
class Seen:
    """What a rank has seen of a run.

    Attributes:
        status: of `main`, or what it raised.
        printed: on stdout and stderr.
        records: of metrics.jsonl.
        generated: what the local engine was asked and answered, evaluations included.
        together: sequences that it generated at a time.
        passes: through a trunk; forward, in this order.
        updates: (gradient norm, learning rate) of each optimizer step.
        read: the tokens that the Megatron teacher read, a batch or a part of one at a time.
        logits: the most rows whose logits one head has computed at a time.
        found: what `look` has found in the built run.
    """

    status: int | str
    printed: str = ""
    records: list[dict] = field(default_factory=list)
    generated: list[Generated] = field(default_factory=list)
    together: list[int] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    updates: list[tuple[float, float]] = field(default_factory=list)
    read: list = field(default_factory=list)
    logits: int = 0
    found: Any = None

    @property
    def steps(self) -> list[dict]:
        """The records of steps that were taken."""
        return [record for record in self.records if record["step"] > 0]


@dataclass
class Generated:
    """One call of the local engine's `generate`."""

    prompts: list[list[int]]
    indices: list[int]
    step: int
    batch: Any


@dataclass
class Pass:
    """A micro-batch that went forward through a trunk.

    Attributes:
        whose: "student" or "teacher".
        trains: a backward pass follows.
        width: tokens of the activations between two layers, on this rank.
        layers, attentions: forward passes through them, those of a recomputation included.
        place, home: of the weights in memory, then and when the run was over.
    """

    whose: str
    trains: bool
    tokens: int
    width: int
    dtype: str
    place: int
    home: int = 0
    layers: int = 0
    attentions: int = 0


def observe(
    overrides: Sequence[str],
    look: Callable | None = None,
    world_size: int = 1,
    timeout: float = 60,
) -> Seen | list[Seen]:
    """A small run with these overrides; by rank if there are several.

    Args:
        look: a module-level function of the `Run` as it was built; what it returns is `found`.
    """
    seen = run_ranks(world_size, observed, [*SMALL, *overrides], look, timeout=timeout)
    return seen if world_size > 1 else seen[0]


def observed(
    overrides: Sequence[str], look: Callable | None = None, work: Callable | None = None
) -> Seen:
    """On a rank.

    Args:
        work: instead of a training, with its overrides; what it returns is `status`.
    """
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_taopd import build as building
    from megatron_taopd import train
    from megatron_taopd.models.attention import PackedAttention
    from megatron_taopd.models.gpt import Trunk
    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel.vocab import projection
    from megatron_taopd.rollout.continuous import ContinuousBatch
    from megatron_taopd.rollout.local import LocalEngine
    from megatron_taopd.teacher.megatron import MegatronTeacher

    seen, printed, trunks = Seen(0), io.StringIO(), []

    def around(owner, name, replacement):
        stack.enter_context(mock.patch.object(owner, name, replacement(getattr(owner, name))))

    def build(original):
        def built(*args):
            run = original(*args)
            seen.found = look and look(run)
            return run

        return built

    def generate(original):
        def generated(self, prompts, indices, step, sampling):
            batch = original(self, prompts, indices, step, sampling)
            seen.generated.append(Generated([*map(list, prompts)], list(indices), step, batch))
            return batch

        return generated

    def step_of_rows(original):
        def counted(self, newcomers, *rest):
            seen.together.append(len(self.rows) + len(newcomers))
            return original(self, newcomers, *rest)

        return counted

    def forward(original):
        def passed(self, *args, **kwargs):
            weight = next(self.parameters())
            whose = "student" if weight.requires_grad else "teacher"
            tokens = kwargs["input_ids"].shape[1]
            trunks.append(self)
            seen.passes.append(Pass(whose, False, tokens, 0, "", weight.data_ptr()))
            out = original(self, *args, **kwargs)
            now = seen.passes[-1]
            now.trains, now.dtype, now.width = out.requires_grad, str(out.dtype), len(out)
            return out

        return passed

    def count(field):
        def replacement(original):
            def counted(self, *args, **kwargs):
                now = seen.passes[-1]
                setattr(now, field, getattr(now, field) + 1)
                return original(self, *args, **kwargs)

            return counted

        return replacement

    def step(original):
        def taken(self):
            seen.updates.append(original(self))
            return seen.updates[-1]

        return taken

    def read(original):
        def noted(self, sequences):
            seen.read.append(sequences.tokens.tolist())
            return original(self, sequences)

        return noted

    def project(original):
        def counted(self, rows):
            logits = original(self, rows)
            seen.logits = max(seen.logits, len(logits))
            return logits

        return counted

    with ExitStack() as stack:
        around(building, "build", build)
        around(LocalEngine, "generate", generate)
        around(ContinuousBatch, "step", step_of_rows)
        around(Trunk, "forward", forward)
        around(TransformerLayer, "forward", count("layers"))
        around(PackedAttention, "forward", count("attentions"))
        around(Student, "step", step)
        around(MegatronTeacher, "read", read)
        around(projection.Projection, "__call__", project)
        stack.enter_context(redirect_stdout(printed))
        stack.enter_context(redirect_stderr(printed))
        try:
            seen.status = work(overrides) if work else train.main([str(TINY), *overrides])
        except Exception as error:  # the test's to judge, and no reason to end the pool of ranks
            seen.status = f"{type(error).__name__}: {error}"
    for now, trunk in zip(seen.passes, trunks, strict=True):
        now.home = next(trunk.parameters()).data_ptr()
    seen.printed = printed.getvalue()
    run_dir = next(o for o in reversed(overrides) if o.startswith("run.dir="))
    metrics = Path(run_dir.removeprefix("run.dir=")) / "metrics.jsonl"
    if metrics.exists():
        seen.records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return seen
