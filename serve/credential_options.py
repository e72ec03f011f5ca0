"""The options with which a command asks a protected server."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

PANEL = "Protected servers"
"""Title in the help."""

OPTIONS: dict[str, tuple[Any, Any]] = {
    "ca": (
        Annotated[
            Path | None,
            typer.Option(
                rich_help_panel=PANEL, metavar="FILE", help="PEM file of the CA that signed the server's certificate."
            ),
        ],
        None,
    ),
    "certificate": (
        Annotated[
            Path | None,
            typer.Option(rich_help_panel=PANEL, metavar="FILE", help="PEM file of your own certificate, if asked for."),
        ],
        None,
    ),
    "key": (
        Annotated[
            Path | None, typer.Option(rich_help_panel=PANEL, metavar="FILE", help="PEM file of its private key.")
        ],
        None,
    ),
    "token": (
        Annotated[
            str | None,
            typer.Option(
                rich_help_panel=PANEL,
                envvar="LIMELIGHT_TOKEN",
                help="Token; better as the variable, as others on the machine see command lines.",
            ),
        ],
        None,
    ),
    "plaintext_token": (
        Annotated[
            bool,
            typer.Option(
                "--plaintext-token", rich_help_panel=PANEL, help="Send it without TLS: something between encrypts it."
            ),
        ],
        False,
    ),
}
"""By their names in `serve.channel.Credentials`: how each is given, and its default."""


def with_credentials(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let typer find these options among a command's parameters, in place of its `**credentials`.

    Args:
        names: of those in OPTIONS; none for all of them.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in OPTIONS.items()
            if name in (names or OPTIONS)
        ]
        command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        command.__annotations__ |= {option.name: option.annotation for option in added}
        return command

    return decorated
