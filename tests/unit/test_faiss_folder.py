"""A FAISS folder as it is found: what is read, what is refused with which words, and who may write when."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from migrator.adapters.base import Store, StoreBusy, StoreError, StoreRejected, StoreUnavailable
from migrator.adapters.faiss import open_store
from migrator.adapters.faiss.folder import Folder

DIM, N = 8, 40


def vectors(n: int = N, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)


def flat(n: int = N) -> Any:
    index = faiss.IndexFlatIP(DIM)
    index.add(vectors(n))
    return index


def put_index(folder: Path, index: Any) -> None:
    faiss.write_index(index, str(folder / "new"))
    (folder / "new").replace(folder / "index.faiss")


def put_items(folder: Path, **columns: Any) -> None:
    pq.write_table(pa.table(columns), folder / "new")
    (folder / "new").replace(folder / "items.parquet")


def open_folder(folder: Path, *, write: bool = False) -> Store:
    return open_store({"kind": "faiss", "path": folder}, write=write)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "category=shoes"
    folder.mkdir()
    put_index(folder, flat())
    put_items(folder, id=list(range(N)), path=[f"{n}.png" for n in range(N)])
    return folder


def refusal(folder: Path, *, write: bool = False) -> str:
    with pytest.raises(StoreRejected) as caught:
        open_folder(folder, write=write)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


# -- what is refused --------------------------------------------------------------------------------------------------


def test_missing_and_misplaced_files(folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "a file").touch()
    assert "is not a folder" in refusal(tmp_path / "a file")
    for name in ("index.faiss", "items.parquet"):
        kept = (folder / name).rename(tmp_path / name)
        assert f"{name} does not exist" in refusal(folder)
        (folder / name).mkdir()
        assert f"{name} is a folder, not a file" in refusal(folder)
        (folder / name).rmdir()
        kept.rename(folder / name)
    open_folder(folder).close()


@pytest.mark.parametrize("name", ["index.faiss", "items.parquet"])
@pytest.mark.parametrize("damage", ["empty", "half", "cut by a byte", "other"])
def test_damaged_files(folder: Path, name: str, damage: str) -> None:
    file = folder / name
    whole = file.read_bytes()
    broken = {"empty": b"", "half": whole[: len(whole) // 2], "cut by a byte": whole[:-1], "other": b"hello, world"}
    file.write_bytes(broken[damage])
    assert re.search(rf"{name} cannot be read as .*: truncated or not one", refusal(folder))


def test_a_binary_index(folder: Path) -> None:
    binary = faiss.IndexBinaryFlat(64)
    binary.add(np.zeros((N, 8), np.uint8))
    faiss.write_index_binary(binary, str(folder / "index.faiss"))
    assert "binary" in refusal(folder)


def test_an_index_that_cannot_be_changed_safely(folder: Path) -> None:
    index = faiss.index_factory(DIM, "PCA4,LSH")
    index.train(vectors())
    index.add(vectors())
    put_index(folder, index)
    assert "index.faiss is PCA4,IndexLSH, whose vectors" in refusal(folder)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"id": [*range(N - 1), None]}, "column `id` has 1 empty rows"),
        ({"id": [*range(N - 1), 3]}, "the id 3 more than once"),
        ({"id": [*map(str, range(N - 1)), "3"]}, "the id '3' more than once"),
        ({"id": [n / 2 for n in range(N)]}, "must be integers or strings, it is double"),
        ({"id": pa.array([*range(N - 1), 2**64 - 1], pa.uint64())}, r"above 9223372036854775807.*\(row 39\)"),
        ({"id": list(range(N - 1))}, f"{N - 1} items, but .*index.faiss {N} vectors"),
        ({"id": list(range(N)), "faiss_id": [*range(N - 1), None]}, "column `faiss_id` has 1 empty"),
        ({"id": list(range(N)), "faiss_id": [*map(str, range(N))]}, "`faiss_id` must be integers"),
        ({"id": list(range(N)), "faiss_id": [*range(N - 1), 3]}, "FAISS id 3 more than once"),
        ({"id": list(range(N)), "faiss_id": [*range(N - 1), 99]}, "FAISS id 99 .* does not hold"),
    ],
)
def test_items_that_do_not_fit(folder: Path, columns: dict[str, Any], words: str) -> None:
    put_items(folder, **columns)
    assert re.search(words, refusal(folder))


def test_two_columns_of_one_name(folder: Path) -> None:
    table = pa.table([pa.array(range(N)), pa.array(range(N))], names=["id", "id"])
    pq.write_table(table, folder / "items.parquet")
    assert "two columns of the same name" in refusal(folder)


def test_ids_that_are_no_text(folder: Path) -> None:
    bad = pa.array([b"\xff%d" % n for n in range(N)], pa.binary()).view(pa.string())
    put_items(folder, id=bad)
    assert "cannot be read" in refusal(folder)


def test_ids_of_an_index_need_a_column_where_the_rows_do_not_say_them(folder: Path) -> None:
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(DIM))
    index.add_with_ids(vectors(), np.arange(N) + 5)
    put_index(folder, index)
    assert re.search(r"FAISS id 0 \(id\), which .* does not hold", refusal(folder))
    put_items(folder, id=[f"item {n}" for n in range(N)])
    assert "add an integer column `faiss_id`" in refusal(folder)
    put_items(folder, id=[f"item {n}" for n in range(N)], faiss_id=np.arange(N) + 5)
    open_folder(folder).close()
    lists = faiss.index_factory(DIM, "IVF2,Flat")
    lists.train(vectors())
    lists.add_with_ids(vectors(), np.arange(N) + 5)
    put_index(folder, lists)
    open_folder(folder).close()
    put_items(folder, id=list(range(N)))
    assert "add an integer column `faiss_id`" in refusal(folder)


@pytest.mark.parametrize("config", [{}, {"path": 3}, {"path": None}, {"path": ".", "colour": "red"}])
def test_settings_that_are_none(config: dict[str, Any]) -> None:
    with pytest.raises(StoreRejected, match="has the setting `path`, its folder, or `index` and `items`"):
        open_store({"kind": "faiss", **config}, write=False)


# -- what is read -----------------------------------------------------------------------------------------------------


def test_reading_leaves_the_folder_untouched(folder: Path) -> None:
    before = content(folder)
    with closing(open_folder(folder)) as store:
        store.read([1, 2])
        store.search(vectors(1), 3)
        assert set(store.describe().schema) == {"path"}, "the folder's name is no column"
    assert content(folder) == before
    assert not (folder / ".migrator").exists()


def test_two_spellings_of_a_folder_are_one_collection(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names = set()
    for spelling in (folder, tmp_path / "link", Path("link"), Path("link/../category=shoes"), Path("./category=shoes")):
        with closing(open_folder(spelling)) as store:
            names.add(store.describe().name)
    assert names == {f"faiss:{folder.resolve()}"}


@pytest.mark.parametrize(
    "ids",
    [
        pa.array(range(N), pa.uint64()),
        pa.array(range(N), pa.int16()),
        pa.array([f"n{n:02}" for n in range(N)], pa.large_string()),
        pa.array([f"n{n:02}" for n in range(N)]).dictionary_encode(),
        pa.chunked_array([pa.array(range(7)), pa.array(range(7, N))]),
    ],
)
def test_ids_in_every_dress(folder: Path, ids: pa.Array) -> None:
    put_items(folder, id=ids)
    with closing(open_folder(folder, write=True)) as store:
        expected = ids.to_pylist()
        assert store.scan_ids(after=None, limit=N) == expected
        store.write_vectors(expected, vectors(seed=1), "new")
        store.publish()
        np.testing.assert_array_equal(store.read_vectors(expected).vectors, vectors(seed=1))


def test_payloads_are_plain_python(folder: Path) -> None:
    moment = datetime(2024, 5, 17, 12, 30, 0, 250_000, tzinfo=UTC)
    put_items(
        folder,
        id=list(range(N)),
        name=["Ärger"] * N,
        tags=[["a", None]] * N,
        box=[{"x": 1}] * N,
        seen=pa.array([moment] * N, pa.timestamp("ns", "UTC")).cast(pa.int64()).cast(pa.timestamp("ns", "UTC")),
        late=pa.array([1_716_000_000_000_000_001] * N, pa.timestamp("ns")),
        nothing=pa.nulls(N),
    )
    with closing(open_folder(folder)) as store:
        page = store.read_payloads([3])
        payload = dict(page.payloads[0])
        assert payload.pop("late") == "2024-05-18 02:40:00.000000001", "Python's times end at microseconds"
        assert payload == {"name": "Ärger", "tags": ["a", None], "box": {"x": 1}, "seen": moment, "nothing": None}


# -- writing, and who may ---------------------------------------------------------------------------------------------


def test_the_holder_is_named(folder: Path) -> None:
    with closing(open_folder(folder, write=True)), pytest.raises(StoreBusy) as busy:
        open_folder(folder, write=True)
    assert re.search(rf"{folder} is being written by process {os.getpid()} on \S+ since 2\d\d\d-", str(busy.value))


def test_a_holder_who_left_no_word_is_still_a_holder(folder: Path) -> None:
    with closing(open_folder(folder, write=True)):
        for word in ("", "[]", '{"pid": 3}'):
            (folder / ".migrator" / "lock.json").write_text(word)
            with pytest.raises(StoreBusy, match="another process"):
                open_folder(folder, write=True)


def _hold(folder: Path, ready: Any) -> None:
    store = open_folder(folder, write=True)
    ready.send(True)
    ready.poll(60)
    store.close()


def test_the_lock_dies_with_its_process(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(folder, theirs))
    process.start()
    try:
        assert ours.poll(60)
        ours.recv()
        with pytest.raises(StoreBusy, match=f"process {process.pid} on "):
            open_folder(folder, write=True)
    finally:
        process.kill()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    open_folder(folder, write=True).close()


def test_a_folder_that_is_no_collection_does_not_stay_locked(folder: Path) -> None:
    good = (folder / "index.faiss").read_bytes()
    (folder / "index.faiss").write_bytes(b"")
    refusal(folder, write=True)
    (folder / "index.faiss").write_bytes(good)
    open_folder(folder, write=True).close()


def test_what_stands_in_the_way_is_named(folder: Path) -> None:
    (folder / ".migrator").write_text("mine")
    assert "move what is in its place" in refusal(folder, write=True)
    assert (folder / ".migrator").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_a_folder_without_the_right_to_write(folder: Path) -> None:
    code = (
        "import os, sys, filelock\n"
        "from migrator.adapters.base import StoreRejected\n"
        "from migrator.adapters.faiss import open_store\n"
        "store = {'path': sys.argv[1]}\n"
        "open_store(store, write=False).close()\n"  # loads what nobody might not be allowed to read
        "os.setgid(65534), os.setuid(65534)\n"
        "open_store(store, write=False).close()\n"
        "try: open_store(store, write=True)\n"
        "except StoreRejected as refusal: print(refusal)\n"
    )
    with tempfile.TemporaryDirectory() as everybodys:
        Path(everybodys).chmod(0o755)
        place = shutil.copytree(folder, Path(everybodys) / "gallery")
        done = subprocess.run([sys.executable, "-c", code, place], capture_output=True, text=True)
        assert "Permission denied: give this user the right" in done.stdout, done.stderr
        assert len(done.stdout.splitlines()) == 1
        assert not (place / ".migrator").exists()


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """The operating system refuses to let a file grow, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("step", "room"), [("segment", 500), ("index", 500), ("stamps", 2500)])
def test_a_disk_that_is_full_changes_nothing(folder: Path, step: str, room: int) -> None:
    stamp = "new" * 1000  # with it, stamps take more room than the index
    with closing(open_folder(folder, write=True)) as store:
        if step != "segment":
            store.write_vectors(range(N), vectors(seed=1), stamp)
        before = content(folder)
        with no_file_beyond(room), pytest.raises(StoreUnavailable, match=os.strerror(errno.EFBIG)) as full:
            store.write_vectors(range(N), vectors(seed=1), stamp) if step == "segment" else store.publish()
        assert "\n" not in str(full.value)
        assert f"{folder}/{'index.faiss' if step == 'index' else f'.migrator/{step}'}" in str(full.value)
        after = content(folder)
        after.pop(".migrator/original.faiss", None)
        assert after == before
        assert store.count(stamp=stamp) == (0 if step == "segment" else N)
        store.write_vectors(range(N), vectors(seed=2), "new")
        store.publish()
        assert store.count(stamp="new") == N
    np.testing.assert_array_equal(faiss.read_index(str(folder / "index.faiss")).reconstruct_n(0, N), vectors(seed=2))


