"""What a run goes on with when it is started again: what is kept, what may change and counts from
there on, and what is refused in one line before a model is built."""

from __future__ import annotations

import io
import json
import re
import shutil
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from fnmatch import fnmatch
from functools import reduce
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from support.ranks import run_ranks
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_taopd import config as configuration
from megatron_taopd.checkpoints import files as checkpoint_files
from megatron_taopd.checkpoints import resume
from megatron_taopd.config.load import RENAMED
from megatron_taopd.formats.hf import HFCheckpoint

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny_pair.yaml"
PAIR = ROOT / "examples" / "tiny_pair"
OPTIONS = [
    "student.parallel={tp: 1, pp: 1}", "teacher.parallel={tp: 1, pp: 1}", "log.tensorboard=false",
    "rollout={prompts: 8, max_new_tokens: 16, horizon: auto, horizon_floor: 4}",
    "train={steps: 3, mini_batches: 2}", "checkpoint={every: 1, asynchronous: false, keep_last: 9}",
    "optimizer={lr: 1e-3, min_lr: 1e-4, decay: linear, warmup_steps: 2}",
    "eval={every: 1, limit: 8}", "selection.selector=random",
]  # fmt: skip
RATES = [5e-4, 1e-3, 7.75e-4, 5.5e-4, 3.25e-4, 1e-4]  # of the six updates of these three steps


def start(overrides, only_build=False):
    """`main`: (status, what was printed, what the run was once it was built, or None)."""
    from megatron_taopd import build as building
    from megatron_taopd import start, train

    built, printed, originals = [], io.StringIO(), (building.build, start.run_to_its_end)

    def build(*arguments):
        run = originals[0](*arguments)
        built.append(facts(run))
        return run

    building.build = build
    if only_build:
        start.run_to_its_end = lambda run: 0
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            status = train.main([str(TINY), *overrides])
    finally:
        building.build, start.run_to_its_end = originals
    return status, printed.getvalue(), built[0] if built else None


def facts(run):
    """What moves a run, weights and moments aside (test_checkpoint.py has them)."""
    return {
        "first_step": run.first_step,
        "version": run.student.version,
        "updates": run.student.scheduler.num_steps,
        "consumed": run.rollouts.consumed,
        "horizon": deepcopy(run.observer.horizon.state()),
        "guard": deepcopy(run.guard.state()),
        "best": run.checkpoints.best,
        "noted": run.start,
    }


def on_one_rank(directory, *overrides):
    [answer] = run_ranks(1, start, [f"run.dir={directory}", *OPTIONS, *overrides])
    return answer


def only_built(directory, *overrides):
    [answer] = run_ranks(1, start, [f"run.dir={directory}", *OPTIONS, *overrides], True)
    return answer


def records(directory):
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["step"] > 0]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Copies of the tiny pair's files, which a test may not change."""
    return Path(shutil.copytree(PAIR, tmp_path_factory.mktemp("inputs") / "pair"))


def given(inputs):
    return [
        f"student.path={inputs}/student", f"teacher.path={inputs}/teacher",
        f"data.prompts={inputs}/train.jsonl", f"eval.prompts={inputs}/test.jsonl",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory):
    """A run of three steps, with a checkpoint after each."""
    directory = tmp_path_factory.mktemp("runs") / "done"
    status, printed, built = on_one_rank(directory, *given(inputs))
    assert (status, built["first_step"]) == (0, 0), printed
    return directory


@pytest.fixture
def begun(done, tmp_path):
    """The same, killed after its second checkpoint; a copy to change."""
    directory = Path(shutil.copytree(done, tmp_path / "run"))
    shutil.rmtree(directory / "checkpoints" / "step_00000003")
    return directory


# ---------------------------------------------------------------------------------- what is kept


def test_everything_that_moves_a_run_is_kept(done, begun, inputs):
    """Two mini-batches a step, all of them taken; the checkpoint of step 2."""
    status, printed, built = only_built(begun, *given(inputs))
    assert status == 0 and "resuming after step 2" in printed
    kept = resume.kept_run(begun / "checkpoints" / "step_00000002")
    assert (built["first_step"], built["version"], built["updates"]) == (2, 2, 4)
    assert built["consumed"] == kept["prompts_consumed"] == 16
    guard, horizon = built["guard"], built["horizon"]
    assert len(guard["losses"]) == 4 and torch.equal(guard["losses"], kept["guard"]["losses"])
    assert {**guard, "losses": 0} == dict(losses=0, skipped=0, in_a_row=0, jumps=0)
    assert horizon["observed"] == 2 and horizon["prompt_tokens"] > 0
    for name in ("mass", "reach"):
        assert horizon[name].sum() > 0 and torch.equal(horizon[name], kept["horizon"][name])
    accuracies = {r["step"]: r["eval/accuracy"] for r in records(begun) if r["step"] < 3}
    assert built["best"].accuracy == max(accuracies.values())
    assert kept["best"] == [built["best"].step, built["best"].accuracy]
    assert (kept["schedule_step"], kept["num_prompts"]) == (4, 6144)
    assert kept["start"] == resume.last_start(begun / "checkpoints")
    assert kept["start"]["files"] == built["noted"]["files"]

    status, _, _ = on_one_rank(begun, *given(inputs))
    assert status == 0
    times = ("time/", "checkpoint/", "memory/", "rollout/tokens_per_second", "perf/")
    plain = [
        [{k: v for k, v in r.items() if not k.startswith(times)} for r in records(directory)]
        for directory in (done, begun)
    ]
    assert plain[0] == plain[1]
    assert [r["lr"] for r in plain[0]] == pytest.approx(RATES[1::2])


