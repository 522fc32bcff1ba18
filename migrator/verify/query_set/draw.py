"""The query set of a verification: queries, what is relevant to them, and the gallery; drawn once, then pinned.

The same query set is evaluated before the canary, after each backfill run and at the end, so that results compare.
It is kept in the artifacts, at `<artifacts>/<name>/query-set-<key of the migration>/query_set.json`, with a checksum. A
configuration that would draw another one is refused until `--resample-queries` draws it, which counts as a further
interim analysis.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.adapters.base import ItemId, Payload, Store, order_key
from migrator.embedding.embed import locate
from migrator.errors import ConfigError, PreconditionFailed
from migrator.formatting import MAX_NAMES, name_list, quoted
from migrator.labels import Tags, tags_or_refuse
from migrator.ledger import now
from migrator.project import Project
from migrator.trainer.data.tables import Table
from migrator.trainer.images.templates import NotText, field_advice, fields_of, parse
from migrator.verify.query_set.model import Kind, QuerySet
from migrator.verify.query_set.query_file import read_queries
from migrator.verify.query_set.rows import Gallery, Queries, have_several, pages

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.trainer.images.source import ImageSource

log = logging.getLogger(__name__)
COUNTS = (
    "queries_without_relevant_items",
    "classes_without_relevant_items",
    "queries_listing_themselves",
    "items_without_label",
    "items_without_path",
)


def draw_facts(project: Project, sha256: str | None) -> dict[str, Any]:
    """What the query set depend on; `images.uri` makes their paths."""
    verify = project.settings.verify
    return {
        "queries": None if verify.queries is None else {"file": verify.queries.name, "sha256": sha256},
        **verify.model_dump(include={"label", "segment", "sample", "gallery", "seed"}),
        "uri": project.settings.images.uri,
    }


def draw_query_set(project: Project, store: Store, images: ImageSource) -> QuerySet:
    """Draws gallery and queries: the same ones for the same configuration, file and collection.

    The gallery is a random sample of the collection, and of the kind `relevant` all relevant items too. Without a
    file, queries are drawn among the gallery alone, even where few classes come together there: the collection is
    never read whole. What has no relevant item in the gallery cannot be a query. Of several items with one image the
    first is the query's own.

    Raises `ConfigError` where the configuration or the file of queries cannot be used, `PreconditionFailed` where the
    collection gives no query.
    """
    refuse_stored_instances(project)
    settings = project.settings.verify
    listed, table = None, None
    if settings.queries is not None:
        listed, table = read_queries(settings.queries, settings.segment, images)
        if listed.relevant is None and settings.label is None:
            raise ConfigError(
                f"{_key(project, 'label')} is not set: {settings.queries} gives the classes of the queries; say where "
                'the payload of an item has its own, such as "{category}", or give the file a column relevant'
            )
    ids = store.sample(settings.gallery, seed=settings.seed)
    if not ids:
        raise PreconditionFailed(
            f"collection {store.describe().name} holds no items: there is nothing to verify against"
        )
    counts = Counter[str]()
    kind: Kind
    if listed is not None and table is not None and listed.relevant is not None:
        kind = "relevant"
        able = listed.at(row for row, grades in enumerate(listed.relevant) if grades)
        queries = _drawn(able, project)
        gallery = _read_gallery(project, store, images, _ids_with_relevant(store, ids, queries, table))
        queries = _without_own_relevant(_with_own(queries, gallery), counts)
        counts["queries_without_relevant_items"] += len(listed.paths) - len(able.paths)
        if not queries.paths:
            raise ConfigError(
                f"{settings.queries}: no query lists a relevant item other than itself: list the ids of the relevant "
                "items in the column relevant"
            )
    else:
        gallery = _read_gallery(project, store, images, ids)
        kind = "instance" if gallery.tags is None else "labels"
        common = _tags_of_all(gallery)
        if common:
            log.warning(
                "every one of the %d items drawn has the tag %s: it does not count", len(gallery.ids), name_list(common)
            )
            gallery = replace(gallery, tags=_without(gallery.tags, common))
            listed = None if listed is None else replace(listed, tags=_without(listed.tags, common))
        queries = _items_as_queries(gallery) if listed is None else _with_own(listed, gallery)
        if not queries.paths:
            raise PreconditionFailed(
                f"none of {len(gallery.ids)} items of {store.describe().name} has a usable image path"
                f"{' and a class' if kind == 'labels' else ''}: correct images.uri, or set verify.queries to a file"
            )
        if gallery.tags is not None:
            queries = _with_relevant_items(queries, gallery, counts, settings.queries)
        queries = _drawn(queries, project)
    counts["items_without_path"] = gallery.paths.count(None)
    counts["items_without_label"] = 0 if gallery.tags is None else gallery.tags.count(())
    several = kind == "labels" and have_several([*(queries.tags or ()), *(gallery.tags or ())])
    return QuerySet(
        kind=kind,
        paths=queries.paths,
        labels=queries.labels,
        segments=queries.segments,
        own=queries.own,
        relevant=queries.relevant,
        gallery=gallery.ids,
        gallery_labels=None if several else gallery.labels,
        gallery_paths=gallery.paths,
        made_from=draw_facts(project, None if table is None else table.sha256),
        counts={name: counts[name] for name in COUNTS},
        drawn_at=now().isoformat(timespec="seconds"),
        tags=[list(tags) for tags in queries.tags or ()] if several else None,
        gallery_tags=[list(tags) for tags in gallery.tags or ()] if several else None,
    )


def refuse_stored_instances(project: Project) -> None:
    """Refuses altered views as queries where the old vectors of queries are those of the items themselves."""
    verify = project.settings.verify
    if project.old_is_stored and verify.queries is None and verify.label is None:
        raise ConfigError(
            f"{_key(project, 'label')} is not set, and old_encoder is stored: an item's own vector would find itself. "
            'Set verify.label to the class of an item, such as "{category}", or verify.queries to a file that lists '
            "the relevant items"
        )


def _key(project: Project, name: str) -> str:
    return f"{project.config.path}: migrations.{project.name}.verify.{name}"


def even_draw(classes: NDArray[np.int64], n: int, *, seed: int) -> NDArray[np.int64]:
    """`n` rows of `classes` (rows,), codes from 0 on, ascending; all rows where there are fewer.

    The classes take turns, in random order, and each gives a random one of its rows as long as it has any, so that
    the numbers of two classes that are not used up differ by one at most.
    """
    random = np.random.default_rng((seed, 1))  # not the numbers by which a store draws its sample
    shuffled = random.permutation(len(classes))
    members = classes[shuffled]
    sizes = np.bincount(members)
    before = np.empty(len(classes), np.int64)  # how many of its class come before a row: the round of its turn
    before[np.argsort(members, kind="stable")] = np.arange(len(classes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    turn = random.permutation(len(sizes))
    return np.sort(shuffled[np.lexsort((turn[members], before))[:n]])


def _drawn(queries: Queries, project: Project) -> Queries:
    settings = project.settings.verify
    labels = queries.labels
    classes = np.zeros(len(queries.paths), np.int64) if labels is None else _codes(labels)
    return queries.at(even_draw(classes, settings.sample, seed=settings.seed).tolist())


def _codes(labels: Iterable[str]) -> NDArray[np.int64]:
    """The same number for the same label, from 0 on in the order of appearance."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(label, len(known)) for label in labels], np.int64)


