"""A model folder with a server of it, and what the tests do to both."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from export.manifest import MANIFEST
from serve.bundle import ServedModel, load_model
from serve.folder import Load, ModelFolder
from serve.jobs import EngineLimits
from serve.models import Models
from serve.pb.limelight.v1 import admin_pb2 as admin
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.admin_pb2_grpc import AdminServiceStub
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub
from serve.server import ServerOptions, create_server
from tests.serve.running import PATIENCE, Running, begin
from tests.serve.steps import Gated

LOAD: Load = partial(load_model, provider="cpu", threads=1)


class GatedLoad:
    """Loads models whose steps wait for the test.

    Attributes:
        gates: of all that were loaded, the first one first.
    """

    def __init__(self) -> None:
        self.gates: list[Gated] = []

    def __call__(self, bundle: Path) -> ServedModel:
        model = LOAD(bundle)
        self.gates.append(Gated(model.steps))
        return replace(model, steps=self.gates[-1])


@dataclass(frozen=True)
class Shelf:
    """A model folder, and a server of it.

    Attributes:
        root: the folder.
        running: the server.
        folder: what keeps it up to date.
        admin: administrative calls.
    """

    root: Path
    running: Running
    folder: ModelFolder
    admin: AdminServiceStub

    def put(self, origin: Path, place: str, **changes: str) -> Path:
        """A bundle in the folder, in place of what was there, with another name or version."""
        bundle = self.root / place
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(origin, bundle)
        change(bundle, **changes)
        return bundle

    def reload(self) -> dict[str, Any]:
        found = self.admin.Reload(admin.ReloadRequest(), timeout=PATIENCE).entries
        return {entry.name: entry for entry in found}

    def served(self) -> list[tuple[str, str]]:
        """Names and versions that are told."""
        models = self.running.stub.ListModels(pb.ListModelsRequest(), timeout=PATIENCE).models
        return [(one.model.name, one.model.version) for one in models]

    def ask(self, text: str = "abc", model: str = "", version: str = "") -> pb.GenerateResponse:
        request = pb.GenerateRequest(source=text, model=model, version=version)
        return self.running.stub.Generate(request, timeout=PATIENCE)

    def until_retired(self) -> None:
        begin(self.folder.until_retired()).result(PATIENCE)


def change(bundle: Path, **changes: str) -> None:
    """Another name or version: the checksums, of all other files, stay right."""
    path = bundle / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@contextmanager
def shelf_of(root: Path, load: Load = LOAD, limits: EngineLimits | None = None) -> Iterator[Shelf]:
    models = Models(limits or EngineLimits())
    folder = ModelFolder(root, load, models)
    begin(folder.load_all()).result(PATIENCE)
    options = ServerOptions(port=0, admin_port=0, limits=limits or EngineLimits())
    server = begin(create_server(models, options, folder)).result(PATIENCE)
    try:
        with (
            grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
            grpc.insecure_channel(f"127.0.0.1:{server.admin_port}") as administration,
        ):
            yield Shelf(
                root, Running(server, channel, LimelightServiceStub(channel)), folder, AdminServiceStub(administration)
            )
    finally:
        begin(server.stop(0)).result(PATIENCE)


def failed(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details()


def load_entry(shelf: Shelf, name: str) -> admin.Entry:
    return shelf.admin.LoadEntry(admin.LoadEntryRequest(name=name), timeout=PATIENCE).entry


def unload_entry(shelf: Shelf, name: str) -> admin.Entry:
    return shelf.admin.UnloadEntry(admin.UnloadEntryRequest(name=name), timeout=PATIENCE).entry


def truncate(bundle: Path) -> None:
    path = bundle / "fp32" / "weights.bin"
    os.truncate(path, path.stat().st_size // 2)
