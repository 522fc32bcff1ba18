"""Settings of a collection: what a copy is created with, and where two collections differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from migrator.adapters.qdrant.points import STAMP

UNSET = object()


def set_only(description: Any) -> Any:
    """A description without the settings that are not set."""
    if isinstance(description, Mapping):
        return {name: set_only(value) for name, value in description.items() if value is not None}
    return description


def creation(config: Mapping[str, Any], *, without: set[str]) -> dict[str, Any]:
    """The settings of a description under the names that `CreateCollection` has for them."""
    settings = {**config["params"], **{name: value for name, value in config.items() if name != "params"}}
    settings["optimizers_config"] = settings.pop("optimizer_config")
    return {name: value for name, value in settings.items() if name not in without}


def late_settings(models: Any) -> set[str]:
    """Those that only an update of a collection can say."""
    return set(models.CollectionParamsDiff.model_fields) - set(models.CreateCollection.model_fields)


def comparable(description: Mapping[str, Any], vector: str) -> dict[str, Any]:
    """Each setting under its path, but for the length of `vector` and for what counts points."""
    config = {**description["config"]}
    if not config.get("metadata"):
        config.pop("metadata", None)
    found = dict(flat(config, ""))
    for length in {f"params.vectors.{vector}.size", *([] if vector else ["params.vectors.size"])}:
        found.pop(length, None)
    for field, index in description["payload_schema"].items():
        if field != STAMP:
            params = {name: value for name, value in index.get("params", {}).items() if name != "type"}
            found |= flat({"data_type": index["data_type"], **params}, f"payload index {field}")
    return found


def flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested settings, each with its path."""
    if isinstance(value, Mapping) and value:
        for name, each in value.items():
            yield from flat(each, f"{path}.{name}" if path else name)
    else:
        yield path, value
