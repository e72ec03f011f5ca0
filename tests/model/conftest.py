"""Every test of the network runs with its shape types checked."""

import pytest


@pytest.fixture(autouse=True)
def _shapes_are_checked(shape_checks: None) -> None:
    """Turns on what `tests/conftest.py` prepared; `no_shape_checks` turns it off again."""
