"""An old encoder of which only the vectors are here: its model is lost, or it runs at a vendor's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from migrator.adapters.base import ItemId, Store, Vectors
from migrator.errors import PreconditionFailed

FINGERPRINT_ITEMS = 16
"""Items whose vectors are the fingerprint of a model that is not there."""
SAME = 0.99
"""Median cosine of these vectors, then and now, from which on they count as one encoder's. The application may have
replaced the images of a few since; of another model's vectors none is near."""
SEED = 0


@dataclass(frozen=True, slots=True)
class StoredEncoder:
    """The manifest of a model that is not there: it is recognised by these vectors.

    Its id is a hash of a sample of items and their vectors, as they were when it was first planned with. The hash is
    never recomputed, for items come, go and change: later the sampled vectors are compared by their cosine. A name made
    from the collection alone would not do: after one migration the same collection holds another encoder's vectors,
    and an application chooses its model by this id.
    """

    id: str
    items: tuple[ItemId, ...]
    vectors: Vectors  # (len(items), dim), unit length

    @classmethod
    def first_seen(cls, store: Store) -> StoredEncoder:
        """Samples a collection that holds old vectors only."""
        page = store.read_vectors(store.sample(FINGERPRINT_ITEMS, seed=SEED))
        vectors = unit(page.vectors).round(6) + 0.0  # + 0.0: one zero, not two
        digest = hashlib.sha256(json.dumps(list(page.ids)).encode() + vectors.astype("<f4").tobytes()).hexdigest()
        return cls(f"stored-{digest[:16]}", tuple(page.ids), vectors)

    def agreement(self, store: Store) -> float | None:
        """Median cosine between the sampled vectors then and now; None where none of these items is left."""
        page = store.read_vectors(self.items)
        if not len(page) or page.vectors.shape[1] != self.vectors.shape[1]:
            return None
        rows = {item: row for row, item in enumerate(self.items)}
        then = self.vectors[[rows[item] for item in page.ids]]
        return float(np.median(np.einsum("nd,nd->n", then, unit(page.vectors))))

    def check(self, store: Store, *, name: str) -> None:
        """Refuses if the collection has come to hold another encoder's vectors. `name` is the migration's."""
        found = self.agreement(store)
        if found is not None and found < SAME:
            raise PreconditionFailed(
                f"the stored vectors are no longer those of {self.id} (median cosine {found:.2f} over sampled items): "
                f"if they are meant to be another encoder's, `migrator plan {name}`"
            )

    def to_json(self) -> str:
        """One JSON document with `"format": 1`, as the ledger keeps it."""
        vectors = [[round(float(value), 6) for value in vector] for vector in self.vectors]
        return json.dumps({"format": 1, "id": self.id, "items": self.items, "vectors": vectors})

    @classmethod
    def from_json(cls, text: str) -> StoredEncoder:
        """What `to_json` wrote."""
        manifest = json.loads(text)
        return cls(manifest["id"], tuple(manifest["items"]), np.array(manifest["vectors"], np.float32))


def is_stored(encoder_id: str | None) -> bool:
    """Whether an id is that of a `StoredEncoder`."""
    return encoder_id is not None and encoder_id.startswith("stored-")


def unit(vectors: Vectors) -> Vectors:
    """Vectors (n, dim) scaled to length 1; one that has no direction, zero or not finite, becomes zero."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    usable = np.isfinite(lengths) & (lengths > 0)
    return np.where(usable, vectors / np.where(usable, lengths, 1), 0).astype(np.float32)
