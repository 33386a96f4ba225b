"""Real SGLang servers for tests, on the CPU in fp32.

    with serve(hf_dir) as server:
        [log_probs] = prompt_logprobs(server.url, [[5, 17, 101]])

A server takes 20 s to start, so `shared_server(hf_dir)` starts one on the first call in a test
process and stops it when the process ends.
"""

from __future__ import annotations

import atexit
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import httpx

from megatron_taopd.serving.server import Server
from support.patience import known_patience, patience, took

START_S, QUIET_START_S = 300, 30.0


@contextmanager
def serve(hf_dir: str | Path, **kwargs) -> Iterator[Server]:
    """A ready server for this checkpoint; `kwargs` are Server's. Its log goes with it."""
    with tempfile.TemporaryDirectory(prefix="sglang-") as directory:
        defaults = {
            "log": Path(directory) / "server.log",
            "device": "cpu",
            "dtype": "float32",
            "max_running_requests": 16,
            "max_total_tokens": 8192,
            "start_timeout": patience(START_S),
        }
        began = time.monotonic()
        with Server(hf_dir, **{**defaults, **kwargs}) as server:
            took(time.monotonic() - began, QUIET_START_S)
            yield server


@cache
def shared_server(hf_dir: str | Path) -> Server:
    """The test process's server for this checkpoint, started on the first call."""
    context = serve(hf_dir)
    server = context.__enter__()
    atexit.register(context.__exit__, None, None, None)
    return server


def generate(
    url: str, prompts: Sequence[Sequence[int]], sampling: dict, headers=None, **fields
) -> list[dict]:
    """SGLang's answer to each prompt (token ids), with log-probabilities."""
    request = {"input_ids": [*map(list, prompts)], "sampling_params": sampling, **fields}
    request["return_logprob"] = True
    timeout = known_patience(120)
    answer = httpx.post(f"{url}/generate", json=request, headers=headers, timeout=timeout)
    assert answer.status_code == 200, answer.text
    return answer.json()


def prompt_logprobs(url: str, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """The log-probability of every token but the first of each prompt, at temperature 1."""
    answers = generate(url, prompts, {"max_new_tokens": 0}, logprob_start_len=0)
    return [[lp for lp, *_ in a["meta_info"]["input_token_logprobs"][1:]] for a in answers]
