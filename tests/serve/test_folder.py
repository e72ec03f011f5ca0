"""A model folder: what is new is loaded, what has changed is swapped, what fails changes nothing; nobody notices."""

import asyncio
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from export.manifest import MANIFEST, BundleError
from model.vocabulary import END
from serve.answers import Answer, Start
from serve.bundle import ServedModel, load_model
from serve.cli import app
from serve.client import Client
from serve.errors import ModelNotFoundError
from serve.folder import Load, ModelFolder, scan
from serve.jobs import EngineLimits
from serve.models import Models
from serve.pb.limelight.v1 import admin_pb2 as admin
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.admin_pb2_grpc import AdminServiceStub
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub
from serve.server import ServerOptions, create_server
from tests.reversal import Reversal
from tests.serve.asking import run
from tests.serve.jobs import job
from tests.serve.running import PATIENCE, Running, begin, generate
from tests.serve.steps import Gated

LOAD: Load = partial(load_model, provider="cpu", threads=1)
SWAPS, CLIENTS = int(os.environ.get("LIMELIGHT_TEST_SWAPS", "10")), 20


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


@pytest.fixture
def shelf(reversal: Reversal, tmp_path: Path) -> Iterator[Shelf]:
    root = tmp_path / "models"
    shutil.copytree(reversal.bundle, root / "first")
    with shelf_of(root) as shelf:
        yield shelf


