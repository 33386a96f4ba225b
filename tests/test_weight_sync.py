"""Each way from a Megatron student's ranks to a real server; what must not get there."""

from __future__ import annotations

import asyncio
import base64
import inspect
import os
import pickle
import re
import signal
import threading
import time
import zlib
from contextlib import ExitStack, suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import httpx
import psutil
import pytest
import torch
import torch.distributed as dist
from support.families import CONFIGS, save_random
from support.patience import patience
from support.ranks import run_ranks
from support.sglang_server import generate, serve
from support.step import OPTIMIZER
from torch.multiprocessing import reductions
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.receiver import Receiver
from megatron_taopd.parallel.compat import torch_internals
from megatron_taopd.rollout.weight_sync import (
    DiskSync,
    DistributedSync,
    Probe,
    Repeatable,
    TensorSync,
    check_probe,
    distributed,
    probe_replica,
    tensor,
)
from megatron_taopd.rollout.weight_sync.buckets import Bucket, Entry, buckets, checked
from megatron_taopd.rollout.weight_sync.distributed import _Group, local_address
from megatron_taopd.rollout.weight_sync.sequence import TIMEOUT_S
from megatron_taopd.serving.sources import deal

STUDENT = "examples/tiny_pair/student"
VOCABULARY = 1152
SEQUENCES = [[5, 6, 7, 8, 9, 10], [300, 2], [11, 12, 13, 700, 15, 16, 1151, 0], [20, 21, 22]]
BUCKET = 150_000  # bytes: the student's 1.3 MB are several, its embedding larger than one
WAYS = ["distributed", "tensor", "disk"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(STUDENT, log=tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@dataclass(frozen=True)
class Replica:
    url: str
    tp: int = 1
    gpus: tuple[int, ...] = ()


class Client:
    """Requests by httpx; `post` may be another coroutine."""

    def __init__(self, post=None):
        self.post = post or send
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def spawn(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)


async def send(replica, path, payload, timeout):
    where = f"{replica.url}{path}"
    async with httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
        try:
            answer = await client.post(where, json=payload)
        except httpx.TransportError as error:
            raise RuntimeError(f"{where}: {error!r}") from error
    if answer.status_code != 200:
        raise RuntimeError(f"{where}: {answer.text}")
    return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text


def on_student(body, tp, pp, dtype, *args, hf_dir=STUDENT, ep=1):
    """On every rank: body(student, *args)."""
    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel import platform
    from megatron_taopd.parallel.layout import student_layout

    platform.emulate_cuda()
    layout = student_layout(tp, pp, ep=ep)
    return body(Student(hf_dir, layout, dtype, "none", OPTIMIZER, 1, VOCABULARY), *args)


def perturb(student):
    """Every weight by a factor of its own, the same on all ranks and for the tied copy."""
    from megatron_taopd.models.weights import named_parameters

    with torch.no_grad():
        for name, parameter in named_parameters(student.trunk):
            name = name.replace("output_layer", "embedding.word_embeddings")
            parameter.mul_(1 + (zlib.crc32(name.encode()) % 100 + 1) / 300)


def restore(student):
    from megatron_taopd.models.weights import load_weights

    load_weights(student.trunk, student.hf_dir)


def make_sync(way, directory, hf_dir=STUDENT, **kwargs):
    if way == "disk":
        return DiskSync(hf_dir, BUCKET, directory=directory, **kwargs)
    return {"distributed": DistributedSync, "tensor": TensorSync}[way](hf_dir, BUCKET, **kwargs)


def push(sync, student, url, version, post=None, tp=1):
    """Weights to the server; what it and the student say then, and the server's version."""
    from megatron_taopd.step.scoring import sequence_log_probs

    first = dist.get_rank() == 0
    replica = Replica(url, tp)
    sync._client = Client(post)  # of whichever rank is the server's source
    ours = (sync._client, [replica]) if first else (None, None)
    assert sync.push(*ours, Repeatable(student.named_tensors), version) == {}
    trainer = sequence_log_probs(student, SEQUENCES, 16)
    if not first:
        return None, trainer, None
    engine = asyncio.run(probe_replica(post or send, replica, SEQUENCES))
    info = httpx.get(f"{url}/model_info", timeout=TIMEOUT_S).json()
    return engine, trainer, info["weight_version"]


def there_and_back(student, way, url, directory):
    sync = make_sync(way, directory, student.hf_dir)
    states = []
    for version, change in enumerate([restore, perturb, restore], start=1):
        change(student)
        states.append(push(sync, student, url, version))
    return states


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("way", WAYS)
def test_server_has_the_students_weights(server, tmp_path, way, tp, pp):
    ranks = run_ranks(
        2, on_student, there_and_back, tp, pp, torch.float32, way, server.url, str(tmp_path)
    )
    (engine, trainer, versions), (_, other, _) = (zip(*states, strict=True) for states in ranks)
    for mine, theirs in zip(trainer, other, strict=True):
        assert torch.equal(mine, theirs)
    for ours, servers in zip(trainer, engine, strict=True):
        torch.testing.assert_close(servers, ours, atol=1e-4, rtol=0)
    assert (engine[1] - engine[0]).abs().max() > 0.1
    assert torch.equal(engine[2], engine[0])
    assert versions == ("1", "2", "3")
    [answer] = generate(server.url, [[5]], {"max_new_tokens": 1})
    assert answer["meta_info"]["weight_version"] == "3"
    assert list(tmp_path.iterdir()) == []


def test_experts_of_several_ranks_reach_a_server(tmp_path):
    """Each rank has half of them; the server has one tensor for all of a layer."""
    student, sync_dir = tmp_path / "student", tmp_path / "sync"
    config = copy(CONFIGS["qwen3_moe"])
    config.vocab_size, config.eos_token_id = VOCABULARY, 1
    save_random(config, student)
    AutoTokenizer.from_pretrained(STUDENT).save_pretrained(student)
    on_experts = partial(on_student, hf_dir=str(student), ep=2)
    sync_dir.mkdir()
    with serve(student) as server:
        for way in WAYS:
            rest = there_and_back, 1, 1, torch.float32, way, server.url, str(sync_dir)
            states, _ = run_ranks(2, on_experts, *rest)
            engine, trainer, _ = zip(*states, strict=True)
            for ours, servers in zip(trainer, engine, strict=True):
                torch.testing.assert_close(servers, ours, atol=1e-4, rtol=0)
            assert (engine[1] - engine[0]).abs().max() > 0.1


@pytest.mark.parametrize("way", WAYS)
def test_bf16_student(server, tmp_path, way):
    """The server computes in fp32 with the bf16 weights, bit for bit."""
    [states, _] = run_ranks(
        2, on_student, there_and_back, 2, 1, torch.bfloat16, way, server.url, str(tmp_path)
    )
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.bfloat16).float()
    torch.testing.assert_close(states[0][0], log_probs(model), atol=1e-4, rtol=0)
    for engine, trainer, _ in states:
        assert (engine - trainer).abs().mean() < 0.1
    assert (states[1][0] - states[0][0]).abs().mean() > 0.2


@torch.no_grad()
def log_probs(model):
    values = []
    for tokens in SEQUENCES:
        rows = log_softmax(model(torch.tensor([tokens])).logits[0, :-1].float(), -1)
        values.append(rows.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0])
    return torch.cat(values)


