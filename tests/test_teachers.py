"""Several teachers: one step over layouts against dense float64, and what it costs."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.observed import STUDENT, TEACHER, observe
from support.published import MODELS
from support.ranks import run_ranks
from support.several_teachers import Taught, dense_step_of_several, open_several, step_of_several
from support.step import assert_gradients, make_batch, make_model
from transformers import AutoTokenizer

from megatron_taopd.config import load, to_yaml
from megatron_taopd.config.schema import DataSection
from megatron_taopd.config.values import check_sections
from megatron_taopd.data.context import TeacherContext
from megatron_taopd.data.prompts import PromptStream, TeacherReader, load_prompts
from megatron_taopd.data.vocab_map import VocabMap
from megatron_taopd.plan.cluster import CLUSTERS
from megatron_taopd.plan.results import Plan
from megatron_taopd.plan.setup import Setup
from megatron_taopd.plan.shapes import parameter_elements

ROOT = Path(__file__).parent.parent
PAIR = ROOT / "examples" / "tiny_pair"

SIZE = 200  # the student's vocabulary
FIELDS = ("disagreement", "compatibility", "student_entropy", "teacher_entropy")
OTHER_IDS = torch.randperm(216, generator=torch.Generator().manual_seed(5))
# Another tokenizer: other ids, seven of the student's without a counterpart, which are spelled out.
OTHER = VocabMap(
    OTHER_IDS[:SIZE].index_fill(0, torch.tensor([0, 7, 99, 100, 123, 198, 199]), -1),
    {7: [3, 4], 99: [5], 100: [6, 7, 8], 123: [9, 10], 198: [11], 199: [12, 12, 12, 12]},
    stand_in=[13],
)
BATCH = make_batch(SIZE, num_sequences=15)
OF_PROMPT = torch.arange(15) % 3  # taught by math, code and served in turn
PROMPTS = [
    [17 * i % 216, *range(i % 5)] if i % 3 == 1 else BATCH.sequence(i)[:n].tolist()
    for i, n in enumerate(BATCH.prompt_lengths.tolist())
]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    return make_model(path, SIZE, 32, layers=4, seed=0)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Of three sizes: one in a layout of its own, one with another tokenizer, one served."""
    root = tmp_path_factory.mktemp("teachers")
    same = VocabMap(torch.arange(SIZE))
    return {
        "math": Taught(make_model(root / "math", 216, 48, 4, seed=1, tied=False), (1, 2), same),
        "code": Taught(make_model(root / "code", 216, 64, 2, seed=2, tied=False), (2, 1), OTHER),
        "served": Taught(make_model(root / "served", 208, 40, 2, seed=3), None, same),
    }


@pytest.fixture(scope="module")
def oracle(student, teachers):
    return dense_step_of_several(student, teachers, BATCH, PROMPTS, OF_PROMPT)


def assert_agrees(result, oracle, names):
    for field, expected in zip(FIELDS, oracle["scores"], strict=True):
        found = getattr(result["scores"], field).double()
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5, msg=field)
    assert torch.equal(result["mask"], oracle["mask"])
    assert result["metrics"]["loss"] == pytest.approx(oracle["loss"], rel=1e-5)
    assert_gradients(result["gradients"], oracle["gradients"], oracle["rounding"])
    for name, expected in zip(names, oracle["of"], strict=True):
        for key, value in expected.items():
            found = result["metrics"][f"teacher/{name}/{key}"]
            assert found == pytest.approx(value, rel=2e-4), (name, key)


LAYOUTS = {"TP2": (2, (2, 1, False)), "PP2": (2, (1, 2, False)), "DP2": (2, (1, 1, False)),
           "TP2 SP": (2, (2, 1, True)), "TP2 PP2": (4, (2, 2, False))}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_of_three_teachers_agrees_with_dense_float64(student, teachers, oracle, name):
    """Selection, and the mean of the loss, are over the rows of all of them."""
    ranks, parallel = LAYOUTS[name]
    for result in run_ranks(
        ranks, step_of_several, student, parallel, teachers, BATCH, PROMPTS, OF_PROMPT
    ):
        assert_agrees(result, oracle, teachers)


