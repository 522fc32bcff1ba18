"""The backfill on FAISS: how much of the time is the encoder's, how fast the rest is, and how the ledger grows."""

from __future__ import annotations

import gzip
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from migrator.backfill.run import Summary, backfill
from migrator.ledger import Ledger, Migration
from migrator.lifecycle.freshness import bound_facts, fingerprint_of
from migrator.project import Project
from migrator.rollout.rollback import rollback
from migrator.route import initial_route

FASHION = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
DIM = 128
REPEATS = 3


# -- a collection in its backfill stage ---------------------------------------------------------------------------


def make_collection(folder: Path, *, items: int, payload: dict[str, Any], encoder: dict[str, Any]) -> Path:
    """A FAISS folder of random unit vectors, and a configuration for it."""
    import faiss
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = np.random.default_rng(0).standard_normal((items, DIM), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(DIM)
    index.add(vectors)
    (folder / "gallery").mkdir()
    faiss.write_index(index, str(folder / "gallery" / "index.faiss"))
    pq.write_table(pa.table({"id": np.arange(items), **payload}), folder / "gallery" / "items.parquet")
    config = folder / "migrations.yaml"
    migration = {
        "store": {"kind": "faiss", "path": "gallery"},
        "images": {"root": "images", "uri": "{path}"},
        "old_encoder": {**encoder, "weights": "old.safetensors"},
        "new_encoder": {**encoder, "weights": "new.safetensors"},
        "verify": {"label": "{path}"},
        "backfill": {"chunk_size": 1000, "batch_size": 64, "image_threads": 2, "read_back": 0, "measure": False},
    }
    config.write_text(yaml.safe_dump({"version": 1, "migrations": {"bench": migration}}))
    return config


def open_backfill(project: Project, new_encoder_id: str, manifest: str = "{}") -> Migration:
    """Takes the ledger straight to the backfill stage: plan, verify and canary are not what is measured here."""
    ledger: Ledger = project.ledger
    ledger.save_encoder("old", "{}")
    ledger.save_encoder(new_encoder_id, manifest)
    with project.store() as store:
        info = store.describe()
    bound = bound_facts(project, info, "old")
    ledger.save_plan(
        project.name,
        collection=info.name,
        source=info.collection_id,
        alias=info.alias,
        strategy="in_place",
        old_encoder_id="old",
        new_encoder_id=new_encoder_id,
        fingerprint=fingerprint_of(bound),
        bound=bound,
        content={},
    )
    migration = project.migration()
    route = ledger.route(info.name)
    return ledger.move(
        migration,
        stage="backfill",
        state="active",
        event="bench",
        route=initial_route(migration, salt="bench", epoch=route.epoch if route else 0),
        old_kept=True,
    )


def run_whole(project: Project) -> tuple[Summary, float]:
    began = time.perf_counter()
    summary, _ = backfill(project)
    seconds = time.perf_counter() - began
    assert summary.ended == "complete", summary
    return summary, seconds


# -- engine: an encoder that costs nothing ------------------------------------------------------------------------


class Payloads:
    """In place of images: a number from the payload."""

    def locate(self, _item: object, payload: dict[str, Any]) -> int:
        return int(payload["path"])

    def load(self, number: int) -> int:
        return number


class Projection:
    """In place of an encoder: a fixed projection of that number's bytes."""

    id, dim = "projection", DIM

    def __init__(self) -> None:
        self.matrix = np.random.default_rng(1).standard_normal((8, DIM), np.float32)

    def prepare(self, number: int) -> np.ndarray:
        return np.frombuffer((number + 1).to_bytes(8, "little"), np.uint8)

    def encode(self, batch: np.ndarray) -> np.ndarray:
        vectors = batch.astype(np.float32) @ self.matrix
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class EngineProject(Project):
    def images(self) -> Any:
        return Payloads()

    def new_encoder(self) -> Any:
        return Projection()


def engine(items: int) -> dict[str, Any]:
    """Vectors per second through reader, undo log, store and ledger; and what the ledger holds afterwards."""
    rates = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            payload = {"path": [str(number) for number in range(items)]}
            encoder = {"arch": "none", "dim": DIM, "image_size": 32}
            config = make_collection(folder, items=items, payload=payload, encoder=encoder)
            with EngineProject.open(config) as project:
                migration = open_backfill(project, "projection")
                summary, seconds = run_whole(project)
                assert summary.items == items, summary
                chunks = len(project.ledger.chunks(migration.id))
            size = (folder / "migrator.db").stat().st_size
            rates.append(items / seconds)
    return {
        "items": items,
        "dim": DIM,
        "vectors_per_second": [round(rate) for rate in rates],
        "median_vectors_per_second": round(statistics.median(rates)),
        "ledger_bytes": size,
        "ledger_chunk_rows": chunks,
        "ledger_bytes_per_item": round(size / items, 2),
    }


# -- pipeline: a real encoder on real images ----------------------------------------------------------------------


def pipeline(items: int = 20_000, *, arch: str = "resnet18", size: int = 32) -> dict[str, Any]:
    """Wall time of a backfill over the time of its slowest stage alone, the encoder on images ready in memory."""
    import torch

    from migrator.trainer.encoders.building import build_model
    from migrator.trainer.encoders.saving import save_encoder
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.images.preprocessing import Preprocessing

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = save_fashion(folder / "images", items)
        config = make_collection(
            folder,
            items=items,
            payload={"path": names},
            encoder={"arch": arch, "dim": DIM, "image_size": size},
        )
        torch.manual_seed(0)
        spec = EncoderSpec(arch=arch, dim=DIM, preprocessing=Preprocessing(image_size=size))
        manifest = save_encoder(build_model(spec), spec, folder / "new.safetensors")
        ratios, stages = [], []
        for repeat in range(REPEATS):
            with Project.open(config) as project:
                open_backfill(project, manifest.id, manifest.to_json())
                encoder = project.new_encoder()
                source = project.images()
                ready = np.stack([encoder.prepare(source.load(name)) for name in names])
                before = encode_alone(encoder, ready)
                summary, whole = run_whole(project)
                after = encode_alone(encoder, ready)
                alone = (before + after) / 2
                ratios.append(whole / alone)
                stages.append({"backfill_seconds": round(whole, 2), "encoder_alone_seconds": round(alone, 2)})
                assert summary.items == items, summary
                if repeat + 1 < REPEATS:
                    rollback(project)
    return {
        "items": items,
        "arch": arch,
        "image_size": size,
        "runs": stages,
        "ratios": [round(ratio, 3) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 3),
    }


def encode_alone(encoder: Any, ready: np.ndarray) -> float:
    began = time.perf_counter()
    for start in range(0, len(ready), 64):
        encoder.encode(ready[start : start + 64])
    return time.perf_counter() - began


def save_fashion(folder: Path, items: int) -> list[str]:
    from PIL import Image

    if not FASHION.is_file():
        raise SystemExit("the images come from Debian: apt-get install dataset-fashion-mnist")
    raw = np.frombuffer(gzip.decompress(FASHION.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
    folder.mkdir()
    names = [f"{number:05d}.png" for number in range(items)]
    for name, pixels in zip(names, raw, strict=False):
        Image.fromarray(pixels).save(folder / name)
    return names
