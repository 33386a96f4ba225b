"""The engine on real SGLang servers, on the CPU."""

import http.server
import json
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import httpx
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.patience import known_patience, patience, wait_for
from support.ranks import run_ranks
from transformers import AutoModelForCausalLM

from megatron_taopd.rollout.engine import Sampling
from megatron_taopd.rollout.local import LocalEngine
from megatron_taopd.rollout.sglang import SGLangEngine, Updates
from megatron_taopd.rollout.weight_sync import DistributedSync
from megatron_taopd.serving import health
from megatron_taopd.serving.client import Replicas
from megatron_taopd.serving.model import ServedModel
from megatron_taopd.serving.replica import Limits, State
from megatron_taopd.serving.server import Server

STUDENT = "examples/tiny_pair/student"
MODEL = ServedModel.of(STUDENT, 120)
VOCABULARY, EOS = 1100, 1  # of the 1,152 rows
PROMPTS = [[2, 5, 6, 7], [2, 9], [2, 11, 12, 13, 14, 15], [2, 20, 21], [2, 300, 17], [2, 8]]
GREEDY = Sampling(max_new_tokens=24, temperature=0)
LONG = Sampling(max_new_tokens=100, temperature=0, samples=4)
# After the first request, in which responses may be under way; which one meets them, the machine
# decides.
MOMENTS_S = (0.3, 0.1, 0.6, 1.2, 2.5, 5, 10, 20)


class DiskSync:
    """Has the servers read `path`."""

    def __init__(self, path):
        self.path, self.pushes, self.fault = path, [], None

    def push(self, replicas, targets, named_tensors, version):
        assert [name for name, _ in named_tensors] == ["weight"]
        if replicas is not None:
            self.pushes.append((targets, version))
            if self.fault is not None:
                self.fault(targets)
            # A scheduler dies of an update while it runs anything, were it what it has answered.
            replicas.run(replicas.post_all("/flush_cache?timeout=60", {}, targets))
            payload = {"model_path": str(self.path), "weight_version": str(version)}
            replicas.run(replicas.post_all("/update_weights_from_disk", payload, targets))
        return {}


def engine_on(replicas, sync, **kwargs):
    weights = partial(iter, [("weight", torch.zeros(1))])
    return SGLangEngine(replicas, MODEL, VOCABULARY, [EOS], Updates(sync, weights, **kwargs))