def test_the_published_index_can_be_read_by_whom_it_could_before(folder: Path) -> None:
    (folder / "index.faiss").chmod(0o640)
    mask = os.umask(0o077)
    try:
        with closing(open_folder(folder, write=True)) as store:
            store.write_vectors([1], vectors(1), "new")
            store.publish()
    finally:
        os.umask(mask)
    assert stat.S_IMODE((folder / "index.faiss").stat().st_mode) == 0o640


def test_what_a_killed_writer_left_half_done_is_swept_away(folder: Path) -> None:
    open_folder(folder, write=True).close()
    ours = folder / ".migrator"
    assert {path.name for path in ours.iterdir()} == {"lock", "lock.json"}, "no empty folders"
    for leftover in ("index.faiss.tmp", "original.tmp", "segments/0000000001.parquet.tmp", "stamps/7.parquet.tmp"):
        (ours / leftover).parent.mkdir(exist_ok=True)
        (ours / leftover).write_bytes(b"half")
    open_folder(folder, write=True).close()
    assert not list(ours.rglob("*.tmp"))


def test_a_damaged_or_foreign_file_of_ours_is_named(folder: Path) -> None:
    with closing(open_folder(folder, write=True)) as store:
        store.write_vectors([1], vectors(1), "new")
    (segment,) = (folder / ".migrator" / "segments").iterdir()
    whole = segment.read_bytes()
    segment.write_bytes(whole[:-20])
    assert f"{segment} cannot be read" in refusal(folder)
    pq.write_table(pq.read_table(folder / "items.parquet", partitioning=None), segment)
    assert "another version" in refusal(folder)
    segment.write_bytes(whole)
    with closing(open_folder(folder)) as store:
        assert store.count(stamp="new") == 1


