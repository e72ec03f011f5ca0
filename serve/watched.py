"""What is kept in files and may change while serving: read at the start, and again whenever a file has changed.

A new version that cannot be used is told once in the log, and the one before stays: whoever replaces several files one
after the other, or makes a mistake, interrupts nobody.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from model.errors import ConfigError

log = logging.getLogger(__name__)

Value = TypeVar("Value")

AGAIN = 1.0
"""Seconds after which what could not be used is read again: a certificate may only begin to be valid."""

Look = tuple[int, int, int, int] | None
"""What tells two versions of a file apart: when it was written, when it or who may read it was changed, its bytes, its
inode; None where there is no file."""


class Watched(Generic[Value]):
    """What was read from files. It may be asked from any thread.

    Args:
        files: looked at whenever the value is asked for; links are followed, so a link that is turned is a change.
        read: reads and checks all of them.

    Raises:
        ConfigError: of `read`, the first time.
    """

    def __init__(self, files: Sequence[Path], read: Callable[[], Value]) -> None:
        self._files, self._read = files, read
        self._lock = threading.Lock()
        self._told, self._again = "", 0.0
        self._seen = self._look()  # before reading: what is written meanwhile is read again
        self._value = read()

    def current(self) -> Value:
        """The newest version that can be used."""
        with self._lock:
            seen = self._look()
            if seen != self._seen:
                self._seen, self._told = seen, ""
                self._read_again()
            elif self._told and time.monotonic() >= self._again:
                self._read_again()
            return self._value

    def _read_again(self) -> None:
        self._again = time.monotonic() + AGAIN
        try:
            self._value = self._read()
        except ConfigError as error:
            if str(error) != self._told:
                log.error("%s; what was read before stays in use", error)
            self._told = str(error)
        else:
            self._told = ""
            log.info("changed, and read again: %s", ", ".join(map(str, self._files)))

    def _look(self) -> list[Look]:
        return [_look(file) for file in self._files]


def read_file(setting: str, file: Path) -> bytes:
    """What a file holds.

    Raises:
        ConfigError: it cannot be read; names the setting that it is of.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: {file}: cannot be read: {error.strerror}") from None


def is_open_to_all(file: Path) -> bool:
    """Whether everybody on this machine may read, write or run it."""
    try:
        return bool(file.stat().st_mode & 0o007)
    except OSError:
        return False


def _look(file: Path) -> Look:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
