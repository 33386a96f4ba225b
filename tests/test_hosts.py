"""A run over hosts of its own: found by name, cut off, named, started again. tests/faults/hosts.py
does this in every phase, with servers on hosts of theirs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from select import select

import psutil
import pytest
from support import hosts as making
from support.hosts import Hosts, missing, namespaces
from support.patience import known_patience, patience
from support.run_on_hosts import ENDS, ON_S, Run


@pytest.fixture(scope="module", autouse=True)
def can_be_made():
    if reason := missing():
        pytest.skip(reason)


ECHO = """
import socket
server = socket.create_server(("", 5000))
connection, _ = server.accept()
while data := connection.recv(1):
    connection.sendall(data)
"""
ASK = """
import socket, sys, time
print(socket.gethostname(), socket.gethostbyname("two"), open(sys.argv[1]).read(), flush=True)
for _ in iter(int, 1):
    try:
        connection = socket.create_connection(("two", 5000))
        break
    except ConnectionRefusedError:  # it has not begun yet
        time.sleep(0.05)
for line in sys.stdin:
    began = time.monotonic()
    connection.sendall(b"x")
    connection.recv(1)
    print(time.monotonic() - began, flush=True)
"""


def python(host, code, *arguments):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return host.start([sys.executable, "-S", "-c", code, *arguments], **pipes)


def asks(process) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def answers(process) -> float:
    return float(process.stdout.readline())


def test_hosts_have_names_addresses_and_directories_of_their_own(tmp_path):
    (tmp_path / "which").write_text("shared")
    with Hosts("one", "two") as hosts:
        hosts["one"].own_directory(tmp_path)
        (own,) = hosts["one"].own.values()
        (own / "which").write_text("own")
        echo = python(hosts["two"], ECHO)
        ask = python(hosts["one"], ASK, tmp_path / "which")
        assert ask.stdout.readline().split() == ["one", hosts["two"].address, "own"]
        asks(ask)
        answers(ask)

        hosts["two"].cut()
        asks(ask)
        assert not select([ask.stdout], [], [], 1)[0] and ask.poll() is None  # nothing is refused
        hosts["two"].heal()
        answers(ask)  # and nothing is lost: it was sent again

        hosts["two"].degrade(loss=0.0, delay_s=0.1)
        asks(ask)
        assert answers(ask) > 0.2
        hosts["two"].heal()
        asks(ask)
        answers(ask)

        assert [process.pid for process in hosts["two"].processes()] == [echo.pid]
        hosts["two"].power_off()
        assert not hosts["two"].processes()
        asks(ask)
        with pytest.raises(subprocess.TimeoutExpired):
            ask.wait(1)  # nobody was told
    assert ask.poll() is not None or ask.wait(patience(10)) is not None
    assert not own.exists()
    assert not [name for name in namespaces() if f"-{os.getpid()}-" in name]


def test_what_a_killed_program_has_left_goes_at_the_next_start():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from support.hosts import Hosts\n"
        "with Hosts('one') as hosts:\n"
        "    print(hosts['one'].start(['sleep', 'inf']).pid, flush=True)\n"
        "    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(making.WIRE.parent.parent)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    program = subprocess.Popen(command, **pipes)
    sleeper = psutil.Process(int(program.stdout.readline()))
    left = f"{making.PREFIX}-{program.pid}-one"
    making.sweep()
    assert left in namespaces() and sleeper.is_running()
    program.kill()
    program.wait()  # its pipes are still open: the sleeper has them
    making.sweep()
    assert left not in namespaces()
    assert not sleeper.is_running() or sleeper.status() == psutil.STATUS_ZOMBIE


@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_whose_host_is_cut_off_names_it_and_goes_on_when_it_is_back(tmp_path):
    """Both hosts' ranks end with 4 and say who is silent, and where; node.sh starts them again."""
    silent_s = patience(5)
    options = ["rollout.prompts=8", "rollout.max_new_tokens=8", "eval.every=0", "eval.limit=8"]
    options += ["checkpoint.every=1", "log.tensorboard=false", "train.steps=12"]
    options += [f"watchdog.heartbeat_timeout_s={silent_s}"]
    with Hosts("train0", "train1") as hosts:
        run = Run([*hosts.values()], tmp_path / "run", options, {})
        run.begin()
        assert run.wait(lambda: run.newest > 0, ON_S), [n.output() for n in run.nodes]
        assert run.reach("training", 1, random.Random(0))
        hosts["train1"].cut()
        over = run.wait(lambda: all(n.life_is_over for n in run.nodes), silent_s + 30, ended=True)
        assert over is not None, [n.output() for n in run.nodes]
        for node, other in zip(run.nodes, ("train1", "train0"), strict=True):
            assert "status 4; start 2 of 2" in node.output()
            said = ENDS.search(node.output())[1]
            assert f"rank {1 - node.rank} ({other}; in " in said and "silent for" in said
        newest = run.newest
        hosts["train1"].heal()
        run.begin()  # node.sh does
        run.end(ON_S + known_patience(40))
        assert run.went_on_after() == newest
        assert run.newest == 12
        assert not hosts["train0"].processes() and not hosts["train1"].processes()
