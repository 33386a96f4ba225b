"""Keys of SGLang servers, through a real run whose servers stand in for SGLang's."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from unittest import mock

import httpx
import pytest
from support import patience
from support.fake_sglang import in_place_of_sglang, serving
from support.keys import (
    COMMAND,
    FOUND,
    LATE,
    OWN,
    PATIENCE,
    START,
    given,
    section,
    value,
    written,
)
from support.observed import FROZEN, SMALL, STUDENT, TEACHER, observed
from support.ranks import run_ranks

from megatron_taopd.config.speculative import KNOWN, server_args
from megatron_taopd.serving import server as serving_module

NAMES = ("Ann", "Bob", "Eve", "Ida")
MODELS = {"rollout": STUDENT, "teacher": TEACHER}
# Every option that is passed through, each at a value of its own.
DRAFTS = {
    "algorithm": "EAGLE3",
    "draft_model_path": "owner/draft",
    "draft_model_revision": "v2",
    "num_steps": 3,
    "eagle_topk": 2,
    "num_draft_tokens": 5,
    "ngram_min_bfs_breadth": 6,
    "ngram_max_bfs_breadth": 7,
    "ngram_max_trie_depth": 8,
    "ngram_capacity": 9,
    "ngram_match_type": "PROB",
}
ENVIRONMENT = {"TAOPD_STUDENT_KEY": "sesame", "TAOPD_TEACHER_KEY": "abracadabra"}


def run(directory, overrides, backends=(), timeout=60):
    """A run with these servers in place of SGLang's."""
    options = [f"run.dir={directory}", FROZEN, "rollout.prompts=6", *overrides]
    urls = {backend.path: backend.url for backend in backends}
    [seen] = run_ranks(1, observed_there, [*SMALL, *options], urls, timeout=timeout)
    return seen


def observed_there(overrides, backends):
    os.environ |= ENVIRONMENT
    with in_place_of_sglang(backends):
        return observed(overrides)


def run_and_listen(directory, overrides, timeout):
    """A run, and what it has asked of servers: (URL, payload) of each request."""
    options = [f"run.dir={directory}", FROZEN, *overrides]
    [(seen, asked)] = run_ranks(1, observed_asking, [*SMALL, *options], timeout=timeout)
    return seen, asked


def observed_asking(overrides):
    asked, get, post = [], httpx.AsyncClient.get, httpx.AsyncClient.post

    def noted_get(client, url, **options):
        asked.append((url, None))
        return get(client, url, **options)

    def noted_post(client, url, **options):
        asked.append((url, options.get("json")))
        return post(client, url, **options)

    with (
        mock.patch.object(httpx.AsyncClient, "get", noted_get),
        mock.patch.object(httpx.AsyncClient, "post", noted_post),
    ):
        return observed(overrides), asked


