"""What KServe's own types say of its objects: run in an environment that has kserve, prints what is wrong as JSON.

python kserve_types.py FILE...

The types of the kserve package, and those of the Kubernetes client within them, are generated from the API that
KServe's custom resource definitions come from. They name every field with its type and refuse missing ones; that there
is no other field, this looks after.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kserve.models
import kubernetes.client
import yaml

GROUPS = {"serving.kserve.io/v1alpha1": "V1alpha1", "serving.kserve.io/v1beta1": "V1beta1"}
"""How the types of an apiVersion begin."""

PLAIN: dict[str, Any] = {
    "str": str,
    "int": int,
    "bool": bool,
    "float": (int, float),
    "ResourceQuantity": (str, int, float),
}
"""What values of the types that are no classes are in YAML."""


def faults(value: Any, kind: str, path: str) -> Iterator[str]:
    """What is wrong with a value of a type, as the generated classes name it.

    Args:
        value: as YAML has it.
        kind: `str`, `list[V1Container]`, `dict(str, str)`, or a class; Kubernetes' types say `List`, `Dict[str, str]`.
        path: where it stands.
    """
    if inner := re.fullmatch(r"[lL]ist\[(.*)\]", kind):
        if not isinstance(value, list):
            yield f"{path}: is no list"
            return
        for number, one in enumerate(value):
            yield from faults(one, inner[1], f"{path}[{number}]")
    elif inner := re.fullmatch(r"dict\(str, (.*)\)|Dict\[str, (.*)\]", kind):
        for name, one in value.items():
            yield from faults(one, inner[1] or inner[2], f"{path}.{name}")
    elif kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (isinstance(value, bool) and kind != "bool"):
            yield f"{path}: {value!r} is no {kind}"
    elif kind != "object":
        yield from _faults_of_object(value, _class(kind), path)


def _faults_of_object(value: Any, kind: Any, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: is no {kind.__name__}"
        return
    names = {field: attribute for attribute, field in kind.attribute_map.items()}
    found = [f"{path}.{field}: {kind.__name__} has no such field" for field in value.keys() - names]
    for field in value.keys() & names.keys():
        found += faults(value[field], kind.openapi_types[names[field]], f"{path}.{field}")
    if found:
        yield from found
        return
    try:
        kind(**{names[field]: one for field, one in value.items()})
    except ValueError as error:  # what is missing, and what is out of range
        yield f"{path}: {error}"


def _class(kind: str) -> Any:
    """A class by the name that another one's fields have it by."""
    name = re.sub(r"^K8sIoApi\w+?V1(?=[A-Z])", "V1", kind)
    return getattr(kserve.models, name, None) or getattr(kubernetes.client, name)


def _main(files: list[str]) -> None:
    found: list[str] = []
    for file in files:
        for one in yaml.safe_load_all(Path(file).read_text(encoding="utf-8")):
            found += faults(one, f"{GROUPS[one['apiVersion']]}{one['kind']}", one["kind"])
    print(json.dumps(sorted(found)))


if __name__ == "__main__":
    _main(sys.argv[1:])
