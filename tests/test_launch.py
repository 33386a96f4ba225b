"""Launchers: a run that is asked to end saves, says so by its exit status, and goes on when started
again. Real torchrun, real ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import httpx
import psutil
import pytest
import torch
from support.launchers import launch as launch_with_stand_ins
from support.patience import finish, known_patience, patience, wait_for
from support.ranks import run_ranks

from megatron_taopd import train
from megatron_taopd.cli import serve as serving
from megatron_taopd.launch import SIGNALS
from megatron_taopd.parallel.cuda_variables import ALLOCATOR, CONNECTIONS, EXPANDABLE
from megatron_taopd.preflight import check_config
from megatron_taopd.rollout.weight_sync.distributed import in_background
from megatron_taopd.serving.client import Replicas
from megatron_taopd.serving.model import ServedModel
from megatron_taopd.serving.replica import Limits
from megatron_taopd.serving.server import server_environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "examples" / "launch"
TINY_STUDENT = ROOT / "examples" / "tiny_pair" / "student"
TINY = str(ROOT / "examples" / "tiny_pair.yaml")
SHORT = ["rollout.prompts=8", "eval.every=0", "eval.at_start=false", "eval.limit=16"]
SHORT += ["log.tensorboard=false", "checkpoint.every=0"]
ONE_RANK = ["student.parallel.tp=1", "teacher.parallel.pp=1"]


def start(command, **environment):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **environment,
    }
    return subprocess.Popen(
        [str(part) for part in command], env=environment, start_new_session=True, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def launch(*arguments):
    module = ["-m", "megatron_taopd.launch", "--standalone", "--nproc-per-node", "1"]
    return start([sys.executable, *module, *arguments])


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def steps_done(run_dir):
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def wait_for_step(process, run_dir, step):
    def reached():
        if any(done >= step for done in steps_done(run_dir)):
            return True
        assert process.poll() is None, process.stdout.read()
        return False

    wait_for(reached, seconds=180, what=f"step {step} was not reached")


@pytest.mark.parametrize("asked", [signal.SIGUSR1, signal.SIGTERM])
def test_a_run_that_is_asked_to_end_saves_and_resumes(tmp_path, asked):
    run = ["-m", "megatron_taopd.train", TINY, *SHORT, *ONE_RANK, f"run.dir={tmp_path}/run"]
    process = launch(*run, "train.steps=500")
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(asked)
    output = finish(process, seconds=120)
    assert process.returncode == 3, output
    done = steps_done(tmp_path / "run")[-1]
    assert f"stopped after step {done} of 500" in output
    assert "Traceback" not in output

    process = launch(*run, f"train.steps={done + 1}")
    output = finish(process, seconds=180)
    assert process.returncode == 0, output
    assert f"resuming after step {done}" in output
    assert steps_done(tmp_path / "run") == [*range(1, done + 2)]


def test_the_exit_status_is_that_of_the_workers(tmp_path):
    script = tmp_path / "worker.py"
    for statement, status in (("raise SystemExit(2)", 2), ("os.kill(os.getpid(), 9)", 137)):
        script.write_text(f"import os\n{statement}\n")
        process = launch(script)
        output = finish(process)
        assert process.returncode == status, output
        assert f"rank 0 ended first, with status {status}" in output


def test_two_nodes_and_their_exit_status(tmp_path):
    """node.sh on two nodes of this machine, one rank each; a mistake is not tried again."""
    environment = {"NNODES": "2", "NPROC": "1", "MASTER_PORT": str(free_port()), "PAUSE": "0"}
    node = ["bash", LAUNCH / "node.sh", TINY, *SHORT, f"run.dir={tmp_path}/run"]

    def both(*options):
        nodes = [start([*node, *options], NODE_RANK=str(rank), **environment) for rank in range(2)]
        outputs = [finish(process, seconds=180) for process in nodes]
        return [process.returncode for process in nodes], outputs

    statuses, outputs = both("train.steps=1")
    assert statuses == [0, 0], outputs
    assert steps_done(tmp_path / "run") == [1]

    statuses, outputs = both("selection.ratio=1.5")
    assert statuses == [2, 2], outputs
    assert all("start 2" not in output for output in outputs)


VARIABLES = ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")


@pytest.fixture
def without_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def variables_when_the_group_is_made(given):
    """`platform.initialize` in a process with this environment."""
    from megatron_taopd.parallel import platform

    seen = {}

    def init_process_group(*_, **__):
        seen.update({name: os.environ.get(name) for name in VARIABLES})

    with (
        mock.patch.dict(os.environ, given),
        mock.patch.object(torch.distributed, "is_initialized", lambda: False),
        mock.patch.object(torch.distributed, "init_process_group", init_process_group),
    ):
        for name in set(VARIABLES) - set(given):
            os.environ.pop(name, None)
        platform.initialize()
    return seen


@pytest.mark.parametrize("given", [{}, {"NCCL_NVLS_ENABLE": "1"}])
def test_a_rank_has_sglangs_variables_of_nccl_before_its_first_group(given):
    [seen] = run_ranks(1, variables_when_the_group_is_made, given)
    assert seen == {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"} | given


def test_workers_have_sglangs_variables_of_nccl(tmp_path, without_variables):
    script = tmp_path / "worker.py"
    script.write_text(f"import os\nprint('seen', *(os.environ.get(n) for n in {VARIABLES}))\n")
    module = ["-m", "megatron_taopd.launch", "--standalone", "--nproc-per-node", "1", script]
    output = finish(start([sys.executable, *module], NCCL_NVLS_ENABLE="1"))
    assert "seen 0 1" in output  # what was given stays


@pytest.mark.parametrize(
    ("given", "transport", "expected"),
    [
        ({}, "distributed", {CONNECTIONS: "1", ALLOCATOR: EXPANDABLE}),
        ({}, "disk", {CONNECTIONS: "1", ALLOCATOR: EXPANDABLE}),
        ({}, "tensor", {CONNECTIONS: "1", ALLOCATOR: None}),  # servers open its memory
        (
            {CONNECTIONS: "8", ALLOCATOR: "backend:native"}, "disk",
            {CONNECTIONS: "8", ALLOCATOR: "backend:native"},
        ),
        ({"PYTORCH_CUDA_ALLOC_CONF": "x:y"}, "disk", {CONNECTIONS: "1", ALLOCATOR: None}),
    ],
)  # fmt: skip
def test_variables_of_cuda_are_set_before_anything_asks_for_a_gpu(
    monkeypatch, capsys, given, transport, expected
):
    for name in (CONNECTIONS, ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    seen = {}

    def check(_config, _ranks):  # the first to import Megatron, and to ask
        seen.update({name: os.environ.get(name) for name in expected})
        raise ValueError("enough is seen")

    monkeypatch.setattr(check_config, "check", check)
    overrides = [*ONE_RANK, f"rollout.sync.transport={transport}"]
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        assert train.main([str(ROOT / "examples" / "tiny_pair.yaml"), *overrides]) == 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "enough is seen" in capsys.readouterr().err
    assert seen == expected


def test_a_server_does_not_inherit_the_trainers_allocator(monkeypatch):
    monkeypatch.setenv(ALLOCATOR, EXPANDABLE)
    assert ALLOCATOR not in server_environment("cuda", None, True)
    monkeypatch.setenv(ALLOCATOR, "max_split_size_mb:64")
    assert server_environment("cuda", None, True)[ALLOCATOR] == "max_split_size_mb:64"


def sbatch(tmp_path, *arguments, gpus=2, **environment):
    """What slurm.sbatch does with a job's nodes: (its status, output, what it started)."""
    return launch_with_stand_ins(
        tmp_path, ["bash", LAUNCH / "slurm.sbatch", *arguments],
        SLURM_JOB_ID="7", SLURM_GPUS_ON_NODE=str(gpus), SLURM_CPUS_ON_NODE="96", **environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "restarts", "queued"),
    [(0, 0, False), (2, 0, False), (3, 9, True), (4, 0, True), (1, 3, False)],
)
def test_slurm_queues_again_what_can_go_on(tmp_path, status, restarts, queued):
    ended, output, _ = sbatch(
        tmp_path, "CONFIG.yaml", status=status, SLURM_RESTART_COUNT=str(restarts),
        SLURM_JOB_NUM_NODES="1", SLURM_JOB_NODELIST="node1",
    )  # fmt: skip
    queue = tmp_path / "calls.queue"
    assert queue.exists() == queued, output
    if queued:
        assert queue.read_text() == "requeue 7\n"
    else:
        assert ended == status


