"""What one rank of many calls: a real step on torch's fake process group, every collective written
down.

    python -m benchmarks.scaling.fake '[{"student": {"tp": 2, "pp": 2}, "ranks": [0, 63]}, …]'

The models are tiny and random, the code that runs is the package's. Collectives return something
harmless: an all-gather this rank's part for all, a reduction its operand, a receive zeros. A
process of its own, because the fake group replaces `torch.distributed`'s.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import lcm
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config

from benchmarks.scaling.step import Step
from megatron_taopd import config as configuration
from megatron_taopd.parallel import packing, platform
from megatron_taopd.parallel.vocab import logits_bytes, projection
from megatron_taopd.plan import links
from megatron_taopd.plan.collectives import Collective, step_collectives
from megatron_taopd.plan.setup import Setup

# torch's operators under the names of what they do.
OPS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
}
CONTROL_BYTES = 16  # up to so many a call: counts, norms and sums, which no formula has


class Recorder(TorchDispatchMode):
    """Writes down every collective under the phase it is called in.

    Attributes:
        found: (phase, operation, ranks of the group) → [calls, bytes sent].
        control: the same of calls of at most CONTROL_BYTES.
        shapes: what a pipeline stage is told to receive, by phase.
        loss_backwards: how often the loss's backward pass ran, a phase of its own.
    """

    def __init__(self):
        super().__init__()
        self.found: dict[tuple, list] = defaultdict(lambda: [0, 0.0])
        self.control: dict[tuple, list] = defaultdict(lambda: [0, 0.0])
        self.phases: list[str] = [""]
        self.shapes: dict[str, tuple] = {}
        self.loss_backwards = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.phases.append(name)
        try:
            yield
        finally:
            self.phases.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        place = [a.name for a in func._schema.arguments].index("process_group")
        group = dist.ProcessGroup.unbox(args[place])
        if name not in ("recv_", "barrier"):  # a receive is counted where it is sent
            self.count(OPS[name], group, _bytes_sent(OPS[name], args, group), args)
        if name == "alltoall_base_":  # the fake one copies input to output, whatever their sizes
            args[0].zero_()
            own = torch.zeros(group.size())
            args = (own, own.clone(), args[2], [], [], *args[5:])
        result = func(*args, **(kwargs or {}))
        if name == "recv_":
            (tensor,) = args[0]
            if tensor.dtype == torch.int64:
                tensor.copy_(torch.tensor(self.shapes[self.phases[1]]))
            else:
                tensor.zero_()
        return result

    def count(self, op: str, group: dist.ProcessGroup, sent: float, args) -> None:
        if group.size() == 1:
            return
        small = op != "send" and op != "all_to_all" and _nbytes(args[0]) <= CONTROL_BYTES
        entry = (self.control if small else self.found)[self.phases[-1], op, group.size()]
        entry[0] += 1
        entry[1] += sent


def _nbytes(tensors) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes
    return sum(_nbytes(tensor) for tensor in tensors)


def _bytes_sent(op: str, args, group) -> float:
    ranks = group.size()
    if op == "all_reduce":
        return links.all_reduce_bytes(_nbytes(args[0]), ranks)
    if op == "all_gather":  # outputs, inputs
        return links.gather_bytes(_nbytes(args[0]), ranks)
    if op == "reduce_scatter":  # outputs, inputs
        return links.gather_bytes(_nbytes(args[1]), ranks)
    if op == "all_to_all":
        counts = list(args[4])
        row = args[1].nbytes // max(1, len(args[1]))
        return row * (sum(counts) - counts[group.rank()])
    return _nbytes(args[0])


CONFIG = """
run: {{dir: run}}
student: {{path: {student_dir}, parallel: {student}}}
teacher: {{path: {teacher_dir}, parallel: {teacher}, source: {source}}}
data: {{prompts: none.jsonl, max_prompt_tokens: {prompt}}}
rollout: {{prompts: {sequences}, max_new_tokens: {response}}}
selection: {{ratio: 0.3, k: {k}}}
loss: {{weights: {weights}}}
train: {{micro_batch_tokens: {micro_batch_tokens}, precision: {precision}, recompute: {recompute}}}
"""
SIZES = dict(
    num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8, head_dim=16,
    max_position_embeddings=256, architectures=["Qwen3ForCausalLM"],
)  # fmt: skip


def make_setup(directory: Path, world_size: int, case: dict) -> tuple[Setup, str, str]:
    """A tiny pair and the plan's view of a case. Both models' directories have a config only."""
    sizes = {**SIZES, "vocab_size": case.get("vocab_size", 512)}
    width = case.get("hidden", 64)
    small = Qwen3Config(
        **sizes,
        hidden_size=width,
        intermediate_size=3 * width,
        tie_word_embeddings=case.get("tied", True),
    )
    large = Qwen3Config(
        **sizes, hidden_size=2 * width, intermediate_size=6 * width, tie_word_embeddings=False
    )
    paths = str(directory / "student"), str(directory / "teacher")
    for config, path in zip((small, large), paths, strict=True):
        config.save_pretrained(path)
    if case.get("average"):
        paths = paths[0], paths[0]
    text = CONFIG.format(
        student_dir=paths[0],
        teacher_dir=paths[1],
        student=json.dumps(case["student"]),
        teacher=json.dumps(case.get("teacher", {"tp": 1, "pp": 1})),
        source="student_ema" if case.get("average") else "path",
        sequences=case.get("sequences", world_size),
        prompt=case.get("prompt", 6),
        response=case.get("response", 10),
        k=case.get("k", 5),
        micro_batch_tokens=case.get("micro_batch_tokens", 32),
        precision=case.get("precision", "fp32"),
        weights=case.get("weights", "none"),
        recompute=case.get("recompute", "none"),
    )
    (directory / "run.yaml").write_text(text)
    config = configuration.load(directory / "run.yaml", [])
    setup = Setup.of(config, world_size, trained_share=case.get("trained", 0.75))
    # By default more than one chunk of rows in each micro-batch of scoring.
    columns = setup.student.vocab // setup.student_grid.tp
    budget = logits_bytes(1 << 20, case.get("chunk_rows", 6), columns)
    return replace(setup, head_memory=budget), *paths


def record(setup: Setup, paths: tuple[str, str], rank: int) -> Recorder:
    """Run one step as this rank."""
    recorder = Recorder()
    dist.init_process_group("fake", rank=rank, world_size=setup.gpus, store=FakeStore())
    try:
        step = Step(setup, *paths, recorder.phase)
        work, micro = setup.workload, setup.micro_batch_tokens
        trained = int(min(work.length - 1, -(-work.length * work.trained // 1)))
        for phase, model, grid, length in (
            ("teacher", setup.teacher, setup.teacher_grid, work.length - 1),
            ("scoring", setup.student, setup.student_grid, work.length - 1),
            ("training", setup.student, setup.student_grid, trained),
        ):
            share = replace(work, prompt=length, response=0).share(grid, micro)
            multiple = grid.shards if share.cp == 1 else lcm(2, grid.shards)
            tokens = -(-share.tokens_at_a_time // multiple) * multiple // grid.shards
            recorder.shapes[phase] = (tokens, 1, model.hidden)
        with recorder, named_backward(recorder):
            step.run()
        step.close()
    finally:
        dist.destroy_process_group()
    return recorder


@contextmanager
def named_backward(recorder: Recorder) -> Iterator[None]:
    """The loss's backward pass as a phase."""
    plain = projection.Head.backward

    def backward(ctx, *grads):
        recorder.loss_backwards += 1
        with recorder.phase("loss backward"):
            return plain(ctx, *grads)

    projection.Head.backward = staticmethod(backward)
    try:
        yield
    finally:
        projection.Head.backward = staticmethod(plain)


