"""Several ranks that ask SGLang servers for one batch: what each has done, and that it is all."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from unittest import mock

import httpx
import pytest
import torch
import torch.distributed as dist
from support.fake_sglang import serving
from support.observed import FROZEN, SMALL, observed
from support.observed import STUDENT as STUDENT_PATH
from support.observed import TEACHER as TEACHER_PATH
from support.patience import patience
from support.ranks import run_ranks

from megatron_taopd.config.schema import ServersSection
from megatron_taopd.parallel.arrays import from_sources
from megatron_taopd.parallel.objects import on_rank_0
from megatron_taopd.rollout import places as module
from megatron_taopd.rollout.engine import Sampling
from megatron_taopd.rollout.local import LocalEngine
from megatron_taopd.rollout.places import Places
from megatron_taopd.rollout.sglang import SGLangEngine, Updates
from megatron_taopd.serving.begin import open_own
from megatron_taopd.serving.client import Replicas
from megatron_taopd.serving.model import ServedModel
from megatron_taopd.serving.replica import Limits, State
from megatron_taopd.serving.sources import share_out

STUDENT = "examples/tiny_pair/student"
MODEL = ServedModel.of(STUDENT, 120)
VOCABULARY, EOS = 1152, 1
PROMPTS = [[2, 5, 6, 7], [2, 9], [2, 11, 12, 13, 14, 15], [2, 20, 21], [2, 300, 17], [2, 8]]
SAMPLING = Sampling(max_new_tokens=6, temperature=0, samples=3)


# Who gets what


@pytest.mark.parametrize(
    "sizes, servers, owner",
    [
        ([1] * 6, [1, 2, 0], [0, 0, 1, 1, 1, 1]),
        ([1] * 6, [0, 1, 0, 1], [1, 1, 1, 3, 3, 3]),
        ([5, 1, 1, 1, 1, 1], [1, 1], [0, 1, 1, 1, 1, 1]),
        ([1, 1, 1, 1, 1, 5], [1, 1], [0, 0, 0, 0, 0, 1]),
        ([7], [0, 0, 3], [2]),
        ([2, 4, 2], [1, 1], [0, 1, 1]),
        ([1 << 40] * 3, [1000, 1000, 1000], [0, 1, 2]),
    ],
)
def test_neighbours_are_shared_out_in_proportion(sizes, servers, owner):
    assert share_out(torch.tensor(sizes), servers).tolist() == owner


def take_all(store, slots, count, fails=()):
    """What each rank takes of a batch; a place in `fails` its first rank hands on."""
    dealt = [Places(store, "batch", range(count), slots, rank) for rank in range(len(slots))]
    taken: list[list] = [[] for _ in slots]

    async def work(rank, place, made):
        while place is not None:
            if (place, made) in fails:
                dealt[rank].hand_on(place, made + 1, [])
            else:
                taken[rank].append((place, made))
                dealt[rank].ring()
            await asyncio.sleep(0.001)
            place, made, _ = await dealt[rank].take(lambda: dealt[rank].rung() < count) or (
                None,
                0,
                [],
            )

    async def all_of_them():
        workers = [
            work(rank, place, 0) for rank, places in enumerate(dealt) for place in places.first
        ]
        await asyncio.gather(*workers)

    asyncio.run(asyncio.wait_for(all_of_them(), patience(10)))
    return dealt, taken


@pytest.mark.parametrize("count", [3, 8, 30])
def test_every_place_is_taken_once(count, monkeypatch):
    monkeypatch.setattr(module, "POLL_S", 0.001)
    fails = {(1, 0), (1, 1), (count - 1, 0)}
    dealt, taken = take_all(dist.HashStore(), [2, 0, 6], count, fails)
    begun = [places.first for places in dealt]
    assert sorted(chain(*begun)) == list(range(min(count, 8)))
    assert [len(first) for first in begun] == {3: [1, 0, 2]}.get(count, [2, 0, 6])
    everything = Counter(chain(*taken))
    made = Counter({(place, 0): 1 for place in range(count)})
    made -= Counter([(1, 0), (count - 1, 0)])
    assert everything == made + Counter([(1, 2), (count - 1, 1)])
    assert not taken[1]
    if count == 30:  # what no server had room for at first, all help with
        assert all(len(taken[rank]) > len(begun[rank]) for rank in (0, 2))


def arrays_on_rank():
    own = torch.arange(dist.get_rank() * 2, dtype=torch.int32)
    group = dist.new_group(backend="gloo")
    return [from_sources(own, sources, group) for sources in ([0, 1, 2], [2], [0])]


def test_arrays_of_sources_reach_every_rank():
    for found in run_ranks(3, arrays_on_rank):
        assert [[a.tolist() for a in arrays] for arrays in found] == [
            [[0, 1], [0, 1, 2, 3]],
            [[0, 1, 2, 3]],
            [],
        ]


# An engine on fake servers


class Versions:
    """Has servers call their weights what they are told; one that does not hear it falls out."""

    version = 7

    def push(self, replicas, targets, named_tensors, version):
        def work():
            path, payload = "/update_weight_version", {"new_version": str(version)}
            posts = [replicas.spawn(replicas.post(r, path, payload)) for r in targets]
            errors = zip(targets, [post.exception() for post in posts], strict=True)
            return {replica.url: str(error) for replica, error in errors if error is not None}

        self.version = version
        return on_rank_0(work)


def engine_on_rank(urls, **limits):
    section = replace(ServersSection(), urls=tuple(urls), concurrency=4)
    own = open_own(section, "rollout.servers", MODEL)
    leads = dist.get_rank() == 0
    limits = {"concurrency": 4} | limits
    replicas = Replicas(urls, MODEL, Limits(**limits)) if leads else None
    if own is not None:
        own.limits = own.shared.limits = Limits(**limits)
    sync = Versions()
    updates = Updates(sync, list, lambda: sync.version)
    return SGLangEngine(replicas, MODEL, VOCABULARY, [EOS], updates, own)


def generate_on_ranks(urls, limits):
    """Two batches, between them an update; which servers this rank asked; what rank 0 counts."""
    engine = engine_on_rank(urls, **limits)
    try:
        parts = engine.submit(PROMPTS, range(6), 1, SAMPLING)
        places = torch.cat([places for places, _ in parts.parts()]).tolist()
        batches = [parts.result()]
        engine.update_weights([], 8)
        batches.append(engine.generate(PROMPTS, range(6), 2, SAMPLING))
        asked = [] if engine.asks is None else [replica.url for replica in engine.asks.all]
        states = [] if engine.asks is None else [r.state for r in engine.asks.all]
        return places, batches, asked, states, engine.metrics(), engine.pending
    finally:
        engine.close()


@pytest.fixture(scope="module")
def backends():
    with ExitStack() as stack:
        yield [stack.enter_context(serving(STUDENT)) for _ in range(2)]


@pytest.fixture(scope="module")
def expected():
    local = LocalEngine.from_hf(STUDENT, torch.float32, "cpu", vocab_size=VOCABULARY)
    return local.generate(PROMPTS, range(6), 1, SAMPLING)


def assert_same(batch, expected, version):
    for name in ("tokens", "cu_seqlens", "prompt_lengths", "truncated", "prompts"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name
    torch.testing.assert_close(batch.log_probs, expected.log_probs, rtol=0, atol=1e-4)
    assert batch.weight_versions.unique().tolist() == [version]


def test_each_source_asks_its_servers_and_every_rank_has_all(backends, expected):
    """18 responses from two servers that take 4 at a time, so that most of them wait."""
    for backend in backends:
        backend.requests.clear()
    urls = [backend.url for backend in backends]
    answers = run_ranks(3, generate_on_ranks, urls, {})
    for places, batches, _, states, _, pending in answers:
        assert sorted(places) == list(range(18)) and places == answers[0][0] and not pending
        for batch, version in zip(batches, (7, 8), strict=True):
            assert_same(batch, expected, version)
        assert set(states) <= {State.READY}
    assert [asked for _, _, asked, *_ in answers] == [[], [urls[1]], [urls[0]]]
    assert [len(backend.completions) > 8 for backend in backends] == [True, True]
    assert sum(len(backend.completions) for backend in backends) == 36
    metrics = answers[0][4]
    assert metrics["rollout/tokens_per_second"] > 0
    assert not metrics["rollout/retries"] and metrics["rollout/resyncs"] == 1
    assert answers[1][4] == {}


def test_what_a_source_cannot_have_answered_another_one_has(backends, expected, monkeypatch):
    """The one server of a source is gone while it answers its third request."""
    first, second = backends
    answer, lock, asked = second.answer, threading.Lock(), []

    def fail(path, payload):
        with lock:
            if "rid" in payload and path == "/generate":
                asked.append(path)
            if len(asked) > 2:
                raise ConnectionAbortedError
        return answer(path, payload)

    monkeypatch.setattr(second, "answer", fail)
    monkeypatch.setattr("http.server.ThreadingHTTPServer.handle_error", lambda *_: None)
    before = len(first.completions)
    limits = {"health_every_s": 0.1, "attempts": 3}
    answers = run_ranks(3, generate_on_ranks, [first.url, second.url], limits)
    for _, batches, *_ in answers:
        for batch, version in zip(batches, (7, 8), strict=True):
            assert_same(batch, expected, version)
    # Its first two answers may have been lost with it.
    assert 36 - 2 <= len(first.completions) - before <= 36
    assert answers[0][4]["rollout/retries"] >= 1


def refused_on_ranks(urls):
    engine = engine_on_rank(urls)
    messages = []
    try:
        for temperature in (-1.0, 0.0):
            sampling = Sampling(6, 3, temperature)
            try:
                engine.generate(PROMPTS, range(6), 1, sampling)
            except RuntimeError as error:
                messages.append(str(error))
        return messages, engine.pending
    finally:
        engine.close()


def test_an_error_of_one_source_is_raised_on_every_rank(backends, monkeypatch):
    second, answer = backends[1], backends[1].answer

    def refuse(path, payload):
        if payload.get("sampling_params", {}).get("temperature") == -1:
            return {"meta_info": {"finish_reason": {"type": "stop"}}, "über": "ß"}
        return answer(path, payload)

    monkeypatch.setattr(second, "answer", refuse)
    answers = run_ranks(3, refused_on_ranks, [backend.url for backend in backends])
    [message] = answers[0][0]
    assert "is not what was asked for: 0 tokens of 6 (finish reason stop)" in message
    assert answers == [([message], 0)] * 3


def no_way(urls):
    section = replace(ServersSection(), urls=tuple(urls))
    try:
        open_own(section, "rollout.servers", MODEL)
    except ValueError as error:
        return str(error)


def test_a_rank_that_does_not_reach_its_server_is_named(backends):
    dead = "http://127.0.0.1:9"
    answers = run_ranks(3, no_way, [backends[0].url, dead])
    assert answers == [answers[0]] * 3
    assert answers[0].startswith(f"rollout.servers: rank 1: {dead}/model_info: ConnectError")


# A run


def run_on_rank(overrides):
    """A run, and by url how many requests this rank has made for responses and rows."""
    asked, post = Counter(), httpx.AsyncClient.post

    async def count(client, url, **options):
        if "rid" in options["json"] and str(url).endswith("/generate"):
            asked[str(url).removesuffix("/generate")] += 1
        return await post(client, url, **options)

    with mock.patch.object(httpx.AsyncClient, "post", count):
        seen = observed(overrides)
    return seen.status, seen.printed, seen.records, asked


def test_a_run_asks_from_several_ranks(backends, tmp_path):
    """Two ranks, two servers of each model: each rank asks one of both."""
    with ExitStack() as stack:
        students = [stack.enter_context(serving(STUDENT_PATH)) for _ in range(2)]
        teachers = [stack.enter_context(serving(TEACHER_PATH)) for _ in range(2)]
        options = [*SMALL, FROZEN, f"run.dir={tmp_path / 'run'}", "rollout.engine=sglang"]
        options += ["teacher.engine=sglang", "rollout.sync.transport=disk", "rollout.ahead=1"]
        for model, servers in (("rollout", students), ("teacher", teachers)):
            urls = ",".join(server.url for server in servers)
            options.append(f"{model}.servers.urls=[{urls}]")
        answers = run_ranks(2, run_on_rank, [*options, "train.steps=2"])
    for status, printed, *_ in answers:
        assert status == 0, printed
    for servers in (students, teachers):
        for rank, (*_, asked) in enumerate(answers):
            assert [asked[server.url] > 0 for server in servers] == [rank == 1, rank == 0]
        made = sum(asked.total() for *_, asked in answers)
        assert made == sum(len(server.completions) for server in (*students, *teachers))
    assert len(answers[0][2]) == 3  # the first tells of the student before any step
