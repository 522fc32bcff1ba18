"""The images that a migration trains on, from a file, from folders or from the collection."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from migrator.adapters.iterate import iter_ids, payloads
from migrator.config import ItemsFrom, Train
from migrator.embedding.stored_vectors import old_vectors
from migrator.errors import ConfigError, PreconditionFailed
from migrator.labels import training_label
from migrator.project import Project
from migrator.trainer.errors import ImageProblem
from migrator.trainer.images.templates import MAX_FIELDS, field_advice, fields_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.trainer.data.items import Excluded, TrainingItems


log = logging.getLogger(__name__)


def load_items(project: Project, config: Train) -> tuple[TrainingItems, NDArray[np.float32] | None, list[Excluded]]:
    """The images to learn from; where there is no old model, with the stored vector of each, (n, dim) of unit length.

    Images without such a vector are excluded and named. Raises `PreconditionFailed` where none has one.
    """
    from migrator.trainer.data.folders import folder_items
    from migrator.trainer.data.items import Excluded, read_items, training_items

    if not isinstance(config.items, ItemsFrom):
        items = read_items(config.items, project.images(), need_labels=False)
    elif config.items.source == "folders":
        items = folder_items(Path(project.settings.images.root.removeprefix("file://")))
        _warn_skipped(items)
    else:
        items = _items_of_store(project, config.items.label)
    if not project.old_is_stored:
        return items, None, []
    with project.store() as store:
        vectors = old_vectors(store, project.images(), items.paths)
        collection = store.describe().name
    known = vectors.any(axis=1)
    if not known.any():
        raise PreconditionFailed(
            f"old_encoder is stored, and none of the {len(items)} training images, for instance {items.paths[0]!r}, is "
            f"an item of {collection}: list paths as images.uri makes them, or set train.items to {{from: store}}"
        )
    rows = np.flatnonzero(known).tolist()
    labels = None if items.labels is None else [items.labels[row] for row in rows]
    kept = training_items([items.paths[row] for row in rows], labels, source="train.items, as far as stored,")
    excluded = [
        Excluded(items.paths[row], "no item of the collection with a usable vector has this image")
        for row in np.flatnonzero(~known).tolist()
    ]
    return kept, vectors[known], excluded


def _warn_skipped(items: TrainingItems) -> None:
    """What an image folder holds besides its training images."""
    if items.skipped:
        total = sum(one.count for one in items.skipped)
        log.warning("%d images in folders; skipped %d: %s", len(items), total, "; ".join(map(str, items.skipped)))


def _items_of_store(project: Project, label: str | None) -> TrainingItems:
    """The collection's own images, with labels from the payloads; items without one are skipped.

    Raises `ConfigError` where no item has a label, or a label is a list or a structure.
    """
    from migrator.trainer.data.items import training_items

    images = project.images()
    key = f"{project.config.path}: migrations.{project.name}.train.items.label"
    paths: list[str] = []
    labels: list[str] = []
    fields: dict[str, None] = {}
    with project.store() as store:
        for item, payload in payloads(store, iter_ids(store)):
            try:
                path = images.locate(item, payload)
            except ImageProblem:
                continue  # an item without an image can be searched but not learnt from
            if label is None:
                paths.append(path)
                continue
            text = training_label(project, label, item, payload)
            if text:
                paths.append(path)
                labels.append(text)
            elif len(fields) < MAX_FIELDS:
                fields |= dict.fromkeys(fields_of(payload))
    if not paths and label is not None:
        raise ConfigError(f"{key}: no item with an image has a value for {label!r}: {field_advice(label, fields)}")
    items = training_items(paths, None if label is None else labels, source=f"collection of {project.name}")
    return items if label is not None else replace(items, unlabelled="train.items.label is not set")
