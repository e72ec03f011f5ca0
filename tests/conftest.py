"""Shape types: instrumented for the whole process, checked only where a test asks for it.

The hook rewrites a module when it is first imported, so it stands here, ahead of every test. It leaves the checks off:
under torch.export they would turn symbolic sizes into constants.
"""

import os
from collections.abc import Generator
from typing import Any

import jaxtyping
import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests that import ONNX Runtime do so before they import ours

NETWORK = ("model.attention", "model.dropout", "model.layers", "model.transformer")

jaxtyping.install_import_hook(NETWORK, "beartype.beartype")
jaxtyping.config.update("jaxtyping_disable", True)


@pytest.fixture
def shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call into the network has its shapes and types checked by beartype, until the test ends."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", False)


@pytest.fixture
def no_shape_checks(shape_checks: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    """The exception, for an exporting test in a folder that checks shapes throughout."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name sets alike in every process: the tests run in several, which must agree on what there is."""
    return "+".join(sorted(map(str, val))) or "none" if isinstance(val, set | frozenset) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """What a test has logged may be no text at all, and still has to get from one process to another."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report
