"""Every check against a situation that is broken in its way; `tools/doctor.py` as a whole."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections import Counter, namedtuple
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from support.commands import run_python
from support.ranks import run_ranks
from transformers import AutoTokenizer

from megatron_taopd.config import load, to_yaml
from megatron_taopd.config.schema import DataSection, RolloutSection, TeacherSection
from megatron_taopd.data.cache import Ragged
from megatron_taopd.data.prompts import Prompts, load_prompts
from megatron_taopd.data.texts import teacher_reader
from megatron_taopd.data.vocab_map import Vocabulary
from megatron_taopd.parallel import nccl
from megatron_taopd.plan.setup import Setup
from megatron_taopd.preflight import agreement, examine, machine, network, storage, texts
from megatron_taopd.preflight.findings import examined, of_all_hosts, ok, warning
from megatron_taopd.preflight.memory import check_memory

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny_pair.yaml"
STUDENT = ROOT / "examples" / "tiny_pair" / "student"
DOCTOR = ROOT / "tools" / "doctor.py"


def found(level, findings, *parts):
    """The one finding of this level; it has the parts, and a remedy if something is wrong."""
    (it,) = [f for f in findings if f.level == level]
    assert all(part in f"{it.what}; {it.remedy}" for part in parts), it
    assert "\n" not in it.what + it.remedy
    assert (level == "ok") == (it.remedy == "")
    return it


def levels(findings):
    return Counter(f.level for f in findings)


# Findings


def test_a_check_that_raises_is_a_finding_and_keeps_the_others():
    def check():
        yield ok("seen before")
        raise OSError("no such device\nand more")

    before, it = examined(check)
    assert before == ok("seen before")
    assert it.level == "error" and it.what == "check: OSError: no such device"


def on_two_hosts():
    rank = torch.distributed.get_rank()
    own = [ok("same"), warning("slow", "wait")] if rank == 1 else [ok("same")]
    return of_all_hosts(own, f"host{rank}", True)


def test_findings_of_hosts_are_told_once_or_by_name():
    expected = [ok("same"), warning("host1: slow", "wait")]
    assert run_ranks(2, on_two_hosts) == [expected, expected]


# This host


def test_the_versions_of_this_environment_fit():
    assert levels(machine.check_versions(sglang=True)).keys() == {"ok"}


def test_other_versions_and_missing_packages_are_told(tmp_path, monkeypatch):
    """A distribution on the path whose requirements are not met."""
    info = tmp_path / "demanding-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: demanding\nVersion: 1.0\nRequires-Python: >=3.99\n"
        "Requires-Dist: torch<2\nRequires-Dist: no-such-package>=1\nRequires-Dist: numpy\n"
        "Requires-Dist: another-one; extra == 'more'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(machine, "DISTRIBUTION", "demanding")
    findings = list(machine.check_versions(sglang=False))
    assert levels(findings) == {"error": 2, "warning": 1, "ok": 1}
    found("warning", findings, "torch: ", "<2")
    python, package = (f for f in findings if f.level == "error")
    assert "python: " in python.what and package.what == "no-such-package: not installed"


def test_open_files_and_harmful_variables(monkeypatch):
    resource = machine.resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, soft), hard))
    try:
        found("warning", machine.check_limits(), "open files: at most 512", "ulimit -n")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    findings = [f for f in machine.check_limits() if "open files" not in f.what]
    found("warning", findings, "NCCL_P2P_DISABLE=1", "unset")
    found("ok", findings, "NCCL_P2P_DISABLE=1")


def test_more_threads_than_cores():
    found("ok", machine.check_cores(2, cores=4, threads=2))
    found("warning", machine.check_cores(2, cores=4, threads=4), "OMP_NUM_THREADS=2")
    found("warning", machine.check_cores(8, cores=4, threads=1), "at most 4")


def test_what_nvidia_smi_says():
    fields = "index,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
    text = "0, 81559, 4, 0\n1, 81559, 62000, 0\n2, 81559, 4, 3\n3, [N/A], [N/A], [N/A]\n"
    findings = list(machine.check_gpus(machine.parse_gpus(fields, text)))
    found("warning", findings, "GPU 1: 60.5 of 79.6 GiB are in use")
    found("error", findings, "GPU 2: 3 uncorrected memory errors")

    topology = (
        "\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\n"
        "GPU0\t X \tNV18\tSYS\tPIX\t0-31\nGPU1\tNV18\t X \tSYS\tSYS\t0-31\n"
        "GPU2\tSYS\tSYS\t X \tPIX\t0-31\nNIC0\tPIX\tSYS\tPIX\t X \n"
    )
    assert machine.links(topology) == {"NV18": 1, "SYS": 2}


# Names, ports, ranks


@pytest.fixture
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def test_a_rendezvous_port_in_use(monkeypatch, taken_port):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_PORT", str(taken_port))
    found("warning", network.check_rendezvous(), f"port {taken_port}", "in use", "--standalone")


def test_server_addresses(taken_port):
    listens, silent = f"http://127.0.0.1:{taken_port}", "http://127.0.0.1:1"
    findings = list(network.check_urls("rollout.servers", [listens, silent]))
    found("ok", findings, f"rollout.servers.urls: {listens}")
    found("error", findings, f"rollout.servers.urls: {silent}", "refused")
    found("ok", network.check_own_servers("rollout.servers", "127.0.0.1"))
    foreign = network.check_own_servers("rollout.servers", "192.0.2.1")  # nobody's (RFC 5737)
    found("error", foreign, "rollout.servers.host: 192.0.2.1")


@pytest.fixture
def nccl_environment(monkeypatch):
    """A function that sets NCCL's variables, and no others."""

    def only(**variables):
        for name in [name for name in os.environ if name.startswith("NCCL_")]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    only()
    return only


