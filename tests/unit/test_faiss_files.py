"""FAISS collections in files of any name: how they are found, what is refused in one message, what is read from where.

What files hold afterwards is read by faiss, numpy, pyarrow and pandas.
"""

from __future__ import annotations

import decimal
import glob
import os
import re
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from migrator.adapters.base import Page, Store, StoreRejected
from migrator.adapters.faiss import open_store
from migrator.adapters.faiss.folder import Folder

DIM, N = 16, 64
PARTS = [range(0, 30), range(30, 50), range(50, N)]


def vectors(n: int = N, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def built(factory: str, exact: np.ndarray) -> Any:
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors(400, seed=9))
    index.add(exact)
    return index


class Files:
    """`image.index`, `metadata/*.parquet` and `img_emb/*.npy` in a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = path / "image.index"

    def write(self, factory: str = "Flat", dtype: Any = np.float16, names: Any = None) -> None:
        for folder in ("metadata", "img_emb"):
            (self.path / folder).mkdir(parents=True)
        exact = vectors().astype(dtype)
        for part, rows in enumerate(PARTS):
            name = names[part] if names else f"{part}"
            table = pa.table({"image_path": [f"{row}.png" for row in rows], "n": pa.array(rows, pa.int64())})
            pq.write_table(table, self.path / "metadata" / f"metadata_{name}.parquet")
            np.save(self.path / "img_emb" / f"img_emb_{name}.npy", exact[list(rows)])
        self.put_index(built(factory, exact.astype(np.float32)))

    def put_index(self, index: Any) -> None:
        faiss.write_index(index, str(self.path / "new"))
        (self.path / "new").replace(self.index)

    def open(self, *, write: bool = False, exact: bool = True, **settings: Any) -> Store:
        config = {
            "kind": "faiss",
            "index": str(self.index),
            "items": f"{glob.escape(str(self.path))}/metadata/*.parquet",
            **settings,
        }
        if exact:
            config.setdefault("vectors", f"{glob.escape(str(self.path))}/img_emb/*.npy")
        return open_store(config, write=write)

    def refusal(self, **settings: Any) -> str:
        with pytest.raises(StoreRejected) as caught:
            self.open(**settings)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def content(self) -> dict[str, bytes]:
        return {str(file.relative_to(self.path)): file.read_bytes() for file in self.path.rglob("*") if file.is_file()}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "clip [v1]")


# -- where the files are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["0", "1", "2"], ["00", "01", "10"], ["1", "10", "2"]])
def test_files_are_read_in_the_order_of_their_names(files: Files, names: list[str]) -> None:
    """As pathlib sorts them, which is what clip-retrieval's reader relies on, and embedding_reader for the vectors."""
    files.write(names=names)
    before = files.content()
    with closing(files.open()) as store:
        assert store.scan_ids(after=None, limit=N) == list(range(N))
        page = store.read(range(N))
        assert [payload["image_path"] for payload in page.payloads] == [f"{row}.png" for row in range(N)]
    assert files.content() == before, "reading leaves nothing behind"


def test_a_list_gives_another_order(files: Files) -> None:
    files.write(names=["2", "10", "1"])
    where = {
        folder: [str(files.path / folder / f"{stem}_{name}.{suffix}") for name in ("2", "10", "1")]
        for folder, stem, suffix in (("metadata", "metadata", "parquet"), ("img_emb", "img_emb", "npy"))
    }
    assert "or in another order" in files.refusal()
    with closing(files.open(items=where["metadata"], vectors=where["img_emb"])) as store:
        page = store.read_payloads([7, 40])
        assert [payload["n"] for payload in page.payloads] == [7, 40]


def test_today_s_names_are_today_s_folder(tmp_path: Path) -> None:
    """One collection, one name, one lock, however it is spelled."""
    faiss.write_index(built("Flat", vectors()), str(tmp_path / "index.faiss"))
    pq.write_table(pa.table({"path": [f"{row}.png" for row in range(N)]}), tmp_path / "items.parquet")
    by_files = {"kind": "faiss", "index": str(tmp_path / "index.faiss"), "items": str(tmp_path / "items.parquet")}
    infos = []
    for config in (by_files, {"kind": "faiss", "path": str(tmp_path)}):
        with closing(open_store(config, write=False)) as store:
            infos.append(store.describe())
            assert store.scan_ids(after=None, limit=N) == list(range(N)), "no column of ids: the row numbers"
    assert infos[0] == infos[1]
    assert infos[0].name == f"faiss:{tmp_path.resolve()}"


