"""Envoy, as `deploy/envoy/envoy.yaml` has it, in front of replicas on this machine; and what it tells of them."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.request import urlopen

import yaml

from bench.load.servers import PATIENCE, ROOT, LoadError, end

FILE = ROOT / "deploy" / "envoy" / "envoy.yaml"
"""What is run."""

ENVIRONMENT = Path(os.environ.get("LIMELIGHT_ENVOY_ENVIRONMENT", ROOT / "build" / "load" / "envoy-environment"))
"""Where `make build/load/envoy-environment/.ready` installs Envoy, unless a variable says otherwise."""

BINARY = ENVIRONMENT / "bin" / "envoy"

MISSING = f"{BINARY} is not there: make build/load/envoy-environment/.ready"
"""Why nothing can be run."""

LOOK = 0.02
"""Seconds between two looks at Envoy, which tells nothing unasked."""

Part = dict[str, Any]


class Configuration:
    """The configuration that is shipped, and what of it can be changed for a run.

    Attributes:
        whole: all of it.
    """

    def __init__(self) -> None:
        self.whole: Part = yaml.safe_load(FILE.read_text(encoding="utf-8"))

    @property
    def listener(self) -> Part:
        """Where clients come in."""
        (listener,) = self.whole["static_resources"]["listeners"]
        return cast("Part", listener)

    @property
    def connections(self) -> Part:
        """What is spoken with them."""
        ((network_filter,),) = [chain["filters"] for chain in self.listener["filter_chains"]]
        return cast("Part", network_filter["typed_config"])

    @property
    def host(self) -> Part:
        """The routes, and what holds for all of them."""
        (host,) = self.connections["route_config"]["virtual_hosts"]
        return cast("Part", host)

    @property
    def cluster(self) -> Part:
        """The replicas, and how they are chosen and watched."""
        (cluster,) = self.whole["static_resources"]["clusters"]
        return cast("Part", cluster)

    @property
    def replicas(self) -> list[Part]:
        """Socket address of each."""
        (locality,) = self.cluster["load_assignment"]["endpoints"]
        return [one["endpoint"]["address"]["socket_address"] for one in locality["lb_endpoints"]]

    def between(self, ports: Sequence[int]) -> None:
        """Stand before these, on ports of the system's choice, so that several can run on one machine."""
        for address in (self.whole["admin"]["address"], self.listener["address"]):
            address["socket_address"]["port_value"] = 0
        for address, port in zip(self.replicas, ports, strict=True):
            address["port_value"] = port

    def without_retries(self) -> None:
        """Try every call once: what the rest is measured against."""
        del self.host["retry_policy"]


@dataclass(frozen=True)
class Host:
    """What Envoy knows of a replica.

    Attributes:
        healthy: it gets calls.
        active: calls that it has in its hands.
        answered: calls that it has answered well, health checks not among them.
    """

    healthy: bool
    active: int
    answered: int


@dataclass(frozen=True)
class Envoy:
    """Envoy, while it runs.

    Attributes:
        process: of it.
        port: where clients find it.
        administration: address of its administrative page.
        folder: where its access log (`calls`) and its own log (`log`) are.
    """

    process: subprocess.Popen[bytes]
    port: int
    administration: str
    folder: Path

    @property
    def calls(self) -> list[str]:
        """Lines of its access log, as far as they are written: up to ten seconds late, or whole once it has ended."""
        return (self.folder / "calls").read_text(encoding="utf-8").splitlines()

    def counter(self, name: str) -> int:
        """A counter, such as `cluster.limelight.upstream_rq_retry`; 0 where nothing was counted yet."""
        found = _asked(self.administration, f"/stats?format=json&filter=^{name}$")["stats"]
        return sum(one["value"] for one in found)

    def host(self, port: int) -> Host:
        """What it knows of the replica on a port."""
        (cluster,) = _asked(self.administration, "/clusters?format=json")["cluster_statuses"]
        for one in cluster["host_statuses"]:
            if one["address"]["socket_address"]["port_value"] == port:
                values = {stat["name"]: int(stat.get("value", 0)) for stat in one["stats"]}
                failed = any(one["health_status"].get(f"failed_{check}") for check in CHECKS)
                return Host(not failed, values["rq_active"], values["rq_success"])
        raise LoadError(f"Envoy knows no replica on port {port}")

    def until(self, what: str, true: Callable[[], bool]) -> float:
        """Look until something has come about; returns the seconds that it took.

        Raises:
            LoadError: it did not in time, or Envoy has ended.
        """
        begun = time.monotonic()
        while not true():
            if self.process.poll() is not None or time.monotonic() - begun > PATIENCE:
                raise LoadError(f"in {PATIENCE:g} s {what} did not come about; Envoy's log ends so:\n{self.tail()}")
            time.sleep(LOOK)
        return time.monotonic() - begun

    def tail(self) -> str:
        """The end of what it says."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")[-2000:]


CHECKS = ("active_health_check", "outlier_check")
"""What can keep calls from a replica."""


@contextmanager
def proxied(configuration: Configuration, folder: Path) -> Iterator[Envoy]:
    """Run Envoy, and end it.

    Args:
        configuration: with ports of the system's choice.
        folder: an empty one, for what it writes.

    Raises:
        LoadError: it is not installed, ended, or was not ready in time.
    """
    if not BINARY.is_file():
        raise LoadError(MISSING)
    file, place = folder / "envoy.json", folder / "administration"
    file.write_text(json.dumps(configuration.whole), encoding="utf-8")
    # Without hot restart several run side by side.
    options = ("--disable-hot-restart", "--concurrency", "1", "--log-level", "warning")
    command = [str(BINARY), "--config-path", str(file), "--admin-address-path", str(place), *options]
    with (folder / "calls").open("wb") as calls, (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=calls, stderr=log)
    try:
        early = Envoy(process, 0, "", folder)
        early.until("Envoy's administrative page", lambda: place.is_file() and bool(place.stat().st_size))
        administration = place.read_text(encoding="ascii")
        early.until("Envoy's readiness", lambda: _live(administration))
        (listener,) = _asked(administration, "/listeners?format=json")["listener_statuses"]
        yield Envoy(process, listener["local_address"]["socket_address"]["port_value"], administration, folder)
    finally:
        end(process)


def _live(administration: str) -> bool:
    """It has looked at every replica once, and listens."""
    state: str = _asked(administration, "/server_info")["state"]
    return state == "LIVE"


def _asked(administration: str, what: str) -> Any:
    with urlopen(f"http://{administration}{what}", timeout=PATIENCE) as answer:
        return json.load(answer)