def test_own_servers_have_the_trainers_variables_of_nccl(nccl_environment):
    def check(*args):
        return list(network.check_own_nccl("rollout.servers", args))

    found("ok", check("--log-level", "info"), "NCCL_CUMEM_ENABLE=0, NCCL_NVLS_ENABLE=0, as in")
    it = found("warning", check("--enable-nccl-nvls"), "NCCL_NVLS_ENABLE is 0 in the trainer")
    assert "1 in its servers, by rollout.servers.args" in it.what
    assert "export NCCL_NVLS_ENABLE=1" in it.remedy
    assert levels(check("--enable-symm-mem")) == {"warning": 2}
    nccl_environment(NCCL_CUMEM_ENABLE="1")  # which the servers inherit
    found("ok", check(), "NCCL_CUMEM_ENABLE=1, NCCL_NVLS_ENABLE=0")
    found("warning", check("--enable-symm-mem"), "NCCL_NVLS_ENABLE")


@pytest.fixture
def server_info():
    """The URL of a server that answers /server_info with these options to requests with a key."""
    options = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path == "/server_info" and self.headers["Authorization"] == "Bearer secret"
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(json.dumps(options).encode())

        def log_message(self, *_): ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", options
    server.shutdown()


def test_servers_that_are_there_have_the_trainers_variables_of_nccl(
    nccl_environment, monkeypatch, server_info
):
    url, options = server_info
    monkeypatch.setenv("KEY", "secret")

    def check(key="KEY"):
        return list(network.check_nccl_of_urls("rollout.servers", [url], key))

    options.update(enable_symm_mem=False, enable_nccl_nvls=False)
    found("ok", check(), f"rollout.servers.urls: {url}: NCCL_CUMEM_ENABLE=0")
    found("warning", check(None), url, "not known", "401")
    options.update(enable_nccl_nvls=True)
    found("warning", check(), url, "NCCL_NVLS_ENABLE is 0 in the trainer and 1 in that server")
    nccl_environment(NCCL_CUMEM_ENABLE="1", NCCL_NVLS_ENABLE="1")
    found("warning", check(), "NCCL_CUMEM_ENABLE is 1 in the trainer and 0 in that server, unless")


