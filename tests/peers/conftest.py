import pytest

from serve.bundle import ServedModel, load_model
from tests.reversal import Reversal, reversal_model


@pytest.fixture(scope="session")
def reversal(tmp_path_factory: pytest.TempPathFactory) -> Reversal:
    return reversal_model(tmp_path_factory.getbasetemp() / "reversal")


@pytest.fixture(scope="session")
def served(reversal: Reversal) -> ServedModel:
    return load_model(reversal.bundle, provider="cpu", threads=1)
