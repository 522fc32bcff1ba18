"""From a file to its `Config`: every problem is found in one go and named with file, line and key."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import yaml
from pydantic import (
    ValidationError,
)

from migrator.config.schema import (
    SECRET_KEY,
    STORES,
    URL_CREDENTIALS,
    Config,
    Migration,
    OtherStore,
    Store,
    store_kind,
)
from migrator.config.yaml_document import (
    Document,
    Loader,
    compose,
    printable,
    spell,
    wording,
)
from migrator.errors import ConfigError, UsageProblem


def load_config(path: Path) -> Config:
    """Reads and checks `migrations.yaml`. What it names need not exist yet.

    Raises `ConfigError` with a line for each problem.
    """
    node = compose(path)
    document = Document(path, os.environ)
    absolute = path.absolute()
    try:
        raw = document.value(node, ())
        config = Config.model_validate(raw, context={"folder": absolute.parent})
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_input=False):
            # The last place of an unknown key is the key, which may look like the tag of a union.
            end = len(detail["loc"]) - (detail["type"] == "extra_forbidden")
            above, key = detail["loc"][:end], detail["loc"][end:]
            at = (*(part for part in above if part != "[key]" and not str(part).startswith("<")), *key)
            tag = next((str(part) for part in above if part in STORES), None)
            document.report(at, wording(detail["type"], detail["msg"], at, tag))
    if document.problems:
        raise ConfigError("\n".join(text for _, text in sorted(document.problems.values())))
    config._path = absolute
    config._texts = document.texts
    return config


def read_store(text: str, file: Path) -> Store:
    """The section `store` written as `text`, as `load_config` would read it from `file`, which need not exist yet.

    Raises `ConfigError`, also for a secret that is written out: the file would keep it.
    """
    document = Document(file, os.environ)
    node = yaml.compose(text, Loader=Loader)
    assert node is not None
    raw = document.value(node, ())
    kind = store_kind(raw)
    problems = [problem.split(": ", 1)[1] for _, problem in document.problems.values()]
    for key, value in raw.items():
        written = str(document.texts.get((key,), value))
        if (SECRET_KEY.search(key) or URL_CREDENTIALS.search(written)) and "${" not in written:
            problems.append(f"{key}: a secret belongs in the environment: write '${{NAME}}', in single quotes")
    if not problems:
        try:
            return STORES.get(kind, OtherStore).model_validate(raw, context={"folder": file.absolute().parent})
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_input=False):
                # As if it stood in a file: the words for an unknown key depend on the section.
                at = ("migrations", "", "store", *detail["loc"])
                problems.append(f"{spell(detail['loc'])}: {wording(detail['type'], detail['msg'], at, kind)}")
    raise ConfigError("\n".join(f"store.{problem}" for problem in problems))


def find_migration(config: Config, name: str | None) -> tuple[str, Migration]:
    """The migration called `name`, or the only one of the file where no name is given.

    Raises `UsageProblem`.
    """
    known = list(config.migrations)
    if name is None and len(known) == 1:
        name = known[0]
    if name is None:
        raise UsageProblem(f"{config.path} holds {len(known)} migrations: name one of {', '.join(known)}")
    if name not in config.migrations:
        near = difflib.get_close_matches(name, known, n=1)
        advice = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known)}"
        raise UsageProblem(f'{config.path} holds no migration "{printable(name)}"; {advice}')
    return name, config.migrations[name]
