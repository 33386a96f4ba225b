"""What a server's answer is read as, next to a plain reading of the same JSON."""

import asyncio
import contextlib
import gc
import json
import math
from collections import Counter
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from benchmarks.client import recorded
from megatron_taopd.rollout.engine import Sampling
from megatron_taopd.rollout.sglang import SGLangEngine
from megatron_taopd.serving.answers import answer_of
from megatron_taopd.serving.client import Replicas
from megatron_taopd.serving.model import ServedModel
from megatron_taopd.serving.protocol import Connections
from megatron_taopd.serving.replica import Limits, Replica, State
from megatron_taopd.start import frozen_heap

MODEL = ServedModel.of("examples/tiny_pair/student", 120)
PROMPTS = [[2, 5, 6, 7], [2, 9], [2, 11, 12]]
LONGEST, EOS = 7, 1


def answer(tokens=LONGEST, seed=0, **meta) -> dict:
    """A server's answer of so many tokens; a field of meta_info that is `...` is missing."""
    body = json.loads(recorded(tokens, MODEL.vocab_size, seed))
    body["meta_info"] |= meta
    body["meta_info"] = {key: value for key, value in body["meta_info"].items() if value is not ...}
    return body


def generated(*bodies, attempts=2) -> tuple:
    """The batch of these answers, one a prompt, and the engine's metrics; the requests counted."""
    texts = [body if isinstance(body, bytes) else json.dumps(body).encode() for body in bodies]
    asked = Counter()

    def handle(request: httpx.Request) -> httpx.Response:
        prompt = tuple(json.loads(request.content)["input_ids"])
        asked[prompt] += 1
        place = PROMPTS.index(list(prompt))
        return httpx.Response(200, content=texts[place % len(texts)])

    with Replicas([], MODEL, Limits(attempts=attempts)) as replicas:
        replicas.shared.http = httpx.AsyncClient(transport=httpx.MockTransport(handle))
        server = Replica("http://server", replicas.shared)
        server.state, server.version = State.READY, 3
        replicas.all.append(server)
        engine = SGLangEngine(replicas, MODEL, MODEL.vocab_size, [EOS])
        try:
            batch = engine.generate(PROMPTS, [4, 8, 6], 1, Sampling(LONGEST))
            return batch, engine.metrics(), asked
        except RuntimeError as error:
            return str(error), engine.metrics(), asked


def plainly(bodies) -> dict[str, list]:
    """The fields of the batch of these answers, one a prompt, without arrays and types."""
    found = {name: [] for name in ("tokens", "log_probs", "versions", "truncated")}
    for prompt, body in zip(PROMPTS, bodies, strict=True):
        meta = body["meta_info"]
        triples = meta["output_token_logprobs"]
        found["tokens"] += prompt + [triple[1] for triple in triples]
        found["log_probs"] += [float(np.float32(triple[0])) for triple in triples]
        name = meta.get("weight_version")
        versions = [int(name) if name is not None and name.isdecimal() else 3] * len(triples)
        for span in meta.get("weight_versions") or []:
            for place in range(span["start"], span["end"]):
                versions[place] = int(span["version"])
        found["versions"] += versions
        stop = meta["finish_reason"]["type"] == "stop" or triples[-1][1] == EOS
        found["truncated"].append(not stop)
    return found


SPANS = [{"version": "5", "start": 0, "end": 4}, {"version": "6", "start": 4, "end": 7}]
BATCHES = {
    "as recorded": [answer(seed=seed) for seed in range(3)],
    "of other lengths": [
        answer(),
        answer(1, finish_reason={"type": "stop", "matched": EOS}),
        answer(3, seed=2, finish_reason={"type": "stop"}),
    ],
    "of other weights": [
        answer(weight_version="default"),
        answer(weight_version=..., weight_versions=[]),
        answer(weight_versions=SPANS),
    ],
    "ended by its last token": [
        answer(output_token_logprobs=[[-1, 5, None]] * 6 + [[-0.25, EOS, None]])
    ]
    * 3,
    "with texts and more": [
        answer(output_token_logprobs=[[-1.5, 5, "é ", 1]] * 7, new_field={"a": [1]}),
        answer(output_token_logprobs=[[-1e-30, 1151, "\\u00e9"]] * 7) | {"index": 0},
        answer(
            output_token_logprobs=[[-0.1 - 1e-9, 0, ""]] * 7, prompt_tokens=..., cached_tokens=...
        ),
    ],
}


