"""Several hosts of one machine, by network namespaces (Linux, root).

    with Hosts("train0", "train1") as hosts:
        hosts["train0"].start(["python", "server.py"])  # a Popen, in this host
        hosts["train1"].cut()                           # from now on, its packets are dropped
        hosts["train1"].heal()

A host has a network namespace with an address of its own, a host name, an /etc/hosts in which all
find each other, and, where asked for, directories of its own. Its cable goes to a switch, a bridge
in a namespace of its own: nothing is added to the network of the machine. Files, processes and
users are the machine's.

All of it goes at the end, processes in the hosts included. What a killed program has left goes at
the start of the next: the namespaces have the number of the process that made them in their names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

PREFIX = "taopd-hosts"
NETWORK = "10.213.77."
DEVICE = "eth0"  # of each host
WIRE = Path(__file__).with_name("wire.py")
# A host's name and files are a process's own, too: `ip netns exec` gives it the network, `unshare`
# the rest. Every word is an exec, so that the process that was started is the command.
ENTER = 'hostname "$0" && while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit; shift 2; done'
ENTER += ' && shift && exec "$@"'


class Host:
    """One of `Hosts`."""

    def __init__(self, name: str, namespace: str, switch: str, number: int, files: Path):
        self.name, self.address = name, f"{NETWORK}{number}"
        self.namespace, self.switch, self.files = namespace, switch, files
        self.port = f"port{number}"
        self.own: dict[Path, Path] = {}  # paths that are another directory's on this host
        self._wire: subprocess.Popen | None = None

    def connect(self) -> None:
        """Make its network."""
        ip("netns", "add", self.namespace)
        peer = ("peer", "name", DEVICE, "netns", self.namespace)
        ip("-n", self.switch, "link", "add", self.port, "type", "veth", *peer)
        ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", DEVICE)
        for device in ("lo", DEVICE):
            ip("-n", self.namespace, "link", "set", device, "up")
        self._plug("bridge")
        ip("-n", self.switch, "link", "set", self.port, "up")

    def knows(self, others: Sequence[Host]) -> None:
        """Let it send to them without asking who they are.

        A host whose question nobody answers says at once that there is no way there; packets that
        are lost further away are just lost.
        """
        show = ("-n", self.namespace, "-brief", "link", "show", DEVICE)
        hardware = ip(*show).split()[2]
        for other in others:
            if other is not self:
                to = (self.address, "lladdr", hardware, "dev", DEVICE, "nud", "permanent")
                ip("-n", other.namespace, "neigh", "replace", *to)

    def own_directory(self, path: Path) -> None:
        """Let this path be another directory on this host than elsewhere."""
        self.own[path] = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=self.files))

    def start(self, command: Sequence, env: Mapping[str, str] = os.environ, **popen):
        """Start a process on this host, in a session of its own. Returns its Popen."""
        mounts = {Path("/etc/hosts"): self.files / "hosts", **self.own}
        binds = [str(path) for here, there in mounts.items() for path in (there, here)]
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount"]
        enter += ["sh", "-c", ENTER, self.name, *binds, "--"]
        command = [*enter, *map(str, command)]
        return subprocess.Popen(command, env=dict(env), start_new_session=True, **popen)

    def processes(self) -> list[psutil.Process]:
        """List the processes that run on this host."""
        found = []
        for pid in map(int, ip("netns", "pids", self.namespace).split()):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    # Faults

    def cut(self) -> None:
        """Drop every packet from and to it from now on; nothing is refused, and nobody is told."""
        ip("-n", self.switch, "link", "set", self.port, "nomaster")

    def degrade(self, loss: float, delay_s: float, seed: int = 0) -> None:
        """Lose this share of its packets from now on, and let the others take longer, both ways."""
        taps = f"{self.port}a", f"{self.port}b"
        wire = [sys.executable, "-S", WIRE, *taps, loss, delay_s, seed]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        inside = ["ip", "netns", "exec", self.switch, *map(str, wire)]
        self._wire = subprocess.Popen(inside, **pipes)
        assert self._wire.stdout.readline() == "ready\n"
        # host — port — own bridge — a ~ wire ~ b — bridge
        ip("-n", self.switch, "link", "add", f"{self.port}br", "type", "bridge")
        ip("-n", self.switch, "link", "set", f"{self.port}br", "up")
        for tap, bridge in zip(taps, (f"{self.port}br", "bridge"), strict=True):
            ip("-n", self.switch, "link", "set", tap, "master", bridge)
            ip("-n", self.switch, "link", "set", tap, "up")
        self._wire.stdin.write("go\n")
        self._wire.stdin.flush()
        self._plug(f"{self.port}br")

    def heal(self) -> None:
        """Let its packets through again, all of them and at once."""
        self._plug("bridge")
        if self._wire is not None:
            self._wire.kill()
            self._wire.communicate()
            self._wire = None
            ip("-n", self.switch, "link", "del", f"{self.port}br")

    def power_off(self) -> None:
        """Let it be gone in the middle of whatever it does: it does not even close connections."""
        self.cut()
        end_all(self.namespace)

    def _plug(self, bridge: str) -> None:
        ip("-n", self.switch, "link", "set", self.port, "master", bridge)


class Hosts(dict[str, Host]):
    """Hosts by their names, on one switch."""

    def __init__(self, *names: str):
        sweep()
        made_by = f"{PREFIX}-{os.getpid()}"
        self.switch = f"{made_by}-switch"
        self.files = Path(tempfile.mkdtemp(prefix=f"{made_by}-"))
        for number, name in enumerate(names, 1):
            self[name] = Host(name, f"{made_by}-{name}", self.switch, number, self.files)

    def __enter__(self) -> Hosts:
        try:
            ip("netns", "add", self.switch)
            # No host has to be learned again when its port comes back.
            ip("-n", self.switch, "link", "add", "bridge", "type", "bridge", "forward_delay", "0")
            ip("-n", self.switch, "link", "set", "bridge", "up")
            for host in self.values():
                host.connect()
            for host in self.values():
                host.knows([*self.values()])
            lines = [f"{host.address} {host.name}" for host in self.values()]
            (self.files / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for namespace in [*(host.namespace for host in self.values()), self.switch]:
            remove(namespace)
        shutil.rmtree(self.files, ignore_errors=True)


def missing() -> str | None:
    """Say why hosts cannot be made here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if lacking := [tool for tool in ("ip", "unshare", "mount") if shutil.which(tool) is None]:
        return (
            f"there is no {', '.join(lacking)}: Debian's iproute2, util-linux and mount have them"
        )
    try:
        with Hosts("one") as hosts:
            process = hosts["one"].start(["true"])
            return None if process.wait() == 0 else "no process can be started in a namespace"
    except (subprocess.CalledProcessError, OSError) as error:
        return f"network namespaces: {getattr(error, 'stderr', '') or error}"