def test_segments_of_another_dimension_are_void(folder: Path) -> None:
    with closing(open_folder(folder, write=True)) as store:
        store.write_vectors([1], vectors(1), "new")
        other = faiss.IndexFlatIP(DIM + 1)
        other.add(np.ones((N, DIM + 1), np.float32))
        put_index(folder, other)
        assert store.describe().dim == DIM + 1
        assert store.count(stamp="new") == 0
        store.publish()
    np.testing.assert_array_equal(faiss.read_index(str(folder / "index.faiss")).reconstruct_n(0, N), 1)


# -- the application and other readers, meanwhile ---------------------------------------------------------------------


def test_a_newer_index_is_not_overwritten_even_in_the_last_moment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare: Callable[..., Path] = Folder.prepare
    theirs = flat()
    faiss.rev_swig_ptr(theirs.get_xb(), N * DIM).reshape(N, DIM)[5] = 7

    def prepare_while_the_application_writes(self: Folder, write: Any) -> Path:
        path = prepare(self, write)
        monkeypatch.setattr(Folder, "prepare", prepare)
        put_index(folder, theirs)
        return path

    with closing(open_folder(folder, write=True)) as store:
        new = vectors(seed=1)
        store.write_vectors(range(N), new, "new")
        monkeypatch.setattr(Folder, "prepare", prepare_while_the_application_writes)
        store.publish()
        assert store.unstamped("new", after=None, limit=N) == [5]
        assert len(list((folder / ".migrator" / "stamps").iterdir())) == 1
    new[5] = 7
    np.testing.assert_array_equal(faiss.read_index(str(folder / "index.faiss")).reconstruct_n(0, N), new)


