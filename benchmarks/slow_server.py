"""Stands in for an SGLang server that decodes at a fixed rate, and computes nothing.

    with SlowServer("examples/tiny_pair/student", longest=96, length_of=len) as server:
        server.url

Every request gets a token each `token_s` seconds, however many requests there are: a batch that is
bound by memory. A response is a function of its prompt alone, also where it is aborted and asked
for again with its beginning as a part of the prompt.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from http.server import ThreadingHTTPServer
from typing import Any

from benchmarks.receiver import answering


class SlowServer:
    """Listens on `url` until it is closed.

    Args:
        path: of the model that it says it serves.
        longest: `max_new_tokens` of the requests that begin a response.
        length_of: a prompt, how many tokens it has in answer to it, the last one `eos`.
        token_s: seconds of a token; None: tokens come by `tick`.
        vocabulary: tokens are drawn from 3 … vocabulary − 1.

    Attributes:
        version: of its weights, as it is told.
        asked: (path, payload) of all requests but those that begin with GET.
        running: requests that wait for tokens.
    """

    def __init__(
        self,
        path: str,
        longest: int,
        length_of: Callable[[Sequence[int]], int],
        token_s: float | None = None,
        eos: int = 1,
        vocabulary: int = 1000,
    ):
        self.path, self.longest, self.length_of, self.token_s = path, longest, length_of, token_s
        self.eos, self.vocabulary = eos, vocabulary
        self.version, self.asked, self.running = "default", [], 0
        self._ticks, self._aborted = 0, 0  # tokens that came by `tick`; aborts of all requests
        self._gone: set[str] = set()  # requests that are aborted one by one
        self._paused = self._dead = False
        self._changed = threading.Condition()
        handler = answering(lambda path, body, _: self.answer(path.partition("?")[0], body))
        self._server = _Http(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> SlowServer:
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.die()
        self._server.shutdown()
        self._server.server_close()

    def tick(self, tokens: int = 1) -> None:
        """Let every request have so many tokens more."""
        with self._changed:
            self._ticks += tokens
            self._changed.notify_all()

    def die(self) -> None:
        """Answer nothing any more, not even what was asked before."""
        with self._changed:
            self._dead = True
            self._changed.notify_all()

    def response(self, prompt: Sequence[int]) -> list[int]:
        """Return the tokens in answer to a prompt, were there no longest response."""
        draw = random.Random(repr(list(prompt)))
        length = self.length_of(prompt)
        return [draw.randrange(3, self.vocabulary) for _ in range(length - 1)] + [self.eos]

    def made(self, began: float, ticks: int) -> int:
        """Count the tokens of a request that began at this time, after so many ticks."""
        if self.token_s is None:
            return self._ticks - ticks
        return int((time.monotonic() - began) / self.token_s)

    def answer(self, path: str, payload: dict) -> Any:
        """Answer a request.

        Raises:
            ConnectionAbortedError: it is dead.
        """
        self.asked.append((path, payload))
        with self._changed:
            if self._dead:
                raise ConnectionAbortedError
            if path == "/abort_request":
                self._gone.add(payload.get("rid", ""))
                self._aborted += payload.get("abort_all", False)
            elif path == "/pause_generation":
                self._aborted, self._paused = self._aborted + 1, True
            elif path == "/continue_generation":
                self._paused = False
            elif path == "/update_weight_version":
                self.version = payload["new_version"]
            self._changed.notify_all()
        if path == "/model_info":
            return {"model_path": self.path, "model_type": "qwen3", "weight_version": self.version}
        if path == "/server_info":
            return {"tp_size": 1, "max_req_input_len": 1 << 20}
        if path != "/generate":
            return {"success": True}
        if "rid" in payload:
            return self._generate(payload)
        ids = payload["input_ids"]
        return [*map(probed, ids)] if isinstance(ids[0], list) else probed(ids)

    def _generate(self, payload: dict) -> dict:
        ids, left = payload["input_ids"], payload["sampling_params"]["max_new_tokens"]
        prompt_length = len(ids) + left - self.longest
        tokens = self.response(ids[:prompt_length])[len(ids) - prompt_length :]
        reason = "stop" if len(tokens) <= left else "length"
        tokens = tokens[:left]
        with self._changed:
            self._changed.wait_for(lambda: self._dead or not self._paused)
            began, ticks, aborted = time.monotonic(), self._ticks, self._aborted
            self.running += 1

            def over() -> bool:
                gone = self._aborted > aborted or payload["rid"] in self._gone
                return self._dead or gone or self.made(began, ticks) >= len(tokens)

            while not over():
                left = None
                if self.token_s is not None:
                    left = max(0.001, began + self.token_s * len(tokens) - time.monotonic())
                self._changed.wait(left)
            self.running -= 1
            if self._dead:
                raise ConnectionAbortedError
            if (made := self.made(began, ticks)) < len(tokens):
                tokens, reason = tokens[:made], "abort"
            return {
                "meta_info": {
                    "prompt_tokens": len(ids),
                    "weight_version": self.version,
                    "output_token_logprobs": [[-1.0, token, None] for token in tokens],
                    "finish_reason": {"type": reason},
                }
            }


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # connections at once; one that finds no room waits for seconds

    def handle_error(self, *_) -> None:
        """Say nothing of a client that no longer waits."""


def probed(prompt: Sequence[int]) -> dict:
    """Answer a question about a server that is to be known, not about a response."""
    log_probs = [[None, prompt[0], None], *([-1.0, token, None] for token in prompt[1:])]
    top = [[[-1.0, 3, None], [-2.0, 4, None]]]
    meta = {"input_token_logprobs": log_probs, "output_top_logprobs": top}
    return {"meta_info": {**meta, "finish_reason": {"type": "length"}}}
