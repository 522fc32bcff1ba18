from __future__ import annotations

import errno
import os
import struct
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from migrator.adapters.base import ItemId
from migrator.artifacts import files as module
from migrator.artifacts import undo_log as undo
from migrator.artifacts.files import LogFiles
from migrator.artifacts.undo_log import OldVectors, UndoLog
from migrator.errors import PreconditionFailed, TemporarilyUnavailable
from migrator.ledger import Chunk

EXTREME = [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 1.0, 0.1]
IDS: list[ItemId] = [-1, 0, 7, "7", 2**62, "", "é✓\U0001f600", 'quoted "\\', "a\nb", "\ud800", "null"]

ids = st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.text(st.characters(), max_size=8)), max_size=12).map(
    lambda found: list({(type(item), item): item for item in found}.values())
)


def chunk(ordinal: int = 0, pass_number: int = 0) -> Chunk:
    return Chunk(migration_id=1, pass_number=pass_number, ordinal=ordinal)


def old(items: list[int | str], *, dim: int = 4, seed: int = 0, stamps: list[str | None] | None = None) -> OldVectors:
    vectors = np.random.default_rng(seed).standard_normal((len(items), dim)).astype(np.float32)
    return OldVectors(items, vectors, stamps or [None] * len(items))


def same(found: OldVectors | None, expected: OldVectors) -> bool:
    """Bit for bit, and 7 is not "7"."""
    assert found is not None
    return (
        list(map(repr, found.ids)) == list(map(repr, expected.ids))
        and found.vectors.dtype == np.float32
        and found.vectors.shape == expected.vectors.shape
        and found.vectors.tobytes() == expected.vectors.tobytes()
        and list(found.stamps) == list(expected.stamps)
    )


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(params=["folder", "file://", "memory://"])
def artifacts(request, tmp_path) -> str:
    return {
        "folder": str(tmp_path / "it's 100% ours"),
        "file://": f"file://{tmp_path}/artifacts",
        "memory://": f"memory://{uuid.uuid4().hex}",
    }[request.param]


@pytest.fixture
def log(tmp_path) -> UndoLog:
    return UndoLog(LogFiles(str(tmp_path), "digits-v2", "undo", "1"))


# --- what was there comes back ---------------------------------------------------------------------------------------


def test_vectors_come_back_bit_for_bit(artifacts):
    log = UndoLog(LogFiles(artifacts, "digits-v2", "undo", "1"))
    assert log.read(chunk()) is None
    vectors = np.array([EXTREME[row % 10 :] + EXTREME[: row % 10] for row in range(len(IDS))], np.float32)
    assert np.count_nonzero(np.signbit(vectors) & (vectors == 0))
    before = OldVectors(IDS, vectors, [None, "stamp", *[None] * (len(IDS) - 2)])
    log.record(chunk(), before)
    assert same(UndoLog(LogFiles(artifacts, "digits-v2", "undo", "1")).read(chunk()), before)


@settings(max_examples=60, deadline=None)
@given(items=ids, data=st.data())
def test_any_ids_and_any_bits(tmp_path_factory, items, data):
    dim = data.draw(st.integers(1, 5))
    bits = data.draw(hnp.arrays(np.uint32, (len(items), dim)))
    stamps = data.draw(
        st.lists(st.none() | st.text(st.characters(codec="utf-8")), min_size=len(items), max_size=len(items))
    )
    before = OldVectors(items, bits.view(np.float32), stamps)
    log = UndoLog(LogFiles(f"memory://{uuid.uuid4().hex}", "digits-v2", "undo", "1"))
    log.record(chunk(), before)
    assert same(log.read(chunk()), before)
    log.drop()


def test_a_chunk_without_items(log):
    log.record(chunk(), old([]))
    assert same(log.read(chunk()), old([]))


def test_vectors_in_another_layout(log):
    before = OldVectors([1, 2, 3], np.asfortranarray(old([1, 2, 3]).vectors)[::-1], [None] * 3)
    log.record(chunk(), before)
    assert same(log.read(chunk()), before)


