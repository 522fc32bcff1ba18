"""The query set of a verification: queries, what is relevant to them, and the gallery; drawn once, then pinned.

The same query set is evaluated before the canary, after each backfill run and at the end, so that results compare.
It is kept in the artifacts, at `<artifacts>/<name>/query-set-<key of the migration>/query_set.json`, with a checksum. A
configuration that would draw another one is refused until `--resample-queries` draws it, which counts as a further
interim analysis.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np

from migrator.adapters.base import ItemId, Payload, Store, order_key
from migrator.backfill.files import LogFiles
from migrator.embedding.embed import locate
from migrator.errors import ConfigError, PreconditionFailed
from migrator.labels import Tags, tags_of
from migrator.ledger import Migration, now
from migrator.project import Project
from migrator.trainer.data.tables import Header, Table, read_table
from migrator.trainer.errors import ImageProblem, TableProblem
from migrator.trainer.images.templates import NotText, field_advice, fields_of, is_list, parse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.trainer.images.source import ImageSource

log = logging.getLogger(__name__)

T = TypeVar("T")

Kind: TypeAlias = Literal["labels", "relevant", "instance"]

EVIDENCE: Mapping[Kind, str] = {
    "labels": "results of the query's class count as relevant",
    "relevant": "the items that the query file lists for each query count as relevant",
    "instance": "queries are altered views of the collection's images, and only the image itself counts as relevant: "
    "this shows that near-copies are found, not that search is good",
}

FILE = "query_set.json"
OLD_FILE = "questions.json"
"""Its name, and that of its one key, in migrations that were verified before ledger version 0007."""
FORMAT = 1
PAGE = 5_000
"""Items whose payloads are read at once."""
MAX_GRADE = 1e9
MAX_NAMES = 10
COUNTS = (
    "queries_without_relevant_items",
    "classes_without_relevant_items",
    "queries_listing_themselves",
    "items_without_label",
    "items_without_path",
)


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
        body = _body(self)
        for name in ("made_from", "counts", "drawn_at"):
            del body[name]
        return _digest(body)

    @property
    def evidence(self) -> str:
        """What a good result shows, as text."""
        return EVIDENCE[self.kind]


# -- pinned -------------------------------------------------------------------------------------------------------


def pinned_query_set(
    project: Project, migration: Migration, store: Store, images: ImageSource, *, resample: bool = False
) -> QuerySet:
    """The migration's query set: the pinned one, else, and with `resample`, one drawn from the collection and pinned.

    Raises `PreconditionFailed` where the configuration or the file of queries is no longer what they were drawn from,
    and what `draw_query_set` and `read_pinned` raise.
    """
    _refuse_stored_instances(project)
    found = None if resample else read_pinned(project, migration)
    if found is not None:
        _refuse_changes(project, found)
        return found
    query_set = draw_query_set(project, store, images)
    body = _body(query_set)
    document = {"format": FORMAT, "checksum": _digest(body), "query_set": body}
    query_set_files(project, migration).write(FILE, json.dumps(document).encode())
    return query_set


def read_pinned(project: Project, migration: Migration) -> QuerySet | None:
    """The a pinned query set as they were drawn, whatever the configuration says by now; None before the first draw.

    Raises `PreconditionFailed` for a file that is damaged, and `TemporarilyUnavailable`.
    """
    files, name = query_set_files(project, migration), FILE
    content = files.read(name)
    if content is None:
        files, name = old_files(project, migration), OLD_FILE
        content = files.read(name)
    if content is None:
        return None
    advice = (
        f"put it back from a backup, or draw a new query set with `migrator verify {project.name} --resample-queries`"
    )
    try:
        document = json.loads(content)
        version, body = document["format"], document[Path(name).stem]
        if version == FORMAT and document["checksum"] == _digest(body):
            return _query_set(body)
    except (ValueError, TypeError, KeyError, RecursionError):
        version = FORMAT
    if version != FORMAT:
        raise PreconditionFailed(
            f"{files.path(name)}: the query set is of format {_quoted(version)}, not {FORMAT}: {advice}"
        )
    raise PreconditionFailed(f"{files.path(name)}: the query set is damaged: {advice}")


def query_set_files(project: Project, migration: Migration) -> LogFiles:
    """The folder in the artifacts that holds a migration's query set and its baseline."""
    return LogFiles(project.config.artifacts, project.name, "query-set", migration.key)


