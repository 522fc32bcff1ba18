"""`migrator init`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from migrator.cli.common import say
from migrator.errors import UsageProblem

PATH_KEYS = ("path", "index", "items", "vectors")
"""Options that name local files: relative to the working directory here, to the file's folder in the file."""


@click.command("init")
@click.argument("path", type=click.Path(path_type=Path), default=Path("migrations.yaml"))
@click.option("--store", "kind", metavar="KIND", help="Draft the file from a collection: faiss, milvus, qdrant.")
@click.option("--path", "store_path", metavar="FOLDER", help="Folder of a FAISS gallery or of a local Qdrant.")
@click.option("--index", metavar="FILE", help="FAISS: an index file anywhere; with --items.")
@click.option("--items", metavar="GLOB", help="FAISS: the Parquet files that belong to --index.")
@click.option("--vectors", metavar="GLOB", help="FAISS: .npy files with the original vectors.")
@click.option("--uri", help="Milvus: http(s)://host:port, or the file of a Milvus Lite.")
@click.option("--url", help="Qdrant: http(s)://host:port.")
@click.option("--collection", metavar="NAME", help="Name or alias of the collection.")
@click.option("--vector", metavar="NAME", help="The vector field, where there are several.")
@click.option(
    "--option",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    help="Any other key of `store`, such as 'api_key=${QDRANT_API_KEY}'; may be repeated.",
)
def command(path: Path, kind: str | None, options: Sequence[str], **given: str | None) -> None:
    """Write a commented migrations.yaml to begin with.

    With --store the collection is opened, and what it says of itself (fields, dimension, metric, the fields of image
    and label) is filled in; nothing in it is changed. Without, a commented template is written. An existing file is
    never overwritten.
    """
    if path.exists():
        raise UsageProblem(f"{path} is there already: remove it, or give another path")
    if kind is None:
        if options or any(value is not None for value in given.values()):
            raise UsageProblem("these options describe a store: name its kind with --store faiss, milvus or qdrant")
        from migrator.config.template import TEMPLATE

        _write(path, TEMPLATE)
        say(f"wrote {path}: fill it in, then `migrator config` checks it and `migrator plan` begins")
        return
    from migrator.config_from_store import draft_config

    draft = draft_config(_settings(kind, given, options, path), path)
    _write(path, draft.text)
    say(f"collection {draft.collection}")
    say(f"wrote {path}: fill in {', '.join(draft.to_fill_in)}, then `migrator config` checks it")


def _settings(kind: str, given: dict[str, str | None], options: Sequence[str], path: Path) -> dict[str, Any]:
    """The keys of `store`, as they are to be written into the file at `path`."""
    settings: dict[str, Any] = {"kind": kind}
    for name, value in given.items():
        if value is not None:
            key = name.removeprefix("store_")
            settings[key] = _from_folder_of(path, value) if key in PATH_KEYS else value
    if kind == "milvus" and "://" not in settings.get("uri", "://"):
        settings["uri"] = _from_folder_of(path, settings["uri"])
    for option in options:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise UsageProblem(f"--option {key}: write KEY=VALUE")
        settings[key] = int(value) if value.isdecimal() else {"true": True, "false": False}.get(value, value)
    return settings


def _from_folder_of(file: Path, value: str) -> str:
    """A path from the working directory as seen from the folder of `file`; one with variables, or ~, stays."""
    if "${" in value or value.startswith("~") or Path(value).is_absolute():
        return value
    return "./" + os.path.relpath(Path(value).absolute(), file.absolute().parent)


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageProblem(f"{path} is there already: remove it, or give another path") from None
    except OSError as error:
        raise UsageProblem(f"{path} cannot be written: {error.strerror}") from error