def test_slurm_gives_nodes_to_servers(tmp_path, without_variables):
    _, output, started = sbatch(
        tmp_path, "CONFIG.yaml", "train.steps=3", servers=1, SERVE_NODES="1", SERVE_MODEL="MODEL",
        SLURM_JOB_NUM_NODES="3", SLURM_JOB_NODELIST="n1,n2,n3",
    )  # fmt: skip
    calls = [(call.environment, " ".join(call.arguments)) for call in started]
    [(server, command)] = [call for call in calls if "megatron_taopd.train" not in call[1]]
    assert "serve MODEL --tp 1 --host 0.0.0.0 --api-key-env SGLANG_KEY" in command, output
    assert "--logs server-logs/n3" in command
    runs = [call for call in calls if "megatron_taopd.train" in call[1]]
    assert server["SLURMD_NODENAME"] == "n3"
    assert sorted(run["SLURMD_NODENAME"] for run, _ in runs) == ["n1", "n2"]
    for run, command in runs:
        assert run["NNODES"] == "2" and "--nnodes 2" in command and "train.steps=3" in command
        assert "rollout.servers.urls=[http://n3:30000,http://n3:30001]" in command
        assert "rollout.servers.api_key_env=SGLANG_KEY" in command
        assert run["SGLANG_KEY"] == server["SGLANG_KEY"]
    assert sorted(run["NODE_RANK"] for run, _ in runs) == ["0", "1"]
    # Of ranks and of servers.
    assert {tuple(e[name] for name in VARIABLES) for e, _ in calls} == {("0", "0")}