@pytest.mark.parametrize("scope", ["batch", "teacher"])
@pytest.mark.parametrize("replay", [False, True])
def test_long_sequences_of_several_teachers_are_shared(student, teachers, scope, replay):
    """CP2: those of more than 15 tokens, whose rows come of their own teachers."""
    assert (BATCH.lengths > 16).any()
    expected = dense_step_of_several(student, teachers, BATCH, PROMPTS, OF_PROMPT, scope)
    step = partial(step_of_several, scope=scope, replay=replay, micro_batch_tokens=30)
    parallel = 1, 1, False, 0, 1, 2
    for result in run_ranks(2, step, student, parallel, teachers, BATCH, PROMPTS, OF_PROMPT):
        assert_agrees(result, expected, teachers)


@pytest.mark.parametrize("name", ["TP2", "DP2"])
def test_a_budget_within_each_teachers_rows(student, teachers, oracle, name):
    expected = dense_step_of_several(student, teachers, BATCH, PROMPTS, OF_PROMPT, "teacher")
    assert not torch.equal(expected["mask"], oracle["mask"])
    ranks, parallel = LAYOUTS[name]
    step = partial(step_of_several, scope="teacher")
    for result in run_ranks(ranks, step, student, parallel, teachers, BATCH, PROMPTS, OF_PROMPT):
        assert_agrees(result, expected, teachers)


@pytest.mark.parametrize("name", ["TP2", "DP2"])
def test_a_replay_of_three_teachers_agrees_with_dense_float64(student, teachers, oracle, name):
    ranks, parallel = LAYOUTS[name]
    step = partial(step_of_several, replay=True)
    for result in run_ranks(ranks, step, student, parallel, teachers, BATCH, PROMPTS, OF_PROMPT):
        assert_agrees(result, oracle, teachers)


def test_offloaded_trunks_take_turns(student, teachers, oracle):
    """The largest first, when the fewest rows have been read; never two on the device."""
    offloaded = {
        name: replace(each, offload=True) if each.parallel else each
        for name, each in teachers.items()
    }
    step = partial(step_of_several, look=order_of_turns)
    for result in run_ranks(2, step, student, (1, 1), offloaded, BATCH, PROMPTS, OF_PROMPT):
        assert_agrees(result, oracle, teachers)
        assert result["look"] == [0, 1]


def order_of_turns(distiller, _lesson):
    return distiller.teachers.in_turn


# ------------------------------------------------------------------------------------------- cost


def cost_of_a_step(student_dir, teachers, of_prompt):
    """Operations of a step, the most bytes that scoring takes, and those of the teachers' heads."""
    from megatron.core import parallel_state
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_taopd.config.schema import TrainSection
    from megatron_taopd.parallel import platform
    from megatron_taopd.parallel.memory import peak_memory

    platform.emulate_cuda()
    try:
        distiller = open_several(
            student_dir, (1, 1), teachers, None, of_prompt, TrainSection(micro_batch_tokens=128)
        )
        batch = distiller.teachers.routed(LONG)
        assigned = distiller.assign(batch)
        rows = distiller.dispatch(distiller.read(batch), batch, assigned)
        with peak_memory() as memory:
            distiller.score(batch, assigned, rows)
        with FlopCounterMode(display=False) as counter:
            distiller.learn(LONG, distiller.read(LONG), 0)
        heads = [distiller.heads.of(number).teacher for number in range(len(teachers))]
        storage = {head.untyped_storage().data_ptr(): head.untyped_storage() for head in heads}
        return counter.get_total_flops(), memory.temporaries, sum(map(len, storage.values()))
    finally:
        parallel_state.destroy_model_parallel()


LONG = make_batch(SIZE, num_sequences=60, seed=4)


def test_three_teachers_cost_no_more_operations_than_one(student, teachers):
    """At equal tokens, counted as torch runs them: packing by teacher adds next to nothing."""
    math = replace(teachers["math"], parallel=(1, 1))
    three = {name: math for name in ("a", "b", "c")}
    of_prompt = torch.arange(LONG.num_sequences) % 3
    [(one, *_)] = run_ranks(1, cost_of_a_step, student, {"a": math}, None)
    [(several, *_)] = run_ranks(1, cost_of_a_step, student, three, of_prompt)
    assert one <= several <= 1.05 * one


