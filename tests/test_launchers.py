"""Every recipe through every launcher: ranks, nodes, servers, environment and URLs.

The commands are those of the recipes' own first lines, and of docs/launch.md, run on stand-ins
(`support.launchers`). What they would start is read by those who would read it: torchrun's parser,
that of `taopd serve`, and `config.load`.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from support.launchers import CORES, LAUNCH, ROOT, Started, launch
from torch.distributed.run import get_args_parser

from megatron_taopd.cli import serve
from megatron_taopd.config.load import load

pytestmark = pytest.mark.slow

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
MAIN = runpy.run_path(str(LAUNCH / "kubernetes.py"))["main"]
GPUS = 8
NCCL = ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")


@dataclass(frozen=True)
class Layout:
    """How a recipe divides nodes of 8 GPUs, as its second line says it in words."""

    trains: int  # nodes
    ranks: int  # of each of them
    rollouts: int = 0  # nodes
    teachers: int = 0  # nodes
    rollout_tp: int = 1  # GPUs of a server


def expected(path: Path) -> Layout:
    served = "235b" in path.stem
    if path.stem.endswith("_8gpu"):
        return Layout(1, 3 if served else 6)
    if path.stem.endswith("k_64gpu"):  # for long responses
        return Layout(4, 8, 4)
    if "30b_a3b" in path.stem:  # whose weights leave too little of one GPU
        return Layout(5, 8, 3, rollout_tp=2)
    return Layout(4, 8, 2, 2) if served else Layout(5, 8, 3)


@pytest.fixture(autouse=True)
def places(monkeypatch):
    for variable in ("MODELS", "DATA", "RUNS"):
        monkeypatch.setenv(variable, f"/{variable.lower()}")
    for variable in ("SGLANG_KEY", *NCCL):
        monkeypatch.delenv(variable, raising=False)


def commands(path: Path) -> list[str]:
    """The commands at the top of a recipe, each in one line."""
    comment = "".join(
        line.removeprefix("#   ") + "\n"
        for line in path.read_text().splitlines()
        if line.startswith("#   ")
    )
    return [re.sub(r"\\\n\s*", "", c) for c in re.findall(r"(?:.*\\\n)*.*[^\\]\n", comment)]


def command(path: Path, word: str) -> str:
    (found,) = [c for c in commands(path) if word in c]
    return found.strip()


@dataclass(frozen=True)
class Server:
    """A node's servers: its name, what serves, and with which environment."""

    host: str
    arguments: list[str]
    environment: dict[str, str]