@pytest.mark.parametrize("bodies", BATCHES.values(), ids=BATCHES)
def test_batches_are_those_of_a_plain_reading(bodies):
    batch, metrics, asked = generated(*bodies)
    expected = plainly(bodies)
    assert batch.tokens.tolist() == expected["tokens"]
    assert batch.log_probs.tolist() == expected["log_probs"]
    assert batch.weight_versions.tolist() == expected["versions"]
    assert batch.truncated.tolist() == expected["truncated"]
    assert batch.prompts.tolist() == [4, 8, 6]
    prompt, cached = (
        sum(body["meta_info"].get(key, 0) for body in bodies)
        for key in ("prompt_tokens", "cached_tokens")
    )
    assert metrics["rollout/cached_share"] == cached / prompt
    assert [*asked.values()] == [1, 1, 1]


def test_counts_are_those_that_servers_say():
    bodies = [answer(prompt_tokens=10, cached_tokens=4, num_retractions=i) for i in range(3)]
    _, metrics, _ = generated(*bodies)
    assert metrics["rollout/cached_share"] == 0.4 and metrics["rollout/retractions"] == 3
    assert "rollout/acceptance_length" not in metrics  # nothing was drafted
    bodies = [answer(spec_verify_ct=n) for n in (2, 3, 5)]  # 7 tokens each
    _, metrics, _ = generated(*bodies)
    assert metrics["rollout/acceptance_length"] == 21 / 10


def said(**meta) -> bytes:
    return json.dumps(answer(**meta)).encode()


def first(triple: list) -> bytes:
    """An answer whose first token is this."""
    return said(output_token_logprobs=[triple] + [[-1.0, 5, None]] * 6)


NOT_ASKED = "a server's answer is not what was asked for: "
NO_ANSWER = "http://server/generate: this is no answer of SGLang's: "
TRIPLES = " - at `$.meta_info.output_token_logprobs`"
MALFORMED = {
    "null": (first([None, 5, None]), NOT_ASKED, "7 tokens of 7", " 6 finite"),
    "NaN": (first([math.nan, 5, None]), NOT_ASKED, "7 tokens of 7", " 6 finite"),
    "infinity": (first([-math.inf, 5, None]), NOT_ASKED, "7 tokens of 7", " 6 finite"),
    "over float64": (first([0.5, 5, None]).replace(b"[0.5,", b"[-1e999,"), NOT_ASKED, " 6 finite"),
    "over float32": (first([-1e39, 5, None]), NOT_ASKED, " 6 finite"),
    "an id over the vocabulary": (first([-1.0, 1152, None]), NOT_ASKED, "id 1152 of 1152"),
    "an id over int32": (first([-1.0, 1 << 40, None]), NO_ANSWER, "1099511627776", TRIPLES),
    "no id": (first([-1.0, None, None]), NO_ANSWER, "NoneType", TRIPLES),
    "a text as number": (first(["x", 5, None]), NO_ANSWER, "could not convert", TRIPLES),
    "a triple of one": (first([-1.0]), NO_ANSWER, "index out of range", TRIPLES),
    "a number as triple": (first(5), NO_ANSWER, "not subscriptable", TRIPLES),
    "an object as list": (said(output_token_logprobs={"a": 1}), NO_ANSWER, TRIPLES),
    "null as list": (said(output_token_logprobs=None), NO_ANSWER, "NoneType", TRIPLES),
    "no tokens": (said(output_token_logprobs=[]), NOT_ASKED, "0 tokens of 7"),
    "no list": (said(output_token_logprobs=...), NOT_ASKED, "0 tokens of 7"),
    "too few": (said(tokens=6), NOT_ASKED, "6 tokens of 7 (finish reason length)"),
    "no reason": (said(finish_reason=...), NO_ANSWER, "no `finish_reason` - at `$.meta_info`"),
    "an empty reason": (said(finish_reason={}), NO_ANSWER, "no `finish_reason`"),
    "null as reason": (said(finish_reason=None), NO_ANSWER, "Expected `object`, got `null`"),
    "a text as count": (said(prompt_tokens="8"), NO_ANSWER, "Expected `int`, got `str`"),
    "a span without an end": (
        said(weight_versions=[{"version": "1", "start": 0}]),
        NO_ANSWER,
        "`end`",
    ),
    "no meta": (b'{"output_ids": [5]}', NO_ANSWER, "required field `meta_info`"),
    "a list": (b"[1, 2]", NO_ANSWER, "Expected `object`, got `array`"),
    "cut off": (said()[:-40], NO_ANSWER, "Expected `object`, got `str`"),
    "no UTF-8": (b'{"text": "\xff"}', NO_ANSWER, "Expected `object`, got `str`"),
    "empty": (b"", NO_ANSWER, "Expected `object`, got `str`"),
    "a refusal": (b'{"success": false, "message": "oh"}', "http://server/generate: oh"),
}


