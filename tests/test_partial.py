"""Responses that are under way while the weights change, and steps that do not wait for all."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.observed import FROZEN, observe
from support.observed import STUDENT as TINY_STUDENT
from support.patience import patience, wait_for
from support.ranks import run_ranks

from benchmarks.slow_server import SlowServer
from megatron_taopd.config.schema import Growth, RolloutSection, ServersSection
from megatron_taopd.data.prompts import PromptStream
from megatron_taopd.parallel.objects import on_rank_0
from megatron_taopd.rollout.engine import NOTHING, Response, Sampling
from megatron_taopd.rollout.partial import PartialRollouts
from megatron_taopd.rollout.sglang import SGLangEngine, Updates
from megatron_taopd.serving.begin import open_own
from megatron_taopd.serving.client import Replicas
from megatron_taopd.serving.model import ServedModel
from megatron_taopd.serving.replica import Limits

# Which responses a step takes: an engine whose responses finish when a test says so


class Scripted:
    """Finishes, each time that it is waited for, the responses that come next in a list.

    A response is known by its prompt and its number among those to it.
    """

    def __init__(self, order=()):
        self.order, self.batches, self.submitted, self.waits = list(order), [], [], 0

    def submit(self, prompts, indices, step, sampling, so_far=None):
        names = [(i, s) for i in indices for s in range(sampling.samples)]
        so_far = so_far or [NOTHING] * len(names)
        going = SimpleNamespace(names=names, limit=sampling.max_new_tokens)
        going.responses = [r if r.finished else None for r in so_far]
        going.so_far = list(so_far)
        going.everything_so_far = lambda: [
            known or part for known, part in zip(going.responses, going.so_far, strict=True)
        ]
        self.batches.append(going)
        self.submitted.append((step, indices, sampling.max_new_tokens))
        return going

    def wait_for_any(self, batches):
        self.waits += 1
        assert all(None in batch.responses for batch in batches)
        self.finish(self.order.pop(0))

    def finish(self, name, tokens=(5, 1)):
        for batch in self.batches:
            for place, known in enumerate(batch.names):
                if known == name and batch.responses[place] is None:
                    rest = Response(*arrays(tokens), True)
                    batch.responses[place] = batch.so_far[place].followed_by(rest)
                    return
        raise AssertionError(f"{name} is not under way")


def arrays(tokens, version=0):
    return (
        np.array(tokens, np.int32),
        np.full(len(tokens), -0.5, np.float32),
        np.full(len(tokens), version, np.int32),
    )


PROMPTS = [[i, 7] for i in range(40)]


def rollouts(engine, ahead=1, staleness=3, consumed=0, state=None, horizon=9, samples=1):
    section = replace(
        RolloutSection(), prompts=2, samples=samples, ahead=ahead, max_staleness=staleness
    )
    stream = PromptStream(len(PROMPTS), shuffle=False, consumed=consumed)
    rule = SimpleNamespace(length=horizon.at if isinstance(horizon, Growth) else lambda _: horizon)
    sampling = Sampling(9, samples)
    return PartialRollouts(engine, PROMPTS, stream, sampling, rule, section, state)


def taken(schedule, step):
    return schedule.take(step).pending.result().prompts.tolist()


def test_a_step_takes_the_first_that_finish_and_prompts_enter_in_order():
    engine = Scripted([(3, 0), (1, 0), (0, 0), (2, 0)])
    schedule = rollouts(engine)
    assert taken(schedule, 1) == [3, 1]
    assert engine.submitted == [(1, [0, 1], 9), (2, [2, 3], 9)]
    assert taken(schedule, 2) == [0, 2]
    assert engine.submitted[2:] == [(3, [4, 5], 9)]
    assert engine.waits == 4


def test_of_those_that_are_finished_the_oldest_are_taken_in_the_prompts_order():
    engine = Scripted()
    schedule = rollouts(engine, samples=2)
    begun = schedule.take(1)
    for name in [(3, 1), (1, 1), (2, 0), (0, 1), (1, 0)]:
        engine.finish(name)
    assert begun.pending.result().prompts.tolist() == [0, 1, 1, 2]
    assert engine.waits == 0


def test_a_response_is_waited_for_once_it_has_waited_long_enough():
    """Begun in step 1, with at most 3 steps: step 3 is the last one of the first turn."""
    order = [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (6, 0), (7, 0), (0, 0)]
    engine = Scripted(order)
    schedule = rollouts(engine, ahead=1, staleness=3)
    assert taken(schedule, 1) == [1, 2]
    assert taken(schedule, 2) == [3, 4]
    # Its place is kept: one other response is all that this step has besides it.
    assert taken(schedule, 3) == [5, 0]
    assert taken(schedule, 4) == [6, 7]


def test_a_horizon_that_grows_is_that_of_the_turn_in_which_a_response_began():
    engine = Scripted([(0, 0), (2, 0), (1, 0), (3, 0)])
    schedule = rollouts(engine, horizon=Growth(2, 8, 4))
    assert schedule.take(1).length == 4
    schedule.turns[0].left.clear()
    assert schedule.take(2).length == 6
    assert [length for _, _, length in engine.submitted] == [2, 4, 6]


@pytest.mark.parametrize("ahead, staleness", [(1, 2), (1, 5), (3, 4)])
def test_whatever_the_timing_prompts_enter_in_order_each_once_and_none_is_too_old(ahead, staleness):
    for seed in range(30):
        draw = random.Random(seed)
        engine = Scripted()
        engine.wait_for_any = lambda batches, e=engine, d=draw: finish_any(e, batches, d)
        schedule = rollouts(engine, ahead, staleness, samples=2)
        begun_in, learned = {}, Counter()
        for step in range(1, 14):
            pending = schedule.take(step).pending
            for _, indices, _ in engine.submitted[len(begun_in) // 2 :]:
                begun_in |= dict.fromkeys(indices, step)
            batch = pending.result()
            assert batch.num_sequences == 4
            for prompt in batch.prompts.tolist():
                assert step - begun_in[prompt] <= staleness
                learned[prompt] += 1
        entered = [*chain(*(indices for _, indices, _ in engine.submitted))]
        assert entered == list(range(2 * (13 + ahead)))
        assert max(learned.values()) == 2


def finish_any(engine, batches, draw):
    """Finish some of the responses under way, of late ones rather the youngest."""
    names = [
        name
        for batch in batches
        for name, known in zip(batch.names, batch.responses, strict=True)
        if known is None
    ]
    for name in names[-draw.randint(1, 3) :]:
        engine.finish(name)


def test_a_run_that_resumes_goes_on_with_every_response_and_repeats_none():
    engine = Scripted([(3, 0), (1, 0)])
    schedule = rollouts(engine)
    assert taken(schedule, 1) == [3, 1]
    engine.finish((2, 0), [8, 9, 1])  # after the step: nobody has taken it
    [first, _] = engine.batches
    first.so_far[0] = Response(*arrays([11, 12], version=4), False)
    state, consumed = schedule.state(), schedule.consumed
    assert consumed == 4
    assert state["turn"].tolist() == [1, 2] and state["prompt"].tolist() == [0, 2]
    assert state["length"].tolist() == [2, 3] and state["finished"].tolist() == [False, True]
    assert state["tokens"].tolist() == [11, 12, 8, 9, 1]

    again = Scripted([(4, 0), (0, 0), (5, 0)])
    resumed = rollouts(again, consumed=consumed, state=state)
    batch = resumed.take(2).pending.result()
    assert batch.prompts.tolist() == [2, 4]
    assert batch.sequence(0).tolist() == [2, 7, 8, 9, 1]
    batch = resumed.take(3).pending.result()
    assert batch.prompts.tolist() == [0, 5]
    assert batch.sequence(0).tolist() == [0, 7, 11, 12, 5, 1]
    assert batch.weight_versions[:4].tolist() == [4, 4, 0, 0]
    assert [indices for _, indices, _ in again.submitted] == [[0], [2], [4, 5], [6, 7]]


def test_an_interrupted_step_gives_its_responses_back():
    engine = Scripted([(3, 0), (1, 0), (0, 0)])
    schedule = rollouts(engine)
    taken(schedule, 1)
    next(schedule.take(2).pending.parts())
    schedule.give_back(2)
    assert schedule.state()["prompt"].tolist() == [0, 2, 4, 5]
    schedule.give_back(3)  # which has taken nothing
    assert schedule.state()["finished"].tolist() == [True, False, False, False]


# Weights that come while responses are under way, on servers that decode at a fixed rate

STUDENT = "examples/tiny_pair/student"
MODEL = ServedModel.of(STUDENT, 120)
EOS, LONGEST = 1, 40
ASKED = [[2, 10 + i, 30 + i] for i in range(6)]
LENGTHS = [3, 40, 12, 55, 25, 8]  # of which 55 is cut off
SAMPLING = Sampling(LONGEST, temperature=1.0)


def length_of(prompt):
    return LENGTHS[prompt[1] - 10]


class Told:
    """Has servers call their weights what they are told."""

    def push(self, replicas, targets, named_tensors, version):
        requests = {
            "/pause_generation": {"mode": "abort"},
            "/update_weight_version": {"new_version": str(version)},
            "/continue_generation": {},
        }

        def work():
            for path, payload in requests.items():
                replicas.run(replicas.post_all(path, payload, targets))
            return {}

        return on_rank_0(work)


def engine_on(urls, own=None, **options):
    replicas = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        limits = Limits(concurrency=16, health_every_s=0.2, patience_s=patience(60))
        replicas = Replicas(urls, MODEL, limits)
    updates = Updates(Told(), list, lambda: 0, **options)
    return SGLangEngine(replicas, MODEL, 1152, [EOS], updates, own)


@pytest.fixture
def server():
    with SlowServer(STUDENT, LONGEST, length_of) as server:
        yield server


def assert_complete(batch, server):
    """Each response is what one that nothing interrupts would be."""
    for i, prompt in enumerate(ASKED):
        whole = server.response(prompt)
        tokens = batch.sequence(i).tolist()
        assert tokens == prompt + whole[:LONGEST]
        assert bool(batch.truncated[i]) == (len(whole) > LONGEST)
    assert batch.log_probs.eq(-1).all()


def tokens_come(server, count, running):
    """Let what is under way have tokens, once so many requests are."""
    wait_for(lambda: server.running == running)
    server.tick(count)


@pytest.mark.parametrize("keep", [False, True])
def test_responses_go_on_with_new_weights_from_where_they_were(server, keep):
    """10 tokens by the first weights, 10 by the next, the rest by the last."""
    engine = engine_on([server.url], keep_cache=keep)
    try:
        engine.update_weights([], 1)
        pending = engine.submit(ASKED, range(6), 1, SAMPLING)
        for version, running in ((2, 6), (3, 4)):
            tokens_come(server, 10, running)
            engine.update_weights([], version)
        tokens_come(server, 30, 3)
        batch = pending.result()
        metrics = engine.metrics()
    finally:
        engine.close()
    assert_complete(batch, server)
    versions = batch.weight_versions.split(batch.response_lengths.tolist())
    for length, of_tokens in zip(LENGTHS, versions, strict=True):
        wanted = [1] * 10 + [2] * 10 + [3] * 20
        assert of_tokens.tolist() == wanted[: min(length, LONGEST)]
    assert metrics["rollout/interruptions"] == 4 + 3 and not metrics["rollout/retries"]
    requests = [payload for path, payload in server.asked if "rid" in payload]
    requests = [payload for payload in requests if "input_ids" in payload]
    assert len(requests) == 6 + 4 + 3
    for payload in requests:
        new = payload["sampling_params"]["max_new_tokens"]
        assert len(payload["input_ids"]) + new == 3 + LONGEST
    keys = {payload.get("extra_key") for payload in requests}
    assert (keys == {None}) != keep and len(keys) == 1


def test_tokens_that_come_with_an_abort_may_be_the_last(server, monkeypatch):
    """SGLang calls a response aborted whose last token has just come."""
    generate = server._generate

    def late(payload):
        answer = generate(payload)
        answer["meta_info"]["finish_reason"] = {"type": "abort"}
        return answer

    monkeypatch.setattr(server, "_generate", late)
    engine = engine_on([server.url])
    try:
        engine.update_weights([], 1)
        pending = engine.submit(ASKED, range(6), 1, SAMPLING)
        wait_for(lambda: server.running == 6)
        held = engine.replicas.run(engine.replicas.begin_update(engine.replicas.all))
        server.tick(LONGEST)
        wait_for(lambda: not server.running)
        engine.replicas.run(engine.replicas.commit_update(held, 2))
        batch = pending.result()
        metrics = engine.metrics()
    finally:
        engine.close()
    assert_complete(batch, server)
    assert not metrics["rollout/interruptions"] and not metrics["rollout/retries"]


def test_a_response_goes_on_elsewhere_when_its_server_dies():
    """With what there was at the last update."""
    with ExitStack() as stack:
        servers = [stack.enter_context(SlowServer(STUDENT, LONGEST, length_of)) for _ in range(2)]
        first, second = servers
        engine = engine_on([server.url for server in servers])
        try:
            engine.update_weights([], 1)
            pending = engine.submit(ASKED, range(6), 1, SAMPLING)
            for server in servers:
                tokens_come(server, 2, 3)
            engine.update_weights([], 2)
            wait_for(lambda: first.running + second.running == 6)
            before = len(second.asked)
            lost = first.running
            first.die()
            wait_for(lambda: second.running == 6)
            again = [p for path, p in second.asked[before:] if path == "/generate" and "rid" in p]
            second.tick(LONGEST)
            batch = pending.result()
            metrics = engine.metrics()
        finally:
            engine.close()
    assert_complete(batch, second)
    assert metrics["rollout/retries"] == lost == len(again) == 3
    assert all(len(payload["input_ids"]) == 3 + 2 for payload in again)
    for versions in batch.weight_versions.split(batch.response_lengths.tolist()):
        assert versions.tolist() == [1] * 2 + [2] * (len(versions) - 2)


def on_ranks(urls):
    """A batch with three updates under way, some of it by responses that were begun before."""
    section = replace(ServersSection(), urls=tuple(urls), concurrency=2)
    own = open_own(section, "rollout.servers", MODEL)
    engine = engine_on(urls, own)
    try:
        engine.update_weights([], 1)
        pending = engine.submit(ASKED, range(6), 1, SAMPLING)
        next(pending.parts())
        engine.update_weights([], 2)
        so_far = pending.everything_so_far()
        engine.update_weights([], 3)
        resumed = engine.submit(ASKED, range(6), 1, SAMPLING, so_far)
        asked = sum(response is None for response in resumed.responses)
        engine.update_weights([], 4)
        return pending.result(), resumed.result(), [r.tokens for r in so_far], asked
    finally:
        engine.close()


def test_several_ranks_ask_and_all_know_what_there_is():
    """Servers whose tokens take 5 ms each; where the updates hit, the machine decides."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(SlowServer(STUDENT, LONGEST, length_of, token_s=0.005))
            for _ in range(2)
        ]
        answers = run_ranks(3, on_ranks, [server.url for server in servers])
    first = answers[0]
    for pending, resumed, so_far, asked in answers:
        for batch, other in ((pending, first[0]), (resumed, first[1])):
            assert_complete(batch, servers[0])
            assert torch.equal(batch.weight_versions, other.weight_versions)
            for versions in batch.weight_versions.split(batch.response_lengths.tolist()):
                assert (versions.diff() >= 0).all()
        assert [t.tolist() for t in so_far] == [t.tolist() for t in first[2]]
        assert 0 < asked == first[3] < 6
        for prompt, tokens in zip(ASKED, so_far, strict=True):
            assert tokens.tolist() == servers[0].response(prompt)[: len(tokens)]