def students_log_probs(student):
    from megatron_taopd.step.scoring import sequence_log_probs

    return sequence_log_probs(student, SEQUENCES, 16)


def test_sequence_log_probs_under_data_parallelism():
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    for values in run_ranks(2, on_student, students_log_probs, 1, 1, torch.float32):
        torch.testing.assert_close(values, log_probs(model), atol=1e-4, rtol=0)


# What fails


def push_nothing(student, url):
    """The updates get lost on the way; whether the probe notices."""
    sync = TensorSync(STUDENT, BUCKET)
    before = push(sync, student, url, 1)
    perturb(student)

    async def loses(replica, path, payload, timeout):
        if path.startswith("/update_weights"):
            return {}
        return await send(replica, path, payload, timeout)

    after = push(sync, student, url, 2, loses)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=f"{url}: the weight update had no effect"):
            check_probe(url, after[0], after[1], before[0], before[1], max_gap=100.0)
        with pytest.raises(RuntimeError, match=r"mean \|Δ log p\| .*max_gap is 0.3"):
            check_probe(url, after[0], after[1], before[0], before[1], max_gap=0.3)
        check_probe(url, before[0], before[1], None, None, max_gap=1e-4)


def test_probe_notices_an_update_without_effect(server):
    run_ranks(2, on_student, push_nothing, 2, 1, torch.float32, server.url)


