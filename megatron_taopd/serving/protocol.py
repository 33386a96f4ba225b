"""HTTP with SGLang servers: the client, what an answer says, the back-off between attempts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Iterable
from contextlib import suppress
from typing import Any

import httpx

CONNECT_TIMEOUT_S = 10.0
CONTROL_TIMEOUT_S = 60.0  # pause, resume, flush
FIRST_DELAY_S, LONGEST_DELAY_S = 0.25, 30.0  # of the exponential back-off


class Failed(Exception):
    """An attempt failed in a way that says nothing about the request."""


def new_client(api_key: str | None) -> httpx.AsyncClient:
    """Make a client that waits for answers as long as it is let."""
    return httpx.AsyncClient(
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        trust_env=False,
        timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        # The server closes a connection that has idled for 5 s, perhaps as we write to it.
        limits=httpx.Limits(max_connections=None, keepalive_expiry=2),
    )


def body_of(url: str, response: httpx.Response) -> Any:
    """Return the JSON (else the text) of an answer.

    Raises:
        RuntimeError: the server refused; with the address and its message.
    """
    if response.status_code != 200:
        raise RuntimeError(f"{url}: {message_of(response)}")
    try:
        body = response.json()
    except ValueError:
        return response.text
    if isinstance(body, dict) and body.get("success") is False:
        raise RuntimeError(f"{url}: {body.get('message', body)}")
    return body


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
        ValueError, RuntimeError: the kind of the first failure.
    """
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if not errors:
        return results
    if len(errors) == 1 or not all(isinstance(e, ValueError | RuntimeError) for e in errors):
        raise errors[0]
    kind = ValueError if isinstance(errors[0], ValueError) else RuntimeError
    raise kind("; ".join(dict.fromkeys(map(str, errors)))) from errors[0]
