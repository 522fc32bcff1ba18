"""The pinned query set in the artifacts; a configuration that would draw another one is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from migrator.adapters.base import Store
from migrator.artifacts.files import LogFiles
from migrator.errors import PreconditionFailed
from migrator.formatting import quoted
from migrator.ledger import Migration
from migrator.project import Project
from migrator.verify.query_set.draw import draw_facts, draw_query_set, refuse_stored_instances
from migrator.verify.query_set.model import QuerySet, digest, from_body, to_body

if TYPE_CHECKING:
    from migrator.trainer.images.source import ImageSource

FILE = "query_set.json"
OLD_FILE = "questions.json"
"""Its name, and that of its one key, in migrations that were verified before ledger version 0007."""
FORMAT = 1


def pinned_query_set(
    project: Project, migration: Migration, store: Store, images: ImageSource, *, resample: bool = False
) -> QuerySet:
    """The migration's query set: the pinned one, else, and with `resample`, one drawn from the collection and pinned.

    Raises `PreconditionFailed` where the configuration or the file of queries is no longer what they were drawn from,
    and what `draw_query_set` and `read_pinned` raise.
    """
    refuse_stored_instances(project)
    found = None if resample else read_pinned(project, migration)
    if found is not None:
        _refuse_changes(project, found)
        return found
    query_set = draw_query_set(project, store, images)
    body = to_body(query_set)
    document = {"format": FORMAT, "checksum": digest(body), "query_set": body}
    query_set_files(project, migration).write(FILE, json.dumps(document).encode())
    return query_set


def read_pinned(project: Project, migration: Migration) -> QuerySet | None:
    """The a pinned query set as they were drawn, whatever the configuration says by now; None before the first draw.

    Raises `PreconditionFailed` for a file that is damaged, and `TemporarilyUnavailable`.
    """
    files, name = query_set_files(project, migration), FILE
    content = files.read(name)
    if content is None:
        files, name = old_files(project, migration), OLD_FILE
        content = files.read(name)
    if content is None:
        return None
    advice = (
        f"put it back from a backup, or draw a new query set with `migrator verify {project.name} --resample-queries`"
    )
    try:
        document = json.loads(content)
        version, body = document["format"], document[Path(name).stem]
        if version == FORMAT and document["checksum"] == digest(body):
            return from_body(body)
    except (ValueError, TypeError, KeyError, RecursionError):
        version = FORMAT
    if version != FORMAT:
        raise PreconditionFailed(
            f"{files.path(name)}: the query set is of format {quoted(version)}, not {FORMAT}: {advice}"
        )
    raise PreconditionFailed(f"{files.path(name)}: the query set is damaged: {advice}")


def query_set_files(project: Project, migration: Migration) -> LogFiles:
    """The folder in the artifacts that holds a migration's query set and its baseline."""
    return LogFiles(project.config.artifacts, project.name, "query-set", migration.key)


def old_files(project: Project, migration: Migration) -> LogFiles:
    """That folder as it was named before ledger version 0007."""
    return LogFiles(project.config.artifacts, project.name, "questions", migration.key)


def _refuse_changes(project: Project, query_set: QuerySet) -> None:
    file, then = project.settings.verify.queries, query_set.made_from
    sha256 = None
    if file is not None and then["queries"] is not None:
        sha256 = _sha256_of(file)
    current = draw_facts(project, sha256)
    day = query_set.drawn_at[:10]
    changes = []
    if file is None or then["queries"] is None:
        if current["queries"] != then["queries"]:
            names = ["not set" if made["queries"] is None else made["queries"]["file"] for made in (current, then)]
            changes.append(f"verify.queries is {names[0]}, and was {names[1]} when the query set of {day} was drawn")
    elif sha256 is None:
        changes.append(f"{file}, the file that the query set of {day} was drawn from, cannot be read")
    elif sha256 != then["queries"]["sha256"]:
        short = f"sha256 {then['queries']['sha256'][:8]}... -> {sha256[:8]}..."
        changes.append(f"{file} is no longer the file that the query set of {day} was drawn from ({short})")
    for key in ("label", "segment", "sample", "gallery", "seed", "uri"):
        if current[key] != then[key]:
            name = "images.uri" if key == "uri" else f"verify.{key}"
            old, new = ("not set" if value is None else quoted(value) for value in (then[key], current[key]))
            changes.append(f"{name} is {new}, and was {old} when the query set of {day} was drawn")
    if changes:
        raise PreconditionFailed(
            f"{'; '.join(changes)}: put it back, or draw a new query set with `migrator verify {project.name} "
            "--resample-queries`, which counts as a further interim analysis"
        )


def _sha256_of(file: Path) -> str | None:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None
