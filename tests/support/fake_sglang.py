"""SGLang as a run sees it, with transformers' models behind: what was asked, and how often.

    with serving(STUDENT) as backend:      # answers at backend.url, as a server that is there
        with in_place_of_sglang(backend):  # and for every server that the run starts
            ...
    backend.requests, backend.commands

A server of the run's own is a process of its own: its `sglang.launch_server` is `LAUNCH`, which
tells the backend of its model its command line and hands it every request. It answers greedily,
and takes weights without looking at them.
"""

from __future__ import annotations

import http.server
import json
import os
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM

from benchmarks.receiver import answering
from megatron_taopd.serving.hidden_states import KEY, pack

BACKENDS = "TAOPD_FAKE_SGLANG"  # of the environment: {model path: url of its backend}
LAUNCH = """
import http.server, json, os, sys, time, urllib.request

def option(name):
    return sys.argv[sys.argv.index(name) + 1]

if "--hangs" in sys.argv:
    time.sleep(600)
backend = json.loads(os.environ["TAOPD_FAKE_SGLANG"])[option("--model-path")]

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, answer = forward(self.command, self.path, body, self.headers["Authorization"])
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *_):
        pass

def forward(method, path, body, key=None):
    headers = {"X-Server": option("--port"), "Authorization": key or ""}
    request = urllib.request.Request(backend + path, body or None, headers, method=method)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return answer.status, answer.read()

command = {"arguments": sys.argv[1:], "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
forward("POST", "/started", json.dumps(command).encode())
server = http.server.ThreadingHTTPServer((option("--host"), int(option("--port"))), Handler)
server.daemon_threads = True
server.serve_forever()
"""


@dataclass
class Request:
    """What a server was asked; `server` is its port, None for the backend itself."""

    server: str | None
    path: str
    payload: dict
    key: str | None
    began: float
    ended: float = 0.0


@dataclass
class Backend:
    """Answers for all servers of one model.

    Attributes:
        commands: of the servers that a run has started: {"arguments": …, "gpus": …}.
        most: requests that one server had at a time, of those that a run repeats if they fail.
        seconds: that an answer to such a request takes.
        tp: of the servers; longest: sequence that they take.
        shift: added to the log-probabilities of a prompt's tokens.
    """

    path: str
    seconds: float = 0.0
    shift: float = 0.0
    url: str = ""
    tp: int = 1
    longest: int = 1 << 20
    requests: list[Request] = field(default_factory=list)
    commands: list[dict] = field(default_factory=list)
    most: int = 0

    def __post_init__(self):
        self.model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        self.version, self.lock, self.now = "default", threading.Lock(), {}
        self.computing, self.closed = threading.Lock(), False

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path.partition("?")[0] == path]

    @property
    def completions(self) -> list[Request]:
        """Those of rollouts, and of what the teacher reads."""
        return [request for request in self.asked("/generate") if "rid" in request.payload]

    def handle(self, path: str, payload: dict, server: str | None, key: str | None):
        if path == "/started":
            self.commands.append(payload)
            arguments = payload["arguments"]
            self.tp = int(arguments[arguments.index("--tp-size") + 1])
            return {}
        request = Request(server, path, payload, key, time.monotonic())
        self.requests.append(request)
        if "rid" in payload and path == "/generate":
            with self.lock:
                self.now[server] = self.now.get(server, 0) + 1
                self.most = max(self.most, self.now[server])
            time.sleep(self.seconds)
        with self.computing:  # not while the interpreter ends, which aborts in torch
            answer = {} if self.closed else self.answer(path.partition("?")[0], payload)
        if "rid" in payload and path == "/generate":
            with self.lock:
                self.now[server] -= 1
        request.ended = time.monotonic()
        return answer

    def answer(self, path: str, payload: dict):
        if path == "/model_info":
            return {
                "model_path": self.path,
                "model_type": self.model.config.model_type,
                "weight_version": self.version,
            }
        if path == "/server_info":
            return {"tp_size": self.tp, "max_req_input_len": self.longest + 1}
        if path == "/update_weight_version":
            self.version = payload["new_version"]
        if path != "/generate":
            return {"success": True}
        ids = payload["input_ids"]
        if ids and isinstance(ids[0], list):
            return [self.generate(payload, tokens) for tokens in ids]
        return self.generate(payload, ids)

    @torch.no_grad()
    def generate(self, payload: dict, ids: list[int]) -> dict:
        sampling = payload.get("sampling_params", {})
        stops, meta = sampling.get("stop_token_ids") or (), {"prompt_tokens": len(ids)}
        meta["weight_version"] = self.version
        log_probs = self.log_probs(ids)
        if payload.get("return_logprob") and "logprob_start_len" in payload:
            first, k = payload["logprob_start_len"], payload.get("top_logprobs_num", 0)
            rows = torch.arange(first, len(ids) - 1)
            values = log_probs[rows, ids[first + 1 :]] + self.shift
            meta["input_token_logprobs"] = [[None, ids[first], None]] + [
                [value, token, None]
                for value, token in zip(values.tolist(), ids[first + 1 :], strict=True)
            ]
            if k:
                top = log_probs[rows].topk(k)
                meta["input_top_logprobs_shape"] = list(top.values.shape)
                meta["input_top_logprobs_null_prefix"] = 1
                meta["input_top_logprobs_idx_flat_b64"] = base64(top.indices.int())
                meta["input_top_logprobs_val_flat_b64"] = base64(top.values)
        if "extra_key" in payload:
            hidden = self.model.model(torch.tensor([ids])).last_hidden_state[0]
            meta[KEY] = [pack(hidden)]
        out, tokens = [], [*ids]
        reason = "length"
        for _ in range(sampling.get("max_new_tokens", 128)):
            last = self.log_probs(tokens)[-1]
            tokens.append(int(last.argmax()))
            out.append(last)
            if tokens[-1] in stops:
                reason = "stop"
                break
        new = tokens[len(ids) :]
        meta["output_token_logprobs"] = [
            [float(row[token]), token, None] for row, token in zip(out, new, strict=True)
        ]
        meta["output_top_logprobs"] = [
            [[value, 0, None] for value in row.topk(8).values.tolist()] for row in out
        ]
        return {"output_ids": new, "meta_info": meta | {"finish_reason": {"type": reason}}}

    def log_probs(self, ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids])).logits[0].log_softmax(1)


def base64(tensor: torch.Tensor) -> str:
    return b64encode(tensor.contiguous().numpy().tobytes()).decode()


@contextmanager
def serving(path: str, **options) -> Iterator[Backend]:
    """A `Backend` that listens."""
    backend = Backend(path, **options)

    def answer(path, payload, headers):
        return backend.handle(path, payload, headers["X-Server"], headers["Authorization"])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), answering(answer)) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        backend.url = f"http://127.0.0.1:{server.server_port}"
        yield backend
        server.shutdown()
        with backend.computing:
            backend.closed = True


@contextmanager
def in_place_of_sglang(backends: dict[str, str]) -> Iterator[None]:
    """Have the servers that this process starts be `LAUNCH`, and hand on to these backends."""
    with TemporaryDirectory(prefix="fake-sglang-") as directory:
        package = Path(directory) / "sglang"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "launch_server.py").write_text(LAUNCH)
        before = {name: os.environ.get(name) for name in ("PYTHONPATH", BACKENDS)}
        path = filter(None, (directory, before["PYTHONPATH"]))
        os.environ |= {"PYTHONPATH": os.pathsep.join(path), BACKENDS: json.dumps(backends)}
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