def old_files(project: Project, migration: Migration) -> LogFiles:
    """That folder as it was named before ledger version 0007."""
    return LogFiles(project.config.artifacts, project.name, "questions", migration.key)


def _body(query_set: QuerySet) -> dict[str, Any]:
    """As JSON: relevant items as pairs, since the keys of a JSON object would all be text."""
    body = {field.name: getattr(query_set, field.name) for field in fields(query_set)}
    if query_set.tags is None:  # so that the hash of other query sets is what it was before there were any
        del body["tags"], body["gallery_tags"]
    if query_set.relevant is not None:
        body["relevant"] = [[[item, grade] for item, grade in grades.items()] for grades in query_set.relevant]
    return body


def _query_set(body: dict[str, Any]) -> QuerySet:
    relevant = body["relevant"]
    if relevant is not None:
        relevant = [{item: float(grade) for item, grade in pairs} for pairs in relevant]
    return QuerySet(**{**body, "relevant": relevant})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _made_from(project: Project, sha256: str | None) -> dict[str, Any]:
    """What the query set depend on; `images.uri` makes their paths."""
    verify = project.settings.verify
    return {
        "queries": None if verify.queries is None else {"file": verify.queries.name, "sha256": sha256},
        **verify.model_dump(include={"label", "segment", "sample", "gallery", "seed"}),
        "uri": project.settings.images.uri,
    }


def _refuse_changes(project: Project, query_set: QuerySet) -> None:
    file, then = project.settings.verify.queries, query_set.made_from
    sha256 = None
    if file is not None and then["queries"] is not None:
        sha256 = _sha256_of(file)
    current = _made_from(project, sha256)
    day = query_set.drawn_at[:10]
    changes = []
    if file is None or then["queries"] is None:
        if current["queries"] != then["queries"]:
            names = ["not set" if made["queries"] is None else made["queries"]["file"] for made in (current, then)]
            changes.append(f"verify.queries is {names[0]}, and was {names[1]} when the query set of {day} was drawn")
    elif sha256 is None:
        changes.append(f"{file}, the file that the query set of {day} was drawn from, cannot be read")
    elif sha256 != then["queries"]["sha256"]:
        short = f"sha256 {then['queries']['sha256'][:8]}... -> {sha256[:8]}..."
        changes.append(f"{file} is no longer the file that the query set of {day} was drawn from ({short})")
    for key in ("label", "segment", "sample", "gallery", "seed", "uri"):
        if current[key] != then[key]:
            name = "images.uri" if key == "uri" else f"verify.{key}"
            old, new = ("not set" if value is None else _quoted(value) for value in (then[key], current[key]))
            changes.append(f"{name} is {new}, and was {old} when the query set of {day} was drawn")
    if changes:
        raise PreconditionFailed(
            f"{'; '.join(changes)}: put it back, or draw a new query set with `migrator verify {project.name} "
            "--resample-queries`, which counts as a further interim analysis"
        )


def _sha256_of(file: Path) -> str | None:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


# -- drawn --------------------------------------------------------------------------------------------------------


def _several(tags: Iterable[Tags]) -> bool:
    return any(len(some) > 1 for some in tags)


@dataclass(frozen=True, slots=True)
class _Gallery:
    """The items that are searched, in the total order of ids."""

    ids: list[ItemId]
    paths: list[str | None]
    tags: list[Tags] | None
    segments: list[str] | None

    @property
    def labels(self) -> list[str] | None:
        """The one class of each item, empty for none; None where classes are not known or an item has several."""
        return None if self.tags is None or _several(self.tags) else [tags[0] if tags else "" for tags in self.tags]


