"""`limelight ask` as a user runs it, in this process."""

import typer
from typer.testing import CliRunner, Result

from serve.ask import ask

# Whatever the machine that runs the tests says of its terminal: 80 columns, no colours.
ENVIRONMENT = {
    "COLUMNS": "80",
    "FORCE_COLOR": None,
    "TTY_COMPATIBLE": None,
    "LIMELIGHT_ADDRESS": None,
    "LIMELIGHT_TOKEN": None,
}


def invoke(*arguments: str, **environment: str) -> Result:
    """Run it, whatever comes of it."""
    app = typer.Typer()
    app.command()(ask)
    return CliRunner().invoke(app, [*arguments], env=ENVIRONMENT | environment)


def run(*arguments: str) -> Result:
    """Run it; any error that is not a refusal of the options is raised."""
    result = invoke(*arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def said(result: Result) -> str:
    """What it printed on standard error, out of its frame."""
    return " ".join(result.stderr.replace("│", "").split())