@pytest.mark.parametrize(
    ("overrides", "compared"),
    [
        (["rollout.engine=sglang"], ["check_own_nccl"]),
        (["rollout.engine=sglang", "rollout.servers.urls=[http://h:1]"], ["check_nccl_of_urls"]),
        (["rollout.engine=sglang", "rollout.sync.transport=disk"], []),
        (["teacher.engine=sglang"], []),
    ],
)
def test_nccl_is_compared_where_trainer_and_servers_share_a_group(overrides, compared):
    checks = examine._check_servers(load(str(TINY), overrides))
    assert [check.__name__ for check, *_ in checks if "nccl" in check.__name__] == compared


def test_names():
    assert not list(network.check_name("this host", "localhost"))
    assert ok("127.0.0.1 can be reached") in network.check_loopback()
    findings = network.check_name("this host", "no-such-host.invalid")
    found("warning", findings, "no-such-host.invalid does not resolve", "GLOO_SOCKET_IFNAME")


RANK = network.Rank(0, "host0", "H100", {"torch": "2.13.0"}, 100.0, 1000.0)


def test_ranks_that_differ():
    alike = [replace(RANK, rank=i, host=f"host{i // 2}") for i in range(4)]
    assert levels(network.compared(alike)) == {"ok": 1}
    *others, last = alike
    for odd, level, *parts in (
        (replace(last, speed=300.0), "warning", "rank 3 on host1", "3.3 times slower"),
        (replace(last, clock=103.0), "warning", "3.0 s apart"),
        (replace(last, device="A100"), "warning", "devices differ: A100, H100"),
    ):
        found(level, network.compared([*others, odd]), *parts)
    new = {"torch": "2.14.0"}
    odd = [*alike[:2], *(replace(rank, versions=new) for rank in alike[2:])]
    found("error", network.compared(odd), "host1: torch 2.14.0", "host0 has 2.13.0")
    variables = {"host0": {}, "host1": {"NCCL_ALGO": "Ring"}}
    odd = [replace(rank, nccl=nccl.values(variables[rank.host])) for rank in alike]
    found("warning", network.compared(odd), "host1: NCCL_ALGO is Ring; on host0 it is unset")


def ranks_of_two_hosts():
    return network.check_ranks(f"host{torch.distributed.get_rank() // 2}")


def test_links_are_timed_inside_hosts_and_across():
    answers = run_ranks(4, ranks_of_two_hosts)
    seen = [f.what for f in answers[0] if f.level == "ok"]
    assert seen[0] == "4 ranks on 2 hosts answer: host0, host1"
    assert seen[1].startswith("all-reduce inside a host: ")
    assert seen[2].startswith("all-reduce over all ranks: ")
    assert all(answer == answers[0] for answer in answers)


# Disk


def tree(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*"))


def test_a_directory_is_tried_and_left_as_it_was(tmp_path):
    (tmp_path / "there").mkdir()
    for directory in ("there", "there/not/yet", "."):
        found("ok", storage.check_write("run.dir", tmp_path / directory))
    assert tree(tmp_path) == ["there"]

    (tmp_path / "file").touch()
    findings = storage.check_write("run.dir", tmp_path / "file" / "run")
    found("error", findings, f"run.dir: {tmp_path}/file/run: Not a directory")
    found("error", storage.check_write("run.dir", Path("/proc/run")), "/proc/run")
    assert tree(tmp_path) == ["file", "there"]


def shared(directory, blind_rank):
    rank = torch.distributed.get_rank()
    appears = storage._appears
    if rank == blind_rank:  # another host's disk cannot be had here
        storage._appears = lambda path: False
    try:
        return storage.check_shared(Path(directory), f"host{rank}")
    finally:
        storage._appears = appears


def test_a_directory_that_not_every_host_sees(tmp_path):
    for answer in run_ranks(2, shared, str(tmp_path / "run"), None):
        found("ok", answer, "all 2 ranks see it")
    for answer in run_ranks(2, shared, str(tmp_path / "run"), 1):
        found("error", answer, "is not seen on host1", "shared file system")
    for answer in run_ranks(2, shared, "/proc/run", None):
        found("error", answer, "run.dir: /proc/run")
    assert tree(tmp_path) == []


def start_on_nodes(overrides, ranks_of_a_node, blind_rank):
    from contextlib import redirect_stderr
    from io import StringIO
    from unittest import mock

    from megatron_taopd.monitoring import logs

    blind = torch.distributed.get_rank() == blind_rank
    sees = mock.patch.object(storage, "_appears", lambda path: not blind and path.exists())
    node = mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(ranks_of_a_node))
    with sees, node, redirect_stderr(StringIO()) as said:
        logs.set_up()
        return examine.before_run(load(TINY, overrides)), said.getvalue()


