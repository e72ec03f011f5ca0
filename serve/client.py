"""A typed synchronous client: ask a server, get plain Python back.

    with Client("127.0.0.1:50051") as client:
        answer = client.generate("photograph", families=["cross"])
        print(answer.best.text, answer.best.attention["cross"].weights.shape)

It needs no torch, and may be shared between threads.
"""

import dataclasses
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_status import rpc_status

from model.errors import InvalidRequestError
from model.options import Sampling
from serve.answers import (
    Alignment,
    Answer,
    AttentionArray,
    End,
    FamilyShape,
    Hypothesis,
    ModelInfo,
    ModelSummary,
    Piece,
    ServerError,
    Start,
    Timings,
    Token,
)
from serve.channel import REPLICAS, Credentials, explain_unreachable, open_channel, token_metadata
from serve.from_proto import (
    FAMILIES,
    FLOAT_TYPES,
    REDUCTIONS,
    read_answer,
    read_chunked,
    read_item,
    read_model,
    read_models,
    read_score,
    read_stream,
)
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub
from serve.request import ID_KEY
from serve.wanted import Wanted, WantedAttention, WantedSearch

__all__ = [
    "Alignment",
    "Answer",
    "AttentionArray",
    "Client",
    "End",
    "FamilyShape",
    "Hypothesis",
    "ModelInfo",
    "ModelSummary",
    "Piece",
    "Sampling",
    "ServerError",
    "Start",
    "Timings",
    "Token",
]

Name = TypeVar("Name", bound=str)
Number = TypeVar("Number", bound=int)

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),
    # A gRPC server hangs up on clients that ping more often than every 5 minutes, unless it was told to allow it.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # without it the timeout above has no effect: see serve.connections
)
"""Answers of up to 256 MiB; a dead connection under a call is noticed within six minutes."""

_UNREACHABLE = (
    "failed to connect",
    "connections to all backends failing",
    "errors resolving",
    "DNS resolution failed",
    "Failed to create channel",
)

_CUT_OFF = "Received RST_STREAM"
"""In what gRPC says of a call that was reset without a status: a proxy does that whose server has gone midway."""


