"""Makes in ./work what a team has already: images of products, a FAISS gallery that EfficientNet-Lite 0 filled, lists.

The images are Fashion-MNIST's, as Debian packages them: `apt-get install dataset-fashion-mnist`.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from collections.abc import Iterable
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from migrator.embedding.embed import embed
from migrator.project import Project
from migrator.trainer.encoders.loading import load_encoder

HERE = Path(__file__).parent
KINDS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
GALLERY, QUERIES = 1500, 1000
"""The images of the gallery are those to train with; the queries are none of them."""


def read_idx(path: Path, header: int) -> NDArray[np.uint8]:
    """The bytes of one of the data set's files, after its header."""
    with gzip.open(path) as file:
        return np.frombuffer(file.read()[header:], np.uint8)


def save_list(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Images and their classes, as `train.items` and `verify.queries` take them."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("path", "label"))
        table.writerows(rows)


def main() -> None:
    """Images, gallery, lists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    source = parser.parse_args().images
    work = HERE / "work"
    if work.exists():
        raise SystemExit(f"{work} is there already: remove it to start again")
    if not source.is_dir():
        raise SystemExit(f"{source} is not there: apt-get install dataset-fashion-mnist, or give --images")
    (work / "images").mkdir(parents=True)
    pixels = read_idx(source / "t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = read_idx(source / "t10k-labels-idx1-ubyte.gz", 8)
    paths = [f"{number:04d}.png" for number in range(GALLERY + QUERIES)]
    kinds = [KINDS[label] for label in labels]
    for path, image in zip(paths, pixels, strict=False):
        Image.fromarray(image).convert("RGB").save(work / "images" / path)
    labelled = list(zip(paths, kinds, strict=False))
    save_list(work / "train.csv", labelled[:GALLERY])
    save_list(work / "queries.csv", labelled[GALLERY:])

    with Project.open(HERE / "migrations.yaml", "mapped") as project:
        old = load_encoder(project.old_spec())
        vectors = embed(project.images(), paths[:GALLERY], [old], batch_size=64, threads=2, retry_for=0).vectors[0]
    index = faiss.IndexFlatIP(old.dim)
    index.add(vectors)
    (work / "gallery").mkdir()
    faiss.write_index(index, str(work / "gallery" / "index.faiss"))
    items = {"id": list(range(GALLERY)), "path": paths[:GALLERY], "kind": kinds[:GALLERY]}
    pq.write_table(pa.table(items), work / "gallery" / "items.parquet")
    print(f"{GALLERY} items in {work / 'gallery'}, embedded by {old.id}")


if __name__ == "__main__":
    main()