def test_a_run_on_nodes_that_do_not_share_its_directory_does_not_start(tmp_path):
    overrides = [f"run.dir={tmp_path}/run"]
    (can, said), (other, nothing) = run_ranks(2, start_on_nodes, overrides, 1, 1)
    assert (can, other, nothing) == (False, False, "")
    assert said.startswith(f"error: run.dir: {tmp_path}/run of rank 0 is not seen on ")
    assert said.count("\n") == 1 and "shared file system" in said
    assert run_ranks(2, start_on_nodes, overrides, 1, None) == [(True, "")] * 2
    assert run_ranks(2, start_on_nodes, overrides, 2, 1) == [(True, "")] * 2  # one node: not asked
    assert tree(tmp_path) == []


def test_space(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    free = 0
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: Usage(10**12, 0, free))

    def check(sync_copy=False, average=False):
        # 14 bytes of a bf16 parameter and Adam's state, kept twice and written once, and an export
        return storage.check_space(tmp_path / "run", 10**9, 2, 2, True, sync_copy, average)

    free = 44 * 10**9
    found("ok", check(), "44.0 GB free", "take 44.00 GB")
    found("warning", check(sync_copy=True), "take 46.00 GB")
    found("warning", check(average=True), "checkpoints of 18.00 GB", "take 56.00 GB")
    free = 20 * 10**9
    found("warning", check(), "checkpoint.keep_last")
    free = 13 * 10**9
    found("error", check(), "13.0 GB free", "checkpoints of 14.00 GB")
    found("warning", storage.check_shared_memory(tmp_path / "none"), "not there", "tmpfs")
    free = 64 << 20
    found("warning", storage.check_shared_memory(tmp_path), "64 MiB free", "--shm-size")


def test_the_parameters_that_space_is_reckoned_from():
    """Norms aside, those of the checkpoint, which is fp32."""
    actual = (STUDENT / "model.safetensors").stat().st_size / 4
    assert examine.parameters(STUDENT) == pytest.approx(actual, rel=0.01)


def test_what_a_run_directory_would_do(tmp_path):
    config = {"optimizer": {"lr": 1e-3}, "train": {"steps": 10}, "run": {"dir": "there"}}

    def check(steps=10, config=config):
        return storage.check_resume(tmp_path, steps, config)

    found("ok", check(), "a new run")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    found("warning", check(), "has a log and no checkpoint")

    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000008.incomplete").mkdir()
    assert next(iter(check())).what == "run.dir: resumes after step 4 of 10"
    found("warning", check(steps=4), "nothing is left to do")

    before = {"optimizer": {"lr": 1e-4}, "train": {"steps": 10}, "run": {"dir": "here"}}
    storage.save_config(tmp_path, yaml.safe_dump(before))
    found("warning", check(), "optimizer.lr 0.0001 → 0.001")
    storage.save_config(tmp_path, yaml.safe_dump(config))
    assert levels(check()) == {"ok": 1}


# Texts

WORDS = "{% for m in messages %}{{ m['content'] }} .{% endfor %}"  # a turn ends with a full stop


@pytest.fixture
def tiny():
    return Vocabulary.from_pretrained(STUDENT)


