"""Who may call what: bearer tokens, kept as hashes in a file, each with a name and a role.

    # whose, role, hash
    alice user sha256:HEX
    deploy admin sha256:HEX

A call brings `authorization: Bearer TOKEN` in its metadata. Tokens are long and random, so a plain hash of them cannot
be turned back; `limelight token` makes them. The file is read again when it changes: no restart is needed to add one or
to revoke one.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from hmac import compare_digest
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from model.errors import ConfigError
from serve.channel import HEADER
from serve.errors import PermissionDeniedError, UnauthenticatedError
from serve.watched import Watched, is_open_to_all, read_file

Role = Literal["user", "admin"]
"""What a token allows, the least first: each role may do what those before it may."""

ROLES: tuple[Role, ...] = get_args(Role)

NEEDED: Mapping[str, Role] = {
    "/limelight.v1.AdminService/": "admin",
    "/inference.GRPCInferenceService/RepositoryModel": "admin",
}
"""The role that methods need, by the beginning of their names; `user` for all others."""

SCHEME = "bearer"

NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
"""What somebody may be called."""

_HASH = re.compile(r"sha256:([0-9a-f]{64})")

_caller: ContextVar[str | None] = ContextVar("caller", default=None)


class Entry(NamedTuple):
    """One token's line."""

    name: str
    role: Role
    digest: str
    """SHA-256 of the token, in hexadecimal digits."""

    def __str__(self) -> str:
        return f"{self.name} {self.role} sha256:{self.digest}"


class Access:
    """Lets calls in.

    Args:
        file: of tokens; without one everybody may call everything that is there.

    Raises:
        ConfigError: the file cannot be read, is open to everybody, holds no token, or a line is not as it must be.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._entries = None if file is None else Watched([file], lambda: _read_some(file))

    def let_in(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Check a call, and remember whose it is as long as it lasts: see `caller_name`.

        Args:
            method: that is called, /package.Service/Method.
            metadata: that came with the call.

        Raises:
            UnauthenticatedError: it brings no token, or none that is known.
            PermissionDeniedError: it needs a higher role.
        """
        forget_caller()
        if self._entries is None:
            return
        needed: Role = next((role for prefix, role in NEEDED.items() if method.startswith(prefix)), "user")
        entry = _find(self._entries.current(), _token(metadata))
        if ROLES.index(entry.role) < ROLES.index(needed):
            raise PermissionDeniedError(f"the role {needed!r} is needed, and {entry.name!r} has {entry.role!r}")
        _caller.set(entry.name)


def caller_name() -> str | None:
    """Whose call is being answered, by its token; None where tokens are not asked for."""
    return _caller.get()


def forget_caller() -> None:
    """Begin a call as nobody's: a server's tasks begin with whatever was set where it was started."""
    _caller.set(None)


def hash_token(token: str) -> str:
    """SHA-256 of a token, in hexadecimal digits."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_tokens(file: Path) -> list[Entry]:
    """What a file of tokens holds.

    Raises:
        ConfigError: it cannot be read, is open to everybody, or a line is not as it must be.
    """
    data = read_file("token_file", file)
    if is_open_to_all(file):
        raise ConfigError(f"token_file: {file}: is open to everybody on this machine: chmod o-rwx it")
    entries: list[Entry] = []
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            entries.append(_entry(f"token_file: {file}: line {number}", words, entries))
    return entries


def _read_some(file: Path) -> list[Entry]:
    entries = read_tokens(file)
    if not entries:
        raise ConfigError(f"token_file: {file}: holds no token: add one with `limelight token NAME --append {file}`")
    return entries


def _entry(where: str, words: list[str], before: list[Entry]) -> Entry:
    if len(words) != 3:
        raise ConfigError(f"{where}: has {len(words)} words where there are three: name, role, sha256:HEX")
    name, role, hashed = words
    if not NAME.fullmatch(name):
        raise ConfigError(f"{where}: the name {name!r} is not of 1 to 64 letters, digits, dots, dashes, underscores, @")
    if role not in ROLES:
        raise ConfigError(f"{where}: {role!r} is no role: choose from {', '.join(ROLES)}")
    if not (found := _HASH.fullmatch(hashed)):
        raise ConfigError(f"{where}: the third word is not sha256: and 64 digits of 0-9 and a-f")  # may be a token
    if any(entry.digest == found[1] for entry in before):
        raise ConfigError(f"{where}: this token is in a line above already")
    return Entry(name, role, found[1])


def _token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    values = [value for key, value in metadata if key == HEADER]
    if not values:
        raise UnauthenticatedError(f"a token is needed, as metadata `{HEADER}: Bearer TOKEN`")
    scheme, _, token = str(values[0]).partition(" ")
    if len(values) > 1 or scheme.lower() != SCHEME or not token:
        raise UnauthenticatedError(f"the metadata `{HEADER}` is not one `Bearer TOKEN`")
    return token.strip()


def _find(entries: list[Entry], token: str) -> Entry:
    """Every entry is looked at, each in the same time, so that the time says nothing of them."""
    digest = hash_token(token)
    matching = [entry for entry in entries if compare_digest(entry.digest, digest)]
    if not matching:
        raise UnauthenticatedError("the token is not known here")
    return matching[0]
