"""Room for newcomers: connections that nobody uses are closed before gRPC has to hang up on who comes next.

gRPC knows one limit for all connections together. Whoever opens very many, or forgets to close them, would keep
everybody else out until they have been idle for long. So a quarter of them is kept free: of whoever has most, by
address, those are closed that have no call and have been silent longest. The same look tells whether this process can
open files at all.
"""

import asyncio
import errno
import functools
import heapq
import ipaddress
import logging
import os
import resource
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from serve.heap import give_back
from serve.metrics import Metrics

log = logging.getLogger(__name__)

FILES = Path("/proc/self/fd")
"""Where Linux tells what this process has open."""

AVAILABLE = FILES.is_dir()
"""Whether it does; elsewhere no room is made."""

FREE = 4
"""One in so many connections is kept free."""

LOOK = 0.1
"""Seconds between two looks: the longer, the more connections can come in between, and leave no room."""

SHARE = 5
"""Looks take at most one in so many seconds, however many connections there are."""

GONE = 500
"""Files that were open, and half of all, after whose closing memory is given back to the system."""

SEEMING = 50
"""Most open files that are taken for something else than connections."""

QUIET = 10.0
"""Seconds without closing anything, after which it is said that there is room again."""

_SILENCE = struct.Struct("=52xI")
"""Of Linux' `tcp_info`: milliseconds since the other side last sent data, or since it connected."""


class Peer(NamedTuple):
    """The other end of a connection."""

    host: str
    """Its address; that of IPv4 as such, over whatever socket."""
    port: int
    """Its port."""


class Connection(NamedTuple):
    """A connection of this process."""

    descriptor: int
    """Of its socket."""
    peer: Peer
    """Who it is with."""
    silence: int
    """Milliseconds since it last brought data."""


class Room:
    """Keeps room for newcomers on a port.

    Args:
        port: of this process.
        most: connections that it takes.
        busy: gRPC's names of the peers that have calls under way.
        metrics: told what is closed, and when no more files can be opened.
    """

    def __init__(self, port: int, most: int, busy: Callable[[], Iterable[str]], metrics: Metrics) -> None:
        self._port, self._kept, self._most, self._busy = port, most - most // FREE, most, busy
        self._metrics = metrics
        self._out_of_files, self._others = False, 0
        self._closed, self._last, self._peak = 0, -QUIET, 0

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        took = 0.0
        while AVAILABLE:
            await asyncio.sleep(max(LOOK, SHARE * took))
            begun = time.monotonic()
            await self.look()
            took = time.monotonic() - begun

    async def look(self) -> None:
        """Make room where there is little, and say so."""
        opened = await asyncio.to_thread(open_files)
        self._tell_of_files(opened)
        if opened is None:
            return
        if opened - self._others > self._kept:
            await self._make(opened)
        self._peak = max(self._peak, opened)
        if self._peak - opened > max(GONE, opened):  # the pages that connections were on lie among others
            self._peak = opened
            await asyncio.to_thread(give_back)
        if self._closed and time.monotonic() - self._last > QUIET:
            log.info("there is room again: %d connections were closed", self._closed)
            self._closed = 0

    async def _make(self, opened: int) -> None:
        busy = {peer_named(name) for name in self._busy()}
        with suppress(OSError):  # no more files can be opened, which the next look tells
            closed, there = await asyncio.to_thread(self._close_some, busy)
            # Files that are no connections: next time they do not count. Those that come and go may seem many.
            self._others = min(max(0, opened - there), SEEMING)
            self._tell_of_crowd(closed, there)

    def _close_some(self, busy: Collection[Peer]) -> tuple[list[Connection], int]:
        """What was closed, and how many there were."""
        there = list(connections(self._port))
        # Twice the room that is missing at once: as many may come again before the next look.
        surplus = len(there) - self._most // 2 if len(there) > self._kept else 0
        chosen = longest_silent(there, busy, surplus)
        return [connection for connection in chosen if close(connection)], len(there)

    def _tell_of_crowd(self, closed: list[Connection], there: int) -> None:
        if not closed:
            return
        self._metrics.connections_closed(len(closed))
        if not self._closed:
            log.warning(
                "%d of %d connections are taken, most of them by %s: of whoever has most, those without a call are "
                "closed, silent longest first",
                *(there, self._most, closed[0].peer.host),
            )
        self._closed += len(closed)
        self._last = time.monotonic()

    def _tell_of_files(self, opened: int | None) -> None:
        if opened is None and not self._out_of_files:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            log.error(
                "this process may open %d files, and has: whoever connects has to wait until some are closed", limit
            )
            self._metrics.out_of_files()
        elif opened is not None and self._out_of_files:
            log.info("files can be opened again")
        self._out_of_files = opened is None


