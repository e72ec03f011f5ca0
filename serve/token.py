"""`limelight token`: makes a token that lets somebody call a server."""

import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

from serve.access import NAME, Entry, Role, hash_token, read_tokens


def _check_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise typer.BadParameter(f"{name!r} is not of 1 to 64 letters, digits, dots, dashes, underscores, @")
    return name


def token(
    name: Annotated[str, typer.Argument(callback=_check_name, help="Whose it is; the queue is fair between names.")],
    role: Annotated[
        Role, typer.Option(help="What it allows: user asks for answers, admin also administrates.")
    ] = "user",
    append: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Add its line here, instead of printing it.")
    ] = None,
) -> None:
    """Make a token: it is printed once, and kept nowhere.

    Its line, which holds a hash of it, goes into the file that `limelight serve --token-file` reads.
    """
    made = secrets.token_urlsafe(32)
    line = str(Entry(name, role, hash_token(made)))
    if append is None:
        typer.echo(line, err=True)
    else:
        _append(append, line)
        typer.echo(f"added to {append}: {name} {role}", err=True)
    typer.echo(made)


def _append(file: Path, line: str) -> None:
    """In one write, so that a server which reads meanwhile sees all of the line or nothing."""
    if file.exists():
        read_tokens(file)  # nothing is added to a file of something else
    with os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b", buffering=0) as opened:
        before = opened.read()
        whole = not before or before.endswith(b"\n")
        opened.write(f"{line}\n".encode() if whole else f"\n{line}\n".encode())
