"""Training items, the held-out split, prepared batches and augmentation."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import augment, held_out_split, prepared_batches, read_items, training_items
from trainer.encoder import Preprocessing
from trainer.errors import TrainingProblem
from trainer.images import ImageSource


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
        ("path,label\n", "lists no images"),
        ("path,label\na,1\nb,\nc\n", "label missing in 2 of 3 rows .*row 2"),
        ("path,label\n,1\nb,2\n", "path missing in 1 of 2 rows"),
        ("path,label\na,1\nb,1\n", "every image has the label '1'"),
        ("path,label\na,1\nb,2\na,2\n", "row 3 labels 'a' as '2'"),
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
    with pytest.raises(TrainingProblem, match="cannot be read"):
        read_items(write_csv(tmp_path / "latin.csv", "path,label\nü,1\n", "latin-1"))
    with pytest.raises(TrainingProblem, match="not a readable Parquet"):
        read_items(write_csv(tmp_path / "items.parquet", "path,label\na,1\n"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(TrainingProblem, match="cannot be read"):
        read_items(tmp_path / "folder.csv")


@pytest.mark.parametrize("missing", [None, float("nan"), "", "  "])
def test_missing_labels_of_a_table(missing: Any) -> None:
    with pytest.raises(TrainingProblem, match="label missing in 1 of 2 rows"):
        training_items(["a", "b"], [1, missing], source="the collection")


def test_an_item_listed_twice_counts_once_and_the_digest_tells_lists_apart() -> None:
    items = training_items(["a", "b", "a"], [1, 2, 1], source="list")
    assert items.paths == ("a", "b")
    assert items.digest == training_items(["a", "b"], ["1", "2"], source="other").digest
    assert items.digest != training_items(["a", "b"], [1, 3], source="list").digest


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files 0.png..599.png, 4 pixels a side, the red channel telling the number; 3.png and 300.png are broken."""
    for number in range(600):
        colour = (number % 256, number // 256, 77)
        PIL.Image.new("RGB", (4, 4), colour).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "300.png").write_bytes(b"not an image")
    return tmp_path


def test_every_image_is_prepared_once_in_order_and_broken_ones_are_listed(folder: Path) -> None:
    sizes = (Preprocessing(image_size=4).prepare, Preprocessing(image_size=2).prepare)
    paths = [f"{number}.png" for number in range(600)]
    batches = list(prepared_batches(paths, ImageSource(str(folder)), sizes, workers=4))
    rows = [row for batch in batches for row in batch.rows]
    assert rows == [number for number in range(600) if number not in (3, 300)]
    large, small = (np.concatenate([batch.arrays[i] for batch in batches]) for i in (0, 1))
    assert large.shape == (598, 3, 4, 4)
    assert small.shape == (598, 3, 2, 2)
    numbers = large[:, 0, 0, 0].astype(int) + 256 * large[:, 1, 0, 0].astype(int)
    assert numbers.tolist() == rows
    assert [entry.path for batch in batches for entry in batch.left_out] == ["3.png", "300.png"]
    assert all("3" in entry.reason for batch in batches for entry in batch.left_out)


def test_a_batch_without_a_usable_image(folder: Path) -> None:
    (batch,) = prepared_batches(["3.png", "absent.png"], ImageSource(str(folder)), [], workers=2)
    assert batch.rows == []
    assert len(batch.left_out) == 2


def augmented(image: torch.Tensor, *, count: int, flip: bool, seed: int = 0) -> torch.Tensor:
    return augment(image.expand(count, -1, -1, -1), flip=flip, generator=torch.Generator().manual_seed(seed))


def test_augmentation_only_shifts_and_reaches_every_shift() -> None:
    side, reach = 16, 2
    image = torch.arange(3 * side * side).reshape(1, 3, side, side)
    axis = torch.arange(side)
    found = set()
    for result in augmented(image, count=400, flip=False):
        inner = result[0, side // 2, side // 2].item()
        down, right = inner // side - side // 2, inner % side - side // 2
        rows, columns = (axis + down).clamp(0, side - 1), (axis + right).clamp(0, side - 1)
        torch.testing.assert_close(result, image[0][:, rows][:, :, columns])
        found.add((down, right))
    assert found == {(a, b) for a in range(-reach, reach + 1) for b in range(-reach, reach + 1)}


def test_flip_mirrors_about_half_and_only_on_request() -> None:
    image = torch.arange(7).repeat(3, 7, 1)[None].to(torch.uint8)  # 7 pixels: too small to shift
    plain = augmented(image, count=200, flip=False)
    assert (plain == image).all()
    mirrored = augmented(image, count=200, flip=True)
    flipped = (mirrored == image.flip(3)).all(dim=(1, 2, 3))
    assert (flipped | (mirrored == image).all(dim=(1, 2, 3))).all()
    assert 60 < flipped.sum() < 140


def test_augmentation_follows_its_generator() -> None:
    image = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(augmented(image, count=8, flip=True), augmented(image, count=8, flip=True))
    assert not torch.equal(augmented(image, count=8, flip=True), augmented(image, count=8, flip=True, seed=1))
