"""What is known before a model is built, and before torch is imported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from faults import bad_inputs
from safetensors.torch import load_file, save_file
from support.patience import finish, run, wait_for
from support.ranks import run_ranks
from torch.distributed import run as torchrun

from megatron_taopd import cli, launch
from megatron_taopd.checkpoints import end
from megatron_taopd.config.load import load
from megatron_taopd.config.schema import ServersSection
from megatron_taopd.formats.directory import check_directory
from megatron_taopd.formats.hf import load_config
from megatron_taopd.formats.hf_map import parameters
from megatron_taopd.formats.megatron import MegatronCheckpoint, find_keys
from megatron_taopd.monitoring.throughput import Devices, devices_apart
from megatron_taopd.plan.setup import Setup
from megatron_taopd.preflight import examine, network
from megatron_taopd.serving import health
from megatron_taopd.serving.replica import Limits

ROOT = Path(__file__).parents[1]
PAIR = ROOT / "examples" / "tiny_pair"
TINY = str(ROOT / "examples" / "tiny_pair.yaml")
ONE_RANK = ["student.parallel.tp=1", "teacher.parallel.pp=1"]

# ------------------------------------------------------------------------------------ without torch


def test_a_typo_is_told_without_torch(tmp_path):
    """An unknown key, a bad value, a missing file: every command that reads a configuration; ranks
    that do not fit: train and launch."""
    wrong = [[TINY, "train.step=1"], [TINY, "train.steps=0"], ["none.yaml"], [TINY]]
    wrong += [[TINY, *ONE_RANK, "student.path=none"], [TINY, *ONE_RANK, "data.prompts=none.jsonl"]]
    calls = [[command, *arguments] for command in ("train", "launch") for arguments in wrong]
    typos = wrong[:3]
    calls += [["plan", *arguments, "--gpus", "2"] for arguments in typos]
    calls += [["doctor", *arguments] for arguments in (typos[0], typos[2])]  # a value: a finding
    code = f"""
