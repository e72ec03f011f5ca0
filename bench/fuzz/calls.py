"""Calls as data: what is sent, how, and how it may end. A call can be written down and made again."""

import base64
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError, Message

from bench.fuzz.judge import INVALID, LATE, NOT_FOUND, OK, Codes, Judge
from bench.fuzz.judge_open import UNIMPLEMENTED, OpenJudge
from bench.fuzz.subject import BY_PATH, INFERENCE, OURS, REFLECTION, Method, Subject
from serve.pb.inference import grpc_service_pb2 as open_pb
from serve.pb.limelight.v1 import admin_pb2
from serve.pb.limelight.v1 import limelight_pb2 as pb

LARGEST = 4 * 1024 * 1024
"""Bytes of a message that gRPC takes."""

EXHAUSTED, CANCELLED = "RESOURCE_EXHAUSTED", "CANCELLED"


SERVER = ("ServerLive", "ServerReady", "ServerMetadata")
"""Calls that are answered whatever they say."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call.

    Attributes:
        path: of the method.
        messages: that are sent.
        origin: what they come from.
        admin: to the administrative port.
        streams: whether the client takes requests and answers for streams.
        timeout: seconds of its deadline.
        cancel_after: seconds after which the client gives it up.
        metadata: that goes with it.
        compression: 0 for none, 1 for deflate, 2 for gzip.
    """

    path: str
    messages: tuple[bytes, ...]
    origin: str
    admin: bool = False
    streams: tuple[bool, bool] = (False, False)
    timeout: float | None = None
    cancel_after: float | None = None
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    compression: int = 0

    @property
    def method(self) -> Method | None:
        """That is called, if there is one."""
        return BY_PATH.get((self.path, self.admin))

    def written(self) -> dict[str, Any]:
        """As JSON has it."""
        values = asdict(self)
        values["messages"] = [base64.b64encode(message).decode() for message in self.messages]
        values["metadata"] = [
            [key, value if isinstance(value, str) else {"base64": base64.b64encode(value).decode()}]
            for key, value in self.metadata
        ]
        return values

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Call":
        """From JSON."""
        known = {one.name: values[one.name] for one in fields(cls)}
        metadata = tuple(
            (key, value if isinstance(value, str) else base64.b64decode(value["base64"]))
            for key, value in values["metadata"]
        )
        messages = tuple(base64.b64decode(message) for message in values["messages"])
        return cls(**known | {"messages": messages, "metadata": metadata, "streams": tuple(values["streams"])})


class Verdict(NamedTuple):
    """How a call may end."""

    codes: Codes
    """It as a whole."""
    items: tuple[Codes, ...] = ()
    """Each message of a stream whose messages are answered one by one."""


class Judges:
    """Judges calls.

    Args:
        subject: what is asked.
    """

    def __init__(self, subject: Subject) -> None:
        self._ours = Judge(subject)
        self._open = OpenJudge(subject, self._ours)

    def verdict(self, call: Call) -> Verdict:
        """How a call may end, if nothing but what it says goes wrong with it."""
        codes, items = self._told(call)
        if call.timeout is not None:
            codes, items = codes | {LATE}, tuple(item | {LATE} for item in items)
        if call.cancel_after is not None:
            codes |= {CANCELLED}
        return Verdict(codes, items)

    def _told(self, call: Call) -> Verdict:
        method = call.method
        if method is None:
            return Verdict(frozenset({UNIMPLEMENTED}))
        if any(len(message) > LARGEST for message in call.messages):
            return Verdict(frozenset({EXHAUSTED}))
        if not method.streams_in:
            return Verdict(self._single(method, call.messages))
        items = tuple(self.message(method, message) for message in call.messages)
        unread = any(_read(method, message) is None for message in call.messages)
        return Verdict(frozenset({INVALID if unread else OK}), items)

    def _single(self, method: Method, messages: tuple[bytes, ...]) -> Codes:
        """Of a call that takes one message, which is the first."""
        return self.message(method, messages[0]) if messages else frozenset({INVALID})

    def message(self, method: Method, message: bytes) -> Codes:
        """How a call with this single message may end, or what becomes of it in a stream."""
        request = _read(method, message)
        return frozenset({INVALID}) if request is None else self._request(method, request)

    def _request(self, method: Method, request: Any) -> Codes:
        ours, theirs = self._ours, self._open
        judges: Mapping[type, Callable[[Any], Codes]] = {
            pb.GenerateRequest: ours.generate,
            pb.GenerateStreamRequest: ours.generate,
            pb.GenerateChunkedRequest: ours.generate,
            pb.GenerateManyRequest: ours.item,
            pb.ScoreRequest: ours.score,
            pb.GetModelRequest: ours.describe,
            pb.ListModelsRequest: ours.plain,
            admin_pb2.ListEntriesRequest: ours.plain,
            admin_pb2.ReloadRequest: ours.plain,
            admin_pb2.LoadEntryRequest: ours.entry,
            admin_pb2.UnloadEntryRequest: ours.entry,
            open_pb.ModelInferRequest: theirs.infer,
            open_pb.ModelMetadataRequest: theirs.named,
            open_pb.ModelConfigRequest: theirs.named,
            open_pb.ModelReadyRequest: theirs.ready,
            open_pb.ModelStatisticsRequest: theirs.statistics,
            open_pb.RepositoryIndexRequest: theirs.index,
            open_pb.RepositoryModelLoadRequest: partial(theirs.load, admin=method.admin),
            open_pb.RepositoryModelUnloadRequest: partial(theirs.load, admin=method.admin),
        }
        if type(request) in judges:
            return judges[type(request)](request)
        if method.name == "Check":
            return frozenset({OK if request.service in ("", OURS, INFERENCE) else NOT_FOUND})
        known = method.service == REFLECTION or method.name in ("Watch", *SERVER)
        return frozenset({OK if known else UNIMPLEMENTED})


def _read(method: Method, message: bytes) -> Message | None:
    """The message, if it is one."""
    try:
        return method.request.FromString(message)
    except DecodeError:
        return None