def released(student, url):
    seen = []

    async def records(replica, path, payload, timeout):
        seen.append((path.partition("?")[0], payload.get("tags")))
        return await send(replica, path, payload, timeout)

    sync = TensorSync(STUDENT, 10**9)
    ours = (Client(records), [Replica(url)]) if dist.get_rank() == 0 else (None, None)
    sync.release(*ours)
    engine, trainer, _ = push(sync, student, url, 1, records)
    push(sync, student, url, 2, records)
    return engine, trainer, seen


def test_release_and_order_of_requests(server):
    [(engine, trainer, seen), _] = run_ranks(
        2, on_student, released, 2, 1, torch.float32, server.url
    )
    torch.testing.assert_close(engine, trainer, atol=1e-4, rtol=0)
    ordinary = [
        ("/pause_generation", None),
        ("/update_weights_from_tensor", None),
        ("/flush_cache", None),
        ("/update_weight_version", None),
        ("/continue_generation", None),
    ]
    probes = [("/generate", None)] * len(SEQUENCES)
    cache, weights = ["kv_cache", "cuda_graph"], ["weights"]
    assert seen == [
        ("/pause_generation", None),
        ("/flush_cache", None),
        ("/release_memory_occupation", weights + cache),
        ordinary[0],
        ("/resume_memory_occupation", weights),
        *ordinary[1:4],
        ("/resume_memory_occupation", cache),
        ordinary[4],
        *probes,
        *ordinary,
        *probes,
    ]


def drop(tensors):
    del tensors[7]


def add(tensors):
    tensors.append(("model.layers.9.bias", torch.zeros(3)))


def repeat(tensors):
    tensors.append(tensors[0])


def reshape(tensors):
    tensors[-1] = (tensors[-1][0], torch.zeros(3))


def narrow(tensors):
    tensors[-1] = (tensors[-1][0], tensors[-1][1].bfloat16())


DAMAGE = {
    drop: "missing from the weight update, 1 in all",
    add: "model.layers.9.bias: the servers' model has no such weight",
    repeat: "twice in one weight update",
    reshape: r"shape \[3\]; the servers' model has \[",
    narrow: "torch.bfloat16 among weights of torch.float32",
}


def push_damaged(student, damage, way, once):
    """What every rank says, and the requests that were made."""
    seen = []

    async def records(replica, path, payload, timeout):
        seen.append(path.partition("?")[0])
        return {}

    tensors = list(student.named_tensors())
    damage(tensors)
    ours = (
        (Client(records), [Replica("http://127.0.0.1:9")]) if dist.get_rank() == 0 else (None, None)
    )
    with pytest.raises(ValueError) as error:
        make_sync(way, "/nowhere").push(*ours, iter(tensors) if once else tensors, 1)
    return str(error.value), seen


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("way", WAYS)
def test_wrong_tensors_are_refused_before_anything_is_sent(damage, way):
    for message, seen in run_ranks(
        2, on_student, push_damaged, 1, 2, torch.float32, damage, way, 0
    ):
        assert seen == []
        assert re.search(DAMAGE[damage], message)