@dataclass(frozen=True, slots=True)
class _Queries:
    """Queries, or what may become some; `numbers` are their rows in the file or the gallery."""

    paths: list[str]
    tags: list[Tags] | None
    segments: list[str] | None
    own: list[ItemId | None]
    relevant: list[dict[ItemId, float]] | None
    numbers: list[int]

    @property
    def labels(self) -> list[str] | None:
        """The class that each query is drawn and counted for: of several the one that fewest queries have."""
        if self.tags is None:
            return None
        sizes = Counter(tag for tags in self.tags for tag in tags)
        return [min(tags, key=lambda tag: (sizes[tag], tag)) for tags in self.tags]

    def at(self, rows: Iterable[int]) -> _Queries:
        """Those at `rows`."""
        chosen = list(rows)

        def of(column: list[T] | None) -> list[T] | None:
            return None if column is None else [column[row] for row in chosen]

        return _Queries(
            [self.paths[row] for row in chosen],
            of(self.tags),
            of(self.segments),
            [self.own[row] for row in chosen],
            of(self.relevant),
            [self.numbers[row] for row in chosen],
        )


def draw_query_set(project: Project, store: Store, images: ImageSource) -> QuerySet:
    """Draws gallery and queries: the same ones for the same configuration, file and collection.

    The gallery is a random sample of the collection, and of the kind `relevant` all relevant items too. Without a
    file, queries are drawn among the gallery alone, even where few classes come together there: the collection is
    never read whole. What has no relevant item in the gallery cannot be a query. Of several items with one image the
    first is the query's own.

    Raises `ConfigError` where the configuration or the file of queries cannot be used, `PreconditionFailed` where the
    collection gives no query.
    """
    _refuse_stored_instances(project)
    settings = project.settings.verify
    listed, table = None, None
    if settings.queries is not None:
        listed, table = _read_queries(settings.queries, settings.segment, images)
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
                "every one of the %d items drawn has the tag %s: it does not count", len(gallery.ids), _names(common)
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
    several = kind == "labels" and _several([*(queries.tags or ()), *(gallery.tags or ())])
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
        made_from=_made_from(project, None if table is None else table.sha256),
        counts={name: counts[name] for name in COUNTS},
        drawn_at=now().isoformat(timespec="seconds"),
        tags=[list(tags) for tags in queries.tags or ()] if several else None,
        gallery_tags=[list(tags) for tags in gallery.tags or ()] if several else None,
    )


def _refuse_stored_instances(project: Project) -> None:
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


def _drawn(queries: _Queries, project: Project) -> _Queries:
    settings = project.settings.verify
    labels = queries.labels
    classes = np.zeros(len(queries.paths), np.int64) if labels is None else _codes(labels)
    return queries.at(even_draw(classes, settings.sample, seed=settings.seed).tolist())


