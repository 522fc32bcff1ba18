"""A sample of the collection, embedded with both encoders: is the old one the declared one, how fast is the new one?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.adapters.base import CollectionInfo, ItemId, Payload, Store
from migrator.config import POST_HOC, ItemsFrom
from migrator.embedding.agreement import as_kept_by, check_agreement
from migrator.embedding.embed import embed, locate
from migrator.errors import PreconditionFailed
from migrator.labels import training_label
from migrator.lifecycle.collection import SAMPLE, SEED
from migrator.project import Project

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.trainer.encoders.encoder import Encoder

MAX_EXCESS_LENGTH = 0.1
"""How much longer than 1 an approximation may be; beyond that the vectors that it stands for are not of unit length."""


@dataclass(frozen=True, slots=True)
class NewEncoder:
    """The new encoder, or before training one of random weights."""

    encoder: Encoder
    untrained: bool


def new_or_untrained(project: Project) -> NewEncoder:
    """The new encoder; before training one of random weights, which is as fast."""
    from migrator.trainer.encoders.building import untrained_encoder

    spec = project.new_spec()
    if spec is not None:
        return NewEncoder(project.load(spec), untrained=False)
    return NewEncoder(untrained_encoder(project.untrained_spec()), untrained=True)


def dim_made_by(project: Project, new: NewEncoder) -> str:
    """What makes the new vectors as long as they are, for `describe_dim`."""
    if not new.untrained:
        return "itself"
    train = project.settings.train
    return "map" if train is not None and train.method in POST_HOC else "projection"


@dataclass(frozen=True, slots=True)
class Sample:
    """What the sample showed."""

    compared: int
    median_cosine: float | None
    images_per_second: float
    risks: tuple[str, ...]


def _check_training_labels(project: Project, ids: Sequence[ItemId], payloads: Sequence[Payload]) -> None:
    """Refuses labels that no training could take, before anything is embedded."""
    train = project.settings.train
    if train is None or not isinstance(train.items, ItemsFrom) or train.items.label is None:
        return
    for item, payload in zip(ids, payloads, strict=True):
        training_label(project, train.items.label, item, payload)


def measure_sample(
    project: Project, store: Store, old: Encoder | None, new: NewEncoder, report: Callable[..., None]
) -> Sample:
    """Embeds sampled items with both encoders: is the old one the one that made them, how fast is the new one?

    Without an old model only the second can be told.
    """
    ids = store.sample(SAMPLE, seed=SEED)
    page = store.read(ids)
    _check_training_labels(project, page.ids, page.payloads)
    images = project.images()
    paths = locate(images, zip(page.ids, page.payloads, strict=True))
    total = (1 if old is None else 2) * len(paths)
    done = 0

    def step(more: int) -> None:
        nonlocal done
        done += more
        report(done, total, "images")

    def measured(encoder: Encoder) -> _Measured:
        began = time.monotonic()
        found = embed(images, paths, [encoder], report=step, **project.loading())
        if len(found.rows) == 0:
            raise PreconditionFailed(
                f"none of {len(paths)} sampled images could be read ({next(iter(found.problems.values()))}): "
                "check images.root and images.uri"
            )
        seconds = time.monotonic() - began
        return _Measured(found.rows, found.vectors[0], found.problems, len(found.rows) / seconds if seconds else 0.0)

    by_old = None if old is None else measured(old)
    seen = by_old or measured(new.encoder)
    stored = page.vectors[seen.rows]
    check_directions([page.ids[row] for row in seen.rows.tolist()], stored)
    info = store.describe()
    cosines: NDArray[np.float64] | None = None
    seen_risks: list[str] = []
    if old is not None:
        cosines, seen_risks = check_agreement(
            project.old_spec(),
            old,
            images,
            [str(paths[row]) for row in seen.rows.tolist()],
            stored,
            seen.vectors,
            exact=store.capabilities.exact_vectors,
            as_kept=as_kept_by(store),
            images_per_second=seen.images_per_second,
            threads=project.loading()["threads"],
            retry_for=project.loading()["retry_for"],
            report=report,
        )
    _check_lengths(info, stored, exact=store.capabilities.exact_vectors)
    by_new = seen if by_old is None else measured(new.encoder)
    return Sample(
        0 if cosines is None else len(cosines),
        None if cosines is None else float(np.median(cosines)),
        by_new.images_per_second,
        (*_risks(page.ids, seen.problems, new), *seen_risks),
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    """The sample, embedded by one encoder."""

    rows: NDArray[np.int64]  # (n,) of the sample
    vectors: NDArray[np.float32]  # (n, dim), unit length
    problems: dict[int, str]
    images_per_second: float


def check_directions(ids: Sequence[ItemId], vectors: NDArray[np.float32]) -> None:
    """Refuses stored vectors (n, dim) that point nowhere."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if len(bad):
        raise PreconditionFailed(
            f"item {ids[int(bad[0])]!r} holds a vector that is zero or not finite: remove or re-embed such items"
        )


def _check_lengths(info: CollectionInfo, vectors: NDArray[np.float32], *, exact: bool) -> None:
    """Refuses vectors (n, dim) that are not of unit length, where the metric looks at more than their direction."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    longest = norms.max() - 1
    # An approximation is a mean of what it stands for, and thereby shorter; it is hardly ever longer.
    if info.metric == "cosine" or (np.abs(norms - 1).max() <= 0.01 if exact else longest <= MAX_EXCESS_LENGTH):
        return
    found = f"{norms.min():.3g} to {norms.max():.3g}"
    matter = {"ip": "a longer vector scores higher", "l2": "distances grow with the lengths"}[info.metric]
    raise PreconditionFailed(
        f"the stored vectors are not of unit length (sampled: {found}) and the metric is {info.metric}, with which "
        f"{matter}: new vectors, of length 1, cannot be ranked among them; normalise the vectors first, or move them "
        "to a collection with the metric cosine, which compares directions"
    )


def _risks(ids: Any, problems: Mapping[int, str], new: NewEncoder) -> tuple[str, ...]:
    risks = []
    if problems:
        row, why = next(iter(problems.items()))
        risks.append(
            f"{len(problems)} of {len(ids)} sampled images cannot be embedded, for instance item {ids[row]!r}: {why}. "
            "Such items keep their old vector and are listed by `migrator failures`"
        )
    if new.untrained:
        risks.append("the new encoder is not trained yet; its speed was measured with untrained weights")
    return tuple(risks)