def with_template(vocabulary, template):
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    tokenizer.chat_template = template
    return replace(vocabulary, tokenizer=tokenizer)


def test_an_end_of_turn_that_ends_nothing(tiny):
    assert levels(texts.check_ends("student", tiny, "rollout.stop_token_ids")) == {"ok": 1}
    talking = with_template(tiny, WORDS)
    stop = talking.tokenizer.convert_tokens_to_ids(".")
    findings = list(texts.check_ends("student", talking, "rollout.stop_token_ids"))
    found("warning", findings, "student.path", f"add {stop} to rollout.stop_token_ids")
    fixed = talking.ending_at([stop])
    assert levels(texts.check_ends("student", fixed, "rollout.stop_token_ids")) == {"ok": 1}

    endless = replace(tiny, eos_token_ids=())
    found("error", texts.check_ends("student", endless, "stop ids"), "no id ends a response")
    other = replace(tiny, eos_token_ids=(stop,))
    found("warning", texts.check_ends("student", other, "stop ids"), "'<eos>' (1)")


def test_a_teacher_that_ends_where_the_student_does_not(tiny):
    """A base model as the student: its own template, if it has one, says nothing of it."""
    talking = with_template(tiny, WORDS)
    stop = talking.tokenizer.convert_tokens_to_ids(".")
    teacher = talking.ending_at([stop])
    findings = [f for f in texts.check_vocabularies(tiny, teacher) if "template" not in f.what]
    found("warning", findings, "the teacher ends an answer with '.'", "the more it learns")
    found("warning", findings, "the teacher ends", f"add {stop} to rollout.stop_token_ids")
    ending = texts.check_vocabularies(tiny.ending_at([stop]), teacher)
    assert not any("the teacher ends" in f.what for f in ending)
    endless = replace(tiny, eos_token_ids=())  # of a teacher, which writes nothing
    assert levels(texts.check_vocabularies(tiny, endless)) == {"ok": 2}


def test_one_chat_template_of_two(tiny):
    findings = list(texts.check_vocabularies(tiny, with_template(tiny, WORDS).ending_at([10])))
    assert any(f.what.startswith("student.path: no chat template") for f in findings)


needs_data = pytest.mark.skipif("TAOPD_DATA" not in os.environ, reason="TAOPD_DATA is not set")


@needs_data
def test_real_tokenizers_that_differ(tiny):
    path = Path(os.environ["TAOPD_DATA"]) / "tokenizers" / "qwen"
    tokenizer = AutoTokenizer.from_pretrained(path)
    qwen = Vocabulary(tokenizer, 151936, (151643,))  # <|endoftext|>, as a base model's config has
    findings = list(texts.check_ends("student", qwen, "rollout.stop_token_ids"))
    found("warning", findings, "'<|im_end|>' (151645)", "they grow to rollout.max_new_tokens")

    chat = qwen.ending_at([151645])
    assert levels(texts.check_vocabularies(chat, chat))["warning"] == 0
    findings = list(texts.check_vocabularies(chat, tiny))
    masked = next(f.what for f in findings if f.what.startswith("vocabularies: "))
    assert "of the student's masked; by their role: end of turn" in masked
    spelled = Prompts([tokenizer("ignored")["input_ids"]], ["say <|im_end|>"], [None], 0)
    findings = texts.check_prompts("data.prompts", spelled, chat, tiny, 100)
    assert any("1 prompts spell a special token" in f.what for f in findings)


