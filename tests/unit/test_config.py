from __future__ import annotations

import glob
import json
import os
import re
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from migrator.config import (
    MAX_ANSWERS,
    METRICS,
    Config,
    Gate,
    ItemsFrom,
    OldEncoder,
    Section,
    Train,
    find_migration,
    json_schema,
    load_config,
)
from migrator.config.template import TEMPLATE
from migrator.errors import ConfigError, UsageProblem
from migrator.evaluation.metrics import parse_metric

EXAMPLE = """\
version: 1
ledger: sqlite:///migrator.db
artifacts: ./artifacts
migrations:
  digits-v2:
    store: {kind: faiss, path: ./gallery}
    images: {uri: "{path}", root: ./images}
    old_encoder: {arch: resnet10t, weights: old.safetensors, dim: 128, image_size: 32}
    new_encoder: {arch: resnet18, dim: 128, image_size: 32}
    train:  {items: train.csv, method: advbct, epochs: 10, batch_size: 128, seed: 0}
    verify: {queries: queries.csv, label: "{category}", sample: 500, gate: {metric: map@100, min_gain: 0.0}}
    rollout: {strategy: in_place, canary: [1, 10, 50, 100]}
    backfill: {chunk_size: 1000, batch_size: 64}
"""

MODEL = "{arch: resnet10t, weights: old.safetensors, dim: 128, image_size: 32}"
"""The old encoder of the example."""


def old_encoder(config: Config) -> OldEncoder:
    """The old encoder of the example's migration, where its vectors are not only stored."""
    found = config.migrations["digits-v2"].old_encoder
    assert isinstance(found, OldEncoder)
    return found


