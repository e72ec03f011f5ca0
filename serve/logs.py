"""Lines about what the server does, as text or JSON. Whoever logs never waits for a disk.

log.info(...) ──► Lines: adds the call, drops what is too much ──► queue ──► Writer: a thread ──► standard error
"""

import copy
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from typing import Any, Literal

from prometheus_client import Counter

from serve.request import Request, current

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]

MOST = 4096
"""Lines that may wait to be written; what comes beyond is dropped."""

FLUSH = 2.0
"""Seconds that lines which wait have to be written when the server ends."""

STDERR = 2
"""Its file descriptor: the end of the process would wait for the lock of Python's own stream, and fail to empty it."""

NO_NEWS = ("Invalid encoding on ", "ExecuteBatchError raised in core by servicer method")
"""How lines of gRPC begin, each with a trace, which anybody who can connect can have written time and again, and which
tell of nothing that has failed: metadata that are no UTF-8, which it reads as Latin-1; a client that has gone before
its call's status was on the way."""

CALL, FIELDS = "limelight_call", "limelight_fields"
"""What a record may have besides: the call that it is about, and figures that are fields of their own in JSON."""

DROPPED = Counter(
    "limelight_log_lines_dropped", "Lines of the log that were lost: too many waited, or writing failed.", registry=None
)
"""Of the process, as loggers are; the figures of each server hold it."""


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request := record.__dict__.get(CALL)) is not None:
            line["request_id"] = request.id
            if request.trace_id:
                line["trace_id"] = request.trace_id
        line |= record.__dict__.get(FIELDS, {})
        if record.exc_text:
            line["exception"] = record.exc_text
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """For people: the call's id stands before the message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(call)s%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end; an exception's trace follows in lines of its own."""
        request = record.__dict__.get(CALL)
        record.__dict__["call"] = "" if request is None else f"[{request.id}] "
        return super().format(record)


FORMATTERS: dict[Format, type[logging.Formatter]] = {"text": TextFormatter, "json": JsonFormatter}


class Lines(QueueHandler):
    """Puts records where the writer finds them, with the call that they are about.

    Args:
        queue: to the writer.
        most: that may wait in it.
    """

    queue: SimpleQueue[Any]

    def __init__(self, queue: SimpleQueue[Any], most: int = MOST) -> None:
        super().__init__(queue)
        self._most = most
        self.addFilter(lambda record: not str(record.msg).startswith(NO_NEWS))

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """The record with all that only this thread knows of it."""
        prepared = copy.copy(record)
        prepared.msg, prepared.args = record.getMessage(), None
        if record.exc_info:
            prepared.exc_text, prepared.exc_info = logging.Formatter().formatException(record.exc_info), None
        prepared.__dict__.setdefault(CALL, current())
        return prepared

    def enqueue(self, record: logging.LogRecord) -> None:
        """Hand it over, if there is room."""
        if self.queue.qsize() < self._most:
            self.queue.put_nowait(record)
        else:
            DROPPED.inc()


class Writer(QueueListener):
    """Writes records, on a thread of its own.

    Args:
        queue: where they come from.
        formatter: makes lines of them.
        write: takes a line; it may block or raise.
    """

    def __init__(self, queue: SimpleQueue[Any], formatter: logging.Formatter, write: Callable[[bytes], None]) -> None:
        super().__init__(queue)
        self._formatter, self._write = formatter, write

    def handle(self, record: logging.LogRecord) -> None:
        """Write a record; what cannot be written is counted."""
        try:
            self._write(f"{self._formatter.format(record)}\n".encode("utf-8", "backslashreplace"))
        except Exception:  # a full disk, a closed pipe: there is nowhere to say it, and the next line may be written
            DROPPED.inc()

    def close(self, seconds: float) -> None:
        """Write what waits, as far as that can be done in time."""
        self.enqueue_sentinel()
        if self._thread is not None:
            self._thread.join(seconds)


def to_stderr(line: bytes) -> None:
    """Write a line to standard error."""
    left = memoryview(line)
    while left:
        left = left[os.write(STDERR, left) :]


def about(requests: Iterable[Request | None]) -> dict[str, Any]:
    """For `extra`: the call that a line of another thread is about, or, for JSON, the ids of several."""
    calls = [request for request in requests if request is not None]
    if len(calls) == 1:
        return {CALL: calls[0]}
    return {FIELDS: {"request_ids": [call.id for call in calls]}} if calls else {}


@contextmanager
def written(kind: Format, level: Level, write: Callable[[bytes], None] = to_stderr, most: int = MOST) -> Iterator[None]:
    """Write what all loggers say, until the end of the context.

    Args:
        kind: of the lines.
        level: what is less important is left out.
        write: takes a line; it may block or raise.
        most: lines that may wait.
    """
    queue: SimpleQueue[Any] = SimpleQueue()
    lines, writer, root = Lines(queue, most), Writer(queue, FORMATTERS[kind](), write), logging.getLogger()
    before = root.level
    writer.start()
    root.addHandler(lines)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.setLevel(before)
        root.removeHandler(lines)
        writer.close(FLUSH)
