"""What is said of servers, without any: who differs, who is lost, how they were started."""

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from support.patience import patience

from megatron_taopd.rollout.sglang import SGLangEngine, Updates
from megatron_taopd.serving import client, identity
from megatron_taopd.serving import replica as module
from megatron_taopd.serving.client import Replicas
from megatron_taopd.serving.identity import agreed, probe_tokens, remarks
from megatron_taopd.serving.model import ServedModel
from megatron_taopd.serving.protocol import Unreachable, all_of
from megatron_taopd.serving.replica import Replica, State
from megatron_taopd.serving.server import Server, Workers

MODEL = ServedModel("model", {"vocab_size": 100}, 40)


def servers(*dtypes):
    return [SimpleNamespace(url=f"http://{i}", dtype=dtype) for i, dtype in enumerate(dtypes)]


# Replicas of one model


def test_the_same_tokens_are_asked_about_in_every_run():
    tokens = np.array(probe_tokens(MODEL))
    assert tokens.shape == (4, 32) and tokens.min() >= 0 and 90 < tokens.max() < 100
    assert np.array_equal(tokens, probe_tokens(MODEL))
    assert np.array(probe_tokens(MODEL._replace(longest=8))).shape == (4, 7)


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_the_one_that_differs_is_named(odd):
    said = [np.full(10, -3.0) for _ in range(3)]
    said[odd] = said[odd] + 0.06
    rest = sorted({0, 1, 2} - {odd})
    message = (
        f"^http://{odd}: other weights than http://{rest[0]} and 1 others: .* by 0.06 on average"
    )
    with pytest.raises(ValueError, match=message):
        agreed(servers(*["bfloat16"] * 3), said)


def test_of_two_both_are_named():
    with pytest.raises(ValueError, match=r"^http://1: other weights than http://0: .* 0\.001$"):
        agreed(servers("float32", "float32"), [np.zeros(4), np.full(4, 0.0011)])


def test_rounding_is_no_difference():
    said = [np.zeros(4), np.full(4, 0.045), np.full(4, -0.0005)]
    found, log_probs = agreed(servers(*["bfloat16"] * 3), said)
    assert found.url == "http://0" and np.array_equal(log_probs, said[0])
    with pytest.raises(ValueError, match="http://1"):
        agreed(servers(*["float32"] * 3), said)
    agreed(servers("float32", "bfloat16", "float32"), said)  # the coarser of them decides


def test_no_numbers_are_no_agreement():
    with pytest.raises(ValueError, match=r"^http://1: log-probabilities that are not finite$"):
        agreed(servers("bfloat16", "bfloat16"), [np.zeros(2), np.array([0.0, np.nan])])


# How a server was started


def test_remarks():
    plain = {
        "dtype": "bfloat16",
        "quantization": None,
        "kv_cache_dtype": "auto",
        "enable_lora": None,
        "lora_paths": None,
        "json_model_override_args": "{}",
    }
    assert remarks(plain, "bfloat16") == remarks(plain, None) == remarks({}, "float32") == []
    for key, value, said in (
        ("dtype", "float16", "computes in float16, the run in bfloat16"),
        ("quantization", "fp8", "has quantised weights (fp8)"),
        ("kv_cache_dtype", "fp8_e5m2", "keeps keys and values in fp8_e5m2"),
        ("enable_lora", True, "takes LoRA adapters, of which requests here name none"),
        ("lora_paths", ["a"], "takes LoRA adapters, of which requests here name none"),
        ("json_model_override_args", '{"a": 1}', 'overrides config.json: {"a": 1}'),
    ):
        assert remarks(plain | {key: value}, "bfloat16") == [said]


def checked(monkeypatch, info, **kwargs):
    """What `check` says of a server that gives this /model_info."""
    replicas = Replicas([], MODEL, **kwargs)
    answers = {"/model_info": {"model_path": "/far/model", **info}, "/server_info": {}}

    async def get(path):
        return answers[path]

    async def nothing(*_, **__):
        return None

    monkeypatch.setattr(Replica, "post", nothing)
    monkeypatch.setattr(identity, "vocab_size", nothing)
    monkeypatch.setattr(identity, "reports_raw", nothing)
    replica = Replica("http://a", replicas.shared)
    replica.get = get
    try:
        replicas.run(replica.check())
    finally:
        replicas.close()


