"""A model folder: what is new is loaded, what has changed is swapped, what is gone is unloaded."""

import asyncio
import gc
import json
import shutil
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from export.manifest import BundleError
from serve.answers import Answer, Start
from serve.bundle import ServedModel
from serve.cli import app
from serve.client import Client
from serve.errors import ModelNotFoundError
from serve.folder import ModelFolder, scan
from serve.jobs import EngineLimits
from serve.models import Models
from serve.pb.limelight.v1 import admin_pb2 as admin
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.admin_pb2_grpc import AdminServiceStub
from serve.server import ServerOptions, create_server
from tests.reversal import Reversal
from tests.serve.asking import run
from tests.serve.running import PATIENCE, Running, begin, generate
from tests.serve.shelf import LOAD, GatedLoad, Shelf, change, failed, load_entry, shelf_of, truncate, unload_entry

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def test_a_bundle_is_an_entry_by_its_own_name_and_a_folder_has_them_by_place(
    reversal: Reversal, tmp_path: Path
) -> None:
    (alone,) = scan(reversal.bundle)
    assert alone == reversal.bundle.name
    for place in ("plain", "named/1", "named/2", "too/deep/for", ".hidden-not"):
        shutil.copytree(reversal.bundle, tmp_path / place)
    (tmp_path / "file").touch()
    assert set(scan(tmp_path)) == {"plain", "named/1", "named/2", ".hidden-not"}
    with pytest.raises(BundleError, match="nowhere: there is no such folder"):
        scan(tmp_path / "nowhere")


def test_a_server_does_not_start_with_less_than_the_folder_says(reversal: Reversal, tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, LOAD, Models(EngineLimits()))
    with pytest.raises(BundleError, match="no bundle, and no folder of bundles; make one with: limelight export"):
        asyncio.run(folder.load_all())
    shutil.copytree(reversal.bundle, tmp_path / "good")
    (shutil.copytree(reversal.bundle, tmp_path / "bad") / "fp32" / "decoder.onnx").unlink()
    models = Models(EngineLimits())
    with pytest.raises(BundleError, match=f"^{tmp_path}/bad/fp32/decoder.onnx: missing, though bundle.json lists it"):
        asyncio.run(ModelFolder(tmp_path, LOAD, models).load_all())
    assert asyncio.run(models.stop(PATIENCE))


def test_models_and_versions_answer_side_by_side(shelf: Shelf, reversal: Reversal) -> None:
    shelf.put(reversal.bundle, "second/9", version="9")
    shelf.put(reversal.bundle, "second/10", version="10")
    shelf.put(reversal.bundle, "other", name="other", version="abc")
    assert {entry.state for entry in shelf.reload().values()} == {admin.ENTRY_STATE_READY}
    assert shelf.served() == [("other", "abc"), ("reversal", "1"), ("reversal", "9"), ("reversal", "10")]
    for which, version in (
        ({"model": "reversal"}, "10"),
        ({"model": "reversal", "version": "9"}, "9"),
        ({"model": "other"}, "abc"),
    ):
        answer = shelf.ask(**which)
        assert (answer.model.version, answer.hypotheses[0].text) == (version, "cba")
        described = shelf.running.stub.GetModel(pb.GetModelRequest(**which), timeout=PATIENCE)
        assert described.model == answer.model
    assert failed(shelf.ask) == (
        grpc.StatusCode.NOT_FOUND,
        "several models are served, name one: other, reversal",
    )
    assert failed(lambda: shelf.ask(model="reversal", version="2")) == (
        grpc.StatusCode.NOT_FOUND,
        "model 'reversal' has no version '2' here, only 1, 9, 10",
    )
    assert failed(lambda: shelf.ask(model="another")) == (
        grpc.StatusCode.NOT_FOUND,
        "model 'another' is not served here; 'other', 'reversal' are",
    )