# Runs

PARTIAL = (
    FROZEN,
    "rollout={engine: sglang, prompts: 4, max_new_tokens: 32, ahead: 1}",
    "rollout.sync={transport: disk, max_gap: 99}",
    "checkpoint.every=1",
    "checkpoint.keep_last=9",
)


def note_batches(run):
    """Keep the batches that are learned from, by step."""
    batches, learn = {}, run.distiller.learn

    def noted(batch, *rest):
        batches[run.student.version + 1] = batch
        return learn(batch, *rest)

    run.distiller.learn = noted
    return run.rollouts.consumed, batches


class InQuarters(SlowServer):
    """Has at most 8 tokens for a request: long responses take the weights of four steps."""

    def made(self, began, ticks):
        return min(8, super().made(began, ticks))


def heavy_tailed(prompt):
    """One response in five is long."""
    return 40 if sum(prompt) % 5 == 0 else 2 + sum(prompt) % 5


def learned(seen, steps):
    assert seen.status == 0, seen.printed
    _, batches = seen.found
    assert sorted(batches) == list(steps)
    for step, batch in batches.items():
        assert batch.num_sequences == 4
        assert (step - 1 - batch.weight_versions).max() <= 3
    return batches


def test_a_killed_run_loses_no_response_and_repeats_none(tmp_path):
    """Six steps; and the same after its third checkpoint, as if it had been killed there."""
    with InQuarters(TINY_STUDENT, 32, heavy_tailed, token_s=0.003) as server:
        options = [*PARTIAL, f"rollout.servers.urls=[{server.url}]", f"run.dir={tmp_path}"]
        options += ["rollout.partial=true", "rollout.max_staleness=3", "rollout.sync.cache=keep"]
        seen = observe([*options, "train.steps=6"], note_batches)
        before = learned(seen, range(1, 7))
        for step in (4, 5, 6):
            shutil.rmtree(tmp_path / "checkpoints" / f"step_0000000{step}")
        folder = tmp_path / "checkpoints" / "step_00000003"
        kept = torch.load(folder / "common.pt", weights_only=True)["run"]
        state = kept["rollouts"]
        assert len(state["turn"]) == 4  # of the 16 prompts, 12 were learned from
        server.asked.clear()
        seen = observe([*options, "train.steps=7"], note_batches)
        after = learned(seen, range(4, 8))

    assert seen.found[0] == kept["prompts_consumed"] == 4 * (3 + 1)
    old = [before[step].prompts.tolist() for step in (1, 2, 3)]
    new = [after[step].prompts.tolist() for step in (4, 5, 6, 7)]
    entered = 4 * (7 + 1)
    stream = PromptStream(6144, seed=0).take(entered)
    assert not Counter(chain(*old, *new)) - Counter(stream)
    assert set(chain(*old)) | set(state["prompt"].tolist()) == set(stream[:16])
    # It goes on from the tokens that the checkpoint has, and asks for what it lacks alone.
    assert all("flush_cache" not in path for path, _ in server.asked)
    requests = [p for path, p in server.asked if path == "/generate" and "rid" in p]
    assert all(request["extra_key"] for request in requests)
    requests = [request["input_ids"] for request in requests]
    pieces = state["tokens"].split(state["length"].tolist())
    finished = state["finished"].tolist()
    for piece, prompt, done in zip(pieces, state["prompt"].tolist(), finished, strict=True):
        [(batch, i)] = [
            (batch, batch.prompts.tolist().index(prompt))
            for batch in after.values()
            if prompt in batch.prompts
        ]
        sequence, length = batch.sequence(i).tolist(), int(batch.prompt_lengths[i])
        asked = [ids for ids in requests if ids[:length] == sequence[:length]]
        assert asked[:1] == ([] if done else [sequence[: length + len(piece)]])
    for batch in (*before.values(), *after.values()):
        for i, length in enumerate(batch.prompt_lengths.tolist()):
            sequence = batch.sequence(i).tolist()
            assert sequence[length:] == server.response(sequence[:length])[:32]
    assert (16, False) in zip(state["length"].tolist(), finished, strict=True)
