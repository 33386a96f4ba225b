"""The student's moving average as its teacher: over layouts against float64, saved and resumed."""

from __future__ import annotations

import json
import shutil
from itertools import chain

import pytest
import torch
from support.observed import STUDENT, TINY, observe, observed
from support.ranks import run_ranks
from support.rounding import assert_rounded
from support.step import (
    OPTIMIZER,
    assert_gradients,
    dense_step,
    gather_gradients,
    make_batch,
    make_model,
    open_distiller,
    train_step,
    whole_mask,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_taopd.config.schema import SelectionSection, TrainSection
from megatron_taopd.data.vocab_map import VocabMap

EXAMPLE = TINY.with_name("self_distillation.yaml")
SIZE, STEPS, DECAY = 200, 3, 0.7
# What the teacher reads before each response: another text than the student, so that they differ
# while their weights are the same.
CONTEXTS = [[(7 * i + j) % SIZE for j in range(3 + i % 5)] for i in range(12)]


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "student", SIZE, 32, layers=4, seed=0)


def follow(distiller, decay=DECAY):
    """Make the distiller's teacher the average of its student, as `build` does."""
    from megatron_taopd.build import follow as follow_student

    average = distiller.student.keep_average(decay)
    follow_student(distiller.teachers[0], average, distiller.heads)
    return average


def named(trunk):
    from megatron_taopd.models import weights

    return {name: t.clone() for name, t in weights.export_weights(trunk)}


def distil(student_dir, student_parallel, teacher_parallel, offload=False):
    """Three steps: the student's weights before and after each, the teacher's in each, and all that
    `test_step.py` compares of the last one."""
    from megatron.core import parallel_state

    from megatron_taopd.parallel import platform
    from megatron_taopd.step.scoring import whole_scores

    platform.emulate_cuda()
    batch, vocab_map = make_batch(SIZE), VocabMap(torch.arange(SIZE))
    try:
        distiller = open_distiller(
            (student_dir, student_parallel), (student_dir, teacher_parallel), vocab_map,
            TrainSection(micro_batch_tokens=40), offload=offload,
        )  # fmt: skip
        follow(distiller)
        distiller.selection = SelectionSection(ratio=0.3, k=5)
        student, teacher = distiller.student, distiller.teachers[0]
        gradients, update = [], student.step

        def step():
            gradients.append(gather_gradients(student))
            return update()

        student.step = step
        read, _ = vocab_map.read(batch, CONTEXTS, teacher.longest_sequence)
        learned, taught, lessons = [named(student.trunk)], [], []
        for _ in range(STEPS):
            parts = distiller.read(read)
            taught.append(named(teacher.trunk))
            assert all(map(torch.equal, named(student.trunk).values(), learned[-1].values()))
            lessons.append(distiller.learn(batch, parts, 0))
            learned.append(named(student.trunk))
        last = lessons[-1]
        return {
            "learned": learned,
            "taught": taught,
            "losses": [lesson.trained["loss"] for lesson in lessons],
            "scores": whole_scores(last.scored),
            "mask": whole_mask(last.selection.kept, batch.num_rows),
            "grad_norm": last.trained["grad_norm"],
            "gradients": gradients[-1],
            "fingerprint": teacher.fingerprint(),
        }
    finally:
        parallel_state.destroy_model_parallel()


def averages(learned, dtype):
    """By hand: ā_0 = w_0 and ā_t = .7 ā_{t−1} + .3 w_t, of each tensor."""
    found = [{name: t.to(dtype) for name, t in learned[0].items()}]
    for weights in learned[1:]:
        before = found[-1]
        found.append({n: DECAY * before[n] + (1 - DECAY) * w.to(dtype) for n, w in weights.items()})
    return found


def assert_averages(result):
    """See that the teacher's weights were the averages; return these in float64."""
    learned = result["learned"]
    exact, plain = averages(learned, torch.float64), averages(learned, torch.float32)
    for taught, by_hand, in_float32 in zip(result["taught"], exact, plain, strict=False):
        for tensor, weights in by_hand.items():
            assert_rounded(taught[tensor], weights, in_float32[tensor], tensor)
    moved = max((learned[-1][n] - exact[-1][n]).abs().max().item() for n in exact[-1])
    assert moved > 1e-4  # so that another teacher would be seen
    return exact


