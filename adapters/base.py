"""What a vector store must be able to do to be migrated: the `Store` protocol and the values it takes and returns.

Everything is a batch. Vectors are float32 arrays of shape (n, dim). Ids are `int` or `str`, never mixed up:
`7` and `"7"` are two items. Client exceptions never leave an adapter: they become one of the `StoreError`s here.
"""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from migrator.errors import MigratorError

ItemId: TypeAlias = int | str
Vectors: TypeAlias = NDArray[np.float32]  # (n, dim)
Payload: TypeAlias = Mapping[str, Any]
Metric: TypeAlias = Literal["cosine", "ip", "l2"]
T = TypeVar("T")

PAGE_IDS = 100_000  # ids that are asked for at once where all are needed


class Sparse(NamedTuple):
    """A sparse vector: indices in ascending order, and the value at each."""

    indices: NDArray[np.uint32]  # (n,)
    values: NDArray[np.float64]  # (n,)


FurtherVectors: TypeAlias = Mapping[str, NDArray[np.float64] | Sparse]
"""The vectors of an item besides the one that is migrated, by name: dense (dim,), multi-vectors (n, dim), or sparse.
Numbers are as the store's client gives them, so that they can be written elsewhere unchanged."""

Fence: TypeAlias = Callable[[float], None]
"""Called with the seconds that a request may take, right before it is sent; if it raises, the request is not sent."""


class StoreError(MigratorError):
    """A vector store cannot be used, or not as the call asks."""

    exit_code = 2


class StoreUnavailable(StoreError):
    """The store could not be reached or is overloaded; the same call may work later.

    `retry_after` is the store's own advice in seconds, where it gave one.
    """

    exit_code = 4

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StoreRejected(StoreError):
    """The store, or its contents, is not what was requested; the same call will fail again."""


class StoreBusy(StoreError):
    """Another process holds the store for writing."""

    exit_code = 4


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What this store can do with this index. Read by `plan`; skipped visibly by the contract suite."""

    update_in_place: bool
    """Vectors can be replaced in the served index without a rebuild."""
    visible: Literal["at_once", "on_publish", "at_cutover"]
    """When a written vector answers queries: with the write, with the next `publish`, or only after the rebuild
    that `publish(final=True)` does."""
    stamps: bool
    """The store keeps a stamp beside each vector, written in the same step."""
    concurrent_writers: bool
    """Several processes may write at once. If not, opening for writing takes a lock."""
    exact_vectors: bool
    """`read` gives back the vectors as they were written. A quantised index gives approximations."""
    normalises: bool
    """The store scales vectors to unit length: what is read differs from what was written by that, and by rounding."""
    partial_update: bool
    """A vector and its stamp are replaced in one request that leaves the rest of the item alone. If not, whole items
    are rewritten: read right before, checked right after, so that changes of the application in between are kept."""
    aliases: bool
    """A collection can be addressed by an alias that is moved to another one in one step."""
    notes: tuple[str, ...] = ()
    """Sentences for the plan: what follows from the above for this collection."""
    in_place_refusal: str | None = None
    """Why no vector of this collection can be replaced in place at all, and the way out; it continues the name of
    the collection. None where it can."""


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """Facts of a collection, as the store reports them."""

    name: str
    """Canonical and unique: two spellings of the same collection, an alias among them, give the same name."""
    collection_id: str
    """What the store's own client calls it: a collection's name, or the absolute folder of a FAISS gallery."""
    dim: int
    metric: Metric
    count: int
    index: str
    server: str
    """Product and version, for instance `faiss 1.15.1`."""
    schema: Mapping[str, str]
    """Payload field -> type, as the store names it."""
    bytes_on_disk: int | None = None
    """Size of the index, where the store reports it."""
    alias: str | None = None
    """The alias by which it was opened: an alias of the server, or a symbolic link to a folder."""


@dataclass(frozen=True, slots=True)
class Page:
    """Whole items, in the order of the ids requested; ids that no longer exist are skipped."""

    ids: Sequence[ItemId]
    vectors: Vectors  # (n, dim)
    payloads: Sequence[Payload]
    stamps: Sequence[str | None]
    further: Sequence[FurtherVectors] | None = None
    """The items' further vectors; None where the collection has no such or where they were not read."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class VectorPage:
    """Vectors and stamps of items, in the order of the ids requested; ids that no longer exist are skipped."""

    ids: Sequence[ItemId]
    vectors: Vectors  # (n, dim)
    stamps: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class PayloadPage:
    """Payloads and stamps of items, in the order of the ids requested; ids that no longer exist are skipped."""

    ids: Sequence[ItemId]
    payloads: Sequence[Payload]
    stamps: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class StampPage:
    """Stamps of items, in the order of the ids requested; ids that no longer exist are skipped."""

    ids: Sequence[ItemId]
    stamps: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Reading:
    """What `BaseStore._read` gives: vectors and payloads where it was asked for them, stamps always."""

    ids: Sequence[ItemId]
    vectors: Vectors | None  # (n, dim)
    payloads: Sequence[Payload] | None
    stamps: Sequence[str | None]

    def page(self) -> Page:
        """Whole items, where both were read."""
        assert self.vectors is not None
        assert self.payloads is not None
        return Page(self.ids, self.vectors, self.payloads, self.stamps)


