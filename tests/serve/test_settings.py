"""One schema: a setting is a flag, a variable and a key of a file, in this order; what is unknown is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import serve.commands
from model.errors import ConfigError
from serve.bundle import ServedModel, load_model
from serve.cli import app
from serve.settings import PREFIX, Settings

OTHERS: dict[str, Any] = {
    "host": "127.0.0.9",
    "port": 4711,
    "provider": "cpu",
    "precision": "int8",
    "threads": 3,
    "queue": 30,
    "client_queue": 4,
    "client_header": "x-client",
    "queue_tokens": 17,
    "queue_bytes": 19,
    "rows": 5,
    "encode_tokens": 7,
    "tokens": 11,
    "attention": 13,
    "call_seconds": 0.5,
    "grace": 1.5,
    "metrics_port": 4712,
    "metrics_host": "127.0.0.8",
    "metrics_tls": True,
    "admin_port": 4713,
    "admin_host": "127.0.0.7",
    "admin_tls": True,
    "poll": 5.5,
    "watchdog": 2.5,
    "tls_certificate": Path("certificate.pem"),
    "tls_key": Path("key.pem"),
    "tls_client_ca": Path("ca.pem"),
    "token_file": Path("tokens"),
    "plaintext_tokens": True,
    "connections": 6,
    "connection_calls": 8,
    "connection_idle": 9.5,
    "connection_age": 10.5,
    "keepalive": 11.5,
    "keepalive_timeout": 12.5,
    "handshake": 13.5,
    "write_timeout": 3.5,
    "log_format": "json",
    "log_level": "warning",
    "otlp_endpoint": "http://127.0.0.1:4318",
    "port_file": "some/file",
}
"""Of every setting a value that is not its default."""


class Started:
    """What the command did, without a server."""

    def __init__(self) -> None:
        self.root: Path | None = None
        self.loading: dict[str, Any] = {}
        self.settings: Settings | None = None

    def run(self, *arguments: str, **variables: str) -> Result:
        return CliRunner().invoke(app, ["serve", "bundle", *arguments], env=variables)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    found = Started()

    def run(root: Path, load: "partial[ServedModel]", settings: Settings) -> None:
        assert load.func is load_model
        found.root, found.loading, found.settings = root, load.keywords, settings

    monkeypatch.setattr(serve.commands, "_run", run)
    return found


def flags(values: dict[str, Any]) -> list[str]:
    return [
        f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')}={value}"
        for name, value in values.items()
    ]


def as_flags(tmp_path: Path, values: dict[str, Any]) -> tuple[list[str], dict[str, str]]:  # noqa: ARG001
    return flags(values), {}


def as_variables(tmp_path: Path, values: dict[str, Any]) -> tuple[list[str], dict[str, str]]:  # noqa: ARG001
    return [], {f"{PREFIX}{name.upper()}": str(value) for name, value in values.items()}


def as_file(tmp_path: Path, values: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    return [f"--config={write(tmp_path, values)}"], {}


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "serve.toml"
    path.write_text("".join(f"{name} = {toml(value)}\n" for name, value in values.items()), encoding="utf-8")
    return path


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str | Path) else str(value)


Way = Callable[[Path, dict[str, Any]], tuple[list[str], dict[str, str]]]
WAYS: list[Way] = [as_flags, as_variables, as_file]


def test_every_setting_is_tried_with_something_new() -> None:
    settings = Settings(**OTHERS)
    assert OTHERS.keys() == Settings.model_fields.keys()
    assert [name for name in OTHERS if getattr(settings, name) == getattr(Settings(), name)] == []


@pytest.mark.parametrize("way", WAYS)
def test_every_setting_arrives(started: Started, tmp_path: Path, way: Way) -> None:
    arguments, variables = way(tmp_path, OTHERS)
    result = started.run(*arguments, **variables)
    assert result.exit_code == 0, result.output
    assert started.settings == Settings(**OTHERS) != Settings()
    assert (started.root, Settings(**OTHERS).port_file) == (Path("bundle"), Path("some/file"))
    assert started.loading == {"provider": "cpu", "precision": "int8", "threads": 3}


def test_options_hold_what_was_set() -> None:
    """By the same names, in the options or among their limits."""
    options = Settings(**OTHERS).options
    elsewhere = {"provider", "precision", "threads", "port_file"}
    parts = (options, options.limits, options.security, options.connection_limits)
    found = {
        name: next(getattr(part, name) for part in parts if hasattr(part, name)) for name in OTHERS.keys() - elsewhere
    }
    assert found == {name: value for name, value in OTHERS.items() if name not in elsewhere}


def test_a_flag_goes_before_a_variable_and_that_before_the_file(started: Started, tmp_path: Path) -> None:
    file = write(tmp_path, {"queue": 1, "rows": 1, "tokens": 1})
    variables = {f"{PREFIX}CONFIG": str(file), f"{PREFIX}QUEUE": "2", f"{PREFIX}ROWS": "2"}
    result = started.run("--queue", "3", **variables)
    assert result.exit_code == 0, result.output
    assert started.settings is not None
    limits = started.settings.options.limits
    assert (limits.queue, limits.rows, limits.tokens, limits.attention) == (3, 2, 1, Settings().attention)


WRONG: dict[str, tuple[str, str]] = {
    "no such key": ("queu = 3", "queu: there is no such setting; queue is meant?"),
    "nothing like it": ("zzz = 3", "zzz: there is no such setting$"),
    "wrong type": ('queue = "many"', "queue: Input should be a valid integer"),
    "out of range": ("queue = 0", r"queue: Input should be greater than or equal to 1 \(got 0\)"),
    "true for a number": ("queue = true", "queue: true and false are no value for this"),
    "nowhere": ('host = ""', "host: String should have at least 1 character"),
    "a header that never comes": ('client_header = "X-Client"', "client_header: String should match pattern"),
    "no number": ("grace = nan", "grace: Input should be"),
    "no TOML": ("queue =", "is no TOML"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_refused_by_name(started: Started, tmp_path: Path, what: str) -> None:
    text, message = WRONG[what]
    file = tmp_path / "serve.toml"
    file.write_text(text, encoding="utf-8")
    result = started.run("--config", str(file))
    assert isinstance(result.exception, ConfigError)
    with pytest.raises(ConfigError, match=rf"serve\.toml: {message}"):
        raise result.exception
    assert started.settings is None


def test_a_wrong_variable_is_refused_by_name(started: Started) -> None:
    result = started.run(**{f"{PREFIX}QUEU": "3"})
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == f"{PREFIX}QUEU: there is no such setting; {PREFIX}QUEUE is meant?"
    result = started.run(**{f"{PREFIX}QUEUE": "many"})
    assert (result.exit_code, started.settings) == (2, None)
    assert "Invalid value for '--queue'" in result.output


def test_a_variable_of_other_letters_is_not_overlooked(started: Started) -> None:
    result = started.run(**{f"{PREFIX}queue": "3"})
    assert str(result.exception) == f"{PREFIX}queue: there is no such setting; {PREFIX}QUEUE is meant?"


LINKS = {
    "LIMELIGHT_SERVE_PORT": "tcp://10.0.0.1:50051",
    "LIMELIGHT_SERVE_SERVICE_HOST": "10.0.0.1",
    "LIMELIGHT_SERVE_SERVICE_PORT": "50051",
    "LIMELIGHT_SERVE_SERVICE_PORT_GRPC": "50051",
    "LIMELIGHT_SERVE_PORT_50051_TCP": "tcp://10.0.0.1:50051",
    "LIMELIGHT_SERVE_PORT_50051_TCP_PROTO": "tcp",
    "LIMELIGHT_SERVE_PORT_50051_TCP_PORT": "50051",
    "LIMELIGHT_SERVE_PORT_50051_TCP_ADDR": "10.0.0.1",
}
"""What Kubernetes tells containers of a Service that is called limelight-serve."""


@pytest.mark.parametrize("variable", LINKS)
def test_what_kubernetes_tells_of_a_service_is_not_taken_for_a_setting(started: Started, variable: str) -> None:
    result = started.run(**{variable: LINKS[variable]})
    assert started.settings is None
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == (
        f"{variable}={LINKS[variable]}: is no setting, but what Kubernetes tells of a Service named limelight-serve: "
        "set enableServiceLinks to false in the pod's spec, or name the Service otherwise"
    )


@pytest.mark.parametrize("name", ["metrics", "admin"])
def test_a_service_can_have_the_name_of_a_setting_too(started: Started, name: str) -> None:
    """Its variable is then exactly that of a port."""
    result = started.run(**{f"{PREFIX}{name.upper()}_PORT": "udp://10.0.0.1:9"})
    assert f"of a Service named limelight-serve-{name}:" in str(result.exception)


def test_no_setting_looks_like_a_service(started: Started) -> None:
    variables = {f"{PREFIX}{name.upper()}": str(value) for name, value in OTHERS.items()}
    result = started.run(**variables)
    assert (result.exit_code, started.settings) == (0, Settings(**OTHERS)), result.output


def test_help_tells_all(started: Started) -> None:
    result = started.run("--help", COLUMNS="300")
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in result.output
        assert field.description
        assert field.description in result.output
