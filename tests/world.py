"""A small world to migrate: images, two encoders with random weights, a FAISS gallery and a migrations.yaml.

The encoders are untrained, so the gate is opened with `min_gain: -1`: what is tested with it is the machinery, on
real images, a real index and a real model. Training has its own tests, and `make demo` is tested as a whole.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

if TYPE_CHECKING:
    from migrator.trainer.encoders.encoder import Encoder

ARCH, DIM, SIZE = "test_resnet", 24, 16
NAME = "toys"


@dataclass(frozen=True)
class World:
    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "migrations.yaml"

    @property
    def gallery(self) -> Path:
        return self.folder / "gallery"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def configure(self, **changes: Any) -> None:
        """Changes keys of the migration, named by their path with two underscores: backfill__chunk_size=7."""
        document = yaml.safe_load(self.config.read_text())
        for path, value in changes.items():
            section = document["migrations"][NAME]
            *parents, key = path.split("__")
            for parent in parents:
                section = section.setdefault(parent, {})
            section[key] = value
        self.config.write_text(yaml.safe_dump(document))

    def vectors(self) -> np.ndarray:
        """What a stranger reads from the published index."""
        import faiss

        index = faiss.read_index(str(self.gallery / "index.faiss"))
        return index.reconstruct_n(0, index.ntotal)


def make_world(folder: Path, *, items: int = 120, seed: int = 0) -> World:
    import torch

    from migrator.trainer.encoders.building import build_model
    from migrator.trainer.encoders.saving import save_encoder
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.images.preprocessing import Preprocessing

    folder.mkdir(parents=True, exist_ok=True)
    world = World(folder)
    rng = np.random.default_rng(seed)
    save_images(world.images, [f"{number:05d}.png" for number in range(items)], rng)
    spec = EncoderSpec(arch=ARCH, dim=DIM, preprocessing=Preprocessing(image_size=SIZE))
    for which, name in enumerate(("old", "new")):
        torch.manual_seed(seed + which)
        save_encoder(build_model(spec), spec, folder / f"{name}.safetensors")
    world.config.write_text(
        yaml.safe_dump(
            {
                "version": 1,
                "migrations": {
                    NAME: {
                        "store": {"kind": "faiss", "path": "./gallery"},
                        "images": {"root": "./images", "uri": "{path}"},
                        "old_encoder": encoder_config("old.safetensors"),
                        "new_encoder": encoder_config("new.safetensors"),
                        "verify": {
                            "label": "{kind}",
                            "sample": 60,
                            "gate": {"metric": "map@100", "min_gain": -1.0, "resamples": 200},
                        },
                        # Nothing but a test searches: nobody is to be waited for. Several steps have their own tests.
                        "rollout": {"route_ttl": 0, "canary": [100]},
                        "backfill": {"chunk_size": 10, "batch_size": 32, "image_threads": 2, "retry_for": 0.0},
                    }
                },
            }
        )
    )
    write_gallery(world, list(range(items)), [f"{number:05d}.png" for number in range(items)])
    return world


def encoder_config(weights: str) -> dict[str, Any]:
    return {"arch": ARCH, "weights": weights, "dim": DIM, "image_size": SIZE}


def save_images(folder: Path, names: Sequence[str], rng: np.random.Generator) -> None:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / name)


def embed_images(world: World, which: str, names: Sequence[str]) -> np.ndarray:
    """Vectors of images by the old or the new encoder, outside of migrator's own machinery."""
    from migrator.trainer.images.source import ImageSource

    encoder = _encoder((world.folder / f"{which}.safetensors").read_bytes())
    source = ImageSource(str(world.images))
    return encoder.encode(np.stack([encoder.prepare(source.load(name)) for name in names]))


@functools.cache
def _encoder(weights: bytes) -> Encoder:
    """The encoder of these weights; worlds that are copies of one another have the same."""
    from migrator.trainer.encoders.loading import load_encoder
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.images.preprocessing import Preprocessing

    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(weights)
        file.flush()
        return load_encoder(EncoderSpec(ARCH, DIM, Preprocessing(SIZE), Path(file.name)))


def write_gallery(world: World, ids: Sequence[Any], names: Sequence[str], *, factory: str = "Flat") -> None:
    """The user's own index and items table, made with faiss and pyarrow alone."""
    import faiss
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = embed_images(world, "old", names)
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(vectors)
    index.add(vectors)
    world.gallery.mkdir(exist_ok=True)
    faiss.write_index(index, str(world.gallery / "index.faiss"))
    table = pa.table({"id": list(ids), "path": list(names), "kind": [f"kind {row % 3}" for row in range(len(ids))]})
    pq.write_table(table, world.gallery / "items.parquet")
