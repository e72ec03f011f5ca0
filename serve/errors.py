"""What can go wrong while serving, and the one table from errors to gRPC status codes."""

from collections.abc import Mapping
from typing import NamedTuple

import grpc

from export.manifest import BundleError
from model.errors import InvalidRequestError, LimelightError


class ServeError(LimelightError):
    """Base of the server's own errors."""


class ModelNotFoundError(ServeError):
    """The request names a model that is not served."""


class ModelExistsError(ServeError):
    """Another model of the same name and version is served."""


class NotAllowedError(ServeError):
    """A call that is not answered here, though it may be elsewhere."""


class NotOfferedError(ServeError):
    """A call of a public protocol that this server does not have."""


class QueueFullError(ServeError):
    """The queue is at its limit: try again later.

    Attributes:
        retry_after: seconds after which a new try is likely to be let in.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDownError(ServeError):
    """The server takes no new requests: try another replica."""


class ExpiredError(ServeError):
    """The caller's deadline passed."""


class EngineError(ServeError):
    """The engine failed on a request through no fault of the request."""


class EngineFailedError(ServeError):
    """The engine itself has died or hangs: another replica can answer."""


class SlowReaderError(ServeError):
    """The caller does not take what is written to its stream."""


class OutOfMemoryError(ServeError):
    """There was not enough memory for a request, tried by itself."""


class AddressError(ServeError):
    """The server cannot listen where it was told to."""


class UnauthenticatedError(ServeError):
    """The call brings no token, or one that is not known."""


class PermissionDeniedError(ServeError):
    """The caller is known, and may not do this."""


class ProviderError(ServeError):
    """The execution provider that was asked for is not there."""


STOPPING = "the server is shutting down and takes no new requests"
"""What a `ShuttingDownError` says."""


FAILED = "the server's engine has failed"
"""What an `EngineFailedError` says."""


class Outcome(NamedTuple):
    """How an error is told to a client."""

    code: grpc.StatusCode
    """The gRPC status."""
    reason: str
    """The same more closely, for programs: `google.rpc.ErrorInfo.reason`."""


UNKNOWN_FAULT = Outcome(grpc.StatusCode.INTERNAL, "INTERNAL")
"""Of every error that is not in the table: its text stays here."""

OUTCOMES: Mapping[type[LimelightError], Outcome] = {
    InvalidRequestError: Outcome(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    ModelNotFoundError: Outcome(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
    NotAllowedError: Outcome(grpc.StatusCode.PERMISSION_DENIED, "NOT_ALLOWED_HERE"),
    NotOfferedError: Outcome(grpc.StatusCode.UNIMPLEMENTED, "NOT_OFFERED"),
    QueueFullError: Outcome(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    ExpiredError: Outcome(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXPIRED"),
    EngineFailedError: Outcome(grpc.StatusCode.UNAVAILABLE, "ENGINE_FAILED"),
    ShuttingDownError: Outcome(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN"),
    UnauthenticatedError: Outcome(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    PermissionDeniedError: Outcome(grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    OutOfMemoryError: Outcome(grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"),
    SlowReaderError: Outcome(grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER"),
    ModelExistsError: Outcome(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_EXISTS"),
    BundleError: Outcome(grpc.StatusCode.FAILED_PRECONDITION, "BAD_BUNDLE"),
}
"""Every error that a client may see the text of."""


def outcome_of(error: BaseException) -> Outcome:
    """How an error is told to a client."""
    return next((OUTCOMES[kind] for kind in type(error).__mro__ if kind in OUTCOMES), UNKNOWN_FAULT)