def test_prompts(tiny, tmp_path):
    records = ["Sam has 8 eggs . ?", "Sam has 8 eggs . ?", "   ", "Sam has 8 eggs . " * 9]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": r, "answer": 4}) + "\n" for r in records))
    section = DataSection(max_prompt_tokens=10**6, deduplicate=False)
    prompts = load_prompts(file, tiny.tokenizer, section)

    findings = list(texts.check_prompts("data.prompts", prompts, tiny, tiny, 20))
    assert levels(findings)["warning"] == 3
    seen = "\n".join(f"{f.what}; {f.remedy}" for f in findings)
    assert "25.0% are over data.max_prompt_tokens 20 (1 for the student) and dropped" in seen
    assert "1 prompts have no text" in seen
    assert "1 prompts repeat another one ('Sam has 8 eggs . ?' comes 2 times)" in seen
    assert "the first one reads '<bos> Sam has 8 eggs . ?'" in seen
    none_left = texts.check_prompts("data.prompts", prompts, tiny, tiny, 0)
    assert any(f.level == "error" and "none is left" in f.remedy for f in none_left)

    findings = list(texts.check_held_out(prompts, prompts))
    assert [f.what for f in findings] == ["eval.prompts: 3 of 4 are in data.prompts, too"]


@pytest.mark.parametrize(("overflow", "what"), [("cut", "they are cut"), ("drop", "are dropped")])
def test_contexts(tiny, tmp_path, overflow, what):
    rows = [("Sam has 8 eggs . ?", "= 8"), ("Zoe has 9 cards . ?", "= 9 . " * 9), ("a ?", None)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "hint": h}) + "\n" for p, h in rows))
    section = TeacherSection("teacher", context_column="hint", context_overflow=overflow)
    reader = teacher_reader(section, tiny)
    section_of_data = DataSection(max_prompt_tokens=10**6)
    prompts = load_prompts(file, tiny.tokenizer, section_of_data, None, reader)
    findings = list(texts.check_contexts("teacher", section, prompts, tiny, 20))
    assert levels(findings) == {"ok": 2, "warning": 1}
    found("warning", findings, "1 make the prompt longer than 20 tokens", what)
    seen = "\n".join(finding.what for finding in findings)
    assert "2 of 3 have a 'hint'" in seen
    assert "the teacher reads the first one as '<bos> Sam has 8 eggs . ? = 8'" in seen

    limits = texts.check_prompts("data.prompts", prompts, tiny, tiny, 1000, 20)
    found("warning", limits, "33.3% are over teacher.max_prompt_tokens 20 (0 for the student, 1")
    assert not list(texts.check_contexts("teacher", TeacherSection("teacher"), prompts, tiny, 20))


def test_references_are_measured(tiny):
    """Of 3, 5 and 12 tokens; two of these are not valid."""
    ends = np.array([0, 3, 8, 20])
    references = Ragged(np.full(20, 5), ends, np.ndarray.tolist)
    prompts = Prompts([[2]] * 3, ["x"] * 3, [None] * 3, 0, references=references)
    mixed = RolloutSection(max_new_tokens=12, mix={"dataset": 0.2}, warmup_steps=4)
    [finding] = texts.check_references(mixed, prompts)
    found(
        "ok", [finding], "7 tokens on average, all valid; 20.0% of the sequences", "first 4 steps"
    )
    valid = np.ones(20, np.uint8)
    valid[[3, 5]] = 0
    masked = replace(prompts, valid=Ragged(valid, ends, np.ndarray.tolist))
    findings = [*texts.check_references(RolloutSection(max_new_tokens=11), masked)]
    found("ok", findings, "90.0% valid; 0.0% of the sequences are references")
    found("warning", findings, "33.3% are longer than rollout.max_new_tokens 11 and cut there")
    assert not [*texts.check_references(mixed, replace(prompts, references=None))]


def test_a_bos_that_comes_twice(tiny):
    bos = tiny.tokenizer.bos_token_id
    prompts = Prompts([[bos, bos, 10, 11]], ["x"], [None], 0)
    found("warning", texts.check_prompts("data.prompts", prompts, tiny, tiny, 9), "twice")


# Models


def test_memory_by_estimate():
    """Of the plan, which has tests of its own; here a device of a GiB, and one of a MiB."""
    setup = Setup.of(load(TINY), gpus=2, gpus_per_node=2)
    found("ok", check_memory(setup, 1.0, 0.0), "by estimate at most", "of 1.0 GiB")
    findings = list(check_memory(setup, 2**-10, 0.0))
    assert levels(findings).keys() == {"warning"}
    assert all(" needs " in f.what and f.remedy.startswith("change ") for f in findings)