import sys
from megatron_taopd import cli
statuses = [cli.main(arguments) for arguments in {calls!r}]
print(statuses, [name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == f"{[2] * len(calls)} []\n", done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(calls) and all(line.startswith("error: ") for line in lines)
    train, launched = lines[: len(wrong)], lines[len(wrong) : 2 * len(wrong)]
    assert launched == train
    assert lines[2 * len(wrong) :] == [*train[:3], train[0], train[2]]


# ------------------------------------------------------------------------------------- the launcher


def test_a_command_line_is_taken_apart(monkeypatch):
    for name in ("PET_NPROC_PER_NODE", "PET_NNODES"):
        monkeypatch.delenv(name, raising=False)
    of = launch.Asked.of
    short = of(["--nnodes", "5", "--nproc_per_node=8", "--rdzv-backend", "c10d", "a.yaml", "k=v"])
    assert (short.ranks, short.is_config, short.trains) == (40, True, True)
    assert short.config == ["a.yaml", "k=v"]
    long = of(["--standalone", "-m", "megatron_taopd.train", "a.yaml", "k=v"])
    assert (long.ranks, long.is_config, long.trains) == (1, False, True)
    assert long.config == ["a.yaml", "k=v"]
    other = of(["--nproc-per-node", "gpu", "script.py", "a.yaml"])
    assert (other.ranks, other.trains, other.script) == (None, False, ["script.py", "a.yaml"])
    assert of(["--nnodes", "1:4", "a.yaml"]).ranks is None
    assert of(["--nnodes", "2:2", "a.yaml"]).ranks == 2
    monkeypatch.setenv("PET_NNODES", "3")
    assert of(["a.yaml"]).ranks == 3


def test_options_with_and_without_a_value_are_torchruns():
    found = {True: set(), False: set()}
    for action in torchrun.get_args_parser()._actions:
        if "--help" not in action.option_strings:
            names = {option.lstrip("-").replace("_", "-") for option in action.option_strings}
            found[action.nargs == 0] |= names
    assert found == {True: launch._FLAGS, False: launch._VALUED}


def test_an_option_that_torchrun_has_not_is_named():
    for options in (["--nprocs", "3"], ["--nprocs=3"], ["--standalone", "--nprocs", "3"]):
        with pytest.raises(ValueError, match=r"^--nprocs: torchrun has no such option"):
            launch.Asked.of([*options, "a.yaml"]).check()
    launch.Asked.of(["--max-restart", "1", "a.yaml"]).check()  # argparse takes beginnings


def test_a_port_in_use_is_told_where_it_is_listened_on():
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options in (["--master-port", port], ["--node-rank=0", f"--master_port={port}"]):
            with pytest.raises(ValueError, match=f"--master-port: {port} is in use"):
                launch.Asked.of([*options, "a.yaml"]).check()
        for options in (["--node-rank", "1"], ["--standalone"], ["--rdzv-backend", "c10d"]):
            launch.Asked.of([*options, "--master-port", port, "a.yaml"]).check()


def test_handlers_of_signals_are_put_back_after_a_mistake(capsys):
    before = [signal.getsignal(number) for number in launch.SIGNALS]
    for command in ("train", "launch"):
        assert cli.main([command, TINY, "train.step=1"]) == 2
    assert [signal.getsignal(number) for number in launch.SIGNALS] == before
    assert capsys.readouterr().err.count("\n") == 2


# ------------------------------------------------------------------------------------------ servers


def test_a_server_that_does_not_answer_is_told_at_once_and_counted_down(monkeypatch, caplog):
    """It answers at the 65th look, a second each: told at 0, 30 and 60 s."""
    import asyncio

    clock, looks = SimpleNamespace(now=100.0), []

    async def get(url, timeout):
        looks.append(url)
        if len(looks) < 65:
            raise httpx.ConnectError("refused")

    async def sleep(seconds):
        clock.now += seconds

    monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(health.asyncio, "sleep", sleep)
    shared = SimpleNamespace(limits=Limits(start_timeout_s=900), http=SimpleNamespace(get=get))
    replica = SimpleNamespace(server=None, url="http://node:30000", shared=shared)
    with caplog.at_level("INFO", "megatron_taopd"):
        asyncio.run(health.wait_until_up(replica))
    assert [record.message for record in caplog.records] == [
        "http://node:30000 does not answer (refused); it is waited for, 900 s more",
        "http://node:30000 still does not answer; it is waited for, 870 s more",
        "http://node:30000 still does not answer; it is waited for, 840 s more",
    ]


def test_a_name_that_does_not_resolve_is_an_error(tmp_path, capsys):
    url = "http://no-such-host.invalid:30000"
    urls = [url, "http://127.0.0.1:1"]
    found = list(network.check_urls("rollout.servers", urls, listening=False))
    assert [finding.level for finding in found] == ["error", "ok"]
    assert next(network.check_urls("rollout.servers", urls)) == found[0]
    assert found[0].what.startswith(f"rollout.servers.urls: {url}: no-such-host.invalid does not")
    overrides = [
        f"run.dir={tmp_path}/run",
        "rollout.engine=sglang",
        f"rollout.servers.urls=[{url}]",
    ]
    assert not examine.before_run(load(TINY, overrides))
    assert capsys.readouterr().err.count(url) == 1


# ------------------------------------------------------------------------------------------ weights


def test_the_headers_of_both_models_are_compared_before_anything_is_built(tmp_path, capsys):
    """A tensor's shape, a tied output that differs, a file that is cut; of a teacher on servers
    the run loads nothing."""
    for model in ("student", "teacher"):
        directory = tmp_path / model
        shutil.copytree(PAIR / model, directory)
        file = directory / "model.safetensors"
        whole = file.read_bytes()
        overrides = [f"run.dir={tmp_path}/run", f"{model}.path={directory}"]
        assert examine.before_run(load(TINY, overrides))
        tensors = load_file(file)
        norm = tensors["model.norm.weight"]
        save_file(tensors | {"model.norm.weight": norm[:-1].clone()}, file, {"format": "pt"})
        assert not examine.before_run(load(TINY, overrides))
        line = capsys.readouterr().err
        wanted = f"{file}: model.norm.weight is [{len(norm) - 1}] where config.json asks for"
        assert f"error: {model}.path: {wanted} [{len(norm)}]" in line and line.count("\n") == 1
        file.write_bytes(whole[:-1000])
        assert not examine.before_run(load(TINY, overrides))
        line = capsys.readouterr().err
        assert f"{model}.path: {file}: damaged safetensors file" in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda d: (d / "config.json").write_text(bad_inputs.POINTER), ("config.json", "lfs pull")),
        (
            lambda d: (d / "model.safetensors").write_text(bad_inputs.POINTER),
            ("model.safetensors: a pointer of Git LFS", "git lfs pull"),
        ),
        (
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            ("pytorch_model.bin in torch's own format", "save_pretrained(OUT)"),
        ),
        (
            lambda d: (
                (d / "model.safetensors").rename(d / "adapter_model.safetensors"),
                (d / "config.json").rename(d / "adapter_config.json"),
            ),
            ("an adapter (adapter_config.json)", "merge it first", "merge_and_unload()"),
        ),
    ],
)
def test_directories_that_are_no_model_have_a_remedy(tmp_path, change, parts):
    directory = tmp_path / "model"
    shutil.copytree(PAIR / "student", directory)
    check_directory(directory)
    change(directory)
    with pytest.raises(ValueError) as refused:
        check_directory(directory)
    line = str(refused.value)
    assert str(directory) in line and "\n" not in line and all(part in line for part in parts), line