def test_wrong_tensors_of_a_generator_leave_the_servers_paused():
    [(_, seen), _] = run_ranks(
        2, on_student, push_damaged, 1, 2, torch.float32, reshape, "tensor", 1
    )
    assert seen[0] == "/pause_generation"
    assert set(seen[1:]) == {"/update_weights_from_tensor"}


def fail_somewhere(student, failing, way, directory):
    async def fails(replica, path, payload, timeout):
        if path.partition("?")[0] == failing:
            raise RuntimeError(f"{replica.url}{path}: no")
        return {}

    ours = (Client(fails), [Replica("http://a"), Replica("http://b")])
    with pytest.raises(RuntimeError) as error:
        sync = make_sync(way, directory)
        sync.push(*(ours if dist.get_rank() == 0 else (None, None)), student.named_tensors(), 1)
    return str(error.value)


@pytest.mark.parametrize(
    ("failing", "way"),
    [
        ("/pause_generation", "tensor"),
        ("/update_weights_from_tensor", "tensor"),
        ("/update_weights_from_disk", "disk"),
        ("/update_weight_version", "disk"),
        ("/continue_generation", "tensor"),
    ],
)
def test_a_failure_is_every_ranks(tmp_path, failing, way):
    failed = run_ranks(
        2, on_student, fail_somewhere, 2, 1, torch.float32, failing, way, str(tmp_path)
    )
    assert all(f"http://a{failing}: no" in message for message in failed)
    assert list(tmp_path.iterdir()) == []


def test_no_space_is_every_ranks(tmp_path):
    (tmp_path / "file").touch()
    for message in run_ranks(
        2, on_student, fail_somewhere, 2, 1, torch.float32, None, "disk", str(tmp_path / "file")
    ):
        assert "Not a directory" in message


# Parts


def test_buckets():
    shapes = {"a": (3,), "b": (2, 2), "c": (100,), "d": (1,), "e": ()}
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    filled = list(buckets(checked(tensors.items(), shapes), shapes, 14, keep=True))
    assert [[e.name for e in b.entries] for b in filled] == [["a", "b"], ["c"], ["d", "e"]]
    for bucket in filled:
        for name, values in bucket.tensors():
            assert torch.equal(values, tensors[name]) and values.shape == shapes[name]
    assert str(filled[0]) == "a and 1 others" and str(filled[1]) == "c"
    bare = list(buckets(tensors.items(), shapes, 14, keep=False))
    assert [b.entries for b in bare] == [b.entries for b in filled]
    assert all(b.data is None for b in bare)