def replace_distributed() -> None:
    """All groups are fake."""
    platform.emulate_cuda()
    create = dist.new_group

    def new_group(ranks=None, **options):
        return create(ranks, **{**options, "backend": "fake"})

    dist.new_group = dist.distributed_c10d.new_group = new_group


def compare(setup: Setup, rank: int, recorder: Recorder) -> list[dict]:
    """Calls and bytes by phase, operation and size of the group, measured and by formula."""
    planned: dict[tuple, list] = defaultdict(lambda: [0, 0.0])
    for c in step_collectives(setup, rank):
        if c.phase == "rollout":
            continue
        entry = planned[_phase(c), c.op, c.ranks]
        entry[0] += c.calls
        entry[1] += c.bytes
    rows = []
    for key in sorted(planned.keys() | recorder.found.keys()):
        calls, bytes_ = recorder.found.get(key, (0, 0.0))
        planned_calls, planned_bytes = planned.get(key, (0, 0.0))
        rows.append(
            dict(zip(("phase", "op", "ranks"), key, strict=True))
            | dict(calls=calls, bytes=bytes_)
            | dict(planned_calls=planned_calls, planned_bytes=planned_bytes)
        )
    return rows


def _phase(collective: Collective) -> str:
    """Name the phase that the recorder sees: some of the formulas' phases are parts of another."""
    inside = {"probe": "scoring", "gradients": "training"}
    return inside.get(collective.phase, collective.phase)


# Every layout of the student up to TP8 and PP4, beside five of the teacher; three ranks of each.
TEACHERS = [
    dict(tp=1, pp=1),
    dict(tp=4, pp=2, sequence=True),
    dict(tp=8, pp=1),
    dict(tp=1, pp=4),
    dict(tp=2, pp=2),
]
STUDENTS = [
    dict(tp=tp, pp=pp, sequence=sequence)
    for tp in (1, 2, 4, 8)
    for pp in (1, 2, 4)
    for sequence in ((False, True) if tp > 1 else (False,))
]
LAYOUTS = [
    dict(student=student, teacher=TEACHERS[i % len(TEACHERS)], ranks=[0, 21, 63])
    for i, student in enumerate(STUDENTS)
]


def record_cases(cases: list[dict], world_size: int = 64) -> list[dict]:
    """One object for each case and rank: the layouts and `compare`'s rows."""
    replace_distributed()
    results, bucket = [], packing.EXPORT_BYTES
    with tempfile.TemporaryDirectory() as directory:
        for case in cases:
            packing.EXPORT_BYTES = case.get("export_bytes", bucket)
            setup, *paths = make_setup(Path(directory), world_size, case)
            for rank in case["ranks"]:
                recorder = record(setup, tuple(paths), rank)
                results.append(
                    {
                        "student": str(setup.student_grid),
                        "teacher": str(setup.teacher_grid),
                        "case": case,
                        "rank": rank,
                        "stage": setup.student_grid.stage(rank),
                        "collectives": compare(setup, rank, recorder),
                        "loss_backwards": recorder.loss_backwards,
                        "control_calls": sum(n for n, _ in recorder.control.values()),
                        "control_bytes": sum(b for _, b in recorder.control.values()),
                    }
                )
    return results


if __name__ == "__main__":
    print(json.dumps(record_cases(json.loads(sys.argv[1]))))
