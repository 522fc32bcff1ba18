"""Question sets: what is drawn, what counts as right, what is refused, and that a frozen set stays what it is."""

from __future__ import annotations

import csv
import datetime as dt
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from migrator.adapters.base import ItemId, PayloadPage, StampPage, Store, order_key
from migrator.config import find_migration, load_config
from migrator.errors import ConfigError, MigratorError, PreconditionFailed
from migrator.labels import label_of
from migrator.ledger import Migration
from migrator.project import Project
from migrator.trainer.images.source import ImageSource
from migrator.verify.judged_queries import JudgedQueries
from migrator.verify.query_set import rows
from migrator.verify.query_set.draw import COUNTS, draw_query_set, even_draw
from migrator.verify.query_set.model import QuerySet, digest, from_body, to_body
from migrator.verify.query_set.pinned import pinned_query_set, read_pinned

Items = Mapping[ItemId, Mapping[str, Any]]


def whole(query_set: QuerySet) -> JudgedQueries:
    return JudgedQueries.of(query_set, np.arange(len(query_set.paths)), np.arange(len(query_set.gallery)))


class Shelf:
    """A collection of payloads, as far as query_set look at one."""

    def __init__(self, items: Items) -> None:
        self.items = dict(items)
        self.asked: list[int] = []

    def describe(self) -> Any:
        return SimpleNamespace(name="shelf")

    def sample(self, n: int, *, seed: int) -> list[ItemId]:
        ids = list(self.items)
        return [ids[row] for row in np.random.default_rng(seed).permutation(len(ids))[:n]]

    def read_payloads(self, ids: Sequence[ItemId]) -> PayloadPage:
        self.asked.append(len(ids))
        found = [item for item in ids if item in self.items]
        return PayloadPage(found, [self.items[item] for item in found], [None] * len(found))

    def read_stamps(self, ids: Sequence[ItemId]) -> StampPage:
        page = self.read_payloads(ids)
        return StampPage(page.ids, page.stamps)


def shelf(per_class: Mapping[str, int]) -> dict[ItemId, dict[str, Any]]:
    """Items 0, 1, ... with these classes, which take turns."""
    left, items = Counter(per_class), cast(dict[ItemId, dict[str, Any]], {})
    while left := +left:
        for label in list(left):
            left[label] -= 1
            items[len(items)] = {"path": f"{len(items)}.png", "kind": label, "shop": f"shop {len(items) % 2}"}
    return items


class Desk:
    """A project in a folder, its collection, and the query set that come of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "images").mkdir()
        self.shelf = Shelf(shelf({"a": 5, "b": 5, "c": 5}))
        self.images = ImageSource(str(folder / "images"))
        self.artifacts: str = str(folder / "artifacts")
        self.old: Any = {"arch": "resnet10t", "weights": "old.safetensors", "dim": 4, "image_size": 32}
        self.migration = Migration(id=3, created_at=dt.datetime(2026, 11, 25, 12, 30, tzinfo=dt.UTC))
        self.verify: dict[str, Any] = {}

    def project(self) -> Project:
        document = {
            "version": 1,
            "artifacts": self.artifacts,
            "migrations": {
                "toys": {
                    "store": {"kind": "faiss", "path": "./gallery"},
                    "images": {"root": "./images", "uri": self.images.uri},
                    "old_encoder": self.old,
                    "new_encoder": {"arch": "resnet10t", "dim": 4, "image_size": 32, "weights": "new.safetensors"},
                    "verify": self.verify,
                }
            },
        }
        file = self.folder / "migrations.yaml"
        file.write_text(yaml.safe_dump(document))
        # Without the ledger that Project opens: query_set do not look at it.
        config = load_config(file)
        project = Project.__new__(Project)
        project.config, (project.name, project.settings) = config, find_migration(config, None)
        return project

    @property
    def store(self) -> Store:
        return cast(Store, self.shelf)

    def draw(self, **verify: Any) -> QuerySet:
        self.verify = verify
        return draw_query_set(self.project(), self.store, self.images)

    def freeze(self, *, resample: bool = False, **verify: Any) -> QuerySet:
        self.verify = verify
        return pinned_query_set(self.project(), self.migration, self.store, self.images, resample=resample)

    @property
    def frozen(self) -> Path:
        return Path(self.artifacts) / "toys" / "query-set-3-20261125T123000000000" / "query_set.json"

    def csv(self, rows: Sequence[Sequence[Any]], name: str = "queries.csv") -> str:
        with (self.folder / name).open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
        return name

    def text(self, content: str | bytes, name: str = "queries.csv") -> str:
        (self.folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def refusal(call: Callable[[], object], kind: type[MigratorError]) -> str:
    """The one line that it is refused with."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable(), message
    assert len(message) < 900, message
    return message


