"""Training items, the labels from folders, held-out split, the order of an epoch and its batches."""

import csv
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from migrator.trainer.data.batches import batches_ahead, epoch_rows, held_out_split
from migrator.trainer.data.folders import folder_items
from migrator.trainer.data.items import read_items, training_items
from migrator.trainer.errors import TrainingProblem
from migrator.trainer.images.source import ImageSource


def write_csv(file: Path, text: str, encoding: str = "utf-8") -> Path:
    file.write_bytes(text.encode(encoding))
    return file


def test_csv_and_parquet_give_the_same_items(tmp_path: Path) -> None:
    rows = [("a.png", "7"), ("b, c.png", "3"), ("ü.png", "7")]
    with (tmp_path / "items.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([("label", "note", "path"), *((label, "x", path) for path, label in rows)])
    table = pa.table({"path": [path for path, _ in rows], "label": pa.array([int(label) for _, label in rows])})
    pq.write_table(table, tmp_path / "items.parquet")
    items = read_items(tmp_path / "items.csv")
    assert items == read_items(tmp_path / "items.parquet")
    assert items.labels is not None
    assert list(zip(items.paths, items.labels, strict=True)) == rows
    assert items.classes == ["3", "7"]
    assert len(items) == 3


def test_csv_with_byte_order_mark_and_spaces(tmp_path: Path) -> None:
    items = read_items(write_csv(tmp_path / "a.CSV", "path,label\r\na.png , x\r\nb.png,y\r\n", "utf-8-sig"))
    assert items.paths == ("a.png", "b.png")
    assert items.labels == ("x", "y")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column path and no column label"),
        ("path,class\na,1\n", "no column label .*it has: path, class"),
        ("path,label\n", "lists no images: add rows with a path and a label"),
        ("path,label\na,1\nb,\nc\n", "label missing in 2 of 3 rows .*first: line 3"),
        ("path,label\n,1\nb,2\n", "path missing in 1 of 2 rows"),
        ("path,label\na,1\nb,1\n", "every image has the label '1'"),
        ("path,label\na,1\n\nb,2\na,2\n", "line 5 labels 'a' as '2', line 2 as '1': keep one"),
        ('path,label\n"a,1\nb,2\n', "cannot be read"),
    ],
)
def test_bad_csv_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(TrainingProblem, match=words) as caught:
        read_items(write_csv(tmp_path / "items.csv", text))
    assert "\n" not in str(caught.value)
    assert "items.csv" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TrainingProblem, match="no such file"):
        read_items(tmp_path / "absent.csv")
    with pytest.raises(TrainingProblem, match=r"\.csv or \.parquet"):
        read_items(write_csv(tmp_path / "items.xlsx", ""))
    with pytest.raises(TrainingProblem, match="line 2 is not UTF-8 text: save it as UTF-8"):
        read_items(write_csv(tmp_path / "latin.csv", "path,label\nü,1\n", "latin-1"))
    with pytest.raises(TrainingProblem, match="not a readable Parquet"):
        read_items(write_csv(tmp_path / "items.parquet", "path,label\na,1\n"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(TrainingProblem, match=r"is a folder: set train\.items to"):
        read_items(tmp_path / "folder.csv")


@pytest.mark.parametrize("missing", [None, float("nan"), "", "  "])
def test_missing_labels_of_a_table(tmp_path: Path, missing: Any) -> None:
    column = pa.array(["1" if isinstance(missing, str) else 1, missing])
    pq.write_table(pa.table({"path": ["a", "b"], "label": column}), tmp_path / "items.parquet")
    with pytest.raises(TrainingProblem, match=r"label missing in 1 of 2 rows \(first: row 2\)"):
        read_items(tmp_path / "items.parquet")


def test_an_item_listed_twice_counts_once_and_the_digest_tells_lists_apart() -> None:
    items = training_items(["a", "b", "a"], ["1", "2", "1"], source="list")
    assert items.paths == ("a", "b")
    assert items.digest == training_items(["a", "b"], ["1", "2"], source="other").digest
    assert items.digest != training_items(["a", "b"], ["1", "3"], source="list").digest


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    share=st.floats(0.01, 0.9),
    seed=st.integers(0, 99),
)
def test_split_is_stratified_and_keeps_rare_classes_in_training(sizes: list[int], share: float, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    try:
        train, held_out = held_out_split(labels, share, seed=seed)
    except TrainingProblem:
        assert max(sizes) * share < 1 or max(sizes) < 3
        return
    assert sorted([*train, *held_out]) == list(range(len(labels)))
    for label, size in enumerate(sizes):
        held = int((labels[held_out] == label).sum())
        assert size - held >= min(size, 2)
        assert abs(held - min(size * share, max(size - 2, 0))) <= 1
        if size < 3:
            assert held == 0
    again = held_out_split(labels, share, seed=seed)
    np.testing.assert_array_equal(again[1], held_out)


def test_split_differs_between_seeds_and_can_be_switched_off() -> None:
    labels = np.repeat(np.arange(4), 50)
    first, second = (set(held_out_split(labels, 0.2, seed=seed)[1]) for seed in (0, 1))
    assert first != second
    train, held_out = held_out_split(labels, 0, seed=0)
    assert (len(train), len(held_out)) == (200, 0)


# --- items without labels, and labels from folders


def test_a_label_column_may_be_missing_where_no_labels_are_needed(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "items.csv", "path,note\na,1\nb,2\na,3\n")
    pq.write_table(pa.table({"path": ["a", "b"]}), tmp_path / "items.parquet")
    items = read_items(file, need_labels=False)
    assert items == read_items(tmp_path / "items.parquet", need_labels=False)
    assert (items.paths, items.labels, items.classes) == (("a", "b"), None, [])
    assert items.digest != training_items(["a", "b"], ["1", "2"], source="x").digest
    with pytest.raises(TrainingProblem, match="has no column label"):
        read_items(file)


def test_a_label_column_that_is_there_is_read(tmp_path: Path) -> None:
    items = read_items(write_csv(tmp_path / "items.csv", "path,label\na,1\nb,2\n"), need_labels=False)
    assert items.labels == ("1", "2")
    with pytest.raises(TrainingProblem, match="label missing in 1 of 2 rows"):
        read_items(write_csv(tmp_path / "items.csv", "path,label\na,1\nb,\n"), need_labels=False)
    with pytest.raises(TrainingProblem, match="no column path"):
        read_items(write_csv(tmp_path / "items.csv", "label\n1\n"), need_labels=False)


def test_items_without_labels_need_paths() -> None:
    with pytest.raises(TrainingProblem, match=r"lists no images: add rows with a path$"):
        training_items([], None, source="list")


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def test_folders_give_labels(tmp_path: Path) -> None:
    touch(tmp_path, "shoes/b.jpg", "shoes/2019/a.PNG", "hats/z.webp", "hats/notes.txt", "hats/.hidden.png", "top.jpg")
    touch(tmp_path, ".cache/a.png", "hats/.thumbs/z.png", "empty/readme")
    (tmp_path / "linked").symlink_to(tmp_path / "hats")
    items = folder_items(tmp_path)
    assert items.paths == ("hats/z.webp", "shoes/2019/a.PNG", "shoes/b.jpg")
    assert items.labels == ("hats", "shoes", "shoes")
    assert [str(one) for one in items.skipped] == [
        "2 files without the suffix of an image (such as 'empty/readme')",
        "3 hidden files and folders (such as '.cache')",
        "1 images beside the folders, which have no class (such as 'top.jpg')",
        "1 links to folders that are read already (such as 'linked')",
    ]


def test_every_suffix_that_pillow_writes_our_formats_with_is_an_image(tmp_path: Path) -> None:
    suffixes = [".jpg", ".jpeg", ".jpe", ".jfif", ".JIF", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif"]
    suffixes += [".tiff", ".pbm", ".pgm", ".ppm", ".pnm", ".avif"]
    for number, suffix in enumerate(suffixes):
        file = tmp_path / f"class {number % 2}" / f"{number}{suffix}"
        file.parent.mkdir(exist_ok=True)
        mode = "1" if suffix == ".pbm" else "L" if suffix == ".pgm" else "RGB"
        Image.new(mode, (8, 8)).save(file, "JPEG" if suffix == ".JIF" else None)
    items = folder_items(tmp_path)
    assert len(items) == len(suffixes)
    assert items.skipped == ()
    source = ImageSource(str(tmp_path))
    assert {source.load(path).size for path in items.paths} == {(8, 8)}


def test_linked_class_folders_are_read_once_and_only_inside_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(root, ".store/boots/1.jpg", ".store/boots/more/2.jpg", "hats/3.jpg", "hats/deep/4.jpg")
    touch(tmp_path, "outside/5.jpg", "outside/6.jpg")
    (root / "boots").symlink_to(".store/boots")
    (root / "boots again").symlink_to(root / ".store" / "boots")
    (root / "hats" / "loop").symlink_to("..")
    (root / "hats" / "self").symlink_to("self")
    (root / ".store" / "boots" / "back").symlink_to("../../hats")
    (root / "outside").symlink_to("../outside")
    (root / "hats" / "stray.jpg").symlink_to("../../outside/5.jpg")
    (root / "hats" / "broken.jpg").symlink_to("nowhere.jpg")
    (root / "hats" / "same.jpg").symlink_to("3.jpg")
    for spelled in (root, tmp_path / "link"):
        if spelled != root:
            spelled.symlink_to(root)
        items = folder_items(spelled)
        assert items.paths == ("boots/1.jpg", "boots/more/2.jpg", "hats/3.jpg", "hats/deep/4.jpg", "hats/same.jpg")
        assert {one.reason: one.count for one in items.skipped} == {
            "hidden files and folders": 1,
            "files without the suffix of an image": 1,
            "links to files that are not below the root": 2,
            "links to folders outside the root": 1,
            "links to folders that are read already": 3,
        }


def test_names_that_are_not_trusted_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg", "a/new\nline.jpg", "a/back\\slash.jpg", "a/x::y.jpg", " b/2.jpg", "c /3.jpg")
    (tmp_path / "a" / os.fsdecode(b"not utf-8 \xff.jpg")).touch()
    items = folder_items(tmp_path)
    assert items.paths == ("a/1.jpg", "b/1.jpg")
    assert [(one.count, one.reason) for one in items.skipped] == [(6, "names that are not trusted")]


def test_folders_that_give_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrainingProblem, match="lists no images"):
        folder_items(tmp_path)
    touch(tmp_path, "1.jpg", "2.jpg")
    with pytest.raises(TrainingProblem, match="no images in folders, only 2 images beside the folders, which have no"):
        folder_items(tmp_path)
    touch(tmp_path, "a/1.jpg", "a/2.jpg")
    with pytest.raises(TrainingProblem, match="every image has the label 'a'"):
        folder_items(tmp_path)
    with pytest.raises(TrainingProblem, match="cannot be walked: No such file") as caught:
        folder_items(tmp_path / "absent")
    assert "\n" not in str(caught.value)


# --- the order of an epoch


def epoch(labels: NDArray[np.int64], train: NDArray[np.int64], *, balanced: bool, seed: int) -> NDArray[np.int64]:
    return epoch_rows(train, labels, balanced=balanced, generator=torch.Generator().manual_seed(seed))


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), balanced=st.booleans(), seed=st.integers(0, 99))
def test_an_epoch_is_as_long_as_the_training_rows(sizes: list[int], balanced: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    train = np.sort(random.permutation(len(labels))[: random.integers(1, len(labels) + 1)])
    rows = epoch(labels, train, balanced=balanced, seed=seed)
    assert len(rows) == len(train)
    np.testing.assert_array_equal(rows, epoch(labels, train, balanced=balanced, seed=seed))
    if not balanced:
        assert sorted(rows) == train.tolist()
        return
    # Within each class: every image once before any comes again.
    for label in np.unique(labels[train]):
        images = set(train[labels[train] == label].tolist())
        drawn = rows[labels[rows] == label].tolist()
        for start in range(0, len(drawn), len(images)):
            part = drawn[start : start + len(images)]
            assert len(set(part)) == len(part)
            assert set(part) <= images


def test_a_balanced_epoch_draws_classes_alike_and_in_no_order() -> None:
    labels = np.repeat(np.arange(3), [3000, 900, 6])
    rows = epoch(labels, np.arange(len(labels)), balanced=True, seed=0)
    counts = np.bincount(labels[rows])
    assert abs(counts - len(labels) / 3).max() < 5 * np.sqrt(len(labels) * 2 / 9)  # five deviations of a binomial
    first, second = labels[rows][:1953], labels[rows][1953:]
    assert abs(np.bincount(first) - np.bincount(second)).max() < 200
    # The images of a class that is drawn more often than it has images come equally often.
    assert np.ptp(np.bincount(rows[labels[rows] == 2] - 3900)) <= 1
    assert (np.diff(rows[labels[rows] == 0]) > 0).mean() < 0.6  # shuffled


def test_epochs_differ_by_their_generators() -> None:
    labels = np.repeat(np.arange(3), 30)
    for balanced in (False, True):
        orders = [epoch(labels, np.arange(90), balanced=balanced, seed=seed).tolist() for seed in (0, 1)]
        assert orders[0] != orders[1]


# --- batches ahead


def batch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batch")]


def test_batches_come_in_order_and_one_is_made_ahead() -> None:
    made: list[int] = []
    next_is_made = [threading.Event() for _ in range(6)]

    def make(number: int) -> int:
        made.append(number)
        next_is_made[number].set()
        return number * number

    batches = batches_ahead(make, 5)
    for number, batch in enumerate(batches):
        assert batch == number * number
        if number < 4:
            assert next_is_made[number + 1].wait(30)  # while this one is in use
        assert made == list(range(min(number + 2, 5)))
    assert batch_threads() == []


def test_what_goes_wrong_in_a_batch_comes_out_in_its_place() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise TrainingProblem("the third")
        return number

    batches = batches_ahead(make, 5)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(TrainingProblem, match="the third"):
        next(batches)
    assert batch_threads() == []


def test_batches_left_early_leave_no_thread() -> None:
    batches = batches_ahead(lambda number: number, 1000)
    assert next(batches) == 0
    assert batch_threads() != []
    batches.close()
    assert batch_threads() == []
    assert list(batches_ahead(lambda number: number, 0)) == []
