"""The contract of all stores, for pytest: what every store must do.

An adapter, of this package or of another one, joins by a test class that inherits `StoreContract` and has a fixture
`make`: how a collection of its kind is created, and how an application changes it behind the store's back
(`Collection`). What a store declares that it cannot do is skipped, visibly.

    pip install 'advbct-migrator[testing]'

    # conftest.py, so that a failed assert shows its values
    pytest.register_assert_rewrite("migrator.adapters.testing")

    # test_my_store.py
    class TestMyStore(StoreContract):
        @pytest.fixture
        def make(self, tmp_path): ...
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrator.adapters.base import ItemId, Page, Store, StoreBusy, StoreRejected, Vectors, order_key

DIM = 16
SLOW = settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    derandomize=True,
)


class Collection(ABC):
    """A real collection, as the application that owns it sees it."""

    @abstractmethod
    def open(self, *, write: bool = True) -> Store:
        """By its own name; by the alias, once there is one."""

    @abstractmethod
    def add_alias(self) -> str:
        """Gives the collection an alias (a symbolic link) as an application would, and returns it."""

    @abstractmethod
    def alias_leads_to(self) -> str:
        """The `collection_id` of the collection that the alias leads to, read without the adapter."""

    @abstractmethod
    def all_names(self) -> set[str]:
        """Names of all collections of the server, or of all that lies in the folder, read without the adapter."""

    @abstractmethod
    def replace(self, ids: Sequence[ItemId], vectors: Vectors) -> None:
        """The application writes other vectors."""

    @abstractmethod
    def insert(self, ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[dict[str, Any]]) -> None: ...

    @abstractmethod
    def delete(self, ids: Sequence[ItemId]) -> None: ...

    @abstractmethod
    def visible(self) -> dict[ItemId, np.ndarray]:
        """The vectors that answer queries now, read without the adapter."""


Make = Callable[[Sequence[ItemId], Vectors, Sequence[dict[str, Any]]], Collection]


def unit_vectors(n: int, seed: int = 0) -> Vectors:
    """(n, DIM) random directions."""
    vectors: Vectors = np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def payloads_of(ids: Sequence[ItemId]) -> list[dict[str, Any]]:
    """A payload for each id, with a text and a number."""
    return [{"path": f"images/{item}.png", "price": number / 4} for number, item in enumerate(ids)]


def everything(store: Store, page: int = 37) -> list[ItemId]:
    """All ids, page by page."""
    ids: list[ItemId] = []
    while more := store.scan_ids(after=ids[-1] if ids else None, limit=page):
        ids += more
    return ids


def vectors_of(store: Store, ids: Sequence[ItemId]) -> Vectors:
    """What the store reads for these ids, (n, DIM)."""
    return store.read_vectors(ids).vectors


def stamps_of(store: Store, ids: Sequence[ItemId]) -> list[str | None]:
    """The stamps of these ids."""
    return list(store.read_stamps(ids).stamps)


def assert_same(store: Store, actual: Vectors, desired: Vectors) -> None:
    """What was read is what was written, bit for bit, or up to the store's own normalisation."""
    if store.capabilities.normalises:
        np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-6)
    else:
        np.testing.assert_array_equal(actual, desired)


def assert_same_page(one: Page, other: Page) -> None:
    """Two pages hold the same, bit for bit."""
    assert list(one.ids) == list(other.ids)
    assert (one.vectors.shape, one.vectors.dtype) == (other.vectors.shape, other.vectors.dtype)
    np.testing.assert_array_equal(one.vectors, other.vectors)
    assert list(one.payloads) == list(other.payloads)
    assert list(one.stamps) == list(other.stamps)