@contextmanager
def changed_run(directory):
    """What the checkpoint of step 2 holds of the run, to change."""
    folder = directory / "checkpoints" / "step_00000002"
    common = torch.load(folder / "common.pt", weights_only=True)
    yield common["run"]
    torch.save(common, folder / "common.pt")
    names = [str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()]
    files = {n: checkpoint_files.sum_of(folder / n) for n in names if n != "checksums.json"}
    checkpoint_files.publish(folder, folder, 2, files)


def test_a_checkpoint_from_before_such_things_were_noted_is_resumed(begun, inputs):
    with changed_run(begun) as run:
        for name in ("start", "schedule_step", "num_prompts"):
            del run[name]
        del run["guard"]["jumps"]
    assert only_built(begun, *given(inputs), "student.path=" + str(PAIR / "teacher"))[0] == 2
    status, printed, built = on_one_rank(begun, *given(inputs), "run.seed=3")
    assert status == 0 and "intended?" in printed
    assert (built["first_step"], built["updates"], built["consumed"]) == (2, 4, 16)
    assert [r["lr"] for r in records(begun)] == pytest.approx(RATES[1::2])


def test_a_checkpoint_under_old_names_of_keys_is_resumed_under_the_new_ones(begun, inputs):
    """Nothing is told as changed but what has changed, and that by its new name."""
    with changed_run(begun) as run:
        config = run["start"]["config"]
        for old, new in RENAMED.items():
            *sections, old_name = old.split(".")
            section = reduce(dict.__getitem__, sections, config)
            value = section.pop(new.rpartition(".")[2])
            section[old_name] = value + 1 if old_name == "attempts" else value
    command = [*given(inputs), "watchdog.silent_s=60", "checkpoint.keep_last=8"]
    status, printed, built = on_one_rank(begun, *command)
    assert (status, built["first_step"], built["updates"]) == (0, 2, 4), printed
    assert "resuming after step 2" in printed
    assert "it was started with: checkpoint.keep_last 9 → 8; intended?" in printed
    assert [r["lr"] for r in records(begun)] == pytest.approx(RATES[1::2])


# ------------------------------------------------------------------------------ what may change


def test_more_steps_and_other_mini_batches_move_the_end_of_the_schedule(begun, inputs):
    """Four updates are done; three steps of one each follow, of which the last has min_lr."""
    more = ["train.steps=5", "train.mini_batches=1", "optimizer.lr=2e-3"]
    status, printed, built = on_one_rank(begun, *given(inputs), *more)
    assert (status, built["first_step"], built["updates"]) == (0, 2, 4), printed
    assert "optimizer.lr 0.001 → 0.002" in printed and "they count from here on" in printed
    # Of 7 updates the first 2 warm up; 1.9e-3 lie between lr and min_lr.
    expected = [1e-4 + 1.9e-3 * left / 5 for left in (2, 1, 0)]
    assert [r["lr"] for r in records(begun)[2:]] == pytest.approx(expected)
    assert resume.kept_run(begun / "checkpoints" / "step_00000004")["schedule_step"] == 6


def test_losses_and_accuracies_of_another_kind_are_not_compared(begun, inputs):
    """The guard's window and the best checkpoint start anew, if what they measure has changed."""
    same = only_built(begun, *given(inputs), "optimizer.lr=2e-3", "eval.every=2")[2]
    assert len(same["guard"]["losses"]) == 4 and same["best"] is not None
    for change in ("loss.kind=jsd", "selection.ratio=0.5"):
        built = only_built(begun, *given(inputs), change)[2]
        assert len(built["guard"]["losses"]) == 0 and built["best"] == same["best"]
    for change in ("eval.limit=4", f"eval.prompts={inputs}/train.jsonl"):
        _, printed, built = only_built(begun, *given(inputs), change)
        assert len(built["guard"]["losses"]) == 4 and built["best"] is None
        assert "eval: another evaluation than before" in printed


