"""Names, ports and ranks: whether everything that has to be reached can be, and how fast."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import torch
import torch.distributed as dist

from megatron_taopd.parallel import nccl, platform
from megatron_taopd.parallel.objects import gather
from megatron_taopd.preflight.findings import Finding, error, ok, warning
from megatron_taopd.preflight.machine import driver, versions
from megatron_taopd.serving.ports import PORTS, free_port, is_free

TORCHRUN_PORT = 29500
CONNECT_S = 5.0
GROSS = 3.0  # times slower than the median rank: something is wrong with it
SKEW_S = 2.0


def check_loopback() -> Iterator[Finding]:
    """Check that this host reaches itself, and that its own name leads somewhere."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            socket.create_connection(listening.getsockname(), CONNECT_S).close()
    except OSError as problem:
        yield error(f"127.0.0.1: {problem}", "bring the loopback interface up (ip link set lo up)")
    else:
        yield ok("127.0.0.1 can be reached")
    yield from check_name("this host", socket.gethostname())


def check_name(key: str, host: str) -> Iterator[Finding]:
    """Warn of a host's name that does not resolve; key: how the line calls the host."""
    try:
        socket.getaddrinfo(host, None)
    except OSError as problem:
        yield warning(
            f"{key}: {host} does not resolve ({problem.strerror or problem})",
            "add it to /etc/hosts, or name the interface: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME",
        )


def check_rendezvous() -> Iterator[Finding]:
    """Check the port where ranks meet: torchrun's own, or the one that it would take."""
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", TORCHRUN_PORT))
    if dist.is_initialized() and "RANK" in os.environ:
        yield ok(f"rendezvous: all ranks met at {address}:{port}")
    elif is_free("", port):
        yield ok(f"rendezvous: port {port} is free")
    else:
        yield warning(
            f"rendezvous: port {port} of this host is in use",
            "taopd launch --standalone on one host, --master-port with another one on several",
        )


def check_own_servers(key: str, host: str) -> Iterator[Finding]:
    """Check a port for an SGLang server of the run's own, on an address that is this host's."""
    try:
        port = free_port(host)
    except StopIteration:
        yield error(
            f"{key}.host: {host}: none of 100 ports of {PORTS.start} … {PORTS.stop - 1} can be "
            "listened on",
            "127.0.0.1, or an address of this host; end what holds the ports",
        )
        return
    yield ok(f"{key}.host: {host}: port {port} and others are free")


def check_listening(key: str, host: str, port: int) -> Iterator[Finding]:
    """Check that this process could listen there; key: of the port."""
    if is_free(host, port):
        yield ok(f"{key}: {port} of {host} is free")
    else:
        yield error(
            f"{key}: {port} of {host} cannot be listened on",
            "another port; or an address of this host, if that is none",
        )


def check_urls(key: str, urls: Sequence[str], listening: bool = True) -> Iterator[Finding]:
    """Check that the hosts of servers have an address, and that somebody listens there; whether it
    is the right model is for the run to see.

    Args:
        listening: False where they may still be starting, and a run would wait for them.
    """
    for url in urls:
        parts = urlsplit(url)
        place = (parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme])
        try:
            socket.getaddrinfo(*place)
        except OSError as problem:
            yield error(
                f"{key}.urls: {url}: {parts.hostname} does not resolve "
                f"({problem.strerror or problem})",
                "correct the name, or add it to /etc/hosts or the DNS",
            )
            continue
        if not listening:
            yield ok(f"{key}.urls: {parts.hostname} resolves")
            continue
        try:
            socket.create_connection(place, CONNECT_S).close()
        except OSError as problem:
            yield error(
                f"{key}.urls: {url}: {problem.strerror or problem}",
                "start that server, or leave its URL out",
            )
        else:
            yield ok(f"{key}.urls: {url} listens")


def check_own_nccl(key: str, args: Sequence[str]) -> Iterator[Finding]:
    """Compare NCCL's variables in the trainer with those in servers of its own, which inherit them
    but follow their options.

    Args:
        args: of sglang.launch_server.
    """
    options = {arg.removeprefix("--").replace("-", "_"): True for arg in args}
    yield from _compared_nccl(
        key,
        nccl.of_server(os.environ, options),
        f"in its servers, by {key}.args",
        "leave that option out",
    )


def check_nccl_of_urls(key: str, urls: Sequence[str], api_key_env: str | None) -> Iterator[Finding]:
    """Compare NCCL's variables in the trainer with those in servers that are there, as far as their
    options tell: the environment that they were started in cannot be asked for.
    """
    api_key = os.environ.get(api_key_env or "")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(headers=headers, trust_env=False, timeout=CONNECT_S) as client:
        for url in urls:
            try:
                options = client.get(f"{url.rstrip('/')}/server_info").raise_for_status().json()
            except (httpx.HTTPError, ValueError) as problem:
                reason = str(problem).split("\n")[0] or type(problem).__name__
                yield warning(
                    f"{key}.urls: {url}: NCCL's variables there are not known ({reason})",
                    "is it an SGLang server, and the key the right one?",
                )
                continue
            yield from _compared_nccl(
                f"{key}.urls: {url}",
                nccl.of_server({}, options),
                "in that server, unless its environment had another one",
                "start the server with the trainer's",
            )


