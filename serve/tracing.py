"""Traces for OpenTelemetry: a span for each call, under its client's, and in it what the engine did with each job.

Only `otlp_endpoint` has this module imported: it needs `limelight[tracing]`. Spans are handed over by a thread of the
SDK, in batches, from a queue of bounded length: a collector that is slow or away costs spans, not answers.
"""

from __future__ import annotations  # grpc's classes are generic to mypy alone

import os
import time
from collections.abc import Mapping
from threading import Thread

import grpc
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serve.jobs import Decoded, Ticket
from serve.models import Serving

PATH = "/v1/traces"
"""Of a collector, after its endpoint: https://opentelemetry.io/docs/specs/otlp/"""

TIMEOUT = 5.0
"""Seconds that handing over one batch may take."""

FAULTS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}
"""Codes that make a server's span an error; others are its client's affair: semantic conventions of RPC spans."""

NANOSECONDS = 1_000_000_000


class Tracing:
    """Makes spans.

    Args:
        exporter: hands spans over.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "limelight")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("limelight")
        self._propagator = TraceContextTextMapPropagator()

    def begun(self, method: str, metadata: Mapping[str, str | bytes], request_id: str) -> CallSpan:
        """The span of a call that has just come.

        Args:
            method: with its service: /package.Service/Method.
            metadata: of the call, with its W3C trace context, if it has one.
            request_id: as the log names the call.
        """
        service, _, name = method.removeprefix("/").rpartition("/")
        attributes = {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": name,
            "limelight.request_id": request_id,
        }
        carrier = {key: value for key, value in metadata.items() if isinstance(value, str)}
        parent = self._propagator.extract(carrier)
        span = self._tracer.start_span(f"{service}/{name}", parent, SpanKind.SERVER, attributes)
        return CallSpan(self._tracer, span)

    def stop(self, seconds: float) -> None:
        """Hand over what was not yet, as far as that can be done in time."""
        # The SDK waits for a collector as long as it likes.
        stopping = Thread(target=self._provider.shutdown, name="limelight-tracing-stop", daemon=True)
        stopping.start()
        stopping.join(seconds)


class CallSpan:
    """The span of one call.

    Attributes:
        trace_id: that it belongs to, in 32 hexadecimal digits.
    """

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer, self._span = tracer, span
        self._inside = set_span_in_context(span)
        self.trace_id = format_trace_id(span.get_span_context().trace_id)

    def job(self, ticket: Ticket, serving: Serving) -> None:
        """What became of a job in a model's engine: a span of its time in the queue, and one of being decoded."""
        if not self._span.is_recording():
            return
        model = {"limelight.model.name": serving.name, "limelight.model.version": serving.version}
        self._span.set_attributes(model)
        timings = ticket.timings
        arrived = time.time_ns() - round(NANOSECONDS * ticket.age)
        begun = arrived + round(NANOSECONDS * timings.queue)
        self._child("queue", arrived, begun, model)
        if timings.decode:  # else its turn never came
            self._child("decode", begun, begun + round(NANOSECONDS * timings.decode), model | _figures(ticket))

    def _child(self, name: str, start: int, end: int, attributes: Mapping[str, str | int]) -> None:
        self._tracer.start_span(name, self._inside, attributes=attributes, start_time=start).end(end)

    def ended(self, code: grpc.StatusCode, reason: str) -> None:
        """The call has ended so."""
        self._span.set_attributes({"rpc.grpc.status_code": code.value[0], "limelight.reason": reason})
        if code in FAULTS:
            self._span.set_attribute("error.type", code.name)
            self._span.set_status(StatusCode.ERROR, reason)
        self._span.end()


def exporter_to(endpoint: str) -> SpanExporter:
    """What hands spans over to a collector, by OTLP over HTTP."""
    return OTLPSpanExporter(f"{endpoint.rstrip('/')}{PATH}", timeout=TIMEOUT)


def _figures(ticket: Ticket) -> dict[str, str | int]:
    job, decoded = ticket.job, _result(ticket)
    figures: dict[str, str | int] = {
        "limelight.rows": job.options.beam_size,
        "limelight.source_tokens": len(job.source),
    }
    if decoded is not None:
        figures["limelight.target_tokens"] = len(decoded.hypotheses[0].tokens)
    return figures


def _result(ticket: Ticket) -> Decoded | None:
    """None where it failed or was given up."""
    future = ticket.future
    return None if not future.done() or future.cancelled() or future.exception() else future.result()
