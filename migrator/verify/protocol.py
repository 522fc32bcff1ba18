"""The tests that decide whether the new encoder may answer queries, on sampled queries and a sampled gallery.

M(q, g): queries by encoder q, gallery by encoder g. `old` is M(old, old), today's search; `cross` M(new, old), what
the canary will show; `self` M(new, new), what the finished migration will show; `reverse` M(old, new), what would
happen if queries stayed behind. `mixed` asks the collection as it is at this moment, with new queries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.base import ItemId, Payload, Store
from migrator.encoding import embed, locate
from migrator.errors import ConfigProblem, Refused
from migrator.old_vectors import old_vectors
from migrator.planning import check_fresh
from migrator.project import Project
from migrator.stored_encoder import unit
from migrator.verify.gate import Verdict, gate
from migrator.verify.metrics import Relevance, flips, parse_metric, relevance, summarise
from migrator.verify.ranking import rank
from trainer.errors import ImageProblem
from trainer.images import template_fields

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trainer.encoder import Encoder
    from trainer.images import ImageSource

METRICS = ("map@100", "recall@1", "recall@5", "recall@10")
TESTS = ("old", "cross", "self", "reverse")

Report = Callable[[str, int, int], None]
"""Called with what is being embedded, how many images are done and how many there are."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Queries and gallery before any encoder has seen them."""

    paths: Sequence[str | ImageProblem]
    labels: Sequence[str]
    own: NDArray[np.int64]  # (q,) gallery row of the query itself, or -1
    gallery_ids: Sequence[ItemId]
    gallery_paths: Sequence[str | ImageProblem]
    gallery_labels: Sequence[str]
    stored: NDArray[np.float32]  # (g, dim) the gallery's vectors as they lie in the store
    old: NDArray[np.float32] | None = None  # (q, dim) the queries' own stored vectors, where there is no old model

    def sha256(self) -> str:
        """Names the question: queries with their labels, and the gallery's items."""
        asked = [[str(path) for path in self.paths], list(self.labels), list(self.gallery_ids)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Verified:
    """The outcome of one `verify`."""

    verdict: Verdict
    served: str
    """The test that the verdict compares with `old`: `cross` in place, `self` with a shadow."""
    tests: dict[str, dict[str, float]]
    """Test -> metric -> mean over the queries."""
    flips: dict[str, float]
    """Shares of the queries whose first answer turned wrong or right, `served` against old."""
    queries: int
    without_relevant: int
    without_old_vector: int
    """Queries left out because `old_encoder` is stored and no item has their image."""
    gallery: int
    unreadable: dict[str, str]
    """Path -> why the image took no part."""

    def as_json(self) -> dict[str, Any]:
        """As `migrator verify --json` prints it and the ledger keeps it."""
        interval = self.verdict.interval
        return {
            "outcome": self.verdict.outcome,
            "reasons": list(self.verdict.reasons),
            "interval": None if interval is None else interval._asdict(),
            "served": self.served,
            "tests": self.tests,
            "flips": self.flips,
            "queries": self.queries,
            "queries_without_relevant_items": self.without_relevant,
            "queries_without_old_vector": self.without_old_vector,
            "gallery": self.gallery,
            "unreadable": self.unreadable,
        }


def verify(project: Project, report: Report = lambda *_: None) -> Verified:
    """Runs the four tests, decides, and keeps the result in the ledger. Needs a fresh plan and a new encoder."""
    migration = project.migration()
    if migration.stage not in ("planned", "prepare", "canary"):
        raise Refused(
            f"{project.name} is at stage {migration.stage}, its collection already mixed: "
            f"`migrator verify {project.name} --mixed` asks it as it is"
        )
    with project.store() as store:
        plan = check_fresh(project, store)
        old, new = None if project.old_is_stored else project.old_encoder(), project.new_encoder()
        images = project.images()
        asked, without = ask(project, store, images), 0
        if old is None:
            project.check_old_encoder(store)
            asked, without = with_stored_vectors(asked, store, images)
    embedded = _embed_all(project, images, asked, old, new, report)
    queries_old, queries_new = embedded.queries
    gallery_old, gallery_new = asked.stored[embedded.gallery_rows], embedded.gallery
    pairs = {
        "old": (queries_old, gallery_old),
        "cross": (queries_new, gallery_old),
        "self": (queries_new, gallery_new),
        "reverse": (queries_old, gallery_new),
    }
    if gallery_old.shape[1] != new.dim:  # such vectors cannot be compared, and in a shadow they never meet
        del pairs["cross"], pairs["reverse"]
    # In place, new queries meet old vectors; beside a shadow they only ever meet new ones.
    served = "cross" if migration.strategy == "in_place" else "self"
    found = {test: _answers(embedded, asked, queries, gallery) for test, (queries, gallery) in pairs.items()}
    settings = project.settings.verify.gate
    per_query = {test: parse_metric(settings.metric).per_query(answers) for test, answers in found.items()}
    counted = ~np.isnan(per_query["old"])
    verdict = gate(per_query["old"][counted], per_query[served][counted], settings, seed=project.settings.verify.seed)
    flipped = flips(found["old"], found[served])
    verified = Verified(
        verdict=verdict,
        served=served,
        tests={test: _means(answers) for test, answers in found.items()},
        flips={name: _number(value) for name, value in flipped._asdict().items()},
        queries=int(counted.sum()),
        without_relevant=int((~counted).sum()),
        without_old_vector=without,
        gallery=len(embedded.gallery_rows),
        unreadable=embedded.unreadable,
    )
    # The encoder may have been made elsewhere; from here on the migration is bound to it.
    project.ledger.set_new_encoder(migration.id, new.id)
    project.ledger.save_verification(
        migration,
        plan_fingerprint=plan.fingerprint,
        old_encoder_id=project.encoder_ids()[0],
        new_encoder_id=new.id,
        queries_sha256=asked.sha256(),
        outcome=verdict.outcome,
        results=verified.as_json(),
    )
    return verified


def measure_mixed(project: Project, report: Report = lambda *_: None) -> dict[str, float]:
    """The metrics of new queries against the collection as it is at this moment, whatever its vectors came from."""
    new = project.new_encoder()
    images = project.images()
    with project.store() as store:
        asked = ask(project, store, images)
    count = len(asked.paths)
    queries = embed(images, asked.paths, [new], report=lambda done: report("queries", done, count), **project.loading())
    own = asked.own[queries.rows]
    ranking = rank(queries.vectors[0], asked.stored, 100, exclude=own)
    answers = relevance([asked.labels[row] for row in queries.rows], asked.gallery_labels, ranking, exclude=own)
    means = _means(answers)
    project.ledger.note(project.migration(), "measured", {"mixed": means, "queries": len(queries.rows)})
    return means


# -- what is asked ------------------------------------------------------------------------------------------------


def ask(project: Project, store: Store, images: ImageSource) -> Asked:
    """Draws queries and gallery: the same ones for the same seed, as long as the collection holds the same items."""
    settings = project.settings.verify
    ids = store.sample(settings.gallery, seed=settings.seed)
    if not ids:
        raise Refused(f"collection {project.settings.store.kind} holds no items: there is nothing to verify against")
    page = store.read(ids, vectors=True, payload=True)
    assert page.vectors is not None
    assert page.payloads is not None
    paths = locate(images, zip(page.ids, page.payloads, strict=True))
    labels = [label_of(settings.label, item, load) for item, load in zip(page.ids, page.payloads, strict=True)]
    if not any(labels):
        raise ConfigProblem(
            f"{project.config.path}: migrations.{project.name}.verify.label: {settings.label!r} names a payload field "
            f"that the items do not have; they have {', '.join(sorted(page.payloads[0])) or 'none'}"
        )
    row_of = {str(path): row for row, path in enumerate(paths)}
    if settings.queries is not None:
        query_paths, query_labels = _read_queries(settings.queries)
        chosen = _draw(len(query_paths), settings.sample, settings.seed)
        query_paths = [query_paths[row] for row in chosen]
        query_labels = [query_labels[row] for row in chosen]
    else:
        labelled = np.flatnonzero([label != "" for label in labels])
        chosen = labelled[_draw(len(labelled), settings.sample, settings.seed)]
        query_paths = [paths[row] for row in chosen]
        query_labels = [labels[row] for row in chosen]
    own = np.array([row_of.get(str(path), -1) for path in query_paths], np.int64)
    return Asked(query_paths, query_labels, own, list(page.ids), paths, labels, page.vectors)


def _read_queries(file: Path) -> tuple[list[str | ImageProblem], list[str]]:
    from trainer.data import read_items

    if not file.is_file():
        raise ConfigProblem(f"{file}: no such file: set verify.queries to a list of query images with path and label")
    items = read_items(file)
    assert items.labels is not None
    return list(items.paths), list(items.labels)


def with_stored_vectors(asked: Asked, store: Store, images: ImageSource) -> tuple[Asked, int]:
    """The queries that are items of the collection, with their stored vectors, and how many others were left out.

    Today's search is then asked as an item asks for its like. Raises `Refused` where no query is an item.
    """
    vectors = unit(asked.stored[asked.own])
    elsewhere = np.flatnonzero(asked.own < 0).tolist()  # not in the sampled gallery, but perhaps in the collection
    if elsewhere:
        vectors[elsewhere] = old_vectors(store, images, [str(asked.paths[row]) for row in elsewhere])
    rows = np.flatnonzero(vectors.any(axis=1)).tolist()
    if not rows:
        raise Refused(
            f"old_encoder is stored, and none of {len(vectors)} queries, for instance {str(asked.paths[0])!r}, is an "
            f"item of {store.describe().name}: list paths as images.uri makes them, or leave verify.queries out"
        )
    asked = replace(
        asked,
        paths=[asked.paths[row] for row in rows],
        labels=[asked.labels[row] for row in rows],
        own=asked.own[rows],
        old=vectors[rows],
    )
    return asked, len(vectors) - len(rows)


def _draw(count: int, n: int, seed: int) -> NDArray[np.int64]:
    if n >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, n, replace=False))


