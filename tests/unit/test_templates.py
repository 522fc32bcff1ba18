"""Templates over payloads: nested fields, one text for one value, and nothing but lookups in mappings."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qdrant_client import QdrantClient, models

from migrator.labels import label_of
from migrator.trainer.errors import ImageProblem
from migrator.trainer.images.source import ImageSource
from migrator.trainer.images.templates import NotText, fields_of, lookup, parse, text_of

LANGCHAIN = {"page_content": "red boots", "metadata": {"source": "shoes/1.jpg", "kind": {"name": "boots"}, "page": 3}}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{metadata.source}", "shoes/1.jpg"),
        ("{metadata.kind.name}/{metadata.page}.jpg", "boots/3.jpg"),
        ("{{{id}}}", "{7}"),
        ("{page_content}", "red boots"),
    ],
)
def test_fields_of_nested_mappings(template: str, text: str, tmp_path: Path) -> None:
    assert parse(template).fill({**LANGCHAIN, "id": 7}) == text
    assert label_of(template, 7, LANGCHAIN) == text
    assert ImageSource(str(tmp_path), template).locate(7, LANGCHAIN) == text


def test_a_key_with_dots_goes_before_nested_ones() -> None:
    values = {"a.b": 1, "a": {"b": 2, "b.c": 3, "d": {"e": 4}}, "a.d": {"f": 5}, "x": {"y.z": {"w": 6}}}
    assert [lookup(values, field) for field in ("a.b", "a.b.c", "a.d.e", "a.d.f", "x.y.z.w")] == [1, 3, 4, 5, 6]
    assert lookup({"a.b": None, "a": {"b": 2}}, "a.b") is None, "what is spelled so is meant, even where it is empty"


@pytest.mark.parametrize("field", ["metadata.author", "metadata.source.name", "page_content.x", "nothing.at.all"])
def test_levels_that_are_missing_are_a_missing_field(field: str, tmp_path: Path) -> None:
    assert parse(f"{{{field}}}").fill(LANGCHAIN) is None
    assert label_of(f"{{{field}}}", 1, LANGCHAIN) == ""
    with pytest.raises(ImageProblem, match="item 1 has no value in a field that"):
        ImageSource(str(tmp_path), f"{{{field}}}").locate(1, LANGCHAIN)
    assert parse("{metadata.source}").fill({"metadata": None}) is None
    assert parse("{metadata.source}").fill({"metadata": [{"source": "x"}]}) is None, "lists have no fields"


class Tempting:
    secret = "hunter2"


@pytest.mark.parametrize("field", ["a.__class__", "a.secret", "a.__init__.__globals__", "__class__", "a.b.__class__"])
def test_no_attribute_is_ever_read(field: str) -> None:
    assert parse(f"{{{field}}}").fill({"a": Tempting(), "b": {"b": 1}}) is None
    assert parse(f"{{{field}}}").fill({"a": {"b": "text"}}) is None


@pytest.mark.parametrize(
    "text", ["{a.b[0]}", "{a..b}", "{.a}", "{a.}", "{a.0}", "{0.a}", "{a!r}", "{a:x}", "{a. b}", "{a\n}", "{a", "}", ""]
)
def test_what_is_no_template(text: str) -> None:
    with pytest.raises(ValueError, match=r"single|names no field"):
        parse(text)


@given(st.text(max_size=30))
def test_any_text_is_a_template_or_a_value_error(text: str) -> None:
    try:
        template = parse(text)
    except ValueError:
        return
    assert template.fields
    filled = template.fill(dict.fromkeys(template.fields, "x"))
    assert filled is not None
    assert filled.count("x") >= len(template.fields)


def test_odd_names_of_fields() -> None:
    for name in ("image path", "größe", "3d", "a-b", "@id", "$meta", "画像"):
        assert parse(f"{{{name}}}").fill({name: "v"}) == "v"


@given(st.dictionaries(st.text(min_size=1), st.text(min_size=1).filter(str.strip), max_size=3))
def test_values_are_never_templates(values: dict[str, str]) -> None:
    braces = {**values, "a": "{b} {{ }} %s {a.__class__}"}
    assert parse("{a}").fill(braces) == braces["a"]


def test_the_same_value_has_the_same_text() -> None:
    value: Any
    for value in (3, 3.0, np.int64(3), np.float32(3), np.uint8(3), Decimal("3.00"), Decimal(3), "3", b"3"):
        assert text_of(value) == "3"
    for value in (0.1, np.float64(0.1), np.float32(0.1), Decimal("0.10")):
        assert text_of(value) == "0.1"
    assert [text_of(value) for value in (0, -0.0, Decimal("-0.0"), 2**64, -1.5, 1e300)] == [
        "0", "0", "0", str(2**64), "-1.5", "1e+300",
    ]  # fmt: skip
    for value in (None, "", " \t", float("nan"), np.float32("nan"), float("inf"), Decimal("NaN"), pd.NaT, b""):
        assert text_of(value) is None
    assert (text_of(True), text_of(np.bool_(False))) == ("True", "False")
    assert text_of(uuid.UUID(int=5)) == "00000000-0000-0000-0000-000000000005"


def test_the_text_is_what_pandas_writes_into_a_csv_file() -> None:
    frame = pd.DataFrame(
        {
            "truth": [True, False],
            "day": [dt.date(2024, 2, 29), dt.date(1999, 12, 31)],
            "moment": pd.to_datetime(["2024-02-29 10:00:01", "1999-12-31 00:00:01"]),
            "kind": pd.Categorical(["boots", "hats"]),
            "size": [1.5, 0.1],
            "count": [7, 2**62],
        }
    )
    written = [line.split(",") for line in frame.to_csv(index=False).splitlines()[1:]]
    rows = pa.Table.from_pandas(frame).to_pylist()
    assert [[text_of(row[name]) for name in frame] for row in rows] == written


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1, 2], "a list of several values"),
        ((), "a list of several values"),
        (np.zeros(2), "a list of several values"),
        ({"bytes": b"", "path": "x"}, "a structure with the fields bytes, path: name one of them, such as {f.bytes}"),
        (b"\xff\xd8\xff", "3 bytes that are not text"),
        (10**5000, "a number of thousands of digits"),
        (Tempting(), "of the type Tempting"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_text(value: Any, words: str) -> None:
    with pytest.raises(NotText) as caught:
        parse("{f}").fill({"f": value})
    assert str(caught.value) == f"field 'f' is {words}"


def test_lists_give_a_text_for_each_value() -> None:
    values = {"tags": ["b", None, " a ", "b", 3.0], "kind": "k", "none": [], "deep": [["x"]]}
    assert parse("{tags}").fill_each(values) == ("b", "a", "3")
    assert parse("{kind}/{tags}").fill_each(values) == ("k/b", "k/ a", "k/3")
    assert parse("{kind}").fill_each(values) == ("k",)
    assert parse("{none}").fill_each(values) == parse("{absent}").fill_each(values) == ()
    with pytest.raises(NotText):
        parse("{deep}").fill_each(values)


def test_the_fields_that_a_message_offers() -> None:
    assert fields_of(LANGCHAIN) == ["page_content", "metadata.source", "metadata.kind.name", "metadata.page"]


def test_payloads_as_a_store_gives_them() -> None:
    client = QdrantClient(":memory:")
    client.create_collection("c", vectors_config=models.VectorParams(size=2, distance=models.Distance.COSINE))
    client.upsert("c", [models.PointStruct(id=1, vector=[1, 0], payload=LANGCHAIN)])
    payload = client.retrieve("c", [1])[0].payload
    client.close()
    assert payload is not None
    assert parse("{metadata.source}").fill(payload) == "shoes/1.jpg"
    struct = pa.array([{"path": "x.jpg", "bytes": None}]).to_pylist()[0]
    assert parse("{image.path}").fill({"image": struct}) == "x.jpg"
    assert parse("{image.path}").fill({"image": json.loads('{"path": "y.jpg"}')}) == "y.jpg"
