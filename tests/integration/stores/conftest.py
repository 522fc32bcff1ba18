"""One Milvus server for all tests of a session that want one: its start takes ten seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pymilvus import MilvusClient

from tests.milvus_server import MilvusServer, milvus_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    with milvus_server(tmp_path_factory.mktemp("milvus")) as running:
        yield running


@pytest.fixture(scope="session")
def server_client(server: MilvusServer) -> Iterator[MilvusClient]:
    client = MilvusClient(server.uri)
    yield client
    client.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them in one worker: there is one server a machine, and the other worker would wait for its end."""
    for item in items:
        if "milvus" in item.nodeid and "server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("milvus"))
