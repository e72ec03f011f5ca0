"""Spans of calls: whose they are, what they say, and that a collector which is away holds nobody up."""

import dataclasses
import http.server
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from model.errors import ConfigError
from serve.bundle import ServedModel
from serve.jobs import EngineLimits
from serve.logs import written
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.settings import read_settings
from serve.tracing import PATH, Tracing
from tests.reversal import Reversal
from tests.serve.running import PATIENCE, Running, generate, score, serving, stream
from tests.serve.steps import Echo, Gated
from tests.serve.test_cli import limelight, without
from tests.serve.test_logs import Failing, Log, told_id
from tests.serve.test_status import failed

REPOSITORY = Path(__file__).parents[2]

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, LEFT_OUT = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"

SERVICE = "limelight.v1.LimelightService"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Takes the place of a collector; has all spans once the server has stopped."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr("serve.tracing.exporter_to", lambda endpoint: exporter)
    return exporter


def traced(model: ServedModel, **options: Any) -> Any:
    return serving(model, otlp_endpoint="http://collector", **options)


def with_context(running: Running, traceparent: str, source: str = "abc", **more: str) -> Any:
    request = pb.GenerateRequest(source=source)
    metadata = (("traceparent", traceparent), *more.items())
    return running.stub.Generate.future(request, timeout=PATIENCE, metadata=metadata)


def calls(memory: InMemorySpanExporter) -> list[ReadableSpan]:
    return [span for span in memory.get_finished_spans() if span.kind is SpanKind.SERVER]


def inside(memory: InMemorySpanExporter, call: ReadableSpan) -> list[ReadableSpan]:
    """What the engine did for a call, in order of its beginning."""
    found = [span for span in memory.get_finished_spans() if span.parent and span.parent.span_id == span_id(call)]
    return sorted(found, key=lambda span: span.start_time or 0)


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    found: int = span.context.span_id
    return found


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_call_is_a_span_of_its_clients_trace(served: ServedModel, memory: InMemorySpanExporter) -> None:
    with traced(served) as running:
        call = with_context(running, SAMPLED, tracestate="vendor=1")
        assert call.result(PATIENCE).hypotheses
    (span,) = calls(memory)
    assert span.context is not None
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE
    assert (f"{span.parent.span_id:016x}", span.parent.is_remote) == (PARENT, True)
    assert span.context.trace_state.to_header() == "vendor=1"
    assert span.name == f"{SERVICE}/Generate"
    assert attributes(span) == {
        "rpc.system": "grpc",
        "rpc.service": SERVICE,
        "rpc.method": "Generate",
        "rpc.grpc.status_code": 0,
        "limelight.reason": "OK",
        "limelight.request_id": told_id(call),
        "limelight.model.name": "reversal",
        "limelight.model.version": "1",
    }
    assert span.status.status_code is StatusCode.UNSET
    assert span.resource.attributes["service.name"] == "limelight"


def test_queue_and_decode_are_spans_inside(served: ServedModel, memory: InMemorySpanExporter) -> None:
    with traced(served) as running:
        request = pb.GenerateRequest(source="abc", search=pb.SearchOptions(beam_size=2))
        answer = running.stub.Generate(request, timeout=PATIENCE)
    (call,) = calls(memory)
    queue, decode = inside(memory, call)
    assert (queue.name, decode.name) == ("queue", "decode")
    model = {"limelight.model.name": "reversal", "limelight.model.version": "1"}
    assert attributes(queue) == model
    assert attributes(decode) == model | {
        "limelight.rows": 2,
        "limelight.source_tokens": 4,
        "limelight.target_tokens": len(answer.hypotheses[0].tokens),
    }
    times = [call.start_time, queue.start_time, queue.end_time, decode.start_time, decode.end_time, call.end_time]
    assert times == sorted(times, key=lambda time: time or 0)
    assert queue.end_time == decode.start_time
    assert answer.timings.decode_seconds == pytest.approx(_seconds(decode), abs=1e-6)


