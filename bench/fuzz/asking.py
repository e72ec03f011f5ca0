"""Makes calls over gRPC, and tells how each has ended."""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

import grpc

from bench.fuzz.calls import Call

PATIENCE = 60.0
"""Seconds within which every call ends, whatever it asks."""

NEVER, MANY = "NEVER ENDED", 10_000
"""How a call has ended that has not; and answers, of which no call has as many."""

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
"""Of channels: each has a connection of its own."""


@dataclass
class Outcome:
    """How a call has ended.

    Attributes:
        code: of its status.
        details: of its status.
        answers: that came before it.
        seconds: that it took.
    """

    code: str = NEVER
    details: str = ""
    answers: list[bytes] = field(default_factory=list)
    seconds: float = 0.0


class Asking:
    """Channels to the ports of a server.

    Args:
        port: of all but administrative calls.
        admin_port: of these.
        channels: to each of them.
        patience: seconds within which every call ends.
    """

    def __init__(self, port: int, admin_port: int, channels: int = 4, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._channels = {
            admin: [grpc.aio.insecure_channel(f"127.0.0.1:{to}", options=OPTIONS) for _ in range(channels)]
            for admin, to in ((False, port), (True, admin_port))
        }

    async def close(self) -> None:
        """Hang up."""
        for channels in self._channels.values():
            for channel in channels:
                await channel.close()

    async def ask(self, call: Call, number: int) -> Outcome:
        """Make a call.

        Args:
            call: as it is to be.
            number: says which channel it takes.
        """
        channels = self._channels[call.admin]
        outcome, begun = Outcome(), time.monotonic()
        under_way = _begun(channels[number % len(channels)], call)
        ending = asyncio.ensure_future(_ended(under_way, call, outcome))
        limits = (self._patience,) if call.cancel_after is None else (call.cancel_after, self._patience)
        for seconds in limits:
            await asyncio.wait((ending,), timeout=seconds)
            if ending.done():
                break
            under_way.cancel()
        await _gathered(ending)
        outcome.seconds = time.monotonic() - begun
        return outcome


def _begun(channel: grpc.aio.Channel, call: Call) -> Any:
    kinds: Any = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    return kinds[call.streams](call.path)(
        list(call.messages) if call.streams[0] else call.messages[0],
        timeout=call.timeout,
        metadata=call.metadata or None,
        compression=grpc.Compression(call.compression),
    )


async def _ended(under_way: Any, call: Call, outcome: Outcome) -> None:
    """Take all answers, and the status."""
    try:
        if call.streams[1]:
            async for answer in under_way:
                outcome.answers.append(answer)
                if len(outcome.answers) > MANY:
                    under_way.cancel()
        else:
            outcome.answers.append(await under_way)
    except (grpc.aio.AioRpcError, asyncio.CancelledError):
        pass  # its status says it
    code = await under_way.code()
    outcome.code, outcome.details = code.name, await under_way.details() or ""


async def _gathered(ending: Awaitable[None]) -> None:
    """Wait for what was given up, but not for ever."""
    task = asyncio.ensure_future(ending)
    await asyncio.wait((task,), timeout=1.0)
    if not task.done():
        task.cancel()
    else:
        task.result()