def test_links_to_files_are_followed_and_kept(tmp_path: Path) -> None:
    real, folder = tmp_path / "v7", tmp_path / "gallery"
    real.mkdir()
    folder.mkdir()
    faiss.write_index(built("Flat", vectors()), str(real / "seven.index"))
    pq.write_table(pa.table({"path": [f"{row}.png" for row in range(N)]}), real / "seven.parquet")
    (folder / "index.faiss").symlink_to("../v7/seven.index")
    (folder / "items.parquet").symlink_to("../v7/seven.parquet")
    before = (real / "seven.index").read_bytes()
    with closing(open_store({"kind": "faiss", "path": str(folder)}, write=True)) as store:
        old = store.read_vectors(range(N)).vectors
        store.write_vectors(range(N), vectors(seed=1), "new")
        store.publish(final=True)
        np.testing.assert_array_equal(faiss.read_index(str(real / "seven.index")).reconstruct_n(0, N), vectors(seed=1))
        assert (folder / "index.faiss").is_symlink()
        assert old is not None
        store.write_vectors(range(N), old, None)
        store.publish(final=True)
    assert (real / "seven.index").read_bytes() == before
    assert sorted(file.name for file in real.iterdir()) == ["seven.index", "seven.parquet"]


def test_a_link_that_leads_to_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename cannot cross disks: the next index is made ready beside the file that it replaces."""
    real, folder = tmp_path / "disk", tmp_path / "gallery"
    real.mkdir()
    folder.mkdir()
    faiss.write_index(built("Flat", vectors()), str(real / "seven.index"))
    pq.write_table(pa.table({"path": [f"{row}.png" for row in range(N)]}), real / "seven.parquet")
    (folder / "index.faiss").symlink_to(real / "seven.index")
    (folder / "items.parquet").symlink_to(real / "seven.parquet")
    replace, link = Path.replace, os.link

    def no_crossing(one: Path, other: Any) -> bool:
        if real in (one.parent, Path(other).parent) and one.parent != Path(other).parent:
            raise OSError(18, os.strerror(18))
        return False

    monkeypatch.setattr(Folder, "_on_one_disk", lambda _, file: file.parent != real)
    monkeypatch.setattr(Path, "replace", lambda self, other: no_crossing(self, other) or replace(self, other))
    monkeypatch.setattr(os, "link", lambda one, other: no_crossing(Path(one), other) or link(one, other))
    (real / ".seven.index.tmp").write_bytes(b"left by a killed process")
    with closing(open_store({"kind": "faiss", "path": str(folder)}, write=True)) as store:
        store.write_vectors([3], vectors(1, seed=1), "new")
        store.publish()
        payload = store.read([5])
        store.insert(Page([5], payload.vectors, [{"path": "other.png"}], [None]))
        store.publish(final=True)
    index = faiss.read_index(str(real / "seven.index"))
    np.testing.assert_array_equal(index.reconstruct(3), vectors(1, seed=1)[0])
    assert pq.read_table(real / "seven.parquet").column("path")[5].as_py() == "other.png"
    assert sorted(file.name for file in real.iterdir()) == ["seven.index", "seven.parquet"]


# -- all that is wrong, at once ---------------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_said_at_once(files: Files) -> None:
    files.write()
    files.put_index(built("Flat", vectors(N + 1)))
    np.save(files.path / "img_emb" / "img_emb_1.npy", np.zeros((3, DIM), np.float64))
    pq.write_table(pa.table({"id": [0.5, None]}), files.path / "metadata" / "metadata_1.parquet")
    (files.path / "metadata" / "metadata_2.parquet").write_bytes(b"PAR1")
    message = files.refusal()
    for words in (
        r"metadata_1\.parquet: the column `id` has 1 empty rows \(row 1\)",
        r"metadata_0\.parquet has no column `id`, which other files have: its columns are image_path, n",
        r"metadata_2\.parquet cannot be read as Parquet",
        r"img_emb_1\.npy must hold vectors as float16 or float32 of shape \(n, dim\), it is float64 of shape \(3, 16\)",
    ):
        assert re.search(words, message), words
    files.index.unlink()
    message = files.refusal()
    assert "image.index does not exist" in message
    assert "metadata_2.parquet cannot be read" in message
    assert "img_emb_1.npy must hold" in message


def test_row_counts_must_match(files: Files) -> None:
    files.write()
    files.put_index(built("Flat", vectors(N + 1)))
    np.save(files.path / "img_emb" / "img_emb_1.npy", np.zeros((3, DIM + 1), np.float32))
    assert re.search(r"the vectors differ in length: 16 in .*img_emb_2.npy, 17 in .*img_emb_1.npy", files.refusal())
    np.save(files.path / "img_emb" / "img_emb_1.npy", np.zeros((3, DIM), np.float32))
    message = files.refusal()
    assert f"(3 files) hold {N - 17} vectors, but" in message
    assert f"holds {N} items, but {files.index} {N + 1} vectors" in message


@pytest.mark.parametrize("where", ["items", "vectors"])
def test_what_names_no_file(files: Files, where: str) -> None:
    files.write()
    pattern = f"{files.path.parent}/nothing/*.x"
    assert f"no file is called {pattern}" in files.refusal(**{where: pattern})
    assert "img_emb is a folder, not a file" in files.refusal(**{where: str(files.path / "img_emb")})
    (files.path / "gone").symlink_to("nowhere")
    assert re.search(
        r"gone is a symbolic link to .*nowhere, which does not exist",
        files.refusal(**{where: str(files.path / "gone")}),
    )


def test_a_folder_with_files_of_other_names_is_told_the_keys(files: Files) -> None:
    """The advice works: the keys that it gives open the collection."""
    files.write()
    with pytest.raises(StoreRejected) as caught:
        open_store({"kind": "faiss", "path": str(files.path)}, write=False)
    match = re.search(r"store\.index \((.*?)\) and store\.items \((.*?)\)", str(caught.value))
    assert match is not None
    with closing(open_store({"kind": "faiss", "index": match[1], "items": match[2]}, write=False)) as store:
        assert store.count() == N


@pytest.mark.parametrize(
    "config",
    [
        {"path": "x", "index": "y"},
        {"index": "y"},
        {"items": "z"},
        {"index": "y", "items": []},
        {"index": "y", "items": 3},
        {"path": "x", "vectors": [3]},
    ],
)
def test_settings_that_name_no_collection(config: dict[str, Any]) -> None:
    with pytest.raises(StoreRejected, match="given: "):
        open_store({"kind": "faiss", **config}, write=False)


# -- ids --------------------------------------------------------------------------------------------------------------

WIDE = [*range(N - 1), 2**63]


@pytest.mark.parametrize(
    ("ids", "words", "way_out"),
    [
        (pa.array([float(row) for row in range(N)]), r"it is double \(first rows: 0.0, 1.0, 2.0\): write it as int64",
         lambda ids: ids.cast(pa.int64())),
        (pa.array([decimal.Decimal(row) for row in range(N)]), r"it is decimal128\(2, 0\).*: write it as int64",
         lambda ids: ids.cast(pa.int64())),
        (pa.array(WIDE, pa.uint64()), r"integers above 9223372036854775807.*\(row 63\): write the ids as strings",
         lambda ids: ids.cast(pa.string())),
        (pa.array([*range(N - 2), None, None]), r"2 empty rows \(rows 62, 63\): every item needs one, so fill them",
         lambda ids: ids.fill_null(-1).to_pandas().where(lambda s: s >= 0, np.arange(N) + 100)),
        (pa.array([*range(N - 2), 7, 7]), r"holds the id 7 more than once \(rows 7 and 62\) \(2 such rows\)",
         lambda _: None),
        (pa.array([uuid.UUID(int=row).bytes for row in range(N)], pa.uuid()),
         "it is extension<arrow.uuid>.*: write it as text",
         lambda ids: [str(value) for value in ids.to_pylist()]),
        (pa.array([b"a%d" % row for row in range(N)]), r"it is binary.*b'a0'.*: write it as text",
         lambda ids: [value.hex() for value in ids.to_pylist()]),
        (pa.array([True] * N), "it is bool.*or rename the column, and the row number is the id", lambda _: None),
        (pa.array([[row] for row in range(N)]), "it is list<.*: write it as text",
         lambda ids: [str(value) for value in ids.to_pylist()]),
        (pa.array(range(N), pa.timestamp("s")), "it is timestamp.*: write it as text",
         lambda ids: ids.cast(pa.string())),
        (pa.array(["a", None] * (N // 2)).dictionary_encode(), r"32 empty rows \(rows 1, 3, 5 and 29 more\)",
         lambda _: None),
        (pa.nulls(N), r"64 empty rows \(rows 0, 1, 2 and 61 more\)", lambda _: None),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)  # fmt: skip
def test_ids_that_cannot_be_read_and_the_way_out(tmp_path: Path, ids: pa.Array, words: str, way_out: Any) -> None:
    def write(name: str, values: Any) -> None:
        pq.write_table(pa.table({name: values, "path": ["x"] * N}), tmp_path / "items.parquet")

    faiss.write_index(built("Flat", vectors()), str(tmp_path / "index.faiss"))
    write("id", ids)
    with pytest.raises(StoreRejected, match=words) as caught:
        open_store({"kind": "faiss", "path": str(tmp_path)}, write=False)
    assert str(tmp_path / "items.parquet") in str(caught.value)
    better = way_out(ids)
    write("id" if better is not None else "number", ids if better is None else better)
    with closing(open_store({"kind": "faiss", "path": str(tmp_path)}, write=False)) as store:
        assert store.count() == N


def test_ids_of_two_files_are_one_set(files: Files) -> None:
    files.write()
    tables = [pq.read_table(files.path / "metadata" / f"metadata_{part}.parquet") for part in range(3)]

    def put(part: int, ids: Any) -> None:
        table = tables[part].append_column("id", pa.array(ids))
        pq.write_table(table, files.path / "metadata" / f"metadata_{part}.parquet")

    for part, rows in enumerate(PARTS):
        put(part, list(rows))
    put(2, [*range(50, N - 1), 4])
    assert re.search(
        r"metadata_0.parquet holds the id 4 more than once \(row 4, and row 13 of .*metadata_2", files.refusal()
    )
    put(2, [str(row) for row in PARTS[2]])
    assert re.search(r"metadata_2.* has strings in its column `id`, .*metadata_0.* has integers", files.refusal())
    put(2, [1000 - row for row in PARTS[2]])
    with closing(files.open()) as store:
        page = store.read([1000 - 55])
        assert page.payloads[0]["n"] == 55
        np.testing.assert_array_equal(page.vectors[0], vectors().astype(np.float16)[55])


# -- exact vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("factory", ["PQ4x4np", "SQ4", "IVF4,PQ4x4np", "HNSW8_SQ8"])
def test_old_vectors_are_read_exactly(files: Files, factory: str, dtype: Any) -> None:
    files.write(factory, dtype)
    exact = vectors().astype(dtype).astype(np.float32)
    with closing(files.open(exact=False)) as store:
        assert not store.capabilities.exact_vectors
        assert "name them as store.vectors" in " ".join(store.capabilities.notes)
    before = files.content()
    with closing(files.open(write=True)) as store:
        assert store.capabilities.exact_vectors
        page = store.read_vectors(range(N))
        np.testing.assert_array_equal(page.vectors, exact)
        store.write_vectors(range(40), vectors(seed=1)[:40], "new")
        mixed = store.read_vectors(range(N)).vectors
        np.testing.assert_array_equal(mixed, np.concatenate([vectors(seed=1)[:40], exact[40:]]))
        assert store.capabilities.exact_vectors
        store.publish(final=True)
        after = store.read_vectors(range(N)).vectors
        assert after is not None
        np.testing.assert_array_equal(after[40:], exact[40:])
        published = store.capabilities
        assert not published.exact_vectors, "what was published lies in the index alone"
    with closing(files.open(write=True)) as store:
        store.write_vectors(range(40), exact[:40], None)
        store.publish(final=True)
        assert store.capabilities.exact_vectors
    assert {name: data for name, data in files.content().items() if ".migrator" not in name} == before


@pytest.mark.parametrize("factory", ["Flat", "SQ8"])
def test_after_a_migration_the_files_of_vectors_are_outdated(files: Files, factory: str) -> None:
    files.write(factory)
    with closing(files.open(write=True)) as store:
        store.write_vectors(range(N), vectors(seed=1), "new")
        store.publish(final=True)
        store.clear_migration_state()
        found = store.read_vectors(range(N)).vectors
        assert found is not None
        np.testing.assert_allclose(found, vectors(seed=1), atol=0.01)
    with closing(files.open()) as store:
        assert store.capabilities.exact_vectors == (factory == "Flat")
        assert factory == "Flat" or "not used: remove the key" in " ".join(store.capabilities.notes)
    for part, rows in enumerate(PARTS):
        np.save(files.path / "img_emb" / f"img_emb_{part}.npy", vectors(seed=1)[list(rows)])
    with closing(files.open()) as store:
        assert store.capabilities.exact_vectors, "new files of vectors are used"
        np.testing.assert_array_equal(store.read_vectors(range(N)).vectors, vectors(seed=1))


def test_a_part_taken_back_is_rebuilt_from_the_exact_vectors(files: Files) -> None:
    files.write("SQ8")
    exact = vectors().astype(np.float16).astype(np.float32)
    with closing(files.open(write=True)) as store:
        store.write_vectors(range(N), vectors(seed=1), "new")
        store.publish(final=True)
        store.write_vectors(range(1, N), exact[1:], None)
        store.publish(final=True)
        assert store.unstamped("new", after=None, limit=N) == list(range(1, N))
    found = faiss.read_index(str(files.index)).reconstruct_n(0, N)
    np.testing.assert_allclose(found[1:], exact[1:], atol=0.01)
    np.testing.assert_allclose(found[0], vectors(seed=1)[0], atol=0.01)


def test_what_the_application_writes_into_the_index_meanwhile_is_seen(files: Files) -> None:
    files.write("SQ8")
    newer = vectors().astype(np.float16).astype(np.float32)
    newer[5] = vectors(seed=3)[5]
    with closing(files.open(write=True)) as store:
        page = store.read([4, 5])
        files.put_index(built("SQ8", newer))
        report = store.write_vectors([4, 5], vectors(2, seed=1), "new", expected=page)
        assert (list(report.written), list(report.changed)) == ([4], [5])


@pytest.mark.parametrize("factory", ["Flat", "PQ8x4np"])
def test_vectors_in_another_order_are_found(files: Files, factory: str) -> None:
    files.write(factory)
    (files.path / "img_emb" / "img_emb_0.npy").rename(files.path / "img_emb" / "img_emb_9.npy")
    assert "img_emb_1.npy" in files.refusal()
    assert "hold other vectors than" in files.refusal()
    with closing(files.open(exact=False)) as store:
        assert store.count() == N


@pytest.mark.parametrize("damage", ["empty", "half", "no array", "archive", "objects", "one dimension", "big endian"])
def test_files_of_vectors_that_are_none(files: Files, damage: str) -> None:
    files.write()
    file = files.path / "img_emb" / "img_emb_0.npy"
    whole = file.read_bytes()
    if damage == "archive":
        with file.open("wb") as out:
            np.savez(out, a=vectors(3))
    elif damage in ("objects", "one dimension", "big endian"):
        array = {"objects": np.array([[None]]), "one dimension": np.zeros(3, np.float32)}.get(damage)
        np.save(file, vectors(30).astype(">f4") if array is None else array)
    else:
        file.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "no array": b"hello, world"}[damage])
    assert re.search(r"img_emb_0\.npy (cannot be read as \.npy|must hold vectors)", files.refusal())


# -- payload columns --------------------------------------------------------------------------------------------------


def odd_columns(n: int = N) -> pa.Table:
    """What Python objects would not carry, or not exactly."""
    rows = list(range(n))
    nested = pa.struct([("at", pa.timestamp("ns", "Europe/Berlin")), ("tags", pa.list_(pa.large_string()))])
    columns = {
        "stamp": pa.array([1_716_000_000_000_000_001 + row for row in rows], pa.timestamp("ns")),
        "zoned": pa.array([None if row % 3 else 1_716_000_000_000_000_999 for row in rows], pa.timestamp("ns", "UTC")),
        "took": pa.array([1001 * row for row in rows], pa.duration("ns")),
        "hour": pa.array([1001 * row for row in rows], pa.time64("ns")),
        "far": pa.array([2**52 + row for row in rows], pa.timestamp("ms")),
        "price": pa.array([decimal.Decimal(f"{row}.10") for row in rows], pa.decimal128(30, 2)),
        "wide": pa.array([decimal.Decimal(row) for row in rows], pa.decimal256(60, 0)),
        "shop": pa.array(["a", "b", None, "a"] * (n // 4)).dictionary_encode(),
        "text": pa.array([f"t{row}" for row in rows], pa.large_string()),
        "view": pa.array([f"v{row}" if row % 2 else None for row in rows], pa.string_view()),
        "blob": pa.array([b"\xff%d" % row for row in rows]),
        "half": pa.array([np.float16(row) for row in rows], pa.float16()),
        "nan": pa.array([[float("nan"), None, 1.5, -0.0][row % 4] for row in rows]),
        "box": pa.array([None if row % 5 == 0 else {"at": row, "tags": [None, "x"]} for row in rows], nested),
        "map": pa.array([[("k", row)] if row % 2 else None for row in rows], pa.map_(pa.string(), pa.duration("ns"))),
        "list": pa.array([[row, None] if row % 2 else [] for row in rows], pa.list_(pa.time64("ns"))),
        "fixed": pa.array([[row, 1] for row in rows], pa.list_(pa.int8(), 2)),
        "uuid": pa.array([uuid.UUID(int=row).bytes for row in rows], pa.uuid()),
        "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}"] * n)),
        "nothing": pa.nulls(n),
    }
    fields = [pa.field(name, column.type, metadata={"unit": name}) for name, column in columns.items()]
    return pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields, {"huggingface": '{"info": {}}'}))


def assert_same(found: Any, expected: Any, name: str) -> None:
    if pa.types.is_floating(expected.type):  # NaN does not equal itself
        assert repr(found.to_pylist()) == repr(expected.to_pylist()), name
    else:
        assert found.equals(expected), name


def as_read(folder: Path) -> pa.Table:
    return pq.ParquetFile(folder / "items.parquet").read()


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    folder = tmp_path / "odd"
    folder.mkdir()
    faiss.write_index(built("Flat", vectors()), str(folder / "index.faiss"))
    table = odd_columns().add_column(3, pa.field("id", pa.int64()), pa.array(range(N)))
    pq.write_table(table, folder / "items.parquet")
    return folder


def test_payloads_survive_a_shadow_exactly(odd: Path) -> None:
    with closing(open_store({"kind": "faiss", "path": str(odd)}, write=True)) as source:
        with closing(source.create_like(f"{odd}__shadow", dim=8)) as target:
            new = np.ones((N, 8), np.float32)
            for start in range(0, N, 20):
                ids = list(range(start, min(start + 20, N)))
                page = source.read(ids)
                target.insert(Page(ids, new[ids], page.payloads, ["new"] * len(ids)))
            again = target.read_payloads(range(N))
            target.publish(final=True)
            once_more = target.read_payloads(range(N))
        want = source.read_payloads(range(N))
    assert repr(want.payloads) == repr(again.payloads) == repr(once_more.payloads)
    found, expected = as_read(Path(f"{odd}__shadow")), as_read(odd)
    assert found.schema.equals(expected.schema, check_metadata=True)
    for name in expected.schema.names:
        assert_same(found.column(name), expected.column(name), name)


def test_payloads_survive_a_rewrite_exactly(odd: Path) -> None:
    before = as_read(odd)
    with closing(open_store({"kind": "faiss", "path": str(odd)}, write=True)) as store:
        page = store.read([9])
        assert not store.insert(Page([7], page.vectors, page.payloads, [None])).rejected
        store.delete([0])
        store.publish(final=True)
    after = as_read(odd)
    assert after.schema.equals(before.schema, check_metadata=True)
    rows = [*range(1, 7), 9, *range(8, N)]
    for name in before.schema.names:
        if name == "id":
            assert after.column(name).to_pylist() == list(range(1, N))
        else:
            column = before.column(name).combine_chunks()
            parts = [column.slice(row, 1) for row in rows]
            assert_same(after.column(name).combine_chunks(), pa.concat_arrays(parts), name)


def test_payload_values_are_usable(odd: Path) -> None:
    with closing(open_store({"kind": "faiss", "path": str(odd)}, write=False)) as store:
        page = store.read_payloads([0, 5])
    first, other = page.payloads
    assert first["stamp"] == "2024-05-18 02:40:00.000000001"
    assert other["took"] == "5005"
    assert other["hour"] == "00:00:00.000005005"
    assert first["shop"] == "a"
    assert first["price"] == decimal.Decimal("0.10")
    assert isinstance(first["far"], str), "a year that Python's times do not have"
    assert first["far"] != other["far"]


def test_not_a_number_is_no_change(odd: Path) -> None:
    with closing(open_store({"kind": "faiss", "path": str(odd)}, write=True)) as store:
        page = store.read(range(8))
        pq.write_table(as_read(odd), odd / "new")
        (odd / "new").replace(odd / "items.parquet")
        report = store.write_vectors(range(8), vectors(8, seed=1), "new", expected=page)
        assert list(report.written) == list(range(8))
        table = as_read(odd)
        names = table.schema.names
        changed = table.set_column(names.index("nan"), table.schema.field("nan"), pa.array([2.0] * N))
        page = store.read(range(8))
        pq.write_table(changed, odd / "new")
        (odd / "new").replace(odd / "items.parquet")
        report = store.write_vectors(range(8), vectors(8, seed=2), "next", expected=page)
        assert list(report.changed) == list(range(8))


def test_text_that_is_none_is_named(odd: Path) -> None:
    table = as_read(odd)
    bad = pa.array([b"\xff\xfe"] * N).view(pa.string())
    pq.write_table(table.set_column(table.schema.names.index("text"), "text", bad), odd / "items.parquet")
    with pytest.raises(StoreRejected, match=r"items\.parquet: the column `text` cannot be read .*UTF8.*UTF-8 text"):
        open_store({"kind": "faiss", "path": str(odd)}, write=False)


# -- several files ----------------------------------------------------------------------------------------------------


def test_only_files_that_hold_a_change_are_written(files: Files) -> None:
    files.write()
    pq.write_table(
        pq.read_table(files.path / "metadata" / "metadata_1.parquet"),
        files.path / "metadata" / "metadata_1.parquet",
        compression="zstd",
        row_group_size=7,
    )
    (files.path / "metadata" / "metadata_1.parquet").chmod(0o640)
    before = files.content()
    with closing(files.open(write=True)) as store:
        store.insert(Page([40], vectors(1, seed=5), [{"image_path": "other.png", "n": 40}], [None]))
        store.publish(final=True)
        again = store.read([40, 41])
    after = {name: data for name, data in files.content().items() if ".migrator" not in name}
    assert {name for name in before if after[name] != before[name]} == {
        "image.index", "metadata/metadata_1.parquet", "img_emb/img_emb_1.npy",
    }  # fmt: skip
    assert after.keys() == before.keys()
    assert again.payloads is not None
    assert [payload["image_path"] for payload in again.payloads] == ["other.png", "41.png"]
    written = pq.read_metadata(files.path / "metadata" / "metadata_1.parquet")
    assert (written.row_group(0).column(0).compression, written.row_group(0).num_rows) == ("ZSTD", 7)
    assert (files.path / "metadata" / "metadata_1.parquet").stat().st_mode & 0o777 == 0o640
    array = np.load(files.path / "img_emb" / "img_emb_1.npy")
    assert array.dtype == np.float16
    np.testing.assert_array_equal(array[10], vectors(1, seed=5).astype(np.float16)[0])
    frame = pd.read_parquet(files.path / "metadata" / "metadata_1.parquet")
    assert frame["n"].tolist() == list(PARTS[1])


def test_a_column_of_ids_comes_when_rows_go(files: Files) -> None:
    files.write()
    with closing(files.open(write=True)) as store:
        page = store.read([3])
        store.delete([10, 63])
        store.insert(Page([100], page.vectors, page.payloads, [None]))
        store.publish(final=True)
        ids = [row for row in range(N) if row not in (10, 63)] + [100]
        assert store.scan_ids(after=None, limit=200) == ids
        found = store.read([100, 11])
        assert [payload["n"] for payload in found.payloads] == [3, 11]
    tables = [pd.read_parquet(file) for file in sorted((files.path / "metadata").iterdir())]
    assert [len(table) for table in tables] == [29, 20, 14]
    assert pd.concat(tables)["id"].tolist() == ids
    arrays = [np.load(file) for file in sorted((files.path / "img_emb").iterdir())]
    assert [len(array) for array in arrays] == [29, 20, 14]
    found = faiss.read_index(str(files.index)).reconstruct_n(0, len(ids))
    np.testing.assert_array_equal(found, np.concatenate(arrays).astype(np.float32))


def test_rows_at_the_end_need_no_column_of_ids(files: Files) -> None:
    files.write()
    with closing(files.open(write=True)) as store:
        page = store.read([3])
        store.insert(Page([N], page.vectors, page.payloads, [None]))
        store.publish(final=True)
        assert store.scan_ids(after=N - 2, limit=9) == [N - 1, N]
    assert "id" not in pq.read_schema(files.path / "metadata" / "metadata_2.parquet").names


def test_files_whose_columns_differ(files: Files) -> None:
    """pandas writes a column of missing values as null, and of integers beside one as double."""
    files.write()
    put = lambda part, **columns: pq.write_table(  # noqa: E731
        pa.table({"n": list(PARTS[part]), **columns}), files.path / "metadata" / f"metadata_{part}.parquet"
    )
    put(0, caption=pa.nulls(30), size=list(range(30)))
    put(1, caption=["x"] * 20, size=[0.5] * 20)
    put(2, caption=pa.array(["y"] * 14).dictionary_encode())
    before = files.content()
    with closing(files.open(write=True)) as store:
        page = store.read([0, 30, 50])
        assert [dict(payload) for payload in page.payloads] == [
            {"n": 0, "caption": None, "size": 0.0},
            {"n": 30, "caption": "x", "size": 0.5},
            {"n": 50, "caption": "y", "size": None},
        ]
        store.insert(Page([0], page.vectors[:1], [{"n": 0, "caption": "now", "size": 3.0}], [None]))
        store.publish(final=True)
    after = files.content()
    assert after["metadata/metadata_2.parquet"] == before["metadata/metadata_2.parquet"]
    schema = pq.read_schema(files.path / "metadata" / "metadata_0.parquet")
    assert (schema.field("caption").type, schema.field("size").type) == (pa.string(), pa.int64())
    put(1, caption=[3] * 20)
    put(0, caption=[["a"]] * 30)
    assert re.search("metadata_0.parquet, .*metadata_2.parquet have columns of types that do not fit", files.refusal())


def test_a_killed_replacement_is_completed(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it has begun, readers of migrator take the next files, and the next writer puts them in place."""
    files.write()
    before = {name: data for name, data in files.content().items() if name != "image.index"}

    class Killed(BaseException):
        pass

    def die(self: Folder) -> None:
        raise Killed

    store = files.open(write=True)
    store.delete([40])
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "_finish_replacement", die)
        with pytest.raises(Killed):
            store.publish(final=True)
    store.close()
    assert {name: files.content()[name] for name in before} == before
    with closing(files.open()) as reader:
        assert reader.count() == N - 1
        payloads = reader.read_payloads([41]).payloads
        assert payloads is not None
        assert payloads[0]["n"] == 41
    with closing(files.open(write=True)) as store:
        assert store.count() == N - 1
    assert sum(len(pd.read_parquet(file)) for file in (files.path / "metadata").iterdir()) == N - 1
    assert sum(len(np.load(file)) for file in (files.path / "img_emb").iterdir()) == N - 1
    assert faiss.read_index(str(files.index)).ntotal == N - 1
