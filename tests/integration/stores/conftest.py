"""One Milvus server for all tests of a session that want one: its start takes ten seconds.

They bear `ON_THE_SERVER` and run in one process: there is one server a machine, and a second worker would wait for the
end of the first.
"""

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
