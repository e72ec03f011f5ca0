"""Every object of `deploy/` is as Kubernetes and KServe want it: no field too many, missing, or of a wrong type."""

import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from export.manifest import FORMAT
from tests.deploy.manifests import BASE, COMPONENTS, KSERVE, REPOSITORY, Deployed, base, files_of, kserve, rendered
from tests.peers.triton import KSERVE as KSERVE_PYTHON

OLDEST, NEWEST = "1.30", "1.37"
"""Kubernetes versions: sleep in preStop came with the one; the other is the newest whose schema there is."""

FROM = {"model-image": "1.33"}
"""Components that need a newer one."""

ELSEWHERE = {"PodMonitor"}
"""Kinds that Kubernetes does not have by itself."""


def check(one: Any, version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    try:
        validator.validate(one, version, strict=True)
    except validator.ValidationError as error:
        pytest.fail(f"{one['kind']}, Kubernetes {version}: {error.message} at {'/'.join(map(str, error.path))}")


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("number", range(len(base().objects)))
def test_the_base(number: int, version: str) -> None:
    check(base().objects[number], version)


def test_what_kustomize_makes_of_the_base_is_what_the_files_say(tmp_path: Path) -> None:
    """But for the ConfigMap, whose name gets a checksum, and the version of the image."""
    made, files = rendered(tmp_path), base()
    assert made.files == files.files
    (settings,) = made.of("ConfigMap")
    for one in files.objects:
        (found,) = made.of(one["kind"])
        if one["kind"] != "Deployment":
            assert found == one
    for volume in made.pod["volumes"]:
        if volume["name"] == "settings":
            assert volume["configMap"]["name"] == settings["metadata"]["name"] != "limelight-settings"


@pytest.mark.parametrize("component", sorted(one.name for one in COMPONENTS.iterdir()))
def test_each_component(component: str, tmp_path: Path) -> None:
    made = rendered(tmp_path, component)
    assert made.objects != rendered(tmp_path).objects
    for version in {FROM.get(component, OLDEST), NEWEST}:
        check_all(made, version)


def test_all_components_together(with_everything: Deployed) -> None:
    check_all(with_everything, NEWEST)


def check_all(made: Deployed, version: str) -> None:
    for one in made.objects:
        if one["kind"] not in ELSEWHERE:
            check(one, version)


def test_a_wrong_object_would_be_found() -> None:
    (deployment,) = base().of("Deployment")
    wrong = json.loads(json.dumps(deployment).replace('"periodSeconds"', '"periodSecond"'))
    with pytest.raises(pytest.fail.Exception, match="'periodSecond' was unexpected"):
        check(wrong, NEWEST)


def test_the_pod_of_kserve() -> None:
    """Its container and volumes, as Kubernetes will have them."""
    (runtime,) = kserve().of("ServingRuntime")
    parts = {name: runtime["spec"][name] for name in ("containers", "volumes")}
    check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "limelight"}, "spec": parts}, NEWEST)


@pytest.mark.skipif(
    not KSERVE_PYTHON.exists(), reason=f"{KSERVE_PYTHON} is not there: make build/load/kserve-environment/.ready"
)
def test_kserve(tmp_path: Path) -> None:
    assert found_by_kserve(*files_of(KSERVE)) == []
    wrong = tmp_path / "wrong.yaml"
    text = "".join(file.read_text(encoding="utf-8") for file in files_of(KSERVE) if "service" in file.name)
    wrong.write_text(text.replace("scaleTarget:", "scaleTargets:"), encoding="utf-8")
    field = "InferenceService.spec.predictor.scaleTargets"
    assert found_by_kserve(wrong) == [f"{field}: V1beta1PredictorSpec has no such field"]


def found_by_kserve(*files: Path) -> list[str]:
    script = Path(__file__).with_name("kserve_types.py")
    done = subprocess.run([KSERVE_PYTHON, script, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found


def test_kserve_is_asked_for_what_the_runtime_offers() -> None:
    (runtime,), (service,) = kserve().of("ServingRuntime"), kserve().of("InferenceService")
    (offered,) = runtime["spec"]["supportedModelFormats"]
    model = service["spec"]["predictor"]["model"]
    assert model["modelFormat"] == {name: offered[name] for name in ("name", "version")}
    assert offered["version"] == str(FORMAT)
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]


def test_the_image_is_of_this_version() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert kserve().container["image"] == f"limelight:{version}"
    assert f"newTag: {version}\n" in (BASE / "kustomization.yaml").read_text(encoding="utf-8")