def test_servers_that_cannot_be_used(monkeypatch):
    checked(monkeypatch, {})
    checked(monkeypatch, {"load_format": "dummy"})  # it will be given weights
    with pytest.raises(ValueError, match=r"^http://a has random weights \(--load-format dummy\)$"):
        checked(monkeypatch, {"load_format": "dummy"}, fixed_weights=True)
    with pytest.raises(ValueError, match=r"^http://a embeds, it does not generate"):
        checked(monkeypatch, {"is_generation": False})
    with pytest.raises(ValueError, match=r"^http://a serves another .* found path /far/other"):
        checked(monkeypatch, {"model_path": "/far/other"})


# Several at a time


def test_all_are_waited_for_and_every_failure_is_told():
    ended = []

    async def one(name, seconds, error=None):
        await asyncio.sleep(seconds)
        ended.append(name)
        if error:
            raise error
        return name

    assert asyncio.run(all_of([one("a", 0.02), one("b", 0)])) == ["a", "b"]
    with pytest.raises(ValueError, match=r"^x$"):
        asyncio.run(all_of([one("c", 0, ValueError("x")), one("d", 0.05)]))
    assert ended[-1] == "d"
    for first, second in ((ValueError, RuntimeError), (RuntimeError, ValueError)):
        with pytest.raises(first, match=r"^x; y$"):
            asyncio.run(all_of([one("e", 0.01, first("x")), one("f", 0, second("y"))]))
    for other, kind in ((Unreachable, Unreachable), (RuntimeError, RuntimeError)):
        with pytest.raises(RuntimeError, match=r"^x; y$") as raised:
            asyncio.run(all_of([one("g", 0, Unreachable("x")), one("h", 0, other("y"))]))
        assert raised.type is kind


# Signs of life


@pytest.fixture
def worker():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as process:
        yield psutil.Process(process.pid)
        process.kill()


def server_with(worker):
    server = Server.__new__(Server)
    server._process = SimpleNamespace(poll=lambda: None)
    server.workers = Workers(((worker.pid, worker.create_time(), "sglang::scheduler_TP1"),))
    return server


def test_a_server_whose_process_is_stopped_or_gone(worker):
    server = server_with(worker)
    assert server.trouble() is None
    said = f"its sglang::scheduler_TP1 (process {worker.pid}) is "
    worker.send_signal(signal.SIGSTOP)
    while worker.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    assert server.trouble() == said + "stopped"
    worker.send_signal(signal.SIGCONT)
    while worker.status() == psutil.STATUS_STOPPED:
        time.sleep(0.01)
    assert server.trouble() is None
    worker.kill()
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert server.trouble() == said + "dead"


async def connected():
    """What `Replica.connect` does where there is a way to the server."""


def posted(monkeypatch, sign, own=None, connect=connected):
    """What a request says that is never answered, while a server gives this sign of life."""
    monkeypatch.setattr(module, "PULSE_S", 0.01)
    replicas = Replicas([], MODEL)

    async def never(*_, **__):
        await asyncio.sleep(1000)

    replica, replicas.shared.http.post = Replica("http://a", replicas.shared), never
    replica.server = own
    replica.fetch, replica.connect = sign, connect
    try:
        with pytest.raises(RuntimeError) as caught:
            replicas.run(replicas.post(replica, "/pause", {}, timeout=60 if own else 3))
        return str(caught.value)
    finally:
        replicas.close()


def test_a_request_to_a_server_out_of_reach_ends(monkeypatch):
    async def unreachable(*_):
        raise RuntimeError("http://a/model_info: no answer within 30 s")

    message = posted(monkeypatch, unreachable)
    assert (
        message == "http://a/pause: the server is lost: http://a/model_info: no answer within 30 s"
    )


def test_a_server_that_misses_one_sign_of_life_is_waited_for(monkeypatch):
    asked = []

    async def every_other(*_):
        asked.append(1)
        if len(asked) % 2:
            raise RuntimeError("missed")
        return SimpleNamespace(status_code=500)  # an answer, whatever it says

    assert posted(monkeypatch, every_other) == "http://a/pause: no answer within 3 s"
    assert len(asked) > 4


def test_a_server_whose_packets_are_dropped_is_noticed_within_10_s(monkeypatch):
    """Its kernel answers no more, as that of a socket with a full queue; nothing is refused."""
    assert 2 * (module.PULSE_S + module.CONNECT_S) < 10
    monkeypatch.setattr(module, "CONNECT_S", 0.2)

    async def well(*_):  # on a connection that is there
        return SimpleNamespace(status_code=200)

    async def connect():
        await Replica.connect(replica)

    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        replica = SimpleNamespace(url=f"http://127.0.0.1:{listener.getsockname()[1]}")
        for _ in range(8):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        message = posted(monkeypatch, well, connect=connect)
    assert message.endswith(f"the server is lost: {replica.url}: no connection within 0.2 s")


