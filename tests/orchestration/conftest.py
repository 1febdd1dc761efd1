"""Servers that all tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from orchestration_helpers import S3, Site, Temporal, environment


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    server = S3()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3_environment(s3: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The standard variables, which the store's library reads."""
    for name, value in environment(s3).items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture(scope="session")
def temporal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Temporal]:
    server = Temporal(tmp_path_factory.mktemp("temporal"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    """Of a test that fails: it would take the work of the tests after it."""
    before = list(Site.every)
    yield
    for site in Site.every:
        if site not in before:
            site.close()


@pytest.fixture
def site(temporal: Temporal, tmp_path: Path) -> Iterator[Site]:
    """Without a worker yet."""
    site = Site(tmp_path, temporal)
    yield site
    site.close()