def test_client_command_and_doctor_can_name_a_version(shelf: Shelf, reversal: Reversal) -> None:
    shelf.put(reversal.bundle, "second", version="2")
    shelf.put(reversal.bundle, "other", name="other")
    shelf.reload()
    address = shelf.running.address
    with Client(address, timeout=PATIENCE) as client:
        which: dict[str, Any] = {"model": "reversal", "version": "1"}
        assert client.generate("abc", **which).version == "1"
        assert client.generate_chunked("abc", **which).version == "1"
        assert client.score("abc", "cba", **which).version == "1"
        assert client.describe(**which).version == "1"
        assert client.generate("abc", model="reversal").version == "2"
        [(_, answer)] = client.generate_many(["abc"], **which)
        assert isinstance(answer, Answer)
        assert answer.version == "1"
        assert [event.version for event in client.stream("abc", **which) if isinstance(event, Start)] == ["1"]
    for name, version in (("reversal", "2"), ("reversal@1", "1"), ("other", "1")):
        told = json.loads(run("abc", "--address", address, "--json", "--model", name).stdout)
        assert told["model"] == {"name": name.partition("@")[0], "version": version}
    result = CliRunner().invoke(app, ["doctor", address], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    for what in ("other 1", "reversal 1", "reversal 2"):
        assert f"{what} (fp32, cpu): " in result.output


def test_of_versions_that_are_no_numbers_the_newest_was_loaded_last(shelf: Shelf, reversal: Reversal) -> None:
    for version in ("b1", "a2"):
        shelf.put(reversal.bundle, version, version=version)
        shelf.reload()
        assert shelf.ask().model.version == version


def test_what_is_gone_is_unloaded_and_what_only_moved_is_not(shelf: Shelf, reversal: Reversal) -> None:
    shelf.put(reversal.bundle, "second", version="2")
    shelf.reload()
    (shelf.root / "first").rename(shelf.root / "moved")
    assert {name: entry.version for name, entry in shelf.reload().items()} == {"moved": "1", "second": "2"}
    assert shelf.served() == [("reversal", "1"), ("reversal", "2")]
    shutil.rmtree(shelf.root / "second")
    shelf.reload()
    assert shelf.served() == [("reversal", "1")]
    shelf.until_retired()
    assert len(shelf.running.server.models.all) == 1


def test_two_that_change_places_are_both_served(shelf: Shelf, reversal: Reversal) -> None:
    shelf.put(reversal.bundle, "second", version="2")
    shelf.reload()
    change(shelf.root / "first", version="2")
    change(shelf.root / "second", version="1")
    found = shelf.reload()
    assert {name: (entry.version, entry.failure) for name, entry in found.items()} == {
        "first": ("2", ""),
        "second": ("1", ""),
    }


def test_one_that_takes_the_place_of_another_is_refused_and_goes_on_as_it_was(shelf: Shelf, reversal: Reversal) -> None:
    shelf.put(reversal.bundle, "second", version="2")
    shelf.reload()
    change(shelf.root / "first", version="2")
    entry = shelf.reload()["first"]
    assert (entry.state, entry.version, entry.failure) == (
        admin.ENTRY_STATE_FAILED,
        "1",
        "reversal 2 is served already",
    )
    assert shelf.ask(version="1").model.version == "1"
    assert shelf.ask(version="2").model.version == "2"
    assert len(shelf.running.server.models.all) == 2


def test_two_of_one_name_and_version_are_not_both_served(shelf: Shelf, reversal: Reversal) -> None:
    shelf.put(reversal.bundle, "again")
    entry = shelf.reload()["again"]
    assert (entry.state, entry.failure) == (admin.ENTRY_STATE_FAILED, "reversal 1 is served already")
    assert failed(lambda: load_entry(shelf, "again"))[0] == grpc.StatusCode.FAILED_PRECONDITION
    assert shelf.ask().hypotheses[0].text == "cba"


def test_what_was_unloaded_stays_away_until_it_is_asked_for(shelf: Shelf) -> None:
    assert unload_entry(shelf, "first").state == admin.ENTRY_STATE_UNLOADED
    assert failed(shelf.ask) == (grpc.StatusCode.NOT_FOUND, "model '' is not served here; none is")
    change(shelf.root / "first", version="2")
    entry = shelf.reload()["first"]
    assert (entry.state, entry.model, entry.version) == (admin.ENTRY_STATE_UNLOADED, "", "")
    entry = load_entry(shelf, "first")
    assert (entry.state, entry.model, entry.version) == (admin.ENTRY_STATE_READY, "reversal", "2")
    assert shelf.ask().model.version == "2"
    listed = shelf.admin.ListEntries(admin.ListEntriesRequest(), timeout=PATIENCE).entries
    assert list(listed) == [entry]


def test_calls_under_way_are_answered_by_the_version_that_took_them(reversal: Reversal, tmp_path: Path) -> None:
    shutil.copytree(reversal.bundle, tmp_path / "model")
    load = GatedLoad()
    with shelf_of(tmp_path, load) as shelf:
        before = generate(shelf.running.stub)
        old = shelf.running.engine
        load.gates[0].wait()
        change(tmp_path / "model", version="2")
        shelf.reload()
        assert [one.version for one in shelf.running.server.models.all] == ["2", "1"]
        after = generate(shelf.running.stub)
        load.gates[1].open()
        assert after.result(PATIENCE).model.version == "2"
        assert not before.done()
        load.gates[0].open()
        answer = before.result(PATIENCE)
        assert (answer.model.version, answer.hypotheses[0].text) == ("1", "hgfedcba")
        shelf.until_retired()
        assert not old.alive
        assert [one.version for one in shelf.running.server.models.all] == ["2"]


def test_administrative_calls_are_nowhere_else(shelf: Shelf, running: Running) -> None:
    stub = AdminServiceStub(shelf.running.channel)
    assert failed(lambda: stub.Reload(admin.ReloadRequest(), timeout=PATIENCE))[0] == grpc.StatusCode.UNIMPLEMENTED
    assert running.server.admin_port is None


def test_the_folder_is_looked_at_from_time_to_time(reversal: Reversal, tmp_path: Path) -> None:
    shutil.copytree(reversal.bundle, tmp_path / "first")
    models = Models(EngineLimits())
    looked = threading.Semaphore(0)

    class Watched(ModelFolder):
        async def reload(self) -> Any:
            found = await super().reload()
            looked.release()
            return found

    folder = Watched(tmp_path, LOAD, models)
    begin(folder.load_all()).result(PATIENCE)
    server = begin(create_server(models, ServerOptions(port=0, poll=0.1), folder)).result(PATIENCE)
    try:
        change(tmp_path / "first", version="2")
        for _ in range(3):
            assert looked.acquire(timeout=PATIENCE)
        assert models.find("").version == "2"
    finally:
        begin(server.stop(0)).result(PATIENCE)


def test_nothing_is_left_of_the_copies(shelf: Shelf, reversal: Reversal) -> None:
    before = set(Path(tempfile.gettempdir()).glob("limelight-*"))
    shelf.put(reversal.bundle, "first", version="2")
    shelf.reload()
    truncate(shelf.root / "first")
    shelf.reload()
    assert set(Path(tempfile.gettempdir()).glob("limelight-*")) <= before


def test_nothing_holds_a_model_that_was_swapped_out(reversal: Reversal, tmp_path: Path) -> None:
    """Its memory is free at once, not only when Python sweeps, whatever calls were refused meanwhile."""
    loaded: list[weakref.ref[ServedModel]] = []

    def load(bundle: Path) -> ServedModel:
        model = LOAD(bundle)
        loaded.append(weakref.ref(model))
        return model

    gc.disable()
    try:
        bundle = shutil.copytree(reversal.bundle, tmp_path / "here")
        with shelf_of(tmp_path, load) as shelf:
            stub = shelf.running.stub
            wrong = pb.GenerateRequest(source="abc", search=pb.SearchOptions(beam_size=1_000_000))
            empty = pb.ScoreRequest(source="", target="cba")
            assert failed(lambda: stub.Generate(wrong, timeout=PATIENCE))[0] is INVALID
            assert failed(lambda: stub.Score(empty, timeout=PATIENCE))[0] is INVALID
            streamed = pb.GenerateStreamRequest(source="abc", search=wrong.search)
            assert failed(lambda: list(stub.GenerateStream(streamed, timeout=PATIENCE)))[0] is INVALID
            many = pb.GenerateManyRequest(id="1", request=wrong)
            (answer,) = stub.GenerateMany(iter([many]), timeout=PATIENCE)
            assert answer.error.code == INVALID.value[0]
            shelf.ask()
            shelf.running.until_idle()
            change(bundle, version="2")
            assert shelf.reload()["here"].state is admin.ENTRY_STATE_READY
            shelf.until_retired()
            assert [ref() is None for ref in loaded] == [True, False]
    finally:
        gc.enable()


def test_counts_outlast_the_models(shelf: Shelf) -> None:
    shelf.ask()
    old, models = shelf.running.engine, shelf.running.server.models
    change(shelf.root / "first", version="2")
    shelf.reload()
    shelf.until_retired()
    assert old.counts.steps > 0
    assert models.counts() == old.counts
    shelf.ask()
    shelf.running.until_idle()
    assert models.counts().source_tokens == 2 * old.counts.source_tokens


def test_nothing_is_served_of_nothing() -> None:
    with pytest.raises(ModelNotFoundError, match=r"none is$"):
        Models(EngineLimits()).find("x")
