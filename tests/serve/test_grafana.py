"""The dashboard read with Grafana's own types: what these do not know would be ignored when it is imported."""

import importlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.test_dashboard import DASHBOARD

pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is not installed")
dashboard: Any = importlib.import_module("grafana_foundation_sdk.models.dashboard")
encoder: Any = importlib.import_module("grafana_foundation_sdk.cog.encoder")
plugins: Any = importlib.import_module("grafana_foundation_sdk.cog.plugins")

BESIDE_THE_SCHEMA = {"/annotations/list[]/builtIn", "/templating/list[]/definition"}
"""What Grafana itself writes into dashboards that it exports, and its types leave out."""


def lost(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Where something differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            yield from lost(value, after.get(key), f"{path}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for one, other in zip(before, after, strict=True):
            yield from lost(one, other, f"{path}[]")
    elif before != after:
        yield path


def test_grafanas_types_know_all_of_it() -> None:
    plugins.register_default_plugins()  # the kinds of panels and data sources
    read = dashboard.Dashboard.from_json(DASHBOARD)
    assert set(lost(DASHBOARD, json.loads(encoder.JSONEncoder().encode(read)))) == BESIDE_THE_SCHEMA
