"""`limelight token`: printed once, kept as a hash."""

import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from model.errors import ConfigError
from serve.access import Access, hash_token
from serve.cli import app
from tests.serve.test_access import ADMINISTRATE, ALICE, ASK, bearer, line


def make(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["token", *arguments])


def test_the_token_is_on_standard_output_and_its_line_beside_it(tmp_path: Path) -> None:
    made = make("alice")
    token = made.stdout.removesuffix("\n")
    assert len(token) == 43  # 32 bytes, in base64
    assert made.stderr == f"alice user sha256:{hash_token(token)}\n"
    file = tmp_path / "tokens"
    file.write_text(made.stderr, encoding="utf-8")
    file.chmod(0o600)
    Access(file).let_in(ASK, bearer(token))


def test_no_two_are_alike() -> None:
    assert make("alice").stdout != make("alice").stdout


def test_lines_are_added_to_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    user, admin = (make("alice", "--append", str(file)), make("root", "--role", "admin", "--append", str(file)))
    assert [user.stderr, admin.stderr] == [f"added to {file}: alice user\n", f"added to {file}: root admin\n"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert user.stdout.strip() not in file.read_text(encoding="utf-8")
    guarded = Access(file)
    guarded.let_in(ASK, bearer(user.stdout.strip()))
    guarded.let_in(ADMINISTRATE, bearer(admin.stdout.strip()))


def test_a_last_line_without_an_end_stays_a_line(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(line("alice", ALICE).removesuffix("\n"), encoding="utf-8")
    file.chmod(0o600)
    made = make("bob", "--append", str(file))
    for token in (ALICE, made.stdout.strip()):
        Access(file).let_in(ASK, bearer(token))


def test_nothing_is_added_to_another_kind_of_file(tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    file.write_text("-----BEGIN PRIVATE KEY-----\n", encoding="utf-8")
    file.chmod(0o600)
    made = make("alice", "--append", str(file))
    assert isinstance(made.exception, ConfigError)
    assert made.stdout == ""
    assert file.read_text(encoding="utf-8") == "-----BEGIN PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a b",), "'a b' is not of 1 to 64 letters"),
        (("",), "'' is not of 1 to 64 letters"),
        (("alice", "--role", "root"), "'root' is not one of 'user', 'admin'"),
    ],
)
def test_what_the_file_could_not_hold_is_refused(arguments: tuple[str, ...], message: str) -> None:
    made = make(*arguments)
    assert (made.exit_code, made.stdout) == (2, "")
    assert message in " ".join(made.stderr.replace("│", "").split())