def update(engine, path, version):
    engine.updates.sync.path = path
    engine.update_weights(engine.updates.weights(), version)


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """The student, but it never ends a response, so that there is time to disturb it."""
    path = tmp_path_factory.mktemp("endless")
    shutil.copytree(STUDENT, path, dirs_exist_ok=True)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][EOS] *= -1
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model of the student's sizes and name."""
    path = tmp_path_factory.mktemp("other") / "student"
    shutil.copytree(STUDENT, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1.5
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two servers; the student's weights are version 0."""
    logs = tmp_path_factory.mktemp("logs")
    options = {"device": "cpu", "dtype": "float32", "max_running_requests": 16}
    options |= {"max_total_tokens": 4096, "start_timeout": patience(300)}
    starts = [partial(Server, STUDENT, logs / f"{i}", **options) for i in range(2)]
    # Those that are killed or stopped here are found so in the table of processes. Others are busy:
    # a restart, or another test's ranks, may keep one from answering for long.
    limits = Limits(concurrency=8, health_every_s=0.5, health_timeout_s=600)
    with Replicas(starts, MODEL, limits) as replicas:
        yield replicas


@pytest.fixture
def engine(pair):
    pair.counts.clear()
    return engine_on(pair, DiskSync(STUDENT))


def local(path=STUDENT):
    return LocalEngine.from_hf(path, torch.float32, "cpu", vocab_size=VOCABULARY)


def assert_same(batch, expected):
    for name in ("tokens", "cu_seqlens", "prompt_lengths", "truncated", "prompts"):
        torch.testing.assert_close(getattr(batch, name), getattr(expected, name), rtol=0, atol=0)
    torch.testing.assert_close(batch.log_probs, expected.log_probs, rtol=0, atol=1e-4)


# What comes back


@pytest.mark.parametrize("stop_ids", [(), (6, 8)])
def test_greedy_is_the_local_engines(engine, stop_ids):
    sampling = Sampling(max_new_tokens=24, temperature=0, samples=2, stop_token_ids=stop_ids)
    indices = [7, 3, 100, 0, 5, 9]
    pending = engine.submit(PROMPTS, indices, 1, sampling)
    batch = pending.result()
    [(places, part)] = pending.parts()
    assert places.tolist() == list(range(12)) and torch.equal(part.tokens, batch.tokens)
    assert_same(batch, local().generate(PROMPTS, indices, 1, sampling))
    assert batch.weight_versions.unique().tolist() == [0]
    assert stop_ids or batch.truncated.unique().tolist() == [False, True]


def test_samples_at_temperature(engine):
    sampling = Sampling(max_new_tokens=30, temperature=1.5, samples=3)
    pending = engine.submit(PROMPTS, range(6), 1, sampling)
    parts = list(pending.parts())
    batch = pending.result()
    assert len(parts) > 1
    assert sorted(torch.cat([places for places, _ in parts]).tolist()) == list(range(18))
    for places, part in parts:
        assert places.tolist() == sorted(places.tolist())
        for i, place in enumerate(places):
            assert torch.equal(part.sequence(i), batch.sequence(place))
            assert part.truncated[i] == batch.truncated[place]
    assert batch.prompts.tolist() == [i for i in range(6) for _ in range(3)]
    assert list(pending.parts()) == []
    sequences = [batch.sequence(i) for i in range(18)]
    assert len({tuple(sequence.tolist()) for sequence in sequences}) > 12
    assert batch.tokens.max() < VOCABULARY

    model = AutoModelForCausalLM.from_pretrained(STUDENT)
    with torch.no_grad():
        logits = [model(sequence[None]).logits[0] for sequence in sequences]
    logits = torch.cat(
        [x[p - 1 : -1] for x, p in zip(logits, batch.prompt_lengths.tolist(), strict=True)]
    )
    log_probs = logits[:, :VOCABULARY].log_softmax(1)
    chosen = log_probs.gather(1, batch.response_tokens()[:, None])[:, 0]
    torch.testing.assert_close(batch.log_probs, chosen, rtol=0, atol=1e-4)


def test_top_k_and_top_p(engine):
    for sampling in (
        Sampling(max_new_tokens=20, temperature=1.5, top_k=1),
        Sampling(max_new_tokens=20, temperature=1.5, top_p=1e-6),
    ):
        batch = engine.generate(PROMPTS, range(6), 1, sampling)
        assert_same(batch, local().generate(PROMPTS, range(6), 1, sampling))


def test_what_would_kill_a_server_is_refused(engine):
    for prompts, message in (
        ([[5], [5, 1152]], "prompt 8 has the token id 1152; the model has 0 … 1151"),
        ([[5], [-1]], "prompt 8 has the token id -1"),
        ([[5], []], "prompt 8 is empty"),
        ([[5], [5] * 97], "prompt 8 has 97 tokens; with 24 new ones .* over the servers' 120"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(prompts, [7, 8], 1, GREEDY)
    with pytest.raises(ValueError, match="top_logprobs 1153 is over the vocabulary of 1152"):
        request = {"input_ids": [5], "sampling_params": {"max_new_tokens": 4}}
        engine.replicas.run(engine.replicas.complete(request | {"top_logprobs_num": 1153}))
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.replicas.run(engine.replicas.complete({"input_ids": []}))
    assert not engine.pending


def test_refused_request_is_not_repeated(engine):
    with pytest.raises(RuntimeError, match="/generate: 400 temperature must be"):
        engine.generate(PROMPTS, range(6), 1, Sampling(4, temperature=-1.0))
    assert not engine.replicas.counts["retries"]


# Several servers, several versions


def test_update_and_shared_load(engine, endless):
    update(engine, endless, 4)
    assert [replica.version for replica in engine.replicas.all] == [4, 4]
    loads, done = [], threading.Event()

    def look():  # while requests are under way, however late this thread hears of their answers
        while not done.wait(0.002):
            loads.append([replica.requests for replica in engine.replicas.all])

    looking = threading.Thread(target=look)
    looking.start()
    try:
        pending = engine.submit(PROMPTS, range(6), 1, LONG)
        for _ in pending.parts():
            pass
    finally:
        done.set()
        looking.join()
    assert max(min(load) for load in loads) > 3 and max(map(max, loads)) <= 8
    assert all(replica.tokens == replica.requests == 0 for replica in engine.replicas.all)
    batch = pending.result()
    assert_same(batch, local(endless).generate(PROMPTS, range(6), 1, LONG))
    assert batch.weight_versions.unique().tolist() == [4]
    metrics = engine.metrics()
    assert metrics["rollout/tokens_per_second"] > 0 and not metrics["rollout/retries"]
    assert metrics["rollout/cached_share"] > 0
    assert not any(engine.metrics().values())


def submit_and_wait(engine, moment_s):
    pending = engine.submit(PROMPTS, range(6), 1, LONG)
    wait_for(lambda: engine.replicas.all[0].requests)
    time.sleep(moment_s)
    return pending


def test_version_changes_within_a_response(engine, endless):
    replicas, payload = engine.replicas, {"model_path": str(endless), "weight_version": "9"}
    payload["flush_cache"] = False
    expected = local(endless).generate(PROMPTS, range(6), 1, LONG)
    for moment_s in MOMENTS_S:
        update(engine, endless, 8)
        pending = submit_and_wait(engine, moment_s)
        replicas.run(replicas.pause("in_place"))
        replicas.run(replicas.post_all("/update_weights_from_disk", payload))
        replicas.run(replicas.resume())
        batch = pending.result()
        assert_same(batch, expected)
        versions = batch.weight_versions.split(batch.response_lengths.tolist())
        assert all((v.diff() >= 0).all() for v in versions)
        if any(set(v.tolist()) == {8, 9} for v in versions):
            return
    pytest.fail("no response was under way at any of the moments")


@pytest.mark.parametrize("keep", [False, True])
def test_an_update_interrupts_responses_which_go_on_from_where_they_were(pair, endless, keep):
    """With the cache that they had, or without: what they ask for again is all but new."""
    engine = engine_on(pair, DiskSync(endless), keep_cache=keep)
    expected = local(endless).generate(PROMPTS, range(6), 1, LONG)
    for moment_s in MOMENTS_S:
        update(engine, endless, 14)
        engine.metrics()
        pending = submit_and_wait(engine, moment_s)
        update(engine, endless, 15)
        batch = pending.result()
        assert_same(batch, expected)
        versions = batch.weight_versions.split(batch.response_lengths.tolist())
        assert all((v.diff() >= 0).all() for v in versions)
        metrics = engine.metrics()
        mixed = sum(set(v.tolist()) == {14, 15} for v in versions)
        if mixed > 3:
            assert metrics["rollout/interruptions"] >= mixed and not metrics["rollout/retries"]
            return
    pytest.fail("no response was under way at any of the moments")


def test_aborted_responses_begin_anew(engine, endless):
    """What runs; a request that has not yet come to the server's scheduler is not hit."""
    expected = local(endless).generate(PROMPTS, range(6), 1, LONG)
    update(engine, endless, 10)
    for moment_s in MOMENTS_S:
        pending = submit_and_wait(engine, moment_s)
        engine.replicas.run(engine.replicas.pause("abort"))
        engine.replicas.run(engine.replicas.resume())
        assert_same(pending.result(), expected)
        if engine.metrics()["rollout/retries"]:
            return
    pytest.fail("no response was under way at any of the moments")


# On ranks


def on_ranks(url, path):
    """Greedy, sampled, and what a refusal raises."""
    replicas = Replicas([url], MODEL) if dist.get_rank() == 0 else None
    sync = DiskSync(path)
    engine = engine_on(replicas, sync, version=lambda: 3)
    batches = [
        engine.generate(PROMPTS, range(6), 1, Sampling(20, 2, temperature))
        for temperature in (0, 1.0)
    ]
    batches[:0] = [engine.generate(PROMPTS, range(6), 1, GREEDY)]
    update(engine, path, 4)
    try:
        engine.generate(PROMPTS, range(6), 1, Sampling(4, temperature=-1.0))
    except RuntimeError as error:
        refused = str(error)
    sync.fault = refuse
    try:
        update(engine, path, 5)
    except RuntimeError as error:
        failed = str(error)
    engine.close()
    return batches, [v for _, v in sync.pushes], refused, failed


def refuse(targets):
    raise RuntimeError("refused")


def test_ranks(pair, endless):
    answers = run_ranks(2, on_ranks, pair.all[0].url, endless)
    (first, pushes, *messages), (second, _, *others) = answers
    assert pushes == [3, 4, 5]  # the first because the server is somebody else's
    assert messages == others
    assert "400 temperature" in messages[0] and messages[1] == "weights of version 5: refused"
    for a, b in zip(first, second, strict=True):
        for name, value in vars(a).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(b, name))
    assert_same(first[0], local(endless).generate(PROMPTS, range(6), 1, GREEDY))
    assert first[2].weight_versions.unique().tolist() == [3]


# What goes wrong


@contextmanager
def proxy(url, disturb):
    """In front of a real server: `disturb(path, body, key)` may answer with a status of its own."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status = disturb(self.path, body, self.headers["Authorization"])
            if status is not None:
                return self.answer(httpx.Response(status, json={"error": {"message": "oh"}}))
            headers = {"Content-Type": "application/json"}
            target, kwargs = url + self.path, {"headers": headers, "timeout": known_patience(600)}
            self.answer(httpx.request(self.command, target, content=body, **kwargs))

        do_GET = do_POST

        def answer(self, response):
            self.send_response(response.status_code)
            self.send_header("Content-Length", str(len(response.content)))
            self.end_headers()
            self.wfile.write(response.content)

        def log_message(self, *_):
            pass

    class Http(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass  # a client that no longer waits

    with Http(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_failing_and_slow_answers_are_repeated(pair):
    """Of the first three requests one fails, and one is not answered before it is aborted."""
    asked, aborted = [], []
    counting, ended = threading.Lock(), threading.Event()

    def disturb(path, body, key):
        if path == "/abort_request":
            aborted.append(json.loads(body)["rid"])
            if aborted[-1] == asked[2]:
                ended.set()
        if path == "/generate" and b'"rid"' in body:
            with counting:
                asked.append(json.loads(body)["rid"])
                place = len(asked)
            if place % 3 == 1:
                return 500
            if place == 3:
                ended.wait()

    with (
        proxy(pair.all[0].url, disturb) as url,
        Replicas(
            [url], MODEL, Limits(timeout_s=patience(4), attempts=8, health_timeout_s=600)
        ) as replicas,
    ):
        engine = engine_on(replicas, DiskSync(STUDENT))
        batch = engine.generate(PROMPTS, range(6), 1, GREEDY)
        assert_same(batch, local().generate(PROMPTS, range(6), 1, GREEDY))
        metrics = engine.metrics()
        assert metrics["rollout/timeouts"] >= 1 and metrics["rollout/resyncs"] == 1
        assert metrics["rollout/retries"] == len(asked) - 6 > 2
        wait_for(ended.is_set)
        wait_for(lambda: len(aborted) == metrics["rollout/timeouts"])


def test_attempts_come_to_an_end(pair):
    def disturb(path, body, key):
        return 503 if path == "/generate" and b'"rid"' in body else None

    with (
        proxy(pair.all[0].url, disturb) as url,
        Replicas([url], MODEL, Limits(attempts=2, health_timeout_s=600)) as replicas,
    ):
        engine = engine_on(replicas, DiskSync(STUDENT))
        with pytest.raises(RuntimeError, match=f"failed 2 times, .*{url}/generate: 503 oh"):
            engine.generate(PROMPTS, range(6), 1, GREEDY)


def test_server_that_comes_back(pair, endless):
    """Somebody else's, out until its health has been asked for four times (two are enough to lose
    it): first in the middle of an update, then of a batch."""
    looks = 0  # for which it still is

    def disturb(path, body, key):
        nonlocal looks
        if key != "Bearer key":
            return 401
        if looks <= 0:
            return None
        looks -= path in ("/server_info", "/model_info")
        return 500

    def fall_ill():
        nonlocal looks
        looks = 4

    def break_off(targets):
        sync.fault = None
        fall_ill()
        refuse(targets)

    sync = DiskSync(endless)
    sync.fault = break_off
    limits = Limits(concurrency=8, attempts=50, health_every_s=0.1)
    with (
        proxy(pair.all[0].url, disturb) as url,
        Replicas([url], MODEL, limits, api_key="key") as replicas,
    ):
        engine = engine_on(replicas, sync, version=lambda: 30)
        expected = local(endless).generate(PROMPTS, range(6), 1, LONG)
        assert_same(engine.generate(PROMPTS, range(6), 1, LONG), expected)
        # A second time after the fault; and again, if a busy machine is late with its health.
        assert len(sync.pushes) >= 2 and {version for _, version in sync.pushes} == {30}
        sync.pushes.clear()
        pending = engine.submit(PROMPTS, range(6), 1, LONG)
        next(pending.parts())
        fall_ill()
        batch = pending.result()
        assert_same(batch, expected)
        # Back from a short absence it has its weights; from a longer one it is given them.
        assert {version for _, version in sync.pushes} <= {30}
        assert batch.weight_versions.unique().tolist() == [30]
        assert engine.metrics()["rollout/retries"] >= 8
        with pytest.raises(RuntimeError, match="/model_info: 401 oh"):
            Replicas([url], MODEL)


def test_a_server_that_a_killed_run_has_left_paused_goes_on(pair):
    first = pair.all[0]
    pair.run(pair.pause("abort", [first]))
    try:
        Replicas([first.url], MODEL).close()  # which asks it to generate
    finally:
        pair.run(pair.resume([first]))


def test_wrong_server_at_the_url(pair):
    url = pair.all[0].url
    for model, message in (
        (ServedModel.of("examples/tiny_pair/teacher", 120), "found hidden_size 96, .*expected hid"),
        (MODEL._replace(sizes=MODEL.sizes | {"vocab_size": 99}), "found vocab_size 1152, expected"),
        (MODEL._replace(longest=122), "takes sequences of 121 tokens, the run has some of 122"),
    ):
        with pytest.raises(ValueError, match=f"{url} .*{message}"):
            Replicas([url], model)
    with pytest.raises(RuntimeError, match=r"http://127.0.0.1:9/model_info: ConnectError"):
        Replicas(["http://127.0.0.1:9"], MODEL)


def give(replicas, replica, path):
    """Weights from a directory, behind everybody's back."""
    payload = {"model_path": str(path), "weight_version": "default"}
    replicas.run(replicas.post(replica, "/update_weights_from_disk", payload))


def test_a_server_with_other_weights_is_named(pair, other):
    """Same sizes, same name: only what they answer tells them apart."""
    first, second = pair.all
    for replica, path in ((first, STUDENT), (second, other)):
        give(pair, replica, path)
    try:
        with proxy(first.url, lambda *_: None) as third:
            named = rf"{second.url}: other weights than {first.url} and 1 others: .* by 0.[0-9]+ on"
            with pytest.raises(ValueError, match=named):
                Replicas([second.url, first.url, third], MODEL, fixed_weights=True)
            Replicas([first.url, third], MODEL, fixed_weights=True).close()
    finally:
        give(pair, second, STUDENT)


def test_a_server_that_comes_back_with_other_weights_is_left_out(pair, other):
    """Somebody restarts a teacher's server with another model while the run is on."""
    gone = threading.Event()
    first = pair.all[0]
    limits = Limits(health_every_s=0.1, health_timeout_s=30)
    with (
        proxy(first.url, lambda *_: 500 if gone.is_set() else None) as url,
        Replicas([url], MODEL, limits, fixed_weights=True) as replicas,
    ):
        [replica] = replicas.all
        gone.set()
        wait_for(lambda: replica.state is State.DOWN)
        give(pair, first, other)
        gone.clear()
        wait_for(lambda: "other weights" in replica.trouble)
        assert replica.state is State.DOWN
        give(pair, first, STUDENT)
        wait_for(lambda: replica.state is State.READY)


def test_what_a_server_was_started_with_is_said(pair, other):
    url = pair.all[0].url
    with Replicas([url], MODEL, fixed_weights=True, dtype="bfloat16") as replicas:
        assert replicas.remarks == [f"{url} computes in float32, the run in bfloat16"]
    model = MODEL._replace(path=str(other))
    with Replicas([url], model, fixed_weights=True, dtype="float32") as replicas:
        assert replicas.remarks == [f"{url} serves {STUDENT}, which has the sizes of {other}"]


def scheduler(replica):
    processes = psutil.Process(replica.server.pid).children(recursive=True)
    return next(p for p in processes if p.name() == "sglang::scheduler")


def test_a_server_that_cannot_answer_is_not_waited_for(pair):
    """Its scheduler is stopped, while it is given weights, so that nobody looks after it."""
    first, second = pair.run(pair.begin_update(pair.all))
    os.kill(scheduler(second).pid, signal.SIGSTOP)
    with pytest.raises(
        RuntimeError, match=rf"{second.url}/flush_cache: .* sglang::scheduler .* is s"
    ):
        pair.run(pair.post_all("/flush_cache", {}, timeout=3000))
    os.kill(scheduler(second).pid, signal.SIGCONT)
    pair.run(pair.commit_update([first, second], 0))
    pair.run(pair.flush())


@pytest.fixture
def alone():
    """A world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_server_that_hangs_in_a_push_is_replaced_and_the_other_one_is_not(
    pair, alone, monkeypatch
):
    """The one that is well is waited for no longer than it needs, and looked at, but not blamed."""
    tensors = list(load_file(f"{STUDENT}/model.safetensors").items())
    sync = DistributedSync(STUDENT, 150_000, timeout_s=3000)
    updates = Updates(sync, lambda: tensors, lambda: 40)
    engine = SGLangEngine(pair, MODEL, VOCABULARY, [EOS], updates)
    pair.counts.clear()
    engine.update_weights(iter(tensors), 39)
    first, second = pair.all
    pids, post, asked, troubles = [r.server.pid for r in pair.all], pair.post, [], []

    async def stops(replica, path, payload, timeout=60):
        if replica is second and path == "/update_weights_from_distributed":
            asked.append(path)
            if len(asked) == 2:
                os.kill(scheduler(second).pid, signal.SIGSTOP)
        return await post(replica, path, payload, timeout)

    def push(*args):
        lost = DistributedSync.push(sync, *args)
        troubles.extend(lost.values())
        return lost

    monkeypatch.setattr(pair, "post", stops)
    monkeypatch.setattr(sync, "push", push)
    engine.update_weights(iter(tensors), 40)  # goes on: the end of the one explains it
    assert first.state is State.READY and first.version == 40  # it was given them all the same
    assert second.url in troubles[0] and "is stopped (weights 40, model" in troubles[0]
    assert first.url not in troubles[0] and first.alive and second.state is State.DOWN
    batch = engine.generate(PROMPTS, range(6), 1, GREEDY)
    assert_same(batch, local().generate(PROMPTS, range(6), 1, GREEDY))
    assert set(batch.weight_versions.tolist()) == {40}
    wait_for(lambda: second.alive, seconds=400)
    engine.generate(PROMPTS, range(6), 1, GREEDY)
    assert [r.state for r in pair.all] == [State.READY] * 2 and len(troubles) == 1
    assert pids[0] == first.server.pid and pids[1] != second.server.pid
    assert engine.metrics()["rollout/restarts"] == 1


def test_dead_and_hung_servers(engine, endless):
    update(engine, endless, 20)
    expected = local(endless).generate(PROMPTS, range(6), 1, LONG)
    first, second = engine.replicas.all
    pids = [first.server.pid, second.server.pid]
    engine.updates = replace(engine.updates, version=lambda: 21)  # the trainer has gone on

    pending = engine.submit(PROMPTS, range(6), 1, LONG)
    next(pending.parts())
    os.kill(first.server.pid, signal.SIGKILL)
    batch = pending.result()
    assert_same(batch, expected)
    wait_for(lambda: first.state is not State.READY)
    assert second.state is State.READY
    assert batch.weight_versions.unique().tolist() == [20]

    pending = engine.submit(PROMPTS, range(6), 1, LONG)
    os.kill(scheduler(second).pid, signal.SIGSTOP)
    batch = pending.result()
    assert_same(batch, expected)  # not what the student says, which is what they started with
    assert 21 in batch.weight_versions
    wait_for(lambda: second.alive, seconds=400)
    assert_same(engine.generate(PROMPTS, range(6), 1, LONG), expected)
    assert [replica.state for replica in engine.replicas.all] == [State.READY] * 2
    assert [replica.version for replica in engine.replicas.all] == [21, 21]
    assert [version for _, version in engine.updates.sync.pushes] == [20, 21, 21]
    assert pids[0] != first.server.pid and pids[1] != second.server.pid
    metrics = engine.metrics()
    assert metrics["rollout/restarts"] == 2 and metrics["rollout/resyncs"] == 2
    assert metrics["rollout/retries"] > 0


def test_no_server_is_left(engine, monkeypatch):
    def start():
        raise RuntimeError("the SGLang server died: out of memory")

    monkeypatch.setattr(health, "RESTARTS", 1)
    for replica in engine.replicas.all:
        replica.start = start
        os.kill(replica.server.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"no server is left: .* died: out of memory; .* out of"):
        engine.generate(PROMPTS, range(6), 1, GREEDY)
