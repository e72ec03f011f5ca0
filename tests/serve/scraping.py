"""What Prometheus would be told by a server, read with the parsers of its own client library."""

import urllib.request

from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.serve.running import PATIENCE, Running

Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def page(running: Running, accept: str = "text/plain") -> str:
    """What a scrape is answered with."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{running.server.metrics_port}/metrics", headers={"Accept": accept}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        text: str = answer.read().decode()
    return text


def families(running: Running) -> list[Metric]:
    """All that is told, in Prometheus' own format."""
    return list(parse_text(page(running)))


def open_families(running: Running) -> list[Metric]:
    """The same as OpenMetrics, whose parser is strict."""
    parsed: list[Metric] = list(parse_openmetrics(page(running, OPENMETRICS)))  # type: ignore[no-untyped-call]
    return parsed


def scrape(running: Running) -> Figures:
    """Every sample, by its name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families(running)
        for sample in family.samples
    }


def value(figures: Figures, name: str, /, **labels: str) -> float:
    return figures.get((f"limelight_{name}", tuple(sorted(labels.items()))), 0.0)
