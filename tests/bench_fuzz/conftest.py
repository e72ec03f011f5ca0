import pytest

from bench.fuzz.subject import Subject
from tests.reversal import Reversal, reversal_model


@pytest.fixture(scope="session")
def reversal(tmp_path_factory: pytest.TempPathFactory) -> Reversal:
    return reversal_model(tmp_path_factory.getbasetemp() / "reversal")


@pytest.fixture(scope="session")
def subject(reversal: Reversal) -> Subject:
    return Subject.of(reversal.bundle)