def ip(*arguments: str) -> str:
    """Run iproute2's `ip`; what it prints."""
    pipes = {"capture_output": True, "text": True}
    return subprocess.run(["ip", *arguments], check=True, **pipes).stdout


def namespaces() -> list[str]:
    """List the namespaces that programs with `Hosts` have made and not yet removed."""
    names = [line.split()[0] for line in ip("netns", "list").splitlines()]
    return [name for name in names if name.startswith(f"{PREFIX}-")]


def sweep() -> None:
    """Remove what programs have left that do not run any more."""
    for namespace in namespaces():
        if not psutil.pid_exists(int(namespace.removeprefix(f"{PREFIX}-").split("-")[0])):
            remove(namespace)
    for files in Path(tempfile.gettempdir()).glob(f"{PREFIX}-*-*"):
        if not psutil.pid_exists(int(files.name.removeprefix(f"{PREFIX}-").split("-")[0])):
            shutil.rmtree(files, ignore_errors=True)


def remove(namespace: str) -> None:
    """End all that runs in a namespace, and remove it; its devices go with it."""
    if namespace in namespaces():
        end_all(namespace)
        ip("netns", "del", namespace)


def end_all(namespace: str) -> None:
    """SIGKILL for all processes of a namespace, until there is none."""
    while pids := ip("netns", "pids", namespace).split():
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(pid))
                if process.status() == psutil.STATUS_ZOMBIE:  # its parent's, perhaps ours
                    with suppress(ChildProcessError):
                        os.waitpid(process.pid, os.WNOHANG)
                process.kill()
        time.sleep(0.05)