def write_model(base, tensors, directory):
    """A checkpoint of these weights in their dtype, tied embeddings once."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.save_pretrained(directory)
    return str(directory)


LAYOUTS = {  # world size, student (tp, pp, sequence), teacher
    "one rank": (1, (1, 1, False), (1, 1, False)),
    "TP2 | TP2": (2, (2, 1, False), (2, 1, False)),
    "PP2 | PP2": (2, (1, 2, False), (1, 2, False)),
    "DP2 | DP2": (2, (1, 1, False), (1, 1, False)),
    "DP2 | TP2": (2, (1, 1, False), (2, 1, False)),
    "CP2 | TP2": (2, (1, 1, False, 0, 1, 2), (2, 1, False)),
    "TP2 PP2 | PP2 DP2": (4, (2, 2, False), (1, 2, False)),
    "TP2 DP2 | PP4": (4, (2, 1, False), (1, 4, False)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_teacher_that_follows_the_student_agrees_with_float64(student_dir, tmp_path, name):
    """Its weights at each step, and of the third step scores, selection, loss and gradients."""
    world_size, *layout = LAYOUTS[name]
    for result in run_ranks(world_size, distil, student_dir, *layout):
        learned, exact = result["learned"], assert_averages(result)
        student = write_model(student_dir, learned[STEPS - 1], tmp_path / "student")
        teacher = write_model(student_dir, exact[STEPS - 1], tmp_path / "teacher")
        oracle = dense_step(student, teacher, make_batch(SIZE), SIZE, teacher_prompts=CONTEXTS)
        scores = result["scores"]
        for field, expected in zip(
            ("disagreement", "compatibility", "student_entropy", "teacher_entropy"),
            oracle["scores"],
            strict=False,
        ):
            got = getattr(scores, field).double()
            torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5, msg=field)
        assert torch.equal(result["mask"], oracle["mask"])
        assert result["losses"][-1] == pytest.approx(oracle["loss"], rel=1e-5)
        assert_gradients(result["gradients"], oracle["gradients"], oracle["rounding"])
        assert result["grad_norm"] == pytest.approx(oracle["grad_norm"], rel=1e-5)
        assert result["fingerprint"] == 0  # it has none: the weights are to change


def test_a_teacher_follows_experts_wherever_they_lie(tmp_path):
    """Theirs have an optimizer of their own; here EP2 × DP2, and a teacher at PP2 × EP2."""
    student = make_model(tmp_path, SIZE, 32, layers=4, seed=5, experts=4)
    layout = (1, 1, False, 0, 2), (1, 2, False, 2)
    for result in run_ranks(4, distil, student, *layout):
        exact = assert_averages(result)
        assert any(".experts.3." in name for name in exact[0])


def put_aside(student_dir, parallel):
    """In bf16, whether weights and fp32 masters are to the bit what they were once the teacher has
    the average, and whether that is the average's rounding."""
    from megatron.core import parallel_state

    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform
    from megatron_taopd.teacher.megatron import MegatronTeacher

    platform.emulate_cuda()
    try:
        student = Student(
            student_dir,
            layouts.student_layout(*parallel),
            torch.bfloat16,
            "none",
            OPTIMIZER,
            9,
            SIZE,
        )
        average = student.keep_average(DECAY)
        train_step(student, 1)
        teacher = MegatronTeacher(
            student_dir, layouts.forward_layout(*parallel), torch.bfloat16, 40
        )

        def contents():
            weights = [p.detach().clone() for p in student.trunk.parameters()]
            return weights + [master.clone() for master in average._masters()]

        before = contents()
        average.fill(teacher.trunk, None)
        kept = all(map(torch.equal, contents(), before))
        taught = named(teacher.trunk)
        for master, mean in zip(average._masters(), average.shards, strict=True):
            master.copy_(mean)
        student.optimizer.chained_optimizers[0]._copy_main_params_to_model_params()
        student.model.start_param_sync(force_sync=True)
        by_hand = named(student.trunk)
        return kept, all(torch.equal(taught[name], by_hand[name]) for name in by_hand)
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("parallel", [(1, 1), (2, 1)], ids=["DP2", "TP2"])
def test_the_student_keeps_its_weights_to_the_bit(student_dir, parallel):
    for kept, rounded in run_ranks(2, put_aside, student_dir, parallel):
        assert kept and rounded


# ------------------------------------------------------------------------------- saved and resumed


def save_and_load(student_dir, directory, parallel, other, dtype):
    """Two updates are saved; that layout, and another, have the same average to the bit."""
    from megatron.core import parallel_state

    from megatron_taopd.checkpoints import saving
    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform

    platform.emulate_cuda()

    def make(layout):
        parallel_state.destroy_model_parallel()
        layout = layouts.student_layout(*layout)
        student = Student(student_dir, layout, dtype, "none", OPTIMIZER, 9, SIZE)
        student.keep_average(DECAY)
        return student

    try:
        student = make(parallel)
        for seed in (1, 2):
            train_step(student, seed)
        there = whole(student)
        checkpoints = saving.Checkpoints(directory, 1, False, print)
        checkpoints.save(1, student, {})
        checkpoints.check()
        checkpoints.close()
        for layout in parallel, other:
            resumed = make(layout)
            fresh = whole(resumed)
            assert any(not torch.equal(fresh[name], there[name]) for name in there)
            saving.load(directory, 1, resumed)
            loaded = whole(resumed)
            assert all(torch.equal(loaded[name], there[name]) for name in there), layout
        return True
    finally:
        parallel_state.destroy_model_parallel()