def test_the_configuration_is_kept_once_the_run_is_built(begun, inputs, tmp_path):
    """Its port cannot be listened on, which shows while it is built."""
    import socket

    before = (begun / "config.yaml").read_bytes()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        change = f"log.prometheus_port={taken.getsockname()[1]}"
        for directory in (begun, tmp_path / "new"):
            status, printed, built = on_one_rank(directory, *given(inputs), change)
            assert status == 2 and built is None and "log.prometheus_port" in printed
    assert (begun / "config.yaml").read_bytes() == before
    assert not (tmp_path / "new" / "config.yaml").exists()

    status, _, _ = only_built(begun, *given(inputs), "optimizer.lr=2e-3")
    assert status == 0
    assert configuration.load(begun / "config.yaml").optimizer.lr == 2e-3
    assert not list(begun.glob("config.yaml.*"))


# ------------------------------------------------------------------------------- what is refused


def changed_tensor(directory, name="model.norm.weight"):
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = tensors[name] + 1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def other_size(directory, **sizes):
    """A student of other sizes, with the same tokenizer."""
    shutil.copytree(PAIR / "student", directory)
    config = AutoConfig.from_pretrained(directory, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def refused(directory, *overrides):
    """The one line with which a start ends, nothing having been built or written."""
    before = {f: f.read_bytes() for f in directory.rglob("*") if f.is_file()}
    status, printed, built = on_one_rank(directory, *overrides)
    assert (status, built) == (2, None), printed
    assert {f: f.read_bytes() for f in directory.rglob("*") if f.is_file()} == before
    (line,) = printed.splitlines()
    return line


def test_another_seed_or_list_of_prompts_is_refused(begun, inputs):
    line = refused(begun, *given(inputs), "run.seed=7", "optimizer.lr=3e-3")
    assert line == (
        f"error: run.seed: 7, and 0 when {begun} was begun: rollouts and the order of the prompts "
        "follow from it; give 0, or another run.dir"
    )
    line = refused(begun, *given(inputs), "data.shuffle=false")
    assert line.startswith("error: data.shuffle: false, and true when ")
    assert line.endswith("; give true, or another run.dir")
    line = refused(begun, *given(inputs), "data.limit=100", "data.system=Think.")
    assert line.startswith("error: data.limit: 100, and null when ")


def test_a_prompt_file_that_grew_is_refused_and_one_that_moved_is_not(begun, inputs, tmp_path):
    moved = shutil.copy(inputs / "train.jsonl", tmp_path / "elsewhere.jsonl")
    options = [*given(inputs), f"data.prompts={moved}"]
    assert only_built(begun, *options)[2]["first_step"] == 2
    size = Path(moved).stat().st_size
    with open(moved, "a") as file:
        file.write('{"prompt": "1 + 1 =", "answer": "2"}\n')
    line = refused(begun, *options)
    assert line.startswith(
        f"error: data.prompts: {moved} is not {inputs}/train.jsonl, which it was"
    )
    assert f"{size:,} bytes, SHA-256 " in line and f"→ {size + 37:,} bytes" in line
    assert line.endswith(f"; give {inputs}/train.jsonl as it was, or another run.dir")


def test_another_model_is_refused_and_a_copy_is_not(begun, inputs, tmp_path):
    copy = Path(shutil.copytree(inputs / "student", tmp_path / "copy"))
    options = [*given(inputs), f"student.path={copy}"]
    assert only_built(begun, *options)[2]["first_step"] == 2
    changed_tensor(copy)
    line = refused(begun, *options)
    assert line.startswith(f"error: student.path: {copy} is not {inputs}/student, which it was")
    assert "(weights SHA-256 " in line and f"; give {inputs}/student as it was, or" in line

    smaller = other_size(tmp_path / "smaller", hidden_size=64)
    line = refused(begun, *given(inputs), f"student.path={smaller}")
    assert "(config.json hidden_size 96 → 64)" in line

    teacher = Path(shutil.copytree(inputs / "teacher", tmp_path / "teacher"))
    changed_tensor(teacher)
    line = refused(begun, *given(inputs), f"teacher.path={teacher}")
    assert line.startswith("error: teacher.path: ") and "(weights SHA-256 " in line


def test_another_number_of_prompts_is_refused_before_models_are_built(begun, inputs):
    """The same file, of which another version renders other prompts, so that others fit."""
    with changed_run(begun) as run:
        run["num_prompts"] = 6000
    status, printed, built = on_one_rank(begun, *given(inputs))
    assert (status, built) == (2, None)
    assert ": data.prompts: 6144 of " in printed
    assert f" fit, and 6000 did when {begun} was begun: " in printed


# --------------------------------------------------------------------------- without ranks


def tree(**sections):
    return configuration.to_tree(configuration.load(TINY, ["run.dir=runs/x"])) | sections


def leaves(node, prefix=""):
    if not isinstance(node, dict):
        return [prefix]
    return [key for name in node for key in leaves(node[name], f"{prefix}.{name}".lstrip("."))]


SCHEMA = leaves(OmegaConf.to_container(OmegaConf.structured(configuration.Config)))


def changed_at(config, key):
    """The same tree with another value there."""
    config = deepcopy(config)
    *sections, name = key.split(".")
    node = config
    for section in sections:
        node = node[section]
    node[name] = "another"
    return config


def test_every_key_is_refused_or_counts():
    before = {"config": tree(), "files": {}}
    for key in SCHEMA:
        now = {"config": changed_at(before["config"], key), "files": {}}
        lines = [*resume.refusals(before, now, "RUN")]
        assert len(lines) == (key in resume.FIXED), key
        assert all(what.startswith(f'{key}: "another", and ') for what, _ in lines)


def test_a_start_from_before_teachers_had_a_source_had_the_one_of_its_path():
    before, now = {"config": tree(), "files": {}}, {"config": tree(), "files": {}}
    del before["config"]["teacher"]["source"]
    assert not [*resume.refusals(before, now, "RUN")]
    now["config"]["teacher"]["source"] = "student_ema"
    [(what, remedy)] = resume.refusals(before, now, "RUN")
    assert what.startswith('teacher.source: "student_ema", and "path" when RUN was begun')
    assert remedy.startswith('give "path"')


def test_docs_say_of_every_key_what_a_resumed_run_makes_of_it():
    page = (ROOT / "docs" / "reliability.md").read_text()
    section = page.partition("## Started again with another configuration")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", section, re.MULTILINE)
    said = [(word, what) for keys, what in rows for word in re.findall(r"`([^`]+)`", keys)]
    for key in SCHEMA:
        found = [what for pattern, what in said if fnmatch(key, pattern)]
        assert len(found) == 1, (key, found)
        fixed = key in resume.FIXED or key in resume.FIXED_FILES
        assert found[0].startswith("refused") == fixed, (key, found)
    for pattern, _ in said:
        assert any(fnmatch(key, pattern) for key in SCHEMA), pattern


@pytest.fixture
def copied(tmp_path):
    """A tree whose files may be changed, and what is noted of it."""
    pair = Path(shutil.copytree(PAIR, tmp_path / "pair"))
    config = tree()
    config["student"]["path"] = str(pair / "student")
    return pair, config, resume.start_of(config)


def test_every_part_of_a_model_is_compared(copied):
    pair, config, before = copied

    def said():
        return [what for what, _ in resume.refusals(before, resume.start_of(config), "RUN")]

    assert said() == []
    student = pair / "student"
    for file in ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "config.json"):
        original = (student / file).read_bytes()
        if file == "model.safetensors":
            changed_tensor(student)
        elif file == "config.json":
            values = json.loads(original) | {"rms_norm_eps": 0.5}
            (student / file).write_text(json.dumps(values))
        else:
            (student / file).write_bytes(original + b"\n")
        (line,) = said()
        assert line.startswith(f"student.path: {student} is not as it was when RUN was begun ("), (
            file
        )
        (student / file).write_bytes(original)
    config_file = student / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"dtype": "bfloat16"}))
    (student / "README.md").write_text("what no one reads")
    assert said() == []


def test_a_fingerprint_sees_every_part_of_a_large_file(tmp_path, monkeypatch):
    """32 blocks of 64 bytes out of 64 KiB: a trained tensor is seen wherever it lies."""
    from megatron_taopd.formats import hf as hf_checkpoint

    monkeypatch.setattr(hf_checkpoint, "_BLOCK", 64)
    monkeypatch.setattr(hf_checkpoint, "_BLOCKS", 32)
    tensors = {f"layer.{i}": torch.randn(32, 64) for i in range(8)}
    seen = set()
    for changed in (None, *tensors):
        noisy = {n: t + (n == changed) * 1e-3 * torch.randn(32, 64) for n, t in tensors.items()}
        save_file(noisy, tmp_path / "model.safetensors")
        seen.add(HFCheckpoint(tmp_path).fingerprint())
    assert len(seen) == 9


def test_what_cannot_be_read_is_left_to_the_one_who_loads_it(tmp_path):
    assert resume.last_start(tmp_path) == {}
    folder = tmp_path / "step_00000004"
    folder.mkdir()
    (folder / "common.pt").write_bytes(b"no pickle")
    assert resume.kept_run(folder) == resume.last_start(tmp_path) == {}