@pytest.mark.parametrize(("given", "cores"), [({}, "96"), ({"SLURM_CPUS_PER_TASK": "40"}, "40")])
def test_slurm_gives_a_task_its_nodes_cores(tmp_path, given, cores):
    """A step does not inherit them from the job; a node that is shared would give others some."""
    _, _, started = sbatch(
        tmp_path, "CONFIG.yaml", servers=1, SERVE_NODES="1", SERVE_MODEL="MODEL",
        SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="n1,n2", **given,
    )  # fmt: skip
    assert [call.environment["CORES_OF_TASK"] for call in started] == [cores, cores]
    options = (LAUNCH / "slurm.sbatch").read_text()
    for option in ("--exclusive", "--mem=0", "--ntasks-per-node=1"):
        assert f"#SBATCH {option}\n" in options


def serve(*arguments, **environment):
    return start([sys.executable, ROOT / "tools" / "serve.py", *arguments], **environment)


def test_servers_are_not_opened_to_the_network_without_a_key():
    process = serve("MODEL", "--host", "0.0.0.0")
    output = finish(process)
    assert process.returncode == 2
    assert output.startswith("error: --host: 0.0.0.0 without --api-key-env")


def test_servers_for_people_have_a_tokenizer():
    """Those for a run have none, and a teacher's answers are no texts."""
    for option, ids_only in (([], True), (["--text"], False)):
        (start,) = serving.plan(serving.parse([str(TINY_STUDENT), *option]))
        assert start.keywords["token_ids_only"] == ids_only
    with pytest.raises(SystemExit):
        serving.parse([str(TINY_STUDENT), "--text", "--hidden-states"])


def test_a_served_model_is_started_anew_and_ends_with_the_tool(tmp_path):
    port, key = free_port(), "secret"
    process = serve(
        TINY_STUDENT, "--port", port, "--api-key-env", "KEY",
        "--max-total-tokens", "1024", "--logs", tmp_path, "--dtype", "float32", KEY=key,
    )  # fmt: skip
    late = in_background(
        lambda: Replicas(
            [f"http://127.0.0.1:{port}"], ServedModel.of(TINY_STUDENT, 64),
            Limits(start_timeout_s=patience(600)), api_key=key,
        )
    )  # fmt: skip

    def said():
        while True:
            line = in_background(process.stdout.readline).result(timeout=patience(600))
            if not line.startswith("starting "):  # how long that takes already
                return line

    try:
        assert said() == f"http://127.0.0.1:{port} serves\n"
        ask = partial(
            httpx.get, f"http://127.0.0.1:{port}/get_model_info", timeout=known_patience(60)
        )
        assert ask().status_code == 401
        assert ask(headers={"Authorization": f"Bearer {key}"}).status_code == 200
        with late.result(timeout=patience(60)) as replicas:  # the run had come before its server
            assert len(replicas.live) == 1
        family = psutil.Process(process.pid).children(recursive=True)
        next(p for p in family if "sglang.launch_server" in p.cmdline()[:4]).kill()
        assert said() == f"http://127.0.0.1:{port} died; it is started again\n"
        assert said() == f"http://127.0.0.1:{port} serves\n"
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.terminate()
    assert process.wait(timeout=patience(60)) == 0
    assert psutil.wait_procs(family, timeout=patience(30))[1] == []


def test_launchers_name_no_host_and_parse():
    for script in ("node.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", LAUNCH / script], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", LAUNCH / script], check=True)
