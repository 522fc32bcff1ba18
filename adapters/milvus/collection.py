"""A second Milvus collection like a first one: made from its description, then compared with it, field by field.

Nothing here is a list of what to copy. pymilvus makes a schema from a description, the server describes what came of
it, and whatever differs is named. A collection that makes its own keys (auto_id) is tried out in a scratch collection,
for what servers do with given keys differs from version to version and is not to be read anywhere.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from migrator.adapters.base import StoreError, StoreRejected
from migrator.adapters.vectors import one_line

Row = dict[str, Any]
Call: TypeAlias = Callable[..., Any]
"""Calls a method of the client by its name, in bounded time, with its exceptions translated into `StoreError`s."""

SCRATCH = "_migrator_check_"
GIVEN_KEYS = "allow_insert_auto_id"
"""Property of a collection that makes its own keys: rows may be inserted with given ones (from 2.6 on)."""

_OF_ITSELF = {
    "collection_name", "collection_id", "created_timestamp", "update_timestamp", "schema_version", "aliases",
    "field_id", "id", "input_field_ids", "output_field_ids", "statistics", "auto_id",
}  # fmt: skip
"""What every collection has of its own; `auto_id` is compared where it belongs, at the key."""
_NOT_PARAMETERS = {
    "index_type", "metric_type", "field_name", "index_name", "total_rows", "indexed_rows", "pending_index_rows",
    "state",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Description:
    """What a server tells of a collection."""

    collection: Row
    """As `describe_collection` gives it."""
    indexes: Sequence[Row]
    partitions: Sequence[str]
    """Those that an application chooses among; none where a partition key chooses."""


def describe(call: Call, name: str) -> Description:
    """Everything that can be read of the collection `name`."""
    collection: Row = call("describe_collection", name)
    indexes = [call("describe_index", name, index) for index in call("list_indexes", name)]
    partitions = [] if _has_partition_key(collection) else sorted(call("list_partitions", name))
    return Description(collection, indexes, partitions)


def _has_partition_key(collection: Row) -> bool:
    return any(field.get("is_partition_key") for field in collection["fields"])


def wanted(
    source: Description, *, vector: str, dim: int, own_keys: bool | None = None, given_keys: bool = False
) -> Description:
    """What a collection like `source` is to be, for vectors of `dim` in its field `vector`.

    `own_keys` says whether it makes its own keys, by default as the source does; with `given_keys` it takes given
    ones beside them.
    """
    fields = []
    for field in source.collection["fields"]:
        changed = dict(field)
        if field["name"] == vector:
            changed["params"] = {**field.get("params", {}), "dim": dim}
        if field.get("is_primary") and own_keys is False:
            changed.pop("auto_id", None)
        fields.append(changed)
    properties = dict(source.collection.get("properties") or {})
    if given_keys:
        properties[GIVEN_KEYS] = "true"
    collection = {**source.collection, "fields": fields, "properties": properties}
    return Description(collection, source.indexes, source.partitions)


def create(call: Call, name: str, want: Description) -> None:
    """Makes the collection, without partitions and indexes."""
    from pymilvus import CollectionSchema
    from pymilvus.exceptions import MilvusException

    described = want.collection
    more: Row = {}
    if _has_partition_key(described) and described.get("num_partitions"):
        more["num_partitions"] = described["num_partitions"]
    if described.get("properties"):
        more["properties"] = described["properties"]
    functions = [_plain_function(function) for function in described.get("functions") or ()]
    try:
        schema = CollectionSchema.construct_from_dict({**described, "functions": functions})
    except MilvusException as error:
        raise StoreRejected(f"the client cannot make a collection like this one: {one_line(error)}") from error
    call(
        "create_collection",
        name,
        schema=schema,
        num_shards=described.get("num_shards") or 1,
        consistency_level=described.get("consistency_level_name", "Bounded"),
        **more,
    )


def _plain_function(function: Row) -> Row:
    """With lists, which the client takes, for the containers that it gives."""
    return {**function, **{name: list(function[name]) for name in ("input_field_names", "output_field_names")}}


def complete(call: Call, name: str, want: Description) -> None:
    """Adds the partitions and indexes that are not there yet. May be repeated."""
    for partition in want.partitions:
        if not call("has_partition", name, partition):
            call("create_partition", name, partition)
    there = set(call("list_indexes", name))
    for index in want.indexes:
        if index["index_name"] not in there:
            # Not `sync`: there is nothing to wait for yet.
            call("create_index", name, _index_parameters(index), sync=False)


def _index_parameters(index: Row) -> Any:
    from pymilvus.milvus_client import IndexParams

    more: Row = {"metric_type": index["metric_type"]} if index.get("metric_type") else {}
    parameters = IndexParams()
    parameters.add_index(
        field_name=index["field_name"],
        index_type=index.get("index_type", ""),
        index_name=index["index_name"],
        params=index_parameters(index),
        **more,
    )
    return parameters


def index_parameters(index: Row) -> Row:
    """The parameters that an index was built with."""
    found = {name: value for name, value in index.items() if name not in _NOT_PARAMETERS}
    nested = found.pop("params", None)
    return {**found, **nested} if isinstance(nested, dict) else found


def difference(want: Description, found: Description) -> str | None:
    """The first thing in which `found` is not what it was to be, in words; None if there is none.

    Properties that a server adds by itself do no harm: of the source's own none may be missing or changed.
    """
    expected, actual = _facts(want), _facts(found)
    for what in sorted(expected.keys() | actual.keys()):
        if what not in actual:
            return f"{what} is missing in one made like it"
        if what not in expected:
            if what.startswith("property "):
                continue
            return f"{what} is in one made like it, but not in the collection"
        for name in sorted(expected[what].keys() | actual[what].keys()):
            one, other = expected[what].get(name), actual[what].get(name)
            if one != other:
                value = f"{what} {name}".rstrip()
                return f"{value} is {_shown(one)} in the collection and {_shown(other)} in one made like it"
    return None


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."


Facts: TypeAlias = dict[str, dict[str, Any]]
"""Thing -> what it is, by name."""


def _facts(described: Description) -> Facts:
    collection = described.collection
    facts: Facts = {"collection": {}}
    for name, value in collection.items():
        if name == "properties":
            facts.update({f"property {key!r}": {"": str(inner)} for key, inner in (value or {}).items()})
        elif name == "functions":
            facts.update(_entries("function", value or ()))
        elif name in ("fields", "struct_array_fields"):
            facts.update(_entries("field", value or ()))
        elif name == "num_partitions":
            facts["collection"][name] = value if _has_partition_key(collection) else None
        elif name not in _OF_ITSELF:
            facts["collection"][name] = _value(value)
    for index in described.indexes:
        names = ("field_name", "index_type", "metric_type")
        own = {name: _value(index.get(name)) for name in names}
        built = {name: _value(value) for name, value in index_parameters(index).items()}
        facts[f"index {index['index_name']!r}"] = {**own, **built}
    facts.update({f"partition {name!r}": {} for name in described.partitions})
    return facts


def _entries(kind: str, entries: Sequence[Row]) -> Facts:
    facts: Facts = {}
    for entry in entries:
        what = f"{kind} {entry['name']!r}"
        own = facts[what] = {}
        for name, value in entry.items():
            if name in ("params", "type_params") and isinstance(value, Mapping):
                own.update({key: _value(inner) for key, inner in value.items()})
            elif name == "fields":
                facts.update({f"{what}: {inner}": its for inner, its in _entries("field", value).items()})
            elif name == "auto_id":
                own[name] = value or None
            elif name not in _OF_ITSELF and name != "indexes":
                own[name] = _value(value)
    return facts


def _value(value: Any) -> Any:
    """Comparable: a parameter is a number in one answer and its text in another, a default value is a message."""
    if isinstance(value, (bool, int, float, str)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return None if value is None else " ".join(str(value).split())


@contextmanager
def scratch(call: Call, want: Description) -> Iterator[str]:
    """A collection that lasts as long as the block, whatever happens in it."""
    name = f"{SCRATCH}{secrets.token_hex(6)}"
    try:
        create(call, name, want)
        yield name
    finally:
        drop(call, name)


def drop(call: Call, name: str) -> None:
    """Removes what was made a moment ago; what goes wrong with that hides nothing else."""
    with suppress(StoreError):
        call("drop_collection", name)  # one that is not there is no error


# -- keys that the server makes -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GivenKeys:
    """What a server does with keys that are given for a collection which makes its own (auto_id), as tried out."""

    upsert_keeps: bool
    """A row is written again under the key that it has: vectors can be replaced in place."""
    written_by: Literal["upsert", "insert"] | None
    """The request that writes a row under a given new key; None if none does."""
    made_differ: bool
    """The keys that it makes afterwards are none of those that were given."""

    @property
    def carried(self) -> bool:
        """Whether rows can be copied with their keys into a collection that keeps making keys."""
        return self.written_by is not None and self.made_differ


NO_KEYS = GivenKeys(upsert_keeps=False, written_by=None, made_differ=True)
_KEY, _VECTOR = "id", "vector"
_FEW = 32


def try_given_keys(call: Call, source: Description, *, partial: bool, property_: bool = False) -> GivenKeys:
    """Tries it in a scratch collection, which is dropped. With `property_` the collection says that it takes keys."""
    from pymilvus import DataType

    key = next(field for field in source.collection["fields"] if field.get("is_primary"))
    strings = key["type"] == DataType.VARCHAR
    fields = [
        {**key, "name": _KEY, "description": ""},
        {"name": _VECTOR, "type": DataType.FLOAT_VECTOR, "params": {"dim": 2}},
    ]
    had = (source.collection.get("properties") or {}).get(GIVEN_KEYS)
    properties = {GIVEN_KEYS: "true" if property_ else had} if property_ or had else {}
    index = {"index_name": _VECTOR, "field_name": _VECTOR, "index_type": "FLAT", "metric_type": "L2"}
    want = Description({"fields": fields, "properties": properties}, [index], ())
    with scratch(call, want) as name:
        trial = _Trial(call, name, strings, partial)
        if not (trial.write("upsert", [(5, 1.0)]) or trial.write("insert", [(7, 1.0)])):
            return NO_KEYS
        complete(call, name, want)
        call("load_collection", name)
        return trial.result()


class _Trial:
    """Writes to a scratch collection, and what becomes of them."""

    def __init__(self, call: Call, name: str, strings: bool, partial: bool) -> None:
        self._call, self._name, self._strings, self._partial = call, name, strings, partial

    def result(self) -> GivenKeys:
        made = self._insert_without_keys(1)[0]
        keeps = self._takes("upsert", made, 2.0, partial=self._partial)
        written_by: Literal["upsert", "insert"] | None = None
        if self._takes("upsert", self._as_key(11), 3.0):
            written_by = "upsert"
        elif self._takes("insert", self._as_key(13), 3.0):
            written_by = "insert"
        if written_by is None:
            return GivenKeys(keeps, None, True)
        self.write(written_by, [(100 + 2 * number, 1.0) for number in range(_FEW)])
        before = set(self._rows())
        return GivenKeys(keeps, written_by, before.isdisjoint(self._insert_without_keys(200)))

    def _as_key(self, number: int) -> Any:
        return str(number) if self._strings else number

    def write(self, how: Literal["upsert", "insert"], rows: Sequence[tuple[int, float]]) -> bool:
        """Whether the server takes these."""
        return self._send(how, [{_KEY: self._as_key(key), _VECTOR: [value, 0.0]} for key, value in rows])

    def _send(self, how: Literal["upsert", "insert"], rows: list[Row], **more: Any) -> bool:
        try:
            self._call(how, self._name, rows, **more)
        except StoreRejected:
            return False
        return True

    def _takes(self, how: Literal["upsert", "insert"], key: Any, value: float, *, partial: bool = False) -> bool:
        """Whether the row lies under that key afterwards, and nothing else was added or lost by it."""
        before = self._rows()
        more = {"partial_update": True} if partial else {}
        if not self._send(how, [{_KEY: key, _VECTOR: [value, 0.0]}], **more):
            return False
        return self._rows() == {**before, key: value}

    def _rows(self) -> dict[Any, float]:
        some = f'{_KEY} >= ""' if self._strings else f"{_KEY} >= 0"
        rows = self._call("query", self._name, filter=some, output_fields=["*"], consistency_level="Strong")
        return {row[_KEY]: float(row[_VECTOR][0]) for row in rows}

    def _insert_without_keys(self, rows: int) -> list[Any]:
        answer = self._call("insert", self._name, [{_VECTOR: [0.0, 1.0]} for _ in range(rows)])
        return list(answer["ids"])