def test_a_prefix_of_nemo_is_told():
    """A Megatron checkpoint whose keys begin with `module.`."""
    hf = load_config(PAIR / "student")
    known = parameters(hf)
    tensors = {f"module.{parameter.key}": None for parameter in known.values()}
    checkpoint = object.__new__(MegatronCheckpoint)
    checkpoint.dir, checkpoint.tensors = "DIR", tensors
    with pytest.raises(ValueError, match=r"DIR: keys begin with 'module.' .*export"):
        find_keys(checkpoint, hf, known)


# ----------------------------------------------------------------------------------- a finished run


def run_again(overrides):
    """`main`: (status, what was printed, how often a run was built)."""
    import io
    from contextlib import redirect_stderr, redirect_stdout
    from unittest import mock

    from megatron_taopd import build as building
    from megatron_taopd import train

    printed, original, built = io.StringIO(), building.build, []

    def build(*arguments):
        built.append(1)
        return original(*arguments)

    with (
        mock.patch.object(building, "build", build),
        redirect_stdout(printed),
        redirect_stderr(printed),
    ):
        status = train.main([TINY, *overrides])
    return status, printed.getvalue(), len(built)


def test_a_finished_run_builds_nothing_unless_some_of_its_end_is_missing(tmp_path):
    run_dir = tmp_path / "run"
    options = [*ONE_RANK, f"run.dir={run_dir}", "train.steps=1", "rollout.prompts=4"]
    options += ["eval.at_start=false", "eval.limit=4", "log.tensorboard=false"]
    again = partial(run_ranks, 1, run_again)
    assert again(options)[0][::2] == (0, 1)
    assert json.loads((run_dir / end.FINISHED).read_text()) == {"step": 1, "exported": True}
    report = (run_dir / "report.html").read_bytes()

    status, printed, built = again(options)[0]
    assert (status, built) == (0, 0)
    assert "nothing is left to do" in printed and printed.count("\n") == 1
    assert (run_dir / "report.html").read_bytes() == report  # with its samples

    shutil.rmtree(run_dir / "student")
    status, printed, built = again(options)[0]
    assert (status, built) == (0, 1) and "nothing is left" not in printed
    assert (run_dir / "student" / "model.safetensors").is_file()
    (run_dir / "report.html").unlink()
    assert again(options)[0][::2] == (0, 1) and (run_dir / "report.html").is_file()
    assert again(options)[0][::2] == (0, 0)

    # An end after more steps than are asked for now, and one after fewer than were saved since.
    config = load(TINY, options)
    assert end.is_finished(config)
    (run_dir / "checkpoints" / "step_00000002").mkdir()
    assert end.missing(config, 2) == ["report.html"]
    assert end.missing(load(TINY, [*options, "train.steps=2"]), 2) == ["report.html", "student/"]
    assert not end.is_finished(load(TINY, [*options, "train.steps=3"]))


# ------------------------------------------------------------------------------------------- Ctrl-C