# -- the draw -----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=60), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_classes_are_drawn_evenly_as_long_as_they_last(labels: list[int], n: int, seed: int) -> None:
    codes = np.unique(np.array(labels, np.int64), return_inverse=True)[1]
    rows = even_draw(codes, n, seed=seed)
    assert len(rows) == min(n, len(labels))
    assert (np.diff(rows) > 0).all()
    sizes, taken = np.bincount(codes), np.bincount(codes[rows], minlength=len(set(labels)))
    left = taken[taken < sizes]
    if len(left):
        assert left.max() - left.min() <= 1
        assert taken.max() <= left.min() + 1, "a class that is used up has no more than its turns"
        assert (taken[taken == sizes] <= left.min() + 1).all()
    assert rows.tolist() == even_draw(codes, n, seed=seed).tolist()
    assert set(even_draw(codes, n // 2, seed=seed).tolist()) <= set(rows.tolist()), "more query_set hold the fewer"


def test_the_draw_is_uniform_within_a_class() -> None:
    codes = np.array([0] * 10 + [1] * 2)
    drawn = Counter(row for seed in range(600) for row in even_draw(codes, 2, seed=seed).tolist() if row < 10)
    assert sum(drawn.values()) == 600, "one of each class"
    assert set(drawn) == set(range(10))
    assert max(drawn.values()) < 2 * min(drawn.values())


def test_fewer_questions_than_classes_are_of_any_of_them() -> None:
    codes = np.arange(10).repeat(3)
    drawn = Counter(codes[row] for seed in range(300) for row in even_draw(codes, 2, seed=seed))
    assert set(drawn) == set(range(10))
    assert max(drawn.values()) < 2 * min(drawn.values())


@pytest.mark.parametrize(
    ("template", "payload", "label"),
    [
        ("{kind}", {"kind": "shoes"}, "shoes"),
        ("{kind}", {"kind": 7}, "7"),
        ("{kind}", {"kind": " x "}, "x"),
        ("{kind}", {"kind": None}, ""),
        ("{kind}", {"kind": float("nan")}, ""),
        ("{kind}", {"kind": 10**5000}, ""),
        ("{kind}", {}, ""),
        ("{kind}/{id}", {"kind": "a", "id": "of the payload"}, "a/5"),
        ("{kind}", {"kind": "{id} %s"}, "{id} %s"),
    ],
)
def test_the_label_of_an_item(template: str, payload: dict[str, Any], label: str) -> None:
    assert label_of(template, 5, payload) == label


# -- the kinds ----------------------------------------------------------------------------------------------------


def test_items_with_labels_ask_for_their_class_and_never_for_themselves(desk: Desk) -> None:
    desk.shelf = Shelf(
        {
            **shelf({"common": 40, "rare": 2, "lonely": 1, "alone": 1}),
            "no class": {"path": "x.png", "kind": None},
            "no path": {"path": None, "kind": "rare"},
            "unsafe": {"path": "../secret.png", "kind": "rare"},
        }
    )
    drawn = desk.draw(label="{kind}", sample=10)
    assert drawn.kind == "labels"
    assert drawn.relevant is None
    assert drawn.labels is not None
    assert drawn.gallery == sorted(desk.shelf.items, key=order_key)
    assert Counter(drawn.labels) == {"common": 8, "rare": 2}
    assert drawn.paths == [f"{item}.png" for item in drawn.own]
    assert drawn.own == sorted(cast(list[ItemId], drawn.own), key=order_key), "in the order of the gallery"
    assert drawn.gallery_labels is not None
    assert dict(zip(drawn.gallery, drawn.gallery_labels, strict=True))["no class"] == ""
    assert dict(zip(drawn.gallery, drawn.gallery_paths, strict=True))["unsafe"] is None
    assert drawn.counts == {
        "queries_without_relevant_items": 2,
        "classes_without_relevant_items": 2,
        "queries_listing_themselves": 0,
        "items_without_label": 1,
        "items_without_path": 2,
    }
    assert "class" in drawn.evidence
    assert set(whole(drawn).clusters().tolist()) == {0, 1}  # type: ignore[union-attr]
    assert drawn.segments is None


def test_the_same_seed_draws_the_same_and_another_another(desk: Desk) -> None:
    first = desk.draw(label="{kind}", sample=5, gallery=12)
    assert len(first.paths) == 5
    assert len(first.gallery) == 12
    assert desk.draw(label="{kind}", sample=5, gallery=12).sha256 == first.sha256
    assert desk.draw(label="{kind}", sample=5, gallery=12, seed=1).sha256 != first.sha256


def test_payloads_are_read_in_pages_and_only_of_the_sample(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PAGE", 5)
    assert len(desk.draw(label="{kind}", gallery=12).gallery) == 12
    assert desk.shelf.asked == [5, 5, 2]


def test_a_file_with_labels(desk: Desk) -> None:
    file = desk.csv(
        [
            ("label", " path ", "note", "shop"),
            ("a", "new/1.png", "", "x"),
            ("b", "./3.png", "an item of class a", ""),
            ("b", "new/2.png ", "", "y"),
            ("unheard of", "new/3.png", "", "y"),
            (),
            ("b", "new/2.png", "again", "y"),
        ]
    )
    drawn = desk.draw(queries=file, label="{kind}", segment="in {shop}")
    assert drawn.kind == "labels"
    assert drawn.paths == ["new/1.png", "3.png", "new/2.png"]
    assert drawn.labels == ["a", "b", "b"]
    assert drawn.own == [None, 3, None]
    assert drawn.segments == ["in x", "", "in y"]
    assert (drawn.counts["queries_without_relevant_items"], drawn.counts["classes_without_relevant_items"]) == (1, 1)
    assert drawn.made_from["queries"]["file"] == "queries.csv"
    assert len(drawn.made_from["queries"]["sha256"]) == 64


def test_a_query_whose_class_has_no_item_but_itself_is_passed_over(desk: Desk) -> None:
    desk.shelf = Shelf(shelf({"a": 2, "b": 2, "c": 1}))
    file = desk.csv([("path", "label"), ("0.png", "a"), ("new.png", "b"), ("2.png", "c"), ("other.png", "c")])
    drawn = desk.draw(queries=file, label="{kind}")
    assert drawn.labels == ["a", "b", "c"]
    assert drawn.paths[2] == "other.png", "another picture of class c has one item to find"
    assert drawn.counts["queries_without_relevant_items"] == 1
    assert drawn.counts["classes_without_relevant_items"] == 0


def test_of_two_items_with_one_image_the_first_is_the_query_itself(desk: Desk) -> None:
    items: Items = {1: {"path": "x.png"}, 2: {"path": "./x.png"}, 3: {"path": "y.png"}}
    desk.shelf = Shelf(items)
    drawn = desk.draw(queries=desk.csv([("path", "relevant"), ("x.png", "[1, 2, 3]")]))
    assert drawn.own == [1]
    assert drawn.relevant == [{2: 1.0, 3: 1.0}]


RELEVANT: list[tuple[str, list[ItemId], list[float]]] = [
    ("q1.png", [17, "17"], [3, 0.5]),
    ("q2.png", ["ü"], [1]),
    ("30.png", [30, 31], [2, 1]),
    ("31.png", [31], [1]),
]


def relevant_shelf() -> Shelf:
    return Shelf({**shelf({"a": 40, "b": 40}), "17": {"path": "text.png"}, "ü": {"path": "ü.png"}})


@pytest.mark.parametrize("form", ["csv", "list", "mixed list", "json"])
def test_a_file_with_relevant_items(desk: Desk, form: str) -> None:
    desk.shelf = relevant_shelf()
    rows = [(path, json.dumps(right), json.dumps(grades)) for path, right, grades in RELEVANT]
    if form == "csv":
        file = desk.csv([("path", "relevant", "grades"), *rows, ("q3.png", "[]", "[]")])
    elif form == "json":
        file = "queries.parquet"
        columns = zip(*rows, ("q3.png", "[]", "[]"), strict=True)
        pq.write_table(
            pa.table(dict(zip(("path", "relevant", "grades"), map(list, columns), strict=True))), desk.folder / file
        )
    else:  # Parquet lists have one type: here that of the numbers, or of text
        number = form == "list"
        kept = [(path, [item for item in right if isinstance(item, int) == number]) for path, right, _ in RELEVANT] + [
            ("q3.png", [])
        ]
        file = "queries.parquet"
        table = pa.table({"path": [path for path, _ in kept], "relevant": [right for _, right in kept]})
        pq.write_table(table, desk.folder / file)
    drawn = desk.draw(queries=file, gallery=5)
    assert drawn.kind == "relevant"
    assert drawn.relevant is not None
    if form in ("csv", "json"):
        assert drawn.paths == ["q1.png", "q2.png", "30.png"]
        assert drawn.relevant == [{17: 3.0, "17": 0.5}, {"ü": 1.0}, {31: 1.0}]
        assert drawn.own == [None, None, 30]
        assert drawn.counts["queries_without_relevant_items"] == 2
        assert drawn.counts["queries_listing_themselves"] == 2
        assert {17, "17", "ü", 31} <= set(drawn.gallery)
    elif form == "list":
        assert drawn.relevant == [{17: 1.0}, {31: 1.0}]
    else:
        assert drawn.relevant == [{"17": 1.0}, {"ü": 1.0}]
    assert drawn.gallery == sorted(drawn.gallery, key=order_key)
    assert 5 <= len(drawn.gallery) <= 10, "the random sample, and what is relevant"
    assert set(desk.shelf.sample(5, seed=0)) <= set(drawn.gallery)
    assert drawn.labels is None
    assert whole(drawn).clusters() is None
    assert "lists" in drawn.evidence


def test_relevance_decides_and_labels_only_group(desk: Desk) -> None:
    desk.shelf = relevant_shelf()
    rows = [(f"q{row}.png", f"[{row}]", "x" if row < 9 else "y") for row in range(12)]
    drawn = desk.draw(queries=desk.csv([("path", "relevant", "label"), *rows]), sample=6)
    assert drawn.kind == "relevant"
    assert drawn.labels is not None
    assert Counter(drawn.labels) == {"x": 3, "y": 3}
    assert whole(drawn).clusters().tolist() == [0, 0, 0, 1, 1, 1]  # type: ignore[union-attr]
    assert drawn.gallery_labels is None
    assert desk.draw(queries="queries.csv", label="{kind}").gallery_labels is not None


def test_without_labels_items_look_for_themselves(desk: Desk) -> None:
    desk.shelf = Shelf({**shelf({"a": 8}), "x": {"path": None}})
    drawn = desk.draw(sample=4, segment="{shop}")
    assert drawn.kind == "instance"
    assert drawn.relevant == [{int(path.removesuffix(".png")): 1.0} for path in drawn.paths]
    assert drawn.own == [None] * 4
    assert drawn.labels is None
    assert drawn.gallery_labels is None
    assert drawn.segments is not None
    assert set(drawn.segments) <= {"shop 0", "shop 1"}
    assert "near-copies" in drawn.evidence
    assert drawn.counts["items_without_path"] == 1


# -- several classes ------------------------------------------------------------------------------------------------


def tagged_shelf() -> Shelf:
    tags: list[Any] = [
        ["red", "shoes"], ["red", "shoes"], ["blue", "shoes"], ["blue", "hats"], ["hats"], ["only here"], [], None,
        "hats",
    ]  # fmt: skip
    return Shelf({row: {"path": f"{row}.png", "tags": value, "shop": ["x"]} for row, value in enumerate(tags)})


def test_lists_of_classes_are_relevant_by_what_they_share(desk: Desk) -> None:
    desk.shelf = tagged_shelf()
    drawn = desk.draw(label="{tags}")
    assert drawn.kind == "labels"
    assert drawn.gallery_labels is None
    assert drawn.gallery_tags is not None
    assert drawn.gallery_tags[0] == ["red", "shoes"]
    assert drawn.own == [0, 1, 2, 3, 4, 8], "that whose tag nobody shares is counted, and those without any"
    assert drawn.counts["queries_without_relevant_items"] == 1
    assert drawn.counts["classes_without_relevant_items"] == 1
    assert drawn.counts["items_without_label"] == 2
    assert drawn.labels == ["red", "red", "blue", "blue", "hats", "hats"], "each by its rarest"
    judged = whole(drawn).judge(np.array([[1, 2, 3, 4, 5, 6]] * 6, np.int32))
    rows = [[bool({*drawn.gallery_tags[own]} & {*drawn.gallery_tags[row]}) and row != own for row in (1, 2, 3, 4, 5, 6)]
            for own in (0, 1, 2, 3, 4, 8)]  # fmt: skip
    assert judged.hits.tolist() == rows
    assert judged.total.tolist() == [2, 2, 3, 3, 2, 2]
    assert whole(drawn).clusters().tolist() == [2, 2, 0, 0, 1, 1]  # type: ignore[union-attr]


def test_a_tag_that_all_items_have_does_not_count(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.shelf = Shelf(
        {row: {"path": f"{row}.png", "tags": ["all", "ab"[row % 2], "c"][: 2 + row // 5]} for row in range(6)}
    )
    drawn = desk.draw(label="{tags}")
    assert drawn.gallery_tags == [["a"], ["b"], ["a"], ["b"], ["a"], ["b", "c"]]
    assert whole(drawn).judge(np.arange(6, dtype=np.int32)[None].repeat(6, 0)).total.tolist() == [2] * 6
    assert "every one of the 6 items drawn has the tag all: it does not count" in caplog.text


def test_rare_tags_are_drawn_as_often_as_common_ones(desk: Desk) -> None:
    tags = [["common", "rare"]] * 4 + [["common"]] * 56 + [["other"]] * 10
    desk.shelf = Shelf({row: {"path": f"{row}.png", "tags": some} for row, some in enumerate(tags)})
    drawn = desk.draw(label="{tags}", sample=12)
    assert Counter(drawn.labels) == {"common": 4, "rare": 4, "other": 4}


def test_frozen_tags_come_back_and_other_sets_keep_their_hash(desk: Desk) -> None:
    desk.shelf = tagged_shelf()
    first = desk.freeze(label="{tags}")
    assert read_pinned(desk.project(), desk.migration) == first
    assert replace(first, gallery_tags=[[]] * len(first.gallery)).sha256 != first.sha256
    desk.shelf = Shelf(shelf({"a": 3, "b": 3}))
    body = to_body(desk.draw(label="{kind}"))
    assert not {"tags", "gallery_tags"} & body.keys()


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_file_with_lists_of_classes(desk: Desk, form: str) -> None:
    desk.shelf = tagged_shelf()
    rows = [("q1.png", ["red", "hats"]), ("./q2.png", ["blue"]), ("q3.png", ["nobody's"])]
    if form == "csv":
        file = desk.csv([("path", "label"), *((path, json.dumps(tags)) for path, tags in rows)])
    else:
        file = "queries.parquet"
        pq.write_table(pa.table({"path": [r[0] for r in rows], "label": [r[1] for r in rows]}), desk.folder / file)
    drawn = desk.draw(queries=file, label="{tags}")
    assert drawn.paths == ["q1.png", "q2.png"]
    assert drawn.tags == [["red", "hats"], ["blue"]]
    assert whole(drawn).judge(np.array([[0, 4, 5], [0, 2, 3]], np.int32)).total.tolist() == [5, 2]


def test_plain_labels_of_a_file_meet_lists_of_the_items(desk: Desk) -> None:
    desk.shelf = tagged_shelf()
    drawn = desk.draw(queries=desk.csv([("path", "label"), ("q.png", "red"), ("r.png", "hats")]), label="{tags}")
    assert drawn.tags == [["red"], ["hats"]]
    assert whole(drawn).judge(np.array([[0], [0]], np.int32)).hits.tolist() == [[True], [False]]


def test_labels_that_are_the_same_value_are_the_same_label(desk: Desk) -> None:
    desk.shelf = Shelf({row: {"path": f"{row}.png", "kind": value} for row, value in enumerate((3, 3.0, 4, 4.0))})
    pq.write_table(pa.table({"path": ["a.png", "b.png"], "label": [3.0, 4.0]}), desk.folder / "queries.parquet")
    drawn = desk.draw(queries="queries.parquet", label="{kind}")
    assert drawn.labels == ["3", "4"]
    assert drawn.gallery_labels == ["3", "3", "4", "4"]
    desk.csv([("path", "label"), ("a.png", "3"), ("b.png", "4")])
    assert desk.draw(queries="queries.csv", label="{kind}").labels == ["3", "4"]


def test_classes_that_can_be_none(desk: Desk) -> None:
    image = {"bytes": None, "path": "x.png"}
    desk.shelf = Shelf({row: {"path": f"{row}.png", "image": image, "tags": ["all", str(row % 2)]} for row in range(4)})
    message = refusal(lambda: desk.draw(label="{image}"), ConfigError)
    assert "verify.label: item 0: field 'image' is a structure with the fields bytes, path: name one of them" in message
    assert "{image.bytes}" in message
    message = refusal(lambda: desk.draw(label="{image.path}", segment="{tags}"), ConfigError)
    assert "verify.segment: item 0: field 'tags' is a list of several values; a query belongs to one segment" in message
    message = refusal(lambda: desk.draw(label="{tagz}"), ConfigError)
    assert 'payloads have image.bytes, image.path, path, tags; did you mean "{tags}"?' in message


def test_segments_of_nested_columns(desk: Desk) -> None:
    meta = [{"shop": "x"}, {"shop": None}, {"shop": "y"}]
    table = pa.table({"path": ["q.png", "r.png", "s.png"], "label": ["a", "b", "a"], "meta": meta})
    pq.write_table(table, desk.folder / "queries.parquet")
    drawn = desk.draw(queries="queries.parquet", label="{kind}", segment="{meta.shop}")
    assert drawn.segments == ["x", "", "y"]
    file = desk.csv([("path", "label", "meta.shop"), ("q.png", "a", " z "), ("r.png", "b", "")])
    assert desk.draw(queries=file, label="{kind}", segment="{meta.shop}").segments == ["z", ""]


def test_one_image_has_one_path(desk: Desk) -> None:
    root = desk.folder / "images"
    file = desk.csv([("path", "label"), (f"{root}/3.png", "a"), (f"file://{root}/1.png", "b"), ("x//y.png", "c")])
    drawn = desk.draw(queries=file, label="{kind}")
    assert drawn.paths == ["3.png", "1.png", "x/y.png"]
    assert drawn.own == [3, 1, None]
    same = desk.csv([("path", "label"), ("./x.png", "a"), ("x.png", "b")])
    assert "line 3 gives 'x.png' another label than line 2 does" in refusal(
        lambda: desk.draw(queries=same, label="{kind}"), ConfigError
    )


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no column path (it has: none)"),
        ("\n\n", "no column path"),
        ("path,label\n", "lists no queries: add rows"),
        ("name,label\na.png,a\n", "no column path (it has: name, label)"),
        ("path,class\na.png,a\n", "no column label and no column relevant (it has: path, class)"),
        ("path,path,label\na,b,c\n", "two columns path (it has: path, path, label): keep one"),
        ("path,label,grades\na.png,a,[1]\n", "a column grades and no column relevant"),
        ("path,label\na.png,a\n,b\n", "path missing in 1 of 2 rows (first: line 3)"),
        ("path,label\na.png,a\nb.png\nc.png, \n", "label missing in 2 of 3 rows (first: line 3)"),
        (
            "path,label\n../a.png,a\nb.png,b\n",
            "line 2: image path '../a.png' leads out of images.root: correct or remove it",
        ),
        ("path,label\n/etc/passwd,a\nb.png,b\n", "line 2: image path '/etc/passwd' is not below images.root"),
        ('path,label\nb.png,b\n"a\nb.png",a\n', "line 3: image path 'a\\nb.png' holds control characters"),
        ("path,label\nx.png,a\ny.png,b\nx.png,b\n", "line 4 gives 'x.png' another label than line 2 does: keep one"),
        (
            "path,label\nx.png,a\ny.png,a\n",
            "every query has the class a, and with one class alone nothing can be irrelevant",
        ),
        ("path,label\nx.png,A\ny.png,B\n", "queries have A, B, items a, b, c"),
        ("path,label\n" + "a" * 200_000 + ",a\n", "line 2: image path 'aaa"),
        ("path,label\n" + "a" * ((1 << 24) + 1) + ",a\n", "line 2 cannot be read: field larger than field limit"),
        ('path,label\ny.png,b\n\n"x.png,a\n', "begins on line 4 cannot be read: unexpected end of data"),
        (b"path,label\n\xff.png,a\n", "line 2 is not UTF-8 text: save it as UTF-8"),
        ("path,relevant\nx.png,[1, 2]\n", "line 2 has 3 cells, the first line names 2: put text with commas in quotes"),
        ("path,relevant\nx.png,\n", "line 2: relevant is no JSON list such as [17, \"a-9\"]: ''"),
        ("path,relevant\nx.png,17\n", "line 2: relevant is no JSON list such as [17, \"a-9\"]: '17'"),
        ('path,relevant\nx.png,"{""a"": 1}"\n', "line 2: relevant is no JSON list"),
        ("path,relevant\nx.png," + "[" * 5000 + "\n", "line 2: relevant is no JSON list"),
        ("path,relevant\nx.png,[1.0]\n", "line 2: 1.0 in relevant is no item id: ids are whole numbers or text"),
        ("path,relevant\nx.png,[true]\n", "True in relevant is no item id"),
        ("path,relevant\nx.png,[[1]]\n", "[1] in relevant is no item id"),
        ("path,relevant\nx.png,[100000000000000000000]\n", "100000000000000000000 in relevant is no item id"),
        ("path,relevant\nx.png,[" + "1" * 5000 + "]\n", "line 2: relevant is no JSON list"),
        ('path,relevant\nx.png,"[1, ""1"", 1]"\n', "line 2: relevant lists 1 twice: keep one"),
        ('path,relevant,grades\nx.png,"[1, 2]",[1]\n', "line 2: 1 grades for 2 relevant items: give one for each"),
        ("path,relevant,grades\nx.png,[1],[0]\n", "line 2: 0 is no grade: give numbers above 0"),
        ("path,relevant,grades\nx.png,[1],[-1]\n", "line 2: -1 is no grade"),
        ("path,relevant,grades\nx.png,[1],[NaN]\n", "line 2: nan is no grade"),
        ("path,relevant,grades\nx.png,[1],[Infinity]\n", "line 2: inf is no grade"),
        ("path,relevant,grades\nx.png,[1],[true]\n", "line 2: True is no grade"),
        ('path,relevant,grades\nx.png,[1],"[""3""]"\n', "line 2: '3' is no grade"),
        ("path,relevant,grades\nx.png,[1],\n", "line 2: grades is no JSON list such as [3, 1]: ''"),
        ("path,relevant\nx.png,[1]\nx.png,[2]\n", "line 3 gives 'x.png' another relevant than line 2 does"),
        ("path,relevant\nx.png,[]\n", "no query lists a relevant item other than itself"),
        ("path,relevant\n3.png,[3]\n", "no query lists a relevant item other than itself"),
        (
            'path,relevant\nx.png,[1]\ny.png,"[2, ""2"", ""gone""]"\nz.png,"[99, ""2""]"\n',
            "line 3 lists '2' as relevant, and shelf has no such item (3 unknown ids in 2 of 3 rows drawn)",
        ),
    ],
)
def test_a_file_that_cannot_be_used(desk: Desk, content: str | bytes, words: str) -> None:
    message = refusal(lambda: desk.draw(queries=desk.text(content), label="{kind}"), ConfigError)
    assert words in message
    assert str(desk.folder / "queries.csv") in message


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"path": [b"\xff.png"], "label": ["a"]}, "row 1: path is 5 bytes that are not text"),
        ({"path": [["x.png"]], "label": ["a"]}, "row 1: path is a list of several values: write one value"),
        (
            {"path": [{"bytes": b"", "path": "x.png"}], "label": ["a"]},
            "row 1: path is a structure with the fields bytes, path: write one value",
        ),
        ({"path": ["x.png"], "label": [{"name": "a"}]}, "row 1: label is a structure with the fields name"),
        ({"path": ["x.png"], "label": [[["a"]]]}, "row 1: field 'label' is a list of several values: write text, or"),
        ({"path": ["x.png"], "label": [None]}, "label missing in 1 of 1 rows"),
        ({"path": ["x.png", "y.png"], "label": [1.5, float("nan")]}, "label missing in 1 of 2 rows (first: row 2)"),
        ({"path": ["x.png"], "relevant": [[1.0]]}, "1.0 in relevant is no item id"),
        ({"path": ["x.png"], "relevant": [{"a": 1}]}, "relevant is no JSON list such as [17, \"a-9\"]: {'a': 1}"),
        ({"path": ["x.png"], "relevant": [None]}, 'relevant is no JSON list such as [17, "a-9"]: None'),
        ({"path": ["x.png"], "relevant": [[1]], "grades": [[1, 2]]}, "2 grades for 1 relevant items"),
        ({"path": [], "label": []}, "lists no queries"),
        ({"x\ny": ["x.png"]}, "no column path (it has: 'x\\ny')"),
    ],
)
def test_a_parquet_file_that_cannot_be_used(desk: Desk, columns: dict[str, Any], words: str) -> None:
    pq.write_table(pa.table(columns), desk.folder / "queries.parquet")
    assert words in refusal(lambda: desk.draw(queries="queries.parquet", label="{kind}"), ConfigError)


def test_files_that_are_none(desk: Desk) -> None:
    def message(name: str) -> str:
        return refusal(lambda: desk.draw(queries=name, label="{kind}"), ConfigError)

    assert "no such file: set verify.queries to a .csv or .parquet file that lists queries" in message("queries.csv")
    assert "from a .csv or .parquet file: rename or convert it" in message("queries.xlsx")
    assert "is not a readable Parquet file" in message(desk.text("PAR1 or not", "queries.parquet"))
    (desk.folder / "folder.csv").mkdir()
    assert "is a folder: set verify.queries" in message("folder.csv")


def test_segments_that_are_not_there(desk: Desk) -> None:
    file = desk.csv([("path", "label", "shop"), ("x.png", "a", ""), ("y.png", "b", "")])
    draw = lambda segment, **more: refusal(lambda: desk.draw(label="{kind}", segment=segment, **more), ConfigError)  # noqa: E731
    assert "no column size (it has: path, label, shop): verify.segment names it" in draw("{size}", queries=file)
    assert "the columns that verify.segment names (shop) are empty" in draw("{shop}", queries=file)
    assert (
        "verify.segment: '{size}' names a payload field that the items do not have: payloads have kind, path"
        in draw("{size}")
    )


def test_a_file_of_labels_needs_those_of_the_items(desk: Desk) -> None:
    file = desk.csv([("path", "label"), ("x.png", "a"), ("y.png", "b")])
    message = refusal(lambda: desk.draw(queries=file), ConfigError)
    assert "migrations.toys.verify.label is not set" in message
    assert "or give the file a column relevant" in message
    message = refusal(lambda: desk.draw(queries=file, label="{category}"), ConfigError)
    assert "'{category}' names a payload field that the items do not have: payloads have kind, path, shop" in message


def test_collections_that_give_nothing_to_ask(desk: Desk) -> None:
    def message(items: Items, kind: type[MigratorError], **verify: Any) -> str:
        desk.shelf = Shelf(items)
        return refusal(lambda: desk.draw(**verify), kind)

    assert "holds no items" in message({}, PreconditionFailed)
    assert "payloads have no fields" in message({1: {}}, ConfigError, label="{kind}")
    assert "every query has the class a" in message(shelf({"a": 5, "b": 1}), ConfigError, label="{kind}")
    assert "no two items of one" in message(shelf({"a": 1, "b": 1}), PreconditionFailed, label="{kind}")
    nowhere: Items = {item: {"path": "", "kind": "a"} for item in range(3)}
    assert "none of 3 items of shelf has a usable image path: correct images.uri" in message(
        nowhere, PreconditionFailed
    )
    assert "usable image path and a class" in message(nowhere, PreconditionFailed, label="{kind}")


def test_stored_vectors_would_find_themselves(desk: Desk) -> None:
    desk.old = "stored"
    for call in (desk.draw, desk.freeze):
        assert "old_encoder is stored: an item's own vector would find itself" in refusal(call, ConfigError)
    assert desk.draw(label="{kind}").kind == "labels"


# -- frozen -------------------------------------------------------------------------------------------------------


def test_frozen_questions_stay_while_the_collection_changes(desk: Desk) -> None:
    assert read_pinned(desk.project(), desk.migration) is None
    first = desk.freeze(label="{kind}", sample=6)
    desk.shelf = Shelf(shelf({"x": 9, "y": 9}))
    assert desk.freeze(label="{kind}", sample=6) == first
    assert read_pinned(desk.project(), desk.migration) == first
    assert json.loads(desk.frozen.read_text())["format"] == 1
    assert [file.name for file in desk.frozen.parent.iterdir()] == ["query_set.json"], "nothing is left beside it"
    anew = desk.freeze(label="{kind}", sample=6, resample=True)
    assert set(anew.labels or ()) == {"x", "y"}
    assert anew.sha256 != first.sha256
    assert read_pinned(desk.project(), desk.migration) == anew
    other = Migration(id=4, created_at=desk.migration.created_at)
    assert read_pinned(desk.project(), other) is None


def test_the_hash_is_of_what_is_asked(desk: Desk) -> None:
    first = desk.draw(label="{kind}")
    value: Any
    for name, value in (("drawn_at", "2001-01-01T00:00:00+00:00"), ("made_from", {}), ("counts", {})):
        assert replace(first, **{name: value}).sha256 == first.sha256
    for name, value in (
        ("kind", "relevant"),
        ("paths", first.paths[::-1]),
        ("labels", None),
        ("segments", [""] * len(first.paths)),
        ("own", [None] * len(first.own)),
        ("relevant", [{7: 1.0}]),
        ("gallery", [*first.gallery[:-1], str(first.gallery[-1])]),
        ("gallery_labels", None),
        ("gallery_paths", [None] * len(first.gallery)),
    ):
        assert replace(first, **{name: value}).sha256 != first.sha256, name
    seven, text = (replace(first, relevant=[{item: 1.0}]) for item in (7, "7"))
    assert seven.sha256 != text.sha256


def test_another_file_of_queries_is_refused_until_questions_are_drawn_anew(desk: Desk) -> None:
    file = desk.csv([("path", "label"), ("x.png", "a"), ("y.png", "b")])
    first = desk.freeze(queries=file, label="{kind}")
    (desk.folder / file).rename(desk.folder / "moved.csv")
    assert desk.freeze(queries="moved.csv", label="{kind}") == first, "its content counts, not its name"
    message = refusal(lambda: desk.freeze(queries=file, label="{kind}"), PreconditionFailed)
    assert f"the file that the query set of {first.drawn_at[:10]} was drawn from, cannot be read" in message
    desk.csv([("path", "label"), ("x.png", "a"), ("z.png", "b")])
    message = refusal(lambda: desk.freeze(queries=file, label="{kind}"), PreconditionFailed)
    assert "queries.csv is no longer the file that the query set of" in message
    assert f"(sha256 {first.made_from['queries']['sha256'][:8]}... -> " in message
    assert message.endswith(
        "put it back, or draw a new query set with `migrator verify toys --resample-queries`, which counts as a "
        "further interim analysis"
    )
    message = refusal(lambda: desk.freeze(label="{kind}"), PreconditionFailed)
    assert "verify.queries is not set, and was queries.csv when" in message
    anew = desk.freeze(queries=file, label="{kind}", resample=True)
    assert anew.paths == ["x.png", "z.png"]
    assert desk.freeze(queries=file, label="{kind}") == anew


def test_other_settings_are_refused_and_all_of_them_named(desk: Desk) -> None:
    first = desk.freeze(label="{kind}", sample=6)
    message = refusal(
        lambda: desk.freeze(label="{shop}", sample=7, gallery=9, seed=1, segment="{kind}"), PreconditionFailed
    )
    day = first.drawn_at[:10]
    assert f"verify.sample is 7, and was 6 when the query set of {day} was drawn" in message
    for key in ("label is '{shop}', and was '{kind}'", "segment is '{kind}', and was not set", "seed is 1, and was 0"):
        assert f"verify.{key}" in message
    assert "verify.gallery is 9, and was 10000" in message
    desk.images = ImageSource(str(desk.folder / "images"), "{shop}/{path}")
    assert "images.uri is '{shop}/{path}', and was '{path}'" in refusal(
        lambda: desk.freeze(label="{kind}", sample=6), PreconditionFailed
    )
    assert read_pinned(desk.project(), desk.migration) == first, "asked later as they were drawn"


def test_a_change_that_is_none_is_not_refused(desk: Desk) -> None:
    first = desk.freeze(label="{kind}")
    assert desk.freeze(label="{kind}", gate={"min_gain": -0.5}, max_age="1d", sample=500, seed=0) == first


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: b"",
        lambda text: b"[]",
        lambda text: b"null",
        lambda text: b"[" * 5000,
        lambda text: b"\xff\xfe" + text,
        lambda text: text.replace(b'"1.png"', b'"2.png"', 1),
        lambda text: text.replace(b'"sample": 500', b'"sample": 501', 1),
        lambda text: json.dumps(json.loads(text) | {"query_set": {}}).encode(),
        lambda text: json.dumps(json.loads(text) | {"query_set": {}, "checksum": digest({})}).encode(),
        lambda text: json.dumps({"format": 1}).encode(),
    ],
)
def test_a_damaged_file_is_told(desk: Desk, damage: Callable[[bytes], bytes]) -> None:
    first = desk.freeze(label="{kind}")
    whole = desk.frozen.read_bytes()
    desk.frozen.write_bytes(damage(whole))
    assert desk.frozen.read_bytes() != whole
    for call in (lambda: read_pinned(desk.project(), desk.migration), lambda: desk.freeze(label="{kind}")):
        message = refusal(call, PreconditionFailed)
        assert f"{desk.frozen}: the query set is damaged: put it back from a backup, or draw a new" in message
        assert "`migrator verify toys --resample-queries`" in message
    assert desk.freeze(label="{kind}", resample=True).sha256 == first.sha256


