"""What Prometheus is told, read with its own parser."""

import dataclasses
import logging
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator

import grpc
import pytest

from serve.bundle import ServedModel
from serve.errors import AddressError
from serve.jobs import EngineLimits
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.server import ServerOptions, create_server
from tests.serve.faults import until
from tests.serve.jobs import MIDDLE, SHORT, job, tokens
from tests.serve.running import PATIENCE, Running, begin, generate, models_of, score, serving, stream
from tests.serve.scraping import families, open_families, page, scrape, value
from tests.serve.shelf import Shelf
from tests.serve.steps import Echo, Gated


@pytest.fixture
def scraped(served: ServedModel) -> Iterator[tuple[Running, Gated]]:
    steps = Gated(Echo())
    with serving(dataclasses.replace(served, steps=steps), EngineLimits(queue=1), metrics_port=0) as running:
        yield running, steps
        steps.open()


def test_each_call_is_counted_by_its_reason(scraped: tuple[Running, Gated]) -> None:
    running, steps = scraped
    steps.open()
    assert generate(running.stub, "ab").result(PATIENCE)
    assert score(running.stub, "ab").result(PATIENCE)
    assert list(stream(running.stub, "abc"))
    for _ in range(2):
        with pytest.raises(grpc.RpcError):
            generate(running.stub, "").result(PATIENCE)
    items = [pb.GenerateManyRequest(id=source, request=pb.GenerateRequest(source=source)) for source in ("ab", "")]
    assert len(list(running.stub.GenerateMany(iter(items), timeout=PATIENCE))) == 2
    running.until_idle()
    figures = scrape(running)
    for method, code, reason, count in (
        ("Generate", "OK", "OK", 1),
        ("Generate", "INVALID_ARGUMENT", "INVALID_FIELD", 2),
        ("Score", "OK", "OK", 1),
        ("GenerateStream", "OK", "OK", 1),
        ("GenerateMany", "OK", "OK", 1),
    ):
        assert value(figures, "requests_total", method=method, code=code, reason=reason) == count
    assert value(figures, "items_total", code="OK", reason="OK") == 1
    assert value(figures, "items_total", code="INVALID_ARGUMENT", reason="INVALID_FIELD") == 1
    assert value(figures, "request_seconds_count", method="Generate") == 3
    assert value(figures, "queue_seconds_count") == value(figures, "decode_seconds_count") == 4
    assert value(figures, "first_token_seconds_count") == 1
    assert value(figures, "between_tokens_seconds_count") == 3  # three letters and the end token
    assert value(figures, "generated_tokens_total") == 3 + 4 + 3  # what is scored is not generated
    assert value(figures, "source_tokens_total") == 3 + 3 + 4 + 3
    assert value(figures, "padded_source_tokens_total") == 3 + 3 + 4 + 3
    assert value(figures, "steps_total") == value(figures, "row_steps_total") == 3 + 4 + 3


def test_what_is_under_way_is_told_and_goes_back_to_nothing(scraped: tuple[Running, Gated]) -> None:
    running, steps = scraped
    first = generate(running.stub, "ab")
    steps.wait()
    waiting = generate(running.stub, "abc")
    while not running.engine.waiting:
        pass
    with pytest.raises(grpc.RpcError):
        generate(running.stub, "ab").result(PATIENCE)
    while running.server._calls.in_flight > 2:
        pass
    figures = scrape(running)
    assert value(figures, "queue_length") == value(figures, "queue_limit") == 1
    assert (value(figures, "rows"), value(figures, "rows_limit")) == (1, EngineLimits().rows)
    assert value(figures, "calls_in_flight") == 2
    assert value(figures, "engine_silent_seconds") > 0
    full = {"method": "Generate", "code": "RESOURCE_EXHAUSTED", "reason": "QUEUE_FULL"}
    assert value(figures, "requests_total", **full) == 1
    waiting.cancel()
    steps.open()
    assert first.result(PATIENCE)
    running.until_idle()
    while running.engine.waiting or running.engine.rows:
        generate(running.stub, "ab").result(PATIENCE)
    figures = scrape(running)
    assert [value(figures, name) for name in ("queue_length", "rows", "calls_in_flight")] == [0, 0, 0]
    cancelled = {"method": "Generate", "code": "CANCELLED", "reason": "CANCELLED"}
    while not value(figures := scrape(running), "requests_total", **cancelled):
        pass  # a call is no longer in flight a moment before its handler has ended
    assert value(figures, "requests_total", **cancelled) == 1


def test_the_model_and_the_process_are_told(scraped: tuple[Running, Gated], served: ServedModel) -> None:
    figures = scrape(scraped[0])
    manifest = served.manifest
    about = {"name": manifest.name, "version": manifest.version, "precision": "fp32", "provider": "cpu"}
    assert value(figures, "model_info", **about) == 1
    assert figures["process_resident_memory_bytes", ()] > 1e7
    assert figures["process_max_fds", ()] > figures["process_open_fds", ()] > 0