def _read_gallery(project: Project, store: Store, images: ImageSource, ids: Iterable[ItemId]) -> Gallery:
    """Those of the items that are there, page by page, with what their payloads say."""
    settings = project.settings.verify
    # The segments of queries from a file stand in the file.
    segment = settings.segment if settings.queries is None else None
    gallery = Gallery([], [], None if settings.label is None else [], None if segment is None else [])
    names: dict[str, None] = {}
    ordered = sorted(ids, key=order_key)
    for page in pages(store, ordered, payload=True):
        for item, payload in page:
            gallery.ids.append(item)
            if gallery.tags is not None:
                gallery.tags.append(tags_or_refuse(project, item, payload))
            if gallery.segments is not None:
                gallery.segments.append(_segment_or_refuse(project, item, payload))
            if len(names) < MAX_NAMES:
                names |= dict.fromkeys(fields_of(payload))
        gallery.paths.extend(path if isinstance(path, str) else None for path in locate(images, page))
    for name, column in (("label", gallery.tags), ("segment", gallery.segments)):
        if column is not None and not any(column):
            template = getattr(settings, name)
            raise ConfigError(
                f"{_key(project, name)}: {template!r} names a payload field that the items do not have: "
                f"{field_advice(template, names)}"
            )
    return gallery


def _segment_or_refuse(project: Project, item: ItemId, payload: Payload) -> str:
    try:
        return (parse(project.settings.verify.segment or "").fill({**payload, "id": item}) or "").strip()
    except NotText as problem:
        raise ConfigError(
            f"{_key(project, 'segment')}: item {quoted(item)}: {problem}; a query belongs to one segment: name a "
            "field "
            "with one value"
        ) from None


def _with_own(queries: Queries, gallery: Gallery) -> Queries:
    """With the gallery item whose image each query is."""
    item_of: dict[str, ItemId] = {}
    for item, path in zip(gallery.ids, gallery.paths, strict=True):
        if path is not None:
            item_of.setdefault(path, item)
    return replace(queries, own=[item_of.get(path) for path in queries.paths])