class Client:
    """Asks one server.

    Args:
        address: where it listens, HOST:PORT.
        timeout: most seconds a call may take, a whole stream included; None waits for ever.
        replicas: the address is a name of several servers that serve the same: calls are spread over those that are
            well, and what one refuses because it stops, or had not begun to answer when it died, goes to another.
        credentials: for a protected server: `ca`, `certificate` and `key` (PEM files), `token`.

    Raises:
        ConfigError: credentials that cannot be used, or a token that would cross a network in plain text.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        timeout: float | None = 30.0,
        replicas: bool = False,
        **credentials: Unpack[Credentials],
    ) -> None:
        _refuse_unknown(credentials, Credentials)
        self.address = address
        self.timeout = timeout
        self._metadata = token_metadata(address, **credentials)
        self._channel = open_channel(address, CHANNEL_OPTIONS + (REPLICAS if replicas else ()), **credentials)
        self._stub = LimelightServiceStub(self._channel)

    def generate(self, source: str, *, model: str = "", version: str = "", **wanted: Unpack[Wanted]) -> Answer:
        """Answer a text.

        Args:
            source: the text.
            model: name of the model; empty where only one is served.
            version: of the model; empty for its newest.
            wanted: how to search, and the attention to return with every hypothesis.

        Raises:
            ServerError: the server refused, failed, was too slow or is not there.
            InvalidRequestError: an option that cannot be sent.
        """
        with _sendable():
            search, attention = _search(wanted), _attention(wanted)
            request = pb.GenerateRequest(
                model=model, version=version, source=source, search=search, attention=attention
            )
        with self._explained():
            return read_answer(self._stub.Generate(request, timeout=self.timeout, metadata=self._metadata))

    def generate_chunked(self, source: str, *, model: str = "", version: str = "", **wanted: Unpack[Wanted]) -> Answer:
        """The same answer, with attention of any size: `generate` is refused more than 64 MiB of it.

        Arguments and errors as for `generate`.
        """
        with _sendable():
            search, attention = _search(wanted), _attention(wanted)
            request = pb.GenerateChunkedRequest(
                model=model, version=version, source=source, search=search, attention=attention
            )
        with self._explained():
            call = self._stub.GenerateChunked(request, timeout=self.timeout, metadata=self._metadata)
            try:
                return read_chunked(call)
            finally:
                call.cancel()

    def stream(
        self, source: str, *, model: str = "", version: str = "", **wanted: Unpack[Wanted]
    ) -> Generator[Start | Piece | End, None, None]:
        """Answer a text token by token: a `Start`, a `Piece` for each token of the best hypothesis, an `End`.

        The call begins with the first event asked for, and is cancelled when the generator is closed. Arguments and
        errors as for `generate`; an error may come after some events.
        """
        with _sendable():
            search, attention = _search(wanted), _attention(wanted)
            request = pb.GenerateStreamRequest(
                model=model, version=version, source=source, search=search, attention=attention
            )
        return self._events(request)

    def generate_many(
        self, sources: Iterable[str], *, model: str = "", version: str = "", **wanted: Unpack[Wanted]
    ) -> Generator[tuple[int, Answer | ServerError], None, None]:
        """Answer many texts over one stream: the number of each, from 0, and its answer or its own error.

        They come as they are ready, in any order. Sources are taken as the server has room for them, on a thread of
        gRPC's. Closing the generator cancels what is left. Arguments and errors as for `generate`; `timeout` is of all
        of them together.
        """
        with _sendable():
            search, attention = _search(wanted), _attention(wanted)

        def requests() -> Iterator[pb.GenerateManyRequest]:
            for number, source in enumerate(sources):
                with _sendable():
                    request = pb.GenerateRequest(
                        model=model, version=version, source=source, search=search, attention=attention
                    )
                yield pb.GenerateManyRequest(id=str(number), request=request)

        return self._items(requests())

    def score(
        self,
        source: str,
        target: str,
        *,
        length_penalty: float | None = None,
        model: str = "",
        version: str = "",
        **wanted: Unpack[WantedAttention],
    ) -> Answer:
        """How likely a given target is: forced decoding. The only hypothesis is the target; the rest as `generate`."""
        _refuse_unknown(wanted, WantedAttention)
        with _sendable():
            request = pb.ScoreRequest(
                model=model,
                version=version,
                source=source,
                target=target,
                length_penalty=length_penalty,
                attention=_attention(wanted),
            )
        with self._explained():
            return read_score(self._stub.Score(request, timeout=self.timeout, metadata=self._metadata))

    def describe(self, model: str = "", version: str = "") -> ModelInfo:
        """What the served model is and takes; errors as for `generate`."""
        with _sendable():
            request = pb.GetModelRequest(model=model, version=version)
        with self._explained():
            return read_model(self._stub.GetModel(request, timeout=self.timeout, metadata=self._metadata))

    def models(self) -> list[ModelSummary]:
        """Which models are served; errors as for `generate`."""
        with self._explained():
            return read_models(
                self._stub.ListModels(pb.ListModelsRequest(), timeout=self.timeout, metadata=self._metadata)
            )

    def close(self) -> None:
        """Hang up; calls under way end with the code CANCELLED."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _events(self, request: pb.GenerateStreamRequest) -> Generator[Start | Piece | End, None, None]:
        with self._explained():
            call = self._stub.GenerateStream(request, timeout=self.timeout, metadata=self._metadata)
            try:
                yield from read_stream(call)
            finally:
                call.cancel()

    def _items(
        self, requests: Iterator[pb.GenerateManyRequest]
    ) -> Generator[tuple[int, Answer | ServerError], None, None]:
        failed: list[Exception] = []

        def sent() -> Iterator[pb.GenerateManyRequest]:
            try:
                yield from requests
            except Exception as error:  # on gRPC's thread, where nobody would hear of it
                failed.append(error)
                raise

        try:
            with self._explained():
                call = self._stub.GenerateMany(sent(), timeout=self.timeout, metadata=self._metadata)
                try:
                    for message in call:
                        yield int(message.id), read_item(message)
                finally:
                    call.cancel()
        except ServerError:
            if failed:
                raise failed[0] from None
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            code, details, particulars = error.code(), error.details() or "", _particulars(error)
            if code is grpc.StatusCode.INTERNAL and _CUT_OFF in details and "reason" not in particulars:
                code = grpc.StatusCode.UNAVAILABLE
                details = f"the call was cut off before its end: ask again ({details})"
            raise ServerError(code, self._explain(code, details), **particulars) from None

    def _explain(self, code: grpc.StatusCode, details: str) -> str:
        """The server's words as they are where they name the request's fault; else with the address and a way out."""
        if details.startswith(_UNREACHABLE):
            return explain_unreachable(self.address, details)
        if "larger than max" in details:
            return f"{self.address}: {details}: ask for fewer layers and heads, a reduction, float16 or chunks"
        failed = f"{self.address}: the server failed: {details}"
        explained = {
            grpc.StatusCode.DEADLINE_EXCEEDED: f"{self.address}: no answer within {self.timeout} s: allow more time",
            grpc.StatusCode.UNIMPLEMENTED: f"{self.address}: no server of limelight.v1, or an older one ({details})",
            grpc.StatusCode.INTERNAL: failed,
            grpc.StatusCode.UNKNOWN: failed,
            grpc.StatusCode.UNAVAILABLE: f"{self.address}: {details}",
        }
        return explained.get(code, details)