def whole(student):
    """The average's fp32 elements by name: exported as if they were gradients, which are fp32."""
    from megatron_taopd.parallel.compat.megatron_internals import owned_states

    for buffer in student.model.buffers:
        buffer.grad_data.zero_()
    (distributed,) = student.optimizer.chained_optimizers
    for (parameter, owned, _), mean in zip(
        owned_states(distributed), student.average.shards, strict=True
    ):
        parameter.main_grad.view(-1)[owned] = mean
    return gather_gradients(student)


@pytest.mark.parametrize(
    ("parallel", "other", "dtype"),
    [((1, 1), (2, 2), torch.float32), ((2, 1), (4, 1), torch.bfloat16)],
    ids=["DP4 to TP2 PP2", "TP2 DP2 to TP4 in bf16"],
)
def test_the_average_is_loaded_on_any_layout(student_dir, tmp_path, parallel, other, dtype):
    arguments = student_dir, str(tmp_path), parallel, other, dtype
    assert all(run_ranks(4, save_and_load, *arguments))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """The tiny pair's, each with another prompt as its context."""
    file = tmp_path_factory.mktemp("prompts") / "train.jsonl"
    with (TINY.parent / "tiny_pair" / "train.jsonl").open() as lines:
        rows = [json.loads(next(lines)) for _ in range(64)]
    hints = [row["prompt"] for row in [*rows[1:], rows[0]]]
    rows = [row | {"hint": hint} for row, hint in zip(rows, hints, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(prompts, run_dir, *overrides):
    """Four steps on DP2 with a teacher at PP2, as each rank has seen them."""
    return observe(
        [
            f"run.dir={run_dir}", f"data={{prompts: {prompts}, max_prompt_tokens: 64}}",
            f"teacher.path={STUDENT}", "teacher.source=student_ema", "teacher.ema=0.6",
            "teacher.context_column=hint", "teacher.parallel.pp=2", "optimizer.lr=1e-3",
            "train.steps=4", "checkpoint={every: 1, keep_last: 9, export_hf: true}", *overrides,
        ],
        average_of,
        world_size=2,
    )  # fmt: skip


def average_of(run):
    """Its own memory, so that it arrives as it is when the run has ended."""
    return run.student.average.shards


def test_a_run_with_an_average_resumes_bit_for_bit(prompts, tmp_path):
    whole = run(prompts, tmp_path / "whole")
    assert [seen.status for seen in whole] == [0, 0], whole[0].printed
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "broken" / "checkpoints" / f"step_{step:08d}")
    shutil.rmtree(tmp_path / "broken" / "student")
    resumed = run(prompts, tmp_path / "broken")
    assert [seen.status for seen in resumed] == [0, 0], resumed[0].printed
    assert "resuming after step 2" in resumed[0].printed
    assert [record["step"] for record in resumed[0].steps] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", "kept_rows"):
        ours, theirs = ([r[name] for r in seen[0].steps] for seen in (resumed, whole))
        assert ours == theirs, name
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours.found and all(map(torch.equal, ours.found, theirs.found))
    ours, theirs = (tmp_path / name / "student/model.safetensors" for name in ("broken", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def train_example(overrides):
    from megatron_taopd import train

    return train.main([str(EXAMPLE), *overrides])


def test_the_example_teaches_itself_by_the_solutions(tmp_path):
    """Its teacher reads each prompt behind its solution, and the student the prompt alone."""
    overrides = [f"run.dir={tmp_path}", "train.steps=2", "rollout.prompts=4", "eval.limit=4"]
    overrides += ["data.shuffle=false", "log.tensorboard=false", "checkpoint.export_hf=false"]
    [seen] = run_ranks(1, observed, overrides, None, train_example)
    assert seen.status == 0, seen.printed
    data = EXAMPLE.parent / "self_distillation"
    tokenizer = AutoTokenizer.from_pretrained(data / "student")
    with (data / "train.jsonl").open() as lines:
        rows = [json.loads(next(lines)) for _ in range(4)]
    first = next(call for call in seen.generated if call.step == 1)
    assert first.prompts == [tokenizer(row["prompt"])["input_ids"] for row in rows]
    answers = first.batch.response_tokens().split(first.batch.response_lengths.tolist())
    read = [
        tokenizer(f"{row['solution']} {row['prompt']}")["input_ids"] + answer.tolist()
        for row, answer in zip(rows, answers, strict=True)
    ]
    assert seen.read[0] == [*chain(*read)]