def test_half_of_a_replacement_is_a_passing_fault(folder: Path) -> None:
    with closing(open_folder(folder, write=True)) as store:
        put_index(folder, flat(N + 1))
        with pytest.raises(StoreUnavailable, match=f"{N} items, but .* {N + 1} vectors.*replaced while open"):
            store.count()
        put_items(folder, id=list(range(N + 1)))
        assert store.count() == N + 1
        (folder / "index.faiss").rename(folder / "away")
        with pytest.raises(StoreUnavailable, match=r"index\.faiss was removed"):
            store.count()
        (folder / "away").rename(folder / "index.faiss")
        assert store.count() == N + 1


def test_a_reader_who_met_a_publication_looks_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stamp_files = Folder.stamp_files
    with closing(open_folder(folder, write=True)) as writer:
        writer.write_vectors(range(N), vectors(seed=1), "new")

        def publish_first(self: Folder) -> list[Path]:
            """The reader has the old index in its hands and comes to the stamps."""
            monkeypatch.setattr(Folder, "stamp_files", stamp_files)
            writer.publish()
            return stamp_files(self)

        monkeypatch.setattr(Folder, "stamp_files", publish_first)
        with closing(open_folder(folder)) as reader:
            assert reader.count(stamp="new") == N
            np.testing.assert_array_equal(reader.read_vectors(range(N)).vectors, vectors(seed=1))