def test_device_handles(monkeypatch):
    """The arguments that rebuild a CUDA tensor, with the device as SGLang wants it."""
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert names[torch_internals._REDUCED_DEVICE] == "storage_device"
    monkeypatch.setattr(torch_internals, "reduce_tensor", lambda tensor: (list, tuple(range(9))))
    properties = SimpleNamespace(uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    handle = tensor.DeviceHandle(torch.zeros(2))
    assert handle.__reduce__() == (list, (0, 1, 2, 3, 4, 5, "GPU-1", 7, 8))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert tensor.device_name(1) == 6
    replica = Replica("http://a", 2, (6, 4))
    assert tensor.colocated(replica, {4: "x", 6: "y"}) == ["y", "x"]
    with pytest.raises(ValueError, match="no trainer rank on its GPU 6"):
        tensor.colocated(replica, {4: "x"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-ab12,MIG-3")  # as a scheduler sets them
    assert [tensor.device_name(index) for index in (0, 1)] == ["GPU-ab12", "MIG-3"]
    replica = Replica("http://a", 1, ("MIG-3",))
    assert tensor.colocated(replica, {"GPU-ab12": "x", "MIG-3": "y"}) == ["y"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert tensor.device_name(1) == 1


def test_pickle_needs_no_class_of_ours():
    entry = Entry("a", torch.Size([2]), torch.bfloat16, 0, 4)
    text = tensor.pickled(Bucket([entry], None), torch.arange(4).byte())
    read = pickle.loads(base64.b64decode(text))
    assert read["flattened_tensor"].tolist() == [0, 1, 2, 3]
    [meta] = read["metadata"]
    assert (meta.name, meta.shape, meta.dtype) == ("a", (2,), torch.bfloat16)
    assert (meta.start_idx, meta.end_idx, meta.numel) == (0, 4, 4)
    assert b"megatron_taopd" not in base64.b64decode(text)


def test_local_address():
    assert local_address("http://127.0.0.1:3") == "127.0.0.1"


def test_probe_ignores_what_rounding_hides():
    engine, trainer = torch.tensor([-1.0, -2.0]), torch.tensor([-1.01, -2.01])
    check_probe("a", engine, trainer + 1e-4, engine, trainer, 0.3)
    with pytest.raises(RuntimeError, match="no effect"):
        check_probe("a", engine, trainer + 0.02, engine, trainer, 0.3)
    with pytest.raises(RuntimeError, match="nan"):
        check_probe("a", engine * torch.nan, trainer, engine, trainer, 0.3)


# Servers in trouble, beside others that are well


class Device:
    """As much of CUDA as sending needs: transfers run by themselves; a stream that was told to wait
    for one waits till it has ended, and so does whoever waits for the stream or for the device."""

    is_cuda, device = True, torch.device("cuda", 0)  # of a bucket's bytes

    def __init__(self, monkeypatch):
        self.running, self.default_stream_waits = set(), set()
        for name, fake in {
            "set_device": lambda device: None,
            "synchronize": lambda *_: self.wait_for(self.running),
            "current_stream": lambda *_: SimpleNamespace(synchronize=self.finish_stream),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def wait_for(self, transfers):
        while transfers & self.running:
            time.sleep(0.01)

    def finish_stream(self):
        self.wait_for(self.default_stream_waits)


class Backend:
    """The trainer's end of a group with one server on this device."""

    def __init__(self, device, alive):
        self.device, self.alive, self.aborted = device, alive, threading.Event()

    def broadcast(self, tensors, options):
        self.device.running.add(self)
        if self.alive:
            threading.Timer(0.3, lambda: self.device.running.discard(self)).start()
        return self

    def is_completed(self):
        return self not in self.device.running

    def wait(self):
        self.device.default_stream_waits.add(self)

    def abort(self):
        self.device.running.discard(self)
        self.aborted.set()


@pytest.fixture
def alone():
    """A world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sync_with(monkeypatch, timeout_s, **alive):
    """(sync, its groups with these servers, the servers) on a fake device."""
    device = Device(monkeypatch)
    sync = DistributedSync(STUDENT, BUCKET, timeout_s)
    for name, is_alive in alive.items():
        sync._groups[f"http://{name}"] = _Group(name, Backend(device, is_alive), "7")
    bucket = Bucket([Entry("a", torch.Size([2]), torch.bfloat16, 0, 4)], device)
    sync._own = [Replica(f"http://{name}") for name in alive]
    return sync, dict(sync._groups), sync._own, bucket


def send_all(sync, client, replicas, bucket):
    """Send one bucket; what is said of the servers that fell out, by url."""
    sync._client, sync._own, sync._lost = client, replicas, {}
    sync._send(None, None, bucket, " (weights 1, a)")
    sync._close()
    return sync._lost


def dies_of(*names, after=0.05):
    async def post(replica, path, payload, timeout):
        await asyncio.sleep(after)
        if replica.url.removeprefix("http://") in names:
            raise RuntimeError(f"{replica.url}{path}: connection reset")
        return {}

    return post


def test_a_dead_server_holds_up_no_push_and_others_are_not_blamed(monkeypatch, alone):
    """On a GPU that they share: the dead one's transfer runs till it is aborted."""
    sync, groups, replicas, bucket = sync_with(monkeypatch, 600, first=True, dead=False, last=True)
    started = time.monotonic()
    lost = send_all(sync, Client(dies_of("dead")), replicas, bucket)
    assert time.monotonic() - started < 60
    path = "/update_weights_from_distributed"
    assert lost == {"http://dead": f"http://dead{path}: connection reset (weights 1, a)"}
    assert groups["http://dead"].backend.aborted.wait(60)
    assert sync._groups == {url: groups[url] for url in ("http://first", "http://last")}
    assert not any(g.backend.aborted.is_set() for g in sync._groups.values())
    going = [replicas[0], replicas[2]]
    assert send_all(sync, Client(dies_of()), going, bucket) == {}  # and so they go on


def test_every_server_that_failed_is_named(monkeypatch, alone):
    sync, _, replicas, bucket = sync_with(monkeypatch, 600, a=False, b=True, c=False)
    sync._lost = send_all(sync, Client(dies_of("a", "c")), replicas, bucket)
    assert list(sync._lost) == ["http://a", "http://c"]
    assert sync._going(replicas) == [replicas[1]]
    with pytest.raises(RuntimeError, match=r"^http://a/.* reset .*; http://c/[^;]* reset [^;]*$"):
        sync._going([replicas[0], replicas[2]])


def test_a_server_that_only_stays_silent_is_given_up_after_the_time_out(monkeypatch, alone):
    sync, groups, replicas, bucket = sync_with(monkeypatch, 1.0, hung=False, well=True)
    monkeypatch.setattr(distributed, "GRACE_S", 0.1)
    lost = send_all(sync, Client(dies_of()), replicas, bucket)
    assert list(lost) == ["http://hung"]
    assert lost["http://hung"].startswith("http://hung: the weight transfer failed: no end")
    assert groups["http://hung"].backend.aborted.wait(60)
    assert list(sync._groups) == ["http://well"]


def test_those_that_joined_are_known_if_another_does_not(monkeypatch, alone):
    sync = DistributedSync(STUDENT, BUCKET, 600)
    monkeypatch.setattr(distributed, "join_group", lambda store, name, *_: name)
    replicas = [Replica("http://127.0.0.1:1"), Replica("http://127.0.0.1:2")]
    sync._prepare(Client(dies_of("127.0.0.1:1")), replicas, 1)
    [(url, why)] = sync._lost.items()
    assert url == "http://127.0.0.1:1"
    assert why == f"{url}/init_weights_update_group: connection reset"
    assert list(sync._groups) == ["http://127.0.0.1:2"]


def test_memory_that_others_gave_back_is_remembered_if_one_fails(alone):
    sync = TensorSync(STUDENT, BUCKET)
    with pytest.raises(RuntimeError, match=r"^http://b/pause_generation: connection reset$"):
        sync.release(Client(dies_of("b")), [Replica(f"http://{name}") for name in "abc"])
    assert sync._without_weights == sync._without_cache == {"http://a", "http://c"}


def test_only_a_whole_checkpoint_has_the_whole_time_out(alone, tmp_path):
    """A server whose scheduler hangs, on another machine, is found by time-outs alone."""
    timeouts = {}

    async def records(replica, path, payload, timeout):
        timeouts[path.partition("?")[0]] = timeout
        return {"meta_info": {"weight_version": "1"}}

    for way in ("tensor", "disk"):
        sync = make_sync(way, tmp_path)
        tensors = [(name, torch.zeros(shape)) for name, shape in sync.shapes.items()]
        sync.push(Client(records), [Replica("http://a")], tensors, 1)
    sync.release(Client(records), [Replica("http://a")])
    assert timeouts.pop("/update_weights_from_disk") == 600
    assert 120 <= timeouts.pop("/update_weights_from_tensor") < 120.1  # of at most 150,000 bytes
    assert set(timeouts.values()) == {60}
    bucket = Bucket([Entry("a", torch.Size([1]), torch.bfloat16, 0, 512 << 20)], None)
    assert sync._time_for(bucket) == pytest.approx(120 + 53.7, abs=0.1)


DEALS = {  # by hand: nodes of the ranks, urls → ranks
    "a node each, rank 0's last": ([0, 1, 2, 3], ["a", "b", "c", "d"], [1, 2, 3, 0]),
    "two servers on each rank": ([0, 0], ["a", "b", "c", "d"], [1, 0, 1, 0]),
    "one on each node first": ([0, 0, 0, 3, 3, 3], ["a", "b", "c", "d", "e"], [2, 5, 1, 4, 3]),
    "those on the loopback address": (
        [0, 0, 2, 2],
        ["127.0.0.1:1", "a", "localhost:2", "[::1]:3"],
        [1, 3, 0, 1],
    ),
}


@pytest.mark.parametrize("case", DEALS)
def test_servers_are_dealt_over_the_nodes(case):
    nodes, hosts, ranks = DEALS[case]
    urls = [f"http://{host}" for host in hosts]
    assert deal(urls, nodes) == dict(zip(urls, ranks, strict=True))
    assert deal(urls[1:], nodes, deal(urls, nodes)) == deal(urls, nodes)


# Several servers, each with a source of its own among the ranks


def push_to_many(student, urls):
    """Twice; of each push what fell out and its seconds, and the servers of this rank's groups."""
    sync, seen = DistributedSync(STUDENT, BUCKET), []
    client, targets = Client(), [Replica(url) for url in urls]
    for version in (1, 2):
        perturb(student)
        started = time.monotonic()
        leads = dist.get_rank() == 0
        tensors = Repeatable(student.named_tensors)
        lost = sync.push(client if leads else None, targets if leads else None, tensors, version)
        seen.append((lost, time.monotonic() - started, sorted(sync._groups)))
        targets = [target for target in targets if target.url not in lost]
    weights = {name: tensor.clone() for name, tensor in student.named_tensors()}
    return seen, weights


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_every_server_gets_the_weights_from_a_rank_of_its_own(tp, pp):
    """One of them ends with the second push's third bucket: the others do not notice."""
    with ExitStack() as stack:
        receivers = [stack.enter_context(Receiver()) for _ in range(4)]
        urls = [receiver.url for receiver in receivers]
        lost_one = receivers[1]
        buckets = len(list(buckets_of_student()))
        lost_one.dies_at = buckets + 3
        ranks = run_ranks(4, on_student, push_to_many, tp, pp, torch.float32, urls)
    for rank, (seen, _) in enumerate(ranks):
        (first, _, groups), (second, seconds, left) = seen
        assert first == {} and groups == [urls[3 - rank]]  # rank 0 is the last to be dealt one
        assert list(second) == [lost_one.url]
        path = "/update_weights_from_distributed: "
        assert second[lost_one.url].startswith(lost_one.url + path)
        assert "(weights 2, model." in second[lost_one.url]
        assert seconds < patience(10)
        assert left == [url for url in groups if url != lost_one.url]
    weights = ranks[0][1]
    for receiver in receivers:
        assert len({*receiver.sources}) == len(receiver.sources) == 1
        if receiver is lost_one:
            assert receiver.version == "1" and receiver.buckets == buckets + 3
            continue
        assert receiver.version == "2" and receiver.buckets == 2 * buckets
        assert receiver.tensors.keys() == weights.keys()
        for name, expected in weights.items():
            assert torch.equal(receiver.tensors[name], expected), name
    assert len({source for receiver in receivers for source in receiver.sources}) == 4


def buckets_of_student():
    shapes = TensorSync(STUDENT, BUCKET).shapes
    tensors = ((name, torch.empty(shape)) for name, shape in shapes.items())
    return buckets(tensors, shapes, BUCKET, keep=False)


def test_the_next_bucket_is_gathered_while_this_one_is_sent(alone):
    """The first bucket arrives when the second is there, and the second does not leave before."""
    gathered, second_left, sent = threading.Event(), threading.Event(), []

    class Slow(DistributedSync):
        def _send_to(self, replica, bucket):
            if bucket.entries[0].name != first:
                second_left.set()
            else:
                assert gathered.wait(patience(10))
                assert not second_left.wait(0.2)
            sent.append(str(bucket))

    def tensors():
        for name, shape in sync.shapes.items():
            if name == third:
                gathered.set()
            yield name, torch.zeros(shape)

    sync, all_of_them = Slow(STUDENT, BUCKET), list(buckets_of_student())
    first, third = (all_of_them[number].entries[0].name for number in (0, 2))
    sync._own = [Replica("http://127.0.0.1:9")]
    for bucket in buckets(tensors(), sync.shapes, BUCKET, keep=True):
        sync._send(None, None, bucket)
    sync._close()
    assert sync._lost == {} and sent == list(map(str, all_of_them))


def test_the_probe_asks_from_the_first_sync_on():
    """Of the prompts those with a token to ask about, and all servers at a time."""
    prompts = [[7], *([i] * (i + 50) for i in range(9))]
    probe = Probe(lambda sequences: torch.zeros(4 * 47), 0.3, prompts)
    assert probe.sequences == [[i] * 48 for i in range(4)]
    assert Probe(lambda sequences: torch.zeros(1), 0.3, [[7], [8, 9]]).sequences == [[8, 9]]


# A server's end


KEPT = {}  # on each rank, from one call to the next


def alive(process):
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def push_while_it_dies(student, url, pid):
    """The server is killed with the second bucket on its way; what every rank says, and when."""
    seen = []

    async def deadly(replica, path, payload, timeout):
        seen.append(path)
        request = asyncio.ensure_future(send(replica, path, payload, timeout))
        if path.startswith("/update_weights") and seen.count(path) == 2:
            await asyncio.sleep(0.002)
            processes = psutil.Process(pid).children(recursive=True)
            os.kill(pid, signal.SIGTERM)  # its supervisor kills all of it
            while any(map(alive, processes)):
                await asyncio.sleep(0.01)
        return await request

    KEPT["sync"] = sync = DistributedSync(STUDENT, BUCKET)
    push(sync, student, url, 1)
    perturb(student)
    started = time.monotonic()
    try:
        push(sync, student, url, 2, deadly)
    except RuntimeError as error:
        return str(error), time.monotonic() - started
    return None


def push_again(student, url, tp):
    """To a new server at the old place, twice; before the second push it forgets its group, too."""
    states = []
    perturb(student)
    for version in (3, 4):
        states.append(push(KEPT["sync"], student, url, version, tp=tp))
        dist.barrier()  # rank 0 asks the server, and another one is its source
        if version == 3 and KEPT["sync"]._groups:
            [group] = KEPT["sync"]._groups.values()
            forget = {"group_name": group.name}
            version_of_its_own = {"new_version": "default"}
            asyncio.run(send(Replica(url), "/destroy_weights_update_group", forget, TIMEOUT_S))
            asyncio.run(send(Replica(url), "/update_weight_version", version_of_its_own, TIMEOUT_S))
        dist.barrier()
        restore(student)
    return states


def test_killed_and_restarted_server(server, tmp_path, monkeypatch):
    """The last test: it ends the server of the others. The next one has two workers."""
    failed = run_ranks(
        2, on_student, push_while_it_dies, 2, 1, torch.float32, server.url, server.pid
    )
    for message, seconds in failed:
        assert f"{server.url}/update_weights_from_distributed" in message
        assert "(weights 2, model." in message
        assert seconds < TIMEOUT_S / 2  # it is not by its time-out that the end is noticed
    server.stop()
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    with serve(STUDENT, log=tmp_path / "log", port=server.port, tp=2) as again:
        [states, _] = run_ranks(2, on_student, push_again, 2, 1, torch.float32, again.url, 2)
    for engine, trainer, _ in states:
        torch.testing.assert_close(engine, trainer, atol=1e-4, rtol=0)
    assert [version for _, _, version in states] == ["3", "4"]
