"""HTTP with SGLang servers: the client, what an answer says, the back-off between attempts."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import suppress
from typing import Any

import httpx

CONNECT_TIMEOUT_S = 10.0
CONTROL_TIMEOUT_S = 60.0  # pause, resume, flush
FIRST_DELAY_S, LONGEST_DELAY_S = 0.25, 30.0  # of the exponential back-off


class Failed(Exception):
    """An attempt failed in a way that says nothing about the request."""


class Unreachable(RuntimeError):
    """A server did not answer, or its connection broke: it has refused nothing, and may be well."""


def new_client(api_key: str | None) -> httpx.AsyncClient:
    """Make a client that waits for answers as long as it is let."""
    return httpx.AsyncClient(
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        trust_env=False,
        timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        transport=Connections(),
    )


class Connections(httpx.AsyncBaseTransport):
    """Gives each request under way a connection of its own, and keeps those that are idle.

    httpx's pool looks at all of its connections whenever a request begins or ends, and at all of
    them once more for each idle one. Here each connection is a pool of one. There are never more of
    them than there were requests at a time.
    """

    def __init__(self):
        self._ssl = httpx.create_ssl_context(trust_env=False)  # which takes long to make
        # The server closes a connection that has idled for 5 s, perhaps as we write to it.
        self._limits = httpx.Limits(max_connections=1, keepalive_expiry=2)
        self._idle: dict[tuple, list[httpx.AsyncHTTPTransport]] = defaultdict(list)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request on the connection to its server that was used last, or on a new one."""
        url = request.url
        idle = self._idle[url.scheme, url.host, url.port]
        connection = (
            idle.pop()
            if idle
            else httpx.AsyncHTTPTransport(self._ssl, trust_env=False, limits=self._limits)
        )
        try:
            response = await connection.handle_async_request(request)
        except BaseException:  # a cancelled request can leave its connection taken for ever
            await connection.aclose()
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Stream(response.stream, connection, idle)
        return response

    async def aclose(self) -> None:
        """Close those that are idle."""
        for connections in self._idle.values():
            while connections:
                await connections.pop().aclose()


class _Stream(httpx.AsyncByteStream):
    """The body of a response. Its connection is idle once it is read to its end, else closed."""

    def __init__(
        self,
        stream: httpx.AsyncByteStream,
        connection: httpx.AsyncHTTPTransport,
        idle: list[httpx.AsyncHTTPTransport],
    ):
        self._stream, self._connection, self._idle = stream, connection, idle
        self._whole = self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part
        self._whole = True

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            await self._stream.aclose()
        except BaseException:
            self._whole = False
            raise
        finally:
            if self._whole:
                self._idle.append(self._connection)
            else:
                await self._connection.aclose()


def body_of(url: str, response: httpx.Response) -> Any:
    """Return the JSON (else the text) of an answer.

    Raises:
        RuntimeError: the server refused; with the address and its message.
    """
    refuse_unless_200(url, response)
    try:
        body = response.json()
    except ValueError:
        return response.text
    if isinstance(body, dict) and body.get("success") is False:
        raise RuntimeError(f"{url}: {body.get('message', body)}")
    return body


def refuse_unless_200(url: str, response: httpx.Response) -> None:
    """Raise RuntimeError with the address and the server's message where it refused."""
    if response.status_code != 200:
        raise RuntimeError(f"{url}: {message_of(response)}")


def message_of(response: httpx.Response) -> str:
    """Return the status and what the server says is wrong."""
    message = response.text
    with suppress(ValueError, KeyError, TypeError):
        error = json.loads(message)["error"]
        message = error if isinstance(error, str) else error["message"]
    return f"{response.status_code} {message.strip()[:500]}"


def delay_before(attempt: int) -> float:
    """Return the seconds to wait before the given retry, counted from 1."""
    return min(FIRST_DELAY_S * 2 ** (attempt - 1), LONGEST_DELAY_S)


async def all_of(awaitables: Iterable[Awaitable]) -> list:
    """Wait for all of them; return their results, or raise one error with what each failure says.

    Raises:
        ValueError, RuntimeError: the kind of the first failure; Unreachable if all are.
    """
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if not errors:
        return results
    if len(errors) == 1 or not all(isinstance(e, ValueError | RuntimeError) for e in errors):
        raise errors[0]
    kind: type[Exception] = ValueError if isinstance(errors[0], ValueError) else RuntimeError
    if all(isinstance(error, Unreachable) for error in errors):
        kind = Unreachable
    raise kind("; ".join(dict.fromkeys(map(str, errors)))) from errors[0]
