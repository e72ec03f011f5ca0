"""What one connection may do: how much at a time, how long it may be silent, how often it may ping. gRPC sees to it."""

import resource
from dataclasses import dataclass

from model.errors import ConfigError

MEGABYTE = 1024 * 1024

PING_INTERVAL = 5.0
"""Seconds between two pings of a client, below which it is hung up on after three. gRPC's default is 300: clients that
keep a connection alive every 10 seconds, as many do, would lose it in the midst of a long answer."""

PENDING = 4000
"""Calls that may wait until Python hears of them, about 10 kB each; of more, gRPC ends some at random with CANCELLED.
By default it does so from a thousand on, which a flood of calls that are reset is in no time, and good ones among them.
"""

FILES = 124
"""That a server may have open besides its connections: a model that is loaded, scrapes. It needs about twenty."""


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What connections may do. Times are seconds."""

    connections: int = 900
    """Most at a time; one more is hung up on, and before that those that nobody uses (see `serve.room`). Each is an
    open file: of these a process may often have 1,024 without asking for more."""
    connection_calls: int = 1000
    """Most calls at a time on one; more wait at the client. gRPC counts a call until the server has let go of it, which
    is later than the client thinks, and resets (UNAVAILABLE) what comes in between: so about twice as many as a client
    should have. A flood of calls that are reset at once is cut off at so many."""
    connection_idle: float = 900.0
    """Without a call, after which a connection is closed; clients open another when they need one."""
    connection_age: float | None = None
    """After which a connection takes no new calls and is closed once it has none, so that clients spread over new
    replicas and show their certificates again; by default it may grow old."""
    keepalive: float = 60.0
    """Of silence, after which a client is asked whether it is still there."""
    keepalive_timeout: float = 20.0
    """That it has to answer; then its connection is closed, and what it asked for is given up."""
    handshake: float = 20.0
    """That a new connection has to say what it is: TLS and the first frames of HTTP/2."""

    def provide_files(self) -> None:
        """Let this process open as many files as it takes.

        Raises:
            ConfigError: it may not have so many.
        """
        allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = self.connections + FILES
        if resource.RLIM_INFINITY not in {allowed, most} and most < needed:
            raise ConfigError(
                f"connections: {self.connections} need {needed} open files, and this process may have {most}: "
                f"raise that (ulimit -Hn, LimitNOFILE=), or take at most {max(0, most - FILES)} connections"
            )
        if allowed != resource.RLIM_INFINITY and allowed < needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))

    def arguments(self) -> list[tuple[str, int]]:
        """Channel arguments for gRPC's server."""
        age = (
            [] if self.connection_age is None else [("grpc.max_connection_age_ms", _milliseconds(self.connection_age))]
        )
        return [
            ("grpc.max_receive_message_length", 4 * MEGABYTE),
            ("grpc.max_send_message_length", 256 * MEGABYTE),
            ("grpc.max_allowed_incoming_connections", self.connections),
            ("grpc.max_concurrent_streams", self.connection_calls),
            ("grpc.max_connection_idle_ms", _milliseconds(self.connection_idle)),
            ("grpc.server_handshake_timeout_ms", _milliseconds(self.handshake)),
            ("grpc.keepalive_time_ms", _milliseconds(self.keepalive)),
            ("grpc.keepalive_timeout_ms", _milliseconds(self.keepalive_timeout)),
            # The timeout above has no effect while this one, of any ping, is longer (grpc 1.85), and it is a minute.
            ("grpc.http2.ping_timeout_ms", _milliseconds(self.keepalive_timeout)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),  # silence is what keepalive is for: no limit to our own
            ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(PING_INTERVAL)),
            ("grpc.server.max_pending_requests", PENDING),
            ("grpc.server.max_pending_requests_hard_limit", 2 * PENDING),
            ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake to be told of
            *age,
        ]


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)
