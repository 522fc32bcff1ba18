"""The `migrations.yaml` that `migrator init --store` writes: what a collection says of itself is filled in, and what
only its owner knows is named."""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from migrator.config import read_store
from migrator.formatting import sanitized
from migrator.plan.capabilities import recommend

if TYPE_CHECKING:
    from migrator.adapters.base import Capabilities, CollectionInfo, ItemId, Payload

SAMPLE = 200
"""Items whose payloads are read to find the image field and the label field."""
MIN_IMAGE_SHARE = 0.5
"""Share of the sampled values that must end like an image file."""
LABEL_NAMES = ("category", "class", "label", "kind", "class_name", "label_name", "categories", "classes", "labels")
"""A field is taken for the label by its name only: few distinct values alone prove nothing about relevance."""
_PLAIN = re.compile(r"[A-Za-z0-9_./-]+")


@dataclass(frozen=True, slots=True)
class Draft:
    """A configuration to begin with."""

    text: str
    to_fill_in: tuple[str, ...]
    """Keys that the collection does not hold, such as `images.root`."""
    collection: str
    """The collection in a few words."""


@dataclass(frozen=True, slots=True)
class _Images:
    uri: str | None
    root: str | None
    example: str | None


def draft_config(settings: Mapping[str, Any], file: Path) -> Draft:
    """Opens the collection that `settings` (keys of `store:`, as they are to be written) describe, and drafts `file`.

    Reads the description and a sample of payloads; changes nothing. Raises ConfigError for settings that a file may
    not hold, and what `migrator.adapters.registry.open_store` raises.
    """
    from migrator.adapters.registry import open_store

    section = _mapping(settings)
    store = open_store(read_store(section, file).settings(), write=False)
    try:
        info, can = store.describe(), store.capabilities
        page = store.read_payloads(store.sample(SAMPLE, seed=0))
    finally:
        store.close()
    payloads = page.payloads or []
    images = _find_images(page.ids, payloads, file.absolute().parent)
    text, to_fill_in = _write(section, info, can, images, _find_label(payloads))
    summary = f"{sanitized(info.name, 200)}: {info.count} items, {info.dim}-d, metric {info.metric}"
    return Draft(text, to_fill_in, summary)


# --- what the payloads say ------------------------------------------------------------------------------------------


