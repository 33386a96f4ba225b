import http.server
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

import httpx
import psutil
import pytest
import torch
from support.patience import known_patience, patience, wait_for
from support.sglang_server import generate, prompt_logprobs, serve, shared_server
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from megatron_taopd.serving import server as serving
from megatron_taopd.serving.ports import free_port, is_free
from megatron_taopd.serving.server import Server, cause

STUDENT = "examples/tiny_pair/student"
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [20, 21], [5, 6, 7, 8, 9]]
SAMPLING = {"max_new_tokens": 12, "temperature": 0.5}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32).eval()


@torch.no_grad()
def log_probs(model, tokens, temperature=1.0):
    """Of every token but the first."""
    logits = model(torch.tensor([tokens])).logits[0, :-1]
    return log_softmax(logits / temperature, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def assert_generated(model, answers, temperature):
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        triples = answer["meta_info"]["output_token_logprobs"]
        assert [token for _, token, _ in triples] == answer["output_ids"]
        expected = log_probs(model, prompt + answer["output_ids"], temperature)[len(prompt) - 1 :]
        torch.testing.assert_close(
            torch.tensor([t[0] for t in triples]), expected, atol=1e-4, rtol=0
        )


def family(pid):
    """The supervisor and all that it supervises."""
    supervisor = psutil.Process(pid)
    return [supervisor, *supervisor.children(recursive=True)]


def left(processes, timeout=None):
    """Those that have not ended in that time, or in the time that they might take."""
    _, alive = psutil.wait_procs(processes, patience(15) if timeout is None else timeout)
    return [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


# The real server


def test_log_probs_are_those_of_transformers(model):
    server = shared_server(STUDENT)
    for prompt, values in zip(PROMPTS, prompt_logprobs(server.url, PROMPTS), strict=True):
        torch.testing.assert_close(
            torch.tensor(values), log_probs(model, prompt), atol=1e-4, rtol=0
        )
    assert_generated(model, generate(server.url, PROMPTS, SAMPLING), temperature=1)


def test_stop():
    server = shared_server(STUDENT)
    processes = family(server.pid)
    assert len(processes) >= 4  # the supervisor, HTTP, scheduler, detokenizer
    assert not is_free(server.host, server.port)
    server.stop()
    shared_server.cache_clear()
    assert not server.alive and left(processes, timeout=0) == []
    assert is_free(server.host, server.port)
    server.stop()


def test_wrong_model_path(tmp_path):
    with pytest.raises(RuntimeError) as error, serve(tmp_path / "none", log=tmp_path / "log"):
        pass
    assert "died with exit code 1: OSError" in str(error.value)
    assert str(tmp_path / "none") in str(error.value) and str(tmp_path / "log") in str(error.value)


OWNER = """
import sys
from support.sglang_server import serve
with serve(sys.argv[1], raw_logprobs=False, token_ids_only=False, api_key="key") as server:
    print(server.pid, server.url, flush=True)
    sys.stdin.read()
"""


def test_options_and_killed_owner(model):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, STUDENT],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        pid, url = owner.stdout.readline().split()
        processes = family(int(pid))
        assert len(processes) >= 4
        assert httpx.get(f"{url}/model_info", timeout=known_patience(60)).status_code == 401
        key = {"Authorization": "Bearer key"}
        answers = generate(url, PROMPTS, SAMPLING, headers=key)
        assert_generated(model, answers, SAMPLING["temperature"])
        assert all("text" in answer for answer in answers)
        owner.kill()
    assert left(processes) == []


# A stand-in for it, where only the life of processes matters


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()


SERVES = f"""
import http.server, sys
{inspect.getsource(Healthy)}
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""
# Deaf to SIGINT, with a child that leaves the session.
STUBBORN = """
import signal, subprocess, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen(["sleep", "600"], start_new_session=True)
print("up", flush=True)
time.sleep(600)
"""
# Writes more than anyone will read, and then goes on writing.
TALKATIVE = """
import time
for line in range(400_000):
    print("a line of the log, number", line)
print("that much", flush=True)
while True:
    print("and more", flush=True)
    time.sleep(0.05)
"""
# Finds its port taken, but only the first time; like SGLang, it does not end by itself then.
UNLUCKY = """
import pathlib, time
marker = pathlib.Path(__file__).with_name("unlucky")
if not marker.exists():
    marker.touch()
    print("[Errno 98] error while attempting to bind: address already in use", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(source, **options): a Server whose sglang.launch_server is this source."""
    servers = []

    def start(source, device="cpu", **options):
        package = tmp_path / "path" / "sglang"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "launch_server.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(package.parent))
        servers.append(Server("model", tmp_path / "log", device=device, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop(grace_s=0)


def test_stop_kills_what_does_not_listen(fake, tmp_path):
    server = fake(STUBBORN)
    wait_for(lambda: "up" in (tmp_path / "log").read_text())
    processes = family(server.pid)
    assert len(processes) == 3
    started = time.monotonic()
    server.stop(grace_s=0.5)
    assert time.monotonic() - started >= 0.5
    assert left(processes, timeout=0) == []


def test_a_log_is_bounded_while_it_is_written(fake, tmp_path):
    log = tmp_path / "log"
    server = fake(TALKATIVE)
    wait_for(lambda: "that much" in log.read_text())
    server.bound_log(8 << 20)
    assert log.stat().st_size <= (1 << 20) + 1000
    length = len(log.read_text().splitlines())
    wait_for(lambda: len(log.read_text().splitlines()) > length)
    assert "\0" not in log.read_text()  # no hole where the beginning was
    size = log.stat().st_size
    server.bound_log(size * 2)
    assert log.stat().st_size >= size


def test_killed_supervisor_takes_the_server_along(fake, tmp_path):
    server = fake(SERVES)
    server.wait_until_ready()
    processes = family(server.pid)
    os.kill(server.pid, signal.SIGKILL)
    assert left(processes) == [] and not server.alive


def test_taken_port(fake, tmp_path):
    server = fake(UNLUCKY + SERVES)
    first = server.port
    assert server.wait_until_ready().port != first
    with pytest.raises(ValueError, match=f"port {server.port} of 127.0.0.1 is in use"):
        Server("model", tmp_path / "log", port=server.port)


def test_taken_port_that_was_asked_for(fake):
    with pytest.raises(RuntimeError, match=r"found port \d+ taken"):
        fake(UNLUCKY + SERVES, port=free_port("127.0.0.1")).wait_until_ready()


def test_another_server_at_the_port_is_not_this_one(fake, monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), Healthy) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        monkeypatch.setattr(serving, "free_port", lambda host: other.server_port)
        server = fake(STUBBORN, start_timeout=2)
        with pytest.raises(RuntimeError, match="not ready"):
            server.wait_until_ready()
        other.shutdown()


def test_timeout(fake, tmp_path):
    server = fake(STUBBORN, start_timeout=0.5)
    with pytest.raises(RuntimeError, match=r"not ready within 0.5 s: .*log\)"):
        server.wait_until_ready()
    assert not server.alive


def test_command_on_cuda(fake, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name in ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    server = fake(
        SERVES, device="cuda", gpus=[2, 5], tp=2, mem_fraction=0.8, args=["--log-level", "warning"]
    )
    line = " ".join(server.command[3:])
    assert line == (
        "--model-path model --host 127.0.0.1 --device cuda --tp-size 2 --dtype auto "
        "--mem-fraction-static 0.8 --skip-tokenizer-init --log-level warning"
    )
    added = {k: v for k, v in server.environment.items() if os.environ.get(k) != v}
    assert added == {
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
        "CUDA_VISIBLE_DEVICES": "2,5",
        "NCCL_CUMEM_ENABLE": "0",  # as in the trainer's processes
        "NCCL_NVLS_ENABLE": "0",
    }
    assert not {"TORCHELASTIC_USE_AGENT_STORE", "LOCAL_RANK"} & set(server.environment)


HAS_WORKER = """
import multiprocessing as mp, os, time
loaded = []
def work(ask):
    ask.send((loaded, mp.current_process().pid, os.getppid()))
if __name__ == "__main__":
    mp.set_start_method("spawn", force=True)  # as SGLang does
    loaded.append("what takes long")
    ours, theirs = mp.Pipe()
    worker = mp.Process(target=work, args=(theirs,))
    worker.start()
    found, pid, parent = ours.recv()
    print("worker", found, pid != os.getpid() == parent, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("device, found", [("cpu", "['what takes long']"), ("cuda", "[]")])
def test_without_cuda_workers_are_forked(fake, tmp_path, device, found):
    fake(HAS_WORKER, device)
    wait_for(lambda: "worker" in (tmp_path / "log").read_text())
    assert f"worker {found} True" in (tmp_path / "log").read_text()


def test_stand_ins_are_the_servers_alone():
    assert find_spec("torchvision") is None and find_spec("sgl_kernel") is None
    stubs = os.path.join(os.path.dirname(serving.__file__), "cpu_stubs")
    environment = serving.server_environment("cpu", None, True)
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == stubs


@pytest.mark.parametrize(
    "output, expected",
    [
        (
            "x\nTraceback:\n  File a\nOSError: no such\n[12:00] kill_process_tree\n",
            "OSError: no such",
        ),
        ("A.py: error: unrecognized arguments: --x\n", "A.py: error: unrecognized arguments: --x"),
        ("a\n\n b\nc\nd\n", "b | c | d"),
    ],
)
def test_cause(output, expected):
    assert cause(output) == expected