def train(config: Config) -> Train:
    found = config.migrations["digits-v2"].train
    assert found is not None
    return found


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "migrations.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def problems(folder: Path, text: str | bytes) -> list[str]:
    """The problems of a file, without the folder it lies in."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text))
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{folder}/", "").split("\n")


def edited(old: str, new: str) -> str:
    assert EXAMPLE.count(old) == 1
    return EXAMPLE.replace(old, new)


# --- a file that is right --------------------------------------------------------------------------------------------


def test_the_example_with_paths_from_its_folder(tmp_path):
    config = load_config(write(tmp_path, EXAMPLE))
    assert (config.path, config.folder) == (tmp_path / "migrations.yaml", tmp_path)
    assert config.ledger == f"sqlite:///{tmp_path}/migrator.db"
    assert config.artifacts == str(tmp_path / "artifacts")
    migration = config.migrations["digits-v2"]
    assert migration.store.settings() == {"kind": "faiss", "path": str(tmp_path / "gallery")}
    assert migration.images.root == str(tmp_path / "images")
    assert old_encoder(config).weights == tmp_path / "old.safetensors"
    assert migration.new_encoder.weights is None
    assert train(config).items == tmp_path / "train.csv"
    assert migration.verify.queries == tmp_path / "queries.csv"
    assert migration.verify.max_age == timedelta(days=7)
    assert migration.verify.gate == Gate()
    assert migration.rollout.canary == [1, 10, 50, 100]


def test_a_relative_config_path_gives_absolute_paths(tmp_path, monkeypatch):
    write(tmp_path, EXAMPLE)
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("migrations.yaml"))
    assert config.path == tmp_path / "migrations.yaml"
    assert old_encoder(config).weights == tmp_path / "old.safetensors"


def test_absolute_paths_home_and_urls_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    text = edited("./images", "s3://bucket/images").replace("old.safetensors", "~/old.pt").replace("./gallery", "/g")
    config = load_config(write(tmp_path, text.replace("sqlite:///migrator.db", "sqlite:////var/m.db?timeout=5")))
    migration = config.migrations["digits-v2"]
    assert migration.images.root == "s3://bucket/images"
    assert old_encoder(config).weights == Path("/home/ann/old.pt")
    assert migration.store.settings()["path"] == "/g"
    assert config.ledger == "sqlite:////var/m.db?timeout=5"


def test_what_is_left_out_has_defaults(tmp_path):
    lines = [line for line in EXAMPLE.splitlines() if not re.match(r"ledger|artifacts| +(rollout|backfill):", line)]
    short = load_config(write(tmp_path, "\n".join(lines)))
    assert short.redacted() == load_config(write(tmp_path, EXAMPLE)).redacted()


def test_a_store_of_another_kind_keeps_its_keys(tmp_path):
    store = "{kind: chroma, path: ./q, collection: products, vector: image, options: {timeout: 3}}"
    config = load_config(write(tmp_path, edited("{kind: faiss, path: ./gallery}", store)))
    assert config.migrations["digits-v2"].store.settings() == {
        "kind": "chroma",
        "path": str(tmp_path / "q"),
        "collection": "products",
        "vector": "image",
        "options": {"timeout": 3},
    }
    remote = edited("{kind: faiss, path: ./gallery}", "{kind: pgvector, table: items}")
    settings = load_config(write(tmp_path, remote)).migrations["digits-v2"].store.settings()
    assert settings == {"kind": "pgvector", "table": "items"}


@pytest.mark.parametrize(
    ("store", "settings"),
    [
        ("{kind: milvus, uri: ./m.db, collection: c}", {"uri": "m.db", "collection": "c"}),
        ('{kind: milvus, uri: "http://h:1", collection: c}', {"uri": "http://h:1", "collection": "c"}),
        ("{kind: qdrant, path: ./q, collection: c, vector: v}", {"path": "q", "collection": "c", "vector": "v"}),
        ("{kind: qdrant, engine: edge, path: ./q, collection: c}", {"engine": "edge", "path": "q", "collection": "c"}),
    ],
)
def test_stores_have_their_files_beside_the_configuration(tmp_path, store, settings):
    config = load_config(write(tmp_path, edited("{kind: faiss, path: ./gallery}", store)))
    found = config.migrations["digits-v2"].store.settings()
    local = {"m.db": str(tmp_path / "m.db"), "q": str(tmp_path / "q")}
    expected = {key: local.get(value, value) for key, value in settings.items()}
    assert {key: value for key, value in found.items() if key not in ("kind", "timeout")} == expected


def test_an_unknown_key_of_a_store_is_told_with_the_keys_of_its_kind(tmp_path):
    text = edited("{kind: faiss, path: ./gallery}", "{kind: milvus, uri: ./m.db, colection: c, collection: d}")
    (problem,) = problems(tmp_path, text)
    assert problem.endswith('store.colection: unknown key; did you mean "collection"?')


def test_training_items_may_come_from_the_store(tmp_path):
    config = load_config(write(tmp_path, edited("items: train.csv", 'items: {from: store, label: "{category}"}')))
    items = train(config).items
    assert isinstance(items, ItemsFrom)
    assert items.label == "{category}"


@pytest.mark.parametrize("source", ["store", "folders"])
def test_training_items_need_no_file_and_no_labels(tmp_path, source):
    config = load_config(write(tmp_path, edited("items: train.csv", f"items: {{from: {source}}}")))
    items = train(config).items
    assert isinstance(items, ItemsFrom)
    assert (items.source, items.label) == (source, None)


def test_an_old_encoder_may_be_stored(tmp_path):
    text = edited(MODEL, "stored")
    config = load_config(write(tmp_path, text.replace("dim: 128", "dim: 96")))  # plan compares with the collection
    assert config.migrations["digits-v2"].old_encoder == "stored"
    assert config.redacted()["migrations"]["digits-v2"]["old_encoder"] == "stored"


def test_new_weights_need_no_training(tmp_path):
    text = edited("{arch: resnet18, ", "{arch: resnet18, weights: new.safetensors, ")
    config = load_config(write(tmp_path, re.sub(r" +train: .*\n", "", text)))
    assert config.migrations["digits-v2"].train is None


def test_a_config_cannot_be_changed(tmp_path):
    config = load_config(write(tmp_path, EXAMPLE))
    with pytest.raises(ValueError, match="frozen"):
        config.migrations["digits-v2"].backfill.nice = 1.0  # type: ignore[misc]


def test_every_gate_metric_can_be_computed():
    names = [f"{name}@{k}" for name in METRICS for k in (1, 10, MAX_ANSWERS)]
    assert [str(parse_metric(Gate(metric=name).metric)) for name in names] == names


@pytest.mark.parametrize(
    ("threshold", "problem"),
    [
        ({"metric": "recal@1", "min": 0.9}, 'did you mean "recall@10"'),
        ({"metric": "recall@1001", "min": 0.9}, "no metric with k up to 1000"),
        ({"metric": "recall@1"}, "give one of min, max, min_gain, min_ratio"),
        ({"metric": "recall@1", "min": 0.9, "min_gain": 0}, "one bound"),
        ({"metric": "recall@1", "min": 0.9, "min_ratio": 0.9}, "one bound"),
        ({"metric": "negative_flips", "min_gain": 0}, "give max"),
        ({"metric": "recall@1", "min": 0.9, "test": "reverse"}, "test: must be 'cross', 'self' or 'lowest'"),
        ({"metric": "recall@1", "min": 0.9, "tset": "self"}, 'tset: unknown key; did you mean "test"?'),
    ],
)
def test_a_threshold_has_one_bound_that_makes_sense(tmp_path, threshold, problem):
    gate = f"gate: {{thresholds: [{json.dumps(threshold)}], "
    (found,) = problems(tmp_path, edited("gate: {", gate))
    assert problem in found


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("{slef: -0.05}", 'min_gain.slef: unknown key; did you mean "self"?'),
        (
            "{self: -0.05, lowest: 0}",
            "min_gain.lowest: is 0, and the lowest point of the backfill is never above its ends",
        ),
        ("{lowest: 0.1}", "give at most 0"),
        ("{self: 2}", "min_gain.self: must be less than or equal to 1"),
        ("much", "min_gain: must be a valid number"),
    ],
)
def test_a_least_gain_is_a_number_or_one_for_each_test(tmp_path, given, problem):
    (found,) = problems(tmp_path, edited("min_gain: 0.0", f"min_gain: {given}"))
    assert problem in found


@pytest.mark.parametrize(
    ("given", "gains"),
    [
        (-0.1, (-0.1, -0.1, -0.1)),
        ({}, (0, 0, 0)),
        ({"lowest": -0.1}, (0, -0.1, 0)),
        ({"self": -0.1}, (0, -0.1, -0.1)),
        ({"cross": -0.2, "self": 0.1}, (-0.2, -0.2, 0.1)),
        ({"cross": 0.2, "self": 0.1}, (0.2, 0.1, 0.1)),
    ],
)
def test_the_least_gain_of_each_test(given, gains):
    gate = Gate(min_gain=given)
    assert tuple(gate.least_gain(test) for test in ("cross", "lowest", "self")) == gains


@pytest.mark.parametrize(
    ("gate", "problem"),
    [
        ("{min_gain: {lowest: -0.1}}", "of verify.gate.min_gain give self alone, or one number"),
        ("{thresholds: [{metric: map@100, min: 0.1, test: cross}]}", "which compares 64-d with 128-d vectors"),
    ],
)
def test_a_shadow_has_no_way_of_mixed_galleries(tmp_path, gate, problem):
    text = edited("gate: {metric: map@100, min_gain: 0.0}", f"gate: {gate}").replace("in_place", "shadow")
    (found,) = problems(tmp_path, text.replace("resnet18, dim: 128", "resnet18, dim: 64"))
    assert problem in found


def test_the_order_of_a_shadow_is_nothing_to_choose(tmp_path):
    shadow = edited("backfill: {", "backfill: {order: worst_first, ").replace("in_place", "shadow")
    (found,) = problems(tmp_path, shadow)
    assert "a shadow answers no query before all of it is there" in found


# --- the environment and secrets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ("${ARCH}", "resnet50"),
        ("'x-${ARCH}-${ARCH}'", "x-resnet50-resnet50"),
        ("${NOT_SET:-resnet18}", "resnet18"),
        ("${ARCH:-resnet18}", "resnet50"),
        ("${EMPTY:-resnet18}", "resnet18"),
        ("a$$b", "a$b"),
        ("$${ARCH}", "${ARCH}"),
        ("$ARCH", "$ARCH"),
        ("${NESTED}", "${ARCH}"),  # what the environment says is not expanded again
    ],
)
def test_expansion(tmp_path, monkeypatch, written, means):
    for name, value in {"ARCH": "resnet50", "EMPTY": "", "NESTED": "${ARCH}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NOT_SET", raising=False)
    text = edited(
        "{arch: resnet18, dim: 128, image_size: 32}", f"\n      arch: {written}\n      dim: 128\n      image_size: 32"
    )
    assert load_config(write(tmp_path, text)).migrations["digits-v2"].new_encoder.arch == means


def test_numbers_and_truths_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("EPOCHS", "3")
    monkeypatch.setenv("FLIP", "true")
    found = train(load_config(write(tmp_path, edited("epochs: 10", 'epochs: "${EPOCHS}", flip: "${FLIP}"'))))
    assert (found.epochs, found.flip) == (3, True)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("${NOT_SET}", "the environment variable NOT_SET is not set: set it, or write ${NOT_SET:-default}"),
        ("${}", "${ begins a variable"),
        ("${A B}", "${ begins a variable"),
        ("${A-b}", "${ begins a variable"),
        ("x${", "${ begins a variable"),
    ],
)
def test_a_variable_that_cannot_be_expanded_is_named_once(tmp_path, monkeypatch, written, problem):
    monkeypatch.delenv("NOT_SET", raising=False)
    found = problems(tmp_path, edited("map@100", f'"{written}"'))
    assert len(found) == 1
    assert found[0].startswith(f"migrations.yaml:11: migrations.digits-v2.verify.gate.metric: {problem}")


SECRET = "h0rsebattery"


def test_secrets_are_not_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    text = edited(
        "{kind: faiss, path: ./gallery}",
        f'{{kind: weaviate, url: "https://u:{SECRET}@host:6333", api_key: "${{SECRET}}", collection: "${{SECRET}}",'
        f" headers: {{authorization: {SECRET}}}, TLS-Password: {SECRET}, access_key: [{SECRET}],"
        f' plain: "http://h/?api_key={SECRET}&a=1"}}',
    ).replace("sqlite:///migrator.db", f"postgresql+psycopg://ann:{SECRET}/@{SECRET}@db/migrator?password={SECRET}")
    config = load_config(write(tmp_path, text.replace("./images", f"s3://{SECRET}:{SECRET}@bucket/i")))
    assert config.migrations["digits-v2"].store.settings()["api_key"] == SECRET
    assert config.migrations["digits-v2"].store.settings()["headers"] == {"authorization": SECRET}
    shown = config.redacted()
    assert SECRET not in json.dumps(shown)
    assert shown["ledger"] == "postgresql+psycopg://***@db/migrator?password=***"
    store = shown["migrations"]["digits-v2"]["store"]
    assert store == {
        "kind": "weaviate",
        "url": "https://***@host:6333",
        "api_key": "***",
        "collection": "${SECRET}",
        "headers": {"authorization": "***"},
        "TLS-Password": "***",
        "access_key": "***",
        "plain": "http://h/?api_key=***&a=1",
    }
    for thing in (config, config.migrations, config.migrations["digits-v2"], config.migrations["digits-v2"].store):
        assert SECRET not in repr(thing) + str(thing)


def test_a_default_of_a_secret_is_not_printed(tmp_path):
    text = edited("sqlite:///migrator.db", f"postgresql://u:${{NOT_SET:-{SECRET}}}@db/m")
    config = load_config(write(tmp_path, text))
    assert SECRET in config.ledger
    assert config.redacted()["ledger"] == "postgresql://***@db/m"


@pytest.mark.parametrize(
    "text",
    [
        edited("path: ./gallery", f"path: [{SECRET}], api_key: {SECRET}"),
        edited("sqlite:///migrator.db", f"mysql://u:{SECRET}@h/d"),
        edited("sqlite:///migrator.db", f"!{SECRET}"),
        edited("sqlite:///migrator.db", f"!{SECRET}!x y"),
        edited("sqlite:///migrator.db", f"*{SECRET}"),
        edited("sqlite:///migrator.db", f"&{SECRET} a").replace("./artifacts", f"&{SECRET} b"),
        edited("sqlite:///migrator.db", f'"{SECRET}\\q"'),
        edited("sqlite:///migrator.db", f'"{SECRET}'),
        edited("sqlite:///migrator.db", f"[{SECRET}, {SECRET}"),
        edited("sqlite:///migrator.db", f"a: {SECRET}: b"),
        edited("sqlite:///migrator.db", f"%{SECRET}"),
        edited("sqlite:///migrator.db", f"|{SECRET}"),
        edited("map@100", SECRET),
        edited("epochs: 10", f"epochs: {SECRET}"),
        edited("seed: 0", f"seed: {SECRET}"),
        edited("min_gain: 0.0", f"min_gain: {SECRET}"),
        edited('"{category}"', f'"{SECRET}"'),
        edited("[1, 10, 50, 100]", f"[1, {SECRET}]"),
        edited("in_place", SECRET),
        edited("./images", f'"{SECRET}\\0"'),
        edited("train.csv", f"https://u:{SECRET}@h/t.csv"),
        edited("train.csv", f"~{SECRET}/x"),
        edited("kind: faiss", f"kind: {SECRET.upper()}"),
    ],
)
def test_no_message_shows_a_value(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    shown = traceback.format_exception(caught.value)
    assert SECRET not in "".join(line for line in shown if not line.startswith("  ")).lower()


# --- a file that is wrong --------------------------------------------------------------------------------------------


def sections() -> list[type[Section]]:
    found: list[type[Section]] = [Section]
    for each in found:
        found.extend(each.__subclasses__())
    return found[1:]


@pytest.mark.parametrize("kind", sections(), ids=lambda kind: kind.__name__)
def test_true_and_false_are_taken_where_the_schema_has_a_boolean_and_nowhere_else(kind: type[Section]) -> None:
    """An optional switch takes them too."""
    properties = {**kind.model_json_schema()["properties"]}
    for name, field in kind.model_fields.items():
        key = field.alias or name
        shape = properties[key]
        is_switch = "boolean" in {part.get("type") for part in (shape, *shape.get("anyOf", ()))}
        for value in (True, False, *([] if is_switch else [[True], [False, 1]])):
            with pytest.raises(ValidationError) as caught:
                kind.model_validate({"no such key": 0, "arch": "resnet18", key: value})
            wrong = [problem for problem in caught.value.errors() if problem["loc"][:1] == (key,)]
            assert bool(wrong) != is_switch, (name, value)


@pytest.mark.parametrize("value", ["true", "false", "yes", "off"])
def test_a_switch_that_is_optional(tmp_path, value):
    store = f"{{kind: qdrant, url: 'http://localhost', collection: c, grpc: {value}}}"
    config = load_config(write(tmp_path, edited("{kind: faiss, path: ./gallery}", store)))
    assert config.migrations["digits-v2"].store.settings()["grpc"] is (value in ("true", "yes"))


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("canary: [1, 10, 50, 100]", "canary: [on, 100]", "rollout.canary"),
        ("image_size: 32}\n    train", "image_size: 32, mean: [no, 0.5, 0.5]}\n    train", "new_encoder.mean"),
        ("seed: 0}", "seed: 0, trackers: [yes]}", "train.trackers"),
    ],
)
def test_true_and_false_in_a_list_of_numbers_or_texts(tmp_path, old, new, key):
    (problem,) = problems(tmp_path, edited(old, new))
    assert f"migrations.digits-v2.{key}: must not be true or false" in problem


def test_all_problems_at_once_each_with_its_line_and_key(tmp_path):
    text = """\