def _seconds(span: ReadableSpan) -> float:
    assert span.end_time is not None
    assert span.start_time is not None
    return (span.end_time - span.start_time) / 1e9


Begin = Callable[[Any], Any]


@pytest.mark.parametrize(("begin", "method"), [(stream, "GenerateStream"), (score, "Score")])
def test_the_other_calls_are_traced_too(
    served: ServedModel, memory: InMemorySpanExporter, begin: Begin, method: str
) -> None:
    with traced(served) as running:
        call = begin(running.stub)
        assert list(call) if begin is stream else call.result(PATIENCE)
    (span,) = calls(memory)
    assert (span.name, span.parent) == (f"{SERVICE}/{method}", None)
    assert [child.name for child in inside(memory, span)] == ["queue", "decode"]


def test_each_of_many_has_its_spans(served: ServedModel, memory: InMemorySpanExporter) -> None:
    items = [pb.GenerateManyRequest(id=text, request=pb.GenerateRequest(source=text)) for text in ("a", "abc", "")]
    with traced(served) as running:
        assert len(list(running.stub.GenerateMany(iter(items), timeout=PATIENCE))) == 3
    (span,) = calls(memory)
    found = inside(memory, span)
    assert sorted(child.name for child in found) == ["decode", "decode", "queue", "queue"]
    tokens = {attributes(child).get("limelight.source_tokens") for child in found if child.name == "decode"}
    assert tokens == {2, 4}


def test_a_clients_mistake_is_no_error_of_the_server(served: ServedModel, memory: InMemorySpanExporter) -> None:
    with traced(served) as running:
        assert failed(generate(running.stub, ""))
    (span,) = calls(memory)
    assert span.status.status_code is StatusCode.UNSET
    found = attributes(span)
    assert (found["rpc.grpc.status_code"], found["limelight.reason"]) == (3, "INVALID_FIELD")
    assert "error.type" not in found
    assert inside(memory, span) == []


def test_a_fault_of_the_server_is_marked(served: ServedModel, memory: InMemorySpanExporter) -> None:
    with traced(dataclasses.replace(served, steps=Failing())) as running:
        assert failed(generate(running.stub, "ab"))
    (span,) = calls(memory)
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "INTERNAL")
    found = attributes(span)
    assert (found["rpc.grpc.status_code"], found["error.type"]) == (13, "INTERNAL")
    _, decode = inside(memory, span)
    assert "limelight.target_tokens" not in attributes(decode)


def test_what_is_cancelled_in_the_queue_was_not_decoded(served: ServedModel, memory: InMemorySpanExporter) -> None:
    steps = Gated(Echo())
    with traced(dataclasses.replace(served, steps=steps)) as running:
        first = generate(running.stub, "ab")
        steps.wait()
        second = generate(running.stub, "ab")
        while not running.engine.waiting:
            pass
        second.cancel()
        while running.server._calls.in_flight > 1:
            pass
        steps.open()
        assert first.result(PATIENCE)
    cancelled, answered = calls(memory)
    assert (attributes(cancelled)["rpc.grpc.status_code"], cancelled.status.status_code) == (1, StatusCode.UNSET)
    assert [span.name for span in inside(memory, cancelled)] == ["queue"]
    assert [span.name for span in inside(memory, answered)] == ["queue", "decode"]


def test_what_the_client_does_not_sample_is_not_kept(served: ServedModel, memory: InMemorySpanExporter) -> None:
    with traced(served) as running:
        assert with_context(running, LEFT_OUT).result(PATIENCE).hypotheses
    assert memory.get_finished_spans() == ()


@pytest.mark.parametrize("wrong", ["", "00-xyz", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "x" * 1000])
def test_a_context_that_is_none_begins_a_new_trace(
    served: ServedModel, memory: InMemorySpanExporter, wrong: str
) -> None:
    with traced(served) as running:
        assert with_context(running, wrong).result(PATIENCE).hypotheses
    (span,) = calls(memory)
    assert span.parent is None
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" != TRACE