def _codes(labels: Iterable[str]) -> NDArray[np.int64]:
    """The same number for the same label, from 0 on in the order of appearance."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(label, len(known)) for label in labels], np.int64)


def _read_gallery(project: Project, store: Store, images: ImageSource, ids: Iterable[ItemId]) -> _Gallery:
    """Those of the items that are there, page by page, with what their payloads say."""
    settings = project.settings.verify
    # The segments of queries from a file stand in the file.
    segment = settings.segment if settings.queries is None else None
    gallery = _Gallery([], [], None if settings.label is None else [], None if segment is None else [])
    names: dict[str, None] = {}
    ordered = sorted(ids, key=order_key)
    for page in _pages(store, ordered, payload=True):
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


def tags_or_refuse(project: Project, item: ItemId, payload: Payload) -> Tags:
    """The classes of an item by verify.label. Raises `ConfigError` for what can be no class."""
    try:
        return tags_of(project.settings.verify.label or "", item, payload)
    except NotText as problem:
        raise ConfigError(
            f"{_key(project, 'label')}: item {_quoted(item)}: {problem}; a class is a value, or a list of values"
        ) from None


def _segment_or_refuse(project: Project, item: ItemId, payload: Payload) -> str:
    try:
        return (parse(project.settings.verify.segment or "").fill({**payload, "id": item}) or "").strip()
    except NotText as problem:
        raise ConfigError(
            f"{_key(project, 'segment')}: item {_quoted(item)}: {problem}; a query belongs to one segment: name a "
            "field "
            "with one value"
        ) from None


def _pages(store: Store, ids: Sequence[ItemId], *, payload: bool) -> Iterator[list[tuple[ItemId, Payload]]]:
    for start in range(0, len(ids), PAGE):
        page = store.read(ids[start : start + PAGE], vectors=False, payload=payload)
        yield list(zip(page.ids, page.payloads if page.payloads is not None else [{}] * len(page), strict=True))


def _with_own(queries: _Queries, gallery: _Gallery) -> _Queries:
    """With the gallery item whose image each query is."""
    item_of: dict[str, ItemId] = {}
    for item, path in zip(gallery.ids, gallery.paths, strict=True):
        if path is not None:
            item_of.setdefault(path, item)
    return replace(queries, own=[item_of.get(path) for path in queries.paths])


def _items_as_queries(gallery: _Gallery) -> _Queries:
    """The items themselves, as far as they have an image and, where there are classes, a class.

    Without classes an item is the only relevant result of its own altered view, and no item is excluded.
    """
    rows = [
        row
        for row, path in enumerate(gallery.paths)
        if path is not None and (gallery.tags is None or len(gallery.tags[row]) > 0)
    ]
    whole = _Queries(
        [path or "" for path in gallery.paths],
        gallery.tags,
        gallery.segments,
        [None] * len(gallery.ids) if gallery.tags is None else list(gallery.ids),
        [{item: 1.0} for item in gallery.ids] if gallery.tags is None else None,
        list(range(len(gallery.ids))),
    )
    return whole.at(rows)


def _tags_of_all(gallery: _Gallery) -> set[str]:
    """Tags that every item has, where items have several: with them nothing could be irrelevant."""
    if not gallery.tags or not _several(gallery.tags):
        return set()
    return set(gallery.tags[0]).intersection(*gallery.tags)


def _without(column: list[Tags] | None, common: set[str]) -> list[Tags] | None:
    return None if column is None else [tuple(tag for tag in tags if tag not in common) for tags in column]


def _with_relevant_items(queries: _Queries, gallery: _Gallery, counts: Counter[str], file: Path | None) -> _Queries:
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
            f"{_names(tag for tags in queries.tags for tag in tags)}, "
            f"items {_names(sizes)}; make verify.label give the classes of the file, or raise verify.gallery"
        )
    if len(classes) == 1:
        advice = "correct verify.label, or raise verify.gallery" if file is None else "add queries of other classes"
        raise ConfigError(
            f"{drawn if file is None else file}: every query has the class {_names(classes)}, and with one class alone "
            f"nothing can be irrelevant: {advice}"
        )
    return left


def _ids_with_relevant(store: Store, ids: Sequence[ItemId], queries: _Queries, table: Table) -> set[ItemId]:
    """The sample and all relevant items, each of which must be in the collection."""
    assert queries.relevant is not None
    known = set(ids)
    rows_of: dict[ItemId, list[int]] = {}
    for number, grades in zip(queries.numbers, queries.relevant, strict=True):
        for item in grades:
            if item not in known:
                rows_of.setdefault(item, []).append(number)
    for page in _pages(store, list(rows_of), payload=False):
        for item, _ in page:
            known.add(item)
            del rows_of[item]
    if rows_of:
        item, numbers = next(iter(rows_of.items()))
        unknown = (
            f"{len(rows_of)} unknown ids in {len(set().union(*rows_of.values()))} of {len(queries.paths)} rows drawn"
        )
        raise ConfigError(
            f"{table.file}: {table.place(numbers[0])} lists {_quoted(item)} as relevant, and {store.describe().name} "
            f'has no such item ({unknown}): correct or remove them; 17 and "17" are two ids'
        )
    return known


def _without_own_relevant(queries: _Queries, counts: Counter[str]) -> _Queries:
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


# -- the file of queries ------------------------------------------------------------------------------------------


def _read_queries(file: Path, segment: str | None, images: ImageSource) -> tuple[_Queries, Table]:
    """What the file lists, a query for each image, and the file as it was read. Raises `ConfigError`."""
    named = () if segment is None else parse(segment).fields

    def choose(header: Header) -> list[str]:
        header.require("path", "its first line names the columns path and label")
        if "label" not in header and "relevant" not in header:
            raise header.missing(
                ("label", "relevant"), "give the class of each query, or the ids of its relevant items"
            )
        for name in ("label", "relevant", "grades"):
            if name not in header and header.near(name, cutoff=0.85):
                raise header.missing((name,), "", cutoff=0.85)
        if "grades" in header and "relevant" not in header:
            has = f"(it has: {header.seen})"
            raise TableProblem(f"{file} has a column grades and no column relevant {has}: name the graded items there")
        columns = [name for name in ("path", "label", "relevant", "grades") if name in header]
        return columns + [_column_of(field, header) for field in named]

    try:
        table = read_table(file, choose, what="queries", key="verify.queries")
        return _checked(table, segment, images), table
    except TableProblem as problem:
        raise ConfigError(str(problem)) from problem


def _column_of(field: str, header: Header) -> str:
    """The column that holds a field of verify.segment: one with its name, or the structure that it is a field of."""
    steps = field.split(".")
    for count in range(len(steps), 0, -1):
        if (name := ".".join(steps[:count])) in header:
            return name
    raise header.missing((field,), "verify.segment names it")


def _checked(table: Table, segment: str | None, images: ImageSource) -> _Queries:
    """One query for each image. An image that is listed again with the same relevant items counts once."""
    file, columns = table.file, table.columns
    count = len(columns["path"])
    if not count:
        raise ConfigError(f"{file} lists no queries: add rows with a path, and a label or relevant items")
    paths = [_below_root(path, table, row, images) for row, path in enumerate(table.texts("path"))]
    tags = _tag_column(table) if "label" in columns else None
    relevant = _relevant(table) if "relevant" in columns else None
    segments = None if segment is None else _segments(table, segment)
    given = {"label": tags, "relevant": relevant, "segment": segments}
    first: dict[str, int] = {}
    for row, path in enumerate(paths):
        earlier = first.setdefault(path, row)
        for name, column in given.items():
            if column is not None and column[earlier] != column[row]:
                raise ConfigError(
                    f"{file}: {table.place(row)} gives {_quoted(path)} another {name} than {table.place(earlier)} "
                    "does: "
                    "keep one"
                )
    return _Queries(paths, tags, segments, [None] * count, relevant, list(range(count))).at(first.values())


def _below_root(path: str, table: Table, row: int, images: ImageSource) -> str:
    try:
        return images.below_root(path)
    except ImageProblem as problem:
        raise ConfigError(f"{table.file}: {table.place(row)}: {problem}: correct or remove it") from None


def _tag_column(table: Table) -> list[Tags]:
    """The classes of each query: text or a number, a list of them, or in a CSV file JSON text of a list of texts."""
    if not any(is_list(cell) or _json_texts(cell) is not None for cell in table.columns["label"]):
        return [(text,) for text in table.texts("label")]
    column: list[Tags] = []
    for row, cell in enumerate(table.columns["label"]):
        try:
            column.append(parse("{label}").fill_each({"label": _json_texts(cell) or cell}))
        except NotText as problem:
            where = f"{table.file}: {table.place(row)}"
            raise ConfigError(f"{where}: {problem}: write text, or a list of texts") from None
    table.require_filled("label", column)
    return column


def _json_texts(cell: Any) -> list[str] | None:
    if not isinstance(cell, str) or not cell.lstrip().startswith("["):
        return None
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and all(isinstance(text, str) for text in value) else None


def _segments(table: Table, segment: str) -> list[str]:
    template = parse(segment)
    names = [name for name in table.columns if name not in ("path", "label", "relevant", "grades")]
    names += [name for name in template.fields if name in table.columns and name not in names]
    segments = []
    for row in range(len(table.columns["path"])):
        try:
            values = {name: _trimmed(table.columns[name][row]) for name in names}
            segments.append((template.fill(values) or "").strip())
        except NotText as problem:
            raise ConfigError(f"{table.file}: {table.place(row)}: {problem}; a query belongs to one segment") from None
    if not any(segments):
        raise ConfigError(
            f"{table.file}: the columns that verify.segment names ({', '.join(template.fields)}) are empty"
        )
    return segments


def _trimmed(cell: Any) -> Any:
    return cell.strip() if isinstance(cell, str) else cell


def _relevant(table: Table) -> list[dict[ItemId, float]]:
    """The relevant items of each row, with their grades."""
    grades = table.columns.get("grades")
    rows: list[dict[ItemId, float]] = []
    for row, cell in enumerate(table.columns["relevant"]):
        try:
            items = _list(cell, "relevant", '[17, "a-9"]')
            for item in items:
                if isinstance(item, bool) or not isinstance(item, int | str) or not _fits(item):
                    raise ValueError(f"{_quoted(item)} in relevant is no item id: ids are whole numbers or text")
            if len(set(items)) < len(items):
                raise ValueError(f"relevant lists {_quoted(Counter(items).most_common(1)[0][0])} twice: keep one")
            gains = [1.0] * len(items) if grades is None else _list(grades[row], "grades", "[3, 1]")
            if len(gains) != len(items):
                raise ValueError(f"{len(gains)} grades for {len(items)} relevant items: give one for each")
            for gain in gains:
                if isinstance(gain, bool) or not isinstance(gain, int | float) or not 0 < gain <= MAX_GRADE:
                    raise ValueError(f"{_quoted(gain)} is no grade: give numbers above 0, up to {MAX_GRADE:.0e}")
        except ValueError as error:
            raise ConfigError(f"{table.file}: {table.place(row)}: {error}") from None
        rows.append({item: float(gain) for item, gain in zip(items, gains, strict=True)})
    return rows


def _list(cell: Any, name: str, example: str) -> list[Any]:
    """A list column's cell, or JSON text of a list."""
    value = cell
    if isinstance(cell, str):
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list):
        raise ValueError(f"{name} is no JSON list such as {example}: {_quoted(cell)}; [] says that there is none")
    return value


def _fits(item: int | str) -> bool:
    """Whether any store could have such an id: a number has 64 bits."""
    return isinstance(item, str) or -(2**63) <= item < 2**64


# -- text --------------------------------------------------------------------------------------------------------


def _names(names: Iterable[str]) -> str:
    """Some names in a row, shortened."""
    distinct = sorted(dict.fromkeys(names))
    shown = [_quoted(name, 40, plain=True) for name in distinct[:MAX_NAMES]]
    return ", ".join(shown + ["..."] * (len(distinct) > MAX_NAMES)) or "none"


def _quoted(value: Any, max_length: int = 60, *, plain: bool = False) -> str:
    """An untrusted value as one line of bounded length; `plain`: text without quotes, where it can be printed."""
    try:
        text = value if plain and isinstance(value, str) and value.isprintable() else repr(value)
    except ValueError:  # Python does not write out integers of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= max_length else text[: max_length - 3] + "..."
