"""A store whose schema has no room for stamps, with the log beside it, under the contract of all stores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymilvus import MilvusClient

from migrator.adapters.base import ItemId, Store, VectorPage, Vectors
from migrator.adapters.testing import Make, StoreContract, unit_vectors
from migrator.artifacts.files import LogFiles
from migrator.artifacts.stamp_log import StampedStore, StampLog
from migrator.errors import PreconditionFailed
from tests.integration.stores.test_milvus import InLite, Rows, lite, lite_client

__all__ = ["lite", "lite_client"]


class RowsWithLog(Rows):
    """Opened like a migration opens them."""

    artifacts: str

    def open(self, *, write: bool = True) -> Store:
        return StampedStore(super().open(write=write), self.log())

    def log(self) -> StampLog:
        return StampLog(LogFiles(self.artifacts, "toys", "stamps", self.name))


class TestWithoutRoomForStamps(InLite):
    dynamic = False

    @pytest.fixture
    def make(self, lite: str, lite_client: MilvusClient, tmp_path: Path) -> Iterator[Make]:
        made: list[str] = []

        def make(ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[dict[str, Any]]) -> RowsWithLog:
            rows = RowsWithLog(lite_client, lite, f"test_{os.urandom(6).hex()}", dynamic=False)
            rows.artifacts = str(tmp_path)
            rows.create(strings=False, metric="COSINE", index="HNSW")
            rows.insert(ids, vectors, payloads)
            made.append(rows.name)
            return rows

        yield make
        for name in made:
            for alias in lite_client.list_aliases(name)["aliases"]:
                lite_client.drop_alias(alias)
            lite_client.drop_collection(name)


for _name in dir(StoreContract):  # what has nothing to do with stamps is tested without the log
    if _name.startswith("test_") and not any(
        word in _name for word in ("stamp", "written", "write", "repeat", "sequence", "read", "deleted", "rollback")
    ):
        setattr(TestWithoutRoomForStamps, _name, None)


@pytest.fixture
def files(tmp_path: Path) -> LogFiles:
    return LogFiles(str(tmp_path), "toys", "stamps", "1")


def test_two_processes_write_one_log(files: LogFiles) -> None:
    one, other = StampLog(files), StampLog(files)
    vectors = unit_vectors(4)
    one.record([1, 2], vectors[:2], "new")
    other.record([3], vectors[2:3], "new")
    one.record([2], vectors[1:2], None)
    for log in (one, other, StampLog(files)):
        log.refresh()
        assert log.of([1, 2, 3, 4], vectors) == ["new", None, "new", None]
        assert log.of([2, 1], vectors[:2]) == [None, None]  # another item's vector is no proof
        assert log.of(["1"], vectors[:1]) == [None]
        log.check()


def test_what_never_bore_a_stamp_leaves_no_entry(files: LogFiles) -> None:
    log = StampLog(files)
    log.record([1, 2], unit_vectors(2), None)
    assert files.names() == []
    log.drop()


def test_a_lost_file_is_noticed(files: LogFiles, tmp_path: Path) -> None:
    log = StampLog(files)
    for item in range(3):
        log.record([item], unit_vectors(1, seed=item), "new")
    Path(files.path(files.names()[1])).unlink()
    with pytest.raises(PreconditionFailed, match="lost 1 files"):
        StampLog(files).check()
    for name in files.names():
        Path(files.path(name)).unlink()
    with pytest.raises(PreconditionFailed, match="lost"):
        StampLog(files).check()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_noticed(files: LogFiles, damage: str) -> None:
    StampLog(files).record(list(range(50)), unit_vectors(50), "new")
    path = Path(files.path(files.names()[0]))
    content = path.read_bytes()
    middle = content.index(b"new")
    flipped = content[:middle] + b"old" + content[middle + 3 :]
    path.write_bytes({"cut": content[:-9], "flipped": flipped, "empty": b""}[damage])
    with pytest.raises(PreconditionFailed, match="damaged"):
        StampLog(files).refresh()


def test_a_crash_before_the_write_leaves_the_item_unstamped(files: LogFiles) -> None:
    class Dies:
        """A store that is killed before it writes."""

        def write_vectors(self, *_: object) -> None:
            raise KeyboardInterrupt

        def read_vectors(self, ids: Sequence[ItemId]) -> VectorPage:
            return VectorPage(ids, unit_vectors(len(ids)), [None] * len(ids))

    store = StampedStore(Dies(), StampLog(files))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        store.write_vectors([1, 2], np.float32(2) * unit_vectors(2, seed=1), "new")
    assert list(store.read_stamps([1, 2]).stamps) == [None, None]