def check(path: Path, trains: list[Started], servers: list[Server], master: str) -> None:
    """All that has to be true of what a launcher has started for a recipe."""
    layout, parser = expected(path), get_args_parser()
    ranks = [
        parser.parse_args(node.arguments[node.arguments.index("megatron_taopd.launch") + 1 :])
        for node in trains
    ]
    assert sorted(r.node_rank for r in ranks) == list(range(layout.trains))
    assert {r.nnodes for r in ranks} == {str(layout.trains)}
    assert {r.nproc_per_node for r in ranks} == {str(layout.ranks)}
    assert {r.master_addr for r in ranks} == {master}
    (port,) = {r.master_port for r in ranks}
    assert 1024 < port < 65536
    assert all(r.module and r.training_script == "megatron_taopd.train" for r in ranks)

    (given,) = {tuple(r.training_script_args) for r in ranks}
    assert given[0] == str(path.relative_to(ROOT))
    config = load(path, given[1:])
    world_size = layout.trains * layout.ranks
    for model in (config.student, config.teacher):
        assert world_size % (model.parallel.tp * model.parallel.pp) == 0
    assert config.run.dir.startswith("/runs/") and config.data.prompts.startswith("/data/")

    plans = [(server, serve.parse(server.arguments)) for server in servers]
    teachers = [(s, plan) for s, plan in plans if plan.hidden_states]
    rollouts = [(s, plan) for s, plan in plans if not plan.hidden_states]
    assert len(rollouts) == layout.rollouts and len(teachers) == layout.teachers
    for section, own, tp in (
        ((config.rollout.servers, config.student.path), rollouts, layout.rollout_tp),
        ((config.teacher.servers, config.teacher.path), teachers, 8),
    ):
        settings, model = section
        urls = {
            f"http://{s.host}:{plan.port + place}" for s, plan in own for place in range(GPUS // tp)
        }
        assert set(settings.urls) == urls and len(settings.urls) == len(urls)
        for server, plan in own:
            assert plan.model == model and plan.tp == tp and plan.host == "0.0.0.0"
            assert settings.api_key_env == plan.api_key_env == "SGLANG_KEY"
            assert server.environment["SGLANG_KEY"]
            for name in NCCL:  # where they are not set, `taopd serve` sets them for its servers
                assert server.environment.get(name, "0") == "0"
    assert len({str(plan.logs) for _, plan in plans}) == len(plans)
    if servers:
        keys = {s.environment["SGLANG_KEY"] for s in (*servers, *trains)}
        assert len(keys) == 1
    for node in trains:
        assert [node.environment[name] for name in NCCL] == ["0", "0"]
        assert node.environment["MODELS"] == "/models" and node.environment["RUNS"] == "/runs"


def apart(started: list[Started]) -> tuple[list[Started], list[Started]]:
    """What trains, and what serves."""
    trains = [call for call in started if "megatron_taopd.launch" in call.arguments]
    return trains, [call for call in started if "megatron_taopd.launch" not in call.arguments]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_on_slurm(path, tmp_path):
    layout = expected(path)
    status, output, started = launch(
        tmp_path, ["bash", "-c", command(path, "sbatch")],
        servers=layout.rollouts + layout.teachers,
    )  # fmt: skip
    assert status == 0, output
    trains, served = apart(started)
    nodes = layout.trains + layout.rollouts + layout.teachers
    names = [call.environment["SLURMD_NODENAME"] for call in started]
    assert sorted(names) == [f"node{n}" for n in range(1, nodes + 1)]
    assert {call.environment["CORES_OF_TASK"] for call in started} == {CORES}
    servers = []
    for call in served:
        assert call.arguments[:4] == ["python", "-m", "megatron_taopd", "serve"]
        host = call.environment["SLURMD_NODENAME"]
        servers.append(Server(host, call.arguments[4:], call.environment))
    check(path, trains, servers, master="node1")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_by_hand(path, tmp_path):
    """The command of docs/launch.md on each node that trains, and `taopd serve` on the others."""
    layout, key = expected(path), {"SGLANG_KEY": "secret"}
    if layout.trains == 1:
        assert not layout.rollouts + layout.teachers
        status, output, started = launch(tmp_path, ["bash", "-c", command(path, "node.sh")])
        assert status == 0, output
        check(path, apart(started)[0], [], master="127.0.0.1")
        return
    first, second = layout.trains + 1, layout.trains + layout.rollouts + 1
    hosts = {
        "rollout": [f"node{n}" for n in range(first, second)],
        "teacher": [f"node{n}" for n in range(second, second + layout.teachers)],
    }
    urls = _urls(hosts, layout.rollout_tp)
    config = load(path, urls)
    servers = []
    for host in hosts["rollout"] + hosts["teacher"]:
        line = ["taopd", "serve", config.student.path, "--host", "0.0.0.0"]
        line += ["--api-key-env", "SGLANG_KEY", "--logs", f"server-logs/{host}"]
        if host in hosts["teacher"]:
            line[2:3] = [config.teacher.path, "--tp", "8", "--hidden-states"]
        elif layout.rollout_tp > 1:
            line += ["--tp", str(layout.rollout_tp)]
        _, output, [call] = launch(tmp_path, line, **key)
        servers.append(Server(host, call.arguments[2:], call.environment))
    trains = []
    for rank in range(layout.trains):
        place = {"NNODES": str(layout.trains), "NODE_RANK": str(rank), "MASTER_ADDR": "node1"}
        node = ["bash", LAUNCH / "node.sh", path.relative_to(ROOT), *urls]
        status, output, started = launch(tmp_path, node, NPROC="8", **place, **key)
        assert status == 0, output
        trains += started
    check(path, trains, servers, master="node1")


def _urls(hosts: dict[str, list[str]], rollout_tp: int) -> list[str]:
    options, last = [], 30000 + GPUS // rollout_tp
    for section, ports in (("rollout", range(30000, last)), ("teacher", [30000])):
        if hosts[section]:
            urls = [f"http://{host}:{port}" for host in hosts[section] for port in ports]
            options.append(f"{section}.servers.urls=[{','.join(urls)}]")
    return options


def test_the_pages_commands_by_hand(tmp_path):
    """docs/launch.md as it stands: its last node's command, and the URLs that bash makes of it."""
    page = (ROOT / "docs" / "launch.md").read_text()
    path = ROOT / "examples" / "recipes" / "qwen3_14b_to_4b_64gpu.yaml"
    (block,) = [b for b in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "MASTER_ADDR" in b]
    block = block.replace("SGLANG_KEY=…", "SGLANG_KEY=secret")
    given = {"CONFIG": str(path.relative_to(ROOT)), "NPROC": "8"}
    status, output, started = launch(tmp_path, ["bash", "-c", block], servers=1, **given)
    assert status == 0, output
    [train], [server] = apart(started)
    (urls,) = [a for a in train.arguments if a.startswith("rollout.servers.urls=")]
    config = load(path, [urls])
    assert set(config.rollout.servers.urls) == {
        f"http://node{node}:{port}" for node in (6, 7, 8) for port in range(30000, 30008)
    }
    assert train.environment["NNODES"] == "5" and train.environment["MASTER_ADDR"] == "node1"
    assert serve.parse(server.arguments[2:]).model == config.student.path


# ------------------------------------------------------------------------------------- Kubernetes


def manifests(capsys, line: str) -> dict[tuple[str, str], dict]:
    """What a command prints, by kind and name."""
    words = shlex.split(line)
    assert words[:2] == ["python", "examples/launch/kubernetes.py"]
    assert words[words.index("|") :] == ["|", "kubectl", "apply", "--filename", "-"]
    assert MAIN(words[2 : words.index("|")]) == 0
    found = list(yaml.safe_load_all(capsys.readouterr().out))
    named = {(m["kind"], m["metadata"]["name"]): m for m in found}
    assert len(named) == len(found)
    return named


def variables(container: dict, pod: str, index: int) -> dict[str, str]:
    """A container's environment in one of the pods of its set, the secret's key included."""
    found = {}
    for variable in container["env"]:
        if "value" in variable:
            assert isinstance(variable["value"], str)
            found[variable["name"]] = variable["value"]
        elif "secretKeyRef" in variable["valueFrom"]:
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference["name"] == "taopd" and reference["key"] == "SGLANG_KEY"
            found[variable["name"]] = "secret"
        else:
            field = variable["valueFrom"]["fieldRef"]["fieldPath"]
            annotation = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
            found[variable["name"]] = {"metadata.name": pod, annotation: str(index)}[field]
    return found


def check_pod(spec: dict, needs: set[str]) -> dict:
    """What every pod needs; return its container."""
    (container,) = spec["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == GPUS
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert set(mounts) == set(volumes) == needs | {"shm"}
    for name in needs:
        assert mounts[name]["mountPath"] == f"/{name}"
        assert volumes[name]["persistentVolumeClaim"]["claimName"] == name
    assert mounts["shm"]["mountPath"] == "/dev/shm"
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert not mounts["runs"].get("readOnly")
    return container


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_on_kubernetes(path, tmp_path, capsys):
    layout = expected(path)
    made = manifests(capsys, command(path, "kubernetes.py"))
    job, service = made.pop(("Job", "taopd")), made.pop(("Service", "taopd"))
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == layout.trains
    assert job["spec"]["completionMode"] == "Indexed"
    pod = job["spec"]["template"]["spec"]
    # A pod of the job is found as JOB-INDEX.SUBDOMAIN if a headless service selects it.
    assert pod["subdomain"] == "taopd" and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": "taopd"}
    container = check_pod(pod, {"models", "data", "runs"})

    servers = []
    for kind, name in [key for key in made if key[0] == "StatefulSet"]:
        found = made.pop((kind, name))["spec"]
        headless = made.pop(("Service", name))["spec"]
        labels = found["template"]["metadata"]["labels"]
        assert found["serviceName"] == name and headless["clusterIP"] == "None"
        assert headless["selector"] == found["selector"]["matchLabels"] == labels
        assert headless["publishNotReadyAddresses"]
        serving = check_pod(found["template"]["spec"], {"models", "runs"})
        assert serving["command"] == ["taopd", "serve"]
        for index in range(found["replicas"]):
            environment = variables(serving, f"{name}-{index}", index)
            arguments = [a.replace("$(POD)", environment["POD"]) for a in serving["args"]]
            servers.append(Server(f"{name}-{index}.{name}", arguments, environment))
    assert made == {}

    # Names are waited for, and the key is there for all or for nobody.
    (names,) = pod["initContainers"]
    assert names["args"] == [server.host for server in servers]
    (key,) = [v for v in container["env"] if v["name"] == "SGLANG_KEY"]
    assert key["valueFrom"]["secretKeyRef"]["optional"] == (not servers)

    trains = []
    for index in range(layout.trains):
        environment = variables(container, f"taopd-{index}", index)
        assert environment["ATTEMPTS"] == "1"
        status, output, started = launch(
            tmp_path, [*container["command"], *container["args"]], **environment
        )
        assert status == 0, output
        trains += started
    check(path, trains, servers, master="taopd-0.taopd")


def test_a_job_goes_on_by_the_runs_exit_status(capsys):
    """2 is a mistake, which trying again does not mend; what is evicted has saved."""
    path = RECIPES[0]
    job = manifests(capsys, command(path, "kubernetes.py"))["Job", "taopd"]["spec"]
    mistake, evicted = job["podFailurePolicy"]["rules"]
    assert mistake["action"] == "FailJob" and evicted["action"] == "Ignore"
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert mistake["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [2]}
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # as such a policy demands
    assert job["template"]["spec"]["containers"][0]["name"] == "train"
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 900


def test_kubernetes_with_everything_given(capsys):
    line = "python examples/launch/kubernetes.py /data/run.yaml train.steps=7 --name mine --nodes 3"
    line += " --image registry:5000/taopd:1 --gpus 4 --ranks 2 --serve-nodes 1 --serve-model a/b"
    line += " --serve-tp 2 --models m --data d --runs r --secret s --rdma rdma/hca=4 --user 0"
    line += " --restarts 5 | kubectl apply --filename -"
    made = manifests(capsys, line)
    job, stateful = made["Job", "mine"]["spec"], made["StatefulSet", "mine-rollout"]["spec"]
    train = job["template"]["spec"]
    (container,), (serving,) = (s["containers"] for s in (train, stateful["template"]["spec"]))
    for one in (container, serving):
        assert one["image"] == "registry:5000/taopd:1"
        assert one["resources"]["limits"] == {"nvidia.com/gpu": 4, "rdma/hca": 4}
    claims = [v["persistentVolumeClaim"]["claimName"] for v in train["volumes"][:3]]
    assert claims == ["m", "d", "r"]
    assert train["securityContext"]["runAsUser"] == 0
    assert train["securityContext"]["runAsNonRoot"] is False
    assert job["backoffLimit"] == 15  # of pods: each of the three may start so often
    environment = {v["name"]: v.get("value") for v in container["env"]}
    assert environment["NPROC"] == "2" and environment["MASTER_ADDR"] == "mine-0.mine"
    assert "train.steps=7" in container["args"]
    urls = "http://mine-rollout-0.mine-rollout:30000,http://mine-rollout-0.mine-rollout:30001"
    assert f"rollout.servers.urls=[{urls}]" in container["args"]
    assert serving["args"][:3] == ["/models/a/b", "--tp", "2"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--serve-nodes", "2"], "--serve-nodes: 2 without --serve-model; name the model"),
        (
            ["--teach-nodes", "1", "--teach-model", "m", "--teach-tp", "3"],
            "--teach-tp: 3 does not divide --gpus 8",
        ),
        (
            ["--serve-nodes", "1", "--serve-model", "m", "--serve-tp", "3"],
            "--serve-tp: 3 does not divide --gpus 8",
        ),
        (["--rdma", "rdma/hca"], "--rdma: rdma/hca; write RESOURCE=N, such as rdma/hca=8"),
        (["train.steps"], "train.steps: write section.key=value"),
    ],
)
def test_mistakes_on_kubernetes(capsys, options, said):
    with pytest.raises(SystemExit) as ended:
        MAIN(["CONFIG.yaml", *options])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {said}")


@pytest.mark.parametrize(
    ("gpus", "visible", "ranks"),
    [(0, None, 2), (1, None, 1), (4, None, 2), (4, "2", 1), (4, "0,GPU-1a", 2), (1, "", 2)],
)
def test_the_quickstart_has_one_rank_on_one_gpu_and_two_otherwise(tmp_path, gpus, visible, ranks):
    listed = "".join(f"GPU {i}: an accelerator\n" for i in range(gpus))
    for name, said in (("nvidia-smi", f"printf '{listed}'"), ("taopd", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{said}\n")
        (tmp_path / name).chmod(0o755)
    given = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    told = subprocess.run(
        ["bash", ROOT / "examples" / "quickstart.sh", "train.steps=3"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **given},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert told[:4] == ["launch", "--nproc-per-node", str(ranks), "examples/tiny_pair.yaml"]
    one = ["student.parallel.tp=1", "teacher.parallel.pp=1"] if ranks == 1 else []
    assert told[5:] == [*one, "train.steps=3"]
