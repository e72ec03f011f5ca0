"""What the manifests say of the server is so: its flags, ports, health, files, user, and how long it takes to stop."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serve.cli import app
from serve.inference import INFERENCE
from serve.server import FLUSH, LINGER, SERVICE
from serve.settings import PREFIX, Settings, refuse_service_links
from tests.deploy.dockerfile import environment, given
from tests.deploy.manifests import Deployed, Object, base, kserve
from tests.deploy.starting import settings_of

SELECTING = ("PodDisruptionBudget", "PodMonitor")
"""Kinds with a selector of labels like that of a Deployment."""

ENGINES = 1.0
"""Seconds that engines have to stop, after all calls have ended: `serve.server`."""


@pytest.fixture(params=["base", "kserve", "everything"])
def deployed(request: pytest.FixtureRequest) -> Deployed:
    """One way to deploy a server."""
    return deployed_as(request.param, request)


@pytest.fixture(params=["base", "everything"])
def selected(request: pytest.FixtureRequest) -> Deployed:
    """One with what selects pods, which KServe makes by itself."""
    return deployed_as(request.param, request)


def deployed_as(way: str, request: pytest.FixtureRequest) -> Deployed:
    if way == "everything":
        found = request.getfixturevalue("with_everything")
        assert isinstance(found, Deployed)
        return found
    return base() if way == "base" else kserve()


@pytest.fixture
def started(deployed: Deployed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[str, Settings]:
    """The folder and settings that its container starts with, read by the command itself."""
    ours = {name: value for name, value in environment().items() if name.startswith(PREFIX)}
    ours |= {one["name"]: one["value"] for one in deployed.container.get("env", [])}
    arguments = list(deployed.container["args"])
    for number, argument in enumerate(arguments):
        if argument.startswith("--config="):
            arguments[number] = f"--config={mounted(deployed, argument.partition('=')[2], tmp_path)}"
    return settings_of(monkeypatch, arguments, ours)


@pytest.fixture
def settings(started: tuple[str, Settings]) -> Settings:
    return started[1]


def mounted(deployed: Deployed, path: str, folder: Path) -> Path:
    """A file of the ConfigMap that is mounted there, with its contents."""
    mount, volume = volume_at(deployed, path)
    assert volume["configMap"]["name"].startswith("limelight-settings")
    file = folder / "file.toml"
    file.write_text(deployed.files[path.removeprefix(f"{mount}/")], encoding="utf-8")
    return file


def volume_at(deployed: Deployed, path: str) -> tuple[str, Object]:
    """Where the volume is mounted that holds a path, and what it is."""
    mounts = [one for one in deployed.container["volumeMounts"] if Path(path).is_relative_to(one["mountPath"])]
    assert mounts, f"nothing is mounted at {path}"
    (volume,) = (one for one in deployed.pod["volumes"] if one["name"] == mounts[0]["name"])
    return mounts[0]["mountPath"], volume


def test_models_are_where_they_are_mounted(deployed: Deployed, started: tuple[str, Settings]) -> None:
    if deployed is kserve():
        assert started[0] == "/mnt/models", "where KServe puts them"
    else:
        mount, volume = volume_at(deployed, started[0])
        assert (mount, volume["name"]) == (started[0], "models")


def test_ports_are_the_servers(deployed: Deployed, settings: Settings) -> None:
    declared = {one["name"]: one["containerPort"] for one in deployed.container["ports"]}
    if deployed is kserve():
        assert declared == {"h2c": settings.port}
        annotation = deployed.annotations["prometheus.kserve.io/port"]
    else:
        assert declared == {"grpc": settings.port, "metrics": settings.metrics_port}
        annotation = deployed.annotations["prometheus.io/port"]
    assert annotation == str(settings.metrics_port)
    assert not settings.plaintext_tokens
    assert settings.admin_port is None


def named_ports(deployed: Deployed) -> Iterator[tuple[str, Any]]:
    for service in deployed.of("Service"):
        yield from ((f"Service {one['name']}", one["targetPort"]) for one in service["spec"]["ports"])
    for policy in deployed.of("NetworkPolicy"):
        for rule in policy["spec"]["ingress"]:
            yield from (("NetworkPolicy", one["port"]) for one in rule["ports"])
    for monitor in deployed.of("PodMonitor"):
        yield from (("PodMonitor", one["port"]) for one in monitor["spec"]["podMetricsEndpoints"])


def test_what_leads_to_a_port_names_one_that_is_there(deployed: Deployed) -> None:
    declared = {one["name"] for one in deployed.container["ports"]}
    assert {port for _, port in named_ports(deployed)} <= declared
    for service in deployed.of("Service"):
        numbers = {one["name"]: one["containerPort"] for one in deployed.container["ports"]}
        assert {one["name"]: one["port"] for one in service["spec"]["ports"]} == numbers, "headless: no port is mapped"


def test_what_selects_pods_selects_these(selected: Deployed) -> None:
    (deployment,) = selected.of("Deployment")
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        template["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
        *(one["spec"]["selector"] for one in selected.of("Service")),
        *(one["spec"]["podSelector"]["matchLabels"] for one in selected.of("NetworkPolicy")),
        *(one["spec"]["selector"]["matchLabels"] for kind in SELECTING for one in selected.of(kind)),
    ]
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    for one in selected.of("HorizontalPodAutoscaler"):
        target = one["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
        assert "replicas" not in deployment["spec"]


def test_probes_ask_what_the_server_answers(deployed: Deployed, settings: Settings) -> None:
    assert {"readinessProbe", "livenessProbe"} <= deployed.container.keys()
    for probe in deployed.probes:
        if settings.tls_certificate is None:
            assert probe["grpc"]["port"] == settings.port
            assert probe["grpc"].get("service", "") in {"", SERVICE, INFERENCE}
        else:
            command = probe["exec"]["command"]
            assert command[:3] == ["python", "-m", "serve.probe"]
            assert volume_at(deployed, str(settings.tls_certificate))[1]["name"] == "tls"
            result = CliRunner().invoke(app, ["probe", *command[3:]])
            assert (result.exit_code, result.stderr) == (
                1,
                "ca: /etc/limelight-tls/ca.crt: cannot be read: No such file or directory\n",
            )


def test_loading_is_not_taken_for_hanging(deployed: Deployed) -> None:
    """Until the models are loaded nothing listens, and who does not listen is killed."""
    startup = deployed.container.get("startupProbe")
    if startup is None:
        liveness = deployed.container["livenessProbe"]
        seconds = liveness["initialDelaySeconds"] + liveness["periodSeconds"] * liveness.get("failureThreshold", 3)
    else:
        seconds = startup["periodSeconds"] * startup["failureThreshold"]
    assert seconds >= 90


def test_there_is_time_to_stop(deployed: Deployed, settings: Settings) -> None:
    """Until all have heard of it; then for calls, for who comes still, answers on their way, engines and spans."""
    waited = deployed.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert waited >= 5
    assert deployed.pod["terminationGracePeriodSeconds"] > waited + settings.grace + LINGER + FLUSH + ENGINES + FLUSH
    assert settings.connection_age is not None, "new pods would get no calls"


def test_files_are_mounted_and_secrets_are_not_open_to_everybody(deployed: Deployed, settings: Settings) -> None:
    for file in (settings.tls_certificate, settings.tls_key, settings.tls_client_ca, settings.token_file):
        if file is not None:
            _, volume = volume_at(deployed, str(file))
            assert volume["secret"]["defaultMode"] == 0o440, "the group's, which is fsGroup"
            assert deployed.pod["securityContext"]["fsGroup"] == int(given("USER").partition(":")[2])


def test_only_tmp_is_written(deployed: Deployed) -> None:
    writable = [one for one in deployed.container["volumeMounts"] if not one.get("readOnly")]
    assert [one["mountPath"] for one in writable] == ["/tmp"]
    assert volume_at(deployed, "/tmp")[1]["emptyDir"]["sizeLimit"]


def test_it_may_do_nothing_but_serve(deployed: Deployed) -> None:
    own = {**deployed.pod.get("securityContext", {}), **deployed.container["securityContext"]}
    assert own["runAsNonRoot"] is own["readOnlyRootFilesystem"] is True
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert own["seccompProfile"] == {"type": "RuntimeDefault"}
    assert f"{own['runAsUser']}:{own['runAsGroup']}" == given("USER")


def test_threads_have_processors_of_their_own(deployed: Deployed, settings: Settings) -> None:
    """They are as many as the limit has processors."""
    resources = deployed.container["resources"]
    assert settings.threads is None
    assert math.ceil(float(resources["limits"]["cpu"])) == float(resources["limits"]["cpu"])
    assert resources["limits"]["cpu"] == resources["requests"]["cpu"]
    assert resources["limits"]["memory"] == resources["requests"]["memory"]


def test_no_variables_of_services_come_beside_the_settings(deployed: Deployed) -> None:
    assert deployed.pod["enableServiceLinks"] is False
    for service in deployed.of("Service"):
        name = service["metadata"]["name"].upper().replace("-", "_")
        refuse_service_links({f"{name}_SERVICE_HOST": "10.0.0.1", f"{name}_PORT": "tcp://10.0.0.1:50051"})