def failed(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details()


def load_entry(shelf: Shelf, name: str) -> admin.Entry:
    return shelf.admin.LoadEntry(admin.LoadEntryRequest(name=name), timeout=PATIENCE).entry


def unload_entry(shelf: Shelf, name: str) -> admin.Entry:
    return shelf.admin.UnloadEntry(admin.UnloadEntryRequest(name=name), timeout=PATIENCE).entry


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
    gates: list[Gated] = []

    def load(bundle: Path) -> ServedModel:
        model = LOAD(bundle)
        gates.append(Gated(model.steps))
        return replace(model, steps=gates[-1])

    with shelf_of(tmp_path, load) as shelf:
        before = generate(shelf.running.stub)
        old = shelf.running.engine
        gates[0].wait()
        change(tmp_path / "model", version="2")
        shelf.reload()
        assert [one.version for one in shelf.running.server.models.all] == ["2", "1"]
        after = generate(shelf.running.stub)
        gates[1].open()
        assert after.result(PATIENCE).model.version == "2"
        assert not before.done()
        gates[0].open()
        answer = before.result(PATIENCE)
        assert (answer.model.version, answer.hypotheses[0].text) == ("1", "hgfedcba")
        shelf.until_retired()
        assert not old.alive
        assert [one.version for one in shelf.running.server.models.all] == ["2"]


def test_fault_38_under_load_every_call_is_answered_wholly_by_one_version(shelf: Shelf) -> None:
    """Twenty clients ask all the time while the model is swapped again and again."""
    over, versions = threading.Event(), [str(number) for number in range(2, 2 + SWAPS)]
    asked = threading.Barrier(CLIENTS + 1)

    def client(number: int) -> set[str]:
        seen, text, first = set(), "abcdefgh"[: 3 + number % 6], True
        with grpc.insecure_channel(shelf.running.address) as channel:
            stub = LimelightServiceStub(channel)
            while not over.is_set():
                answer = stub.Generate(pb.GenerateRequest(source=text), timeout=PATIENCE)
                assert answer.hypotheses[0].text == text[::-1]
                seen.add(answer.model.version)
                if first:
                    first = False
                    asked.wait(PATIENCE)
        return seen

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        try:
            asked.wait(PATIENCE)
            for version in versions:
                change(shelf.root / "first", version=version)
                entry = shelf.reload()["first"]
                assert (entry.version, entry.failure) == (version, "")
                assert shelf.ask().model.version == version
        finally:
            over.set()
        seen = [one.result(PATIENCE) for one in clients]
    assert set.union(*seen) <= {"1", *versions}
    assert all("1" in one and len(one) > 1 for one in seen)
    shelf.until_retired()
    assert [one.version for one in shelf.running.server.models.all] == [versions[-1]]
    shelf.running.until_idle()


def truncate(bundle: Path) -> None:
    path = bundle / "fp32" / "weights.bin"
    os.truncate(path, path.stat().st_size // 2)


def tamper(bundle: Path) -> None:
    path = bundle / "fp32" / "decoder.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def mistake_graphs(bundle: Path) -> None:
    """Every checksum is right, but the decoder is the encoder: its signature is another."""
    values = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    shutil.copy(bundle / "fp32" / "encoder.onnx", bundle / "fp32" / "decoder.onnx")
    values["files"]["fp32/decoder.onnx"] = values["files"]["fp32/encoder.onnx"]
    (bundle / MANIFEST).write_text(json.dumps(values), encoding="utf-8")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "half written": (truncate, "first/.*weights.bin: does not match its checksum"),
    "tampered with": (tamper, "first/fp32/decoder.onnx: does not match its checksum"),
    "a file missing": (lambda bundle: (bundle / "fp32" / "encoder.onnx").unlink(), "first/fp32/encoder.onnx: missing"),
    "no manifest to read": (lambda bundle: os.truncate(bundle / MANIFEST, 1), "first/bundle.json: "),
    "another signature": (mistake_graphs, "decoder.onnx: .* the manifest says"),
    "another format": (lambda bundle: change(bundle, format=99), "first/bundle.json: format 99"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", BROKEN)
def test_fault_39_what_cannot_be_loaded_leaves_the_old_one_serving(
    shelf: Shelf, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, message = BROKEN[what]
    spoil(shelf.root / "first")
    with caplog.at_level(logging.ERROR):
        entry = shelf.reload()["first"]
        shelf.reload()
    assert len(caplog.records) == 1  # once, though it was looked at twice
    assert (entry.state, entry.version) == (admin.ENTRY_STATE_FAILED, "1")
    code, details = failed(lambda: load_entry(shelf, "first"))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert details == entry.failure
    with pytest.raises(BundleError, match=message):
        raise BundleError(details)
    assert str(shelf.root) not in details
    assert tempfile.gettempdir() not in details
    assert shelf.ask("abcdefgh").hypotheses[0].text == "hgfedcba"


def test_fault_39_a_bundle_that_is_mended_is_served(shelf: Shelf, reversal: Reversal) -> None:
    truncate(shelf.root / "first")
    shelf.reload()
    shelf.put(reversal.bundle, "first", version="2")
    entry = shelf.reload()["first"]
    assert (entry.state, entry.version, entry.failure) == (admin.ENTRY_STATE_READY, "2", "")


def test_fault_39_whoever_writes_into_the_folder_does_not_hurt_what_answers(shelf: Shelf) -> None:
    """Graphs are mapped from their file: were it this one, the process would die of what is cut off."""
    for path in sorted((shelf.root / "first").rglob("*")):
        if path.is_file():
            os.truncate(path, 0)
    assert shelf.ask("abcdefgh").hypotheses[0].text == "hgfedcba"


def test_fault_39_whatever_a_damaged_bundle_raises_is_its_own_failure(
    shelf: Shelf, reversal: Reversal, caplog: pytest.LogCaptureFixture
) -> None:
    shelf.put(reversal.bundle, "good", version="2")
    (shelf.root / "deep").mkdir()
    (shelf.root / "deep" / MANIFEST).write_text("[" * 200_000, encoding="utf-8")
    shelf.put(reversal.bundle, "circle", version="3")
    (shelf.root / "circle" / "link").symlink_to("link")
    with caplog.at_level(logging.ERROR):
        found = shelf.reload()
    assert found["good"].state == admin.ENTRY_STATE_READY
    assert found["deep"].state == admin.ENTRY_STATE_FAILED
    assert found["deep"].failure
    assert ("reversal", "2") in shelf.served()


def test_a_reload_that_nobody_waits_for_is_done_all_the_same(reversal: Reversal, tmp_path: Path) -> None:
    shutil.copytree(reversal.bundle, tmp_path / "model")
    may, begun = threading.Event(), threading.Event()
    may.set()

    def load(bundle: Path) -> ServedModel:
        begun.set()
        assert may.wait(PATIENCE)
        return LOAD(bundle)

    with shelf_of(tmp_path, load) as shelf:
        may.clear()
        begun.clear()
        change(tmp_path / "model", version="2")
        call = shelf.admin.Reload.future(admin.ReloadRequest(), timeout=PATIENCE)
        assert begun.wait(PATIENCE)
        call.cancel()
        may.set()
        entry = shelf.reload()["model"]
        assert (entry.state, entry.version, entry.failure) == (admin.ENTRY_STATE_READY, "2", "")
        assert shelf.ask().model.version == "2"


def test_fault_34_a_model_that_was_swapped_out_and_hangs_is_noticed(reversal: Reversal, tmp_path: Path) -> None:
    shutil.copytree(reversal.bundle, tmp_path / "model")
    gates: list[Gated] = []

    def load(bundle: Path) -> ServedModel:
        model = LOAD(bundle)
        gates.append(Gated(model.steps))
        return replace(model, steps=gates[-1])

    models = Models(EngineLimits())
    folder = ModelFolder(tmp_path, load, models)
    begin(folder.load_all()).result(PATIENCE)
    server = begin(create_server(models, ServerOptions(port=0, watchdog=0.5), folder)).result(PATIENCE)
    try:
        old = models.find("").engine
        old.submit(job([4, END]))
        gates[0].wait()
        change(tmp_path / "model", version="2")
        begin(folder.reload()).result(PATIENCE)
        begin(asyncio.wait_for(server.failed.wait(), PATIENCE)).result(PATIENCE)
        assert old.failed
    finally:
        for gate in gates:
            gate.open()
        begin(server.stop(0)).result(PATIENCE)


def test_a_bundle_whose_manifest_is_gone_goes_on_answering(reversal: Reversal, tmp_path: Path) -> None:
    bundle = shutil.copytree(reversal.bundle, tmp_path / "model")
    with shelf_of(bundle) as shelf:
        (bundle / MANIFEST).rename(tmp_path / MANIFEST)
        entry = shelf.reload()["model"]
        assert (entry.state, entry.failure) == (admin.ENTRY_STATE_FAILED, "model: its bundle.json is gone")
        assert shelf.ask().model.version == "1"


def test_a_refused_swap_does_not_change_which_version_is_the_newest(shelf: Shelf, reversal: Reversal) -> None:
    for version in ("b1", "a2"):
        shelf.put(reversal.bundle, version, version=version)
        shelf.reload()
    change(shelf.root / "b1", version="a2")
    assert shelf.reload()["b1"].failure == "reversal a2 is served already"
    assert shelf.ask().model.version == "a2"


def test_a_version_of_very_many_digits_is_a_version(shelf: Shelf, reversal: Reversal) -> None:
    long = "1" + "0" * 5000
    shelf.put(reversal.bundle, "long", version=long)
    shelf.reload()
    assert [version for _, version in shelf.served()] == ["1", long]
    assert shelf.ask().model.version == long


def test_a_folder_that_is_gone_changes_nothing(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    shelf.root.rename(shelf.root.with_name("elsewhere"))
    code, _ = failed(shelf.reload)
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    with caplog.at_level(logging.ERROR):
        begin(shelf.folder.look_again()).result(PATIENCE)
    assert "there is no such folder" in caplog.text
    assert shelf.ask().hypotheses[0].text == "cba"


NO_NAMES = ["", ".", "..", "../first", "first/../first", "/etc", "first/", "./first", "first\0", "..\\first", "a//b"]


@pytest.mark.parametrize("call", [load_entry, unload_entry])
def test_fault_40_a_path_is_no_name(shelf: Shelf, call: Callable[[Shelf, str], Any]) -> None:
    refused = (grpc.StatusCode.INVALID_ARGUMENT, "name: is no name of an entry of the model folder")
    for name in NO_NAMES:
        assert failed(partial(call, shelf, name)) == refused, name
    unknown = (grpc.StatusCode.NOT_FOUND, "the model folder has no entry 'elsewhere'")
    assert failed(partial(call, shelf, "elsewhere")) == unknown
    assert shelf.served() == [("reversal", "1")]


def test_fault_40_a_link_out_of_the_folder_is_not_followed(shelf: Shelf, reversal: Reversal, tmp_path: Path) -> None:
    outside = shutil.copytree(reversal.bundle, tmp_path / "outside")
    change(outside, version="2")
    (shelf.root / "link").symlink_to(outside, target_is_directory=True)
    entry = shelf.reload()["link"]
    assert (entry.state, entry.version) == (admin.ENTRY_STATE_FAILED, "")
    assert entry.failure == "link: a link that leads out of the model folder"
    assert shelf.served() == [("reversal", "1")]


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
