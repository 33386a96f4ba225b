"""Wrong inputs, and what a person is told about each: `python tests/faults/bad_inputs.py [WORD]`.

Every key of the schema with a value below, above and of another type; files, data, models, URLs,
commands and options, environment variables. All in one process: `taopd` is called as a function.
For each case the table says whether what was printed is one line, whether the exit status is 2, and
whether the line has the key, the value and a remedy. The exit status is 1 if one falls short. With
WORD, only cases whose name has it are tried.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch.distributed as dist  # noqa: E402

from megatron_taopd import build, cli  # noqa: E402
from megatron_taopd.config.schema import leaf_keys  # noqa: E402

PAIR = ROOT / "examples" / "tiny_pair"
TINY = str(ROOT / "examples" / "tiny_pair.yaml")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
ONE_RANK = ("student.parallel.tp=1", "teacher.parallel.pp=1", "log.tensorboard=false")
# Words of a line that say what would be right.
REMEDY = re.compile(
    r"has to|have to|\bgive|needs?\b|needed|one of|expected|did you mean|known here|leave|fetch|"
    r"pip install|required|not set|convert|merge|another|write |has what there is|move it|set it|"
    r"could not be converted to|not a valid|there are|at least|at most|copy|correct|start |"
    r"supported|choose|either"
)


@dataclass(frozen=True)
class Case:
    """A wrong input.

    Attributes:
        arguments: of `taopd`.
        key, value: what the line has to name.
        variables: of the environment.
    """

    name: str
    arguments: tuple[str, ...]
    key: str
    value: str
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Told:
    """What came of it: the marks of the table, and what was printed."""

    one_line: bool
    status_2: bool
    key: bool
    value: bool
    remedy: bool
    printed: str

    @property
    def marks(self) -> tuple[bool, ...]:
        return self.one_line, self.status_2, self.key, self.value, self.remedy


def train(run_dir: Path, *overrides: str) -> tuple[str, ...]:
    return ("train", TINY, *ONE_RANK, f"run.dir={run_dir}", *overrides)


# ------------------------------------------------------------------------------- keys of the schema


def of_schema(run_dir: Path) -> Iterator[Case]:
    """A value below the bounds, above them, and of another type, of every key that has some."""
    for key, section, name in leaf_keys():
        hint = get_type_hints(section)[name]
        kinds = get_args(hint) if get_origin(hint) not in (Literal, tuple, None) else (hint,)
        bounds = section.__dataclass_fields__[name].metadata["bounds"]
        for which, value in wrong_values(kinds, bounds):
            shown = value.strip("[].")
            yield Case(f"{key}, {which}", train(run_dir, f"{key}={value}"), key, shown)


def wrong_values(kinds: tuple, bounds: Any) -> Iterator[tuple[str, str]]:
    whole = int in kinds
    if bounds is not None:
        lowest = bounds.at_least if bounds.above is None else bounds.above
        low = lowest - 1
        if bounds.or_zero:
            low = lowest / 2
        yield "below", f"{low:g}" if whole else f"{low}"
        highest = bounds.at_most if bounds.below is None else bounds.below
        if highest is not None:
            high = highest + 1
            yield "above", f"{high:g}" if whole else f"{high}"
        elif not whole:
            yield "infinite", ".inf"
    if any(get_origin(kind) is Literal for kind in kinds):
        yield "no such name", "nonsense"
    elif str in kinds or Any in kinds:
        if str in kinds:
            yield "a list", "[1]"
    elif int in kinds or float in kinds:
        yield "a word", "many"
        yield "a list", "[1]"
    elif bool in kinds:
        yield "a word", "maybe"
    for kind in kinds:
        if get_origin(kind) is tuple:
            yield "no list", "5"
            if int in get_args(kind):
                yield "a list of words", "[many]"


# ------------------------------------------------------------------ files, data, models, commands


def of_files(place: Path, run_dir: Path) -> Iterator[Case]:
    """Configurations, prompts and models that are not there, damaged, or something else."""
    texts = {
        "a list": ("- a", "a list"),
        "no YAML": ("a: [1", "not YAML"),
        "a key twice": ("run: {dir: a}\nrun: {dir: b}", "duplicate key"),
        "no run.dir": ("student: {path: a}", "run.dir"),
        "empty": ("", "required"),
        "a section that is a value": ("log: yes", "log"),
        "bytes": (b"\xff\xfe\x00", "not"),
    }
    for name, (text, value) in texts.items():
        file = place / f"{name.replace(' ', '_')}.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        named = "run.dir" if name == "empty" else ("log" if name.startswith("a section") else "")
        yield Case(f"configuration: {name}", ("train", str(file)), named or value, value)
    yield Case("configuration: none", ("train", str(place / "no.yaml")), "no.yaml", "no such file")
    yield Case("configuration: a directory", ("train", str(place)), str(place), "no such file")

    record = json.dumps({"prompt": "1 + 1", "answer": "2"}).encode() + b"\n"
    prompts = {
        "empty.jsonl": b"",
        "no_json.jsonl": record + b"{oh no\n",
        "no_column.jsonl": b'{"text": "a"}\n',
        "null.jsonl": b'{"prompt": null, "answer": "1"}\n',
        "latin.jsonl": '{"prompt": "é", "answer": "1"}\n'.encode("latin-1"),
        "utf16.jsonl": record.decode().encode("utf-16"),
        "cut.jsonl.gz": gzip.compress(record * 99)[:-20],
        "no_gzip.jsonl.gz": record,
        "no_parquet.parquet": record,
        "strange.xyz": record,
        "roles.jsonl": b'{"prompt": [{"role": "human", "content": "a"}], "answer": "1"}\n',
        "pointer.jsonl": POINTER.encode(),
    }
    for name, content in prompts.items():
        file = place / name
        file.write_bytes(content)
        for key in ("data.prompts", "eval.prompts"):
            yield Case(f"{key}: {name}", train(run_dir, f"{key}={file}"), key, name)
    for key in ("data.prompts", "eval.prompts"):
        arguments = train(run_dir, f"{key}={place}/none.jsonl")
        yield Case(f"{key}: not there", arguments, key, "none.jsonl")
    for column in ("prompt", "answer"):
        arguments = train(run_dir, f"data.{column}_column=nothing")
        key = "data.prompts" if column == "prompt" else "eval.prompts"
        yield Case(f"data.{column}_column: not there", arguments, key, "nothing")
    yield Case("run.dir: a file", train(place / "empty.jsonl"), "run.dir", "empty.jsonl")
    yield Case("run.dir: not writable", train(Path("/proc/run")), "run.dir", "/proc/run")


def weights(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def changed(directory: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return changed


def written(name: str, text: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_text(text)


def without(*names: str) -> Callable[[Path], None]:
    def removed(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return removed


def config_with(**values: Any) -> Callable[[Path], Any]:
    def changed(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return changed


def truncated(directory: Path) -> None:
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(10_000)


NORM = "model.norm.weight"
MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config.json": (without("config.json"), "config.json"),
    "config.json: no JSON": (written("config.json", "{"), "config.json"),
    "config.json: a list": (written("config.json", "[]"), "config.json"),
    "config.json: of Git LFS": (written("config.json", POINTER), "git lfs pull"),
    "config.json: another architecture": (
        config_with(architectures=["MixtralForCausalLM"]),
        "MixtralForCausalLM",
    ),
    "config.json: quantised": (
        config_with(quantization_config={"quant_method": "awq"}),
        "quantised",
    ),
    "config.json: other sizes": (config_with(intermediate_size=512), "512"),
    "config.json: another depth": (config_with(num_hidden_layers=1), "num_hidden_layers"),
    "config.json: more rows": (config_with(vocab_size=9999), "9999"),
    "no tokenizer": (without("tokenizer.json"), "tokenizer.json"),
    "tokenizer: no JSON": (written("tokenizer.json", "{"), "transformers cannot read it"),
    "tokenizer: of Git LFS": (written("tokenizer.json", POINTER), "git lfs pull"),
    "no weights": (without("model.safetensors"), "model.safetensors"),
    "weights: of Git LFS": (written("model.safetensors", POINTER), "git lfs pull"),
    "weights: truncated": (truncated, "model.safetensors"),
    "weights: no safetensors": (written("model.safetensors", "no" * 50), "model.safetensors"),
    "weights: a shape": (weights(lambda t: t.update({NORM: t[NORM][:-1].clone()})), NORM),
    "weights: a dtype": (weights(lambda t: t.update({NORM: t[NORM].int()})), NORM),
    "weights: one less": (weights(lambda t: t.pop(NORM)), NORM),
    "weights: one more": (weights(lambda t: t.update(stranger=t[NORM].clone())), "stranger"),
    "weights: torch's own": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "pytorch_model.bin",
    ),
    "weights: a shard less": (
        written("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'),
        "b.safetensors",
    ),
    "an adapter": (
        lambda d: (
            (d / "adapter_config.json").write_text("{}"),
            without("config.json", "model.safetensors")(d),
        ),
        "adapter_config.json",
    ),
    "an adapter beside weights": (written("adapter_config.json", "{}"), "adapter_config.json"),
}  # fmt: skip


def of_models(place: Path, run_dir: Path) -> Iterator[Case]:
    """Directories of models, each with one thing wrong, as the student and as the teacher."""
    for model in ("student", "teacher"):
        for i, (name, (change, value)) in enumerate(MODELS.items()):
            directory = place / f"{model}{i}"
            shutil.copytree(PAIR / model, directory)
            change(directory)
            key = f"{model}.path"
            yield Case(f"{model}: {name}", train(run_dir, f"{key}={directory}"), key, value)
        for name in ("nowhere", "/dev/null", ""):
            yield Case(
                f"{model}.path: {name or 'nothing'}",
                train(run_dir, f"{model}.path={name}"),
                f"{model}.path",
                name,
            )


def of_values_together(run_dir: Path) -> Iterator[Case]:
    """Values that do not go together, servers, URLs, packages and variables."""
    servers = ("rollout.engine=sglang",)
    url = "rollout.servers.urls"
    together = {
        "optimizer.decay=cosine": ("optimizer.min_lr", "cosine"),
        "optimizer.min_lr=0": ("optimizer.min_lr", "0.0"),
        "rollout.ahead=1": ("rollout.ahead", "1"),
        "eval.samples=4": ("eval.samples", "4"),
        "eval.pass_at=[3]": ("eval.pass_at", "3"),
        "train.micro_batch_tokens=8": ("train.micro_batch_tokens", "8"),
        "train.mini_batches=9999": ("train.mini_batches", "9999"),
        "rollout.horizon=99999": ("rollout.horizon", "99999"),
        "rollout.horizon=soon": ("rollout.horizon", "soon"),
        "rollout.horizon={start: 4, end: 8}": ("rollout.horizon.steps", "None"),
        "student.parallel.ep=2": ("student.parallel.ep", "2"),
        "student.parallel.tp=4": ("student.parallel", "4"),
        "teacher.parallel.pp=2": ("teacher.parallel", "2"),
        "student.parallel.sequence=true": ("student.parallel.sequence", "true"),
        "student.parallel.cp=4": ("student.parallel", "4"),
        "selection.k=99999": ("selection.k", "99999"),
        "rollout.stop_token_ids=[99999]": ("rollout.stop_token_ids", "99999"),
        "data.template=chat": ("data.template", "chat"),
        "rollout.max_new_tokens=99999": ("rollout.max_new_tokens", "99999"),
        "optimizer.learning_rate=1": ("optimizer.learning_rate", "unknown key"),
        "trian.steps=3": ("trian", "did you mean train?"),
        "ratio=0.1": ("ratio", "selection.ratio"),
        "train.steps": ("train.steps", "not an override"),
        "train.steps=[1": ("train.steps", "[1"),
        "train=3": ("train", "3"),
        "run.dir=${oc.env:NOT_SET}": ("run.dir", "NOT_SET"),
        "run.dir=${nothing.there}": ("run.dir", "nothing.there"),
        "log.wandb_project=mine": ("log.wandb_project", "mine"),
    }
    for override, (key, value) in together.items():
        if override.startswith("log.wandb") and wandb_is_there():
            continue
        yield Case(override, train(run_dir, override), key, value)
    for given in ("node:30000", "ftp://node:1", "http://node:99999", "http://a b:1", "http://h/v1"):
        yield Case(f"{url}: {given}", train(run_dir, *servers, f"{url}=['{given}']"), url, given)
    for engine in ("rollout", "teacher"):
        key = f"{engine}.servers"
        given = "http://no-such-host.invalid:30000"
        sglang = [f"{engine}.engine=sglang", "rollout.sync.transport=disk"]
        yield Case(
            f"{key}.urls: a name that does not resolve",
            train(run_dir, *sglang, f"{key}.urls=[{given}]"), f"{key}.urls", given,
        )  # fmt: skip
        yield Case(
            f"{key}.urls: twice",
            train(run_dir, *sglang, f"{key}.urls=[http://a:1,http://a:1/]"),
            f"{key}.urls", "http://a:1",
        )  # fmt: skip
        for name, value in {
            "gpus": "[1,1]", "replicas": "2", "host": "0.0.0.0", "mem_fraction": "0.5",
        }.items():  # fmt: skip
            overrides = [f"{key}.{name}={value}"]
            if name != "gpus":
                overrides.append(f"{key}.urls=[http://a:1]")
            yield Case(
                f"{key}.{name} = {value}", train(run_dir, *sglang, *overrides), f"{key}.{name}",
                value.strip("[]").replace(",", ", "),
            )  # fmt: skip
        yield Case(
            f"{key}.gpus below 0", train(run_dir, *sglang, f"{key}.gpus=[-1]"), f"{key}.gpus", "-1"
        )
        yield Case(
            f"{key}.api_key_env: not set", train(run_dir, *sglang, f"{key}.api_key_env=NO_KEY"),
            f"{key}.api_key_env", "NO_KEY",
        )  # fmt: skip
        yield Case(
            f"{key}.host: nobody's", train(run_dir, *sglang, f"{key}.host=192.0.2.1"),
            f"{key}.host", "192.0.2.1",
        )  # fmt: skip


def wandb_is_there() -> bool:
    from importlib.util import find_spec

    return find_spec("wandb") is not None


def of_commands(place: Path, run_dir: Path) -> Iterator[Case]:
    """Commands, options, environment variables, places for figures, ports."""
    launch, plan, doctor = ("launch",), ("plan", TINY), ("doctor", TINY)
    taken = socket.create_server(("", 0))  # open until this process ends
    open_sockets.append(taken)
    port = str(taken.getsockname()[1])
    yield Case("no such command", ("trian",), "trian", "train")
    yield Case("no such comparison", ("compare", "RUN"), "RUN", "runs")
    yield Case("train: no file", ("train", "nowhere.yaml"), "nowhere.yaml", "no such file")
    for option, value, named in (
        ("--nproc-per-node", "abc", "abc"), ("--nproc-per-node", "0", "0"),
        ("--nproc-per-node", "-3", "-3"), ("--nproc-per-node", "1.5", "1.5"),
        ("--nnodes", "none", "none"), ("--nnodes", "0", "0"), ("--node-rank", "-1", "-1"),
        ("--master-port", "0", "0"), ("--master-port", "65536", "65536"),
        ("--master-port", "http", "http"), ("--master-port", port, port),
    ):  # fmt: skip
        name = f"launch {option} {'taken' if value == port else value}"
        yield Case(name, (*launch, f"{option}={value}", TINY), option, named)
    yield Case("launch: no script", (*launch, "--nproc-per-node", "2"), "launch", "CONFIG.yaml")
    yield Case("launch: no file", (*launch, "nowhere.yaml"), "nowhere.yaml", "no such file")
    yield Case("launch: a typo", (*launch, TINY, "train.step=1"), "train.step", "train.steps")
    yield Case("launch: ranks", (*launch, TINY), "student.parallel", "2")
    yield Case(
        "launch -m: a typo", (*launch, "-m", "megatron_taopd.train", TINY, "train.step=1"),
        "train.step", "train.steps",
    )  # fmt: skip
    yield Case("launch -m: no file", (*launch, "-m", "megatron_taopd.train"), "launch", "CONFIG")
    for level in ("loud", "1"):
        yield Case(
            f"TAOPD_LOG_LEVEL={level}", train(run_dir), "TAOPD_LOG_LEVEL", level,
            {"TAOPD_LOG_LEVEL": level},
        )  # fmt: skip
    yield Case("plan: no --gpus", plan, "--gpus", "required")
    for option, value in (
        ("--gpus", "many"), ("--gpus", "0"), ("--gpus", "3"), ("--cluster", "z80"),
        ("--response-tokens", "99999"), ("--prompt-tokens", "0"), ("--trained-share", "2"),
        ("--gpus-per-node", "0"),
    ):  # fmt: skip
        more = () if option == "--gpus" else ("--gpus", "2")
        yield Case(f"plan {option} {value}", (*plan, *more, option, value), option, value)
    yield Case("plan: a value", (*plan, "--gpus", "2", "train.steps=0"), "train.steps", "0")
    for where in (place / "nowhere" / "a.json", place):
        arguments = (*plan, "--gpus", "2", "--json", str(where))
        yield Case(f"plan --json {where.suffix or 'a directory'}", arguments, "--json", str(place))
    yield Case("plan: no option", (*plan, "--gpus", "2", "--what"), "--what", "unrecognized")
    yield Case("doctor --ranks", (*doctor, "--ranks", "many"), "--ranks", "many")
    yield Case("doctor: a typo", (*doctor, "train.step=1"), "train.step", "train.steps")
    yield Case(
        "doctor --json", (*doctor, "--json", str(place / "nowhere" / "a.json")), "--json", "nowhere"
    )
    yield Case("serve --host", ("serve", "MODEL", "--host", "0.0.0.0"), "--host", "0.0.0.0")
    out = str(place / "out")
    yield Case(
        "convert: no model", ("convert", "to-megatron", "--hf", "nowhere", "--out", out, "--quiet"),
        "nowhere", "no config.json",
    )  # fmt: skip
    yield Case(
        "convert: no option", ("convert", "to-hf", "--hf", "x", "--to", "y"), "--out", "required"
    )
    yield Case(
        "convert: no checkpoint",
        ("convert", "to-hf", "--megatron", str(PAIR), "--out", out, "--quiet"),
        str(PAIR), "no metadata.json",
    )  # fmt: skip
    yield Case(
        "verify --tokens",
        ("verify", "--hf", "a", "--megatron", "b", "--tokens", "1"),
        "--tokens",
        "1",
    )
    yield Case("evaluate: nothing", ("evaluate", "--data", "d", "--out", out), "--url", "either")
    yield Case("diagnose: nothing", ("diagnose",), "command", "required")
    yield Case(
        "compare runs: none",
        ("compare", "runs", "nowhere", "--out", out),
        "nowhere",
        "no such file",
    )
    yield Case("compare selectors: no --out", ("compare", "selectors", TINY), "--out", "required")
    arguments = train(run_dir, f"log.prometheus_port={port}", "log.prometheus_host=0.0.0.0")
    yield Case("log.prometheus_port: taken", arguments, "log.prometheus_port", port)


open_sockets: list[socket.socket] = []


def cases(place: Path) -> Iterator[Case]:
    """Every case, whose files are made in `place`."""
    run_dir = place / "run"
    yield from of_schema(run_dir)
    yield from of_files(place, run_dir)
    yield from of_models(place, run_dir)
    yield from of_values_together(run_dir)
    yield from of_commands(place, run_dir)


def tell(case: Case) -> Told:
    """Give an input to `taopd`, and look at what it says. Nothing is built if it says nothing."""
    out, err = io.StringIO(), io.StringIO()
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    with (
        mock.patch.dict(os.environ, environment | case.variables, clear=True),
        mock.patch.object(build, "build", not_refused),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            status: Any = cli.main([*case.arguments])
        except SystemExit as refused:  # argparse's
            status = refused.code
        except Exception as error:  # what a user would see as a traceback
            status = f"{type(error).__name__}: {error}"
    if dist.is_initialized():  # by a start that came as far as its cheap checks
        dist.destroy_process_group()
    line = err.getvalue()
    return Told(
        line.startswith("error") and line.count("\n") == 1 and not out.getvalue(),
        status == 2,
        case.key in line,
        case.value in line,
        bool(REMEDY.search(line)) or ";" in line,
        f"{status}: {line}{out.getvalue()[-300:]}",
    )


def not_refused(*_: Any) -> None:
    """Stand in for `build.build`: what comes so far was not refused."""
    raise AssertionError("not refused")


def main(words: list[str]) -> int:
    """Print the table; return 1 if a case falls short."""
    counts = dict.fromkeys(("one line", "status 2", "key", "value", "remedy"), 0)
    total, short = 0, []
    with tempfile.TemporaryDirectory() as place:
        print(f"{'case':58} " + " ".join(f"{name:>9}" for name in counts))
        for case in cases(Path(place)):
            if not all(word in case.name for word in words):
                continue
            told, total = tell(case), total + 1
            for name, mark in zip(counts, told.marks, strict=True):
                counts[name] += mark
            marks = " ".join(f"{'yes' if mark else 'NO':>9}" for mark in told.marks)
            print(f"{case.name[:58]:58} {marks}", flush=True)
            if not all(told.marks):
                short.append((case, told))
    print(f"\n{total} inputs: " + ", ".join(f"{name} {n}" for name, n in counts.items()))
    for case, told in short:
        print(f"\n{case.name}: {' '.join(case.arguments[1:])}\n  {told.printed.strip()}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
