"""Seconds of a push of weights by the number of servers, ranks and servers on hosts of their own.

    python -m benchmarks.sources                                     # Linux, root
    python -m benchmarks.sources --servers 1 2 4 --ranks 1 4 --mib 64 --mbit 200
    python -m benchmarks.sources --servers 4 --ranks 4 --cut         # one is cut off

The hosts are network namespaces of this machine, each behind a link of `--mbit`, so that links set
the pace and not the cores that all of them share. Every rank has the whole tensors; the servers are
benchmarks/receiver.py. With one rank all weights come from it, as from rank 0 of many before they
were dealt over sources.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.weight_sync import make_checkpoint
from megatron_taopd.formats.hf import HFCheckpoint, load_config, tensor_shapes
from megatron_taopd.parallel import platform
from megatron_taopd.rollout.weight_sync import DistributedSync
from megatron_taopd.serving.model import ServedModel
from megatron_taopd.serving.remote import Remote

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.hosts import DEVICE, Host, Hosts, missing  # noqa: E402

PORT, REPEATS = 30000, 3


def main() -> int:
    """Measure and print the table; the exit status is 0, or 2 where no hosts can be made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--mib", type=int, default=64, help="of weights, random bf16")
    parser.add_argument("--bucket-mib", type=int, default=8)
    parser.add_argument("--mbit", type=int, default=200, help="a second, of each host's link")
    parser.add_argument("--cut", action="store_true", help="the last of several, in the last push")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    if why := missing():
        print(f"error: {why}", file=sys.stderr)
        return 2
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        make_checkpoint(model, arguments.mib << 20)
        for ranks in arguments.ranks:
            for servers in arguments.servers:
                found.append(measure(model, ranks, servers, arguments))
    Console().print(as_table(found, arguments.mbit))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def measure(model: Path, ranks: int, servers: int, arguments) -> dict:
    """Push a few times with so many hosts; the first push makes the groups."""
    cut = arguments.cut and servers > 1
    trainers = [f"rank{i}" for i in range(ranks)]
    receivers = [f"server{i}" for i in range(servers)]
    with Hosts(*trainers, *receivers) as hosts, ExitStack() as stack:
        for host in hosts.values():
            limit(host, arguments.mbit)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        urls = []
        for name in receivers:
            command = [sys.executable, "-m", "benchmarks.receiver"]
            command += ["--host", hosts[name].address, "--port", str(PORT)]
            pipe = {"stdout": subprocess.PIPE, "text": True}
            process = stack.enter_context(hosts[name].start(command, environment, **pipe))
            stack.callback(process.kill)
            urls.append(process.stdout.readline().strip())
        processes = []
        for rank, name in enumerate(trainers):
            own = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
            own |= {"MASTER_ADDR": hosts[trainers[0]].address, "MASTER_PORT": "29400"}
            code = "from benchmarks.sources import push; push()"
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            command = [sys.executable, "-c", code]
            process = hosts[name].start(command, environment | own, **pipes)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
            task = {"model": str(model), "urls": urls, "bucket": arguments.bucket_mib << 20}
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
        seconds, lost = [], {}
        for turn in range(1 + REPEATS + cut):
            if turn > REPEATS:
                half = statistics.median(seconds[1:]) / 2
                threading.Timer(half, hosts[receivers[-1]].cut).start()
            for process in processes:
                process.stdin.write("push\n")
                process.stdin.flush()
            told = json.loads(processes[0].stdout.readline())
            seconds.append(told["seconds"])
            lost |= told["lost"]
    found = {"ranks": ranks, "servers": servers, "bytes": told["bytes"], "first": seconds[0]}
    found["seconds"] = statistics.median(seconds[1 : 1 + REPEATS])
    return found | ({"cut": seconds[-1], "lost": lost} if cut else {})


def limit(host: Host, mbit: int) -> None:
    """Let no more than so many megabits a second leave a host."""
    rate = ["rate", f"{mbit}mbit", "burst", "256kb", "latency", "100ms"]
    qdisc = ["tc", "-n", host.namespace, "qdisc", "add", "dev", DEVICE, "root", "tbf", *rate]
    subprocess.run(qdisc, check=True)


def push() -> None:
    """Be a rank: push whenever a line comes, and on rank 0 tell how long it took."""
    task = json.loads(sys.stdin.readline())
    platform.initialize()
    checkpoint = HFCheckpoint(task["model"])
    tensors = [(n, checkpoint[n]) for n in tensor_shapes(load_config(task["model"]))]
    sync, leads = DistributedSync(task["model"], task["bucket"]), dist.get_rank() == 0
    client = Remote(ServedModel.of(task["model"], 0)) if leads else None
    targets: Sequence | None = None
    if leads:
        targets = [SimpleNamespace(url=url, tp=1, workers=None) for url in task["urls"]]
    for version, _ in enumerate(sys.stdin, 1):
        dist.barrier()
        started = time.perf_counter()
        lost = sync.push(client, targets, iter(tensors), version)
        if leads:
            told = {"seconds": time.perf_counter() - started, "lost": lost}
            print(json.dumps(told | {"bytes": sum(t.nbytes for _, t in tensors)}), flush=True)


def as_table(found: list[dict], mbit: int) -> Table:
    size = found[0]["bytes"]
    table = Table(title=f"{size / 1e6:.0f} MB over links of {mbit} Mbit/s", box=SIMPLE)
    for name in ("ranks", "servers", "first push, s", "push, s", "with a server cut, s"):
        table.add_column(name, justify="right")
    for row in found:
        cut = f"{row['cut']:.2f}" if "cut" in row else ""
        counts = (str(row["ranks"]), str(row["servers"]))
        table.add_row(*counts, f"{row['first']:.2f}", f"{row['seconds']:.2f}", cut)
    return table


if __name__ == "__main__":
    sys.exit(main())