def broken_teacher(directory):
    """The tiny teacher with a weight that is not a number."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(ROOT / "examples" / "tiny_pair" / "teacher", directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def compare(overrides, other_weights=False):
    """The findings on the models; `other_weights`: the engine has not the trainer's."""
    from megatron_taopd.parallel import platform
    from megatron_taopd.rollout.local import LocalEngine

    platform.initialize()
    generate = LocalEngine.generate

    def spoiled(self, *args):
        for parameter in self.model.parameters():
            parameter.mul_(1.1)
        return generate(self, *args)

    if other_weights:
        LocalEngine.generate = spoiled
    try:
        return list(agreement.check_models(load(TINY, overrides)))
    finally:
        LocalEngine.generate = generate


def test_engine_trainer_and_teacher_agree_in_the_layouts_of_the_run():
    engine, teacher = run_ranks(2, compare, [])[1]
    assert engine.level == teacher.level == "ok"
    assert "engine local and trainer (TP(2)-PP(1)-DP(1)): log p of 8 greedy" in engine.what
    assert teacher.what.startswith("teacher (TP(1)-PP(2)-DP(1)): D of those rows is ")


def test_a_server_agrees_too(tmp_path):
    """Started as the run would, and gone afterwards; its log is not in run.dir."""
    (tmp_path / "model").symlink_to(STUDENT)
    options = ["student.parallel.tp=1", "teacher.parallel.pp=1", f"run.dir={tmp_path}/run"]
    options += ["rollout.engine=sglang", f"student.path={tmp_path}/model"]
    options += ["rollout.servers.max_total_tokens=4096"]
    engine, teacher = run_ranks(1, compare, options, timeout=300)[0]
    assert engine.level == teacher.level == "ok"
    assert engine.what.startswith("engine sglang and trainer ")
    assert tree(tmp_path) == ["model"]
    commands = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    assert not [c for c in commands if f"{tmp_path}/model" in c]


def test_an_engine_with_other_weights_and_a_teacher_with_broken_ones(tmp_path):
    findings = run_ranks(2, compare, [], True)[0]
    found("error", findings, "0.001 on average is rounding", "the same weights on both sides?")
    broken_teacher(tmp_path / "teacher")
    findings = run_ranks(2, compare, [f"teacher.path={tmp_path}/teacher"])[0]
    found("error", findings, "teacher", "not finite")


def test_a_model_that_does_not_fit_is_left_out():
    findings = run_ranks(2, compare_without_memory)[0]
    found("warning", findings, "engine and trainer not compared", "--quick")


def compare_without_memory():
    agreement_bytes = agreement.available_bytes
    agreement.available_bytes = lambda local_ranks: 1 << 20
    try:
        return compare([])
    finally:
        agreement.available_bytes = agreement_bytes


# The tool, and the start of a run


def doctor(*arguments):
    return run_python("tools/doctor.py", *arguments, seconds=300)


