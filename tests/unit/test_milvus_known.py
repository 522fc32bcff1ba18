"""What the Milvus adapter remembers of a collection of Milvus Lite, and when it forgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from migrator.adapters.milvus.lite import REMEMBERED_BYTES, Known


@dataclass(eq=False)
class Engine:
    _next_seq: int = 0


def test_it_forgets_what_others_may_have_changed() -> None:
    engine = Engine(7)
    known: Any = Known(lambda: engine, 100)
    with known.held() as certain:
        assert certain
        known.keys = [1, 2, 3]
        known.saw({1: "s", 2: None}, {1: (b"", {})})
    with known.held():
        assert (known.keys, known.stamps, set(known.rows)) == ([1, 2, 3], {1: "s", 2: None}, {1})
        engine._next_seq += 2
        assert known.wrote({1: "t", 2: "t"})
        assert (known.stamps, known.rows) == ({1: "t", 2: "t"}, {})
    engine._next_seq += 1
    with known.held() as certain:
        assert certain
        assert (known.keys, known.stamps) == (None, {})


def test_it_forgets_when_others_write_beside_it() -> None:
    engine = Engine()
    known = Known(lambda: engine, 100)
    with known.held():
        known.saw({1: None, 2: None}, {})
        engine._next_seq += 2
        assert not known.wrote({1: "t"})
        assert known.stamps == {}


def test_another_collection_of_the_same_name_is_another() -> None:
    engines = [Engine(5)]
    known = Known(lambda: engines[-1], 100)
    with known.held():
        known.saw({1: None}, {})
    engines.append(Engine(5))
    with known.held():
        assert known.stamps == {}


def test_of_a_server_nothing_is_known() -> None:
    for known in (Known(None, 100), Known(lambda: None, 100), Known(lambda: object(), 100)):
        with known.held() as certain:
            assert not certain


def test_keys_stay_in_order_as_rows_come() -> None:
    engine = Engine()
    known = Known(lambda: engine, 100)
    with known.held():
        known.keys = [2, 4, 6]
        engine._next_seq += 3
        known.inserted({5: None, 4: "s", -1: None})
        assert known.keys == [-1, 2, 4, 5, 6]
        assert known.between(None, None, 10) == [-1, 2, 4, 5, 6]
        assert known.between(2, 5, 10) == [4, 5]
        assert known.between(3, 6, 1) == [4]
        assert known.between(3, 3, 10) == known.between(6, None, 10) == known.between(None, None, 0) == []
        assert known.between("a", None, 10) == []
        assert known.between(None, "a", 10) == [-1, 2, 4, 5, 6]


def test_rows_are_remembered_up_to_a_size() -> None:
    known = Known(Engine, REMEMBERED_BYTES // 3)
    with known.held():
        known.saw({}, {row: (b"", {}) for row in range(5)})
        known.saw({}, {5: (b"", {})})
        assert list(known.rows) == [3, 4, 5]
