"""The runner's side of `device`: every step of a model under test, held, let through, or made to fail."""

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.load.servers import LoadError

PATIENCE = 30.0
"""Seconds that the runner waits for what must come."""

STEPS = frozenset({"encode", "step"})
"""What a model does for its callers; the rest of it is loading."""


@dataclass(frozen=True)
class Pass:
    """One step, as the model told of it.

    Attributes:
        pid: of the process that it runs in.
        what: "load", "encode" or "step".
        rows: texts that are decoded in it.
        texts: these, where the model knows them.
    """

    pid: int
    what: str
    rows: int
    texts: tuple[str, ...]


class Passes:
    """Listens for the steps of one server.

    Args:
        place: path of the socket.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(place))
        self._listening.listen(64)
        self._changed = threading.Condition()
        self._seen: list[Pass] = []
        self._held: deque[tuple[Pass, socket.socket]] = deque()
        self._holding: frozenset[str] = frozenset()
        self._answer: Callable[[Pass], str] = _go
        self._listener = threading.Thread(target=self._listen, name="passes", daemon=True)
        self._listener.start()

    @property
    def seen(self) -> list[Pass]:
        """All that came so far."""
        with self._changed:
            return list(self._seen)

    @property
    def held(self) -> int:
        """How many wait to be let through."""
        with self._changed:
            return len(self._held)

    def hold(self, what: frozenset[str] = STEPS) -> None:
        """Let none of these through from now on."""
        with self._changed:
            self._holding = what

    def let(self, count: int = 1) -> None:
        """Let the oldest that wait through."""
        with self._changed:
            for _ in range(count):
                self._reply(*self._held.popleft())

    def open(self, answer: Callable[[Pass], str] | None = None) -> None:
        """Let all through from now on, with "go" or another answer: "fail" or "die"."""
        with self._changed:
            self._answer = answer or _go
            self._holding = frozenset()
            while self._held:
                self._reply(*self._held.popleft())

    def wait_held(self, wanted: Callable[[Pass], bool] | None = None) -> Pass:
        """The oldest that waits, once it is as wanted; those before it are let through.

        Raises:
            LoadError: none came in time.
        """
        end = time.monotonic() + PATIENCE
        with self._changed:
            while True:
                while self._held and wanted is not None and not wanted(self._held[0][0]):
                    self._reply(*self._held.popleft())
                if self._held:
                    return self._held[0][0]
                if not self._changed.wait(end - time.monotonic()):
                    raise LoadError(f"no such step of the model came in {PATIENCE:g} s")

    def close(self) -> None:
        """Listen no more; what waits goes on."""
        self.open()
        with suppress(OSError):  # it may not be connected to anything
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listener.join(PATIENCE)
        self._listening.close()
        self.place.unlink(missing_ok=True)

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return  # it is closed
            self._take(connection)

    def _take(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as stream:
            line = stream.readline()
        if not line:
            connection.close()  # whoever it was has died
            return
        values = json.loads(line)
        one = Pass(values["pid"], values["what"], values["rows"], tuple(values["texts"]))
        with self._changed:
            self._seen.append(one)
            self._held.append((one, connection))
            if one.what not in self._holding:
                self._reply(*self._held.pop())
            self._changed.notify_all()

    def _reply(self, one: Pass, connection: socket.socket) -> None:
        with connection, suppress(OSError):  # its process may be gone
            connection.sendall(self._answer(one).encode())


def _go(_: Pass) -> str:
    return "go"
