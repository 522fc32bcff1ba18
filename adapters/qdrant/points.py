"""Points of a Qdrant, whether a server or the engine keeps them: ids, payloads with stamps, vectors."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import ItemId, Metric, Page, Payload, Sparse

STAMP = "_migrator"
REQUEST_BYTES = 8 << 20  # the server takes 32 MiB; a float in JSON has about 12 bytes
DATATYPES: Mapping[str, float] = {"float32": 1e-6, "float16": 1e-3}  # and how far what is read is from what was written
METRICS: Mapping[str, Metric] = {"Cosine": "cosine", "Dot": "ip", "Euclid": "l2"}


def can_be_id(item: ItemId) -> bool:
    """Whether Qdrant could have given this id: an unsigned integer, or a UUID in its usual form."""
    if isinstance(item, int):
        return 0 <= item < 2**64
    try:
        return str(uuid.UUID(item)) == item
    except ValueError:
        return False


def plain_id(item: Any) -> ItemId:
    """Converts an id of the client."""
    return item if isinstance(item, int) else str(item)


def as_stamp(value: Any) -> str | None:
    """What the payload says under the stamp's key, whatever an application put there."""
    return None if value is None else str(value)


def with_stamp(payload: Payload, stamp: str | None) -> dict[str, Any]:
    """The payload as it is stored."""
    return dict(payload) if stamp is None else {**payload, STAMP: stamp}


def batches(points: Sequence[Any], extra: Sequence[int], most: int) -> Iterator[list[Any]]:
    """Points for one request each: at most `most`, and of no more `extra` bytes than a request should have."""
    batch: list[Any] = []
    size = 0
    for point, more in zip(points, extra, strict=True):
        if batch and (len(batch) == most or size + more > REQUEST_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(point)
        size += more
    if batch:
        yield batch


def not_json(page: Page) -> dict[ItemId, str]:
    """Items whose payload holds NaN or infinity: the client would send null, or a text, in their place."""
    found: dict[ItemId, str] = {}
    for item, payload in zip(page.ids, page.payloads or (), strict=True):
        try:
            json.dumps(payload, allow_nan=False, default=str)
        except ValueError:
            found[item] = "the payload holds NaN or infinity, which a Qdrant server cannot keep"
    return found


def plain_vector(vector: Any) -> NDArray[np.float64] | Sparse:
    """Converts a vector of the client."""
    if hasattr(vector, "indices"):
        order = np.argsort(vector.indices, kind="stable")
        return Sparse(np.array(vector.indices, np.uint32)[order], np.array(vector.values, np.float64)[order])
    return np.array(vector, np.float64)


def numbers(vector: NDArray[np.float64] | Sparse) -> int:
    """How many numbers a request needs for it."""
    return 2 * len(vector.values) if isinstance(vector, Sparse) else int(vector.size)
