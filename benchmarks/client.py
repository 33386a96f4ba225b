"""CPU seconds that rank 0 spends on a million tokens of SGLang's answers, from request to batch.

    python -m benchmarks.client
    python -m benchmarks.client --tokens 512 8192 --requests 400 --servers 4
    torchrun --nproc-per-node 4 -m benchmarks.client --servers 2 --requests 400

Servers in a process of their own answer with recorded answers, as SGLang 0.5.20 writes them: ids,
log-probabilities and the text, which nobody reads. Each way is the one before and one thing more:

    before       httpx's pool of connections, json, the garbage collector as Python sets it
    connections  a connection for each request under way
    typed        msgspec, and only the fields that are used
    after        the garbage collector as a run sets it

On several ranks it compares what each of them spends on a batch: where rank 0 asks all servers, and
where each rank that is the source of servers asks its own (`serving.sources`).

CPU seconds are those of this process, all threads together; ways take turns. As in a run, Megatron
and transformers are imported. docs/sglang.md has the results.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import httpx
import numpy as np
import torch
import torch.distributed as dist
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_taopd.config.schema import ServersSection
from megatron_taopd.parallel.objects import broadcast_object, gather
from megatron_taopd.rollout.engine import Sampling
from megatron_taopd.rollout.sglang import SGLangEngine
from megatron_taopd.serving import answers, client, protocol, replica
from megatron_taopd.serving.begin import open_own
from megatron_taopd.serving.client import Replicas
from megatron_taopd.serving.model import ServedModel
from megatron_taopd.serving.replica import Limits
from megatron_taopd.start import frozen_heap

STUDENT = Path(__file__).parent.parent / "examples" / "tiny_pair" / "student"
WAYS = ("before", "connections", "typed", "after")
PROMPT = 200  # tokens
KINDS = 4  # of recorded answers, which take turns


def main(arguments: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[512, 2048, 8192], help="a response"
    )
    parser.add_argument("--requests", type=int, default=200, help="of a batch")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at a time, a server")
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="batches of each way")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return compare_ranks(options)
    figures = {tokens: measure(tokens, options) for tokens in options.tokens}
    title = f"CPU s a million tokens, {options.requests} requests, {options.servers} server(s)"
    table = Table("tokens of a response", *WAYS, title=title, box=SIMPLE)
    for tokens, seconds in figures.items():
        table.add_row(f"{tokens:,}", *(f"{seconds[way]:.2f}" for way in WAYS))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def measure(tokens: int, options: argparse.Namespace) -> dict[str, float]:
    """Measure each way: the median of CPU seconds a million tokens."""
    model = ServedModel.of(STUDENT, PROMPT + tokens)
    server, urls = start_servers(options.servers, tokens, model.vocab_size)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    try:
        for _ in range(options.repeats):
            for number, way in enumerate(WAYS):
                with ExitStack() as stack:
                    if number < 1:
                        stack.enter_context(mock.patch.object(client, "new_client", pooled))
                    if number < 2:
                        stack.enter_context(mock.patch.object(replica, "answer_of", plain))
                    if number == 3:
                        stack.enter_context(frozen_heap())
                    limits = Limits(concurrency=options.concurrency)
                    replicas = stack.enter_context(Replicas(urls, model, limits))
                    seconds[way].append(one_batch(replicas, tokens, options.requests))
    finally:
        server.terminate()
        server.join()
    return {way: statistics.median(found) for way, found in seconds.items()}


def compare_ranks(options: argparse.Namespace) -> int:
    """Print what each rank spends on a batch, both ways; every rank of torchrun calls this."""
    dist.init_process_group("gloo")
    leads, figures = dist.get_rank() == 0, {}
    title = f"CPU s of a rank, {options.requests} requests, {options.servers} server(s)"
    columns = ("tokens of a response", "who asks", "rank 0", "mean", "most", "rank 0 / mean")
    table = Table(*columns, title=title, box=SIMPLE)
    for tokens in options.tokens:
        found: dict[str, list[list[float]]] = {"rank 0": [], "sources": []}
        model, server, urls = ServedModel.of(STUDENT, PROMPT + tokens), None, None
        if leads:
            server, urls = start_servers(options.servers, tokens, model.vocab_size)
        urls = broadcast_object(urls)
        try:
            for _ in range(options.repeats):
                for way, seconds in found.items():
                    seconds.append(gather(of_this_rank(urls, model, way, tokens, options)))
        finally:
            if server is not None:
                server.terminate()
        figures[tokens] = {way: np.median(seconds, axis=0) for way, seconds in found.items()}
        for way, by_rank in figures[tokens].items():
            first, mean = by_rank[0], by_rank.mean()
            row = (f"{first:.3f}", f"{mean:.3f}", f"{by_rank.max():.3f}", f"{first / mean:.2f}")
            table.add_row(f"{tokens:,}", way, *row)
    if leads:
        Console().print(table)
    if leads and options.json:
        listed = {n: {way: s.tolist() for way, s in ways.items()} for n, ways in figures.items()}
        options.json.write_text(json.dumps(listed, indent=2) + "\n")
    dist.destroy_process_group()
    return 0


def of_this_rank(
    urls: list[str], model: ServedModel, way: str, tokens: int, options: argparse.Namespace
) -> float:
    """Return the CPU seconds that this rank spends on a batch."""
    section = replace(ServersSection(), urls=tuple(urls), concurrency=options.concurrency)
    limits, versions = Limits(concurrency=options.concurrency), dict.fromkeys(urls, 0)
    with frozen_heap():
        replicas = Replicas(urls, model, limits) if dist.get_rank() == 0 else None
        own = open_own(section, "--servers", model) if way == "sources" else None
        for each in filter(None, (replicas, own)):
            each.run(each.follow_update(versions))
        engine = SGLangEngine(replicas, model, model.vocab_size, [], own=own)
        prompts, indices = [[2] * PROMPT] * options.requests, range(options.requests)
        try:
            engine.generate(prompts[:8], indices[:8], 1, Sampling(tokens))
            gc.collect()
            dist.barrier()
            started = time.process_time()
            engine.generate(prompts, indices, 1, Sampling(tokens))
            return time.process_time() - started
        finally:
            engine.close()


def start_servers(number: int, tokens: int, vocab_size: int) -> tuple[BaseProcess, list[str]]:
    """Start a process with servers that answer with so many tokens; return it and their urls."""
    processes = multiprocessing.get_context("spawn")
    receive, send = processes.Pipe(duplex=False)
    server = processes.Process(target=serve, args=(send, number, tokens, vocab_size), daemon=True)
    server.start()
    return server, [f"http://127.0.0.1:{port}" for port in receive.recv()]


def one_batch(replicas: Replicas, tokens: int, requests: int) -> float:
    """Return the CPU seconds of a batch, a million tokens."""
    replicas.run(replicas.commit_update(replicas.all, 0))
    engine = SGLangEngine(replicas, replicas.model, replicas.model.vocab_size, [])
    prompts = [[2] * PROMPT] * requests
    engine.generate(prompts[:8], range(8), 1, Sampling(tokens))
    gc.collect()  # which the way before may have left due
    started = time.process_time()
    batch = engine.generate(prompts, range(requests), 1, Sampling(tokens))
    return (time.process_time() - started) / len(batch.log_probs) * 1e6


def pooled(_api_key: str | None) -> httpx.AsyncClient:
    """Make the client with httpx's own pool."""
    limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
    timeout = httpx.Timeout(None, connect=protocol.CONNECT_TIMEOUT_S)
    return httpx.AsyncClient(trust_env=False, timeout=timeout, limits=limits)


