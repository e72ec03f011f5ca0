"""The protocol that clients were promised stays: `make check` compares it, and refuses what would break them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

REPOSITORY = Path(__file__).parents[2]
PROMISED = REPOSITORY / "protos/promised.binpb"
PROTO = Path("protos/limelight/v1/limelight.proto")

BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")

pytestmark = pytest.mark.skipif(BUF is None, reason="buf (of buf-bin) is not installed")


def compared(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """What buf says of another text of the protocol."""
    shutil.copy(REPOSITORY / "buf.yaml", folder)
    shutil.copytree(REPOSITORY / "protos", folder / "protos")
    (folder / PROTO).write_text(text, encoding="utf-8")
    command = [str(BUF), "breaking", "--against", str(PROMISED)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


BROKEN: dict[str, tuple[str, str, str]] = {
    "a field is gone": (
        "  double score = 3;\n",
        "",
        'Previously present field "3" with name "score" on message "Hypothesis" was deleted.',
    ),
    "a field has another number": (
        "double score = 3;",
        "double score = 99;",
        'Previously present field "3" with name "score" on message',
    ),
    "a field has another type": ("double score = 3;", "float score = 3;", 'changed type from "double" to "float"'),
    "a field has another name": ("double score = 3;", "double total = 3;", 'changed name from "score" to "total"'),
    "a call is gone": (
        "  rpc Score(ScoreRequest) returns (ScoreResponse);\n",
        "",
        'Previously present RPC "Score" on service "LimelightService" was deleted.',
    ),
    "a call is no stream": (
        "returns (stream GenerateChunkedResponse)",
        "returns (GenerateChunkedResponse)",
        "changed from server streaming to server unary",
    ),
    "a value is gone": (
        "  REDUCTION_MAX = 3;\n",
        "",
        'Previously present enum value "3" on enum "Reduction" was deleted.',
    ),
}
"""What is replaced by what, and what is said of it."""


@pytest.mark.parametrize("what", BROKEN)
def test_what_would_break_clients_is_refused(tmp_path: Path, what: str) -> None:
    old, new, message = BROKEN[what]
    text = (REPOSITORY / PROTO).read_text(encoding="utf-8")
    assert text.count(old) == 1
    done = compared(tmp_path, text.replace(old, new))
    assert done.returncode == 100, done.stderr
    assert message in done.stdout


def test_what_is_there_and_what_is_added_is_not(tmp_path: Path) -> None:
    text = (REPOSITORY / PROTO).read_text(encoding="utf-8")
    added = text.replace("  double score = 3;\n", "  double score = 3;\n  // More.\n  double more = 99;\n")
    assert added != text
    for index, one in enumerate((text, added)):
        folder = tmp_path / str(index)
        folder.mkdir()
        done = compared(folder, one)
        assert (done.returncode, done.stdout) == (0, "")


def test_the_promise_holds_every_call() -> None:
    """One that was added has been promised too: `make promise`."""
    files = {file.name: file for file in FileDescriptorSet.FromString(PROMISED.read_bytes()).file}
    for path in (REPOSITORY / "protos").rglob("*.proto"):
        services = files[path.relative_to(REPOSITORY / "protos").as_posix()].service
        lines = path.read_text(encoding="utf-8").splitlines()
        calls = [line.split("(")[0].split()[1] for line in lines if line.startswith("  rpc ")]
        assert [method.name for service in services for method in service.method] == calls