class StoreContract:
    """Give `make`, and ids of the kind to be tested."""

    id_strategy: st.SearchStrategy[ItemId] = st.integers(-(2**63), 2**63 - 1)

    missing: ItemId = "no such item"
    """An id that no item has, where ids are strings; adapters with a form for these (UUIDs) give another."""

    arriving: Sequence[ItemId] = (-7, 1001)
    arriving_strings: Sequence[ItemId] = ("", "zzz")
    """Ids of items that arrive later."""

    @pytest.fixture
    def make(self) -> Make:
        raise NotImplementedError

    @pytest.fixture
    def ids(self) -> list[ItemId]:
        """200 ids in no order."""
        return [int(item) for item in np.random.default_rng(7).permutation(np.arange(-50, 350, 2))]

    @pytest.fixture
    def old(self, ids: list[ItemId]) -> Vectors:
        return unit_vectors(len(ids))

    @pytest.fixture
    def new(self, ids: list[ItemId]) -> Vectors:
        return unit_vectors(len(ids), seed=1)

    @pytest.fixture
    def collection(self, make: Make, ids: list[ItemId], old: Vectors) -> Collection:
        return make(ids, old, payloads_of(ids))

    @pytest.fixture
    def store(self, collection: Collection) -> Iterator[Store]:
        with closing(collection.open()) as store:
            yield store

    @pytest.fixture
    def stamped(self, store: Store) -> Store:
        if not store.capabilities.stamps:
            pytest.skip("this store keeps no stamps")
        return store

    # -- facts ----------------------------------------------------------------------------------------------------

    def test_it_is_a_store_and_tells_the_facts(self, store: Store, ids: list[ItemId]) -> None:
        assert isinstance(store, Store)
        info = store.describe()
        assert (info.dim, info.count) == (DIM, len(ids))
        assert set(info.schema) == {"path", "price"}
        assert info.name
        assert info.index
        assert info.server
        assert store.count() == len(ids)

    def test_a_rebuild_is_declared_by_what_is_visible_when(self, store: Store) -> None:
        can = store.capabilities
        assert can.update_in_place == (can.visible != "at_cutover")
        assert can.update_in_place or can.notes, "plan has nothing to say about an index that must be rebuilt"

    def test_an_empty_collection_is_a_collection(self, make: Make) -> None:
        with closing(make([], unit_vectors(0), []).open()) as store:
            assert store.describe().count == store.count() == 0
            assert store.scan_ids(after=None, limit=10) == store.sample(5, seed=0) == []
            if store.capabilities.stamps:
                assert store.count(stamp="s") == 0
                assert store.unstamped("s", after=None, limit=10) == []
            page = store.read([7])
            assert (len(page), vectors_of(store, [7]).shape, page.payloads) == (0, (0, DIM), [])
            assert store.write_vectors([7], unit_vectors(1), "s").deleted == [7]
            for exact in (False, True):
                assert [list(row) for row in store.search(unit_vectors(2), 3, exact=exact).ids] == [[], []]
            store.publish()
            store.publish(final=True)

    # -- order and paging -----------------------------------------------------------------------------------------

    @SLOW
    @given(data=st.data())
    def test_pages_are_the_total_order_between_any_bounds(self, make: Make, data: st.DataObject) -> None:
        ids = data.draw(st.lists(self.id_strategy, unique=True, min_size=1, max_size=30))
        order = sorted(ids, key=order_key)
        bounds = st.none() | st.sampled_from(ids) | self.id_strategy
        with closing(make(ids, unit_vectors(len(ids)), payloads_of(ids)).open(write=False)) as store:
            assert everything(store, page=data.draw(st.integers(1, 31))) == order
            for _ in range(3):
                after, up_to = data.draw(bounds), data.draw(bounds)
                limit = data.draw(st.integers(0, 31))
                beyond = [item for item in order if after is None or order_key(item) > order_key(after)]
                between = [item for item in beyond if up_to is None or order_key(item) <= order_key(up_to)]
                assert store.scan_ids(after=after, up_to=up_to, limit=limit) == between[:limit]
                if store.capabilities.stamps:
                    assert store.unstamped("s", after=after, limit=limit) == beyond[:limit]
                scanned = store.scan(after=after, up_to=up_to, limit=limit)
                assert_same_page(scanned, store.read(between[:limit]))
            page = store.read_payloads(ids)
            assert list(page.ids) == ids
            assert [dict(payload) for payload in page.payloads] == payloads_of(ids)

    @SLOW
    @given(data=st.data())
    def test_what_stays_is_seen_exactly_once_whatever_comes_and_goes(self, make: Make, data: st.DataObject) -> None:
        """An application inserts and deletes between any two pages."""
        ids = data.draw(st.lists(self.id_strategy, unique=True, min_size=3, max_size=20))
        arriving = set(data.draw(st.lists(self.id_strategy, unique=True, max_size=6))) - set(ids)
        leaving = data.draw(st.lists(st.sampled_from(ids), unique=True, max_size=len(ids) - 2))
        collection = make(ids, unit_vectors(len(ids)), payloads_of(ids))
        size = data.draw(st.integers(1, 6))
        whole_items = data.draw(st.booleans())
        left: set[ItemId] = set()
        seen: list[ItemId] = []
        with closing(collection.open(write=False)) as store:
            while True:
                after = seen[-1] if seen else None
                if whole_items:
                    page = list(store.scan(after=after, limit=size).ids)
                else:
                    page = store.scan_ids(after=after, limit=size)
                if not page:
                    break
                seen += page
                for _ in range(data.draw(st.integers(0, 2))):
                    if len(arriving) > 0 and data.draw(st.booleans()):
                        item = arriving.pop()
                        collection.insert([item], unit_vectors(1), payloads_of([item]))
                    elif leaving:
                        left.add(leaving[-1])
                        collection.delete([leaving.pop()])
        assert seen == sorted(set(seen), key=order_key)
        assert set(ids) - left <= set(seen)

    def test_ids_come_back_as_plain_python(self, store: Store) -> None:
        found = [*everything(store), *store.sample(3, seed=0), *store.search(unit_vectors(1), 3).ids[0]]
        assert {type(item) for item in found} in ({int}, {str})

    def test_a_scan_tells_the_stamps(self, stamped: Store, ids: list[ItemId], new: Vectors) -> None:
        stamped.write_vectors(ids[:30], new[:30], "new")
        order = sorted(ids, key=order_key)
        page = stamped.scan(after=order[9], up_to=order[150], limit=10**6)
        assert_same_page(page, stamped.read(order[10:151]))
        assert [item for item, stamp in zip(page.ids, page.stamps, strict=True) if stamp == "new"] == [
            item for item in order[10:151] if item in ids[:30]
        ]

    def test_an_integer_and_its_digits_are_two_items(self, store: Store, ids: list[ItemId]) -> None:
        other = str(ids[0]) if isinstance(ids[0], int) else 7
        assert len(store.read([other])) == 0
        assert store.write_vectors([other], unit_vectors(1), "s").deleted == [other]
        assert store.count() == len(ids)

    # -- reading --------------------------------------------------------------------------------------------------

    def test_read_keeps_the_order_asked_for_and_leaves_out_the_missing(
        self, store: Store, ids: list[ItemId], old: Vectors
    ) -> None:
        missing: ItemId = 10**6 + 1 if isinstance(ids[0], int) else self.missing
        wanted = [ids[5], missing, ids[2], ids[9]]
        page = store.read(wanted)
        assert list(page.ids) == [ids[5], ids[2], ids[9]]
        assert page.vectors.dtype == np.float32
        assert page.vectors.shape == (3, DIM)
        if store.capabilities.exact_vectors:
            assert_same(store, page.vectors, old[[5, 2, 9]])
        assert [dict(payload) for payload in page.payloads] == [payloads_of(ids)[row] for row in (5, 2, 9)]
        assert list(page.stamps) == [None] * 3

    def test_parts_of_items_are_those_of_the_whole(self, store: Store, ids: list[ItemId]) -> None:
        missing: ItemId = 10**6 + 1 if isinstance(ids[0], int) else self.missing
        wanted = [ids[5], missing, ids[2]]
        whole, stamps = store.read(wanted), store.read_stamps(wanted)
        vectors, payloads = store.read_vectors(wanted), store.read_payloads(wanted)
        for part in (stamps, vectors, payloads):
            assert (list(part.ids), list(part.stamps), len(part)) == ([ids[5], ids[2]], [None] * 2, 2)
        np.testing.assert_array_equal(vectors.vectors, whole.vectors)
        assert list(payloads.payloads) == list(whole.payloads)

    def test_what_was_read_does_not_change_afterwards(self, store: Store, ids: list[ItemId], new: Vectors) -> None:
        before = vectors_of(store, ids)
        kept = before.copy()
        store.write_vectors(ids, new, "s")
        store.publish(final=True)
        np.testing.assert_array_equal(before, kept)

    def test_samples_are_distinct_and_follow_the_seed(self, store: Store, ids: list[ItemId]) -> None:
        sample = store.sample(50, seed=3)
        assert len(set(sample)) == 50
        assert set(sample) <= set(ids)
        assert store.sample(50, seed=3) == sample
        assert store.sample(50, seed=4) != sample
        assert sorted(store.sample(10**6, seed=3), key=order_key) == sorted(ids, key=order_key)

    # -- writing --------------------------------------------------------------------------------------------------

    def test_written_vectors_are_read_back_with_their_stamp(
        self, stamped: Store, ids: list[ItemId], new: Vectors
    ) -> None:
        untouched = vectors_of(stamped, ids[20:])
        report = stamped.write_vectors(ids[:20], new[:20], "new")
        assert (list(report.written), list(report.deleted), dict(report.rejected)) == (ids[:20], [], {})
        assert_same(stamped, vectors_of(stamped, ids[:20]), new[:20])
        np.testing.assert_array_equal(vectors_of(stamped, ids[20:]), untouched)
        assert stamps_of(stamped, ids) == ["new"] * 20 + [None] * (len(ids) - 20)
        page = stamped.read_payloads(ids)
        assert [dict(payload) for payload in page.payloads] == payloads_of(ids)

    def test_a_write_never_creates_an_item(self, store: Store, ids: list[ItemId]) -> None:
        missing: ItemId = 10**6 + 1 if isinstance(ids[0], int) else self.missing
        report = store.write_vectors([ids[0], missing], unit_vectors(2, seed=5), "new")
        assert (list(report.written), list(report.deleted), dict(report.rejected)) == ([ids[0]], [missing], {})
        assert store.count() == len(ids)
        assert missing not in everything(store)

    def test_what_changed_since_it_was_read_is_left_alone(
        self, collection: Collection, stamped: Store, ids: list[ItemId], new: Vectors
    ) -> None:
        page = stamped.read(ids[:6])
        theirs = unit_vectors(1, seed=15)
        collection.replace(ids[:1], theirs)
        collection.delete(ids[1:2])
        report = stamped.write_vectors(ids[:6], new[:6], "new", expected=page)
        assert (list(report.written), list(report.changed), list(report.deleted)) == (ids[2:6], ids[:1], ids[1:2])
        assert stamps_of(stamped, [ids[0], *ids[2:6]]) == [None, *["new"] * 4]
        if stamped.capabilities.exact_vectors:
            assert_same(stamped, vectors_of(stamped, ids[:1]), theirs)

    @pytest.mark.parametrize("wrong", ["twice", "dim", "flat", "fewer"])
    def test_a_malformed_batch_is_refused_as_a_whole(self, store: Store, ids: list[ItemId], wrong: str) -> None:
        batch = {
            "twice": ([ids[0], ids[1], ids[0]], unit_vectors(3, seed=5)),
            "dim": (ids[:2], np.ones((2, DIM + 1), np.float32)),
            "flat": (ids[:1], np.ones(DIM, np.float32)),
            "fewer": (ids[:3], unit_vectors(2, seed=5)),
        }[wrong]
        before = vectors_of(store, ids)
        with pytest.raises(StoreRejected) as refusal:
            store.write_vectors(*batch, "new")
        assert "\n" not in str(refusal.value)
        np.testing.assert_array_equal(vectors_of(store, ids), before)
        assert stamps_of(store, ids) == [None] * len(ids)

    def test_vectors_that_are_none_are_rejected_one_by_one(self, store: Store, ids: list[ItemId]) -> None:
        vectors = unit_vectors(5, seed=5)
        vectors[1, 3], vectors[2, 0], vectors[3] = np.nan, np.inf, 0
        before = vectors_of(store, ids[1:4])
        report = store.write_vectors(ids[:5], vectors, "new")
        assert list(report.written) == [ids[0], ids[4]]
        assert set(report.rejected) == {ids[1], ids[2], ids[3]}
        assert all(report.rejected.values())
        assert_same(store, vectors_of(store, [ids[0], ids[4]]), vectors[[0, 4]])
        np.testing.assert_array_equal(vectors_of(store, ids[1:4]), before)

    def test_what_lay_there_may_be_put_back_whatever_it_was(self, make: Make, ids: list[ItemId], old: Vectors) -> None:
        old[3] = 0
        with closing(make(ids, old, payloads_of(ids)).open()) as store:
            if not store.capabilities.exact_vectors:
                pytest.skip("this index keeps approximations: no zero vector comes out of it")
            store.write_vectors([ids[3]], unit_vectors(1), "new")
            assert list(store.write_vectors([ids[3]], old[3:4], None).written) == [ids[3]]
            np.testing.assert_array_equal(vectors_of(store, [ids[3]])[0], old[3])

    def test_repeating_a_write_changes_nothing(self, stamped: Store, ids: list[ItemId], new: Vectors) -> None:
        for _ in range(2):
            assert list(stamped.write_vectors(ids[:9], new[:9], "new").written) == ids[:9]
            assert stamped.count(stamp="new") == 9
            assert_same(stamped, vectors_of(stamped, ids[:9]), new[:9])
            stamped.publish()
            assert stamped.count(stamp="new") == 9

    def test_a_write_repeated_after_a_lost_answer_knows_its_own_work(
        self, stamped: Store, ids: list[ItemId], new: Vectors
    ) -> None:
        page = stamped.read(ids[:9])
        for _ in range(2):
            report = stamped.write_vectors(ids[:9], new[:9], "new", expected=page)
            assert (list(report.written), list(report.changed), list(report.deleted)) == (ids[:9], [], [])
        assert_same(stamped, vectors_of(stamped, ids[:9]), new[:9])
        assert stamped.count(stamp="new") == 9

    # -- stamps ---------------------------------------------------------------------------------------------------

    def test_stamps_are_counted_and_listed(self, stamped: Store, ids: list[ItemId], new: Vectors) -> None:
        order = sorted(ids, key=order_key)
        stamped.write_vectors(ids[:30], new[:30], "one")
        stamped.write_vectors(ids[20:50], new[20:50], "two")
        assert [stamped.count(stamp=stamp) for stamp in ("one", "two", "three")] == [20, 30, 0]
        without = [item for item in order if item not in ids[:20]]
        assert stamped.unstamped("one", after=None, limit=10**6) == without
        assert stamped.unstamped("one", after=without[3], limit=5) == without[4:9]
        assert stamped.unstamped("three", after=None, limit=10**6) == order

    def test_a_vector_without_stamp_takes_the_stamp_away(self, stamped: Store, ids: list[ItemId], new: Vectors) -> None:
        before = vectors_of(stamped, ids[:5])
        stamped.write_vectors(ids[:5], new[:5], "new")
        stamped.publish()
        stamped.write_vectors(ids[:3], before[:3], None)
        for _ in range(2):
            assert stamps_of(stamped, ids[:5]) == [None, None, None, "new", "new"]
            assert_same(stamped, vectors_of(stamped, ids[:3]), before[:3])
            stamped.publish()

    def test_forgetting_the_migration_leaves_only_vectors(
        self, stamped: Store, collection: Collection, ids: list[ItemId], new: Vectors
    ) -> None:
        stamped.write_vectors(ids, new, "new")
        stamped.publish(final=True)
        visible = collection.visible()
        stamped.clear_migration_state()
        for _ in range(2):
            assert stamped.count(stamp="new") == 0
            assert stamped.unstamped("new", after=None, limit=1) == [min(ids, key=order_key)]
            assert _equal(collection.visible(), visible)
            stamped.close()
            stamped = collection.open()
        stamped.close()

    def test_written_vectors_that_wait_are_not_forgotten(self, stamped: Store, ids: list[ItemId], new: Vectors) -> None:
        if stamped.capabilities.visible == "at_once":
            pytest.skip("nothing waits in this store")
        stamped.write_vectors(ids[:5], new[:5], "new")
        with pytest.raises(StoreRejected, match="5"):
            stamped.clear_migration_state()
        assert stamped.count(stamp="new") == 5

    # -- searching and publishing ---------------------------------------------------------------------------------

    def test_exact_search_is_brute_force(self, store: Store, collection: Collection) -> None:
        queries = unit_vectors(7, seed=9)
        hits = store.search(queries, 10, exact=True)
        visible, metric = collection.visible(), store.describe().metric
        for query, ids, scores in zip(queries, hits.ids, hits.scores, strict=True):
            expected = {item: _score(metric, query, vector) for item, vector in visible.items()}
            best = sorted(expected.values(), reverse=True)[:10]
            np.testing.assert_allclose(scores, best, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose([expected[item] for item in ids], best, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("exact", [False, True])
    def test_answers_come_nearest_first_without_repetition(self, store: Store, ids: list[ItemId], exact: bool) -> None:
        hits = store.search(unit_vectors(5, seed=9), 8, exact=exact)
        for found, scores in zip(hits.ids, hits.scores, strict=True):
            assert len(found) == len(set(found)) == len(scores) <= 8
            assert set(found) <= set(ids)
            assert list(scores) == sorted(scores, reverse=True)
        more = store.search(unit_vectors(2, seed=9), len(ids) + 50, exact=exact)
        assert all(len(row) <= len(ids) for row in more.ids)

    @pytest.mark.parametrize("wrong", ["k", "dim", "nan"])
    def test_a_malformed_search_is_refused(self, store: Store, wrong: str) -> None:
        queries = unit_vectors(1) if wrong != "dim" else np.ones((1, DIM - 1), np.float32)
        if wrong == "nan":
            queries[0, 0] = np.nan
        with pytest.raises(StoreRejected):
            store.search(queries, 0 if wrong == "k" else 3)

    def test_written_vectors_answer_when_the_store_says_so(
        self, store: Store, collection: Collection, ids: list[ItemId], old: Vectors, new: Vectors
    ) -> None:
        seen_at = {"at_once": 0, "on_publish": 1, "at_cutover": 2}[store.capabilities.visible]
        before = collection.visible()
        for step in range(3):
            if step == 0:
                store.write_vectors(ids, new, "new")
            else:
                store.publish(final=step == 2)
            visible = collection.visible()
            if step < seen_at:
                assert _equal(visible, before)
            elif store.capabilities.exact_vectors:
                assert _equal(visible, dict(zip(ids, new, strict=True)), store)
            else:
                assert all(np.linalg.norm(visible[item] - vector) < 0.9 for item, vector in zip(ids, new, strict=True))
            top = [row[0] for row in store.search(new, 1, exact=True).ids]
            right = np.mean([a == b for a, b in zip(top, ids, strict=True)])
            assert right > 0.5 if step >= seen_at else right < 0.3

    def test_publishing_again_changes_nothing(
        self, stamped: Store, collection: Collection, ids: list[ItemId], new: Vectors
    ) -> None:
        stamped.write_vectors(ids[:90], new[:90], "new")
        stamped.publish(final=True)
        visible, vectors = collection.visible(), vectors_of(stamped, ids)
        for final in (False, True, False):
            stamped.publish(final=final)
            assert _equal(collection.visible(), visible)
            np.testing.assert_array_equal(vectors_of(stamped, ids), vectors)
            assert stamped.count(stamp="new") == 90

    def test_a_rollback_gives_back_the_vectors_bit_for_bit(
        self, store: Store, collection: Collection, ids: list[ItemId], new: Vectors
    ) -> None:
        before, read = collection.visible(), vectors_of(store, ids)
        # The last ten are never written, as are items whose images cannot be read.
        store.write_vectors(ids[:-10], new[:-10], "new")
        store.publish(final=True)
        assert not _equal(collection.visible(), before)
        store.write_vectors(ids[:100], read[:100], None)
        store.publish()
        store.write_vectors(ids[100:-10], read[100:-10], None)
        store.publish(final=True)
        assert _equal(collection.visible(), before, store)
        assert_same(store, vectors_of(store, ids), read)
        if store.capabilities.stamps:
            assert store.count(stamp="new") == 0

    # -- a second collection beside this one ----------------------------------------------------------------------

    @pytest.fixture
    def beside(self, store: Store) -> str:
        """The name of a collection that does not exist yet."""
        return f"{store.describe().collection_id}__shadow"

    def test_an_ordinary_collection_can_be_copied_whole_and_asking_so_leaves_nothing(
        self, store: Store, collection: Collection, ids: list[ItemId]
    ) -> None:
        before, names, info = collection.visible(), collection.all_names(), store.describe()
        for dim in (DIM, 2 * DIM):
            store.check_create_like(dim=dim)
        assert collection.all_names() == names
        assert store.describe() == info
        assert _equal(collection.visible(), before)
        assert everything(store) == sorted(ids, key=order_key)

    def test_asking_whether_it_can_be_copied_needs_no_right_to_write(self, collection: Collection) -> None:
        names = collection.all_names()
        with closing(collection.open(write=False)) as reader:
            reader.check_create_like(dim=DIM)
        assert collection.all_names() == names

    def test_a_collection_like_this_one_is_made_and_filled(
        self, store: Store, collection: Collection, ids: list[ItemId], old: Vectors, new: Vectors, beside: str
    ) -> None:
        before = collection.visible()
        assert not store.exists(beside)
        with closing(store.create_like(beside, dim=DIM)) as shadow:
            assert store.exists(beside)
            info, like = store.describe(), shadow.describe()
            assert (like.collection_id, like.count, like.dim, like.alias) == (beside, 0, DIM, None)
            assert like.name != info.name
            assert like.metric == info.metric
            assert everything(shadow) == []
            page = store.read_payloads(ids)
            items = Page(page.ids, new, page.payloads, ["new"] * len(ids))
            for _ in range(2):  # a repeated call changes nothing more
                report = shadow.insert(items)
                assert (list(report.written), list(report.deleted), dict(report.rejected)) == (ids, [], {})
            shadow.publish(final=True)
            assert everything(shadow) == sorted(ids, key=order_key)
            assert shadow.describe().schema == info.schema
            copied = shadow.read(ids)
            if shadow.capabilities.exact_vectors:
                assert_same(shadow, copied.vectors, new)
            assert [dict(payload) for payload in copied.payloads] == payloads_of(ids)
            if shadow.capabilities.stamps:
                assert list(copied.stamps) == ["new"] * len(ids)
                assert shadow.count(stamp="new") == len(ids)
            top = [row[0] for row in shadow.search(new, 1, exact=True).ids]
            assert np.mean([a == b for a, b in zip(top, ids, strict=True)]) > 0.5
        assert _equal(collection.visible(), before)

    def test_it_may_be_of_another_dimension(self, store: Store, ids: list[ItemId], beside: str) -> None:
        with closing(store.create_like(beside, dim=2 * DIM)) as shadow:
            assert shadow.describe().dim == 2 * DIM
            with pytest.raises(StoreRejected):
                shadow.insert(Page(ids[:1], unit_vectors(1), payloads_of(ids[:1]), [None]))
            wide = np.concatenate([unit_vectors(20), unit_vectors(20, seed=4)], axis=1)
            wide = (wide / np.sqrt(2)).astype(np.float32)
            shadow.insert(Page(ids[:20], wide, payloads_of(ids[:20]), [None] * 20))
            shadow.publish(final=True)
            assert shadow.count() == 20
            if shadow.capabilities.exact_vectors:
                np.testing.assert_allclose(vectors_of(shadow, ids[:20]), wide, atol=1e-6)

    def test_making_it_again_opens_what_is_there(self, store: Store, ids: list[ItemId], beside: str) -> None:
        for times in range(3):
            with closing(store.create_like(beside, dim=DIM)) as shadow:
                assert shadow.count() == (1 if times else 0)
                shadow.insert(Page(ids[:1], unit_vectors(1), payloads_of(ids[:1]), [None]))
        with closing(store.open_collection(beside)) as shadow:
            assert everything(shadow) == ids[:1]
        with pytest.raises(StoreRejected):
            store.create_like(beside, dim=2 * DIM)
        with pytest.raises(StoreRejected):
            store.open_collection(f"{beside}_none")

    def test_items_are_replaced_and_removed(self, store: Store, ids: list[ItemId], new: Vectors, beside: str) -> None:
        with closing(store.create_like(beside, dim=DIM)) as shadow:
            shadow.insert(Page(ids, new, payloads_of(ids), [None] * len(ids)))
            shadow.publish(final=True)
            other = [{"path": "other.png", "price": -1.0}] * 5
            shadow.insert(Page(ids[:5], unit_vectors(5, seed=8), other, [None] * 5))
            missing: ItemId = 10**6 + 1 if isinstance(ids[0], int) else self.missing
            shadow.delete([*ids[5:9], missing])
            shadow.delete(ids[5:9])
            for _ in range(2):
                assert shadow.count() == len(ids) - 4
                assert everything(shadow) == sorted(set(ids) - set(ids[5:9]), key=order_key)
                page = shadow.read(ids[:10])
                assert list(page.ids) == [*ids[:5], ids[9]]
                if shadow.capabilities.exact_vectors:
                    assert_same(shadow, page.vectors[:5], unit_vectors(5, seed=8))
                assert [dict(payload) for payload in page.payloads][:5] == other
                shadow.publish(final=True)
            assert set(shadow.search(new[5:9], len(ids), exact=True).ids[0]) == set(everything(shadow))

    def test_vectors_that_are_none_are_not_inserted(self, store: Store, ids: list[ItemId], beside: str) -> None:
        vectors = unit_vectors(4, seed=5)
        vectors[1, 3], vectors[2] = np.nan, 0
        with closing(store.create_like(beside, dim=DIM)) as shadow:
            report = shadow.insert(Page(ids[:4], vectors, payloads_of(ids[:4]), [None] * 4))
            assert (list(report.written), set(report.rejected)) == ([ids[0], ids[3]], set(ids[1:3]))
            assert everything(shadow) == sorted([ids[0], ids[3]], key=order_key)
            with pytest.raises(StoreRejected):
                shadow.insert(Page([ids[0], ids[0]], unit_vectors(2), payloads_of(ids[:2]), [None] * 2))

    def test_an_item_can_be_put_into_the_first_collection_too(
        self, store: Store, collection: Collection, ids: list[ItemId]
    ) -> None:
        """As a rollback does with what the application added after the cutover."""
        arrived: list[ItemId] = [10**6 + 1] if isinstance(ids[0], int) else [self.missing]
        store.insert(Page(arrived, unit_vectors(1, seed=6), payloads_of(arrived), [None]))
        store.delete(ids[:2])
        store.publish(final=True)
        assert set(collection.visible()) == {*ids[2:], *arrived}
        assert list(store.read_payloads(arrived).payloads) == payloads_of(arrived)

    def test_a_write_through_a_deleted_alias_changes_nothing(
        self, collection: Collection, ids: list[ItemId], old: Vectors, new: Vectors
    ) -> None:
        """The fence at the server: it holds for a request of which a part was sent before."""
        with closing(collection.open()) as store:
            if not store.capabilities.concurrent_writers:
                pytest.skip("one process at a time writes to this store")
            store.create_write_alias("migrator_backfill_7_ab")
            store.create_write_alias("migrator_backfill_7_ab")  # an answer that was lost
            with closing(collection.open()) as worker:
                worker.write_through("migrator_backfill_7_ab")
                assert worker.write_vectors(ids[:3], new[:3], "new").written == ids[:3]
                assert_same(store, vectors_of(store, ids[:3]), new[:3])
                store.delete_write_alias("migrator_backfill_7_ab")
                store.delete_write_alias("migrator_backfill_7_ab")
                with pytest.raises(StoreRejected):
                    worker.write_vectors(ids[3:6], new[3:6], "new")
                assert_same(store, vectors_of(store, ids[3:6]), old[3:6])
                assert stamps_of(store, ids[3:6]) == [None] * 3
            with closing(collection.open()) as later:
                later.write_through("migrator_backfill_7_ab")  # a server that forbids aliases: written all the same
                assert later.write_vectors(ids[3:6], new[3:6], "new").written == ids[3:6]

    def test_an_alias_is_moved_and_bars_the_way_to_dropping(
        self, collection: Collection, ids: list[ItemId], old: Vectors
    ) -> None:
        with closing(collection.open()) as first:
            if not first.capabilities.aliases:
                pytest.skip("this store has no aliases")
            info = first.describe()
        alias = collection.add_alias()
        with closing(collection.open()) as store:
            assert (store.describe().name, store.describe().collection_id) == (info.name, info.collection_id)
            assert store.describe().alias == alias
            with closing(store.create_like(f"{info.collection_id}__shadow", dim=DIM)) as shadow:
                shadow.insert(Page(ids[:3], old[:3], payloads_of(ids[:3]), [None] * 3))
                shadow.publish(final=True)
                with pytest.raises(StoreRejected):
                    store.swap_alias(alias, to=f"{info.collection_id}__none")
                with pytest.raises(StoreRejected):
                    store.swap_alias(f"{alias}_none", to=info.collection_id)
                assert collection.alias_leads_to() == info.collection_id
                for _ in range(2):
                    store.swap_alias(alias, to=shadow.describe().collection_id)
                    assert collection.alias_leads_to() == shadow.describe().collection_id
            # The open store keeps the collection that it opened.
            assert store.count() == len(ids)
            with closing(store.open_collection(f"{info.collection_id}__shadow")) as shadow:
                with pytest.raises(StoreRejected, match=r"alias|link"):
                    shadow.drop()
                assert shadow.count() == 3
        with closing(collection.open()) as moved:
            assert (moved.describe().collection_id, moved.count()) == (f"{info.collection_id}__shadow", 3)
            moved.swap_alias(alias, to=info.collection_id)
        with closing(collection.open()) as back:
            assert back.describe().collection_id == info.collection_id
            back.open_collection(f"{info.collection_id}__shadow").drop()
            assert not back.exists(f"{info.collection_id}__shadow")
            assert back.exists(info.collection_id)

    def test_a_collection_is_dropped_whole(
        self, store: Store, collection: Collection, ids: list[ItemId], beside: str
    ) -> None:
        shadow = store.create_like(beside, dim=DIM)
        shadow.insert(Page(ids[:3], unit_vectors(3), payloads_of(ids[:3]), [None] * 3))
        shadow.drop()
        assert not store.exists(beside)
        with pytest.raises(StoreRejected):
            shadow.count()
        with pytest.raises(StoreRejected):
            store.open_collection(beside)
        assert store.count() == len(ids) == len(collection.visible())

    def test_reading_does_not_make_or_change_a_collection(
        self, store: Store, collection: Collection, ids: list[ItemId], beside: str
    ) -> None:
        store.close()
        with closing(collection.open(write=False)) as reader:
            for change in (
                lambda: reader.create_like(beside, dim=DIM),
                lambda: reader.insert(Page(ids[:1], unit_vectors(1), payloads_of(ids[:1]), [None])),
                lambda: reader.delete(ids[:1]),
                lambda: reader.swap_alias("a", to="b"),
                reader.drop,
            ):
                with pytest.raises(StoreRejected, match="reading"):
                    change()
            assert (reader.count(), reader.exists(beside)) == (len(ids), False)

    # -- the application, other processes, other threads ----------------------------------------------------------

    @pytest.mark.parametrize("published", [False, True])
    def test_everything_is_still_there_after_reopening(
        self, collection: Collection, stamped: Store, ids: list[ItemId], new: Vectors, published: bool
    ) -> None:
        stamped.write_vectors(ids[:50], new[:50], "new")
        if published:
            stamped.publish(final=True)
        vectors = vectors_of(stamped, ids)
        stamped.close()
        for write in (False, True):
            with closing(collection.open(write=write)) as again:
                np.testing.assert_array_equal(vectors_of(again, ids), vectors)
                assert stamps_of(again, ids) == ["new"] * 50 + [None] * (len(ids) - 50)
                assert again.count(stamp="new") == 50

    def test_a_closed_store_answers_nothing(self, store: Store) -> None:
        store.close()
        store.close()
        with pytest.raises(StoreRejected):
            store.count()
        with pytest.raises(StoreRejected):
            store.publish()

    def test_a_store_opened_for_reading_cannot_write(self, collection: Collection, ids: list[ItemId]) -> None:
        with closing(collection.open(write=False)) as store:
            for change in (
                lambda: store.write_vectors(ids[:1], unit_vectors(1), "new"),
                store.publish,
                store.clear_migration_state,
            ):
                with pytest.raises(StoreRejected, match="reading"):
                    change()

    def test_a_second_writer(self, collection: Collection, store: Store, ids: list[ItemId]) -> None:
        if store.capabilities.concurrent_writers:
            with closing(collection.open()) as second:
                second.write_vectors(ids[:1], unit_vectors(1), "new")
            return
        with pytest.raises(StoreBusy) as refusal:
            collection.open()
        assert "\n" not in str(refusal.value)
        with closing(collection.open(write=False)) as reader:
            assert reader.count() == len(ids)
        store.close()
        collection.open().close()

    @pytest.mark.parametrize("moment", ["written", "published", "reopened"])
    def test_a_newer_write_of_the_application_wins(
        self, collection: Collection, stamped: Store, ids: list[ItemId], new: Vectors, moment: str
    ) -> None:
        stamped.write_vectors(ids[:10], new[:10], "new")
        if moment == "published":
            stamped.publish(final=True)
        if moment == "reopened":
            stamped.close()
        theirs = unit_vectors(2, seed=11)
        collection.replace(ids[:2], theirs)
        store = collection.open() if moment == "reopened" else stamped
        with closing(store):
            for _ in range(3):
                if store.capabilities.exact_vectors:
                    assert_same(store, vectors_of(store, ids[:2]), theirs)
                else:
                    assert np.abs(vectors_of(store, ids[:2]) - new[:2]).max() > 0.1
                assert stamps_of(store, ids[:10]) == [None] * 2 + ["new"] * 8
                assert set(store.unstamped("new", after=None, limit=10**6)) == set(ids) - set(ids[2:10])
                store.publish(final=True)
            visible = collection.visible()
            if store.capabilities.exact_vectors:
                assert_same(store, np.array([visible[item] for item in ids[:2]]), theirs)
                assert_same(store, np.array([visible[item] for item in ids[2:10]]), new[2:10])

    def test_a_deleted_item_stays_deleted(
        self, collection: Collection, stamped: Store, ids: list[ItemId], new: Vectors
    ) -> None:
        stamped.write_vectors(ids[:10], new[:10], "new")
        collection.delete(ids[:3])
        assert stamped.count() == len(ids) - 3
        assert stamped.count(stamp="new") == 7
        assert list(stamped.write_vectors(ids[2:5], new[2:5], "new").deleted) == [ids[2]]
        stamped.publish(final=True)
        assert set(collection.visible()) == set(everything(stamped)) == set(ids[3:])
        assert list(stamped.read_vectors(ids[:5]).ids) == ids[3:5]
        assert stamped.count(stamp="new") == 7

    def test_an_item_that_arrives_is_found_by_its_missing_stamp(
        self, collection: Collection, stamped: Store, ids: list[ItemId], new: Vectors
    ) -> None:
        stamped.write_vectors(ids, new, "new")
        stamped.publish()
        arrived = list(self.arriving if isinstance(ids[0], int) else self.arriving_strings)
        collection.insert(arrived, unit_vectors(2, seed=12), payloads_of(arrived))
        assert stamped.unstamped("new", after=None, limit=10) == sorted(arrived, key=order_key)
        assert stamped.count() == len(ids) + 2
        stamped.write_vectors(arrived, unit_vectors(2, seed=13), "new")
        stamped.publish(final=True)
        assert stamped.unstamped("new", after=None, limit=10) == []
        if stamped.capabilities.exact_vectors:
            expected = dict(zip([*ids, *arrived], [*new, *unit_vectors(2, seed=13)], strict=True))
            assert _equal(collection.visible(), expected, stamped)

    def test_one_thread_reads_while_another_writes(self, stamped: Store, ids: list[ItemId], new: Vectors) -> None:
        before = vectors_of(stamped, ids)
        written = threading.Event()
        problems: list[object] = []

        def read() -> None:
            try:
                while not written.is_set():
                    assert everything(stamped) == sorted(ids, key=order_key)
                    page = stamped.read(ids)
                    for row, stamp in enumerate(page.stamps):
                        if stamp in (None, "new"):  # and not an adapter's write intent: then it may be either
                            assert_same(stamped, page.vectors[row], before[row] if stamp is None else new[row])
            except BaseException as problem:
                problems.append(problem)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for start in range(0, len(ids), 20):
                stamped.write_vectors(ids[start : start + 20], new[start : start + 20], "new")
        finally:
            written.set()
            reader.join()
        assert problems == []
        assert stamped.count(stamp="new") == len(ids)

    @SLOW
    @given(data=st.data())
    def test_any_sequence_of_events_ends_as_a_plain_model_says(self, make: Make, data: st.DataObject) -> None:
        """The store against two dictionaries: vector and stamp of each item, whatever happens in which order."""
        ids = data.draw(st.lists(self.id_strategy, unique=True, min_size=1, max_size=6))
        versions = unit_vectors(12, seed=3)
        collection = make(ids, versions[: len(ids)], payloads_of(ids))
        store = collection.open()
        try:
            if not store.capabilities.stamps:
                pytest.skip("this store keeps no stamps")
            if not store.capabilities.exact_vectors:
                pytest.skip("this index keeps approximations, which the model does not know")
            vectors = dict(zip(ids, versions, strict=False))
            stamps: dict[ItemId, str | None] = dict.fromkeys(ids)
            for _ in range(data.draw(st.integers(1, 10))):
                event = data.draw(st.sampled_from(["write", "write", "write", "publish", "final", "reopen", "theirs"]))
                if event == "write":
                    some = data.draw(st.lists(st.sampled_from(ids), unique=True, min_size=1))
                    stamp = data.draw(st.sampled_from([None, "one", "two"]))
                    rows = [data.draw(st.integers(0, 11)) for _ in some]
                    store.write_vectors(some, versions[rows], stamp)
                    vectors.update(zip(some, versions[rows], strict=True))
                    stamps.update(dict.fromkeys(some, stamp))
                elif event == "theirs":
                    item = data.draw(st.sampled_from(ids))
                    theirs = unit_vectors(1, seed=data.draw(st.integers(100, 2**32)))
                    collection.replace([item], theirs)
                    vectors[item], stamps[item] = theirs[0], None
                elif event == "reopen":
                    store.close()
                    store = collection.open()
                else:
                    store.publish(final=event == "final")
                assert_same(store, vectors_of(store, ids), np.array([vectors[item] for item in ids]))
                assert stamps_of(store, ids) == [stamps[item] for item in ids]
                assert store.count(stamp="one") == sum(stamp == "one" for stamp in stamps.values())
            store.publish(final=True)
            assert _equal(collection.visible(), vectors, store)
        finally:
            store.close()


def _equal(one: dict[ItemId, np.ndarray], other: dict[ItemId, np.ndarray], store: Store | None = None) -> bool:
    """The same items with the same vectors; with a store, up to its own normalisation."""
    atol = 1e-6 if store is not None and store.capabilities.normalises else 0.0
    return one.keys() == other.keys() and all(np.allclose(one[item], other[item], rtol=0, atol=atol) for item in one)


def _score(metric: str, query: np.ndarray, vector: np.ndarray) -> float:
    if metric == "l2":
        return -float(((query - vector) ** 2).sum())
    return float(query @ vector)
