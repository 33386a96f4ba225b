"""A stand-in of the Hugging Face hub: the part of its HTTP interface that a download takes.

    with hub_of({"someone/asks": files}, "datasets") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url) …

`server.asked` are the paths that it was asked for. `lay_out` writes a cache by hand.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = sha1(b"the only one").hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves repositories of one kind ("datasets" or "models"), name → {file: content}."""

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]], kind: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.kind, self.asked = repositories, kind, list[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub_of(repositories: Mapping[str, Mapping[str, bytes]], kind: str) -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    with Hub(repositories, kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0]
        for name, files in self.server.repositories.items():
            api = f"/api/{self.server.kind}/{name}"
            folder = name if self.server.kind == "models" else f"{self.server.kind}/{name}"
            if path in (f"{api}/revision/main", f"{api}/revision/{COMMIT}", api):
                siblings = [{"rfilename": file} for file in files]
                return self.json({"id": name, "sha": COMMIT, "siblings": siblings})
            if path in (f"{api}/tree/main", f"{api}/tree/{COMMIT}"):
                return self.json(
                    [
                        {"type": "file", "path": file, "size": len(c), "oid": etag(c)}
                        for file, c in files.items()
                    ]
                )
            resolve = f"/{folder}/resolve/{COMMIT}/"
            if path.startswith(resolve) and (file := path.removeprefix(resolve)) in files:
                return self.answer(200, files[file])
        return self.answer(404, b'{"error": "not found"}', {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers=()):
        self.send_response(status)
        all_of_it = {"Content-Length": str(len(body)), "ETag": f'"{etag(body)}"'} | dict(headers)
        for name, value in ({"X-Repo-Commit": COMMIT} | all_of_it).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def etag(content: bytes) -> str:
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lay_out(cache: Path, repository: str, files: Mapping[str, bytes]) -> Path:
    """Files in a cache as huggingface_hub keeps them: blobs, and links to them for a commit.

    Args:
        repository: "datasets--OWNER--NAME" or "models--OWNER--NAME".
    """
    repo = cache / repository
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    snapshot = repo / "snapshots" / COMMIT
    for name, content in files.items():
        blob, link = repo / "blobs" / etag(content), snapshot / name
        blob.write_bytes(content)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot
