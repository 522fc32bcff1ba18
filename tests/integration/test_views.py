"""The ledger's views, in plain SQL, say what `migrator status --json` says: on both databases."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml

from migrator.project import Project
from tests.integration.test_ledger_postgres import make_database, server  # noqa: F401 - a fixture
from tests.unit.test_docs import code_blocks, section, table
from tests.world import NAME, World

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "ledger.md").read_text()
VIEWS = ["migrator_progress", "migrator_route", "migrator_clients", "migrator_failures", "migrator_history"]
Migrator = Callable[..., int]
Select = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(params=["sqlite", "postgresql"])
def select(request: pytest.FixtureRequest, world: World) -> Select:
    """Runs a query on the world's ledger through a driver alone, and gives its rows."""
    if request.param == "sqlite":
        path = world.folder / "migrator.db"

        def ask(query: str) -> list[dict[str, Any]]:
            with sqlite3.connect(path) as raw:
                raw.row_factory = sqlite3.Row
                rows = [dict(row) for row in raw.execute(query).fetchall()]
            raw.close()
            return rows

        return ask
    psycopg = pytest.importorskip("psycopg")
    url = make_database(request.getfixturevalue("server"), "views")
    document = yaml.safe_load(world.config.read_text())
    world.config.write_text(yaml.safe_dump({**document, "ledger": url}))
    given = sa.make_url(url)

    def ask_server(query: str) -> list[dict[str, Any]]:
        with psycopg.connect(
            host=given.query["host"], user=given.username, dbname=given.database, row_factory=psycopg.rows.dict_row
        ) as raw:
            return list(raw.execute(query).fetchall())

    return ask_server


def test_the_views_say_what_status_says(
    world: World, migrator: Migrator, select: Select, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.images / "00003.png").write_bytes(b"no image")
    world.configure(rollout__canary=[100])

    def compare() -> dict[str, Any]:
        capsys.readouterr()
        assert migrator("status", "--json") == 0
        status = json.loads(capsys.readouterr().out)
        (progress,) = select(f"SELECT * FROM migrator_progress WHERE migration = '{NAME}' AND latest = 1")
        same = (
            "collection", "strategy", "shadow", "stage", "state", "paused", "old_encoder", "new_encoder", "items_total",
            "items_done", "items_failed", "items_gone", "catch_up_passes",
        )  # fmt: skip
        assert {key: progress[key] for key in same} == {key: status[key] for key in same}
        assert bool(progress["old_kept"]) is status["old_kept"]
        chunks = {state: progress[f"chunks_{state}"] for state in ("pending", "leased", "done", "failed", "restored")}
        assert {state: number for state, number in chunks.items() if number} == status["chunks"]
        return dict(progress)

    assert migrator("plan") == 0
    assert compare()["items_total"] == 120, "from the plan, before there are chunks"
    for words in (["verify"], *(["rollout", "--stage", stage] for stage in ("prepare", "canary", "backfill"))):
        assert migrator(*words) == 0
    assert migrator("backfill", "--max-items", "30") == 0
    assert migrator("pause", "--reason", "peak") == 0
    progress = compare()
    assert (progress["items_failed"], progress["items_written"], progress["paused"]) == (1, 29, "peak")
    (failure,) = select("SELECT * FROM migrator_failures")
    assert (failure["migration"], failure["item"], failure["kind"], failure["state"]) == (NAME, "3", "image", "open")
    assert migrator("route", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    (row,) = select("SELECT * FROM migrator_route")
    listed = row["write_encoders"]
    row["write_encoders"] = json.loads(listed) if isinstance(listed, str) else listed
    shared = set(row) - {"migration", "changed_at"}
    assert {key: row[key] for key in shared} == {key: printed[key] for key in shared}
    history = select("SELECT * FROM migrator_history ORDER BY id")
    with Project.open(world.config) as project:
        assert [event["event"] for event in history] == [
            event.event for event in project.ledger.events(project.migration().id)
        ]
    assert {event["migration"] for event in history} == {NAME}
    assert migrator("resume") == 0
    assert migrator("rollback") == 0
    assert compare()["state"] == "rolled_back"
    assert migrator("plan") == 0
    assert compare()["state"] == "planned"
    assert [row["latest"] for row in select("SELECT latest FROM migrator_progress ORDER BY migration_id")] == [0, 1]

    for name in VIEWS:
        columns = [column.strip(" `") for row in table(section(PAGE, name)) for column in row[0].split(",")]
        found = select(f"SELECT * FROM {name}")
        assert all(list(row) and set(row) == set(columns) for row in found), name
        assert found or name == "migrator_clients"
    for query in code_blocks(PAGE, "sql")[0].split(";"):
        if query.strip():
            select(query.replace("products-v2", NAME))
