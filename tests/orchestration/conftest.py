"""Servers that all tests share."""

from collections.abc import Iterator

import pytest
from orchestration_helpers import S3, environment


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