def test_the_event_loop_is_looked_at_again_and_again(scraped: tuple[Running, Gated]) -> None:
    running, _ = scraped
    looks: list[float] = []
    while len(set(looks)) < 3:
        looks.append(value(scrape(running), "loop_lag_seconds_count"))
    assert looks == sorted(looks)
    assert value(scrape(running), "loop_lag_seconds_bucket", le="+Inf") >= looks[-1]


def test_both_formats_are_as_their_parsers_want_them(scraped: tuple[Running, Gated]) -> None:
    running, steps = scraped
    steps.open()
    assert generate(running.stub, "ab").result(PATIENCE)
    running.until_idle()
    told = families(running)
    assert all(family.documentation for family in told)
    kinds = {family.name: family.type for family in told}
    assert len(kinds) == len(told)
    assert [name for name in kinds if not name.startswith(("limelight_", "process_"))] == []
    # When a series began is a figure of its own in the older format, and a part of the series in the newer one.
    opened = {family.name: family.type for family in open_families(running)}
    assert opened == {name: kind for name, kind in kinds.items() if not name.endswith("_created")}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say(scraped: tuple[Running, Gated]) -> None:
    running, steps = scraped
    steps.open()
    assert generate(running.stub, "ab").result(PATIENCE)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=page(running), capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_how_full_batches_are_and_what_padding_costs(served: ServedModel) -> None:
    steps = Gated(Echo())
    with serving(dataclasses.replace(served, steps=steps), metrics_port=0) as running:
        first = generate(running.stub, "a")
        steps.wait()
        others = [running.engine.submit(job(source)) for source in (SHORT, MIDDLE)]
        steps.open()
        assert first.result(PATIENCE).hypotheses
        assert [tokens(other) for other in others] == [SHORT, MIDDLE]
        figures = scrape(running)
    assert (value(figures, "source_tokens_total"), value(figures, "padded_source_tokens_total")) == (2 + 6, 2 + 2 * 4)
    assert steps.rows == [1, 3, 2, 1, 1]
    assert (value(figures, "steps_total"), value(figures, "row_steps_total")) == (5, 8)


def test_the_port_is_told(served: ServedModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "serve.server"), serving(served, metrics_port=0) as running:
        assert f"metrics on http://127.0.0.1:{running.server.metrics_port}/metrics" in caplog.text


def test_a_scrape_that_is_reset_leaves_nothing_on_standard_error(
    served: ServedModel, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "serve.scrapes"), serving(served, metrics_port=0) as running:
        assert running.server.metrics_port is not None
        with socket.create_connection(("127.0.0.1", running.server.metrics_port), PATIENCE) as opened:
            opened.sendall(b"GET /metrics HT")
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until(lambda: "a scrape failed" in caplog.text)
        assert "limelight_rows 0.0" in page(running)
    assert capfd.readouterr().err == ""


def test_nothing_listens_where_it_is_not_asked_for(running: Running) -> None:
    assert running.server.metrics_port is None


def test_a_port_that_is_taken_is_told_of(served: ServedModel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressError, match=f"^cannot listen on 127.0.0.1:{port} for metrics: "):
            begin(create_server(models_of(served), ServerOptions(port=0, metrics_port=port))).result(PATIENCE)


def gauge(running: Running, name: str) -> float | None:
    """As a scrape would tell it."""
    return running.server._parts.metrics.registry.get_sample_value(f"limelight_{name}")


def test_it_tells_whether_it_serves(gated: Running, gate: Gated) -> None:
    call = generate(gated.stub)
    gate.wait()
    assert gauge(gated, "serving") == 1
    stopping = gated.stop()
    until(lambda: gauge(gated, "serving") == 0)
    gate.open()
    assert call.result(PATIENCE).hypotheses
    assert stopping.result(PATIENCE) is True


def test_an_engine_that_has_failed_serves_no_more(served: ServedModel) -> None:
    with serving(served) as running:
        running.engine.give_up()
        until(lambda: gauge(running, "serving") == 0)


def test_what_cannot_be_loaded_is_told_until_it_can(shelf: Shelf) -> None:
    assert gauge(shelf.running, "failed_entries") == 0
    manifest = shelf.put(shelf.root / "first", "second", version="2") / "bundle.json"
    good = manifest.read_bytes()
    manifest.write_text("{")
    shelf.reload()
    assert gauge(shelf.running, "failed_entries") == 1
    manifest.write_bytes(good)
    shelf.reload()
    assert gauge(shelf.running, "failed_entries") == 0
