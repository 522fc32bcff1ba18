"""A folder as clip-retrieval and autofaiss leave it, migrated as it is, by the real commands.

`clip-retrieval inference` writes `metadata/metadata_N.parquet` with pandas and `img_emb/img_emb_N.npy` with numpy, in
float16; `clip-retrieval index` has autofaiss build `image.index` from the latter. Their readers take all files in the
order of their names; a row number over them is an item's id.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from migrator.project import Project
from tests.world import DIM, NAME, World, embed_images

Migrator = Callable[..., int]
SHADOW = [
    ["plan"],
    ["verify"],
    ["rollout", "--stage", "prepare"],
    ["rollout", "--stage", "backfill"],
    ["backfill"],
    ["rollout", "--stage", "canary"],
    ["backfill"],
    ["rollout", "--stage", "cutover"],
]
"""Commands up to the cutover."""
N, PARTS = 120, [range(0, 50), range(50, 91), range(91, 120)]


class ClipFolder:
    """The folder, and what readers other than migrator find in it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.path = world.folder / "clip"
        self.index_file = self.path / "image.index"

    def write(self, factory: str) -> None:
        for name in ("metadata", "img_emb"):
            (self.path / name).mkdir(parents=True)
        names = [f"{number:05d}.png" for number in range(N)]
        vectors = embed_images(self.world, "old", names).astype(np.float16)
        for part, rows in enumerate(PARTS):
            frame = pd.DataFrame(
                {
                    "image_path": [str(self.world.images / names[row]) for row in rows],
                    "caption": [f"picture {row}" if row % 7 else None for row in rows],
                    "kind": [f"kind {row % 3}" for row in rows],
                    "score": [float("nan") if row % 5 == 0 else row / 7 for row in rows],
                    "seen": pd.to_datetime([1_716_000_000_000_000_000 + row for row in rows]),
                }
            )
            frame.to_parquet(self.path / "metadata" / f"metadata_{part}.parquet")
            np.save(self.path / "img_emb" / f"img_emb_{part}.npy", vectors[list(rows)])
        index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
        exact = self.embeddings()
        if not index.is_trained:
            more = np.random.default_rng(0).standard_normal((300, DIM)).astype(np.float32)
            index.train(np.concatenate([exact, more / np.linalg.norm(more, axis=1, keepdims=True)]))
        index.add(exact)
        faiss.write_index(index, str(self.index_file))

    def configure(self, *, strategy: str = "in_place", vectors: bool = True) -> None:
        document = yaml.safe_load(self.world.config.read_text())
        section = document["migrations"][NAME]
        section["store"] = {"kind": "faiss", "index": "./clip/image.index", "items": "./clip/metadata/*.parquet"}
        if vectors:
            section["store"]["vectors"] = "./clip/img_emb/*.npy"
        section["images"]["uri"] = "{image_path}"
        section["rollout"]["strategy"] = strategy
        self.world.config.write_text(yaml.safe_dump(document))

    def embeddings(self) -> np.ndarray:
        files = sorted((self.path / "img_emb").glob("*.npy"))
        return np.concatenate([np.load(file) for file in files]).astype(np.float32)

    def metadata(self) -> pd.DataFrame:
        """As clip-retrieval's own reader puts it together."""
        files = sorted((self.path / "metadata").glob("*.parquet"))
        return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)

    def files(self) -> dict[str, bytes]:
        """What the user wrote."""
        found = [file for folder in ("metadata", "img_emb") for file in (self.path / folder).iterdir()]
        return {file.name: file.read_bytes() for file in (*found, self.index_file)}


@pytest.fixture
def clip(world: World) -> ClipFolder:
    return ClipFolder(world)


def assert_holds(file: Path, vectors: np.ndarray, factory: str) -> None:
    """An index read by faiss alone holds these vectors, as well as one of its kind can."""
    index = faiss.read_index(str(file))
    if "IVF" in factory:
        faiss.extract_index_ivf(index).make_direct_map()
    found = index.reconstruct_n(0, len(vectors))
    ideal = faiss.read_index(str(file))  # trained as it is
    ideal.reset()
    ideal.add(vectors)
    if "IVF" in factory:
        faiss.extract_index_ivf(ideal).make_direct_map()
    least = np.square(ideal.reconstruct_n(0, len(vectors)) - vectors).mean()
    assert np.square(found - vectors).mean() <= 1.2 * least + 1e-9


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW16", "L2norm,Flat", "OPQ8_24,IVF4_HNSW8,PQ8x4np"])
def test_in_place_and_back(clip: ClipFolder, migrator: Migrator, factory: str) -> None:
    clip.write(factory)
    clip.configure()
    before = clip.files()
    new = embed_images(clip.world, "new", [f"{number:05d}.png" for number in range(N)])
    assert migrator("plan") == 0
    assert migrator("verify") == 0
    assert migrator("rollout", "--stage", "prepare") == 0
    assert migrator("rollout", "--stage", "canary") == 0
    assert migrator("rollout", "--stage", "backfill") == 0
    assert clip.files() == before
    assert sorted(file.name for file in clip.path.iterdir() if file.name != ".migrator.image.index") == [
        "image.index", "img_emb", "metadata",
    ]  # fmt: skip
    assert migrator("backfill", "--max-items", "40") == 0
    assert faiss.read_index(str(clip.index_file)).ntotal == N
    assert migrator("backfill") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    assert_holds(clip.index_file, new, factory)
    assert {name: data for name, data in clip.files().items() if name != "image.index"} == {
        name: data for name, data in before.items() if name != "image.index"
    }
    assert migrator("rollback") == 0
    assert clip.files() == before


