"""What is in `deploy/`, as the tests look at it: objects, and the containers of the server among them."""

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
KUBERNETES, KSERVE = REPOSITORY / "deploy" / "kubernetes", REPOSITORY / "deploy" / "kserve"
BASE, COMPONENTS = KUBERNETES / "base", KUBERNETES / "components"

Object = Mapping[str, Any]

CLUSTER_DEFAULTS: Object = {"terminationGracePeriodSeconds": 30, "enableServiceLinks": True}
"""Of a pod that says nothing of them."""


def read(file: Path) -> list[Object]:
    """The objects in a file."""
    return [one for one in yaml.safe_load_all(file.read_text(encoding="utf-8")) if one is not None]


def files_of(folder: Path) -> list[Path]:
    """The files of objects: those that are no part of a kustomization's own machinery."""
    found = sorted(folder.glob("*.yaml"))
    assert found
    return [file for file in found if file.name != "kustomization.yaml"]


@dataclass(frozen=True)
class Deployed:
    """Objects that belong together.

    Attributes:
        objects: all of them.
        files: contents of the ConfigMap, by name.
    """

    objects: tuple[Object, ...]
    files: Mapping[str, str]

    def of(self, kind: str) -> list[Object]:
        """Those of a kind."""
        return [one for one in self.objects if one["kind"] == kind]

    @property
    def pod(self) -> Object:
        """What the pod is made by: its spec, with the cluster's defaults where it says nothing."""
        if deployments := self.of("Deployment"):
            return {**CLUSTER_DEFAULTS, **deployments[0]["spec"]["template"]["spec"]}
        (runtime,), (service,) = self.of("ServingRuntime"), self.of("InferenceService")
        return {**CLUSTER_DEFAULTS, **service["spec"]["predictor"], **runtime["spec"]}

    @property
    def container(self) -> Object:
        """The server's."""
        (found,) = self.pod["containers"]
        assert isinstance(found, dict)
        return found

    @property
    def probes(self) -> list[Object]:
        """Of the container."""
        return [probe for name, probe in self.container.items() if name.endswith("Probe")]

    @property
    def annotations(self) -> Object:
        """Of the pod."""
        if deployment := self.of("Deployment"):
            return dict(deployment[0]["spec"]["template"]["metadata"]["annotations"])
        return dict(self.of("ServingRuntime")[0]["spec"]["annotations"])


@cache
def base() -> Deployed:
    """The base, from its files; what kustomize would do to it is done here: the ConfigMap that it makes of a file."""
    settings = (BASE / "limelight.toml").read_text(encoding="utf-8")
    return Deployed(
        tuple(one for file in files_of(BASE) for one in read(file)),
        {"limelight.toml": settings},
    )


@cache
def kserve() -> Deployed:
    """The runtime, and the service that is an example of its use."""
    return Deployed(tuple(one for file in files_of(KSERVE) for one in read(file)), {})


def rendered(folder: Path, *components: str) -> Deployed:
    """The base with some components, as kustomize puts them together; skips the test where there is no kubectl.

    Args:
        folder: for an overlay of them.
        components: by their folders.
    """
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here, which has kustomize")
    place = folder / "-".join(["overlay", *components])
    place.mkdir()
    shutil.copytree(KUBERNETES, place / "kubernetes")  # kustomize takes no absolute paths
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["kubernetes/base"],
        "components": [f"kubernetes/components/{name}" for name in components],
    }
    (place / "kustomization.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
    objects = tuple(kustomized(place))
    (settings,) = (one for one in objects if one["kind"] == "ConfigMap")
    return Deployed(objects, settings["data"])


def kustomized(folder: Path) -> Iterator[Object]:
    """The objects that a kustomization makes."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    yield from yaml.safe_load_all(done.stdout)
