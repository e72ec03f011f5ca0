"""What `docs/deployment.md` tells to write works as it is written."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from serve.channel import REPLICAS
from serve.inference import INFERENCE
from serve.server import SERVICE
from serve.settings import Settings
from tests.deploy.documentation import PAGE, TEXT, blocks, commands
from tests.deploy.manifests import COMPONENTS, KUBERNETES, REPOSITORY, kustomized
from tests.deploy.test_schemas import NEWEST, OLDEST, check


def test_the_overlay_is_whole(tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here, which has kustomize")
    (example,) = blocks("yaml")
    shutil.copytree(KUBERNETES, tmp_path / "limelight" / "deploy" / "kubernetes")
    (tmp_path / "kustomization.yaml").write_text(example, encoding="utf-8")
    (tmp_path / "limelight.toml").write_text("rows = 8\n", encoding="utf-8")
    made = list(kustomized(tmp_path))
    for one in made:
        check(one, NEWEST)
        assert one["metadata"]["namespace"] == yaml.safe_load(example)["namespace"]
    (deployment,) = (one for one in made if one["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example/limelight:0.1.0"
    assert [one["data"] for one in made if one["kind"] == "ConfigMap"] == [{"limelight.toml": "rows = 8\n"}]


def test_every_component_is_described() -> None:
    described = re.findall(r"^\| `([\w-]+)` \| .* \| .* \|$", TEXT, re.MULTILINE)
    assert described == ["tls", "tokens", "autoscaling", "monitoring", "model-image"]
    assert set(described) == {one.name for one in COMPONENTS.iterdir()}


def test_other_clients_are_told_what_ours_does() -> None:
    (told,) = blocks("json")
    assert json.loads(told) == json.loads(dict(REPLICAS)["grpc.service_config"])
    assert json.loads(told)["healthCheckConfig"]["serviceName"] == SERVICE
    assert f'`""`, `{SERVICE}` and `{INFERENCE}`' in TEXT


def test_what_is_named_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)(?:`| )", TEXT)) <= targets
    assert {words[1] for words in commands() if words[0] == "make"} <= targets
    for link, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", TEXT):
        page = PAGE.parent / link if link else PAGE
        headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}
    for words in commands():
        for flag, file in pairwise(words):
            assert flag != "--filename" or (REPOSITORY / file).exists()


OTHERS = {"cpus", "drain-time-s"}
"""Flags of Docker and Envoy."""


def test_settings_that_are_named_are_some() -> None:
    variables = set(re.findall(r"LIMELIGHT_SERVE_([A-Z_]*[A-Z])", TEXT)) - {"CONFIG"}
    flags = set(re.findall(r"`--([a-z-]+)`", TEXT)) - OTHERS
    assert {"PORT", "HOST"} <= variables
    assert {"grace", "watchdog"} <= flags
    assert {name.lower() for name in variables} | {
        name.replace("-", "_") for name in flags
    } <= Settings.model_fields.keys()
    assert "(`--grace`), and clearing" in TEXT
    assert f"have {Settings().grace:.0f} (`--grace`)" in TEXT


def test_the_schemas_are_those_that_were_used() -> None:
    assert f"the schemas of {OLDEST} and {NEWEST}" in TEXT
    assert f"Kubernetes {OLDEST} or newer" in TEXT