def test_finished_in_place(clip: ClipFolder, migrator: Migrator, capsys: pytest.CaptureFixture[str]) -> None:
    """The files of vectors are then those of the old encoder, and not used any more."""
    clip.write("PQ8x4np")
    clip.configure()
    for words in (["plan"], ["verify"], ["rollout", "--stage", "prepare"], ["rollout", "--stage", "canary"],
                  ["rollout", "--stage", "backfill"], ["backfill"], ["rollout", "--stage", "cutover"],
                  ["rollout", "--stage", "finalize"], ["rollout", "--stage", "finalize", "--drop-old"]):  # fmt: skip
        assert migrator(*words) == 0, words
    new = embed_images(clip.world, "new", [f"{number:05d}.png" for number in range(N)])
    with Project.open(clip.world.config) as project, project.store() as store:
        assert not store.capabilities.exact_vectors
        assert "not used" in " ".join(store.capabilities.notes)
        read = store.read_vectors(range(N)).vectors
        assert read is not None
        np.testing.assert_array_equal(read, faiss.read_index(str(clip.index_file)).reconstruct_n(0, N))
    assert_holds(clip.index_file, new, "PQ8x4np")
    capsys.readouterr()
    assert migrator("status", "--json") == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"


def test_the_plan_says_where_old_vectors_are_read(
    clip: ClipFolder, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    clip.write("PQ8x4np")
    said = {}
    for vectors in (False, True):
        clip.configure(vectors=vectors)
        capsys.readouterr()
        assert migrator("plan", "--json") == 0
        said[vectors] = " ".join(json.loads(capsys.readouterr().out)["capabilities"])
    assert "name them as store.vectors" in said[False]
    assert "restores every vector bit for bit" not in said[False]
    assert "old vectors are read from the files of store.vectors" in said[True]
    assert "restores every vector bit for bit" in said[True]


@pytest.mark.parametrize("factory", ["HNSW16", "PQ8x4np"])
def test_shadow_and_back(
    clip: ClipFolder, migrator: Migrator, factory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    clip.write(factory)
    clip.configure(strategy="shadow")
    before = clip.files()
    new = embed_images(clip.world, "new", [f"{number:05d}.png" for number in range(N)])
    for words in SHADOW:
        assert migrator(*words) == 0, words
    capsys.readouterr()
    assert migrator("route", "--json") == 0
    shadow = Path(json.loads(capsys.readouterr().out)["query_collection"])
    assert shadow.parent == clip.path.resolve()
    assert clip.files() == before
    assert_holds(shadow / "index.faiss", new, factory)
    copied = pq.read_table(shadow / "items.parquet", partitioning=None)
    assert copied.column("id").to_pylist() == list(range(N))
    files = sorted((clip.path / "metadata").glob("*.parquet"))
    source = pa.concat_tables([pq.read_table(file, partitioning=None) for file in files])
    assert copied.drop_columns(["id"]).equals(source, check_metadata=False)
    assert copied.schema.metadata == source.schema.metadata
    pd.testing.assert_frame_equal(pd.read_parquet(shadow / "items.parquet").drop(columns="id"), clip.metadata())
    assert migrator("rollback") == 0
    assert clip.files() == before
    assert not shadow.exists()


def test_what_changed_in_the_shadow_is_brought_back_whole(clip: ClipFolder, migrator: Migrator) -> None:
    """After the cutover the application changes one item, adds one, and deletes one: index, metadata and vectors."""
    clip.write("Flat")
    clip.configure(strategy="shadow")
    before = clip.files()
    for words in SHADOW:
        assert migrator(*words) == 0, words
    (shadow,) = clip.path.glob("image.index__*")
    table = pq.read_table(shadow / "items.parquet", partitioning=None)
    rows = table.to_pandas()
    vectors = faiss.read_index(str(shadow / "index.faiss")).reconstruct_n(0, N)
    rows.loc[100, "caption"] = "changed"
    added = rows.loc[[3]].assign(id=N)
    rows = pd.concat([rows.drop(index=60), added], ignore_index=True)
    vectors = np.concatenate([np.delete(vectors, 60, axis=0), vectors[3:4]])
    index = faiss.IndexFlatIP(DIM)
    index.add(vectors)
    faiss.write_index(index, str(shadow / "index.new"))
    pq.write_table(pa.Table.from_pandas(rows, schema=table.schema, preserve_index=False), shadow / "items.new")
    (shadow / "index.new").replace(shadow / "index.faiss")
    (shadow / "items.new").replace(shadow / "items.parquet")
    assert migrator("rollback") == 0
    after = clip.metadata()
    assert len(after) == N
    assert after["id"].tolist() == [*range(60), *range(61, N), N]
    assert after["caption"][99] == "changed"
    assert after["image_path"][N - 1] == after["image_path"][3]
    found = faiss.read_index(str(clip.index_file)).reconstruct_n(0, N)
    names = [Path(path).name for path in after["image_path"]]
    np.testing.assert_allclose(found, embed_images(clip.world, "old", names), atol=2e-3)
    np.testing.assert_allclose(clip.embeddings(), found, atol=1e-3)
    assert clip.files().keys() == before.keys()
    with Project.open(clip.world.config) as project, project.store() as store:
        assert store.count() == N
        page = store.read_payloads([N, 100])
        assert [payload["caption"] for payload in page.payloads] == [after["caption"][3], "changed"]


def test_two_indexes_in_one_folder_are_two_collections(clip: ClipFolder, migrator: Migrator) -> None:
    clip.write("Flat")
    clip.configure()
    (clip.path / "text.index").write_bytes(clip.index_file.read_bytes())
    assert migrator("plan") == 0
    with Project.open(clip.world.config) as project, project.store() as store:
        name = store.describe().name
    assert name == f"faiss:{clip.index_file.resolve()}"
