"""Whatever is wrong with a model folder, what answers goes on answering, and no call is lost."""

import asyncio
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from export.manifest import MANIFEST, BundleError
from model.vocabulary import END
from serve.bundle import ServedModel
from serve.folder import ModelFolder
from serve.jobs import EngineLimits
from serve.models import Models
from serve.pb.limelight.v1 import admin_pb2 as admin
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub
from serve.server import ServerOptions, create_server
from tests.reversal import Reversal
from tests.serve.jobs import job
from tests.serve.running import PATIENCE, begin
from tests.serve.shelf import LOAD, GatedLoad, Shelf, change, failed, load_entry, shelf_of, truncate, unload_entry

SWAPS, CLIENTS = int(os.environ.get("LIMELIGHT_TEST_SWAPS", "10")), 20


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
    load = GatedLoad()
    models = Models(EngineLimits())
    folder = ModelFolder(tmp_path, load, models)
    begin(folder.load_all()).result(PATIENCE)
    server = begin(create_server(models, ServerOptions(port=0, watchdog=0.5), folder)).result(PATIENCE)
    try:
        old = models.find("").engine
        old.submit(job([4, END]))
        load.gates[0].wait()
        change(tmp_path / "model", version="2")
        begin(folder.reload()).result(PATIENCE)
        begin(asyncio.wait_for(server.failed.wait(), PATIENCE)).result(PATIENCE)
        assert old.failed
    finally:
        for gate in load.gates:
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
