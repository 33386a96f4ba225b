"""One SGLang server process: its command line, its start, its end.

On CUDA the server is SGLang as it is. On the CPU, for tests and trying out, it is the same server
on PyTorch's own attention, with stand-ins for the two packages that have no CPU build; scheduler,
cache, sampler, log-probabilities and weight updates are the real ones.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import httpx
import psutil
import torch

from megatron_taopd.parallel import cuda_variables, nccl
from megatron_taopd.serving.ports import free_port, is_free
from megatron_taopd.serving.supervise import supervised

_HERE = Path(__file__).parent
POLL_S = 0.25
ATTEMPTS = 3  # at a free port
ERROR = re.compile(r"^(?:[\w.]+(?:Error|Exception)\b|\S+: error:).*", re.MULTILINE)
LIFELESS = {
    psutil.STATUS_ZOMBIE: "dead",
    psutil.STATUS_DEAD: "dead",
    psutil.STATUS_STOPPED: "stopped",
}
IN_USE = re.compile(r"address already in use|port.* is not available", re.IGNORECASE)

MODULE = ("sglang.launch_server",)
CPU_MODULE = ("forking", *MODULE)  # of cpu_stubs
CPU_ARGS = (
    *("--attention-backend", "torch_native"),
    *("--sampling-backend", "pytorch"),
    "--disable-overlap-schedule",
    "--sleep-on-idle",  # or an idle server takes a whole core
)
# Without the compiler, which takes longer to import and to run than it can save on a CPU.
CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCHDYNAMO_DISABLE": "1",
}
# A server is not a rank of the process that starts it: with torchrun's variables it would wait for
# torchrun's store.
RANK_VARIABLE = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)


@dataclass(frozen=True)
class Options:
    """The options with which SGLang serves a model.

    Attributes:
        tp: tensor parallelism.
        dtype: of weights and activations, as SGLang names them ("bfloat16", "float32", "auto").
        context_length: longest sequence; None takes the model's.
        max_running_requests: at a time; None lets SGLang choose.
        max_total_tokens: of the KV cache; None takes what `mem_fraction` leaves.
        mem_fraction: share of the device's memory for weights and KV cache.
        api_key: asked of every request; it can be read off the machine's process list.
        token_ids_only: no tokenizer is loaded, requests and answers are token ids.
        raw_logprobs: log-probabilities of generated tokens are the model's, at temperature 1, as
            those of the prompt always are; False: those of the distribution that was sampled from.
        args: further arguments of `sglang.launch_server`, after all others.
    """

    tp: int = 1
    dtype: str = "auto"
    context_length: int | None = None
    max_running_requests: int | None = None
    max_total_tokens: int | None = None
    mem_fraction: float | None = None
    api_key: str | None = None
    token_ids_only: bool = True
    raw_logprobs: bool = True
    args: Sequence[str] = ()

    def command(self, model_path: str | Path, host: str, device: str) -> list[str]:
        """Return the command line that starts such a server, but for its port."""
        named = {
            "model-path": model_path,
            "host": host,
            "device": device,
            "tp-size": self.tp,
            "dtype": self.dtype,
            "context-length": self.context_length,
            "max-running-requests": self.max_running_requests,
            "max-total-tokens": self.max_total_tokens,
            "mem-fraction-static": self.mem_fraction,
            "api-key": self.api_key,
        }
        module = CPU_MODULE if device == "cpu" else MODULE
        command = [sys.executable, "-m", *module]
        for name, value in named.items():
            command += [] if value is None else [f"--{name}", str(value)]
        command += ["--skip-tokenizer-init"] if self.token_ids_only else []
        return [*command, *(CPU_ARGS if device == "cpu" else ()), *self.args]


@dataclass(frozen=True)
class Workers:
    """The scheduler and the other processes of a server, which any process of its host can look at.

    Attributes:
        found: (process id, when it began, name) of each.
    """

    found: tuple[tuple[int, float, str], ...]

    @classmethod
    def of(cls, processes: Iterable[psutil.Process]) -> Workers:
        """Pick those that SGLang has named."""
        found = []
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                if (name := process.name()).startswith("sglang::"):
                    found.append((process.pid, process.create_time(), name))
        return cls(tuple(found))

    def trouble(self) -> str | None:
        """Return which of them has ended or was stopped, or None."""
        for pid, began, name in self.found:
            status = psutil.STATUS_DEAD
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                status = process.status() if process.create_time() == began else status
            if status in LIFELESS:
                return f"its {name} (process {pid}) is {LIFELESS[status]}"
        return None


class Server:
    """Starts an SGLang server; `wait_until_ready` says when, `stop` ends it.

        with Server("Qwen/Qwen3-4B", "runs/server.log", gpus=[6, 7], tp=2) as server:
            httpx.post(f"{server.url}/generate", json=...)

    It ends with this process, too, even if that is killed. Its processes are descendants of `pid`.

    Args:
        model_path: Hugging Face checkpoint directory or name.
        log: file that the server's output is appended to.
        host, port: to listen on; port None takes a free one.
        device: "cuda" or "cpu"; None takes CUDA where there is some.
        gpus: the devices that it sees, as for CUDA_VISIBLE_DEVICES; None leaves all that we see.
        start_timeout: seconds that `wait_until_ready` allows.
        options: the fields of `Options`.

    Raises:
        ValueError: SGLang is not installed, or the port that was asked for is in use.
    """

    def __init__(
        self,
        model_path: str | Path,
        log: str | Path,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        device: str | None = None,
        gpus: Sequence[int] | None = None,
        start_timeout: float = 600,
        **options,
    ):
        if find_spec("sglang") is None:
            raise ValueError(
                "sglang is not installed: pip install 'megatron-taopd[sglang]' with CUDA, "
                "`make .venv/.installed` without"
            )
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.log = Path(log)
        self.host, self.port, self.start_timeout = host, port, start_timeout
        asked = Options(**options)
        self.headers = {"Authorization": f"Bearer {asked.api_key}"} if asked.api_key else {}
        self.command = asked.command(model_path, host, self.device)
        self.environment = server_environment(self.device, gpus, asked.raw_logprobs)
        self._choose_port = port is None
        self._start()

    def _start(self) -> None:
        if self._choose_port:
            self.port = free_port(self.host)
        elif not is_free(self.host, self.port):
            raise ValueError(
                f"port {self.port} of {self.host} is in use: stop its user or take another"
            )
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.workers = Workers(())
        with open(self.log, "ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                supervised([*self.command, "--port", str(self.port)]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,  # the terminal's Ctrl-C is for this process, which stops it
            )

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self) -> Server:
        """Return when the server generates.

        Raises:
            RuntimeError: it died, or `start_timeout` has passed and it was stopped. The message has
                the log and what it says of the cause.
        """
        deadline = time.monotonic() + self.start_timeout
        attempt = 1
        with httpx.Client(headers=self.headers, trust_env=False, timeout=5) as client:
            while not self._generates(client):
                # Somebody may take the port between our look at it and the server's; SGLang says
                # so and hangs.
                taken = IN_USE.search(self._output())
                if taken and self._choose_port and attempt < ATTEMPTS:
                    attempt += 1
                    self.stop(grace_s=0)
                    self._start()
                    continue
                if taken:
                    self.stop(grace_s=0)
                    self._fail(f"found port {self.port} taken")
                if not self.alive:
                    self._fail(f"died with exit code {self._process.returncode}")
                if time.monotonic() > deadline:
                    self.stop(grace_s=0)
                    self._fail(f"was not ready within {self.start_timeout:g} s")
                time.sleep(POLL_S)
        with suppress(psutil.NoSuchProcess):
            self.workers = Workers.of(psutil.Process(self.pid).children(recursive=True))
        return self

    def trouble(self) -> str | None:
        """Return what the table of processes says is wrong with a server that was ready, or None.

        It has ended, or its scheduler or detokenizer has, or was stopped. A server need not notice
        that.
        """
        if not self.alive:
            return f"died: {cause(self._output())} (log: {self.log})"
        return self.workers.trouble()

    def _generates(self, client: httpx.Client) -> bool:
        with suppress(httpx.TransportError):
            answer = client.get(f"{self.url}/health_generate")
            return answer.status_code == 200 and self._listens()
        return False

    def _listens(self) -> bool:
        """Tell whether it is one of this server's processes that listens on the port.

        While this one was loading, another server may have come first.
        """
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.pid).children(recursive=True):
                for socket_ in process.net_connections("tcp"):
                    if (socket_.status, socket_.laddr.port) == (psutil.CONN_LISTEN, self.port):
                        return True
        return False

    def _fail(self, what: str) -> NoReturn:
        raise RuntimeError(f"the SGLang server {what}: {cause(self._output())} (log: {self.log})")

    def _output(self) -> str:
        """Return the log since this start, or its last MiB."""
        with open(self.log, "rb") as log:
            log.seek(max(self._log_start, os.path.getsize(self.log) - (1 << 20)))
            return log.read().decode(errors="replace")

    def bound_log(self, size: int = 64 << 20) -> None:
        """Empty a log that has grown beyond so many bytes, but for its last MiB."""
        if os.path.getsize(self.log) <= size:
            return
        with open(self.log, "r+b") as log:  # the server appends, so that it goes on behind these
            log.seek(-(1 << 20), os.SEEK_END)
            tail = log.read()
            log.seek(0)
            log.write(tail)
            log.truncate()
        self._log_start = 0

    def stop(self, grace_s: float = 10) -> None:
        """End the server and return when none of its processes is left. Idempotent.

        SIGINT ends it at once and in order; SIGTERM would first wait for requests, for 5 s at the
        least. What is left after `grace_s` seconds is killed.
        """
        if grace_s > 0:
            self._process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        self._process.terminate()
        self._process.wait()

    def __enter__(self) -> Server:
        try:
            return self.wait_until_ready()
        except BaseException:
            self.stop(grace_s=0)
            raise

    def __exit__(self, *_) -> None:
        self.stop()


def server_environment(device: str, gpus: Sequence[int] | None, raw_logprobs: bool) -> dict:
    """Return the environment variables of a server; arguments as for `Server` and `Options`."""
    environment = {k: v for k, v in os.environ.items() if not RANK_VARIABLE.fullmatch(k)}
    environment["SGLANG_RETURN_ORIGINAL_LOGPROB"] = str(int(raw_logprobs))
    nccl.set_defaults(environment)
    cuda_variables.leave_out(environment)
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    if device == "cpu":
        path = [str(_HERE / "cpu_stubs"), environment.get("PYTHONPATH")]
        environment |= {**CPU_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    return environment


def cause(output: str) -> str:
    """Return what a server's output says of its death: its last error, else its last lines."""
    if errors := ERROR.findall(output):
        return errors[-1].strip()
    return " | ".join([line.strip() for line in output.splitlines() if line.strip()][-3:])
