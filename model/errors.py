"""One tree of exceptions for the whole project; `serve.errors` maps it to gRPC status codes in one table."""


class LimelightError(Exception):
    """Base of every error that Limelight raises on purpose: the message holds the name, value, limit and way out."""


class ConfigError(LimelightError):
    """A configuration that cannot be used."""


class DataError(LimelightError):
    """Training or test data that cannot be used."""


class CheckpointError(LimelightError):
    """A checkpoint folder that is missing, incomplete or inconsistent."""


class MissingExtraError(LimelightError):
    """An optional dependency that this command needs is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed: pip install 'limelight[{extra}]'"
        )


class NotANumberError(LimelightError):
    """A network that gives no numbers: its values overflowed, or its weights are damaged."""


class InvalidRequestError(LimelightError):
    """A request that can never succeed as it stands.

    Attributes:
        field: the request field at fault, in the names of the API, so that a client can point at it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