def test_a_file_of_a_later_version_is_told(desk: Desk) -> None:
    desk.freeze(label="{kind}")
    document = json.loads(desk.frozen.read_text())
    desk.frozen.write_text(json.dumps(document | {"format": 2}))
    assert "is of format 2, not 1" in refusal(lambda: read_pinned(desk.project(), desk.migration), PreconditionFailed)


ids = st.one_of(st.integers(-(2**63), 2**64 - 1), st.text(max_size=4))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_questions_come_back_as_they_were(data: st.DataObject) -> None:
    text = st.text(st.characters(), max_size=6)  # lone surrogates among them
    of_query: dict[str, Any] = {"min_size": 3, "max_size": 3}
    drawn = QuerySet(
        kind=data.draw(st.sampled_from(["labels", "relevant", "instance"])),
        paths=data.draw(st.lists(text, **of_query)),
        labels=data.draw(st.none() | st.lists(text, **of_query)),
        segments=data.draw(st.none() | st.lists(text, **of_query)),
        own=data.draw(st.lists(st.none() | ids, **of_query)),
        relevant=data.draw(st.none() | st.lists(st.dictionaries(ids, st.floats(1e-6, 1e9)), **of_query)),
        gallery=data.draw(st.lists(ids, max_size=4)),
        gallery_labels=data.draw(st.none() | st.lists(text, max_size=4)),
        gallery_paths=data.draw(st.lists(st.none() | text, max_size=4)),
        made_from={"label": data.draw(text)},
        counts=dict.fromkeys(COUNTS, 1),
        drawn_at="2026-11-25T12:00:00+00:00",
    )
    back = from_body(json.loads(json.dumps(to_body(drawn)).encode()))
    assert repr(back) == repr(drawn), "7 is not '7'"
    assert back.sha256 == drawn.sha256


