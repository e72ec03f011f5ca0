"""Bearer tokens: who is let in, what a role allows, and a file that changes while serving."""

import hmac
import logging
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from bench.load.authority import replace
from model.errors import ConfigError
from serve import access
from serve.access import Access, Entry, Role, caller_name, hash_token
from serve.bundle import ServedModel, load_model
from serve.calls import Calls
from serve.client import Client, ServerError
from serve.errors import PermissionDeniedError
from serve.folder import ModelFolder
from serve.jobs import EngineLimits
from serve.metrics import Metrics
from serve.models import Models
from serve.observer import Observer
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.admin_pb2 import ListEntriesRequest
from serve.pb.limelight.v1.admin_pb2_grpc import AdminServiceStub
from serve.security import Security
from serve.server import SERVICE, ServerOptions, create_server
from tests.reversal import Reversal
from tests.serve import asking
from tests.serve.jobs import submitted
from tests.serve.running import PATIENCE, Running, begin, models_of, serving

ALICE, BOB, ROOT = "alices-token", "bobs-token", "roots-token"

ASK, ADMINISTRATE = f"/{SERVICE}/Generate", "/limelight.v1.AdminService/LoadModel"

UNAUTHENTICATED, PERMISSION_DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED


def line(name: str, token: str, role: Role = "user") -> str:
    return f"{Entry(name, role, hash_token(token))}\n"


LINES = f"# who may ask\n\n{line('alice', ALICE)}{line('bob', BOB)}{line('root', ROOT, 'admin')}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return replace(tmp_path / "tokens", LINES.encode())


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


Call = Callable[[Running, Any], Any]

CALLS: dict[str, Call] = {
    "Generate": lambda running, about: running.stub.Generate(pb.GenerateRequest(source="abc"), **about),
    "GenerateStream": lambda running, about: list(
        running.stub.GenerateStream(pb.GenerateStreamRequest(source="abc"), **about)
    ),
    "GenerateChunked": lambda running, about: list(
        running.stub.GenerateChunked(pb.GenerateChunkedRequest(source="abc"), **about)
    ),
    "GenerateMany": lambda running, about: list(
        running.stub.GenerateMany(
            iter([pb.GenerateManyRequest(id="1", request=pb.GenerateRequest(source="abc"))]), **about
        )
    ),
    "Score": lambda running, about: running.stub.Score(pb.ScoreRequest(source="abc", target="cba"), **about),
    "GetModel": lambda running, about: running.stub.GetModel(pb.GetModelRequest(), **about),
    "ListModels": lambda running, about: running.stub.ListModels(pb.ListModelsRequest(), **about),
}


def call(running: Running, name: str, metadata: tuple[tuple[str, str], ...]) -> Any:
    return CALLS[name](running, {"metadata": metadata, "timeout": PATIENCE})


def test_every_method_is_tried() -> None:
    methods = pb.DESCRIPTOR.services_by_name["LimelightService"].methods_by_name
    assert set(methods.keys()) == CALLS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_a_token_is_needed(served: ServedModel, file: Path, name: str) -> None:
    with serving(served, security=Security(token_file=file)) as running:
        with pytest.raises(grpc.RpcError) as caught:
            call(running, name, ())
        error: Any = caught.value
        assert (error.code(), error.details()) == (
            UNAUTHENTICATED,
            "a token is needed, as metadata `authorization: Bearer TOKEN`",
        )
        status = rpc_status.from_call(error)
        assert status is not None
        assert ErrorInfo.FromString(status.details[-1].value).reason == "UNAUTHENTICATED"
        assert call(running, name, bearer(ALICE))
        running.until_idle()


