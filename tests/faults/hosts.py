"""Two training hosts and two server hosts whose network fails: is the run what it would have been?

    python tests/faults/hosts.py --json figures.json             # all faults, once
    python tests/faults/hosts.py --only "server gone" --json …   # those of a kind

The hosts are network namespaces of this machine (tests/support/hosts.py; Linux, root). A real
torchrun of the tiny pair, TP2 | PP2 over the two training hosts, is started by
examples/launch/node.sh; an SGLang server on each server host by `taopd serve`; weights go by
`distributed`. Each fault is made in a phase of its own, at a random moment of it:

    link cut        packets of a training host are dropped: both hosts' ranks have to end, naming
                    host, rank and phase, within the watchdog's time and what machine and launcher
                    take; node.sh starts the ranks again, or the same command is given again
    link lost       likewise, for less than the watchdog's time: the run goes on
    host gone       as a link cut, and all that runs there is killed, without a word to the others
    joining         packets of a training host are dropped for 5 to 20 s while nodes and ranks meet,
                    before there is a watchdog: the run begins all the same
    server cut      packets of a server host are dropped, for some seconds or until the run has gone
                    on without it; the run goes on, and gives it weights when it is back
    server gone     likewise, with all that runs there killed; it is started again
    lossy           5 % of a host's packets are lost and the others take 100 ms each way, for half a
                    minute; the run goes on

After every fault the records of all steps so far have to be those of a run that nothing disturbed,
to the bit, and the newest checkpoint has to be the one that is resumed; in the end the weights of
the students have to be the same, and no process may be left on any host. Responses are greedy
(`rollout.top_k=1`): what servers sample cannot be repeated. Outside the suite: about a minute a
fault on two cores. docs/reliability.md has its outcome.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from kill_anywhere import curve, weights
from support.hosts import Hosts, missing
from support.patience import patience
from support.run_on_hosts import AGAIN, ENDS, ON_S, ROOT, Node, Run, environment

TRAINING, SERVING = ("train0", "train1"), ("serve0", "serve1")
PORT, KEY = 30000, "SGLANG_KEY"
SECRET = {KEY: "of-the-servers"}
OPTIONS = [
    "rollout.prompts=16", "rollout.max_new_tokens=16", "rollout.engine=sglang", "rollout.top_k=1",
    "rollout.stream=false", "rollout.servers.timeout_s=60", f"rollout.servers.api_key_env={KEY}",
    f"rollout.servers.urls=[{','.join(f'http://{name}:{PORT}' for name in SERVING)}]",
    "eval.limit=16", "eval.every=3", "log.tensorboard=false",
    "checkpoint.every=1", "checkpoint.keep_last=2",
]  # fmt: skip
PHASES = ["build", "rollout", "teacher", "scoring", "selection", "training", "sync", "checkpoint"]
PHASES += ["eval"]
LAUNCHER_S = 30  # that torchrun may take to end once a rank has, on a quiet machine
LOSS, DELAY_S, LOSSY_S = 0.05, 0.1, 30
# Of records, what depends on which server answered, and when.
UNREPEATABLE = (
    *("rollout/retries", "rollout/timeouts", "rollout/restarts", "rollout/resyncs"),
    *("rollout/staleness", "rollout/logprob_gap", "rollout/cached_share"),
)


@dataclass(frozen=True)
class Fault:
    """What happens to which host, and in which phase of the run; see above for the kinds."""

    kind: str
    host: str
    phase: str
    long: bool = False  # of a server cut: until the run has gone on without it


FAULTS = [
    *(Fault("link cut", TRAINING[n % 2], phase) for n, phase in enumerate(PHASES)),
    *(Fault("link lost", TRAINING[n % 2], phase) for n, phase in enumerate(PHASES)),
    *(Fault("host gone", TRAINING[n % 2], phase) for n, phase in enumerate(PHASES)),
    *(Fault("link cut", TRAINING[1 - n % 2], phase) for n, phase in enumerate(PHASES)),
    # A run that is built waits for its servers as long as it takes.
    *(Fault("server cut", SERVING[n % 2], phase, n % 2 == 1) for n, phase in enumerate(PHASES)),
    Fault("server cut", "serve0", "rollout", long=True),
    Fault("server cut", "serve1", "sync", long=True),
    *(Fault("server gone", SERVING[n % 2], p) for n, p in enumerate(("rollout", "sync", "eval"))),
    *(Fault("joining", host, "joining") for host in TRAINING * 3),
    *(Fault("lossy", host, at) for host in ("train1", "serve0") for at in ("sync", "rollout")),
]


@dataclass
class Outcome:
    """What came of a fault.

    Attributes:
        struck: the phase that the run was in.
        noticed_s: seconds until all training hosts' ranks had ended, or until a step was done
            without the server.
        said: by host, why its rank ended.
        on_s: seconds from the end of the fault until the next step was done.
        failures: what should not have been.
    """

    fault: Fault
    struck: str = ""
    noticed_s: float | None = None
    said: dict[str, str] = field(default_factory=dict)
    on_s: float | None = None
    failures: list[str] = field(default_factory=list)


class Trial:
    """The hosts, their servers, and one run that goes through all faults."""

    def __init__(self, hosts: Hosts, directory: Path, generator: random.Random, heartbeat_s: float):
        self.hosts, self.directory, self.generator = hosts, directory, generator
        self.heartbeat_s = heartbeat_s

    def run(self, name: str, steps: int) -> Run:
        """Return a run on the training hosts, which has not begun."""
        options = [*OPTIONS, f"train.steps={steps}"]
        options += [f"watchdog.heartbeat_timeout_s={self.heartbeat_s:.0f}"]
        return Run([self.hosts[host] for host in TRAINING], self.directory / name, options, SECRET)

    def serve(self, name: str) -> None:
        """Start a host's server, as its documentation says."""
        command = ["python", "-m", "megatron_taopd", "serve", ROOT / "examples/tiny_pair/student"]
        command += ["--host", "0.0.0.0", "--port", PORT, "--api-key-env", KEY]
        command += ["--dtype", "float32", "--max-total-tokens", "8192"]
        command += ["--logs", self.directory / f"{name}-logs"]
        with (self.directory / f"{name}.log").open("a") as log:
            self.hosts[name].start(command, environment() | SECRET, stdout=log, stderr=log)

    def version(self, name: str) -> str | None:
        """Ask a server, on its own host, for the version of its weights."""
        ask = (
            "import json, os, urllib.request as r; q = r.Request('http://127.0.0.1:%d/model_info', "
        )
        ask += "headers={'Authorization': 'Bearer ' + os.environ[%r]}); "
        ask += "print(json.load(r.urlopen(q, timeout=10))['weight_version'])"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        command = [sys.executable, "-S", "-c", ask % (PORT, KEY)]
        process = self.hosts[name].start(command, environment() | SECRET, **pipes)
        return process.communicate()[0].strip() or None

    def strike(self, run: Run, fault: Fault) -> Outcome:
        """Make a fault, and end it; see whether the run does what it should."""
        outcome = Outcome(fault)
        if fault.kind == "joining":
            return self._disturb_joining(run, fault)
        if fault.phase == "build" and run.place(0)[1] not in ("", "build"):
            run.ask_to_end()
            run.begin()
        rank = TRAINING.index(fault.host) if fault.host in TRAINING else 0
        struck = run.reach(fault.phase, rank, self.generator)
        if struck is None:
            said = [node.output()[-3000:] for node in run.nodes]
            outcome.failures.append(f"did not come to {fault.phase}: {said}")
            return outcome
        outcome.struck = struck
        if fault.host in TRAINING and fault.kind in ("link cut", "host gone"):
            self._lose_training_host(run, fault, outcome)
        else:
            self._disturb(run, fault, outcome)
        return outcome

    def _disturb_joining(self, run: Run, fault: Fault) -> Outcome:
        outcome = Outcome(fault, "joining")
        if any(node.running for node in run.nodes):
            run.wait(lambda: run.step > 0, ON_S)
            run.ask_to_end()
        newest = run.newest
        run.begin()
        began, deadline = time.monotonic(), self.generator.uniform(0, 40)
        while run.place(0)[0] < 0 and time.monotonic() - began < deadline:
            time.sleep(0.01)
        self.hosts[fault.host].cut()
        run.sleep(self.generator.uniform(5, 20))
        outcome.said = {node.host.name: node.output()[-500:] for node in run.nodes}
        self.hosts[fault.host].heal()
        outcome.on_s = run.wait(lambda: run.step > newest + 1, ON_S)
        if outcome.on_s is None:
            outcome.failures.append(f"did not begin: {[n.output()[-3000:] for n in run.nodes]}")
        return outcome

    def _lose_training_host(self, run: Run, fault: Fault, outcome: Outcome) -> None:
        host, gone = self.hosts[fault.host], fault.kind == "host gone"
        step = run.step
        host.power_off() if gone else host.cut()
        limit = self.heartbeat_s + LAUNCHER_S
        over = lambda: all(node.life_is_over for node in run.nodes)  # noqa: E731
        outcome.noticed_s = run.wait(over, limit, ended=True)
        if outcome.noticed_s is None:
            outcome.failures.append(f"ranks had not ended after {limit:.0f} s")
            for node in run.nodes:  # nothing else can go on
                if not node.life_is_over:
                    outcome.said[node.host.name] = node.output()[-3000:]
                    end(node)
        for node in run.nodes:
            if gone and node.host is host:
                continue
            said = ENDS.search(node.output())
            outcome.said[node.host.name] = said[1] if said else node.output()[-500:]
            other = TRAINING[1 - node.rank]
            if said is None or other not in said[1]:
                outcome.failures.append(f"{node.host.name} does not name {other}")
            statuses = AGAIN.findall(node.output()) or [str(node.process.poll())]
            if statuses != ["4"] and said is not None and outcome.struck != "build":
                outcome.failures.append(f"{node.host.name}: status {statuses}")
        for node in run.nodes:
            if not node.running and (left := node.host.processes()):
                outcome.failures.append(f"left on {node.host.name}: {left}")
        host.heal()
        newest = run.newest
        run.begin()
        outcome.on_s = run.wait(lambda: run.step > max(step, newest + 1), ON_S)
        if outcome.on_s is None:
            outcome.failures.append(f"not resumed: {[n.output()[-3000:] for n in run.nodes]}")
        elif (after := run.went_on_after()) != newest:
            outcome.failures.append(f"resumed after step {after}, not {newest}")

    def _disturb(self, run: Run, fault: Fault, outcome: Outcome) -> None:
        host = self.hosts[fault.host]
        if fault.kind == "lossy":
            host.degrade(LOSS, DELAY_S, self.generator.randrange(1000))
            run.sleep(LOSSY_S)
        else:
            host.power_off() if fault.kind == "server gone" else host.cut()
            step = run.newest if outcome.struck == "build" else run.step
            if fault.long or fault.kind == "server gone":
                outcome.noticed_s = run.wait(lambda: run.step > step + 1, ON_S)
                if outcome.noticed_s is None:
                    outcome.failures.append("did not go on without the server")
            else:
                run.sleep(self.generator.uniform(0.2, 0.6) * self.heartbeat_s)
        host.heal()
        if fault.kind == "server gone":
            self.serve(fault.host)
        step = max(run.step, run.newest)
        outcome.on_s = run.wait(lambda: run.step > step + 1, ON_S)
        if outcome.on_s is None:
            outcome.failures.append(f"did not go on: {[n.output()[-3000:] for n in run.nodes]}")
        elif fault.host in SERVING and not self._has_weights(run, fault.host):
            outcome.failures.append(f"{fault.host} was not given weights again")

    def _has_weights(self, run: Run, name: str) -> bool:
        """Wait until a server has weights that were current when this was called, or newer ones."""
        step = run.step - 1

        def has() -> bool:
            time.sleep(1)
            version = self.version(name)
            return version is not None and version.isdecimal() and int(version) >= step

        return run.wait(has, ON_S) is not None


