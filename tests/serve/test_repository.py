"""The Open Inference Protocol's model repository: what is served, loaded and unloaded, by name, never by path."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from export.manifest import MANIFEST
from serve.access import Access, hash_token
from serve.errors import PermissionDeniedError
from serve.inference import INFERENCE
from serve.jobs import EngineLimits
from serve.pb.inference import grpc_service_pb2 as pb
from serve.pb.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from tests.reversal import Reversal
from tests.serve.inferring import refused, request, stub
from tests.serve.running import PATIENCE, Running
from tests.serve.shelf import Shelf, shelf_of


def test_the_index_lists_what_is_served(running: Running) -> None:
    found = stub(running).RepositoryIndex(pb.RepositoryIndexRequest(), timeout=PATIENCE).models
    assert [(one.name, one.version, one.state) for one in found] == [("reversal", "1", "READY")]


@pytest.mark.parametrize("call", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_models_are_not_loaded_on_the_public_port(running: Running, call: str) -> None:
    asked = getattr(pb, f"{call}Request")(model_name="reversal")
    assert refused(running, call, asked) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "models are loaded and unloaded on the administrative port only",
    )


@pytest.fixture
def shelf(reversal: Reversal, tmp_path: Path) -> Iterator[tuple[Shelf, GRPCInferenceServiceStub]]:
    """A model folder with two versions of a model, and administrative calls in this protocol."""
    root = tmp_path / "models"
    shutil.copytree(reversal.bundle, root / "first")
    with shelf_of(root, limits=EngineLimits()) as shelf:
        shelf.put(reversal.bundle, "second", version="2")
        shelf.reload()
        with grpc.insecure_channel(f"127.0.0.1:{shelf.running.server.admin_port}") as channel:
            yield shelf, GRPCInferenceServiceStub(channel)


def test_versions_are_chosen(shelf: tuple[Shelf, GRPCInferenceServiceStub]) -> None:
    running = shelf[0].running
    for version, answering in (("1", "1"), ("2", "2"), ("", "2")):
        assert stub(running).ModelInfer(request(version=version), timeout=PATIENCE).model_version == answering
    metadata = stub(running).ModelMetadata(pb.ModelMetadataRequest(name="reversal"), timeout=PATIENCE)
    assert list(metadata.versions) == ["1", "2"]
    found = stub(running).ModelStatistics(pb.ModelStatisticsRequest(name="reversal"), timeout=PATIENCE).model_stats
    assert [(one.version, one.inference_count) for one in found] == [("1", 1), ("2", 2)]


def index(admin: GRPCInferenceServiceStub) -> list[tuple[str, str, str, str]]:
    found = admin.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=PATIENCE).models
    return [(one.name, one.version, one.state, one.reason) for one in found]


@pytest.mark.parametrize("name", ["reversal", "second"])
def test_models_are_unloaded_and_loaded_by_name_or_entry(
    shelf: tuple[Shelf, GRPCInferenceServiceStub], name: str
) -> None:
    admin, places = shelf[1], ["first", "second"] if name == "reversal" else ["second"]
    before = index(admin)
    assert before == [("reversal", "1", "READY", ""), ("reversal", "2", "READY", "")]
    admin.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=name), timeout=PATIENCE)
    gone = [(place, "", "UNAVAILABLE", "unloaded") for place in places]
    assert index(admin) == [*before[: 2 - len(places)], *gone]
    admin.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=name), timeout=PATIENCE)
    assert index(admin) == before
    ready = admin.RepositoryIndex(pb.RepositoryIndexRequest(ready=True), timeout=PATIENCE).models
    assert len(ready) == 2


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../first", "first/../../x", "x\0", "first/"])
@pytest.mark.parametrize("call", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_a_path_is_no_name(shelf: tuple[Shelf, GRPCInferenceServiceStub], call: str, name: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        getattr(shelf[1], call)(getattr(pb, f"{call}Request")(model_name=name), timeout=PATIENCE)
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "model_name: is no name of an entry of the model folder"


@pytest.mark.parametrize("call", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_what_is_not_there_is_neither_loaded_nor_unloaded(
    shelf: tuple[Shelf, GRPCInferenceServiceStub], call: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        getattr(shelf[1], call)(getattr(pb, f"{call}Request")(model_name="third"), timeout=PATIENCE)
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.NOT_FOUND


def test_a_bundle_cannot_be_changed_by_who_loads_it(shelf: tuple[Shelf, GRPCInferenceServiceStub]) -> None:
    parameters = {"file:1/model.onnx": pb.ModelRepositoryParameter(bytes_param=b"x")}
    with pytest.raises(grpc.RpcError) as caught:
        shelf[1].RepositoryModelLoad(
            pb.RepositoryModelLoadRequest(model_name="first", parameters=parameters), timeout=PATIENCE
        )
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_bundle_that_cannot_be_loaded_says_why(shelf: tuple[Shelf, GRPCInferenceServiceStub]) -> None:
    admin = shelf[1]
    admin.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="second"), timeout=PATIENCE)
    (shelf[0].root / "second" / MANIFEST).write_text("{", encoding="utf-8")
    with pytest.raises(grpc.RpcError) as caught:
        admin.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="second"), timeout=PATIENCE)
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert error.details().startswith(f"second/{MANIFEST}: not JSON: ")
    assert index(admin)[1] == ("second", "", "UNAVAILABLE", error.details())


@pytest.mark.parametrize("call", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_fault_40_only_an_administrators_token_loads_and_unloads(tmp_path: Path, call: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(
        "".join(f"{role} {role} sha256:{hash_token(role)}\n" for role in ("user", "admin")), encoding="utf-8"
    )
    file.chmod(0o600)
    access, method = Access(file), f"/{INFERENCE}/{call}"
    access.let_in(method, [("authorization", "Bearer admin")])
    with pytest.raises(PermissionDeniedError, match="the role 'admin' is needed"):
        access.let_in(method, [("authorization", "Bearer user")])
    access.let_in(f"/{INFERENCE}/ModelInfer", [("authorization", "Bearer user")])