@pytest.mark.parametrize("factory", ["Flat", "IVF2,Flat"])
def test_readers_see_whole_generations_while_others_are_published(folder: Path, factory: str) -> None:
    """One vector for all items in each generation, so that any mixture shows."""
    index = faiss.index_factory(DIM, factory)
    index.train(vectors())
    index.add(np.zeros((N, DIM), np.float32))
    put_index(folder, index)
    done = threading.Event()
    problems: list[object] = []
    seen: set[float] = set()

    def one(vectors: np.ndarray) -> float:
        assert vectors.shape == (N, DIM)
        assert (vectors == vectors[0, 0]).all()
        return float(vectors[0, 0])

    def stranger() -> None:
        one(faiss.read_index(str(folder / "index.faiss")).reconstruct_n(0, N))

    def ours() -> None:
        with closing(open_folder(folder)) as store:
            page = store.read_vectors(range(N))
            version = one(page.vectors)
            assert set(page.stamps) == {f"v{version:g}" if version else None}
            seen.add(version)

    def watch(look: Callable[[], None]) -> None:
        try:
            while not done.is_set():
                # A folder that is replaced without a pause may be unavailable; what is read must be whole.
                with suppress(StoreUnavailable):
                    look()
        except (AssertionError, RuntimeError, StoreError) as problem:
            problems.append(problem)

    watchers = [threading.Thread(target=watch, args=(look,)) for look in (stranger, ours, ours)]
    with closing(open_folder(folder, write=True)) as store:
        for watcher in watchers:
            watcher.start()
        try:
            for version in range(1, 26):
                store.write_vectors(range(N), np.full((N, DIM), version, np.float32), f"v{version}")
                store.publish(final=version % 4 == 0)
        finally:
            done.set()
            for watcher in watchers:
                watcher.join()
    assert problems == []
    assert len(seen) > 1


# -- the way back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8", "SQ8", "PQ4x4np", "IVF4,PQ4x4np"])
def test_a_rollback_publishes_the_very_file(folder: Path, factory: str) -> None:
    index = faiss.index_factory(DIM, factory)
    index.train(vectors(400, seed=3))
    index.add(vectors())
    put_index(folder, index)
    before = (folder / "index.faiss").read_bytes()
    for _ in range(2):  # a second migration may follow the first that was taken back
        with closing(open_folder(folder, write=True)) as store:
            old = store.read_vectors(range(N)).vectors
            assert old is not None
            for rows in (range(25), range(25, 38)):  # two are never written
                store.write_vectors(rows, vectors(seed=1)[rows], "new")
                store.publish()
            store.publish(final=True)
            assert (folder / "index.faiss").read_bytes() != before
            assert (folder / ".migrator" / "original.faiss").read_bytes() == before
        with closing(open_folder(folder, write=True)) as store:
            for rows in (range(20, 38), range(20)):
                store.write_vectors(rows, old[rows], None)
                store.publish()
            store.publish(final=True)
            assert store.count(stamp="new") == 0
        assert (folder / "index.faiss").read_bytes() == before
        assert sorted(path.name for path in (folder / ".migrator").rglob("*") if path.is_file()) == [
            "lock",
            "lock.json",
        ]


def test_a_rollback_keeps_what_the_application_wrote(folder: Path) -> None:
    index = faiss.index_factory(DIM, "HNSW8")
    index.add(vectors())
    put_index(folder, index)
    with closing(open_folder(folder, write=True)) as store:
        store.write_vectors(range(N), vectors(seed=1), "new")
        store.publish(final=True)
        theirs = vectors(seed=1)
        theirs[3] = 0.5
        other = faiss.index_factory(DIM, "HNSW8")
        other.add(theirs)
        put_index(folder, other)
        rest = [n for n in range(N) if n != 3]
        store.write_vectors(rest, vectors()[rest], None)
        store.publish(final=True)
    expected = vectors()
    expected[3] = 0.5
    np.testing.assert_array_equal(faiss.read_index(str(folder / "index.faiss")).reconstruct_n(0, N), expected)


def test_lists_are_balanced_again_at_the_cutover(folder: Path) -> None:
    def imbalance() -> float:
        index: Any = faiss.read_index(str(folder / "index.faiss"))
        return float(index.invlists.imbalance_factor())

    n = 2000
    index = faiss.index_factory(DIM, "IVF16,Flat")
    index.train(vectors(n))
    index.add(vectors(n))
    put_index(folder, index)
    put_items(folder, id=list(range(n)))
    with closing(open_folder(folder, write=True)) as store:
        assert "trained again at the cutover" in " ".join(store.capabilities.notes)
        moved: Any = vectors(n, seed=1) * 0.1 + 2
        store.write_vectors(range(n), moved, "new")
        store.publish()
        crowded = imbalance()
        assert crowded > 3
        store.publish(final=True)
        assert imbalance() < 2
        published = (folder / "index.faiss").stat().st_ino
        store.publish(final=True)
        assert (folder / "index.faiss").stat().st_ino == published, "there was nothing left to do"


def test_the_lock_file_tells_who(folder: Path) -> None:
    with closing(open_folder(folder, write=True)):
        holder = json.loads((folder / ".migrator" / "lock.json").read_text())
    assert holder["pid"] == os.getpid()
    assert datetime.fromisoformat(holder["since"]).tzinfo is not None
