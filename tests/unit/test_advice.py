"""What messages advise can be done: every key, value and option that they name exists and is accepted."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import pytest
import yaml

from migrator.cli import VERBS, cli
from migrator.config import Migration, Section, Train, load_config
from migrator.trainer.data.batches import held_out_split
from migrator.trainer.errors import TrainingProblem

ROOT = Path(__file__).parents[2]
HOLE = "\x00"
"""Where a message has a value put in."""
SECTIONS = tuple(Migration.model_fields)
KEY = re.compile(rf"\b(?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+\b(?!\()")
TO = re.compile(rf"({KEY.pattern}) to ([\w{HOLE}.]+)")
# What a message puts in: the least and the greatest that it can be.
PUT_IN: dict[str, list[Any]] = {
    "store.timeout": [2, 25],
    "new_encoder.dim": [1, 65_536],
    "old_encoder.dim": [1, 65_536],
    "train.batch_size": [2, 65_536],
}
SUFFIXES = {"log", "safetensors", "json", "npy", "pt", "csv", "parquet", "index", "next"}
# Of other programs, or a variable of a style sheet.
FOREIGN = {"--upgrade", "--ink", "--faint", "--grid", "--series-", "--no-deps", "--config-file"}


def messages() -> Iterator[tuple[str, str]]:
    """File and text of every string, with holes where values are put in, docstrings left aside."""
    for package in ("migrator", "trainer", "adapters"):
        for file in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(file.read_text())
            plain = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
            plain |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
                    yield str(file.relative_to(ROOT)), "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in plain:
                    yield str(file.relative_to(ROOT)), node.value


def known(key: str) -> bool:
    """Whether the configuration of a migration has a key, spelled with dots."""
    sections: list[type[Section]] = [Migration]
    for step in key.split("."):
        found: list[Any] = []
        for section in sections:
            for name, field in section.model_fields.items():
                if step in (name, field.alias):
                    found.append(field.annotation)
        if not found:
            return False
        sections = [kind for annotation in found for kind in kinds_in(annotation)]
    return True


def kinds_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [kind for inner in get_args(annotation) for kind in kinds_in(inner)]


def accepted(folder: Path, key: str, value: Any) -> None:
    """Loads a configuration in which a key has this value."""
    encoder = {"arch": "resnet10t", "dim": 128, "image_size": 32}
    settings: dict[str, Any] = {
        "store": {"kind": "faiss", "path": "./gallery"},
        "images": {"root": "./images"},
        "old_encoder": {**encoder, "weights": "old.safetensors"},
        "new_encoder": dict(encoder),
        "train": {"items": "train.csv"},
        "verify": {},
        "rollout": {"strategy": "shadow"},
        "backfill": {},
    }
    if "auto_id" in key or key == "store.timeout":
        settings["store"] = {"kind": "milvus", "uri": "http://host:19530", "collection": "products"}
    *steps, last = key.split(".")
    section = settings
    for step in steps:
        section = section.setdefault(step, {})
    section[last] = value
    file = folder / "migrations.yaml"
    file.write_text(yaml.safe_dump({"version": 1, "migrations": {"x": settings}}))
    load_config(file)


def test_every_key_that_a_message_names_is_a_key() -> None:
    named = {(file, key) for file, text in messages() for key in KEY.findall(text)}
    assert len({key for _, key in named}) > 20
    wrong = [(file, key) for file, key in sorted(named) if not known(key) and key.rpartition(".")[2] not in SUFFIXES]
    assert wrong == []


def advised() -> list[tuple[str, str]]:
    return sorted({(key, value.rstrip(".")) for _, text in messages() for key, value in TO.findall(text)})


WORDS = {"where", "the", "a", "to", "another", "that", "of", "its", "one", "say"}
"""They describe a value in place of naming it."""


@pytest.mark.parametrize(("key", "value"), [pair for pair in advised() if pair[1] not in WORDS])
def test_every_value_that_a_message_advises_is_accepted(tmp_path: Path, key: str, value: str) -> None:
    values = PUT_IN[key] if HOLE in value else [yaml.safe_load(value)]
    for each in values:
        accepted(tmp_path, key, each)


def test_single_images_of_each_class_can_be_trained_on_as_the_message_says(tmp_path: Path) -> None:
    labels = np.arange(40)
    with pytest.raises(TrainingProblem) as caught:
        held_out_split(labels, Train.model_fields["validation"].default, seed=0)
    (advice,) = TO.findall(str(caught.value))
    assert advice == ("train.validation", "0")
    accepted(tmp_path, *advice)
    train, held_out = held_out_split(labels, 0.0, seed=0)
    assert (len(train), len(held_out)) == (40, 0)


def options(command: click.Command) -> set[str]:
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


def test_every_option_that_a_message_names_is_one_of_its_command() -> None:
    context = click.Context(cli)
    commands = {verb: cli.get_command(context, verb) for verb in VERBS}
    of = {verb: options(command) | options(cli) | {"--help"} for verb, command in commands.items() if command}
    every = set().union(*of.values())
    wrong = []
    for file, text in messages():
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
            if flag not in every | FOREIGN:
                wrong.append((file, flag))
        for command in re.findall(r"`migrator ([^`]+)`", text):
            verb, *words = command.split()
            wrong += [(file, command) for word in words if word.startswith("--") and word not in of.get(verb, every)]
    assert wrong == []
