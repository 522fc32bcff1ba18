"""Whole image-search systems, built as public tools build them: their files, schemas and loaders, and none of ours.

Each is made by its store's own client, with vectors from a loader of its own (torchvision or timm transforms over
`PIL.Image.open(...).convert("RGB")`), and can say what its store holds now and what a model gives for its images.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from uuid import NAMESPACE_URL, uuid5

import numpy as np
from PIL import Image

ITEMS = 260
SIZE = 32
ARCH = "test_resnet"
DIM = 96  # pooled features of ARCH

MODELS = f'''
"""The system's own models and its own way from a picture to a tensor."""
import timm
import torch
from torchvision import transforms

transform = transforms.Compose([
    transforms.Resize({SIZE}, interpolation=transforms.InterpolationMode.BICUBIC),
    transforms.CenterCrop({SIZE}),
    lambda image: image.convert("RGB"),
    transforms.ToTensor(),
    transforms.Normalize((0.481, 0.458, 0.408), (0.269, 0.261, 0.276)),
])


def network(seed):
    torch.manual_seed(seed)
    model = timm.create_model("{ARCH}", pretrained=False, num_classes=0)
    model.train()(torch.randn(64, 3, {SIZE}, {SIZE}))  # its norms get statistics, and pictures get apart
    return model.eval()


def old():
    return network(1), transform


def new():
    return network(2), transform
