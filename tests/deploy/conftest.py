"""What the tests of `deploy/` share."""

from pathlib import Path

import pytest

from tests.deploy.manifests import COMPONENTS, Deployed, rendered


@pytest.fixture(scope="session")
def with_everything(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """The base with every component; skips where there is no kubectl."""
    folder: Path = tmp_path_factory.mktemp("kustomize")
    return rendered(folder, *sorted(one.name for one in COMPONENTS.iterdir()))