def open_files() -> int | None:
    """How many files this process has open; None where it can open no more."""
    try:
        folder = os.open(FILES, os.O_RDONLY)
    except OSError as error:
        if error.errno not in {errno.EMFILE, errno.ENFILE}:
            raise
        return None
    try:
        return os.fstat(folder).st_size or sum(1 for _ in FILES.iterdir())  # the size says it since Linux 6.2
    finally:
        os.close(folder)


def connections(port: int) -> Iterator[Connection]:
    """Those that came to a port of this process.

    Raises:
        OSError: no more files can be opened.
    """
    with os.scandir(FILES) as entries:
        descriptors = [int(entry.name) for entry in entries]
    for descriptor in descriptors:
        with suppress(OSError), _opened(descriptor) as found:
            own = found.getsockname()
            if isinstance(own, tuple) and own[1] == port:
                yield Connection(descriptor, _peer(found), _silence(found))


def longest_silent(there: Iterable[Connection], busy: Collection[Peer], count: int) -> list[Connection]:
    """Which ones to close, so that those who have most have less.

    Args:
        there: all connections.
        busy: peers that have calls under way; these count, and are not closed.
        count: how many to close, if there are as many.
    """
    held: dict[str, int] = defaultdict(int)
    idle: dict[str, list[Connection]] = defaultdict(list)
    for connection in sorted(there, key=lambda one: one.silence):
        held[connection.peer.host] += 1
        if connection.peer not in busy:
            idle[connection.peer.host].append(connection)
    order = [(-held[host], -own[-1].silence, host) for host, own in idle.items()]
    heapq.heapify(order)
    found: list[Connection] = []
    while order and len(found) < count:
        size, _, host = heapq.heappop(order)
        found.append(idle[host].pop())
        if idle[host]:
            heapq.heappush(order, (size + 1, -idle[host][-1].silence, host))
    return found


def close(connection: Connection) -> bool:
    """Hang up, as far as it is still that connection, and has stayed silent; returns whether it was."""
    with suppress(OSError), _opened(connection.descriptor) as found:
        if _peer(found) == connection.peer and _silence(found) >= connection.silence:
            found.shutdown(socket.SHUT_RDWR)  # gRPC, which it belongs to, finds it ended
            return True
    return False


def peer_named(name: str) -> Peer:
    """From gRPC's name of it, as `ipv4:127.0.0.1:1024` or `ipv6:%5B::1%5D:1024`."""
    host, _, port = unquote(name).partition(":")[2].rpartition(":")
    return Peer(_plain(host.strip("[]")), int(port) if port.isdecimal() else 0)


def _opened(descriptor: int) -> socket.socket:
    """A socket under a second descriptor: it stays this one, whatever gRPC closes and opens meanwhile."""
    duplicate = os.dup(descriptor)
    try:
        # To find out of what kind it is takes as long as all the rest. As IPv6 there is room for either address.
        return socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 0, duplicate)
    except OSError:  # no socket
        os.close(duplicate)
        raise


def _peer(found: socket.socket) -> Peer:
    host, port, *_ = found.getpeername()
    return Peer(_plain(host), port)


def _silence(found: socket.socket) -> int:
    (silence,) = _SILENCE.unpack(found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SILENCE.size))
    return int(silence)


@functools.lru_cache(4096)
def _plain(host: str) -> str:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