'''


class System(ABC):
    """One application with a collection of `ITEMS` images, below `folder`."""

    name: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir(parents=True)
        (folder / "models.py").write_text(MODELS)
        space: dict[str, Any] = {}
        import_torchvision()
        exec(MODELS, space)  # as `import models` would, without leaving it among the modules
        self.transform: Callable[[Image.Image], Any] = space["transform"]
        self.networks = {"old": space["network"](1), "new": space["network"](2)}
        self.draw()
        self.build()

    def draw(self) -> None:
        """Writes the images: noise on a ground of the item's class, every third one a cut-out with transparency."""
        rng = np.random.default_rng(0)
        for number in range(ITEMS):
            pixels = rng.integers(0, 120, (44, 36, 4), np.uint8)
            pixels[..., number % 3] += 120
            pixels[..., 3] = 255 if number % 3 else rng.integers(0, 256, (44, 36), np.uint8)
            Image.fromarray(pixels).save(self.image(number))

    def image(self, number: int) -> Path:
        return self.images / f"{number:05d}.png"

    def embed(self, which: str) -> np.ndarray:
        """(ITEMS, DIM) float32 of unit length, by the system's own loader and the old or the new network."""
        import torch

        batch = torch.stack([self.transform(Image.open(self.image(number))) for number in range(ITEMS)])
        with torch.inference_mode():
            return torch.nn.functional.normalize(self.networks[which](batch)).numpy()

    def encoder(self, which: str) -> dict[str, Any]:
        """The section `old_encoder` or `new_encoder` that its owner writes."""
        return {"module": f"models:{which}", "dim": DIM}

    @abstractmethod
    def build(self) -> None:
        """Makes the collection as the tool does."""

    @abstractmethod
    def init(self) -> list[str]:
        """Options for `migrator init`."""

    @abstractmethod
    def vectors(self, collection: str | None = None) -> np.ndarray:
        """(ITEMS, DIM): what its store's own client reads, in the order of the images."""

    def snapshot(self) -> object:
        """Everything of the collection but its vectors, by its store's own client."""
        return None

    def changes(self) -> dict[str, Any]:
        """Further keys of the migration that its owner sets: rollout__strategy="shadow"."""
        return {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the system's services run."""
        yield


def import_torchvision() -> None:
    from migrator.trainer.torchvision_cpu import import_timm

    import_timm()  # torchvision's wheel does not import beside a CPU-only torch without the remedy


class ClipRetrieval(System):
    """A folder as clip-retrieval and autofaiss leave it: row numbers for ids, absolute paths, partitions."""

    name = "clip-retrieval"
    factory = "OPQ8_32,IVF4_HNSW8,PQ8x4"

    def build(self) -> None:
        import faiss
        import pyarrow as pa
        import pyarrow.parquet as pq

        output = self.folder / "output"
        vectors = self.embed("old").astype(np.float16)
        half = ITEMS // 2
        for part, rows in enumerate((range(half), range(half, ITEMS))):
            (output / "img_emb").mkdir(parents=True, exist_ok=True)
            (output / "metadata").mkdir(exist_ok=True)
            np.save(output / "img_emb" / f"img_emb_{part}.npy", vectors[rows.start : rows.stop])
            table = pa.table(
                {
                    "image_path": [str(self.image(number)) for number in rows],
                    "caption": [f"picture {number}" for number in rows],
                    "category": [f"c{number % 3}" for number in rows],
                }
            )
            pq.write_table(table, output / "metadata" / f"metadata_{part}.parquet")
        index = faiss.index_factory(DIM, self.factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors.astype(np.float32))
        index.add(vectors.astype(np.float32))
        faiss.write_index(index, str(output / "image.index"))

    def init(self) -> list[str]:
        output = self.folder / "output"
        return [
            *("--store", "faiss", "--index", f"{output}/image.index"),
            *("--items", f"{output}/metadata/*.parquet", "--vectors", f"{output}/img_emb/*.npy"),
        ]

    def vectors(self, collection: str | None = None) -> np.ndarray:
        import faiss

        index = faiss.read_index(index_file(collection, self.folder / "output" / "image.index"))
        return index.reconstruct_n(0, index.ntotal)

    def snapshot(self) -> object:
        output = self.folder / "output"
        return {
            str(file): file.read_bytes() for file in sorted(output.rglob("*")) if file.is_file() and not hidden(file)
        }


class ClipRetrievalFlat(ClipRetrieval):
    """The same with few images, for which autofaiss builds a plain graph; without the original vectors."""

    name = "autofaiss-hnsw"
    factory = "HNSW15"

    def init(self) -> list[str]:
        return super().init()[:6]


def index_file(collection: str | None, own: Path) -> str:
    """The index of a collection that the route names: the system's own file, or a folder that migrator has made."""
    folder = Path(collection or own)
    return str(folder / "index.faiss" if folder.is_dir() else folder)


def hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


class HuggingFace(System):
    """`Dataset.to_parquet` with an image struct, and the index of `Dataset.save_faiss_index` (exact, L2)."""

    name = "hugging-face-datasets"

    def build(self) -> None:
        import faiss
        import pyarrow as pa
        import pyarrow.parquet as pq

        data = self.folder / "data"
        data.mkdir()
        rows = [
            {"image": {"bytes": self.image(number).read_bytes(), "path": self.image(number).name}, "label": number % 3}
            for number in range(ITEMS)
        ]
        features = b'{"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel"}}}}'
        table = pa.Table.from_pylist(rows).replace_schema_metadata({b"huggingface": features})
        pq.write_table(table, data / "train-00000-of-00001.parquet")
        index = faiss.IndexFlat(DIM)
        index.add(self.embed("old"))
        faiss.write_index(index, str(self.folder / "image.faiss"))

    def init(self) -> list[str]:
        return [
            *("--store", "faiss", "--index", f"{self.folder}/image.faiss"),
            *("--items", f"{self.folder}/data/*.parquet"),
        ]

    def vectors(self, collection: str | None = None) -> np.ndarray:
        import faiss

        index = faiss.read_index(index_file(collection, self.folder / "image.faiss"))
        return index.reconstruct_n(0, index.ntotal)

    def snapshot(self) -> object:
        return {str(file): file.read_bytes() for file in sorted((self.folder / "data").iterdir())}


class MilvusBootcamp(System):
    """A collection as the Milvus bootcamp makes it: keys by the server, dynamic fields, COSINE.

    Its vectors are as the network gives them, not scaled to unit length; COSINE searches do not mind.
    """

    name = "milvus-bootcamp"

    @property
    def file(self) -> Path:
        return self.folder / "milvus.db"

    def build(self) -> None:
        with self.client() as client:
            client.create_collection(
                "image_embeddings",
                vector_field_name="vector",
                dimension=DIM,
                auto_id=True,
                enable_dynamic_field=True,
                metric_type="COSINE",
            )
            lengths = np.random.default_rng(1).uniform(0.5, 20, (ITEMS, 1)).astype(np.float32)
            rows = [
                {"vector": vector, "filename": str(self.image(number)), "category": f"c{number % 3}"}
                for number, vector in enumerate(self.embed("old") * lengths)
            ]
            client.insert("image_embeddings", rows)

    @contextmanager
    def client(self) -> Iterator[Any]:
        from milvus_lite import server_manager_instance
        from pymilvus import MilvusClient

        client = MilvusClient(str(self.file))
        try:
            yield client
        finally:
            client.close()
            server_manager_instance.release_server(str(self.file))

    def init(self) -> list[str]:
        return ["--store", "milvus", "--uri", str(self.file), "--collection", "image_embeddings"]

    def rows(self, collection: str | None = None) -> list[dict[str, Any]]:
        with self.client() as client:
            client.load_collection(collection or "image_embeddings")
            rows = client.query(collection or "image_embeddings", "id != 0", output_fields=["*"], limit=10_000)
        return sorted(rows, key=lambda row: str(row["filename"]))

    def vectors(self, collection: str | None = None) -> np.ndarray:
        return np.array([row["vector"] for row in self.rows(collection)], np.float32)

    def snapshot(self) -> object:
        return [{key: value for key, value in row.items() if key != "vector"} for row in self.rows()]


class QdrantOverHttp(System):
    """Points as LangChain lays them out, nested metadata with the image's URL; images come from a web server."""

    name = "qdrant-langchain"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        images = folder / "images"
        # Started with the system, for the URLs hold its port.
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(images)))
        super().__init__(folder)

    def image(self, number: int) -> Path:
        return self.images / f"picture {number:05d} 100%.png"  # a space and a percent sign, as shops have them

    def build(self) -> None:
        from urllib.parse import quote

        from qdrant_client import models

        root = f"http://127.0.0.1:{self.server.server_port}"
        with self.client() as client:
            client.create_collection("docs", models.VectorParams(size=DIM, distance=models.Distance.COSINE))
            client.upsert(
                "docs",
                [
                    models.PointStruct(
                        id=self.id(number),
                        vector=vector.tolist(),
                        payload={
                            "page_content": f"picture {number}",
                            "metadata": {
                                "source": f"{root}/{quote(self.image(number).name)}",
                                "category": f"c{number % 3}",
                            },
                        },
                    )
                    for number, vector in enumerate(self.embed("old"))
                ],
            )

    def id(self, number: int) -> str:
        return str(uuid5(NAMESPACE_URL, str(number)))

    @contextmanager
    def client(self) -> Iterator[Any]:
        from qdrant_client import QdrantClient

        client = QdrantClient(path=str(self.folder / "qdrant"))
        try:
            yield client
        finally:
            client.close()

    def init(self) -> list[str]:
        return ["--store", "qdrant", "--path", str(self.folder / "qdrant"), "--collection", "docs"]

    def points(self, collection: str | None = None) -> Mapping[str, Any]:
        with self.client() as client:
            points, _ = client.scroll(collection or "docs", limit=10_000, with_vectors=True)
        return {point.id: point for point in points}

    def vectors(self, collection: str | None = None) -> np.ndarray:
        points = self.points(collection)
        return np.array([points[self.id(number)].vector for number in range(ITEMS)], np.float32)

    def snapshot(self) -> object:
        return {item: point.payload for item, point in self.points().items()}

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            self.server.shutdown()
            thread.join()
            self.server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None: ...


SYSTEMS: tuple[type[System], ...] = (ClipRetrieval, ClipRetrievalFlat, HuggingFace, MilvusBootcamp, QdrantOverHttp)