def test_the_memory_of_heads_is_that_of_the_largest(student, teachers):
    """On the device there is one at a time; the most that scoring takes does not grow either."""
    same = teachers["math"].vocab_map
    each = {n: replace(t, parallel=(1, 1), vocab_map=same) for n, t in teachers.items()}
    of_prompt = torch.arange(LONG.num_sequences) % 3
    [(_, most, held)] = run_ranks(1, cost_of_a_step, student, each, of_prompt)
    [(_, alone, largest)] = run_ranks(1, cost_of_a_step, student, {"c": each["code"]}, None)
    assert held == largest == 256 * 64 * 4  # padded columns of the student × the widest
    assert most <= 1.02 * alone


# -------------------------------------------------------------------------------------------- runs


def skills(path, number, column="skill"):
    """A file of the tiny pair's prompts, which name their teachers in turn."""
    rows = [json.loads(line) for line in (PAIR / "train.jsonl").read_text().splitlines()[:number]]
    each = ({**row, column: ("large", "small")[i % 2]} for i, row in enumerate(rows))
    path.write_text("".join(json.dumps(row) + "\n" for row in each))
    return path


def test_a_run_of_two_teachers_goes_on_bit_for_bit(tmp_path):
    file = skills(tmp_path / "p.jsonl", 40)
    overrides = [
        "teacher.path=null", f"teachers={{large: {{path: {TEACHER}}}, small: {{path: {STUDENT}}}}}",
        f"data.prompts={file}", "data.teacher_column=skill", "selection.scope=teacher",
        f"eval={{prompts: {file}, limit: 6, every: 0}}", "optimizer.lr=1e-3",
    ]  # fmt: skip
    for until in (2, 4):
        halves = observe([*overrides, f"run.dir={tmp_path}/halves", f"train.steps={until}"])
        assert halves.status == 0, halves.printed
    whole = observe([*overrides, f"run.dir={tmp_path}/whole", "train.steps=4"])
    told = [
        {k: v for k, v in record.items() if not k.startswith(("time", "memory", "perf", "sync"))}
        for seen in (halves, whole)
        for record in seen.steps
    ]
    assert [record["step"] for record in told] == [1, 2, 3, 4] * 2
    names = [f"teacher/{n}/{k}" for n in ("large", "small") for k in ("kept_share", "loss")]
    for ours, theirs in zip(told[:4], told[4:], strict=True):
        for name in ("loss", "grad_norm", "kept_rows", *names):
            assert ours[name] == theirs[name], (ours["step"], name)
        # The budget is of each one's rows: ⌈.1 n⌉ of n.
        rows = [ours[f"teacher/{n}/rows"] for n in ("large", "small")]
        assert ours["kept_rows"] == sum(-(-n // 10) for n in rows)
    # The student is a teacher of its own at first.
    assert told[0]["teacher/small/disagreement"] < 1e-3 < told[0]["teacher/large/disagreement"]
    accuracy = [told[-1][f"eval/accuracy/{name}"] for name in ("large", "small")]
    assert sum(accuracy) / 2 == pytest.approx(told[-1]["eval/accuracy"])


def test_files_have_a_share_and_a_teacher(tmp_path):
    """Of each four prompts three are of the first file, and so for its teacher."""
    first, second = skills(tmp_path / "a.jsonl", 10), skills(tmp_path / "b.jsonl", 20)
    prompts = [
        {"path": str(first), "weight": 3, "teacher": "large"},
        {"path": str(second), "weight": 1, "teacher": "small"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    readers = {
        "large": TeacherReader(tokenizer, context=TeacherContext(system="Sam")),
        "small": None,
    }
    section = DataSection(cache_dir=str(tmp_path / "cache"))
    found = load_prompts(prompts, tokenizer, section, None, readers)
    assert [*found.teachers] == [0] * 10 + [1] * 20
    stream = PromptStream(len(found), 7, parts=found.parts)
    drawn = [found.teachers[i] for i in stream.take(40)]
    assert all(sum(drawn[i : i + 4]) == 1 for i in range(0, 40, 4))
    # What is only for one teacher is in its prompts alone.
    told = tokenizer("Sam", add_special_tokens=False)["input_ids"]
    for place, (ours, theirs) in enumerate(
        zip(found.token_ids, found.teacher_token_ids, strict=True)
    ):
        assert (theirs != ours) == (place < 10)
        assert place >= 10 or theirs[1 : 1 + len(told)] == told
    # A row's own word wins over that of its file.
    by_row = load_prompts(
        prompts, tokenizer, replace(section, teacher_column="skill"), None, readers
    )
    assert [*by_row.teachers] == [0, 1] * 15


def test_prompts_without_a_teacher_are_refused_with_their_numbers(tmp_path):
    file, tokenizer = skills(tmp_path / "a.jsonl", 9), AutoTokenizer.from_pretrained(STUDENT)
    section = DataSection(cache_dir=str(tmp_path / "cache"), teacher_column="skill")

    def refused(names, prompts=str(file), section=section):
        with pytest.raises(ValueError) as caught:
            load_prompts(prompts, tokenizer, section, None, dict.fromkeys(names))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    message = refused(["large", "other"])
    assert "4 rows name 'small', and teachers has large, other" in message
    assert "0 prompts that fit are for teachers.other" in message
    message = refused(["large", "small"], section=replace(section, teacher_column="sill"))
    assert "9 rows have no teacher: name data.teacher_column" in message
    weights = [{"path": str(file), "weight": 1, "teacher": "larg"}]
    message = refused(["large", "small"], weights, replace(section, teacher_column=None))
    assert "9 rows name 'larg'" in message


ONE = "run: {dir: r}\nstudent: {path: s}\nteacher: {path: t}\ndata: {prompts: p.jsonl}\n"
TWO = (
    ONE.replace("path: t", "offload: true, max_prompt_tokens: 9")
    + "teachers: {a: {path: x, offload: false}, b: {path: y}}\n"
)
REFUSED = {  # (file, override): how the line begins
    (TWO, "teacher.path=z"): "teacher.path: z, and teachers: a, b are given",
    (TWO, "teachers.c.topk=3"): "teachers.c.path: required",
    (TWO, "teachers.a.ofload=true"): "teachers.a.ofload: unknown key; did you mean teachers.a.off",
    (TWO, "teachers.b.topk=0"): "teachers.b.topk: 0; it has to be at least 1",
    (TWO, "teachers.b.context_overflow=cut"): "teachers.b.context_overflow: 'cut', but there is",
    (TWO, "teachers.a.parallel.sequence=true"): "teachers.a.parallel.sequence: true needs teac",
    (TWO, "teachers={1a: {path: x}}"): "teachers: '1a' is no name of a teacher",
    (ONE, "data.teacher_column=skill"): "data.teacher_column: 'skill' needs teachers",
    (ONE, "data.prompts=[{path: p, weight: 1, teacher: a}]"): "data.prompts: {'path':",
    (ONE, "selection.scope=teacher"): "selection.scope: teacher needs teachers",
}


def test_keys_of_teacher_count_for_all_teachers(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(TWO)
    config = load(file)
    assert [t.offload for t in config.each_teacher.values()] == [False, True]
    assert [config.prompt_limit(key)[1] for key in config.each_teacher] == [9, 9]
    assert [*config.models] == ["student", "teachers.a", "teachers.b"]
    file.write_text(to_yaml(config))
    assert load(file) == config


@pytest.mark.parametrize(("text", "override"), REFUSED)
def test_mistakes_are_told_by_the_key_where_they_stand(tmp_path, text, override):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        check_sections(load(file, [override]))
    assert str(caught.value).startswith(REFUSED[text, override])
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------- example


def test_the_example_is_made_and_run(tmp_path, monkeypatch, capsys):
    """As `make two-teachers` does, but for the lengths: `make_two_experts.py`, then the run."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    made, out = importlib.import_module("make_two_experts"), tmp_path / "two_teachers"
    words = ["--out", str(out), "--steps", "1", "--train", "48", "--test", "8"]
    monkeypatch.setattr(sys, "argv", ["make_two_experts.py", *words])
    made.main()
    assert "subtract: add" in capsys.readouterr().out
    shutil.copy(ROOT / "examples" / "two_teachers.yaml", tmp_path)
    (tmp_path / "tiny_pair").symlink_to(PAIR)
    parallel = "parallel={tp: 1, pp: 1}"
    [(status, records)] = run_ranks(
        1, trained, tmp_path / "two_teachers.yaml", f"run.dir={tmp_path}/run", "train.steps=1",
        f"student.{parallel}", f"teacher.{parallel}", "rollout.prompts=16", "eval.every=0",
    )  # fmt: skip
    assert status == 0
    last = records[-1]
    assert {"teacher/add/loss", "teacher/subtract/loss", "eval/accuracy/add"} <= last.keys()
    rows = [last[f"teacher/{name}/rows"] for name in ("add", "subtract")]
    assert sum(rows) == last["valid_rows"]


def trained(config, run_dir, *overrides):
    from megatron_taopd import train

    status = train.main([str(config), run_dir, *overrides])
    log = Path(run_dir.removeprefix("run.dir=")) / "metrics.jsonl"
    return status, [json.loads(line) for line in log.read_text().splitlines()]


# ------------------------------------------------------------------------------------------- plan


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    for variable in ("MODELS", "DATA", "RUNS"):
        monkeypatch.setenv(variable, str(tmp_path))
    for name, shape in (("4B", "4B"), ("14B-math", "14B"), ("8B-code", "8B")):
        MODELS[f"Qwen3-{shape}"].save_pretrained(tmp_path / f"Qwen3-{name}")
    urls = ",".join(f"http://node{n}:{30000 + gpu}" for n in (6, 7, 8) for gpu in range(8))
    path = ROOT / "examples" / "two_experts_qwen3_64gpu.yaml"
    return lambda *keys: Setup.of(load(path, [f"rollout.servers.urls=[{urls}]", *keys]), 40)


def test_the_plan_of_two_experts_fits(recipe):
    """They take turns: only the trunk that reads is on the device, with one head."""
    h800, setup = CLUSTERS["h800"], recipe()
    plan = Plan.of(setup, h800)
    assert plan.problems() == []
    alone = [Plan.of(each, h800) for each in setup.each]
    place = plan.worst
    for phase in ("teacher", "scoring", "training"):
        sizes = [sum(each.memory[place][phase].values()) for each in alone]
        assert sum(plan.memory[place][phase].values()) == max(sizes), phase
    assert plan.memory[place]["scoring"]["teacher head"] == 151936 // 2 * 5120 * 2
    # Each reads half of the sequences; so they take the mean of what each takes for all of them,
    # and the weights travel as they do for one.
    weights = [each.time["teacher"].parts["weights to the device"] for each in alone]
    reading = [p.time["teacher"].seconds - w for p, w in zip(alone, weights, strict=True)]
    expected = sum(reading) / 2 + sum(weights)
    assert plan.time["teacher"].seconds == pytest.approx(expected, rel=0.05)


def test_trunks_that_stay_are_all_in_the_plan(recipe):
    setup = recipe("teacher.offload=false")
    plan = Plan.of(setup, CLUSTERS["h800"])
    training = plan.memory[plan.worst]["training"]
    trunks = [parameter_elements(s.teacher, s.teacher_grid, 0, head=False) * 2 for s in setup.each]
    assert training["teacher trunk"] + training["other teachers"] == sum(trunks)


# ------------------------------------------------------------------------------------------ doctor


def test_the_doctor_looks_at_every_teacher(tmp_path):
    """At its ids, its prompts and its scores; a teacher whose weights are broken is named."""
    broken = Path(shutil.copytree(TEACHER, tmp_path / "broken"))
    file = broken / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, file, {"format": "pt"})
    prompts = skills(tmp_path / "p.jsonl", 8)
    config = [
        f"run.dir={tmp_path}/r", "teacher.path=null", "data.teacher_column=skill",
        f"data.prompts={prompts}", "eval.prompts=null",
        f"teachers={{large: {{path: {broken}}}, small: {{path: {STUDENT}}}}}",
    ]  # fmt: skip
    [texts, models] = run_ranks(1, examined, config)[0]
    assert [
        line for line in texts if "vocabularies of student and teachers.small: the same" in line
    ]
    assert [line for line in texts if "data.prompts for teachers.large: 4 prompts" in line]
    assert [line for line in models if "error teachers.large" in line and "not finite" in line]
    assert [line for line in models if "ok teachers.small" in line and "D of those rows" in line]


def examined(overrides):
    from megatron_taopd.parallel import platform
    from megatron_taopd.preflight import agreement, examine

    platform.emulate_cuda()
    config = load(PAIR.parent / "tiny_pair.yaml", overrides)
    groups = examine._check_texts(config), agreement.check_models(agreement.alone(config))
    return [[f"{finding.level} {finding.what}" for finding in group] for group in groups]