@pytest.fixture
def backends():
    with serving(STUDENT) as student, serving(TEACHER) as teacher:
        yield {"rollout": student, "teacher": teacher}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run with its own servers of both models: the keys, the backends, and what was seen."""
    keys = given(
        OWN,
        {
            "rollout.sync.transport": "tensor",
            "rollout.servers.api_key_env": "TAOPD_STUDENT_KEY",
            "teacher.servers.api_key_env": "TAOPD_TEACHER_KEY",
        },
    ) | given(COMMAND)
    # Answers take long enough for requests to wait; the student's differ from the trainer's.
    with serving(STUDENT, seconds=0.05, shift=-0.5) as student, serving(TEACHER, seconds=0.05) as t:
        directory = tmp_path_factory.mktemp("own")
        # The probe of the student's weights has more rows than fit the head memory.
        prompts = directory / "prompts.jsonl"
        prompts.write_text(
            "".join(json.dumps({"prompt": f"{name} has 9 nuts . " * 6}) + "\n" for name in NAMES)
        )
        options = ["train.steps=2", "rollout.prompts=12", "train.head_memory_mib=1"]
        options += [f"data.prompts={prompts}", *written(keys)]
        seen = run(directory / "run", options, [student, t])
        yield keys, {"rollout": student, "teacher": t}, seen


def test_a_runs_own_servers(own):
    keys, backends, seen = own
    assert seen.status == 0, seen.printed
    for model, backend in backends.items():
        wanted = section(keys, f"{model}.servers")
        used = {request.server for request in backend.completions}
        assert len(backend.commands) == len(used) == wanted["replicas"]
        gpus = [command["gpus"].split(",") for command in backend.commands]
        tp, devices = wanted["tp"], [*map(str, wanted["gpus"])]
        groups = [devices[i : i + tp] for i in range(0, len(devices), tp)]
        assert sorted(gpus) == sorted(groups)
        for command in backend.commands:
            assert option(command, "--host") == wanted["host"]
            assert command["arguments"][-4:-2] == wanted["args"]  # but for the port
        variable = wanted["api_key_env"]
        assert {r.key for r in backend.requests if r.path != "/health_generate"} == {
            f"Bearer {ENVIRONMENT[variable]}"
        }
        assert backend.most <= wanted["concurrency"]

    # What they were asked.
    student, teacher = backends.values()
    assert {r.payload["top_logprobs_num"] for r in teacher.completions} == {
        value(keys["teacher.topk"])
    }
    assert all(record["teacher/topk_bound"] == 1 for record in seen.steps)
    assert [record["rollout/staleness_max"] for record in seen.steps] == [0, 1]
    asked = [r.payload["input_ids"] for r in student.asked("/generate") if probes(r.payload)]
    probed = sum(len(ids) - 1 for ids in asked[:4])
    pushed = [r.payload for r in student.asked("/update_weights_from_tensor")]
    assert pushed and not student.asked("/update_weights_from_disk")
    limit = value(keys["rollout.sync.bucket_mib"]) << 20
    for payload in pushed:
        copies = payload["serialized_named_tensors"]  # in base64, with some names
        assert len(copies) == value(keys["rollout.servers.tp"])
        assert all(len(copy) * 3 / 4 < limit + 10_000 for copy in copies)
    assert len(pushed) > len(seen.steps) * value(keys["rollout.servers.replicas"])
    assert seen.logits < probed  # whose logits would not fit the head memory


def probes(payload) -> bool:
    """Whether it is for the log-probabilities of one sequence, after a sync."""
    return "logprob_start_len" in payload and isinstance(payload["input_ids"][0], int)


def test_sglang_understands_their_command_lines(own):
    """By its own parser; in a process of its own, as its import takes long."""
    keys, backends, _ = own
    assert DRAFTS.keys() == {*KNOWN}
    commands = {
        model: [*map(str, backend.commands[0]["arguments"])] for model, backend in backends.items()
    }
    commands["drafts"] = [*commands["rollout"], *server_args(DRAFTS)]
    stubs = Path(serving_module.__file__).parent / "cpu_stubs"
    path = os.pathsep.join(filter(None, (str(stubs), os.environ.get("PYTHONPATH"))))
    done = patience.run(
        [sys.executable, "-c", PARSES, json.dumps(commands)],
        seconds=200,
        env={**os.environ, "PYTHONPATH": path, "SGLANG_USE_CPU_ENGINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    parsed = json.loads(done.stdout.splitlines()[-1])
    drafts = parsed.pop("drafts")
    assert {name: drafts[f"speculative_{name}"] for name in DRAFTS} == DRAFTS
    for model, found in parsed.items():
        wanted = section(keys, f"{model}.servers")
        expected = {
            "model_path": MODELS[model],
            "host": wanted["host"],
            "tp_size": wanted["tp"],
            "dtype": "float32",
            "context_length": wanted["context_length"],
            "max_running_requests": wanted["max_running_requests"],
            "max_total_tokens": wanted["max_total_tokens"],
            "mem_fraction_static": wanted["mem_fraction"],
            "api_key": ENVIRONMENT[wanted["api_key_env"]],
            "log_level": wanted["args"][1],
            "skip_tokenizer_init": True,
            "speculative_algorithm": None,
        }
        assert {name: found[name] for name in expected} == expected


PARSES = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
commands = json.loads(sys.argv[1]).items()
found = {model: vars(parser.parse_args(arguments)) for model, arguments in commands}
print(json.dumps(found, default=str))
"""