def test_a_run_that_can_start(tmp_path):
    report = tmp_path / "report.json"
    done = doctor(TINY, f"run.dir={tmp_path}/run", "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 errors" in done.stdout
    findings = json.loads(report.read_text())["findings"]
    assert list(dict.fromkeys(f["check"] for f in findings)) == [
        "configuration", "versions", "machine", "network", "disk", "run.dir", "texts", "models",
    ]  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_one_that_cannot(tmp_path):
    report = tmp_path / "report.json"
    options = ["--ranks", 3, "--quick", "--json", report]
    done = doctor(TINY, "run.dir=/proc/run", "data.prompts=none.jsonl", *options)
    assert done.returncode == 1
    errors = [f for f in json.loads(report.read_text())["findings"] if f["level"] == "error"]
    assert list(dict.fromkeys(f["check"] for f in errors)) == ["configuration", "disk"]
    assert "data.prompts" in errors[0]["what"] and "/proc/run" in errors[1]["what"]

    done = doctor(TINY, "optimizer.learning_rate=1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: optimizer.learning_rate: unknown key")
    assert done.stderr.count("\n") == 1


def test_the_start_of_a_run_says_nothing_if_all_is_well(tmp_path, capsys):
    config = load(TINY, [f"run.dir={tmp_path}/run"])
    assert examine.before_run(config)
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()  # nothing is kept of a run that is not built yet

    storage.save_config(tmp_path / "run", to_yaml(config))
    assert load(tmp_path / "run" / "config.yaml") == config  # for the next start to compare with
    (tmp_path / "run" / "checkpoints" / "step_00000004").mkdir(parents=True)
    assert examine.before_run(load(TINY, [f"run.dir={tmp_path}/run", "optimizer.lr=1"]))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: run.dir: ") and "optimizer.lr 0.001 → 1.0" in line


def start_with(overrides, prompts):
    """`main` with these held-out prompts; the exit status, what it printed, whether it built."""
    from contextlib import redirect_stderr
    from io import StringIO

    from megatron_taopd import build as building
    from megatron_taopd import train

    built = []
    build, building.build = building.build, lambda *_: built.append(1)
    try:
        with redirect_stderr(StringIO()) as said:
            status = train.main([str(TINY), *overrides, *prompts])
    finally:
        building.build = build
    return status, said.getvalue(), built


@pytest.mark.parametrize(
    "key, record, why",
    [
        ("eval.prompts", {"prompt": "a", "answer": None}, "column 'answer' is null; a ref"),
        ("eval.prompts", {"prompt": "a"}, "no column 'answer'"),
        ("data.prompts", {"prompt": [{"role": "human", "content": "a"}]}, "(role 'human')"),
        ("data.prompts", {"prompt": ""}, "text or a list of messages"),
    ],
)  # fmt: skip
def test_a_prompt_file_that_would_end_a_run_later_ends_it_at_once(tmp_path, key, record, why):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "Sam has 8 eggs . ?", "answer": 8}, record]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    overrides = [f"run.dir={tmp_path}/run", f"{key}={file}"]
    (status, said, built), (other_status, nothing, other) = run_ranks(2, start_with, overrides, [])
    assert status == other_status == 2 and not built and not other
    assert said.startswith(f"error: {key}: {file} line 2: ") and why in said
    assert said.count("\n") == 1 and nothing == ""


def test_a_student_that_never_ends_is_told_at_the_start(tmp_path, capsys):
    """As a base model of an instruct teacher: its configuration does not name the end of a turn."""
    student = tmp_path / "student"
    shutil.copytree(STUDENT, student)
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    tokenizer.chat_template = WORDS
    tokenizer.save_pretrained(student)
    stop = tokenizer.convert_tokens_to_ids(".")
    overrides = [f"run.dir={tmp_path}/run", f"student.path={student}"]
    for key in ("data.prompts", "eval.prompts"):
        overrides.append(f"{key}={ROOT / 'examples' / 'tiny_pair' / 'test.jsonl'}")
    assert examine.before_run(load(TINY, overrides))
    said = capsys.readouterr().err
    assert f"add {stop} to rollout.stop_token_ids" in said
    assert examine.before_run(load(TINY, [*overrides, f"rollout.stop_token_ids=[{stop}]"]))
    assert f"add {stop}" not in capsys.readouterr().err


def start_unwritable():
    from contextlib import redirect_stderr
    from io import StringIO

    from megatron_taopd.train import main

    with redirect_stderr(StringIO()) as said:
        return main([str(TINY), "run.dir=/proc/run"]), said.getvalue()


def test_a_run_that_cannot_write_ends_at_once_and_says_so_in_a_line():
    (status, said), (other_status, nothing) = run_ranks(2, start_unwritable)
    assert status == other_status == 2
    assert said.startswith("error: run.dir: /proc/run: ") and said.count("\n") == 1
    assert nothing == ""