@dataclass(frozen=True, slots=True)
class WriteReport:
    """The outcome of a batch of writes. Every id given is in exactly one of the four."""

    written: Sequence[ItemId]
    deleted: Sequence[ItemId] = ()
    """Deleted since they were read. They stay deleted."""
    rejected: Mapping[ItemId, str] = field(default_factory=dict)
    """Refused by the store, with its reason."""
    changed: Sequence[ItemId] = ()
    """Written by the application since they were read. They keep what it wrote."""

    @classmethod
    def of(
        cls,
        written: Sequence[ItemId],
        deleted: Sequence[ItemId],
        rejected: Mapping[ItemId, str],
        changed: Sequence[ItemId],
    ) -> WriteReport:
        """A report in which an item that was deleted counts as that alone, whatever else is wrong with it."""
        left = set(rejected).difference(deleted)
        return cls(written, deleted, {item: why for item, why in rejected.items() if item in left}, changed)


@dataclass(frozen=True, slots=True)
class Hits:
    """Answers to n queries, nearest first. A query with fewer than k answers has shorter lists."""

    ids: Sequence[Sequence[ItemId]]
    scores: Sequence[Sequence[float]]
    """Larger is nearer, whatever the metric (the negated squared distance for `l2`)."""


@runtime_checkable
class Store(Protocol):
    """One collection of a vector store. Opened by `migrator.adapters.registry.open_store`.

    A new store derives from `BaseStore`, which needs a few primitives; a wrapper derives from `ForwardingStore`.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What this store can and cannot do, with the index that the collection has."""
        ...

    def describe(self) -> CollectionInfo:
        """Facts of the collection as it is now."""
        ...

    def scan_ids(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> list[ItemId]:
        """The next `limit` ids in the store's total order, beyond `after` and not beyond `up_to` (inclusive)."""
        ...

    def read(self, ids: Sequence[ItemId]) -> Page:
        """The items as they were written last; ids that no longer exist are skipped."""
        ...

    def read_vectors(self, ids: Sequence[ItemId]) -> VectorPage:
        """As `read`, without payloads."""
        ...

    def read_payloads(self, ids: Sequence[ItemId]) -> PayloadPage:
        """As `read`, without vectors."""
        ...

    def read_stamps(self, ids: Sequence[ItemId]) -> StampPage:
        """As `read`, without vectors and payloads: which items exist, and their stamps."""
        ...

    def read_further(self, ids: Sequence[ItemId]) -> Sequence[FurtherVectors] | None:
        """What items have besides the vector that is migrated, empty for ids that no longer exist.

        None if the collection has no such vectors. Where it has, `insert` refuses a page without them.
        """
        ...

    def approximations(self, vectors: Vectors) -> Vectors | None:
        """(n, dim) -> (n, dim): what `read` would give back of `vectors`, if they were in the index.

        None where the store keeps vectors as they are, or cannot tell.
        """
        ...

    def scan(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> Page:
        """The next `limit` items beyond `after` and not beyond `up_to`, with vectors and payloads, in order.

        What `scan_ids` and then `read` give, in one go. Fewer than `limit` come only where there are no more.
        """
        ...

    def write_vectors(
        self, ids: Sequence[ItemId], vectors: Vectors, stamp: str | None, expected: Page | None = None
    ) -> WriteReport:
        """Replaces the vectors of existing items, durably, together with their stamp (None removes it).

        `expected` is the page of these ids, with vectors and payloads, that the new vectors were made from: an item
        that is no longer what it was there is not written but reported as `changed`.

        Never creates an item and never touches a payload. Repeating the call changes nothing more. Refuses, before
        anything is written, vectors of another shape and an id given twice (`StoreRejected`). With a stamp, vectors
        that are not finite or all zeros are `rejected`; without one they are taken, for they may have been there.
        """
        ...

    def set_fence(self, fence: Fence | None) -> None:
        """From now on `fence` is called right before each request that changes items of a server; None ends that.

        A store that one process at a time opens for writing ignores it: there the lock is the fence.
        """
        ...

    def create_write_alias(self, alias: str) -> None:
        """Creates `alias` for requests that change items. Changes nothing where it leads to this collection already.

        Deleting it is a fence at the server: what was addressed to it and arrives later changes nothing. A store that
        one process at a time opens for writing ignores it. Raises `StoreRejected` where the server forbids it.
        """
        ...

    def delete_write_alias(self, alias: str) -> None:
        """Deletes a write alias; changes nothing where there is none."""
        ...

    def write_through(self, alias: str) -> None:
        """From now on requests that change items are addressed to `alias`, if it leads to this collection."""
        ...

    def publish(self, *, final: bool = False) -> None:
        """Makes written vectors answer queries, where `capabilities.visible` says that writing alone does not.

        `final` also does the rebuild that some indexes need. Safe to repeat; a crash leaves the state before or after.
        """
        ...

    def unstamped(self, stamp: str, *, after: ItemId | None, limit: int) -> list[ItemId]:
        """Ids, in the store's total order, of items that do not carry `stamp`."""
        ...

    def count(self, *, stamp: str | None = None) -> int:
        """Exact number of items; with `stamp`, of those that carry it."""
        ...

    def sample(self, n: int, *, seed: int) -> list[ItemId]:
        """`n` distinct ids, drawn uniformly; all of them where there are fewer. Same seed and contents, same ids."""
        ...

    def search(self, vectors: Vectors, k: int, *, exact: bool = False) -> Hits:
        """The k nearest items as a reader of the collection sees it now: unpublished vectors do not answer."""
        ...

    def clear_migration_state(self) -> None:
        """Removes what the migration left in the store besides the vectors: stamps and kept generations."""
        ...

    # -- a second collection beside this one: the shadow strategy ---------------------------------------------------

    def exists(self, collection_id: str) -> bool:
        """Whether this server or file system has a collection of that id, which no alias is."""
        ...

    def open_collection(self, collection_id: str) -> Store:
        """Another collection by its own name, over the same connection, for reading or writing like this one.

        Raises `StoreRejected` if there is none. The connection is closed with the last of the stores that share it.
        """
        ...

    def create_like(self, collection_id: str, *, dim: int) -> Store:
        """An empty collection of the same schema, metric and index parameters, for vectors of `dim`; opened.

        One of that name that is there already is opened as it is if it fits, so that a killed call can be repeated;
        `StoreRejected` if it does not fit.
        """
        ...

    def check_create_like(self, *, dim: int) -> None:
        """Raises `StoreRejected`, saying what and the way out, where `create_like` could not carry over everything
        that belongs to this collection. Changes nothing, leaves nothing behind, and needs no lock for writing.
        """
        ...

    def insert(self, page: Page) -> WriteReport:
        """Writes whole items, durably: vectors, payloads as `read` gives them, stamps. Replaces those there already.

        Repeating the call changes nothing more. The rules for vectors are those of `write_vectors`, which takes an
        item without a stamp as it is; here those that are not finite or all zeros are always `rejected`.
        """
        ...

    def delete(self, ids: Sequence[ItemId]) -> None:
        """Removes these items, durably; ids that no longer exist are no error."""
        ...

    def swap_alias(self, alias: str, *, to: str) -> None:
        """Moves an existing alias to the collection `to` in one step: every query finds the one or the other.

        Raises `StoreRejected`, with the alias as it was, if there is no such alias or no such collection.
        """
        ...

    def drop(self) -> None:
        """Deletes this collection and everything in it. Refused (`StoreRejected`) while an alias leads to it.

        The store is closed by it.
        """
        ...

    def close(self) -> None:
        """Closes the store, and releases its lock where it holds one. Safe to repeat."""
        ...


def with_further(store: Store, page: Page) -> Page:
    """The page, with the items' further vectors where the collection has such."""
    return dataclasses.replace(page, further=store.read_further(page.ids))


def same_value(one: Any, other: Any) -> bool:
    """Whether two payload values, or two payloads, are equal; NaN equals NaN, at any depth."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_value(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple | np.ndarray) and isinstance(other, list | tuple | np.ndarray):
        return len(one) == len(other) and all(map(same_value, one, other))
    return bool(one == other) or bool(one != one and other != other)


def order_key(item: ItemId) -> tuple[bool, int, str]:
    """Sort key of the total order of ids that every store keeps: integers ascending, then strings by code point."""
    return (True, 0, item) if isinstance(item, str) else (False, item, "")


class BaseStore(ABC):
    """Derives the methods of `Store` that most stores have in common from a few primitives.

    The primitives are the abstract methods here. What a store can do faster by itself it overrides. A subclass sets
    `_collection`, the id of its collection, and whether it was opened for writing, and calls `_must_write` first in
    each method that changes something.
    """

    _collection: str
    _write: bool
    _open: bool = True

    # -- primitives -------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """See `Store`."""

    @abstractmethod
    def describe(self) -> CollectionInfo:
        """See `Store`."""

    @abstractmethod
    def scan_ids(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> list[ItemId]:
        """See `Store`."""

    @abstractmethod
    def _read(self, ids: Sequence[ItemId], *, vectors: bool, payload: bool) -> Reading:
        """The items as they were written last, with vectors and payloads if requested. Leaves out missing ids."""

    @abstractmethod
    def write_vectors(
        self, ids: Sequence[ItemId], vectors: Vectors, stamp: str | None, expected: Page | None = None
    ) -> WriteReport:
        """See `Store`."""

    @abstractmethod
    def search(self, vectors: Vectors, k: int, *, exact: bool = False) -> Hits:
        """See `Store`."""

    @abstractmethod
    def clear_migration_state(self) -> None:
        """See `Store`."""

    @abstractmethod
    def exists(self, collection_id: str) -> bool:
        """See `Store`."""

    @abstractmethod
    def open_collection(self, collection_id: str) -> Store:
        """See `Store`."""

    @abstractmethod
    def create_like(self, collection_id: str, *, dim: int) -> Store:
        """See `Store`."""

    @abstractmethod
    def check_create_like(self, *, dim: int) -> None:
        """See `Store`."""

    @abstractmethod
    def insert(self, page: Page) -> WriteReport:
        """See `Store`."""

    @abstractmethod
    def delete(self, ids: Sequence[ItemId]) -> None:
        """See `Store`."""

    @abstractmethod
    def swap_alias(self, alias: str, *, to: str) -> None:
        """See `Store`."""

    @abstractmethod
    def drop(self) -> None:
        """See `Store`."""

    @abstractmethod
    def close(self) -> None:
        """See `Store`."""

    # -- derived from them --------------------------------------------------------------------------------------------

    def read(self, ids: Sequence[ItemId]) -> Page:
        """Whole items."""
        return self._read(ids, vectors=True, payload=True).page()

    def read_vectors(self, ids: Sequence[ItemId]) -> VectorPage:
        """Vectors and stamps."""
        found = self._read(ids, vectors=True, payload=False)
        assert found.vectors is not None
        return VectorPage(found.ids, found.vectors, found.stamps)

    def read_payloads(self, ids: Sequence[ItemId]) -> PayloadPage:
        """Payloads and stamps."""
        found = self._read(ids, vectors=False, payload=True)
        assert found.payloads is not None
        return PayloadPage(found.ids, found.payloads, found.stamps)

    def read_stamps(self, ids: Sequence[ItemId]) -> StampPage:
        """Stamps alone."""
        found = self._read(ids, vectors=False, payload=False)
        return StampPage(found.ids, found.stamps)

    def scan(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> Page:
        """The next `limit` items: their ids, and then what they hold."""
        return self.read(self.scan_ids(after=after, up_to=up_to, limit=limit))

    def unstamped(self, stamp: str, *, after: ItemId | None, limit: int) -> list[ItemId]:
        """Ids of items that do not carry `stamp`, from the stamps of all beyond `after`."""
        found = (item for item, carried in self._stamps(after) if carried != stamp)
        return list(itertools.islice(found, max(limit, 0)))

    def count(self, *, stamp: str | None = None) -> int:
        """Exact number of items; with `stamp`, of those that carry it."""
        return sum(stamp in (None, carried) for _, carried in self._stamps(None))

    def _stamps(self, after: ItemId | None) -> Iterator[tuple[ItemId, str | None]]:
        """Every item beyond `after`, in order, with its stamp."""
        for ids in self._id_pages(after):
            page = self.read_stamps(ids)
            yield from zip(page.ids, page.stamps, strict=True)

    def _id_pages(self, after: ItemId | None) -> Iterator[list[ItemId]]:
        """Every id beyond `after`, in order."""
        while ids := self.scan_ids(after=after, limit=PAGE_IDS):
            yield ids
            after = ids[-1]

    def sample(self, n: int, *, seed: int) -> list[ItemId]:
        """`n` distinct ids in random order."""
        everything = list(itertools.chain.from_iterable(self._id_pages(None)))
        chosen = np.random.default_rng(seed).choice(len(everything), min(max(n, 0), len(everything)), replace=False)
        return [everything[row] for row in chosen.tolist()]

    def read_further(self, ids: Sequence[ItemId]) -> Sequence[FurtherVectors] | None:
        """None: items have one vector."""
        return None

    def approximations(self, vectors: Vectors) -> Vectors | None:
        """None: vectors are kept as they are, or it cannot be told."""
        return None

    def publish(self, *, final: bool = False) -> None:
        """Nothing: a written vector answers at once."""
        self._must_write()

    # Empty on purpose: a server's store overrides them.

    def set_fence(self, fence: Fence | None) -> None:  # noqa: B027
        """Nothing: one process at a time opens this store for writing."""

    def create_write_alias(self, alias: str) -> None:  # noqa: B027
        """Nothing: one process at a time opens this store for writing."""

    def delete_write_alias(self, alias: str) -> None:  # noqa: B027
        """Nothing: one process at a time opens this store for writing."""

    def write_through(self, alias: str) -> None:  # noqa: B027
        """Nothing: one process at a time opens this store for writing."""

    # -- checks -------------------------------------------------------------------------------------------------------

    def _must_be_open(self) -> None:
        if not self._open:
            raise StoreRejected(f"{self._collection} was closed")

    def _must_write(self) -> None:
        self._must_be_open()
        if not self._write:
            raise StoreRejected(f"{self._collection} was opened for reading only")


class ForwardingStore:
    """A store that passes every call on to another one, through `_forward`. Wrappers override what they change."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def _forward(self, call: Callable[[], T]) -> T:
        return call()

    @property
    def capabilities(self) -> Capabilities:
        """As the store has them."""
        return self._forward(lambda: self._store.capabilities)

    def describe(self) -> CollectionInfo:
        """Passed on."""
        return self._forward(lambda: self._store.describe())

    def scan_ids(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> list[ItemId]:
        """Passed on."""
        return self._forward(lambda: self._store.scan_ids(after=after, up_to=up_to, limit=limit))

    def read(self, ids: Sequence[ItemId]) -> Page:
        """Passed on."""
        return self._forward(lambda: self._store.read(ids))

    def read_vectors(self, ids: Sequence[ItemId]) -> VectorPage:
        """Passed on."""
        return self._forward(lambda: self._store.read_vectors(ids))

    def read_payloads(self, ids: Sequence[ItemId]) -> PayloadPage:
        """Passed on."""
        return self._forward(lambda: self._store.read_payloads(ids))

    def read_stamps(self, ids: Sequence[ItemId]) -> StampPage:
        """Passed on."""
        return self._forward(lambda: self._store.read_stamps(ids))

    def read_further(self, ids: Sequence[ItemId]) -> Sequence[FurtherVectors] | None:
        """Passed on."""
        return self._forward(lambda: self._store.read_further(ids))

    def approximations(self, vectors: Vectors) -> Vectors | None:
        """Passed on."""
        return self._forward(lambda: self._store.approximations(vectors))

    def scan(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> Page:
        """Passed on."""
        return self._forward(lambda: self._store.scan(after=after, up_to=up_to, limit=limit))

    def write_vectors(
        self, ids: Sequence[ItemId], vectors: Vectors, stamp: str | None, expected: Page | None = None
    ) -> WriteReport:
        """Passed on."""
        return self._forward(lambda: self._store.write_vectors(ids, vectors, stamp, expected))

    def set_fence(self, fence: Fence | None) -> None:
        """Passed on."""
        self._forward(lambda: self._store.set_fence(fence))

    def create_write_alias(self, alias: str) -> None:
        """Passed on."""
        self._forward(lambda: self._store.create_write_alias(alias))

    def delete_write_alias(self, alias: str) -> None:
        """Passed on."""
        self._forward(lambda: self._store.delete_write_alias(alias))

    def write_through(self, alias: str) -> None:
        """Passed on."""
        self._forward(lambda: self._store.write_through(alias))

    def publish(self, *, final: bool = False) -> None:
        """Passed on."""
        self._forward(lambda: self._store.publish(final=final))

    def unstamped(self, stamp: str, *, after: ItemId | None, limit: int) -> list[ItemId]:
        """Passed on."""
        return self._forward(lambda: self._store.unstamped(stamp, after=after, limit=limit))

    def count(self, *, stamp: str | None = None) -> int:
        """Passed on."""
        return self._forward(lambda: self._store.count(stamp=stamp))

    def sample(self, n: int, *, seed: int) -> list[ItemId]:
        """Passed on."""
        return self._forward(lambda: self._store.sample(n, seed=seed))

    def search(self, vectors: Vectors, k: int, *, exact: bool = False) -> Hits:
        """Passed on."""
        return self._forward(lambda: self._store.search(vectors, k, exact=exact))

    def clear_migration_state(self) -> None:
        """Passed on."""
        self._forward(lambda: self._store.clear_migration_state())

    def exists(self, collection_id: str) -> bool:
        """Passed on."""
        return self._forward(lambda: self._store.exists(collection_id))

    def open_collection(self, collection_id: str) -> Store:
        """Passed on."""
        return self._forward(lambda: self._store.open_collection(collection_id))

    def create_like(self, collection_id: str, *, dim: int) -> Store:
        """Passed on."""
        return self._forward(lambda: self._store.create_like(collection_id, dim=dim))

    def check_create_like(self, *, dim: int) -> None:
        """Passed on."""
        self._forward(lambda: self._store.check_create_like(dim=dim))

    def insert(self, page: Page) -> WriteReport:
        """Passed on."""
        return self._forward(lambda: self._store.insert(page))

    def delete(self, ids: Sequence[ItemId]) -> None:
        """Passed on."""
        self._forward(lambda: self._store.delete(ids))

    def swap_alias(self, alias: str, *, to: str) -> None:
        """Passed on."""
        self._forward(lambda: self._store.swap_alias(alias, to=to))

    def drop(self) -> None:
        """Passed on."""
        self._forward(lambda: self._store.drop())

    def close(self) -> None:
        """Passed on."""
        self._forward(lambda: self._store.close())