def option(command, name):
    arguments = command["arguments"]
    return arguments[arguments.index(name) + 1]


def test_servers_that_are_there(tmp_path, backends):
    student, teacher = backends.values()
    keys = given(
        FOUND,
        {
            "rollout.servers.urls": f"[{student.url}]",
            "teacher.servers.urls": f"[{teacher.url}]",
            "rollout.sync.transport": "disk",
            "rollout.sync.dir": tmp_path / "shared",
        },
    )
    options = ["rollout.engine=sglang", "teacher.engine=sglang", *written(keys)]
    seen = run(tmp_path / "run", options)
    assert seen.status == 0, seen.printed
    for backend in backends.values():
        assert not backend.commands and len(backend.completions) == 6
    # Weights come before the first request, as nobody knows what such a server has, and at the end.
    updates = student.asked("/update_weights_from_disk")
    assert len(updates) == 2
    for update in updates:
        assert Path(update.payload["model_path"]).is_relative_to(keys["rollout.sync.dir"])
    [released] = student.asked("/release_memory_occupation")
    [resumed, _] = student.asked("/resume_memory_occupation")
    assert max(r.ended for r in student.completions) < released.began
    assert released.began < resumed.began < updates[1].began


@pytest.mark.parametrize("model", MODELS)
def test_requests_are_given_up_in_time(tmp_path, backends, model):
    """A request is tried once and then so many times, and each try is waited for so long."""
    keys = given(PATIENCE)
    backend, mine = backends[model], {k: v for k, v in keys.items() if k.startswith(model)}
    backend.seconds = 3
    options = [f"{model}.engine=sglang", f"{model}.servers.urls=[{backend.url}]"]
    options += ["rollout.prompts=1", "rollout.sync.transport=tensor"]
    seen, asked = run_and_listen(tmp_path, [*options, *written(mine)], timeout=60)
    wanted = section(keys, f"{model}.servers")
    attempts, seconds = 1 + wanted["max_retries"], wanted["timeout_s"]
    assert f"failed {attempts} times, the last time: " in seen.status
    assert f"no answer within {seconds:g} s" in seen.status
    # By the client's count: on a busy machine a request may be given up before it is read.
    completions = [
        url for url, payload in asked if payload and "input_ids" in payload and "rid" in payload
    ]
    assert len(backend.completions) <= len(completions) == attempts


@pytest.mark.parametrize("model", MODELS)
def test_servers_that_do_not_start_are_given_up_in_time(tmp_path, backends, model):
    key = f"{model}.servers.start_timeout_s"
    chosen = {f"{m}.servers.start_timeout_s": "0.6" for m in MODELS}
    keys = given(START, chosen)
    options = [f"{model}.engine=sglang", f"{model}.servers.args=[--hangs]"]
    overrides = [*options, *written({key: keys[key]})]
    seen = run(tmp_path, overrides, backends.values(), timeout=20)
    assert seen.status == 2
    assert f"{model}.servers: the SGLang server was not ready within {keys[key]} s" in seen.printed


@pytest.mark.parametrize("model", MODELS)
def test_servers_that_do_not_listen_are_given_up_in_time(tmp_path, model):
    key = f"{model}.servers.start_timeout_s"
    chosen = {f"{m}.servers.start_timeout_s": "0.7" for m in MODELS}
    keys = given(LATE, chosen)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        options = [f"{model}.engine=sglang", f"{model}.servers.urls=[{url}]"]
        seen, asked = run_and_listen(tmp_path, [*options, *written({key: keys[key]})], timeout=20)
    assert seen.status == 2
    assert f"{model}.servers: {url}/model_info: ConnectError" in seen.printed
    # Until the time is over, and once more to say what is wrong.
    assert asked == [(f"{url}/model_info", None)] * 2