def test_each_chunk_of_each_migration_has_its_own_file(tmp_path):
    logs = [
        UndoLog(LogFiles(str(tmp_path), name, "undo", number)) for name, number in (("a", "1"), ("a", "2"), ("b", "1"))
    ]
    chunks = [chunk(0), chunk(1), chunk(0, pass_number=1), chunk(10**8)]
    written = {}
    for at, log in enumerate(logs):
        for number, one in enumerate(chunks):
            written[at, number] = old([at, f"{number}"], seed=at * 10 + number)
            log.record(one, written[at, number])
    for (at, number), expected in written.items():
        assert same(logs[at].read(chunks[number]), expected)
    logs[0].drop()
    assert [log.read(chunks[0]) is None for log in logs] == [True, False, False]


# --- a chunk that is repeated ----------------------------------------------------------------------------------------


def test_the_first_state_is_kept_and_new_items_are_added(artifacts):
    log = UndoLog(LogFiles(artifacts, "digits-v2", "undo", "1"))
    first = old([1, "1", 3], stamps=["a", None, None])
    log.record(chunk(), first)
    half_new = old([3, 1, 4, "4"], seed=1, stamps=["new", "new", None, "b"])
    log.record(chunk(), half_new)
    expected = OldVectors(
        [1, "1", 3, 4, "4"], np.concatenate([first.vectors, half_new.vectors[2:]]), ["a", None, None, None, "b"]
    )
    assert same(log.read(chunk()), expected)
    log.record(chunk(), old([4, 1], seed=2))
    assert same(log.read(chunk()), expected)


@settings(max_examples=40, deadline=None)
@given(attempts=st.lists(st.lists(st.integers(0, 9), unique=True, max_size=6), min_size=1, max_size=5))
def test_whatever_is_repeated_the_first_state_stands(attempts):
    log = UndoLog(LogFiles(f"memory://{uuid.uuid4().hex}", "digits-v2", "undo", "1"))
    first: dict[int, bytes] = {}
    for number, items in enumerate(attempts):
        state = old(items, seed=number)
        for item, vector in zip(items, state.vectors, strict=True):
            first.setdefault(item, vector.tobytes())
        log.record(chunk(), state)
    found = log.read(chunk())
    assert found is not None
    assert {item: vector.tobytes() for item, vector in zip(found.ids, found.vectors, strict=True)} == first
    log.drop()


def test_what_the_application_wrote_since_is_the_old_state_now(log):
    log.record(chunk(), old([1, 2, 3]))
    later = old([2, 3, 4], seed=1)
    log.record(chunk(), later, external=[2])
    found = log.read(chunk())
    expected = {1: old([1, 2, 3]).vectors[0], 2: later.vectors[0], 3: old([1, 2, 3]).vectors[2], 4: later.vectors[2]}
    assert set(found.ids) == set(expected)
    for item, vector in zip(found.ids, found.vectors, strict=True):
        np.testing.assert_array_equal(vector, expected[item])


# --- end -------------------------------------------------------------------------------------------------------------


def test_drop(artifacts):
    log = UndoLog(LogFiles(artifacts, "digits-v2", "undo", "1"))
    log.drop()  # nothing to drop is no error
    log.record(chunk(0), old(list(range(100)), dim=64))
    log.record(chunk(1), old(list(range(100)), dim=64))
    log.drop()
    assert log.read(chunk(0)) is None
    assert log.read(chunk(1)) is None


def test_nothing_but_undo_files_is_left(tmp_path, log):
    log.record(chunk(0), old([1]))
    log.record(chunk(0), old([2]))
    assert files(tmp_path) == ["digits-v2/undo-1/0000-00000000.parquet"]


# --- what can go wrong -----------------------------------------------------------------------------------------------


def broken(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("where", "what"), [(os, "fsync"), (os, "replace"), (module, "open")])
def test_a_full_disk_leaves_what_was_there(tmp_path, log, monkeypatch, where, what):
    before = old([1, 2])
    log.record(chunk(), before)
    content = (tmp_path / "digits-v2/undo-1/0000-00000000.parquet").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(where, what, broken, raising=False)
        for one in (chunk(0), chunk(1)):
            with pytest.raises(TemporarilyUnavailable) as caught:
                log.record(one, old([3]))
            assert "No space left on device; nothing was overwritten" in str(caught.value)
            assert "\n" not in str(caught.value)
            assert caught.value.exit_code == 4
    assert files(tmp_path) == ["digits-v2/undo-1/0000-00000000.parquet"]
    assert (tmp_path / "digits-v2/undo-1/0000-00000000.parquet").read_bytes() == content
    assert same(log.read(chunk(0)), before)
    assert log.read(chunk(1)) is None