def label_of(template: str, item: ItemId, payload: Payload) -> str:
    """The class of an item: the template with payload fields put in; empty where a field is missing or null."""
    values = {**payload, "id": item}
    try:
        return "" if any(values[name] is None for name in template_fields(template)) else template.format_map(values)
    except KeyError:
        return ""


# -- answers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Vectors:
    query_rows: NDArray[np.int64]
    queries: tuple[NDArray[np.float32], NDArray[np.float32]]  # by the old and the new encoder
    gallery_rows: NDArray[np.int64]
    gallery: NDArray[np.float32]  # by the new encoder
    unreadable: dict[str, str]


def _embed_all(
    project: Project, images: ImageSource, asked: Asked, old: Encoder | None, new: Encoder, report: Report
) -> _Vectors:
    done = {"queries": 0, "gallery": 0}

    def count(what: str, of: int) -> Callable[[int], None]:
        def step(more: int) -> None:
            done[what] += more
            report(what, done[what], of)

        return step

    loading = project.loading()
    asking = [new] if old is None else [new, old]
    queries = embed(images, asked.paths, asking, report=count("queries", len(asked.paths)), **loading)
    gallery = embed(images, asked.gallery_paths, [new], report=count("gallery", len(asked.gallery_paths)), **loading)
    unreadable = {str(asked.paths[row]): why for row, why in queries.problems.items()}
    unreadable |= {str(asked.gallery_paths[row]): why for row, why in gallery.problems.items()}
    by_old = queries.vectors[-1] if asked.old is None else asked.old[queries.rows]
    return _Vectors(queries.rows, (by_old, queries.vectors[0]), gallery.rows, gallery.vectors[0], unreadable)


def _answers(vectors: _Vectors, asked: Asked, queries: NDArray[np.float32], gallery: NDArray[np.float32]) -> Relevance:
    where = np.full(len(asked.gallery_ids) + 1, -1, np.int64)  # the last entry answers for own = -1
    where[vectors.gallery_rows] = np.arange(len(vectors.gallery_rows))
    own = where[asked.own[vectors.query_rows]]
    ranking = rank(queries, gallery, 100, exclude=own)
    return relevance(
        [asked.labels[row] for row in vectors.query_rows],
        [asked.gallery_labels[row] for row in vectors.gallery_rows],
        ranking,
        exclude=own,
    )


def _means(answers: Relevance) -> dict[str, float]:
    return {name: _number(summarise(parse_metric(name).per_query(answers)).mean) for name in METRICS}


def _number(value: float) -> float:
    return 0.0 if np.isnan(value) else float(value)
