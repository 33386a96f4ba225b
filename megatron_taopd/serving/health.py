"""A replica's life: it starts, is looked at, is lost, and comes back.

One that is ours is restarted; one that is not is tried again from time to time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from contextlib import suppress

import httpx

from megatron_taopd.serving.protocol import FIRST_DELAY_S, delay_before
from megatron_taopd.serving.replica import Replica, State

logger = logging.getLogger(__name__)

RESTARTS = 3  # in a row that may fail
TELL_EVERY_S = 30.0  # that a server is still waited for


async def wait_until_up(replica: Replica) -> None:
    """Wait until our own server generates, or somebody else's listens.

    Somebody else's may not listen for `start_timeout_s`, of which a line tells at once and then
    every TELL_EVERY_S; what is wrong with one that does, `Replica.check` says.

    Raises:
        RuntimeError: our own server does not start.
    """
    if replica.server is not None:
        await asyncio.to_thread(replica.server.wait_until_ready)
        return
    limits = replica.shared.limits
    deadline = time.monotonic() + limits.start_timeout_s
    tell_at = -math.inf
    while (now := time.monotonic()) < deadline:
        try:
            await replica.shared.http.get(
                replica.url + "/model_info", timeout=limits.health_timeout_s
            )
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if now >= tell_at:
                first = tell_at < 0
                reason = f" ({str(error) or type(error).__name__})" if first else ""
                logger.info(
                    f"{replica.url} {'does not answer' if first else 'still does not answer'}"
                    f"{reason}; it is waited for, {deadline - now:.0f} s more"
                )
                tell_at = now + TELL_EVERY_S
            await asyncio.sleep(1)
            continue
        except httpx.TransportError:
            pass
        return


async def watch(replica: Replica) -> None:
    """Look at a replica from time to time, and when it gives the alarm, until it is dead."""
    while replica.state is not State.DEAD:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(replica.alarm.wait(), replica.shared.limits.health_every_s)
        replica.alarm.clear()
        if replica.server is not None:
            replica.server.bound_log()
        if not replica.syncing:
            await _examine(replica)


async def _examine(replica: Replica) -> None:
    version = replica.version
    healthy = await is_healthy(replica)
    if replica.syncing or replica.version != version:  # what it has reported is out of date
        return
    if not healthy:
        await (_wait_for_return if replica.start is None else _restart)(replica)
    elif replica.state is State.READY and not replica.has_weights:
        await _lose(replica, State.STALE)  # somebody has restarted it
    elif replica.state is State.DOWN or (replica.state is State.STALE and replica.has_weights):
        # A rank that gives it no weights itself may see that it has them when it is asked.
        await _revive(replica, replica.has_weights)


async def is_healthy(replica: Replica) -> bool:
    """Ask a replica twice, at most, whether it lives; `trouble` says what is wrong.

    /server_info asks the scheduler, generates nothing, and so never disturbs an update.
    """
    for _ in range(2):
        try:
            own = replica.server
            if own is not None and (trouble := await asyncio.to_thread(own.trouble)):
                raise RuntimeError(trouble)
            await replica.get("/server_info")
            if own is None:
                info = await replica.get("/model_info")
                replica.reported = info.get("weight_version")
            return True
        except RuntimeError as error:
            replica.trouble = str(error)
        await asyncio.sleep(FIRST_DELAY_S)
    return False


async def _revive(replica: Replica, has_weights: bool) -> None:
    async with replica.shared.changed:
        replica.state = State.READY if has_weights else State.STALE
        replica.shared.changed.notify_all()


async def _lose(replica: Replica, state: State) -> None:
    replica.state = state
    replica.generation += 1
    for task in replica.tasks:
        task.cancel()
    async with replica.shared.changed:
        replica.shared.changed.notify_all()


async def _restart(replica: Replica) -> None:
    shared = replica.shared
    await _lose(replica, State.DOWN)
    for attempt in range(1, RESTARTS + 1):
        shared.counts["restarts"] += 1
        try:
            await asyncio.to_thread(replica.stop, 0)
            replica.version = 0 if shared.fixed_weights else None
            replica.server = replica.start()
            await wait_until_up(replica)
            await replica.check_weights()
            return await _revive(replica, shared.fixed_weights)
        except Exception as error:  # whatever it is, the watch goes on
            replica.trouble = str(error) or repr(error)
            await asyncio.sleep(delay_before(attempt))
    await _lose(replica, State.DEAD)


async def _wait_for_return(replica: Replica) -> None:
    await _lose(replica, State.DOWN)
    deadline = time.monotonic() + replica.shared.limits.patience_s
    attempt = 1
    while True:
        await asyncio.sleep(delay_before(attempt))
        attempt += 1
        try:
            await replica.check()
            await replica.check_weights()
            return await _revive(replica, replica.has_weights)
        except Exception as error:  # whatever it is, the watch goes on
            replica.trouble = str(error) or repr(error)
        if time.monotonic() > deadline and replica.state is not State.DEAD:
            await _lose(replica, State.DEAD)
