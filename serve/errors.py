"""What can go wrong while serving, and the one table from errors to gRPC status codes."""

from collections.abc import Mapping

import grpc

from export.manifest import BundleError
from model.errors import InvalidRequestError, LimelightError


class ServeError(LimelightError):
    """Base of the server's own errors."""


class ModelNotFoundError(ServeError):
    """The request names a model that is not served."""


class QueueFullError(ServeError):
    """The queue is at its limit: try again later."""


class ShuttingDownError(ServeError):
    """The server takes no new requests: try another replica."""


class ExpiredError(ServeError):
    """The caller's deadline passed."""


class EngineError(ServeError):
    """The engine failed on a request through no fault of the request."""


class AddressError(ServeError):
    """The server cannot listen where it was told to."""


class ProviderError(ServeError):
    """The execution provider that was asked for is not there."""


STATUS: Mapping[type[LimelightError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ExpiredError: grpc.StatusCode.DEADLINE_EXCEEDED,
    ShuttingDownError: grpc.StatusCode.UNAVAILABLE,
    BundleError: grpc.StatusCode.FAILED_PRECONDITION,
}
"""Every error that a client may see the text of. All others answer INTERNAL, with no details."""


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """Code and message for a client."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind], str(error)
    return grpc.StatusCode.INTERNAL, "internal error"