def end(node: Node) -> None:
    """Kill all that runs on a training host, its launcher included."""
    for process in node.host.processes():
        process.kill()
    node.process.wait()


def records(run: Run) -> list[dict]:
    """Return what a run's steps computed, as far as it can be repeated."""
    return [
        {key: value for key, value in record.items() if not key.startswith(UNREPEATABLE)}
        for record in curve(run.dir)
    ]


def differing(run: Run, whole: Run) -> str | None:
    """Name the first step whose records differ, and how; None if none does."""
    for one, other in zip(records(run), records(whole), strict=False):
        if keys := sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k)):
            return f"step {one['step']} differs in {', '.join(keys)}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kinds = sorted({fault.kind for fault in FAULTS})
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--most", type=int, help="only so many of them, spread over the list")
    parser.add_argument("--minutes", type=float, help="after which no further fault is made")
    parser.add_argument("--heartbeat", type=float, default=10, help="seconds, of a quiet machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, help="keep what hosts and runs write there")
    parser.add_argument("--json", type=Path, help="write the outcome there, too")
    arguments = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    # The hosts go at an end by a signal, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    generator = random.Random(arguments.seed)
    faults = [fault for fault in FAULTS if fault.kind in arguments.only]
    if arguments.most:
        faults = faults[:: max(1, len(faults) // arguments.most)][: arguments.most]
    with ExitStack() as stack:
        directory = arguments.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(exist_ok=True)
        hosts = stack.enter_context(Hosts(*TRAINING, *SERVING))
        trial = Trial(hosts, directory, generator, patience(arguments.heartbeat))
        outcomes, failures = go_through(trial, faults, arguments.minutes, arguments.json)
        for name in SERVING:
            hosts[name].power_off()
    print(json.dumps(summary(outcomes, failures), indent=2))
    return 1 if failures or any(outcome.failures for outcome in outcomes) else 0


def go_through(
    trial: Trial, faults: list[Fault], minutes: float | None, file: Path | None
) -> tuple[list[Outcome], list[str]]:
    """Let one run go through all faults; then an undisturbed one, to compare it with."""
    for name in SERVING:
        trial.serve(name)
    failures = refuse_separate_directories(trial)
    deadline = time.monotonic() + 60 * (minutes or math.inf)
    run = trial.run("disturbed", 100_000)
    outcomes: list[Outcome] = []
    run.begin()
    for fault in faults:
        if (began := time.monotonic()) > deadline:
            break
        if any(node.life_is_over for node in run.nodes):  # a fault that it has not survived
            run.begin()
        outcomes.append(outcome := trial.strike(run, fault))
        line = asdict(outcome) | {"step": run.step, "minutes": (time.monotonic() - began) / 60}
        print(json.dumps(line), flush=True)
        if file is not None:
            file.write_text(json.dumps(summary(outcomes, ["not at the end"]), indent=2) + "\n")
    return outcomes, failures + compare(trial, run, outcomes, file)


def refuse_separate_directories(trial: Trial) -> list[str]:
    """Give a run a directory that each host has for itself; what is wrong with what it says."""
    host = trial.hosts[TRAINING[1]]
    run = trial.run("separate", 1)
    run.dir.mkdir()
    host.own_directory(run.dir)
    run.begin()
    run.wait(lambda: not any(node.running for node in run.nodes), ON_S, ended=True)
    host.own.clear()
    statuses = [node.process.poll() for node in run.nodes]
    said = f"run.dir: {run.dir} of rank 0 is not seen on {host.name}"
    if statuses == [2, 2] and said in run.nodes[0].output():
        return []
    return [f"separate directories: {statuses}, {[node.output() for node in run.nodes]}"]


def compare(trial: Trial, run: Run, outcomes: list[Outcome], file: Path | None) -> list[str]:
    """End the disturbed run, do the same steps undisturbed; how they differ, and what is left."""
    failures = []
    last = run.step + 3
    for node in run.nodes:
        for process in node.host.processes():
            process.kill()
        node.process.wait()
    runs = []
    for name in ("disturbed", "whole"):
        ending = trial.run(name, last)
        ending.begin()
        ending.end(30 + 10 * last)
        runs.append(ending)
    if difference := differing(*runs):
        failures.append(difference)
    if len({json.dumps([r["step"] for r in records(each)]) for each in runs}) != 1:
        failures.append("a step is missing, or there twice")
    if len({weights(each.dir) for each in runs}) != 1:
        failures.append("weights differ")
    for name in TRAINING:
        if left := trial.hosts[name].processes():
            failures.append(f"left on {name}: {left}")
    if file is not None:
        file.write_text(json.dumps(summary(outcomes, failures), indent=2) + "\n")
    return failures


def summary(outcomes: list[Outcome], failures: list[str]) -> dict:
    """Return how many faults of each kind were survived, and the slowest notice and resumption."""
    kinds = {}
    for kind in dict.fromkeys(outcome.fault.kind for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.fault.kind == kind]
        kinds[kind] = {
            "faults": len(own),
            "survived": sum(not outcome.failures for outcome in own),
            "slowest_notice_s": max((o.noticed_s for o in own if o.noticed_s), default=None),
            "slowest_to_go_on_s": max((o.on_s for o in own if o.on_s), default=None),
        }
    return {"kinds": kinds, "failures": failures, "outcomes": [asdict(o) for o in outcomes]}


if __name__ == "__main__":
    sys.exit(main())