def _fields(payload: Payload, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value of a payload with its name as a template takes it, `metadata.source` for a nested one."""
    for name, value in payload.items():
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            continue
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _columns(payloads: Sequence[Payload]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for payload in payloads:
        for name, value in _fields(payload):
            columns.setdefault(name, []).append(value)
    return columns


def _find_images(ids: Sequence[ItemId], payloads: Sequence[Payload], folder: Path) -> _Images:
    """The field that holds the image's place, and the folder that these places start from, where it can be derived."""
    from migrator.trainer.images.source import image_suffixes

    columns = {**_columns(payloads), "id": list(ids)}
    suffixes = tuple(image_suffixes())
    found: dict[str, list[str]] = {}
    for name, values in columns.items():
        places = [value for value in values if isinstance(value, str) and value.lower().endswith(suffixes)]
        if len(places) >= MIN_IMAGE_SHARE * max(1, len(payloads)):
            found[name] = places
    if not found:
        return _Images(None, None, None)
    name, places = max(found.items(), key=lambda item: len(item[1]))
    return _Images(f"{{{name}}}", _find_root(places, folder), places[0])


def _find_root(places: Sequence[str], folder: Path) -> str | None:
    """The folder or URL below which all places lie: what absolute ones share, or a folder here that has the files."""
    if all("://" in place or place.startswith("/") for place in places):
        shared = posixpath.commonprefix([place.rpartition("/")[0] + "/" for place in places]).rpartition("/")[0]
        return shared if re.fullmatch(r"(\w+:/)?/[^/].*", shared, re.DOTALL) else None
    nearby = (folder / "images", folder, folder.parent / "images")
    for root in nearby:
        if all(".." not in place.split("/") and (root / place).is_file() for place in places):
            return "." if root == folder else f"./{os.path.relpath(root, folder)}"
    return None


def _find_label(payloads: Sequence[Payload]) -> tuple[str, str] | None:
    """A field named like a label with values that repeat, and what the sample shows of it."""
    for name, values in sorted(_columns(payloads).items()):
        plain = [value for value in values if isinstance(value, str | int) and not isinstance(value, bool)]
        distinct = len(set(plain))
        if name.rpartition(".")[2].lower() in LABEL_NAMES and 2 <= distinct <= len(plain) / 2:
            return f"{{{name}}}", f"{distinct} values in a sample of {len(payloads)}"
    return None


# --- what is written -------------------------------------------------------------------------------------------------


def _write(
    section: str, info: CollectionInfo, can: Capabilities, images: _Images, label: tuple[str, str] | None
) -> tuple[str, tuple[str, ...]]:
    strategy, why = recommend(can, same_dim=True)
    schema = ", ".join(f"{name} {kind}" for name, kind in info.schema.items()) or "none"
    to_fill_in = [
        *(["images.uri"] if images.uri is None else []),
        *(["images.root"] if images.root is None else []),
        "old_encoder",
        "new_encoder",
    ]
    lines = [
        "# Drafted by `migrator init` from the collection itself. `migrator config` names what is still to fill in,",
        "# `migrator init OTHER.yaml` without --store writes every key with its explanation.",
        "version: 1",
        "",
        "migrations:",
        f"  {_migration_name(info)}:",
        f"    # {sanitized(info.server, 100)}: {info.count} items, {info.dim}-d, metric {info.metric}, "
        f"index {sanitized(info.index, 200)}",
        f"    # fields: {sanitized(schema, 900)}",
        f"    store: {section}",
        "",
        "    images:",
        f"      uri: {_scalar(images.uri)}  # for instance {sanitized(images.example or '', 200)}"
        if images.uri is not None
        else '      # uri: "{path}"                 # to fill in: no field holds names of image files',
        f"      root: {_scalar(images.root.replace('$', '$$'))}  # where these places start; nothing outside it is read"
        if images.root is not None
        else "      # root: ./images                # to fill in: the folder or URL where these places start",
        "",
        "    old_encoder:                      # to fill in: the model that made the stored vectors, or: stored",
        f"      dim: {info.dim}",
        "      # arch: resnet50",
        "      # weights: ./old.safetensors",
        "      # image_size: 224",
        "",
        "    new_encoder:                      # to fill in: the model to move to",
        f"      dim: {info.dim}",
        "      # arch: resnet50                # then `train` makes the weights",
        "      # weights: ./new.safetensors    # or a finished one",
        "      # image_size: 224",
        "    # train: {items: {from: store" + (f", label: {_scalar(label[0])}" if label else "") + "}, method: advbct}",
        "",
        "    verify:",
        f"      label: {_scalar(label[0])}  # {label[1]}: items of one value are relevant to one another"
        if label
        else '      # label: "{category}"           # the field whose equal values make items relevant to one another',
        "      sample: 500",
        "",
        "    rollout:",
        f"      strategy: {strategy}  # {sanitized(why, 200)}",
    ]
    return "\n".join(lines) + "\n", tuple(to_fill_in)


def _migration_name(info: CollectionInfo) -> str:
    plain = re.sub(r"[^a-z0-9._-]+", "-", Path(info.name).name.lower()).strip("-._")[:60]
    return f"{plain or 'collection'}-v2"


def _scalar(value: Any) -> str:
    """A value as YAML inside `{ }`: plain where YAML reads it back as the same, else in double quotes."""
    if not isinstance(value, str):
        return json.dumps(value)
    plain = _PLAIN.fullmatch(value) is not None and yaml.safe_load(value) == value
    return value if plain else json.dumps(value, ensure_ascii=False)


def _mapping(settings: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {_scalar(value)}" for key, value in settings.items()) + "}"