@pytest.mark.parametrize(
    ("labels", "codes"),
    [(None, None), (["a", "a"], [0, 0]), (["a", "b", "c"], None), (["b", "a", "b"], [1, 0, 1]), (["a"], None)],
)
def test_clusters_are_classes_that_queries_share(desk: Desk, labels: list[str] | None, codes: list[int] | None) -> None:
    query_set = replace(desk.draw(label="{kind}"), labels=labels)
    rows = np.arange(len(labels or ()))
    found = JudgedQueries(query_set, rows, np.arange(0), rows, None, None, None).clusters()
    assert (None if found is None else found.tolist()) == codes


# -- as arrays ----------------------------------------------------------------------------------------------------


def plain_rows(query_set: QuerySet, present: set[ItemId]) -> tuple[list[ItemId], list[set[ItemId]]]:
    """The gallery that is left, and the right answers of each query, by a plain loop."""
    gallery = [item for item in query_set.gallery if item in present]
    if query_set.relevant is not None:
        return gallery, [{item for item in right if item in present} for right in query_set.relevant]
    label = dict(zip(query_set.gallery, query_set.gallery_labels or (), strict=True))
    return gallery, [
        {item for item in gallery if label[item] == mine and item != own}
        for mine, own in zip(query_set.labels or (), query_set.own, strict=True)
    ]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rows_of_those_items_that_are_still_there(data: st.DataObject) -> None:
    gallery: list[ItemId] = [0, 1, 2, 3, "0", "1", "2"]
    present = data.draw(st.sets(st.sampled_from([*gallery, 9, "elsewhere"])))
    item = st.sampled_from(gallery)
    label = st.sampled_from(["a", "b", "c"])
    n = data.draw(st.integers(1, 4))
    of_query: dict[str, Any] = {"min_size": n, "max_size": n}
    by_label = data.draw(st.booleans())
    query_set = QuerySet(
        kind="labels" if by_label else "relevant",
        paths=["x"] * n,
        labels=data.draw(st.lists(label, **of_query)),
        segments=None,
        own=data.draw(st.lists(st.none() | item, **of_query)) if by_label else [None] * n,
        relevant=None if by_label else data.draw(st.lists(st.dictionaries(item, st.floats(1, 3)), **of_query)),
        gallery=gallery,
        gallery_labels=data.draw(st.lists(label | st.just(""), min_size=7, max_size=7)) if by_label else None,
        gallery_paths=[None] * 7,
        made_from={},
        counts={},
        drawn_at="",
    )
    asked = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))))
    kept = np.array([row for row, item in enumerate(gallery) if item in present], np.int64)
    rows = JudgedQueries.of(query_set, asked, kept)
    left, right = plain_rows(query_set, present)
    right = [right[row] for row in asked]
    assert [gallery[row] for row in rows.gallery] == left
    everything = (
        np.tile(np.arange(max(1, len(left)), dtype=np.int32), (len(asked), 1)) if left else np.full((len(asked), 1), -1)
    )
    judged = rows.judge(everything)
    assert judged.total.tolist() == [len(answers) for answers in right]
    assert [None if row < 0 else left[row] for row in rows.own] == [
        query_set.own[row] if query_set.own[row] in present else None for row in asked
    ]
    if query_set.relevant is not None:
        assert rows.relevant is not None
        assert rows.query_codes is None
        assert rows.gallery_codes is None
        found = [{left[row]: grade for row, grade in one.items()} for one in rows.relevant]
        listed = [query_set.relevant[row] for row in asked]
        assert found == [{item: grade for item, grade in one.items() if item in present} for one in listed]
    else:
        assert rows.relevant is None
        assert rows.query_codes is not None
        assert rows.gallery_codes is not None
        assert (rows.query_codes >= 0).all()
        names = dict(zip(query_set.gallery, query_set.gallery_labels or (), strict=True))
        assert [code < 0 for code in rows.gallery_codes] == [names[item] == "" for item in left]
        codes = [
            {left[at] for at in np.flatnonzero(rows.gallery_codes == code) if at != own}
            for code, own in zip(rows.query_codes, rows.own, strict=True)
        ]
        assert codes == right


def test_a_query_that_is_alone_in_its_class_has_no_answer(desk: Desk) -> None:
    desk.shelf = Shelf(shelf({"a": 2, "b": 3}))
    drawn = desk.draw(label="{kind}")

    def answers(*gallery: int) -> list[int]:
        none = np.full((5, 1), -1)
        return JudgedQueries.of(drawn, np.arange(5), np.array(gallery, np.int64)).judge(none).total.tolist()

    assert min(answers(0, 1, 2, 3, 4)) > 0
    assert answers(1, 2, 3, 4).count(0) == 1, "item 2; but item 0, which is gone, finds item 2"
    assert answers() == [0] * 5
