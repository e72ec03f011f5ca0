"""The models that the tests of the export share, each made once a session."""

from typing import cast

import pytest

from tests.export.shortlisting import Shortlisted, shortlisted_toy
from tests.export.toy import Toy, halved_model, toy_model
from tests.reversal import Reversal, reversal_model


@pytest.fixture(scope="session")
def reversal(tmp_path_factory: pytest.TempPathFactory) -> Reversal:
    return reversal_model(tmp_path_factory.getbasetemp() / "reversal")


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return toy_model("tied", tmp_path_factory.getbasetemp() / "tied")


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return toy_model("untied", tmp_path_factory.getbasetemp() / "untied")


@pytest.fixture(scope="session", params=["tied", "untied"])
def halved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Each of the toys in turn, exported in float16 too."""
    return halved_model(request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session", params=["tied", "untied"])
def shortlisted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shortlisted:
    """Each of the toys in turn, untied in float16 too."""
    return shortlisted_toy(request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(params=["reversal", "tied", "untied"])
def exported(request: pytest.FixtureRequest) -> Toy | Reversal:
    """Each of the three in turn."""
    return cast("Toy | Reversal", request.getfixturevalue(request.param))
