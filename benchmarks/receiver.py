"""The servers' end of a push of weights without SGLang: it joins the group and keeps what it gets.

    python -m benchmarks.receiver --host 10.0.0.5 --port 30000

It answers the requests of `rollout/weight_sync` and no others, on the CPU, by gloo.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def answering(
    answer: Callable[[str, dict, Mapping[str, str]], Any],
) -> type[BaseHTTPRequestHandler]:
    """Make a handler that answers every request with JSON, and keeps no log.

    Args:
        answer: of a path, what was posted, and the headers; ConnectionAbortedError: the connection
            ends without a word.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            length = int(self.headers.get("Content-Length", 0))
            payload = json.loads(self.rfile.read(length) or b"{}")
            try:
                text = json.dumps(answer(self.path, payload, self.headers)).encode()
            except ConnectionAbortedError:
                self.close_connection = True
                return
            with suppress(BrokenPipeError, ConnectionResetError):  # who asked has given up
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    return Handler


class Receiver:
    """Listens on `url` until it is closed, or loses its life in a push.

    Attributes:
        tensors: by name, the last that it was given.
        version: that it was given, "default" before.
        sources: (address, port) of the stores where its groups met.
        buckets: that it was asked to take so far.
        dies_at: the bucket, counted from 1, with which it ends without a word; None: it lives.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0):
        self.host = host
        self.tensors: dict[str, Tensor] = {}
        self.version = "default"
        self.sources: list[tuple[str, int]] = []
        self.buckets = 0
        self.dies_at: int | None = None
        self._groups: dict[str, dist.Backend] = {}
        handler = answering(lambda path, body, _: self.answer(path.partition("?")[0], body))
        self._server = ThreadingHTTPServer((host, port), handler)
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_port}"

    def serve(self) -> None:
        """Answer requests until it is closed."""
        self._server.serve_forever(poll_interval=0.05)

    def __enter__(self) -> Receiver:
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, payload: dict) -> Any:
        """Do what a request asks for, and return its answer."""
        if path == "/init_weights_update_group":
            self._join(payload)
        elif path == "/update_weights_from_distributed":
            self._receive(payload)
        elif path == "/update_weight_version":
            self.version = payload["new_version"]
        elif path in ("/generate", "/model_info"):
            return {"meta_info": {"weight_version": self.version}}
        return {"success": True}

    def _join(self, asked: dict) -> None:
        """Join the group as SGLang does: the prefixes of its keys are the only agreement."""
        address, port, name = asked["master_address"], asked["master_port"], asked["group_name"]
        self.sources.append((address, port))
        store: dist.Store = dist.TCPStore(address, port, is_master=False)
        for prefix in (name, f"{name}/", "cpu/"):
            store = dist.PrefixStore(prefix, store)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self.host)]
        rank, ranks = asked["rank_offset"], asked["world_size"]
        self._groups[name] = dist.ProcessGroupGloo(store, rank, ranks, options)

    def _receive(self, asked: dict) -> None:
        self.buckets += 1
        if self.buckets == self.dies_at:
            raise ConnectionAbortedError
        dtypes = [getattr(torch, name) for name in asked["dtypes"]]
        sizes = [prod(s) * d.itemsize for s, d in zip(asked["shapes"], dtypes, strict=True)]
        data = torch.empty(sum(sizes), dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._groups[asked["group_name"]].broadcast([data], options).wait()
        places = zip(asked["names"], dtypes, asked["shapes"], data.split(sizes), strict=True)
        self.tensors |= {name: part.view(dtype).view(shape) for name, dtype, shape, part in places}


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    receiver = Receiver(**vars(parser.parse_args()))
    print(receiver.url, flush=True)
    receiver.serve()


if __name__ == "__main__":
    main()
