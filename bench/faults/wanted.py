"""What a fault needs of a server's settings, in no server's own words."""

from dataclasses import dataclass
from pathlib import Path

from bench.load.triton_server import free_port

LARGEST_MESSAGE = 4 * 1024 * 1024
"""Bytes of a request, where that can be set: gRPC's own default, which ours has."""

ADMIN_TOKEN = "x" * 43  # of a server that lives for seconds, on this machine alone
ADMIN_HEADER = "authorization"


@dataclass(frozen=True)
class Files:
    """PEM files of a server that asks clients for certificates."""

    certificate: Path
    key: Path
    ca: Path


@dataclass(frozen=True)
class Ports:
    """Where a server listens."""

    service: int
    admin: int

    @classmethod
    def free(cls) -> "Ports":
        """Two that nobody listens on."""
        return cls(free_port(), free_port())


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Settings, each left out where it is None. What a server has no setting for stays as it is there."""

    queue: int | None = None
    """Most requests waiting."""
    queue_tokens: int | None = None
    """Most tokens of them."""
    watchdog: float | None = None
    """Seconds that a model may hang."""
    write_timeout: float | None = None
    """Seconds that a reader may not read."""
    handshake: float | None = None
    """Seconds that a new connection has to begin."""
    keepalive: float | None = None
    """Seconds of silence until a client is asked whether it is there, and for its answer."""
    grace: float = 20.0
    """Seconds for what is begun, when stopping."""
    credentials: bool = False
    """Whether who loads models must show a token."""
    tls: Files | None = None
    """With it, mutual TLS."""
