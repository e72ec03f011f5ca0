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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from export.manifest import MANIFEST, BundleError
from model.errors import LimelightError
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
        self._root, self._load, self._models = root, load, models
        self._entries: dict[str, Entry] = {}
        self._begun = False
        self._changing = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def entries(self) -> list[Entry]:
        """All that were found, by place."""
        return [self._entries[name] for name in sorted(self._entries)]

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

        Raises:
            BundleError: there is no such folder; all that is served stays.
            OSError: it cannot be read; the same.
        """
        async with self._changing:
            found = await asyncio.to_thread(scan, self._root)
            changed = []
            for name, (path, fingerprint) in found.items():
                entry = self._entries.setdefault(name, Entry(name, path))
                if not entry.unloaded and fingerprint != entry.fingerprint:
                    entry.fingerprint = fingerprint
                    changed.append(entry)
            gone = [self._entries.pop(name) for name in self._entries.keys() - found.keys()]
            self._swap(await self._loaded(changed), gone)
            return self.entries

    async def look_again(self) -> None:
        """The same, where nobody waits for it: what goes wrong is logged."""
        try:
            await self.reload()
        except (LimelightError, OSError) as error:
            log.error("model folder: %s", error)

    async def load(self, name: str) -> Entry:
        """Load an entry again, whether it has changed or not, was unloaded or failed.

        Raises:
            ModelNotFoundError: there is no such entry.
        """
        async with self._changing:
            found = await asyncio.to_thread(scan, self._root)
            if name not in found:
                raise ModelNotFoundError(f"the model folder has no entry {name!r}")
            entry = self._entries.setdefault(name, Entry(name, found[name].path))
            entry.fingerprint, entry.unloaded = found[name].fingerprint, False
            self._swap(await self._loaded([entry]), ())
            return entry

    async def unload(self, name: str) -> Entry:
        """Let an entry take no more calls, until it is loaded again.

        Raises:
            ModelNotFoundError: there is no such entry.
        """
        async with self._changing:
            if name not in self._entries:
                raise ModelNotFoundError(f"the model folder has no entry {name!r}")
            entry = self._entries[name]
            self._swap({}, [entry])
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

    async def _loaded(self, entries: Sequence[Entry]) -> dict[str, ServedModel]:
        """Models by entry, of those that can be loaded; of the others, why not."""
        loaded = {}
        for entry in entries:
            try:
                loaded[entry.name] = await asyncio.to_thread(load_copy, entry.path, self._root, self._load)
            except (LimelightError, OSError) as error:
                self._failed(entry, error)
        return loaded

    def _swap(self, loaded: Mapping[str, ServedModel], gone: Sequence[Entry]) -> None:
        """All at once: to a call, before it is all as it was, and after it all as it is to be."""
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
        entry.serving, entry.failure = serving, ""
        level = logging.INFO if self._begun else logging.DEBUG  # to begin with, the command tells
        log.log(level, "model folder: %s is served as %s %s", entry.name, serving.name, serving.version)

    def _failed(self, entry: Entry, error: Exception) -> None:
        entry.failure = str(error)
        log.error("model folder: %s cannot be loaded: %s", entry.name, error)

    def _retire(self, serving: Serving) -> None:
        task = asyncio.create_task(self._models.retire(serving))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)


def scan(root: Path) -> Mapping[str, Found]:
    """The bundles of a folder by name: of a bundle that name, of a folder of bundles their places in it.

    Raises:
        BundleError: there is no such folder.
    """
    if not root.is_dir():
        raise BundleError(f"{root}: there is no such folder")
    if (root / MANIFEST).is_file():
        return {root.resolve().name: Found(root, _fingerprint(root))}
    patterns = ("/".join("*" * depth) for depth in range(1, DEPTH + 1))
    places = sorted(path.parent for pattern in patterns for path in root.glob(f"{pattern}/{MANIFEST}"))
    return {place.relative_to(root).as_posix(): Found(place, _fingerprint(place)) for place in places}


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
            raise BundleError(f"{bundle}: cannot be copied: {error.args[0][0][-1]}") from error
        except LimelightError as error:
            raise BundleError(str(error).replace(str(copy), str(bundle))) from error


def _fingerprint(bundle: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(bundle.rglob("*")):
        try:
            about = path.stat()
        except FileNotFoundError:  # it is being written just now: another look will find something else
            digest.update(b"gone\n")
            continue
        digest.update(f"{path.relative_to(bundle)}\0{about.st_size}\0{about.st_mtime_ns}\0{about.st_ino}\n".encode())
    return digest.hexdigest()
