"""A folder of bundles, looked at again: what is new is loaded, what has changed is swapped, what is gone is unloaded.

    FOLDER/bundle.json                  a bundle by itself
    FOLDER/any-name/bundle.json         or several, each an entry called by its place: "any-name",
    FOLDER/any-name/any/bundle.json     "any-name/any"

What each one is called when it is asked, its own manifest says. A bundle is loaded from a copy: whoever writes into the
folder while it is served damages neither what is being checked nor what answers (graphs are mapped from their file).
"""

import asyncio
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from export.manifest import MANIFEST, BundleError
from model.errors import LimelightError
from serve import heap
from serve.bundle import ServedModel
from serve.errors import ModelExistsError, ModelNotFoundError
from serve.models import Models, Serving

log = logging.getLogger(__name__)

Load = Callable[[Path], ServedModel]

DEPTH = 2
"""Folders below the folder that a bundle may lie in."""


@dataclass(eq=False)
class Entry:
    """A bundle in the folder.

    Attributes:
        name: what it is called here.
        path: where it lies.
        serving: what answers for it; None where it was never loaded, or is unloaded.
        failure: why its newest contents are not served; empty where they are.
        fingerprint: of the contents that were last tried.
        unloaded: somebody said so: it is not loaded again before somebody asks for that.
    """

    name: str
    path: Path
    serving: Serving | None = None
    failure: str = ""
    fingerprint: str = ""
    unloaded: bool = False

    def differs(self, fingerprint: str) -> bool:
        """Other contents than those that were last tried, and nobody has said that they are not to be loaded."""
        return not self.unloaded and fingerprint != self.fingerprint

    @property
    def told(self) -> str:
        """The failure, for who is not to know where the folder is."""
        return self.failure.replace(str(self.path), self.name)


class Found(NamedTuple):
    """A bundle that is there."""

    path: Path
    """Where."""
    fingerprint: str
    """Changes with whatever is written there."""