def test_a_write_that_stops_midway_leaves_what_was_there(tmp_path, log, monkeypatch):
    before = old([1, 2])
    log.record(chunk(), before)

    class Full:
        def __init__(self, path: str, mode: str) -> None:
            self.file = Path(path).open(mode)  # noqa: SIM115

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            self.file.write(content[:100])
            broken()

    with monkeypatch.context() as patch:
        patch.setattr(module, "open", Full, raising=False)
        with pytest.raises(TemporarilyUnavailable):
            log.record(chunk(), old([3]))
    assert files(tmp_path) == ["digits-v2/undo-1/0000-00000000.parquet"]
    assert same(log.read(chunk()), before)


def test_a_crash_before_the_rename_leaves_what_was_there(tmp_path, log, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    before = old([1, 2])
    log.record(chunk(), before)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(Killed):
            log.record(chunk(), old([3]))
    assert same(log.read(chunk()), before)
    log.record(chunk(), old([3], seed=5))
    assert list(log.read(chunk()).ids) == [1, 2, 3]


def test_all_is_on_the_disk_before_it_has_its_name(log, monkeypatch):
    """File synced, then renamed, then its folder synced; so is each folder that was made for it."""
    done: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        done.append("sync " + Path(f"/proc/self/fd/{handle}").readlink().name.split(".")[0])
        real_sync(handle)

    def replace(source: str, target: str) -> None:
        done.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    log.record(chunk(), old([1]))
    assert done == [
        f"sync {Path(log.folder).parent.parent.name}",
        "sync digits-v2",
        "sync 0000-00000000",
        "rename",
        "sync undo-1",
    ]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet" * 50, None])
def test_a_damaged_file_is_refused(tmp_path, log, content):
    log.record(chunk(), old(list(range(50)), dim=16))
    path = tmp_path / "digits-v2/undo-1/0000-00000000.parquet"
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    damaged = path.read_bytes()
    for call in (lambda: log.read(chunk()), lambda: log.record(chunk(), old([1]))):
        with pytest.raises(PreconditionFailed) as caught:
            call()
        assert "is damaged" in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == damaged, "it is the only copy there is"


def test_a_file_of_another_kind_is_refused(tmp_path, log):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "digits-v2/undo-1/0000-00000000.parquet"
    path.parent.mkdir(parents=True)
    for table in (
        {"other": [1]},
        {"id": ["1"], "vector": ["a"], "stamp": [None]},
        {"id": [1], "vector": pa.array([[1.0]], pa.list_(pa.float32(), 1)), "stamp": [None]},
        {"id": ["oops"], "vector": pa.array([[1.0]], pa.list_(pa.float32(), 1)), "stamp": [None]},
    ):
        pq.write_table(pa.table(table), path)
        with pytest.raises(PreconditionFailed, match="is damaged"):
            log.read(chunk())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_never_becomes_a_wrong_vector(data):
    before = old([1, "2", 3], dim=8, stamps=["a", None, "b"])
    content = bytearray(undo._to_parquet(before))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = undo._from_parquet(bytes(content), "some/path")
    except PreconditionFailed as refused:
        assert "\n" not in str(refused)  # noqa: PT017 - either is right
    else:
        assert same(found, before)


def test_the_bytes_in_the_file_are_the_floats_as_they_are(log, tmp_path):
    """Nothing is compressed or encoded: a vector can be found in the file with a hex editor when all else fails."""
    log.record(chunk(), OldVectors([1], np.array([[1.5, -2.25, 1e-40]], np.float32), [None]))
    content = (tmp_path / "digits-v2/undo-1/0000-00000000.parquet").read_bytes()
    assert struct.pack("<3f", 1.5, -2.25, 1e-40) in content