@pytest.mark.usefixtures("memory")
def test_lines_of_the_log_name_the_trace(served: ServedModel) -> None:
    log = Log()
    with written("json", "info", log.write), traced(served) as running:
        assert with_context(running, SAMPLED).result(PATIENCE).hypotheses
        running.until_idle()
    (line,) = log.access
    assert line["trace_id"] == TRACE


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes whatever it is sent."""

    received: SimpleQueue[tuple[str, bytes]]

    def do_POST(self) -> None:
        self.received.put((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        logging.getLogger("collector").info(format, *arguments)


@pytest.fixture
def collector() -> Iterator[str]:
    """Address of a collector that speaks OTLP over HTTP."""
    Collector.received = SimpleQueue()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_collector_gets_them(served: ServedModel, collector: str, slash: str) -> None:
    with serving(served, otlp_endpoint=f"{collector}{slash}") as running:
        assert with_context(running, SAMPLED).result(PATIENCE).hypotheses
    path, body = Collector.received.get(timeout=PATIENCE)
    assert path == PATH
    sent = ExportTraceServiceRequest.FromString(body)
    spans = [span for resource in sent.resource_spans for scope in resource.scope_spans for span in scope.spans]
    assert {span.name for span in spans} == {"queue", "decode", f"{SERVICE}/Generate"}
    assert {span.trace_id.hex() for span in spans} == {TRACE}


@pytest.fixture(params=["nobody listens", "nobody answers"])
def absent(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a collector that is away, or stuck."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if request.param == "nobody answers":
            yield address
            return
    yield address


def test_fault_42_a_collector_that_is_away_holds_nobody_up(served: ServedModel, absent: str) -> None:
    with serving(served, otlp_endpoint=absent) as running:
        for _ in range(20):
            assert generate(running.stub, "ab").result(PATIENCE).hypotheses
        assert running.stop().result(PATIENCE) is True


class Stuck(SpanExporter):
    """Does not come back until it is released."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()
        self.count = 0

    def export(self, spans: Any) -> SpanExportResult:
        self.entered.set()
        assert self.released.wait(PATIENCE)
        self.count += len(spans)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        pass


def test_fault_42_spans_that_nobody_takes_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    exporter, most, batch = Stuck(), 2048, 512
    tracing = Tracing(exporter)
    with caplog.at_level(logging.ERROR):
        for number in range(3 * most):
            tracing.begun(f"/{SERVICE}/Generate", {}, str(number)).ended(grpc.StatusCode.OK, "OK")
    assert exporter.entered.wait(PATIENCE)
    exporter.released.set()
    tracing.stop(PATIENCE)
    assert most <= exporter.count <= most + batch


def test_without_it_nothing_is_imported() -> None:
    script = "import json, sys; import serve.cli, serve.server; print(json.dumps(sorted(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    modules = json.loads(done.stdout)
    assert "serve.observer" in modules
    assert [name for name in modules if name.startswith(("opentelemetry", "serve.tracing"))] == []


def test_what_it_needs_is_told(tmp_path: Path, reversal: Reversal) -> None:
    arguments = ["serve", str(reversal.bundle), "--port=0", "--otlp-endpoint=http://127.0.0.1:4318"]
    done = limelight(*arguments, env=without("opentelemetry", tmp_path))
    message = "error: this command needs the package 'opentelemetry': pip install 'limelight[tracing]'\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_an_endpoint_is_a_url() -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint: String should match pattern"):
        read_settings(None, {"otlp_endpoint": "127.0.0.1:4318"}, {})


def test_it_is_off_by_default(served: ServedModel) -> None:
    with serving(served, EngineLimits()) as running:
        assert running.server._parts.observer._tracing is None