def pressed(tmp_path, overrides, until, times):
    """Launch a run, press Ctrl-C so often once it has come so far; return (status, output)."""
    run_dir = tmp_path / f"{until.__name__}{times}"
    log = tmp_path / f"{run_dir.name}.log"
    command = [sys.executable, "-m", "megatron_taopd", "launch", "--nproc-per-node", "2", TINY]
    command += [f"run.dir={run_dir}", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=output, stderr=output
        )
    try:
        wait_for(lambda: until(run_dir) or process.poll() is not None, seconds=120, what="no start")
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        finish(process, seconds=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, log.read_text()


def at_once(run_dir):
    """While the launcher or its ranks import torch."""
    return time.sleep(2) is None


def training(run_dir):
    """A step is done, and the next is under way."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.is_file() and len(metrics.read_text().splitlines()) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("until", "times", "status"), [(at_once, 1, 3), (training, 1, 3), (training, 2, 130)]
)
def test_ctrl_c_ends_without_a_traceback(tmp_path, until, times, status):
    overrides = ["train.steps=5000", "rollout.prompts=8", "eval.at_start=false", "eval.every=0"]
    overrides += ["log.tensorboard=false", "checkpoint.every=0"]
    ended, output = pressed(tmp_path, overrides, until, times)
    assert "Traceback" not in output and "KeyboardInterrupt" not in output, output
    assert ended == status, output
    assert len([line for line in output.splitlines() if "torch/" in line]) == 0


@pytest.mark.slow
def test_ctrl_c_in_every_phase_ends_without_a_traceback_and_the_same_command_resumes(tmp_path):
    """Once and twice; what is not a checkpoint yet when a run ends at once does not become one."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "support.interrupted", tmp_path]
    done = run(command, seconds=200, env=environment)
    assert done.returncode == 0, done.stderr
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    for each in ended:
        assert "Traceback" not in each["output"] and "KeyboardInterrupt" not in each["output"], each
    assert [(each["phase"], each["times"], each["status"], each["steps"]) for each in ended] == [
        ("tokenising", 1, 3, []),
        ("tokenising", 2, 3, []),  # nothing is there that a second press would have to wait for
        ("waiting", 1, 3, []),
        ("waiting", 2, 3, []),
        ("evaluating", 1, 3, []),
        ("evaluating", 2, 130, []),
        ("saving", 1, 3, ["step_00000001", "step_00000002"]),
        ("saving", 2, 130, ["step_00000001", "step_00000002", "step_00000003.incomplete"]),
        ("nothing", 0, 0, ["step_00000002", "step_00000003"]),
        ("comparing", 1, 0, []),
    ]
    outputs = {(each["phase"], each["times"]): each["output"] for each in ended}
    for phase in "evaluating", "saving":
        assert "the same command resumes" in outputs[phase, 1]
        assert outputs[phase, 2].count("ended at once; the same command goes on") == 1
    assert "resuming after step 2" in outputs["saving", 2]
    assert "resuming after step 2" in outputs["nothing", 0]


# ------------------------------------------------------------------------------------- wrong inputs

QUICK = (
    "train.steps",
    "optimizer",
    "rollout.servers.gpus",
    "configuration",
    "launch",
    "plan",
    "selection",
)


def test_a_sample_of_wrong_inputs_is_told_in_one_line(tmp_path):
    """tests/faults/bad_inputs.py has all of them."""
    tried = [
        case
        for case in bad_inputs.cases(tmp_path)
        if case.name.startswith(QUICK) and "--json" not in case.name
    ]
    assert len(tried) > 60
    short = {}
    for case in tried:
        told = bad_inputs.tell(case)
        if not all(told.marks):
            short[case.name] = told
    assert not short


def test_the_plan_counts_devices_of_servers_that_no_rank_has():
    def devices(train, per_node, **servers):
        section = ServersSection(**servers)
        used = Devices(train, train, train, devices_apart(section, min(train, per_node)))
        return Setup.devices.fget(SimpleNamespace(gpus=train, used=used))

    urls = tuple(f"http://node{n}:1" for n in range(24))
    assert devices(40, 8, urls=urls) == "40 train + 24 serve = 64"
    assert devices(40, 8, urls=urls[:12], tp=2) == "40 train + 24 serve = 64"
    assert devices(6, 8, replicas=2, gpus=(6, 7)) == "6 train + 2 serve = 8"
    assert devices(8, 8, replicas=2, gpus=(6, 7)) == "8 train"  # colocated
