"""Faults of connections: very many, slow beginnings, streams reset as fast as they are opened, and pings (30, 31)."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from queue import Empty, Queue

from bench.faults.asking import infer_request
from bench.faults.case import GOOD, Case, Fault
from bench.faults.transport import HANG_UP, METHOD, heard
from bench.faults.wanted import Wanted
from bench.load import frames
from bench.load.frames import Frame

IDLE = 500
"""Connections that say nothing more than what they are."""

RESETS = 500
"""Streams that are reset as soon as they are opened."""

PROMPT = 1.0
"""Seconds within which others are answered all the same."""

BUSY = 0.5
"""Share of a processor that a server may take that has nothing to do."""

PINGS, EVERY = 4, 10.0
"""Pings of a client that keeps its connection alive; seconds between them."""

FLOOD = 30
"""Pings of one who does not mean well."""


def many(case: Case) -> None:
    """Fault 30."""
    with ExitStack() as stack:
        opened = [stack.enter_context(frames.connection(case.running.ports.service)) for _ in range(IDLE)]
        for one in opened:
            frames.begin(one)
        _others_are_served(case, f"{IDLE} idle connections")
        first = _settings(opened[0])
        most = first.get(frames.MAX_CONCURRENT_STREAMS, 2**31)
        case.expect("streams of a connection are limited", most < 2**31 - 1, "no limit of streams is announced")
    with frames.connection(case.running.ports.service) as flooding:
        frames.begin(flooding)
        with suppress(OSError):  # it may be hung up on
            for number in range(RESETS):
                _open_and_reset(case, flooding, 2 * number + 1)
        _others_are_served(case, "rapid resets")
    begun, busy = time.monotonic(), case.running.processor_seconds
    time.sleep(2.0)
    share = (case.running.processor_seconds - busy) / (time.monotonic() - begun)
    case.never("a processor is busy with nothing", share > BUSY, f"{100 * share:.0f} % of a processor for nothing")
    with frames.connection(case.running.ports.service) as silent:
        case.expect(
            "who says nothing is hung up on", _hung_up(silent), f"who says nothing is waited for, over {HANG_UP:.0f} s"
        )


def _settings(opened: socket.socket) -> dict[int, int]:
    """What the server announces first."""
    opened.settimeout(HANG_UP)
    return next(one.settings for one in frames.received(opened) if one.kind == frames.SETTINGS)


def _others_are_served(case: Case, what: str) -> None:
    with case.running.asker() as other:
        found = other.begin(other.request(GOOD)).end()
    case.told(found)
    served = case.right(found) and found.seconds < PROMPT
    case.never(f"{what}: others are not served", not served, f"{what}: {found.code} after {found.seconds:.1f} s")


def _open_and_reset(case: Case, opened: socket.socket, stream: int) -> None:
    message = infer_request(case.asker.model, [b"abcdeg"]).SerializeToString()
    frames.call(opened, METHOD, message, stream)
    frames.send(opened, Frame(frames.RST_STREAM, payload=b"\0\0\0\x08", stream=stream))


def _hung_up(opened: socket.socket) -> bool:
    return heard(opened, frames.received(opened), lambda _: False)


def pings(case: Case) -> None:
    """Fault 31: every ten seconds while a call takes long, and as many as there is room for."""
    with frames.connection(case.running.ports.service) as opened, answering(opened, frames.begin(opened)) as seen:
        case.passes.hold()
        frames.call(opened, METHOD, infer_request(case.asker.model, [GOOD.encode()]).SerializeToString())
        case.passes.wait_held()
        with suppress(OSError):  # it may be cut off
            for _ in range(PINGS):
                time.sleep(EVERY)
                frames.send(opened, Frame(frames.PING, payload=bytes(8)))
        case.passes.open()
        answered = _comes(seen, lambda one: one.stream == 1 and one.kind == frames.DATA)
        case.never("pings every 10 s: cut off", not answered, "cut off for pings every 10 s")
    with frames.connection(case.running.ports.service) as opened, answering(opened, frames.begin(opened)) as seen:
        with suppress(OSError):
            frames.send(opened, *[Frame(frames.PING, payload=bytes(8))] * FLOOD)
        calmed = _comes(seen, lambda one: one.kind == frames.GOAWAY and one.error == frames.ENHANCE_YOUR_CALM)
        case.expect("a flood of pings: ENHANCE_YOUR_CALM", calmed, "a flood is tolerated")


@contextmanager
def answering(opened: socket.socket, found: Iterator[Frame]) -> "Iterator[Queue[Frame | None]]":
    """Every frame as it comes, and None at the end; the server's own pings are answered, as every client does."""
    seen: Queue[Frame | None] = Queue()

    def read() -> None:
        with suppress(OSError):  # it is closed from either side
            for one in found:
                seen.put(one)
                if one.kind == frames.PING and not one.flags & frames.ACKNOWLEDGED:
                    frames.send(opened, Frame(frames.PING, frames.ACKNOWLEDGED, one.payload))
        seen.put(None)

    opened.settimeout(None)
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        with suppress(OSError):  # the server may have closed it
            opened.shutdown(socket.SHUT_RDWR)
        thread.join()


def _comes(seen: "Queue[Frame | None]", wanted: Callable[[Frame], bool]) -> bool:
    """Whether such a frame comes in time."""
    end = time.monotonic() + HANG_UP
    with suppress(Empty):
        while (one := seen.get(timeout=max(0.0, end - time.monotonic()))) is not None:
            if wanted(one):
                return True
    return False


FAULTS = (
    Fault(
        number=30,
        name=f"{IDLE} idle connections, {RESETS} rapid resets, a slow beginning",
        expected="limited, others served",
        put=many,
        wanted=Wanted(handshake=2.0),
    ),
    Fault(
        number=31,
        name="pings every 10 s, and a flood of them",
        expected="accepted; cut off",
        put=pings,
    ),
)