def _compared_nccl(
    where: str, theirs: Mapping[str, str], which: str, otherwise: str
) -> Iterator[Finding]:
    """Compare NCCL's variables in the trainer with those in servers.

    Args:
        theirs: NCCL's variables in the servers.
        which: servers, and what decided.
        otherwise: the remedy, if it is not the trainer's variables that are to change.
    """
    trainers = nccl.values(os.environ)
    different = [name for name in nccl.DEFAULTS if trainers[name] != theirs[name]]
    for name in different:
        yield warning(
            f"{where}: {name} is {trainers[name]} in the trainer and {theirs[name]} {which}; in "
            "their common groups NCCL fails or hangs",
            f"export {name}={theirs[name]} for all ranks, or {otherwise}",
        )
    if not different:
        seen = ", ".join(f"{name}={trainers[name]}" for name in nccl.DEFAULTS)
        yield ok(f"{where}: {seen}, as in the trainer")


# -------------------------------------------------------------------------------------------- ranks


@dataclass(frozen=True)
class Rank:
    """What a rank tells of itself."""

    rank: int
    host: str
    device: str
    versions: Mapping[str, str]
    clock: float  # seconds since 1970
    speed: float  # multiplications of a fixed size per second, alone
    nccl: Mapping[str, str] = field(default_factory=dict)  # variables that ranks need alike

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} ({self.device})"


def check_ranks(host: str) -> list[Finding]:
    """Check that every rank answers, with the same versions, time and speed; how fast they talk.

    Every rank calls this and gets the same.

    Collectives: an all-gather of some 1,000 bytes a rank, and the all-reduces that are timed.
    """
    speed = _speed()
    device = platform.device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    software = versions() | {"driver": driver()}
    dist.barrier()  # so that all look at their clocks at once
    variables = nccl.values(os.environ)
    me = Rank(dist.get_rank(), host, name, software, time.time(), speed, variables)
    ranks = gather(me)
    return [*compared(ranks), *_check_links(host, [rank.host for rank in ranks])]


def compared(ranks: Sequence[Rank]) -> Iterator[Finding]:
    """Yield what differs between ranks that should be alike."""
    hosts = dict.fromkeys(rank.host for rank in ranks)
    yield ok(f"{len(ranks)} ranks on {len(hosts)} hosts answer: {', '.join(hosts)}")
    first = ranks[0]
    one_of_each = {rank.host: rank for rank in reversed(ranks)}
    for host, rank in one_of_each.items():
        for name, version in rank.versions.items():
            if version != first.versions.get(name):
                yield error(
                    f"{host}: {name} {version}; {first.host} has {first.versions.get(name)}",
                    "the same environment on every host",
                )
        for name, value in rank.nccl.items():
            if value != first.nccl[name]:
                yield warning(
                    f"{host}: {name} is {value}; on {first.host} it is {first.nccl[name]}",
                    "export it alike on every host, or NCCL fails or hangs",
                )
    clocks = [rank.clock for rank in ranks]
    if max(clocks) - min(clocks) > SKEW_S:
        yield warning(
            f"clocks of the hosts are {max(clocks) - min(clocks):.1f} s apart",
            "synchronise them (chrony); logs and file times will not match",
        )
    if len(kinds := {rank.device for rank in ranks}) > 1:
        yield warning(f"devices differ: {', '.join(sorted(kinds))}", "the slowest sets the pace")
    median = statistics.median(rank.speed for rank in ranks)
    for rank in ranks:
        if rank.speed * GROSS < median:
            yield warning(
                f"{rank}: {median / rank.speed:.1f} times slower than the median rank",
                "look there for other load, clock limits or a failing device; or leave it out",
            )


def _speed() -> float:
    size = 4096 if torch.cuda.is_available() else 512
    matrix = torch.ones(size, size, device=platform.device())
    torch.mm(matrix, matrix)  # libraries load
    times = []
    for _ in range(3):
        platform.synchronize()
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        platform.synchronize()
        times.append(time.perf_counter() - start)
    return 1 / min(times)


def _check_links(host: str, hosts: Sequence[str]) -> Iterator[Finding]:
    """Measure latency and bandwidth of an all-reduce: inside each host, and over all ranks."""
    groups = {}
    if len(set(hosts)) > 1:
        for name in dict.fromkeys(hosts):  # every rank makes every group
            members = [rank for rank, other in enumerate(hosts) if other == name]
            group = dist.new_group(members)
            if name == host and len(members) > 1:
                groups["inside a host"] = group
    mine = {name: _time_all_reduce(group) for name, group in groups.items()}
    mine["over all ranks"] = _time_all_reduce(None)
    everyone = gather(mine)
    for name in dict.fromkeys(name for figures in everyone for name in figures):
        latency, bandwidth = zip(*(f[name] for f in everyone if name in f), strict=True)
        yield ok(
            f"all-reduce {name}: {max(latency) * 1e6:.0f} µs, {min(bandwidth) / 1e9:.2f} GB/s "
            "(the slowest rank's; bytes of the tensor per second)"
        )


def _time_all_reduce(group) -> tuple[float, float]:
    """Return (seconds of a small one, bytes per second of a large one)."""
    figures = []
    for count in (1, 1 << (26 if torch.cuda.is_available() else 21)):
        values = torch.zeros(count, device=platform.device())
        dist.all_reduce(values, group=group)
        platform.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            dist.all_reduce(values, group=group)
        platform.synchronize()
        figures.append((time.perf_counter() - start) / 5)
    return figures[0], values.nbytes / figures[1]