def plain(url: str, response: httpx.Response) -> answers.Answer:
    """Read all of an answer into Python's own objects first."""
    return answers.as_answer(url, protocol.body_of(url, response))


def recorded(tokens: int, vocab_size: int, seed: int) -> bytes:
    """Write an answer of so many tokens."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(vocab_size, size=tokens).tolist()
    log_probs = (-rng.exponential(0.4, tokens)).astype(np.float32).tolist()
    meta = {
        "id": "0" * 32,
        "finish_reason": {"type": "length", "length": tokens},
        "prompt_tokens": PROMPT,
        "weight_version": "0",
        "total_retractions": 0,
        "input_token_logprobs": [],
        "output_token_logprobs": [
            list(t) for t in zip(log_probs, ids, [None] * tokens, strict=True)
        ],
        "output_token_logprobs_length": tokens,
        "completion_tokens": tokens,
        "cached_tokens": 0,
        "e2e_latency": 12.34,
    }
    answer = {"text": " word" * tokens, "output_ids": ids, "meta_info": meta}
    return json.dumps(answer, separators=(",", ":")).encode()


def serve(say: Connection, servers: int, tokens: int, vocab_size: int) -> None:
    """Answer on ports that it says, until it is terminated."""
    recordings = [recorded(tokens, vocab_size, seed) for seed in range(KINDS)]
    count = 0

    def answer(path: bytes, body: bytes) -> tuple[int, bytes]:
        nonlocal count
        if path == b"/model_info":
            return 200, json.dumps({"model_path": str(STUDENT), "weight_version": "0"}).encode()
        if path == b"/server_info":
            return 200, json.dumps({"tp_size": 1, "max_req_input_len": 1 << 20}).encode()
        if b'"-1"' in body:
            return 400, b"keys in [0, %d]" % (vocab_size - 1)
        if b'"top_logprobs_num"' in body:
            top = [[-0.1 * place, place, None] for place in range(8)]
            return 200, json.dumps({"meta_info": {"output_top_logprobs": [top]}}).encode()
        count += 1
        return 200, recordings[count % KINDS]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                _, _, length = head.partition(b"content-length:")
                body = await reader.readexactly(int(length.split(b"\r\n")[0] or 0))
                status, text = answer(head.split(b" ", 2)[1], body)
                writer.write(b"HTTP/1.1 %d OK\r\nContent-Length: %d\r\n\r\n" % (status, len(text)))
                writer.write(text)
                await writer.drain()
        writer.close()

    async def listen() -> None:
        listening = [await asyncio.start_server(handle, "127.0.0.1", 0) for _ in range(servers)]
        say.send([server.sockets[0].getsockname()[1] for server in listening])
        await asyncio.gather(*(server.serve_forever() for server in listening))

    asyncio.run(listen())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
