"""The models that a server answers with, each with an engine of its own; they come and go while it serves.

All of it happens on the event loop. Whoever answers a call holds its model (`use`): a model that is taken out gets no
new calls, and its engine stops when the last call that holds it is done.
"""

import asyncio
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

from serve.batcher import Counts
from serve.bundle import ServedModel
from serve.engine import Engine
from serve.errors import ModelExistsError, ModelNotFoundError
from serve.jobs import EngineLimits

LOOK = 0.05
"""Seconds between two looks at whether an engine has stopped."""


@dataclass(eq=False)
class Serving:
    """A model that answers.

    Attributes:
        model: what was loaded.
        engine: what decodes for it.
        number: how many were loaded before it.
        users: calls that hold it.
    """

    model: ServedModel
    engine: Engine
    number: int
    users: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        """Of the model."""
        return self.model.manifest.name

    @property
    def version(self) -> str:
        """Of the model."""
        return self.model.manifest.version

    @contextmanager
    def held(self) -> Iterator["Serving"]:
        """Its engine does not stop meanwhile."""
        self.users += 1
        try:
            yield self
        finally:
            self.users -= 1
            if not self.users:
                self._idle.set()

    async def until_idle(self) -> None:
        """Until nobody holds it."""
        while self.users:
            self._idle.clear()
            await self._idle.wait()


class Models:
    """The models that are served, by name and version.

    Args:
        limits: what each engine takes on at a time.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._serving: list[Serving] = []
        self._leaving: list[Serving] = []
        self._numbers = itertools.count()
        self._before = Counts()
        self._counting = threading.Lock()  # scrapes come from a thread of their own

    def __iter__(self) -> Iterator[Serving]:
        """Those that take calls, by name and version."""
        return iter(sorted(self._serving, key=lambda one: (one.name, *_age(one.version))))

    @property
    def all(self) -> list[Serving]:
        """The same, and those that still answer what they had taken."""
        return [*self._serving, *self._leaving]

    def add(self, model: ServedModel) -> Serving:
        """Let a model answer from now on.

        Raises:
            ModelExistsError: another one of the same name and version is served.
        """
        manifest = model.manifest
        if self._has(manifest.name, manifest.version):
            raise ModelExistsError(f"{manifest.name} {manifest.version} is served already")
        new = Serving(model, Engine(model.steps, self._limits, model.shortlist), next(self._numbers))
        self._serving.append(new)
        return new

    def take_out(self, serving: Serving) -> None:
        """Give a model no more calls; it is to be retired, or put back."""
        with self._counting:
            self._serving.remove(serving)
            self._leaving.append(serving)

    def put_back(self, serving: Serving) -> bool:
        """Give a model calls again that was taken out; returns whether nothing else has its name and version."""
        if self._has(serving.name, serving.version):
            return False
        with self._counting:
            self._leaving.remove(serving)
            self._serving.append(serving)
        return True

    def _has(self, name: str, version: str) -> bool:
        return any((one.name, one.version) == (name, version) for one in self._serving)

    async def retire(self, serving: Serving) -> None:
        """Wait until nobody holds a model that was taken out, and stop its engine."""
        await serving.until_idle()
        serving.engine.stop(0)
        while serving.engine.alive:  # noqa: ASYNC110  # of another thread, which may hang: no call of ours is to
            await asyncio.sleep(LOOK)
        with self._counting:
            self._leaving.remove(serving)
            self._before = _total(self._before, serving.engine.counts)

    @contextmanager
    def use(self, name: str, version: str = "") -> Iterator[Serving]:
        """Hold a model for a call.

        Raises:
            ModelNotFoundError: as `find`.
        """
        with self.find(name, version).held() as serving:
            yield serving

    def find(self, name: str, version: str = "") -> Serving:
        """The model of a name, or the only one where none is given; of a version, or the newest.

        Raises:
            ModelNotFoundError: there is none, or several where no name is given.
        """
        names = sorted({one.name for one in self._serving})
        if not name and len(names) > 1:
            raise ModelNotFoundError(f"several models are served, name one: {', '.join(names)}")
        named = [one for one in self if one.name == (name or names[0])] if names else []
        if not named:
            there = f"{', '.join(map(repr, names))} {'is' if len(names) == 1 else 'are'}" if names else "none is"
            raise ModelNotFoundError(f"model {name!r} is not served here; {there}")
        if not version:
            return self._newest(named)
        for one in named:
            if one.version == version:
                return one
        versions = ", ".join(one.version for one in named)
        raise ModelNotFoundError(f"model {named[0].name!r} has no version {version!r} here, only {versions}")

    async def stop(self, seconds: float) -> bool:
        """Stop all engines; returns whether they finished what they had in so many seconds, and none had failed."""
        engines = [serving.engine for serving in self.all]
        stopped = await asyncio.gather(*(asyncio.to_thread(engine.stop, seconds) for engine in engines))
        return all(stopped) and not any(engine.failed for engine in engines)

    def counts(self) -> Counts:
        """What was done since the beginning, by all engines that there were."""
        with self._counting:
            return _total(self._before, *(serving.engine.counts for serving in self.all))

    @staticmethod
    def _newest(named: list[Serving]) -> Serving:
        """By number where all versions are numbers; where they are checksums, what was loaded last."""
        if all(is_number(one.version) for one in named):
            return named[-1]
        return max(named, key=lambda one: one.number)


def _total(*counts: Counts) -> Counts:
    return Counts(**{one.name: sum(getattr(count, one.name) for count in counts) for one in fields(Counts)})


def is_number(version: str) -> bool:
    """Whether a version is one, in the digits 0 to 9."""
    return version.isascii() and version.isdecimal()


def _age(version: str) -> tuple[int, str]:
    """Numbers by their size, however long they are; before them whatever else there is."""
    number = version.lstrip("0")
    return (len(number), number) if is_number(version) else (-1, version)
