"""The old vectors of images, taken from the collection where there is no old model to make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from migrator.adapters.base import Store
from migrator.adapters.iterate import pages
from migrator.embedding.embed import locate
from migrator.embedding.stored_encoder import unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.trainer.images.source import ImageSource


def old_vectors(store: Store, images: ImageSource, paths: Sequence[str]) -> NDArray[np.float32]:
    """The stored vector of each image's item, of unit length, (len(paths), dim); zeros where the image has none.

    An item's image is known by its path as `images.uri` makes it. Of several items with one image the first counts.
    One pass over the collection, which ends early where all are found.
    """
    rows: dict[str, list[int]] = {}
    for row, path in enumerate(paths):
        rows.setdefault(path, []).append(row)
    found = np.zeros((len(paths), store.describe().dim), np.float32)
    for page in pages(store):
        vectors = unit(page.vectors)
        for at, place in enumerate(locate(images, zip(page.ids, page.payloads, strict=True))):
            if isinstance(place, str) and place in rows and vectors[at].any():
                found[rows.pop(place)] = vectors[at]
        if not rows:
            break
    return found