def _items_as_queries(gallery: Gallery) -> Queries:
    """The items themselves, as far as they have an image and, where there are classes, a class.

    Without classes an item is the only relevant result of its own altered view, and no item is excluded.
    """
    rows = [
        row
        for row, path in enumerate(gallery.paths)
        if path is not None and (gallery.tags is None or len(gallery.tags[row]) > 0)
    ]
    whole = Queries(
        [path or "" for path in gallery.paths],
        gallery.tags,
        gallery.segments,
        [None] * len(gallery.ids) if gallery.tags is None else list(gallery.ids),
        [{item: 1.0} for item in gallery.ids] if gallery.tags is None else None,
        list(range(len(gallery.ids))),
    )
    return whole.at(rows)


def _tags_of_all(gallery: Gallery) -> set[str]:
    """Tags that every item has, where items have several: with them nothing could be irrelevant."""
    if not gallery.tags or not have_several(gallery.tags):
        return set()
    return set(gallery.tags[0]).intersection(*gallery.tags)


def _without(column: list[Tags] | None, common: set[str]) -> list[Tags] | None:
    return None if column is None else [tuple(tag for tag in tags if tag not in common) for tags in column]


def _with_relevant_items(queries: Queries, gallery: Gallery, counts: Counter[str], file: Path | None) -> Queries:
    """The queries that have an item of their class in the gallery, besides themselves, with the classes for which that
    is so. Counts the others."""
    assert queries.tags is not None
    assert gallery.tags is not None
    sizes = Counter(tag for tags in gallery.tags for tag in tags)
    tags_at = dict(zip(gallery.ids, gallery.tags, strict=True))
    answered = [
        tuple(tag for tag in tags if sizes[tag] > (own is not None and tag in tags_at[own]))
        for tags, own in zip(queries.tags, queries.own, strict=True)
    ]
    able = [row for row, tags in enumerate(answered) if tags]
    left = replace(queries, tags=answered).at(able)
    assert left.tags is not None
    classes = {tag for tags in left.tags for tag in tags}
    counts["queries_without_relevant_items"] = len(queries.paths) - len(able)
    counts["classes_without_relevant_items"] = len({tag for tags in queries.tags for tag in tags} - classes)
    drawn = f"the {len(gallery.ids)} items drawn"
    if not able and file is None:
        raise PreconditionFailed(
            f"{drawn} have {len(sizes)} classes and no two items of one: nothing can be found; raise verify.gallery, "
            "or set verify.queries to a file"
        )
    if not able:
        raise ConfigError(
            f"{file}: no query has the class of another item among {drawn}: queries have "
            f"{name_list(tag for tags in queries.tags for tag in tags)}, "
            f"items {name_list(sizes)}; make verify.label give the classes of the file, or raise verify.gallery"
        )
    if len(classes) == 1:
        advice = "correct verify.label, or raise verify.gallery" if file is None else "add queries of other classes"
        raise ConfigError(
            f"{drawn if file is None else file}: every query has the class {name_list(classes)}, and with one class "
            "alone "
            f"nothing can be irrelevant: {advice}"
        )
    return left


def _ids_with_relevant(store: Store, ids: Sequence[ItemId], queries: Queries, table: Table) -> set[ItemId]:
    """The sample and all relevant items, each of which must be in the collection."""
    assert queries.relevant is not None
    known = set(ids)
    rows_of: dict[ItemId, list[int]] = {}
    for number, grades in zip(queries.numbers, queries.relevant, strict=True):
        for item in grades:
            if item not in known:
                rows_of.setdefault(item, []).append(number)
    for page in pages(store, list(rows_of), payload=False):
        for item, _ in page:
            known.add(item)
            del rows_of[item]
    if rows_of:
        item, numbers = next(iter(rows_of.items()))
        unknown = (
            f"{len(rows_of)} unknown ids in {len(set().union(*rows_of.values()))} of {len(queries.paths)} rows drawn"
        )
        raise ConfigError(
            f"{table.file}: {table.place(numbers[0])} lists {quoted(item)} as relevant, and {store.describe().name} "
            f'has no such item ({unknown}): correct or remove them; 17 and "17" are two ids'
        )
    return known


def _without_own_relevant(queries: Queries, counts: Counter[str]) -> Queries:
    """An item is no result of itself, even where it is listed. Counts such queries, and those left without relevant
    items."""
    assert queries.relevant is not None
    counts["queries_listing_themselves"] = sum(
        own in grades for own, grades in zip(queries.own, queries.relevant, strict=True)
    )
    relevant = [
        {item: grade for item, grade in grades.items() if item != own}
        for own, grades in zip(queries.own, queries.relevant, strict=True)
    ]
    rows = [row for row, grades in enumerate(relevant) if grades]
    counts["queries_without_relevant_items"] += len(relevant) - len(rows)
    return replace(queries, relevant=relevant).at(rows)
