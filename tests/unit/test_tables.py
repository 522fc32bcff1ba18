"""The one reader of CSV and Parquet files that list images, as `train.items` and `verify.queries` call it."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from migrator.errors import ConfigError, MigratorError
from migrator.trainer.data.items import read_items
from migrator.trainer.data.tables import Header, read_table
from migrator.trainer.errors import TableProblem, TrainerError, TrainingProblem
from migrator.trainer.images.source import ImageSource
from migrator.verify.query_set.query_file import read_queries


def both(file: Path) -> list[str]:
    """What training and verification say to a file; each in one line that names it."""
    (file.parent / "images").mkdir(exist_ok=True)
    images = ImageSource(str(file.parent / "images"))
    readers: list[Callable[[], object]] = [
        lambda: read_items(file, images, need_labels=False),
        lambda: read_queries(file, None, images),
    ]
    messages = []
    for read in readers:
        with pytest.raises((TrainerError, MigratorError)) as caught:
            read()
        assert isinstance(caught.value, TrainingProblem | ConfigError)
        messages.append(str(caught.value))
        assert messages[-1].isprintable()
        assert messages[-1].startswith(str(file))
    return messages


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("path;label\na.png;1\nb.png;2\n", "is separated by semicolons"),
        ("path\tlabel\na.png\t1\nb.png\t2\n", "is separated by tabs"),
        ("path|label\na.png|1\n", "is separated by vertical bars"),
        ("path,label\na.png,1\n".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        ("path,label\na.png,1\nü.png,2\n".encode("latin-1"), "line 3 is not UTF-8 text: save it as UTF-8"),
        ("path,label\n" + "a" * 9000 + ".png,1\n" + "\xfc.png,2\n", None),
        ("path,label, label\na.png,1,2\n", "has two columns label (it has: path, label, label): keep one"),
        ("path,path,label\na.png,b.png,2\n", "has two columns path"),
        ("path,labels\na.png,1\nb.png,2\n", "(it has: path, labels): did you mean 'labels'? Rename it to label"),
        ("Path,label\na.png,1\nb.png,2\n", "(it has: Path, label): did you mean 'Path'? Rename it to path"),
        ("path,Label\na.png,1\nb.png,2\n", "did you mean 'Label'? Rename it to label"),
        ("paht,label\na.png,1\nb.png,2\n", "did you mean 'paht'? Rename it to path"),
        ("file,category\na.png,1\n", "(it has: file, category)"),
        ("path,label\n\n\na.png,1,extra\n", "line 4 has 3 cells, the first line names 2"),
        ('path,label\n"a\nb.png",1\nc.png,1,2\n', "line 4 has 3 cells"),
        ('path,label\na.png,1\n"b.png,2\n', "the row that begins on line 3 cannot be read: unexpected end of data"),
        ("path,label\na.png,1\n\nb.png\n", "label missing in 1 of 2 rows (first: line 4)"),
        (b"\xff\xd8\xff\xe0JFIF", "is not UTF-8 text"),
    ],
)
def test_a_csv_file_that_cannot_be_used(tmp_path: Path, content: str | bytes, words: str | None) -> None:
    file = tmp_path / "list.csv"
    if words is None:  # the bad line is far behind the first block that is decoded
        assert isinstance(content, str)
        content, words = content.encode("latin-1"), "line 3 is not UTF-8 text"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for message in both(file):
        assert words in message


def test_advice_about_a_file_has_been_followed(tmp_path: Path) -> None:
    """Each of the files above, put right as its message says."""
    frame = pd.DataFrame({"path": ["a.png", "ü.png"], "label": [1, 2]})
    frame.to_csv(tmp_path / "semicolons.csv", sep=";", index=False)
    pd.read_csv(tmp_path / "semicolons.csv", sep=";").to_csv(tmp_path / "commas.csv", index=False)
    pd.read_csv(tmp_path / "semicolons.csv", sep=";").to_parquet(tmp_path / "table.PARQUET")
    (tmp_path / "utf8.CSV").write_text((tmp_path / "commas.csv").read_text(), encoding="utf-8-sig")
    for name in ("commas.csv", "utf8.CSV", "table.PARQUET"):
        items = read_items(tmp_path / name)
        assert items.paths == ("a.png", "ü.png"), name
        assert items.labels == ("1", "2")


def test_spaces_round_names_and_cells_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text("path, label\n a.png, 1\nb.png ,2 \n")
    items = read_items(file)
    assert (items.paths, items.labels) == (("a.png", "b.png"), ("1", "2"))
    pq.write_table(pa.table({" path": ["a.png", "b.png"], "label ": [1, 2]}), tmp_path / "list.parquet")
    assert read_items(tmp_path / "list.parquet") == items


def test_long_cells_are_read_and_the_limit_of_the_process_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    file = tmp_path / "list.csv"
    file.write_text("path,note\na.png," + "x" * 1_000_000 + "\n")
    assert len(read_table(file, lambda header: ["note"], what="x", key="y").columns["note"][0]) == 1_000_000
    assert csv.field_size_limit() == before


def test_the_hash_is_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text("path\na.png\n")
    table = read_table(file, lambda header: ["path"], what="x", key="y")
    assert table.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (table.columns, table.place(0)) == ({"path": ["a.png"]}, "line 2")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"path": ["a", "b"], "label": [["x"], ["y", "z"]]},
            "row 1: label is a list of several values: training needs one",
        ),
        ({"path": ["a", "b"], "label": [{"n": 1}, {"n": 2}]}, "row 1: label is a structure with the fields n"),
        ({"path": [["a"], ["b"]], "label": [1, 2]}, "row 1: path is a list of several values: write one path"),
        ({"path": [{"path": "a"}, {"path": "b"}], "label": [1, 2]}, "row 1: path is a structure with the fields path"),
        ({"path": ["a", "b"], "label": [b"\xff", b"x"]}, "row 1: label is 1 bytes that are not text"),
        ({"path": ["a", "b"], "label": [None, 1]}, "label missing in 1 of 2 rows (first: row 1)"),
    ],
)
def test_training_needs_one_value(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    with pytest.raises(TrainingProblem) as caught:
        read_items(tmp_path / "list.parquet")
    assert words in str(caught.value)


def test_types_of_labels_that_come_to_the_same_text(tmp_path: Path) -> None:
    for labels in (
        pa.array([3, 4]),
        pa.array([3.0, 4.0]),
        pa.array(["3", "4"]).dictionary_encode(),
        pa.array([b"3", b"4"]),
        pa.array([3, 4]).cast(pa.decimal128(25, 2)),
    ):
        pq.write_table(pa.table({"path": ["a", "b"], "label": labels}), tmp_path / "list.parquet")
        assert read_items(tmp_path / "list.parquet").labels == ("3", "4"), labels.type


def test_paths_of_training_images_have_one_spelling(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    images = ImageSource(str(tmp_path / "images"))
    file = tmp_path / "list.csv"
    file.write_text(f"path,label\n./a.png,1\na.png,1\n{tmp_path}/images/b//c.png,2\n")
    assert read_items(file, images).paths == ("a.png", "b/c.png")
    file.write_text("path,label\n./a.png,1\na.png,2\n")
    with pytest.raises(TrainingProblem, match=r"line 3 labels 'a\.png' as '2', line 2 as '1'"):
        read_items(file, images)
    file.write_text("path,label\na.png,1\n/etc/b.png,2\n")
    with pytest.raises(TrainingProblem, match=r"line 3: image path '/etc/b.png' is not below images.root"):
        read_items(file, images)


def test_a_file_without_labels_says_which_columns_it_has(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,note\na.png,1\nb.png,2\n")
    items = read_items(tmp_path / "list.csv", need_labels=False)
    assert items.labels is None
    assert items.unlabelled.endswith("list.csv has no column label (it has: path, note)")


def test_names_of_columns_are_shown_in_one_line() -> None:
    header = Header(Path("x.csv"), (*(f"column {number}" for number in range(12)), "a\nb"))
    assert header.seen.startswith("column 0, column 1")
    assert header.seen.endswith("column 9, ...")
    assert Header(Path("x"), ("a\nb", "c" * 100)).seen == f"'a\\nb', {'c' * 37}..."
    with pytest.raises(TableProblem, match="has no column z"):
        header.require("z", "add it")
