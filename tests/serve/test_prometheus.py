"""A real Prometheus scrapes real servers under a little load: every query of the dashboard gives figures."""

import json
import os
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
import yaml

from bench.load.authority import pair
from bench.soak import free_port
from serve.bundle import ServedModel
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.security import Security
from tests.serve.faults import until
from tests.serve.running import PATIENCE, Running, generate, score, serving, stream
from tests.serve.test_alerts import FOLDER, RULES
from tests.serve.test_dashboard import PANELS, VARIABLES

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")

SCRAPES = int(os.environ.get("LIMELIGHT_TEST_SCRAPES", "12"))
"""After which it is asked; there is one a second."""

LOOK = 0.2
"""Seconds between two looks at Prometheus."""

TARGETS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]

JOB, WITH_TLS = "limelight", "limelight-tls"


class Prometheus:
    """One that runs.

    Args:
        address: of its API.
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def get(self, path: str, **parameters: str) -> Any:
        """What it answers."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self._address}{path}?{query}", timeout=PATIENCE) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return found["data"]

    def value(self, query: str) -> list[float]:
        """Of every series that a query gives now."""
        found = self.get("/api/v1/query", query=query)
        assert found["resultType"] == "vector"
        return [float(series["value"][1]) for series in found["result"]]

    def has_scraped(self, times: int) -> bool:
        """Whether it has so often by now; looked at not too often."""
        time.sleep(LOOK)
        return sum(self.value(f'count_over_time(up{{job="{JOB}"}}[1h])')) >= times

    def is_ready(self) -> bool:
        with suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{self._address}/-/ready", timeout=PATIENCE).close()
            return True
        return False


def configuration(plain: Running, secured: Running, ca: Path) -> dict[str, Any]:
    def job(name: str, running: Running, **more: Any) -> dict[str, Any]:
        targets = [{"targets": [f"127.0.0.1:{running.server.metrics_port}"]}]
        return {"job_name": name, "static_configs": targets, **more}

    return {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(FOLDER / "alerts.yaml")],
        "scrape_configs": [
            job(JOB, plain),
            job(WITH_TLS, secured, scheme="https", tls_config={"ca_file": str(ca)}),
        ],
    }


@contextmanager
def asked(running: Running) -> Iterator[None]:
    """A little of everything is asked meanwhile."""
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.05):
            generate(running.stub).result(PATIENCE)
            list(stream(running.stub, "abcd"))
            score(running.stub).result(PATIENCE)
            items = [pb.GenerateManyRequest(id=text, request=pb.GenerateRequest(source=text)) for text in ("ab", "")]
            list(running.stub.GenerateMany(iter(items), timeout=PATIENCE))
            assert generate(running.stub, "").exception(PATIENCE).code() is grpc.StatusCode.INVALID_ARGUMENT

    thread = threading.Thread(target=ask, name="asking")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def prometheus(served: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has scraped two servers, one of them over TLS, as often as is to be."""
    folder = tmp_path_factory.mktemp("prometheus")
    own = pair(folder / "tls", trustme.CA())
    security = Security(tls_certificate=own.certificate, tls_key=own.key, metrics_tls=True)
    with ExitStack() as stack:
        plain = stack.enter_context(serving(served, metrics_port=0))
        secured = stack.enter_context(serving(served, metrics_port=0, security=security))
        file = folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(configuration(plain, secured, own.ca)), encoding="utf-8")
        address = f"127.0.0.1:{free_port()}"
        options = (f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}")
        log = stack.enter_context((folder / "log").open("wb"))
        process = stack.enter_context(subprocess.Popen(["prometheus", *options], stderr=log, stdout=log))
        stack.callback(process.terminate)
        prometheus = Prometheus(f"http://{address}")
        with asked(plain):
            until(prometheus.is_ready)
            for number in range(SCRAPES):
                until(partial(prometheus.has_scraped, number + 1))
            yield prometheus


def test_every_server_is_scraped_over_tls_too(prometheus: Prometheus) -> None:
    targets = prometheus.get("/api/v1/targets")["activeTargets"]
    told = {target["labels"]["job"]: (target["health"], target["lastError"]) for target in targets}
    assert told == {JOB: ("up", ""), WITH_TLS: ("up", "")}
    assert prometheus.value("limelight_certificate_seconds_left > 0")


@pytest.mark.parametrize(
    ("title", "query"), TARGETS, ids=[f"{title} {number}" for number, (title, _) in enumerate(TARGETS)]
)
def test_every_query_of_the_dashboard_gives_figures(prometheus: Prometheus, title: str, query: str) -> None:
    """Nothing is empty by nature here: errors are asked for, and what was never lost or tried again has a rate of 0."""
    for name, value in {"$__rate_interval": "10s", "$job": JOB, "$instance": ".*"}.items():
        query = query.replace(name, value)
    assert "$" not in query
    values = prometheus.value(query)
    assert values, title
    assert all(value == value and value >= 0 for value in values), (title, values)  # noqa: PLR0124  # NaN is not itself


def test_the_dashboards_variables_find_the_servers(prometheus: Prometheus) -> None:
    definitions = {name: variable["definition"] for name, variable in VARIABLES.items() if "definition" in variable}
    assert definitions.keys() == {"job", "instance"}
    for name, definition in definitions.items():
        selector = definition.removeprefix("label_values(").removesuffix(f", {name})").replace("$job", ".*")
        values = prometheus.get(f"/api/v1/label/{name}/values", **{"match[]": selector})
        assert len(values) == 2


def test_the_alerts_are_evaluated_and_none_fires(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = prometheus.get("/api/v1/rules")["groups"][0]["rules"]
        return found

    until(lambda: all(rule["health"] == "ok" for rule in rules()))
    assert {rule["name"] for rule in rules()} == {rule["alert"] for rule in RULES}
    assert [rule["name"] for rule in rules() if rule["state"] == "firing"] == []