def test_the_table_of_processes_tells_of_our_own(monkeypatch):
    async def well(*_):
        return SimpleNamespace(status_code=200)

    own = SimpleNamespace(
        trouble=lambda: "its sglang::scheduler (process 7) is dead", url="http://a"
    )
    message = posted(monkeypatch, well, own)
    assert message.endswith("the server is lost: its sglang::scheduler (process 7) is dead")


# The end


def test_a_task_that_has_lost_its_cancellation_holds_up_no_end():
    """As one whose `asyncio.wait_for` was done in the moment in which it was cancelled."""
    replicas, lost = Replicas([], MODEL), []

    async def loses_one():
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            lost.append(1)
        await asyncio.sleep(1000)

    task = replicas.spawn(loses_one())
    replicas.run(asyncio.sleep(0))
    closing = threading.Thread(target=replicas.close, daemon=True)
    closing.start()
    closing.join(patience(20))
    assert not closing.is_alive() and lost == [1] and task.cancelled()


# Pushes of weights that a server falls out of


class Sync:
    """Gives weights to the servers but those that are named."""

    def __init__(self):
        self.without: set[str] = set()
        self.kind = RuntimeError

    def push(self, client, targets, named_tensors, version):
        lost = {r.url: f"{r.url}: no way\nat all" for r in targets if r.url in self.without}
        if len(lost) == len(targets):
            raise self.kind("; ".join(lost.values()))
        return lost


def test_a_push_to_servers_that_were_out_of_reach_for_a_moment_is_made_again(monkeypatch):
    """They are well when they are looked at; a server that is well and refuses ends the run."""
    replicas, sync = Replicas([], MODEL), Sync()
    (only,) = replicas.all = [Replica("http://a", replicas.shared)]
    only.state = State.READY

    async def well(replica):
        return True

    monkeypatch.setattr(client, "is_healthy", well)
    engine = SGLangEngine(replicas, MODEL, 100, [1], Updates(sync, lambda: iter(())))
    try:
        sync.without, sync.kind = {only.url}, Unreachable
        engine.update_weights(iter(()), 7)
        assert (only.state, only.version, engine.failed_syncs) == (State.STALE, None, 1)
        sync.without = set()
        engine.resync()
        assert (only.state, only.version, engine.failed_syncs) == (State.READY, 7, 0)

        sync.without = {only.url}
        for _ in range(2):
            engine.resync() if replicas.stale else engine.update_weights(iter(()), 8)
        with pytest.raises(RuntimeError, match="weights of version 8: http://a: no way"):
            engine.resync()  # three in a row

        only.state, engine.failed_syncs, sync.kind = State.READY, 0, RuntimeError
        with pytest.raises(RuntimeError, match="weights of version 9: http://a: no way"):
            engine.update_weights(iter(()), 9)
    finally:
        replicas.close()


def test_a_server_that_falls_out_of_every_push_is_given_up_and_the_others_go_on(caplog):
    replicas, sync = Replicas([], MODEL), Sync()
    first, second = replicas.all = [Replica(f"http://{n}", replicas.shared) for n in "ab"]
    first.state = second.state = State.READY
    engine = SGLangEngine(replicas, MODEL, 100, [1], Updates(sync, lambda: iter(())))

    def push(*without):
        """What is said of a push; who was left out has been looked at since, and waits again."""
        caplog.clear()
        sync.without = {*without}
        if second.state is State.DOWN:
            second.state = State.STALE
        if engine.replicas.stale:
            engine.resync()
        else:
            engine.update_weights(iter(()), 7)
        return [(record.levelname, record.getMessage()) for record in caplog.records]

    fell = (
        "WARNING",
        "http://b fell out of the push of weights 7, the others go on: http://b: no way",
    )
    try:
        with caplog.at_level(logging.INFO, logger="megatron_taopd"):
            for _ in range(2):
                assert push("http://b") == [fell]
                assert second.state is State.DOWN and second.alarm.is_set() and not second.syncing
                assert (first.state, first.version, engine.failed_syncs) == (State.READY, 7, 0)
            assert push() == [] and second.state is State.READY and second.version == 7
            # What it had fallen out of before counts no more.
            assert [push("http://b") for _ in range(2)] == [[fell]] * 2
            assert second.state is State.DOWN
            given_up = ("ERROR", "http://b fell out of 3 pushes in a row; it is given up")
            assert push("http://b") == [fell, given_up]
            assert second.state is State.DEAD and second not in replicas.live
            assert push("http://b") == [] and first.state is State.READY
    finally:
        replicas.close()
