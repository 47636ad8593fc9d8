"""Fixtures of tests that start workers."""

from collections.abc import Iterator

import pytest

from rankfit.client.worker_registry import worker_dirs
from tests.client.workers import Node, node


@pytest.fixture
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Sockets and logs of this test alone."""
    runtime = tmp_path_factory.getbasetemp() / "r"  # short: a socket's path has 108 bytes
    runtime.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def device(own_folders: None) -> Iterator[Node]:
    """A stand-in for a SuperNode, of which nothing is left."""
    with node() as started:
        yield started
    assert worker_dirs() == []