@pytest.mark.parametrize(
    ("body", "begin", "parts"), [(b, m, p) for b, m, *p in MALFORMED.values()], ids=MALFORMED
)
def test_what_is_no_answer_is_one_line_and_not_asked_for_again(body, begin, parts):
    error, metrics, asked = generated(answer(), body, answer(seed=2))
    assert isinstance(error, str) and "\n" not in error
    assert error.startswith(begin) and all(part in error for part in parts), error
    assert metrics["rollout/retries"] == 0 and max(asked.values()) == 1


def test_a_refusal_is_none_whatever_else_it_says():
    body = answer() | {"error": {"message": "oh"}}
    with pytest.raises(RuntimeError, match=r"^http://a/generate: 400 oh$"):
        answer_of("http://a/generate", httpx.Response(400, json=body))


def test_an_aborted_response_is_asked_for_again():
    error, metrics, asked = generated(answer(finish_reason={"type": "abort"}, tokens=2))
    assert error == "a request failed 2 times, the last time: http://server/generate: aborted"
    assert metrics["rollout/retries"] >= 1 and max(asked.values()) == 2


def test_numbers_are_arrays_and_the_body_is_not_kept():
    response = httpx.Response(200, content=recorded(50, MODEL.vocab_size, 0))
    said = answer_of("", response).meta_info.output_token_logprobs
    assert (said.ids.dtype, said.log_probs.dtype) == (np.int32, np.float32)
    assert said.ids.base is None and said.log_probs.base is None


# Connections


class Server:
    """Answers after all requests of a wave are there, and counts connections."""

    def __init__(self, wave: int):
        self.opened, self.wave, self.waiting = 0, wave, 0
        self.all_there = asyncio.Event()

    async def __call__(self, reader, writer) -> None:
        self.opened += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if b"/cut" in head:
                    return
                self.waiting += 1
                if self.waiting == self.wave:
                    self.all_there.set()
                await self.all_there.wait()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


def on_a_server(wave: int, work) -> int:
    """Run `await work(client, url)`; the connections that the server has seen."""

    async def run() -> int:
        server = Server(wave)
        listening = await asyncio.start_server(server, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        async with httpx.AsyncClient(transport=Connections(), trust_env=False) as client:
            await work(client, url)
        listening.close()
        return server.opened

    return asyncio.run(run())


def test_each_request_under_way_has_a_connection_which_the_next_ones_take():
    async def work(client, url):
        for _ in range(2):  # the second wave is answered at once
            answers = await asyncio.gather(*(client.get(url) for _ in range(5)))
            assert [answer.text for answer in answers] == ["ok"] * 5

    assert on_a_server(5, work) == 5


def test_a_connection_that_breaks_or_is_given_up_is_replaced():
    async def work(client, url):
        assert (await client.get(url)).text == "ok"
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(f"{url}/cut")
        request = asyncio.ensure_future(client.get(url))
        await asyncio.sleep(0)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        for _ in range(3):
            assert (await client.get(url)).text == "ok"

    assert on_a_server(1, work) <= 3


def test_requests_after_cancelled_ones_are_answered():
    """Whenever they are cancelled: not sent yet, waiting, or being read."""

    async def handle(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(0.002)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n")
                for _ in range(4):
                    writer.write(b"x" * 50_000)
                    await asyncio.sleep(0.001)
        writer.close()

    async def run():
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with httpx.AsyncClient(transport=Connections(), timeout=None) as client:
            for wait in [place * 0.0005 for place in range(20)] * 2:
                requests = [asyncio.ensure_future(client.get(url)) for _ in range(8)]
                await asyncio.sleep(wait)
                for request in requests:
                    request.cancel()
                await asyncio.gather(*requests, return_exceptions=True)
                for _ in range(3):
                    answered = await asyncio.wait_for(client.get(url), 20)
                    assert len(answered.content) == 200_000
        server.close()

    asyncio.run(run())


def test_a_server_that_is_not_there_is_an_error_of_the_connection():
    async def work(client, _url):
        with pytest.raises(httpx.ConnectError):
            await client.get("http://127.0.0.1:9")

    assert on_a_server(1, work) == 0


# The garbage collector


def test_the_heap_of_a_run_is_frozen_until_its_end():
    before = gc.get_threshold()
    with pytest.raises(KeyError), frozen_heap():
        assert gc.get_freeze_count() > 10_000 and gc.get_threshold()[0] == 20_000
        kept = SimpleNamespace()
        kept.itself = kept
        assert any(found is kept for found in gc.get_objects())  # what is new is collected
        raise KeyError
    assert gc.get_freeze_count() == 0 and gc.get_threshold() == before