version: 2
migrations:
  digits-v2:
    store: {kind: faiss, pth: ./gallery}
    images: {uri: "no field", root: ./images}
    old_encoder: {arch: resnet10t, weights: old.safetensors, dim: 128, image_size: 32}
    new_encoder: {arch: resnet18, dim: 64, image_size: 32}
    train:
      items: {from: store, lable: "{category}"}
      method: advbtc
      epochs: yes
      batch_size: abc
    verify:
      label: "{a.b[0]}"
      gate: {metirc: map@100, min_gain: .nan}
      max_age: 7
    rollout: {canary: [1, 10, 10, 100]}
    backfil: {chunk_size: 1000}
  Bad Name: []
ledgr: sqlite:///x.db
"""
    at = "migrations.digits-v2"
    name = "a migration's name has 1 to 63 characters of a-z, 0-9, . _ - and begins with a letter or digit"
    assert problems(tmp_path, text) == [
        "migrations.yaml:1: version: must be 1",
        f"migrations.yaml:4: {at}.store.path: missing: the folder with index.faiss and items.parquet, "
        "or give index and items, the files",
        f'migrations.yaml:4: {at}.store.pth: unknown key; did you mean "path"?',
        f"migrations.yaml:5: {at}.images.uri: must hold payload fields in braces, such as "
        '"{path}", "{shop}/{id}.jpg" or "{metadata.source}"',
        f'migrations.yaml:9: {at}.train.items.lable: unknown key; did you mean "label"?',
        f"migrations.yaml:10: {at}.train.method: must be 'advbct', 'bct', 'lce', 'hot_refresh', 'independent', "
        "'procrustes', 'ridge' or 'residual_mlp'",
        f"migrations.yaml:11: {at}.train.epochs: must not be true or false (YAML also reads yes, no, on and off so): "
        "put text in quotes",
        f"migrations.yaml:12: {at}.train.batch_size: must be a valid integer",
        f"migrations.yaml:14: {at}.verify.label: must hold payload fields in braces, such as "
        '"{path}", "{shop}/{id}.jpg" or "{metadata.source}"',
        f'migrations.yaml:15: {at}.verify.gate.metirc: unknown key; did you mean "metric"?',
        f"migrations.yaml:15: {at}.verify.gate.min_gain: must be a finite number",
        f"migrations.yaml:16: {at}.verify.max_age: must be a duration: a number and s, m, h or d, such as 7d",
        f"migrations.yaml:17: {at}.rollout.canary: must rise from step to step and end with 100, "
        "such as [1, 10, 50, 100]",
        f'migrations.yaml:18: {at}.backfil: unknown key; did you mean "backfill"?',
        f"migrations.yaml:19: migrations.Bad Name: {name}",
        'migrations.yaml:20: ledgr: unknown key; did you mean "ledger"?',
    ]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "chunk_size: 1000",
            "frequency: 1",
            "13: migrations.digits-v2.backfill.frequency: unknown key; known are chunk_size, ",
        ),
        ("weights: old.safetensors, ", "", "8: migrations.digits-v2.old_encoder.weights: missing"),
        ("    train:", "    # train:", "5: migrations.digits-v2.train: missing, and new_encoder has no weights"),
        ("digits-v2", "../x", "5: migrations.../x: a migration's name has"),
        ("digits-v2", "12", "5: migrations.12: this key is not text: put it in quotes"),
        ("digits-v2", "[a]", "5: migrations.?: this key is not text"),
        (
            "artifacts: ./artifacts",
            "version: 1",
            "3: version: duplicate key; remove it or the one on line 1",
        ),
        ("{kind: faiss, path: ./gallery}", "x", "6: migrations.digits-v2.store: must be a mapping of keys to values"),
        ("{kind: faiss, path: ./gallery}", "", "6: migrations.digits-v2.store: must be a mapping of keys to values"),
        ("kind: faiss, ", "", "6: migrations.digits-v2.store.kind: missing"),
        ("sqlite:///migrator.db", "sqlite://", "2: ledger: must be a database URL: sqlite:///file.db, or postgresql"),
        ("sqlite:///migrator.db", '"sqlite:///:memory:"', "2: ledger: must be a database URL"),
        ("sqlite:///migrator.db", "migrator.db", "2: ledger: must be a database URL"),
        ("train.csv", "s3://b/train.csv", "10: migrations.digits-v2.train.items: must be a local path; a URL cannot"),
        ("train.csv", "12", "10: migrations.digits-v2.train.items: must be the path of a local file or folder"),
        ("train.csv", '""', "10: migrations.digits-v2.train.items: must be the path of a local file or folder"),
        ("train.csv", "~nobody-here/x", "10: migrations.digits-v2.train.items: begins with the home folder of a user"),
        ("./images", '"a\\0b"', "7: migrations.digits-v2.images.root: must be the path"),
        ('"{path}"', '"{path!r}"', "7: migrations.digits-v2.images.uri: must hold payload fields in braces"),
        ('"{path}"', '"{path:>9}"', "7: migrations.digits-v2.images.uri: must hold payload fields in braces"),
        ('"{path}"', '"{path"', "7: migrations.digits-v2.images.uri: must hold payload fields in braces"),
        ('"{path}"', '"{}"', "7: migrations.digits-v2.images.uri: must hold payload fields in braces"),
        ("[1, 10, 50, 100]", "[1, 10]", "12: migrations.digits-v2.rollout.canary: must rise"),
        ("[1, 10, 50, 100]", "[]", "12: migrations.digits-v2.rollout.canary: must have at least 1 item"),
        (
            "[1, 10, 50, 100]",
            "[0, 100]",
            "12: migrations.digits-v2.rollout.canary[0]: must be greater than or equal to 1",
        ),
        ("epochs: 10", "epochs: 1.5", "10: migrations.digits-v2.train.epochs: must be a valid integer"),
        ("epochs: 10", "epochs: 0", "10: migrations.digits-v2.train.epochs: must be greater than or equal to 1"),
        ("epochs: 10", f"epochs: {'9' * 5000}", "10: migrations.digits-v2.train.epochs: cannot be read as int"),
        ("epochs: 10", "epochs: !!bool maybe", "10: migrations.digits-v2.train.epochs: cannot be read as bool"),
        ("epochs: 10", "epochs: !!python/name:os.system 1", "10: migrations.digits-v2.train.epochs: YAML tags are not"),
        (
            MODEL,
            "storred",
            "8: migrations.digits-v2.old_encoder: must be a mapping of keys to values, or the word stored",
        ),
        (MODEL, "", "8: migrations.digits-v2.old_encoder: must be a mapping of keys to values, or the word stored"),
        (MODEL, "[stored]", "8: migrations.digits-v2.old_encoder: must be a mapping of keys to values, or the word"),
        ("train.csv", "{from: files}", "10: migrations.digits-v2.train.items.from: must be 'store' or 'folders'"),
        (
            "train.csv",
            '{from: folders, label: "{c}"}',
            "10: migrations.digits-v2.train.items.label: is for items of the store",
        ),
        ("arch: resnet18", "arch: 18", "9: migrations.digits-v2.new_encoder.arch: must be a valid string"),
        ("arch: resnet18", "arch: no", "9: migrations.digits-v2.new_encoder.arch: must not be true or false"),
        ("arch: resnet18", 'arch: "\\ud800"', "9: migrations.digits-v2.new_encoder.arch: must be a valid string"),
        ("./gallery}", f"./g, x: {'[' * 30}{']' * 30}}}", "6: migrations.digits-v2.store: is nested too deeply"),
        (
            "migrations:\n",
            "migrations: {}\nx:\n",
            "4: migrations: holds no migration; `migrator init` writes an example",
        ),
    ],
)
def test_one_problem(tmp_path, old, new, problem):
    found = problems(tmp_path, EXAMPLE.replace(old, new, 1))
    assert any(line.startswith(f"migrations.yaml:{problem}") for line in found), found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "migrations.yaml: is empty: run `migrator init` for an example"),
        ("# nothing\n", "migrations.yaml: is empty"),
        ("- 1\n", "migrations.yaml:1: must be a mapping of keys to values"),
        ("just text", "migrations.yaml:1: must be a mapping of keys to values"),
        ("a: 1\nb: [1,\n", "migrations.yaml:3:1: is not YAML: while parsing a flow "),
        ("a: b: c\n", "migrations.yaml:1:5: is not YAML: mapping values are not allowed here"),
        ("a:\n\t- 1\n", "migrations.yaml:2:1: is not YAML: while scanning for the next token"),
        ("a: 1\n---\nb: 2\n", "migrations.yaml:2:1: is not YAML: expected a single document"),
        ("a: &x [1]\nb: *x\n", "migrations.yaml:2:4: is not YAML: aliases (*name) are not supported"),
        (
            "store: {key: ${KEY}}",
            "is not YAML: while parsing a flow mapping, expected ',' or '}', but got '{'; inside { }",
        ),
        ("a: 1\nb: \x07\n", "migrations.yaml:2: is not YAML: it holds a control character"),
        (b"a: 1\nb: \xff\n", "migrations.yaml:2: is not UTF-8 text"),
        (b"\xff\xfea\x00", "migrations.yaml:1: is not UTF-8 text"),
        ("[" * 5000, "migrations.yaml: is nested too deeply"),
        ("#" * (1 << 20) + "\n", "migrations.yaml: is larger than 1 MiB"),
    ],
)
def test_what_is_not_even_a_mapping(tmp_path, text, problem):
    found = problems(tmp_path, text)
    assert len(found) == 1
    assert problem in found[0]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"no-such.yaml: no such file: run `migrator init`"):
        load_config(tmp_path / "no-such.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(Path("a\0b"))


def test_a_byte_order_mark_is_skipped(tmp_path):
    assert load_config(write(tmp_path, b"\xef\xbb\xbf" + EXAMPLE.encode())).version == 1


def test_keys_that_would_break_the_line_are_escaped(tmp_path):
    found = problems(tmp_path, EXAMPLE + '"a\\nb\\e[31m": 1\n')
    assert found == [
        "migrations.yaml:14: a\\nb\\x1b[31m: unknown key; known are version, ledger, artifacts, migrations"
    ]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_whatever_the_file_holds_the_answer_is_a_config_or_problems(tmp_path, data):
    """Random damage to a good file: a piece replaced by YAML's own characters or by anything at all."""
    start = data.draw(st.integers(0, len(EXAMPLE)))
    end = data.draw(st.integers(start, min(len(EXAMPLE), start + 40)))
    piece = data.draw(
        st.text(st.sampled_from(" \n:-{}[],&*!|>'\"%@`#?$~.019azé\t\r\u2028\0"), max_size=12) | st.text(max_size=5)
    )
    path = write(tmp_path, (EXAMPLE[:start] + piece + EXAMPLE[end:]).encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(load_config(path), Config)
    except ConfigError as error:
        for line in str(error).split("\n"):
            assert line.startswith(f"{path}:")
            assert line.isprintable(), line


# --- choosing, template, schema --------------------------------------------------------------------------------------


def test_find_migration(tmp_path):
    config = load_config(write(tmp_path, EXAMPLE))
    assert find_migration(config, None) == find_migration(config, "digits-v2")
    assert find_migration(config, None) == ("digits-v2", config.migrations["digits-v2"])
    with pytest.raises(UsageProblem, match=r'holds no migration "digit-v2"; did you mean "digits-v2"\?'):
        find_migration(config, "digit-v2")
    with pytest.raises(UsageProblem, match="known are digits-v2"):
        find_migration(config, "zzz")
    entry = EXAMPLE.partition("migrations:\n")[2]
    two = load_config(write(tmp_path, EXAMPLE + entry.replace("digits-v2", "other")))
    with pytest.raises(UsageProblem, match="holds 2 migrations: name one of digits-v2, other"):
        find_migration(two, None)
    assert find_migration(two, "other")[0] == "other"


def conforms(value: Any, rule: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value obeys a JSON Schema, for the keywords that ours uses; any other keyword fails the test."""
    types: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "number": (int, float),
    }
    checks = {
        "type": lambda t: (
            value is None if t == "null" else isinstance(value, types[t]) and (t == "boolean" or value is not True)
        ),
        "$ref": lambda ref: conforms(value, root["$defs"][ref.rpartition("/")[2]], root),
        "anyOf": lambda rules: any(conforms(value, one, root) for one in rules),
        "oneOf": lambda rules: sum(conforms(value, one, root) for one in rules) == 1,
        "const": lambda const: value == const,
        "not": lambda sub: not conforms(value, sub, root),
        "enum": lambda known: value in known,
        "required": lambda keys: not isinstance(value, dict) or set(keys) <= set(value),
        "properties": lambda known: all(conforms(value[k], known[k], root) for k in known if k in value),
        "additionalProperties": lambda extra: extra is True or set(value) <= set(rule.get("properties", {})),
        "patternProperties": lambda names: all(
            any(re.search(name, key) and conforms(inner, sub, root) for name, sub in names.items())
            for key, inner in value.items()
        ),
        "minProperties": lambda n: len(value) >= n,
        "items": lambda sub: all(conforms(inner, sub, root) for inner in value),
        "prefixItems": lambda subs: all(conforms(inner, sub, root) for inner, sub in zip(value, subs, strict=False)),
        "minItems": lambda n: len(value) >= n,
        "maxItems": lambda n: len(value) <= n,
        "pattern": lambda pattern: re.search(pattern, value) is not None,
        "minLength": lambda n: len(value) >= n,
        "maxLength": lambda n: len(value) <= n,
        "minimum": lambda n: value >= n,
        "maximum": lambda n: value <= n,
        "exclusiveMinimum": lambda n: value > n,
        "exclusiveMaximum": lambda n: value < n,
    }
    notes = {"title", "description", "default", "format", "$defs", "$schema"}
    order = ["type", *(set(rule) - notes - {"type"})]  # the type first: other keywords presume it
    return all(checks[keyword](rule[keyword]) for keyword in order if keyword in rule)


def test_the_schema_accepts_what_loads(tmp_path):
    rules = json_schema()
    json.dumps(rules)
    for text in (
        EXAMPLE,
        TEMPLATE,
        edited("items: train.csv", 'items: {from: store, label: "{c}"}'),
        edited("items: train.csv", "items: {from: folders}"),
        edited(MODEL, "stored"),
    ):
        load_config(write(tmp_path, text))
        assert conforms(yaml.safe_load(text), rules, rules)
    other = edited("{kind: faiss, path: ./gallery}", "{kind: qdrant, url: x, collection: c}")
    assert conforms(yaml.safe_load(other), rules, rules)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("version: 1", "version: 2"),
        ("backfill:", "backfil:"),
        ("weights: old.safetensors, ", ""),
        ("digits-v2", "Digits"),
        ("epochs: 10", "epochs: 0"),
        ("map@100", "mop@100"),
        ("in_place", "sideways"),
        ("[1, 10, 50, 100]", "[0, 100]"),
        ("sample: 500", "max_age: soon"),
        ("kind: faiss, path", "kind: faiss, pth"),
        ("kind: faiss, path: ./gallery", "kind: qdrant, engine: fast, path: ./q, collection: c"),
    ],
)
def test_the_schema_refuses_what_does_not_load(tmp_path, old, new):
    text = edited(old, new)
    problems(tmp_path, text)
    assert not conforms(yaml.safe_load(text), json_schema(), json_schema())


def test_the_template_is_complete(tmp_path):
    config = load_config(write(tmp_path, TEMPLATE))
    name, migration = find_migration(config, None)
    assert name == "my-collection-v2"
    assert migration.new_encoder.weights is None
    # Its commented lines are right too: without their mark they load as well.
    uncommented = re.sub(r"^(\s+)# (\w+: )", r"\1\2", TEMPLATE, flags=re.MULTILINE)
    changed = load_config(write(tmp_path, uncommented)).migrations[name]
    assert changed.train is not None
    assert isinstance(changed.old_encoder, OldEncoder)
    assert changed.new_encoder.weights == tmp_path / "new.safetensors"
    assert (changed.train.flip, changed.backfill.nice, changed.old_encoder.std) == (True, 1.0, (0.229, 0.224, 0.225))


def test_reading_a_configuration_loads_nothing_heavy():
    heavy = {"torch", "numpy", "sqlalchemy", "timm", "faiss"}
    code = f"import sys, migrator.config; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("key", ["<", "<faiss>", "[key]"])
def test_an_unknown_key_may_look_like_anything(tmp_path, key):
    (found,) = problems(tmp_path, EXAMPLE.replace("migrations:", f'"{key}": 1\nmigrations:', 1))
    assert f"{key}: unknown key; known are version, ledger" in found


STORE = "{kind: faiss, path: ./gallery}"


@pytest.mark.parametrize(
    ("store", "problem"),
    [
        ("{kind: faiss}", "path: missing: the folder with index.faiss and items.parquet, or give index and items"),
        ("{kind: faiss, index: a.index}", "path: missing, and so is items: give path alone, or both index and items"),
        ("{kind: faiss, items: m/*.parquet}", "path: missing, and so is index: give path alone, or both"),
        ("{kind: faiss, path: g, index: a.index}", "path: is a folder, and index and items name files: keep the one"),
        ("{kind: faiss, path: g, items: m/*.parquet}", "path: is a folder, and index and items name files"),
        ("{kind: faiss, index: a, items: []}", "items: must be the path of a local file or folder"),
        ("{kind: faiss, index: a, items: [3]}", "items: must be the path of a local file or folder"),
        (
            "{kind: faiss, index: a, items: 's3://b/*.parquet'}",
            "items: must be a local path; a URL cannot be read here",
        ),
        ("{kind: faiss, path: g, vectors: true}", "vectors: must not be true or false"),
    ],
)
def test_a_faiss_store_is_a_folder_or_files(tmp_path: Path, store: str, problem: str) -> None:
    (line,) = problems(tmp_path, edited(STORE, store))
    assert line.startswith(f"migrations.yaml:6: migrations.digits-v2.store.{problem}")


def test_patterns_start_from_the_folder_of_the_file_whatever_it_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "shop [old]"
    (folder / "metadata").mkdir(parents=True)
    (folder / "metadata" / "metadata_0.parquet").touch()
    store = '{kind: faiss, index: clip/image.index, items: "./metadata/*.parquet", vectors: [a.npy, "emb/*.npy"]}'
    migration = load_config(write(folder, edited(STORE, store))).migrations["digits-v2"]
    found = migration.store.settings()
    assert found.keys() == {"kind", "index", "items", "vectors"}
    assert found["index"] == str(folder / "clip" / "image.index")
    (pattern,) = found["items"]
    assert glob.glob(pattern) == [str(folder / "metadata" / "metadata_0.parquet")]  # noqa: PTH207 - a pattern
    assert found["vectors"][0] == str(folder / "a.npy")
    absolute = edited(STORE, store.replace("./metadata", "/srv/metadata"))
    assert load_config(write(folder, absolute)).migrations["digits-v2"].store.settings()["items"] == [
        "/srv/metadata/*.parquet"
    ]


# --- leases and requests ---------------------------------------------------------------------------------------------


def on_a_server(lease: int, timeout: int) -> str:
    text = edited(
        "{kind: faiss, path: ./gallery}", f"{{kind: qdrant, url: http://q, collection: c, timeout: {timeout}}}"
    )
    return text.replace("backfill: {", f"backfill: {{lease: {lease}, ")


def test_a_lease_outlasts_the_requests_that_are_sent_under_it(tmp_path):
    (problem,) = problems(tmp_path, on_a_server(lease=50, timeout=30))
    assert "lease is 50 s and must be twice store.timeout (30 s) at least" in problem
    assert problem.endswith("set lease to 60, or store.timeout to 25")
    # What it advises is taken.
    for lease, timeout in ((60, 30), (50, 25)):
        (migration,) = load_config(write(tmp_path, on_a_server(lease, timeout))).migrations.values()
        assert migration.backfill.lease == lease


def test_a_store_without_requests_needs_no_long_lease(tmp_path):
    load_config(write(tmp_path, edited("backfill: {", "backfill: {lease: 5, ")))
