"""Several of our servers at fixed addresses, each of which can end and come back while the others serve."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.load.servers import Running, Server, share_processors, started

CLIENT_HEADER = "x-client-address"
"""In which Envoy tells replicas whose call it is."""


@dataclass(frozen=True, kw_only=True)
class Replica(Server):
    """A server that comes back where it was.

    Attributes:
        port: that it listens on.
    """

    port: int

    def command(self, folder: Path) -> list[str]:
        """See `Server`."""
        own = (f"--port={self.port}", f"--client-header={CLIENT_HEADER}", "--log-level=warning")
        return [*super().command(folder), *own]


class Fleet:
    """The replicas.

    Args:
        replicas: what they are.
        folder: for what they write.

    Attributes:
        running: each of them, as it was started last.
    """

    def __init__(self, replicas: Sequence[Replica], folder: Path) -> None:
        self.replicas, self._folder = replicas, folder
        self.running: list[Running] = []
        self._stacks = [ExitStack() for _ in replicas]
        self._starts = 0

    @contextmanager
    def started(self) -> Iterator["Fleet"]:
        """All of them, until the end.

        Raises:
            LoadError: one did not start.
        """
        with ExitStack() as every:
            for stack in self._stacks:
                every.enter_context(stack)
            self.running = [self._start(index) for index in range(len(self.replicas))]
            yield self

    def restart(self, index: int) -> None:
        """Start one that has ended, where it was.

        Raises:
            LoadError: it did not start.
        """
        self._stacks[index].close()
        self.running[index] = self._start(index)

    def _start(self, index: int) -> Running:
        self._starts += 1
        folder = self._folder / str(self._starts)
        folder.mkdir()
        return self._stacks[index].enter_context(started(self.replicas[index], folder, share_processors(0)))
