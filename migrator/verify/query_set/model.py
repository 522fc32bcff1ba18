"""A query set, its JSON and its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from migrator.adapters.base import ItemId

if TYPE_CHECKING:
    pass

Kind: TypeAlias = Literal["labels", "relevant", "instance"]
EVIDENCE: Mapping[Kind, str] = {
    "labels": "results of the query's class count as relevant",
    "relevant": "the items that the query file lists for each query count as relevant",
    "instance": "queries are altered views of the collection's images, and only the image itself counts as relevant: "
    "this shows that near-copies are found, not that search is good",
}


@dataclass(frozen=True, slots=True)
class QuerySet:
    """Queries (q) and gallery (g) before any encoder has seen them. The lists of queries run side by side."""

    kind: Kind
    paths: list[str]
    """The query images, as `ImageSource.load` takes them. Of the kind `instance` their altered views are meant."""
    labels: list[str] | None
    """The class of each query, never empty; None where classes are not known."""
    segments: list[str] | None
    """The segment of each query, empty for a query that has none; None without `verify.segment`."""
    own: list[ItemId | None]
    """The gallery item whose image the query is: never a result of it. None of kind `instance` and where none is."""
    relevant: list[dict[ItemId, float]] | None
    """The relevant items of each query with their grades (default: 1); None of kind `labels`."""
    gallery: list[ItemId]
    """Ascending, in the total order of ids."""
    gallery_labels: list[str] | None
    """The class of each gallery item, empty for an item that has none; None without `verify.label`."""
    gallery_paths: list[str | None]
    """None for an item whose payload gives no usable path: it can be found, but not embedded."""
    made_from: dict[str, Any]
    """The configuration that they were drawn by, and the name and SHA-256 of the file of queries."""
    counts: dict[str, int]
    """What was skipped in the draw: candidates for queries without any relevant item in the gallery
    (`queries_without_relevant_items`) and the classes in which all are so (`classes_without_relevant_items`); gallery
    items that give no class (`items_without_label`) or no image (`items_without_path`), which are never queries;
    queries that list their own item as relevant, where it does not count (`queries_listing_themselves`)."""
    drawn_at: str
    """ISO 8601, UTC."""
    tags: list[list[str]] | None = None
    """Where classes are lists: those of each query. Items that share one with it are relevant, and its place in
    `labels` has the rarest, which it is drawn and counted for. None where each query and item has one class at most."""
    gallery_tags: list[list[str]] | None = None
    """Those of each gallery item, in place of `gallery_labels`; None where `tags` is."""

    @property
    def sha256(self) -> str:
        """Names the queries and the gallery: two draws with the same hash are the same query set."""
        body = to_body(self)
        for name in ("made_from", "counts", "drawn_at"):
            del body[name]
        return digest(body)

    @property
    def evidence(self) -> str:
        """What a good result shows, as text."""
        return EVIDENCE[self.kind]


def to_body(query_set: QuerySet) -> dict[str, Any]:
    """As JSON: relevant items as pairs, since the keys of a JSON object would all be text."""
    body = {field.name: getattr(query_set, field.name) for field in fields(query_set)}
    if query_set.tags is None:  # so that the hash of other query sets is what it was before there were any
        del body["tags"], body["gallery_tags"]
    if query_set.relevant is not None:
        body["relevant"] = [[[item, grade] for item, grade in grades.items()] for grades in query_set.relevant]
    return body


def from_body(body: dict[str, Any]) -> QuerySet:
    """What `to_body` made."""
    relevant = body["relevant"]
    if relevant is not None:
        relevant = [{item: float(grade) for item, grade in pairs} for pairs in relevant]
    return QuerySet(**{**body, "relevant": relevant})


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