WRONG: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "unknown": (bearer("mallorys-token"), "the token is not known here"),
    "a hash": (bearer(hash_token(ALICE)), "the token is not known here"),
    "another scheme": (
        (("authorization", f"Basic {ALICE}"),),
        "the metadata `authorization` is not one `Bearer TOKEN`",
    ),
    "no scheme": ((("authorization", ALICE),), "the metadata `authorization` is not one `Bearer TOKEN`"),
    "nothing": ((("authorization", "Bearer "),), "the metadata `authorization` is not one `Bearer TOKEN`"),
    "two": (bearer("other") + bearer(ALICE), "the metadata `authorization` is not one `Bearer TOKEN`"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_token_is_refused_and_not_repeated(served: ServedModel, file: Path, what: str) -> None:
    metadata, message = WRONG[what]
    with serving(served, security=Security(token_file=file)) as running:
        with pytest.raises(grpc.RpcError) as caught:
            call(running, "Generate", metadata)
        error: Any = caught.value
        assert (error.code(), error.details()) == (UNAUTHENTICATED, message)


def test_the_scheme_may_be_written_as_one_likes(file: Path) -> None:
    Access(file).let_in(ASK, [("authorization", f"bearer  {ALICE}")])


def test_probes_and_reflection_need_no_token(served: ServedModel, file: Path) -> None:
    with serving(served, security=Security(token_file=file)) as running:
        asked = health_pb2.HealthCheckRequest(service=SERVICE)
        found = health_pb2_grpc.HealthStub(running.channel).Check(asked, timeout=PATIENCE)
        assert found.status == health_pb2.HealthCheckResponse.SERVING
        assert SERVICE in ProtoReflectionDescriptorDatabase(running.channel).get_services()


def test_every_entry_is_compared(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[Any, Any]] = []

    def compare(left: Any, right: Any) -> bool:
        compared.append((left, right))
        return hmac.compare_digest(left, right)

    monkeypatch.setattr(access, "compare_digest", compare)
    guarded = Access(file)
    for token in (ALICE, BOB, ROOT):
        compared.clear()
        guarded.let_in(ASK, bearer(token))
        assert compared == [(hash_token(one), hash_token(token)) for one in (ALICE, BOB, ROOT)]


@pytest.mark.parametrize(("token", "allowed"), [(ALICE, False), (ROOT, True)])
def test_administration_needs_its_role(file: Path, token: str, allowed: bool) -> None:
    guarded = Access(file)
    guarded.let_in(ASK, bearer(token))
    if allowed:
        guarded.let_in(ADMINISTRATE, bearer(token))
        return
    with pytest.raises(PermissionDeniedError, match=r"^the role 'admin' is needed, and 'alice' has 'user'$"):
        guarded.let_in(ADMINISTRATE, bearer(token))


def test_fault_40_administrative_calls_need_an_administrator(reversal: Reversal, file: Path) -> None:
    models = Models(EngineLimits())
    folder = ModelFolder(reversal.bundle, partial(load_model, provider="cpu", threads=1), models)
    begin(folder.load_all()).result(PATIENCE)
    options = ServerOptions(port=0, admin_port=0, security=Security(token_file=file))
    server = begin(create_server(models, options, folder)).result(PATIENCE)
    with grpc.insecure_channel(f"127.0.0.1:{server.admin_port}") as channel:
        stub, codes = AdminServiceStub(channel), []
        for metadata in ((), bearer("mallorys-token"), bearer(ALICE)):
            with pytest.raises(grpc.RpcError) as caught:
                stub.ListEntries(ListEntriesRequest(), metadata=metadata, timeout=PATIENCE)
            error: Any = caught.value
            codes.append(error.code())
        assert codes == [UNAUTHENTICATED, UNAUTHENTICATED, PERMISSION_DENIED]
        assert stub.ListEntries(ListEntriesRequest(), metadata=bearer(ROOT), timeout=PATIENCE).entries
    begin(server.stop(0)).result(PATIENCE)


def test_whose_call_it_is_does_not_come_from_a_call_before(file: Path) -> None:
    Access(file).let_in(ASK, bearer(ALICE))
    assert caller_name() == "alice"
    Access().let_in(ASK, ())
    assert caller_name() is None


def test_without_tokens_nobody_needs_one() -> None:
    for method in (ASK, ADMINISTRATE):
        Access().let_in(method, ())


def test_a_role_too_low_is_told_to_the_caller(served: ServedModel, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "NEEDED", {f"/{SERVICE}/": "admin"})
    with serving(served, security=Security(token_file=file)) as running:
        with Client(running.address, token=ALICE) as client, pytest.raises(ServerError) as caught:
            client.describe()
        assert (caught.value.code, caught.value.reason) == (PERMISSION_DENIED, "PERMISSION_DENIED")
        with Client(running.address, token=ROOT) as client:
            assert client.describe().name == "reversal"


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
def test_methods_of_every_kind_are_guarded(served: ServedModel, file: Path, kind: str) -> None:
    """Through gRPC as it is, with a service that answers nothing but yes."""

    class Yes(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:  # noqa: ARG002
            return getattr(grpc, f"{kind}_rpc_method_handler")(say_all if kind.endswith("stream") else say)

    async def say(request: Any, context: Any) -> bytes:  # noqa: ARG001
        return b"yes"

    async def say_all(request: Any, context: Any) -> AsyncIterator[bytes]:  # noqa: ARG001
        yield b"yes"

    def answer(channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> bytes:
        sent: Any = iter([b"?"]) if kind.startswith("stream") else b"?"
        found = getattr(channel, kind)("/some.Service/Method")(sent, metadata=metadata, timeout=PATIENCE)
        return b"".join(found) if kind.endswith("stream") else found

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(
            interceptors=[Calls(lambda: 1, Observer(Metrics(models_of(served))), 60.0, Access(file))]
        )
        server.add_generic_rpc_handlers([Yes()])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = begin(start()).result(PATIENCE)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert answer(channel, bearer(ALICE)) == b"yes"
        with pytest.raises(grpc.RpcError) as caught:
            answer(channel, ())
        error: Any = caught.value
        assert error.code() is UNAUTHENTICATED
    begin(server.stop(0)).result(PATIENCE)


def test_a_name_is_the_client_for_fairness(served: ServedModel, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(served, security=Security(token_file=file), client_header="x-client") as running:
        seen = submitted(running.engine, monkeypatch)
        for name in ("Generate", "Score", "GenerateStream", "GenerateMany"):
            call(running, name, (*bearer(ALICE), ("x-client", "bob")))
            call(running, name, bearer(BOB))
    assert [job.client for job in seen] == ["token:alice", "token:bob"] * 4


def test_tokens_come_and_go_without_a_restart(served: ServedModel, file: Path) -> None:
    with serving(served, security=Security(token_file=file)) as running:
        call(running, "Generate", bearer(ALICE))
        replace(file, line("carol", "carols-token").encode())
        call(running, "Generate", bearer("carols-token"))
        with pytest.raises(grpc.RpcError) as caught:
            call(running, "Generate", bearer(ALICE))
        error: Any = caught.value
        assert error.code() is UNAUTHENTICATED


def open_to_all(file: Path) -> None:
    replace(file, line("carol", "carols-token").encode())
    file.chmod(0o644)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "is not there": lambda file: file.unlink(),
    "holds nothing": lambda file: replace(file, b"# nobody\n"),
    "is cut off": lambda file: replace(file, LINES[:-10].encode()),
    "is open to everybody": open_to_all,
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_new_version_is_told_once(file: Path, caplog: pytest.LogCaptureFixture, what: str) -> None:
    guarded = Access(file)
    damage = DAMAGES[what]
    damage(file)
    for _ in range(5):
        guarded.let_in(ASK, bearer(ALICE))
    (told,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert told.message.startswith(f"token_file: {file}: ")
    assert "what was read before stays in use" in told.message
    replace(file, LINES.replace("alice user", "alice admin").encode())
    guarded.let_in(ADMINISTRATE, bearer(ALICE))


WRONG_LINES: dict[str, tuple[str, str]] = {
    "two words": ("alice user", "line 1: has 2 words where there are three: name, role, sha256:HEX$"),
    "a name that is none": (line("al/ice", ALICE), "line 1: the name 'al/ice' is not of 1 to 64 letters"),
    "a role that is none": (f"\nalice root sha256:{64 * 'a'}", "line 2: 'root' is no role: choose from user, admin$"),
    "the token itself": (f"alice user {ALICE}", "line 1: the third word is not sha256: and 64 digits of 0-9 and a-f$"),
    "a hash cut off": (f"alice user sha256:{63 * 'a'}", "line 1: the third word is not sha256:"),
    "one token twice": (line("alice", ALICE) + line("bob", ALICE), "line 2: this token is in a line above already$"),
    "no token": ("# nobody", r"holds no token: add one with `limelight token NAME --append .*tokens`$"),
    "no text": ("\ufffe\x00", "line 1: has 1 words"),
}


@pytest.mark.parametrize("what", WRONG_LINES)
def test_a_start_with_a_wrong_file_is_refused(served: ServedModel, tmp_path: Path, what: str) -> None:
    text, message = WRONG_LINES[what]
    file = replace(tmp_path / "tokens", text.encode())
    with (
        pytest.raises(ConfigError, match=rf"^token_file: .*tokens: {message}") as caught,
        serving(served, security=Security(token_file=file)),
    ):
        pass
    assert ALICE not in str(caught.value)


def test_a_start_with_a_file_that_others_can_open_is_refused(served: ServedModel, file: Path) -> None:
    file.chmod(0o604)
    with (
        pytest.raises(ConfigError, match=r"^token_file: .*: is open to everybody on this machine: chmod o-rwx it$"),
        serving(served, security=Security(token_file=file)),
    ):
        pass


def test_a_start_without_the_file_is_refused(served: ServedModel, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"^token_file: .*missing: cannot be read: No such file or directory$"),
        serving(served, security=Security(token_file=tmp_path / "missing")),
    ):
        pass


def test_tokens_in_plain_text_stay_on_this_machine(served: ServedModel, file: Path) -> None:
    with (
        pytest.raises(
            ConfigError, match=r"^token_file: tokens would be sent to 0\.0\.0\.0 in plain text: set tls_cert"
        ),
        serving(served, host="0.0.0.0", security=Security(token_file=file)),
    ):
        pass
    with serving(served, host="0.0.0.0", security=Security(token_file=file, plaintext_tokens=True)) as running:
        assert call(running, "GetModel", bearer(ALICE))


@pytest.mark.parametrize(
    ("host", "warned"), [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("::", True)]
)
def test_a_server_open_to_a_network_is_warned_of(host: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    Security().check(host)
    assert ("nothing is encrypted" in caplog.text) == warned


def test_the_client_brings_a_token(served: ServedModel, file: Path) -> None:
    with serving(served, security=Security(token_file=file)) as running:
        with Client(running.address, token=ALICE) as client:
            assert client.generate("abc").best.text == client.generate_chunked("abc").best.text == "cba"
            assert client.score("abc", "cba").best.text == "cba"
            assert list(client.stream("abc"))
            assert list(client.generate_many(["abc"]))
            assert client.describe().name == client.models()[0].name == "reversal"
        with Client(running.address) as client, pytest.raises(ServerError, match="a token is needed") as caught:
            client.generate("abc")
        assert (caught.value.code, caught.value.reason) == (UNAUTHENTICATED, "UNAUTHENTICATED")


@pytest.mark.parametrize("token", ["", "two words", "a line\n", "é"])
def test_the_client_refuses_what_is_no_token(token: str) -> None:
    with pytest.raises(ConfigError, match=r"^token: is empty, or has spaces or letters that no token has$"):
        Client("127.0.0.1:1", token=token)


@pytest.mark.parametrize("address", ["192.0.2.1:50051", "example.org:50051", "[2001:db8::1]:50051", "0.0.0.0:1"])
def test_the_client_sends_no_token_in_plain_text(address: str) -> None:
    with pytest.raises(ConfigError, match=r"^token: would be sent to .* in plain text: give ca"):
        Client(address, token=ALICE)
    Client(address, token=ALICE, plaintext_token=True).close()


def test_ask_brings_a_token(served: ServedModel, file: Path) -> None:
    with serving(served, security=Security(token_file=file)) as running:
        asked = asking.invoke("abc", "--address", running.address, "--token", ALICE)
        assert asked.stdout.startswith("cba\n"), asked.output
        asked = asking.invoke("abc", "--address", running.address, LIMELIGHT_TOKEN=BOB)
        assert asked.stdout.startswith("cba\n"), asked.output
        asked = asking.invoke("abc", "--address", running.address)
        assert isinstance(asked.exception, ServerError)