class Particulars(TypedDict, total=False):
    """What a server says of an error for programs; see `ServerError`."""

    reason: str
    field: str
    retry_after: float
    request_id: str


def _particulars(error: Any) -> Particulars:
    found: Particulars = {}
    if isinstance(identity := dict(error.trailing_metadata() or ()).get(ID_KEY), str):
        found["request_id"] = identity
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):  # details of somebody else's making, which contradict the status
        return found
    for detail in () if status is None else status.details:
        if detail.Is(ErrorInfo.DESCRIPTOR):
            info = ErrorInfo.FromString(detail.value)
            found["reason"] = info.reason
            if "field" in info.metadata:
                found["field"] = info.metadata["field"]
        elif detail.Is(RetryInfo.DESCRIPTOR):
            found["retry_after"] = RetryInfo.FromString(detail.value).retry_delay.ToMilliseconds() / 1000
    return found


@contextmanager
def _sendable() -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # a lone surrogate in a text, or a number beyond its protobuf type
        raise InvalidRequestError("request", f"cannot be sent: {error}") from None


def _refuse_unknown(
    wanted: Mapping[str, object], known: type[Wanted] | type[WantedAttention] | type[Credentials]
) -> None:
    unknown = wanted.keys() - known.__annotations__.keys()
    if unknown:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")


def _search(wanted: Wanted) -> pb.SearchOptions:
    _refuse_unknown(wanted, Wanted)
    _refuse_one_string("suppressed", wanted.get("suppressed"))
    sampling = wanted.get("sampling")
    return pb.SearchOptions(
        **{name: wanted.get(name) for name in WantedSearch.__annotations__.keys() - {"sampling"}},  # type: ignore[arg-type]
        sampling=None if sampling is None else pb.Sampling(**dataclasses.asdict(sampling)),
    )


def _attention(wanted: WantedAttention) -> pb.AttentionOptions:
    _refuse_one_string("attention.families", wanted.get("families"))
    return pb.AttentionOptions(
        families=[_number("attention.families", FAMILIES, family) for family in wanted.get("families", ())],
        layers=wanted.get("layers", ()),
        heads=wanted.get("heads", ()),
        reduction=_number("attention.reduction", REDUCTIONS, wanted.get("reduction", "none")),
        float_type=_number("attention.float_type", FLOAT_TYPES, wanted.get("float_type", "float32")),
    )


def _refuse_one_string(field: str, value: object) -> None:
    """A string is iterable too: letter by letter, which nobody means."""
    if isinstance(value, str):
        raise InvalidRequestError(field, f"is the one string {value!r}, where a list of strings is needed")


def _number(field: str, names: Mapping[Name, Number], name: Name) -> Number:
    if name not in names:
        raise InvalidRequestError(field, f"{name!r} is unknown: choose from {', '.join(names)}")
    return names[name]