class ModelFolder:
    """Keeps `Models` as the folder says.

    Args:
        root: the folder, or a bundle.
        load: checks, loads and warms up the bundle in a folder.
        models: what is served; it belongs to this.
    """

    def __init__(self, root: Path, load: Load, models: Models) -> None:
        self._root = root if root.name else Path.cwd()  # "." stands in every message
        self._load, self._models = load, models
        self._entries: dict[str, Entry] = {}
        self._begun = False
        self._changing = asyncio.Lock()
        self._tasks, self._retiring = set[asyncio.Task[None]](), set[asyncio.Task[None]]()

    @property
    def entries(self) -> list[Entry]:
        """All that were found, by place."""
        return [self._entries[name] for name in sorted(self._entries)]

    @property
    def failed(self) -> int:
        """Entries whose newest contents cannot be served; may be asked from any thread."""
        return sum(bool(entry.failure) for entry in list(self._entries.values()))

    async def load_all(self) -> None:
        """Load what is there, to begin with.

        Raises:
            BundleError: there is nothing, or something that cannot be loaded.
        """
        entries = await self.reload() if self._root.is_dir() else []
        if not entries:
            way_out = f"make one with: limelight export CHECKPOINT {self._root}"
            raise BundleError(f"{self._root}: no bundle, and no folder of bundles; {way_out}")
        if failures := [entry.failure for entry in entries if entry.failure]:
            raise BundleError("; ".join(failures))
        self._begun = True

    async def reload(self) -> list[Entry]:
        """Look again; returns the entries. What fails is said there and logged, and what it was to replace stays.

        Whoever stops waiting for this, or for any other change, does not stop it.

        Raises:
            BundleError: the folder is not there, or cannot be read; all that is served stays.
        """
        await self._whole(self._reload())
        return self.entries

    async def _reload(self) -> None:
        async with self._changing:
            found = await asyncio.to_thread(scan, self._root)
            changed = {
                name: Entry(name, path, fingerprint=fingerprint)
                for name, (path, fingerprint) in found.items()
                if name not in self._entries or self._entries[name].differs(fingerprint)
            }
            loaded = await self._loaded(changed.values())
            gone = [self._entries[name] for name in self._entries.keys() - found.keys()]
            if alone := next((entry for entry in gone if entry.path == self._root), None):
                self._failed(alone, BundleError(f"{self._root}: its {MANIFEST} is gone"))
                return
            for entry in gone:
                del self._entries[entry.name]
            self._swap(changed, loaded, gone)

    async def look_again(self) -> None:
        """The same, where nobody waits for it: what goes wrong is logged."""
        try:
            await self.reload()
        except LimelightError as error:
            log.error("model folder: %s", error)
        except Exception:
            log.exception("the model folder could not be looked at")

    async def load(self, name: str) -> Entry:
        """Load an entry again, whether it has changed or not, was unloaded or failed.

        Raises:
            ModelNotFoundError: there is no such entry.
        """
        await self._whole(self._load_again(name))
        return self._entries[name]

    async def _load_again(self, name: str) -> None:
        async with self._changing:
            found = await asyncio.to_thread(scan, self._root)
            if name not in found:
                raise ModelNotFoundError(f"the model folder has no entry {name!r}")
            changed = {name: Entry(name, found[name].path, fingerprint=found[name].fingerprint)}
            self._swap(changed, await self._loaded(changed.values()), ())

    async def unload(self, name: str) -> Entry:
        """Let an entry take no more calls, until it is loaded again.

        Raises:
            ModelNotFoundError: there is no such entry.
        """
        async with self._changing:
            if name not in self._entries:
                raise ModelNotFoundError(f"the model folder has no entry {name!r}")
            entry = self._entries[name]
            self._swap({}, {}, [entry])
            entry.unloaded, entry.fingerprint, entry.failure = True, "", ""
            return entry

    async def watch(self, seconds: float) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            await self.look_again()

    async def until_retired(self) -> None:
        """Until every model that was taken out has answered what it had taken."""
        await asyncio.gather(*self._retiring)

    async def _whole(self, change: Coroutine[None, None, None]) -> None:
        """Make a change to its end, even if nobody waits for it any more: half of one is of no use."""
        await asyncio.shield(self._kept(asyncio.create_task(change)))

    async def _loaded(self, entries: Iterable[Entry]) -> dict[str, ServedModel]:
        """Models by entry, of those that can be loaded; of the others, why not."""
        loaded = {}
        for entry in entries:
            try:
                loaded[entry.name] = await asyncio.to_thread(load_copy, entry.path, self._root, self._load)
            except Exception as error:  # a damaged bundle can raise whatever its readers can
                self._failed(entry, error)
        return loaded

    def _swap(self, changed: Mapping[str, Entry], loaded: Mapping[str, ServedModel], gone: Sequence[Entry]) -> None:
        """All at once: to a call, before it is all as it was, and after it all as it is to be.

        Args:
            changed: entries as they were found, by name; those that could not be loaded say why.
            loaded: models of the others.
            gone: entries that nothing is to answer for.
        """
        for name, new in changed.items():
            entry = self._entries.setdefault(name, new)
            entry.fingerprint, entry.failure, entry.unloaded = new.fingerprint, new.failure, False
        coming = [self._entries[name] for name in loaded]
        before = {entry: entry.serving for entry in (*gone, *coming) if entry.serving is not None}
        for entry, serving in before.items():
            self._models.take_out(serving)
            entry.serving = None
        for entry in coming:
            self._add(entry, loaded[entry.name])
        for entry, serving in before.items():
            if entry in coming and entry.serving is None and self._models.put_back(serving):
                entry.serving = serving
            else:
                self._retire(serving)
        for entry in gone:
            log.info("model folder: %s is unloaded", entry.name)

    def _add(self, entry: Entry, model: ServedModel) -> None:
        try:
            serving = self._models.add(model)
        except ModelExistsError as error:
            self._failed(entry, error)
            return
        entry.serving = serving
        level = logging.INFO if self._begun else logging.DEBUG  # to begin with, the command tells
        log.log(level, "model folder: %s is served as %s %s", entry.name, serving.name, serving.version)

    def _failed(self, entry: Entry, error: Exception) -> None:
        entry.failure = str(error) or type(error).__name__
        unforeseen = None if isinstance(error, LimelightError | OSError) else error
        log.error("model folder: %s cannot be loaded: %s", entry.name, entry.failure, exc_info=unforeseen)

    def _retire(self, serving: Serving) -> None:
        self._retiring.add(task := self._kept(asyncio.create_task(self._retired(serving))))
        task.add_done_callback(self._retiring.discard)

    async def _retired(self, serving: Serving) -> None:
        await self._models.retire(serving)
        del serving  # nobody else has it: its memory is free
        await asyncio.to_thread(heap.give_back)

    def _kept(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        """A task that nobody may wait for: the loop alone would not keep it alive."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def scan(root: Path) -> Mapping[str, Found]:
    """The bundles of a folder by name: of a bundle that name, of a folder of bundles their places in it.

    Raises:
        BundleError: the folder is not there, or cannot be read.
    """
    if not root.is_dir():
        raise BundleError(f"{root}: there is no such folder")
    try:
        if (root / MANIFEST).is_file():
            return {root.resolve().name: Found(root, _fingerprint(root))}
        patterns = ("/".join("*" * depth) for depth in range(1, DEPTH + 1))
        places = sorted(path.parent for pattern in patterns for path in root.glob(f"{pattern}/{MANIFEST}"))
        return {place.relative_to(root).as_posix(): Found(place, _fingerprint(place)) for place in places}
    except OSError as error:
        raise BundleError(f"{root}: cannot be read: {error.strerror or error}") from error


def load_copy(bundle: Path, root: Path, load: Load) -> ServedModel:
    """Load a bundle from a copy that is gone afterwards.

    Args:
        bundle: its folder.
        root: the model folder.
        load: see `ModelFolder`.

    Raises:
        BundleError: as `load`, naming the bundle's own folder; or it is a link that leads out of the model folder.
        OSError: it cannot be read, or there is no room for the copy.
    """
    if not bundle.resolve().is_relative_to(root.resolve()):
        raise BundleError(f"{bundle}: a link that leads out of the model folder")
    with tempfile.TemporaryDirectory(prefix="limelight-") as scratch:
        copy = Path(scratch) / "bundle"
        try:
            shutil.copytree(bundle, copy, symlinks=True)
            return load(copy)
        except shutil.Error as error:  # files that went away meanwhile
            why = str(error.args[0][0][-1]).replace(str(copy), str(bundle))
            raise BundleError(f"{bundle}: cannot be copied: {why}") from error
        except LimelightError as error:
            raise BundleError(str(error).replace(str(copy), str(bundle))) from error


def _fingerprint(bundle: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(bundle.rglob("*")):
        try:
            about = path.stat()
        except OSError:  # it is being written just now, or leads nowhere: another look may find something else
            digest.update(b"gone\n")
            continue
        digest.update(f"{path.relative_to(bundle)}\0{about.st_size}\0{about.st_mtime_ns}\0{about.st_ino}\n".encode())
    return digest.hexdigest()
