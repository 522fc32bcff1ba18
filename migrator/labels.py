"""The classes of items, from their payloads: what verification, training and the order of the backfill go by."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from migrator.errors import ConfigError
from migrator.formatting import quoted
from migrator.trainer.images.templates import NotText, parse

if TYPE_CHECKING:
    from migrator.adapters.base import ItemId, Payload
    from migrator.project import Project

Tags: TypeAlias = tuple[str, ...]
"""The classes of a query or an item: one, none, or where the field holds a list several."""


def tags_of(template: str, item: ItemId, payload: Payload) -> Tags:
    """The classes of an item: the template with payload fields and {id} put in, once for each value of a list.

    Empty where a field is missing, null, no finite number, or an empty list. Raises `NotText` for a structure.
    """
    return parse(template).fill_each({**payload, "id": item})


def label_of(template: str, item: ItemId, payload: Payload) -> str:
    """The one class of an item; empty where it has none or several, and for what is no text."""
    try:
        tags = tags_of(template, item, payload)
    except NotText:
        return ""
    return tags[0] if len(tags) == 1 else ""


def training_label(project: Project, template: str, item: ItemId, payload: Payload) -> str:
    """The class of an item to train on; empty where it has none. Raises `ConfigError` for a list or a structure."""
    try:
        return (parse(template).fill({**payload, "id": item}) or "").strip()
    except NotText as problem:
        raise ConfigError(
            f"{project.config.path}: migrations.{project.name}.train.items.label: item {item!r}: {problem}; training "
            "needs one class for each item: name a field with one value, or list path and label in a file"
        ) from None


def tags_or_refuse(project: Project, item: ItemId, payload: Payload) -> Tags:
    """The classes of an item by verify.label. Raises `ConfigError` for what can be no class."""
    try:
        return tags_of(project.settings.verify.label or "", item, payload)
    except NotText as problem:
        raise ConfigError(
            f"{project.config.path}: migrations.{project.name}.verify.label: item {quoted(item)}: {problem}; a "
            "class is a value, or a list of values"
        ) from None
