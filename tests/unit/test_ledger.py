from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from subprocess import PIPE
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import exc
from sqlalchemy.orm.exc import DetachedInstanceError

from migrator.errors import PreconditionFailed, TemporarilyUnavailable, UsageProblem
from migrator.ledger import BackfillRun, Chunk, Failure, LeaseLost, Ledger, Migration, RouteMoved, this_process
from migrator.ledger import ledger as module
from migrator.ledger.ledger import SCHEMA, is_dead, metadata
from migrator.ledger.models import VERSION_TABLE

OLD, NEW = "old-encoder", "new-encoder"
ME = this_process()


# --- a ledger in a known state ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """A ledger without a row, to be copied: faster than making one for each test."""
    path = tmp_path_factory.mktemp("ledger") / "template.db"
    Ledger(f"sqlite:///{path}").close()
    return path


def plan(ledger: Ledger, name: str = "digits-v2", *, collection: str = "digits", new: str | None = NEW) -> Migration:
    """A planned migration."""
    for encoder in (OLD, NEW):
        ledger.save_encoder(encoder, "{}")
    ledger.save_plan(
        name, collection=collection, source=collection, alias=None,
        strategy="in_place", old_encoder_id=OLD, new_encoder_id=new,
        fingerprint=f"plan of {name}", bound={"count": 3}, content={"chunks": 1},
    )  # fmt: skip
    migration = ledger.migration(name)
    assert migration is not None
    return migration


def route(**columns: Any) -> dict[str, Any]:
    """The columns of a route with every query at the old encoder."""
    return {
        "epoch": 0, "query_encoder": OLD, "query_collection": "digits", "canary_encoder": None,
        "canary_collection": None, "canary_percent": 0.0, "write_encoders": [OLD], "salt": "salt", "phase": "old",
        **columns,
    }  # fmt: skip


def open_backfill(ledger: Ledger, *, chunks: int = 3, items: int = 10, name: str = "digits-v2") -> Migration:
    """A migration in its backfill stage, with chunks (0, 10], (10, 20] and so on."""
    migration = ledger.move(plan(ledger, name), stage="backfill", state="active", event="backfill", old_kept=True)
    ledger.add_chunks(migration.id, 0, [(n * items or None, (n + 1) * items, items) for n in range(chunks)])
    return migration


def lease(ledger: Ledger, migration: Migration, owner: str, *, seconds: float = 60, leave: tuple[int, ...] = ()) -> Any:
    return ledger.lease_chunk(migration.id, owner, seconds=seconds, leave=set(leave))


def finish(ledger: Ledger, chunk: Chunk, owner: str, run: int, **given: Any) -> None:
    ledger.finish_chunk(chunk, owner, run_id=run, **{"written": [], "gone": 0, "failures": [], **given})


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


def events(ledger: Ledger, migration: Migration) -> list[str]:
    return [event.event for event in ledger.events(migration.id)]


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def until(true: Callable[[], bool]) -> None:
    """Looks again and again until something holds."""
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="session")
def dead_process() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def dead_owner(dead_process) -> str:
    host, _, token = this_process().rsplit("/", 2)
    return f"{host}/{dead_process}/{token}"


@pytest.fixture
def clock(monkeypatch) -> Callable[[float], None]:
    """Moves the ledger's time, and its server's, on by so many seconds."""
    real, ahead = module.now, [timedelta()]

    def advance(seconds: float) -> None:
        ahead[0] += timedelta(seconds=seconds)

    monkeypatch.setattr(module, "now", lambda: real() + ahead[0])
    of_database = Ledger._clock

    def shifted(ledger: Ledger, session: Any) -> Any:
        at = of_database(ledger, session)
        return at if ledger.url.get_backend_name() == "sqlite" else at + ahead[0]  # SQLite has this process's time

    monkeypatch.setattr(Ledger, "_clock", shifted)
    return advance


# --- what holds on every database ------------------------------------------------------------------------------------


class LedgerSuite:
    """Joined by a class with a fixture `url` that names a ledger without a row."""

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def ledger(self, url) -> Iterator[Ledger]:
        ledger = Ledger(url)
        yield ledger
        ledger.close()

    @pytest.fixture
    def second(self, url, ledger) -> Iterator[Ledger]:
        """Another process's view of the same ledger."""
        second = Ledger(url)
        yield second
        second.close()

    @pytest.fixture
    def engine(self, url, ledger) -> Iterator[sa.Engine]:
        """Raw SQL, as somebody else's program would send it."""
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        yield engine
        engine.dispose()

    # -- clients of the route -----------------------------------------------------------------------------------------

    def test_a_row_settles_when_no_client_can_hold_the_one_before(self, ledger, clock):
        migration = ledger.move(plan(ledger), stage="prepare", state="active", event="prepare", route=route(ttl=5.0))
        assert ledger.seconds_to_settle("digits") == 0, "there was no row before"
        assert ledger.seconds_to_settle("no such collection") == 0
        migration = ledger.move(migration, event="canary", route={"epoch": 1, "ttl": 0.0})
        assert 6.5 < ledger.seconds_to_settle("digits") <= 7, "the ttl of the row before, and a search"
        clock(4)
        ledger.move(migration, event="canary", route={"epoch": 2})
        assert 2.5 < ledger.seconds_to_settle("digits") <= 3, "a later move does not end the wait for the first row"
        clock(3)
        assert ledger.seconds_to_settle("digits") == 0

    def test_clients_behind_are_those_that_may_still_answer_with_an_earlier_row(self, ledger, clock, dead_owner):
        ledger.move(plan(ledger), stage="prepare", state="active", event="prepare", route=route())
        elsewhere = "another host:1/7/"
        ledger.report_client("digits", elsewhere + "a", name="search-1", epoch=1, ttl=5)
        ledger.report_client("digits", elsewhere + "b", name="search-2", epoch=2, ttl=5)
        ledger.report_client("digits", elsewhere + "c", name="batch", epoch=1, ttl=60)
        ledger.report_client("digits", dead_owner, name="killed", epoch=1, ttl=60)

        def behind(epoch: int) -> list[str]:
            return [client.name for client in ledger.clients_behind("digits", epoch)]

        assert behind(1) == []
        assert behind(2) == ["batch", "search-1"]
        assert behind(3) == ["batch", "search-1", "search-2"]
        assert ledger.clients_behind("no such collection", 3) == []
        ledger.report_client("digits", elsewhere + "a", name="search-1", epoch=2, ttl=5)
        assert behind(2) == ["batch"], "one row a client, and its newest epoch"
        clock(49)
        assert behind(3) == ["batch", "search-1", "search-2"], "silent, it may be cut off from the ledger and answer on"
        clock(2)
        assert behind(3) == ["batch"]
        ledger.forget_client("digits", elsewhere + "c")
        assert behind(3) == []

    def test_clients_that_did_not_close_are_removed_after_a_day(self, ledger, engine, clock):
        ledger.move(plan(ledger), stage="prepare", state="active", event="prepare", route=route())
        ledger.report_client("digits", "host/1/a", name="gone", epoch=1, ttl=5)
        clock(86_500)
        ledger.report_client("digits", "host/2/a", name="new", epoch=1, ttl=5)
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT client FROM migrator_clients").scalars().all() == ["new"]

    # -- views for others ---------------------------------------------------------------------------------------------

    def test_nobody_writes_through_a_view(self, ledger, engine):
        open_backfill(ledger)
        views = sa.inspect(engine).get_view_names()
        assert sorted(views) == [f"migrator_{name}" for name in ("clients", "failures", "history", "progress", "route")]
        for view in views:
            for verb in (f"DELETE FROM {view}", f"UPDATE {view} SET migration = 'x'"):
                with pytest.raises(exc.DBAPIError), engine.begin() as connection:
                    connection.exec_driver_sql(verb)

    # -- schema -------------------------------------------------------------------------------------------------------

    def test_the_versions_build_what_the_models_declare(self, engine):
        with engine.connect() as connection:
            context = MigrationContext.configure(
                connection, opts={"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True}
            )
            assert compare_metadata(context, metadata()) == []
            checks = {
                (table, check["name"])
                for table in sa.inspect(connection).get_table_names()
                for check in sa.inspect(connection).get_check_constraints(table)
            }
        declared = {
            (table.name, constraint.name)
            for table in metadata().tables.values()
            for constraint in table.constraints
            if isinstance(constraint, sa.CheckConstraint)
        }
        assert checks == declared

    def test_a_newer_schema_is_refused_and_left_alone(self, url, ledger, engine):
        with engine.begin() as connection:
            connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '0999'")
        with pytest.raises(UsageProblem) as caught:
            Ledger(url)
        assert "0999" in one_line(caught)
        assert "pip install --upgrade" in str(caught.value)
        with engine.connect() as connection:
            assert connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar() == "0999"

    def test_chunks_of_0002_stay_ranges(self, empty_url, tmp_path, monkeypatch):
        package = tmp_path / "older"
        ignored = shutil.ignore_patterns("__pycache__", *(f"{number:04d}_*" for number in range(3, int(SCHEMA) + 1)))
        shutil.copytree(Path(module.__file__).parent, package, ignore=ignored)
        monkeypatch.setattr(module, "__file__", str(package / "ledger.py"))
        monkeypatch.setattr(module, "SCHEMA", "0002")
        engine = sa.create_engine(empty_url, poolclass=sa.NullPool)

        def save_encoder(_: Ledger, encoder: str, card: str) -> None:
            with engine.begin() as connection:
                connection.execute(
                    sa.text("INSERT INTO encoders (id, card, seen_at) VALUES (:id, :card, CURRENT_TIMESTAMP)"),
                    {"id": encoder, "card": card},
                )

        monkeypatch.setattr(Ledger, "save_encoder", save_encoder)  # 0006 renamed a column
        with closing(Ledger(empty_url)) as old:
            migration = open_backfill(old, chunks=0)
        with engine.begin() as connection:
            for ordinal, up_to in enumerate(('"7"', "8")):
                connection.execute(
                    sa.text(
                        "INSERT INTO chunks (migration_id, pass_number, ordinal, upto_id, items, state, attempts, "
                        "written, failed, gone) VALUES (:migration, 0, :ordinal, :up_to, 5, 'pending', 0, 0, 0, 0)"
                    ),
                    {"migration": migration.id, "ordinal": ordinal, "up_to": up_to},
                )
            connection.execute(
                sa.text(
                    "INSERT INTO routes (collection, migration_id, epoch, query_encoder, query_collection, "
                    "canary_percent, write_encoders, salt, phase, changed_at) VALUES ('digits', :migration, 7, :old, "
                    "'digits', 0, '[]', 's', 'old', CURRENT_TIMESTAMP)"
                ),
                {"migration": migration.id, "old": OLD},
            )
        monkeypatch.undo()
        with closing(Ledger(empty_url)) as new:
            assert [(chunk.upto_id, new.ids_of(chunk)) for chunk in new.chunks(migration.id)] == [
                ('"7"', None), ("8", None)
            ]  # fmt: skip
            assert lease(new, migration, ME).ids is None
            found = new.route("digits")
            assert found is not None
            assert (found.epoch, found.ttl) == (7, 5), "the ttl that clients had by default"
            assert 3 < new.seconds_to_settle("digits") <= 5
        with engine.connect() as connection:
            assert connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar() == SCHEMA
        engine.dispose()

    def test_the_database_refuses_what_must_not_be(self, ledger, engine):
        migration = open_backfill(ledger, chunks=2)
        ledger.move(migration, event="route", route=route())
        ledger.start_training(migration.id, method="advbct", settings={}, folder="f")
        ledger.save_verification(
            migration, plan_fingerprint="p", old_encoder_id=OLD, new_encoder_id=NEW, queries_sha256="", outcome="pass",
            results={},
        )  # fmt: skip
        run = ledger.start_run(migration.id, ME)
        finish(ledger, lease(ledger, migration, ME), ME, run, failures=[Failure(1, "image", "torn")])
        with engine.connect() as connection:
            if engine.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA foreign_keys = ON")
            for table, column, value in (
                ("migrations", "stage", "'shadow'"),
                ("migrations", "state", "'paused'"),
                ("migrations", "strategy", "'sideways'"),
                ("migrations", "new_encoder_id", "NULL"),
                ("migrations", "new_encoder_id", "'nobody'"),
                ("routes", "canary_percent", "101"),
                ("routes", "canary_percent", "-1"),
                ("routes", "canary_percent", "10"),  # without a canary encoder
                ("routes", "query_encoder", "'nobody'"),
                ("chunks", "state", "'half done'"),
                ("chunks", "state", "'leased'"),  # by nobody
                ("chunks", "lease_owner", "'somebody'"),  # without a lease
                ("chunks", "ordinal", "1"),
                ("item_failures", "kind", "'mood'"),
                ("item_failures", "state", "'forgotten'"),
                ("training_runs", "state", "'tired'"),
                ("training_runs", "encoder_id", "'nobody'"),
                ("verifications", "outcome", "'maybe'"),
                ("verifications", "old_encoder_id", "'nobody'"),
            ):
                where = " WHERE ordinal = 0" if table == "chunks" else ""
                try:
                    connection.exec_driver_sql(f"UPDATE {table} SET {column} = {value}{where}")
                except exc.IntegrityError:
                    connection.rollback()
                else:
                    pytest.fail(f"{table}.{column} = {value} was taken")

    @pytest.mark.parametrize("table", ["stage_events", "plans"])
    def test_audit_log_and_plans_are_written_once(self, ledger, engine, table):
        plan(ledger)
        statements = [f"UPDATE {table} SET migration_id = migration_id", f"DELETE FROM {table}"]
        if engine.dialect.name == "sqlite":
            statements.append(f"INSERT OR REPLACE INTO {table} SELECT * FROM {table}")
        else:
            statements.append(f"TRUNCATE {table}")
        for statement in statements:
            with engine.connect() as connection, pytest.raises(exc.DatabaseError, match="are written once"):
                connection.exec_driver_sql(statement)
        with engine.connect() as connection:
            assert connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar() == 1

    # -- encoders, plans, training, verification ----------------------------------------------------------------------

    def test_an_encoder_manifest_is_kept_as_first_seen(self, ledger, second):
        assert ledger.encoder_manifest("é✓") is None
        ledger.save_encoder("é✓", '{"fingerprint": [0.1]}')
        second.save_encoder("é✓", '{"fingerprint": [0.9]}')
        assert ledger.encoder_manifest("é✓") == '{"fingerprint": [0.1]}'

    def test_an_encoder_saved_by_many_at_once(self, ledger):
        at_once = threading.Barrier(4)

        def save(_: int) -> None:
            at_once.wait()
            ledger.save_encoder("e", "{}")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(save, range(4)))
        assert ledger.encoder_manifest("e") == "{}"

    def test_planning_again_replaces_nothing(self, ledger):
        first = plan(ledger, new=None)
        assert (first.stage, first.state, first.new_encoder_id, first.old_kept) == ("planned", "planned", None, False)
        again = plan(ledger, collection="letters")
        assert again.id == first.id
        assert (again.collection, again.new_encoder_id) == ("letters", NEW)
        latest = ledger.latest_plan(first.id)
        assert (latest.fingerprint, latest.bound, latest.content) == ("plan of digits-v2", {"count": 3}, {"chunks": 1})
        assert events(ledger, first) == ["plan", "plan"]

    @pytest.mark.parametrize("state", ["active", "rolling_back"])
    def test_no_new_plan_while_under_way(self, ledger, state):
        migration = ledger.move(plan(ledger), stage="canary", state=state, event="on")
        before = ledger.latest_plan(migration.id).id
        with pytest.raises(PreconditionFailed) as caught:
            plan(ledger)
        assert "stage canary" in one_line(caught)
        assert "migrator rollback digits-v2" in str(caught.value)
        assert ledger.latest_plan(migration.id).id == before

    @pytest.mark.parametrize("state", ["finished", "rolled_back"])
    def test_a_name_may_be_used_again_after_the_end(self, ledger, state):
        first = ledger.move(plan(ledger), stage="finalize", state=state, event="end")
        again = plan(ledger)
        assert again.id != first.id
        assert ledger.migration("digits-v2").id == again.id
        assert ledger.latest_plan(again.id).migration_id == again.id

    def test_who_else_holds_the_collection(self, ledger):
        mine, theirs = plan(ledger), plan(ledger, "other")
        assert ledger.other_owner(mine) is None
        theirs = ledger.move(theirs, stage="prepare", state="active", event="prepare", old_kept=True)
        assert ledger.other_owner(mine).name == "other"
        assert ledger.other_owner(theirs) is None
        theirs = ledger.move(theirs, stage="finalize", state="finished", event="finalize")
        assert ledger.other_owner(mine).name == "other", "it keeps old vectors"
        ledger.move(theirs, event="finalize", old_kept=False)
        assert ledger.other_owner(mine) is None

    def test_one_migration_is_active_on_a_collection(self, ledger):
        ledger.move(plan(ledger), stage="prepare", state="active", event="prepare", route=route())
        other = plan(ledger, "other")
        with pytest.raises(PreconditionFailed) as caught:
            ledger.move(other, stage="prepare", state="active", event="prepare", route=route(epoch=1))
        assert "another migration is active on digits" in one_line(caught)
        assert ledger.migration("other").state == "planned"
        assert ledger.route("digits").epoch == 1
        assert events(ledger, other) == ["plan"]

    def test_one_open_migration_of_a_name(self, ledger, engine):
        plan(ledger)
        columns = "name, collection, strategy, stage, state, old_kept, created_at, changed_at"
        with engine.connect() as connection, pytest.raises(exc.IntegrityError):
            connection.exec_driver_sql(f"INSERT INTO migrations ({columns}) SELECT {columns} FROM migrations")

    def test_training_gives_the_migration_its_encoder(self, ledger):
        migration = plan(ledger, new=None)
        failed = ledger.start_training(migration.id, method="advbct", settings={"epochs": 1}, folder="f")
        assert ledger.trainings(migration.id)[-1].state == "running"
        ledger.finish_training(failed, encoder_id=None, validation=None, error="loss is nan")
        assert ledger.trainings(migration.id)[-1].error == "loss is nan"
        assert ledger.migration("digits-v2").new_encoder_id is None
        run = ledger.start_training(migration.id, method="advbct", settings={"epochs": 1}, folder="f")
        ledger.finish_training(run, encoder_id=NEW, validation={"self": 0.5}, error=None)
        found = ledger.trainings(migration.id)[-1]
        assert (found.state, found.encoder_id, found.validation) == ("finished", NEW, {"self": 0.5})
        assert ledger.migration("digits-v2").new_encoder_id == NEW
        assert events(ledger, migration) == ["plan", "train", "training failed", "train", "trained"]

    def test_no_encoder_is_exchanged_under_way(self, ledger):
        migration = plan(ledger)
        ledger.save_encoder("third", "{}")
        run = ledger.start_training(migration.id, method="advbct", settings={}, folder="f")
        ledger.move(migration, stage="prepare", state="active", event="prepare")
        with pytest.raises(PreconditionFailed):
            ledger.finish_training(run, encoder_id="third", validation=None, error=None)
        ledger.set_new_encoder(migration.id, "third")
        assert ledger.migration("digits-v2").new_encoder_id == NEW

    def test_the_latest_verification(self, ledger):
        migration = plan(ledger)
        assert ledger.latest_verification(migration.id) is None
        for outcome in ("fail", "pass"):
            ledger.save_verification(
                migration, plan_fingerprint="p", old_encoder_id=OLD, new_encoder_id=NEW, queries_sha256="s",
                outcome=outcome, results={"reasons": ["é"]},
            )  # fmt: skip
        found = ledger.latest_verification(migration.id)
        assert (found.outcome, found.results, found.plan_fingerprint) == ("pass", {"reasons": ["é"]}, "p")
        assert found.created_at.tzinfo is not None
        assert events(ledger, migration) == ["plan", "verify", "verify"]

    # -- moving on ----------------------------------------------------------------------------------------------------

    def test_a_move_changes_stage_state_and_route_and_is_noted(self, ledger):
        migration = ledger.move(
            plan(ledger), stage="prepare", state="active", event="prepare", detail={"why": 1}, route=route(),
            old_kept=True,
        )  # fmt: skip
        assert (migration.stage, migration.state, migration.old_kept) == ("prepare", "active", True)
        found = ledger.route("digits")
        assert (found.epoch, found.query_encoder, found.write_encoders, found.migration_id) == (
            1, OLD, [OLD], migration.id
        )  # fmt: skip
        ledger.move(
            migration, stage="canary", event="canary",
            route={"epoch": 1, "canary_encoder": NEW, "canary_percent": 10.0, "phase": "canary"},
        )  # fmt: skip
        found = ledger.route("digits")
        assert (found.epoch, found.canary_percent, found.salt) == (2, 10.0, "salt"), "other columns stay"
        last = ledger.events(migration.id)[-2]
        assert (last.event, last.stage, last.detail) == ("prepare", "prepare", {"why": 1})
        assert "@" in last.actor
        assert last.at.tzinfo is not None

    @pytest.mark.parametrize("change", [{"stage": "canary"}, {"state": "rolling_back"}])
    def test_a_move_from_a_stage_that_was_left_is_refused(self, ledger, second, change):
        migration = ledger.move(plan(ledger), stage="prepare", state="active", event="prepare", route=route())
        second.move(migration, event="first", **change)
        with pytest.raises(PreconditionFailed) as caught:
            ledger.move(migration, stage="backfill", event="second", route={"epoch": 1, "phase": "backfill"})
        assert "moved by another process" in one_line(caught)
        now = ledger.migration("digits-v2")
        assert (now.stage, now.state) == (change.get("stage", "prepare"), change.get("state", "active"))
        assert (ledger.route("digits").epoch, ledger.route("digits").phase) == (1, "old")
        assert events(ledger, migration) == ["plan", "prepare", "first"]

    def test_a_move_with_a_route_that_moved_changes_nothing(self, ledger, second):
        migration = ledger.move(plan(ledger), stage="canary", state="active", event="prepare", route=route())
        second.move(migration, event="canary", route={"epoch": 1, "canary_encoder": NEW, "canary_percent": 1.0})
        with pytest.raises(RouteMoved) as caught:
            ledger.move(migration, stage="backfill", event="backfill", route={"epoch": 1, "phase": "backfill"})
        assert "changed by another process" in one_line(caught)
        assert caught.value.exit_code == 3
        assert ledger.migration("digits-v2").stage == "canary"
        assert (ledger.route("digits").epoch, ledger.route("digits").phase) == (2, "old")
        assert events(ledger, migration) == ["plan", "prepare", "canary"]

    def test_of_many_moves_at_once_one_succeeds(self, ledger):
        migration = ledger.move(plan(ledger), stage="prepare", state="active", event="prepare", route=route())
        at_once = threading.Barrier(4)

        def move(_: int) -> bool:
            at_once.wait()
            try:
                ledger.move(migration, stage="canary", event="canary", route={"epoch": 1, "phase": "canary"})
            except PreconditionFailed:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(move, range(4))) == 1
        assert ledger.route("digits").epoch == 2

    def test_pause_and_resume(self, ledger, second):
        migration = open_backfill(ledger)
        second.pause(migration, "the queries are slow")
        assert ledger.migration("digits-v2").paused == "the queries are slow"
        assert lease(ledger, migration, ME) is None
        second.pause(migration, None)
        assert ledger.migration("digits-v2").paused is None
        assert lease(ledger, migration, ME).ordinal == 0
        assert events(ledger, migration) == ["plan", "backfill", "pause", "resume"]

    def test_first_pass_work_counts_no_catch_up_and_no_pause(self, ledger):
        migration = open_backfill(ledger, chunks=4)
        began = datetime(2026, 3, 2, tzinfo=UTC)
        assert ledger.first_pass_work(migration.id, runs=5) == ([], 0)

        def work(start: float, ends: list[float], seen: float) -> None:
            """A run from `start`, with a chunk done at each of `ends`, that was last seen at `seen`."""
            run = ledger.start_run(migration.id, ME)
            taken = []
            for _ in ends:
                chunk = lease(ledger, migration, ME)
                finish(ledger, chunk, ME, run)
                taken.append(chunk.id)
            ledger.end_run(run, "complete")
            with ledger._write() as session:
                row = session.get_one(BackfillRun, run)
                row.started_at, row.seen_at = began + seconds(start), began + seconds(seen)
                for number, end in zip(taken, ends, strict=True):
                    session.get_one(Chunk, number).finished_at = began + seconds(end)

        work(0, [2, 4], 4)
        assert ledger.first_pass_work(migration.id, runs=5) == ([(began, began + seconds(4))], 20)
        work(1000, [1003], 1500)  # then it looked for what had changed
        work(2000, [], 2001)
        work(3000, [3001], 3001)
        ledger.add_chunks(migration.id, 1, [(None, 40, 1)])
        work(4000, [4500], 4500)
        spans = [(began + seconds(a), began + seconds(b)) for a, b in ((3000, 3001), (1000, 1003), (0, 4))]
        assert ledger.first_pass_work(migration.id, runs=5) == (spans, 40)
        assert ledger.first_pass_work(migration.id, runs=2) == (spans[:2], 20)

    def test_notes(self, ledger):
        migration = plan(ledger)
        ledger.note(migration, "looked", {"at": "é\x00".rstrip("\x00")})
        assert ledger.events(migration.id)[-1].detail == {"at": "é"}

    # -- chunks -------------------------------------------------------------------------------------------------------

    def test_a_pass_is_stored_once(self, ledger, second):
        migration = open_backfill(ledger, chunks=3)
        second.add_chunks(migration.id, 0, [(None, 99, 99)])
        assert [(c.after_id, c.upto_id, c.items) for c in ledger.chunks(migration.id)] == [
            (None, "10", 10), ("10", "20", 10), ("20", "30", 10)
        ]  # fmt: skip
        second.add_chunks(migration.id, 1, [])
        assert ledger.counts(migration.id).passes == 1

    def test_a_chunk_may_be_a_list(self, ledger, second):
        migration = open_backfill(ledger, chunks=0)
        lists = [["7", -7, 2**62], [7, "", "a'\"; DROP TABLE chunks", "é✓\U0001f600", "\x00", "\ud800"]]
        ledger.add_chunks(migration.id, 0, [(None, "é", len(ids)) for ids in lists], lists)
        second.add_chunks(migration.id, 0, [(None, 8, 1)], [[8]])
        ledger.add_chunks(migration.id, 1, [(3, 8, 1)])
        chunks = second.chunks(migration.id)
        assert [repr(second.ids_of(chunk)) for chunk in chunks] == [*map(repr, lists), "None"]
        found = [lease(ledger, migration, ME) for _ in chunks]
        assert [None if chunk.ids is None else repr(json.loads(chunk.ids)) for chunk in found] == [
            *map(repr, lists), None
        ]  # fmt: skip
        assert [(chunk.upto_id, chunk.items) for chunk in found] == [('"\\u00e9"', 3), ('"\\u00e9"', 6), ("8", 1)]
        with pytest.raises(DetachedInstanceError):  # long, and loaded only with a lease
            _ = chunks[0].ids

    def test_a_pass_cut_by_many_at_once(self, ledger):
        migration = open_backfill(ledger, chunks=0)
        at_once = threading.Barrier(4)

        def cut(number: int) -> None:
            at_once.wait()
            ledger.add_chunks(migration.id, 0, [(None, f"{number}", 1), (f"{number}", f"{number}z", 1)])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(cut, range(4)))
        first, second = ledger.chunks(migration.id)
        assert first.upto_id == second.after_id, "both come from the same process"

    def test_seven_and_the_string_seven_are_two_ids(self, ledger):
        migration = open_backfill(ledger, chunks=0)
        ids = [-7, 7, 2**62, "", "7", "a'\"; DROP TABLE chunks", "é✓\U0001f600"]
        ledger.add_chunks(
            migration.id, 0, [(before, after, 1) for before, after in zip([None, *ids], ids, strict=False)]
        )
        found = [json.loads(chunk.upto_id) for chunk in ledger.chunks(migration.id)]
        assert list(map(repr, found)) == list(map(repr, ids))
        run = ledger.start_run(migration.id, ME)
        finish(
            ledger, lease(ledger, migration, ME), ME, run,
            failures=[Failure(7, "image", "int"), Failure("7", "store", "string")],
        )  # fmt: skip
        finish(ledger, lease(ledger, migration, ME), ME, run, written=["7"])
        assert [(row.item_id, row.reason) for row in ledger.failures(migration.id)] == [("7", "int")]

    def test_leases_go_in_order_and_to_one_owner_each(self, ledger, second):
        migration = open_backfill(ledger, chunks=3)
        ledger.add_chunks(migration.id, 1, [(None, 5, 1)])
        here, there = this_process(), this_process()
        taken = [lease(ledger, migration, here), lease(second, migration, there), lease(ledger, migration, here)]
        assert [(chunk.pass_number, chunk.ordinal) for chunk in taken] == [(0, 0), (0, 1), (0, 2)]
        assert (lease(second, migration, there).pass_number, lease(ledger, migration, here)) == (1, None)
        held = ledger.chunks(migration.id, "leased")
        assert [chunk.lease_owner for chunk in held] == [here, there, here, there]
        assert len(ledger.live_leases(migration.id)) == 4

    def test_chunks_to_leave(self, ledger):
        migration = open_backfill(ledger, chunks=2)
        first, second = ledger.chunks(migration.id)
        assert lease(ledger, migration, ME, leave=(first.id,)).id == second.id
        assert lease(ledger, migration, ME, leave=(first.id, second.id)) is None
        assert lease(ledger, migration, ME).id == first.id

    def test_a_lease_runs_out_and_the_late_owner_is_told(self, ledger, clock):
        migration = open_backfill(ledger, chunks=1)
        slow, quick = this_process(), this_process()
        run = ledger.start_run(migration.id, slow)
        mine = lease(ledger, migration, slow, seconds=60)
        clock(59)
        assert lease(ledger, migration, quick) is None
        clock(2)
        assert ledger.live_leases(migration.id) == []
        taken = lease(ledger, migration, quick, seconds=60)
        assert taken.id == mine.id
        with pytest.raises(LeaseLost) as caught:
            finish(ledger, mine, slow, run, written=[1, 2], failures=[Failure(3, "image", "torn")])
        assert "chunk 0/0 was taken over" in one_line(caught)
        with pytest.raises(LeaseLost):
            ledger.fail_chunk(mine, slow, error="refused", max_attempts=3)
        assert ledger.counts(migration.id).written == 0, "what the late one did does not count"
        assert ledger.failures(migration.id) == []
        assert ledger.runs(migration.id)[0].chunks == 0
        finish(ledger, taken, quick, run, written=[1, 2])
        with pytest.raises(LeaseLost):
            finish(ledger, taken, quick, run, written=[1, 2])
        assert ledger.counts(migration.id).written == 2

    def test_a_lease_can_be_prolonged(self, ledger, clock):
        migration = open_backfill(ledger, chunks=2)
        me, other = this_process(), this_process()
        lease(ledger, migration, me, seconds=60)
        lease(ledger, migration, other, seconds=60)
        clock(50)
        ledger.extend_leases(migration.id, me, seconds=60)
        clock(50)
        assert [chunk.lease_owner for chunk in ledger.live_leases(migration.id)] == [me]
        assert lease(ledger, migration, this_process()).ordinal == 1

    def test_a_dead_process_of_this_host_loses_its_chunk_at_once(self, ledger, dead_owner):
        migration = open_backfill(ledger, chunks=2)
        assert lease(ledger, migration, dead_owner, seconds=3600).ordinal == 0
        assert ledger.live_leases(migration.id) == []
        assert lease(ledger, migration, this_process()).ordinal == 0

    def test_a_process_elsewhere_is_never_known_to_be_dead(self, ledger, dead_process):
        migration = open_backfill(ledger, chunks=2)
        lease(ledger, migration, f"elsewhere.example/{dead_process}/0badc0de", seconds=3600)
        assert lease(ledger, migration, this_process()).ordinal == 1

    def test_returned_leases(self, ledger):
        migration = open_backfill(ledger, chunks=3)
        me, other = this_process(), this_process()
        for owner in (me, other, me):
            lease(ledger, migration, owner)
        ledger.return_leases(migration.id, me)
        assert [chunk.state for chunk in ledger.chunks(migration.id)] == ["pending", "leased", "pending"]
        assert [chunk.attempts for chunk in ledger.chunks(migration.id)] == [0, 0, 0]

    @pytest.mark.parametrize("change", [{"stage": "cutover"}, {"state": "rolling_back"}])
    def test_no_lease_outside_the_backfill(self, ledger, second, change):
        migration = open_backfill(ledger)
        second.move(migration, event="on", **change)
        with pytest.raises(LeaseLost) as caught:
            lease(ledger, migration, ME)
        assert "left the backfill stage" in one_line(caught)
        assert ledger.chunks(migration.id, "leased") == []

    def test_a_chunk_that_the_store_refuses_is_tried_again_and_then_failed(self, ledger):
        migration = open_backfill(ledger, chunks=1)
        for attempt in (1, 2, 3):
            chunk = lease(ledger, migration, ME)
            assert chunk.attempts == attempt - 1
            ledger.fail_chunk(chunk, ME, error="index is full", max_attempts=3)
        assert lease(ledger, migration, ME) is None
        (failed,) = ledger.chunks(migration.id, "failed")
        assert (failed.attempts, failed.error) == (3, "index is full")
        assert ledger.retry_failures(migration) == (0, 1)
        again = lease(ledger, migration, ME)
        assert (again.id, again.attempts) == (failed.id, 0)

    def test_finishing_counts_everything_once(self, ledger):
        migration = open_backfill(ledger, chunks=4)
        run = ledger.start_run(migration.id, ME)
        first = lease(ledger, migration, ME)
        finish(ledger, first, ME, run, written=list(range(7)), gone=2, failures=[Failure(9, "image", "torn")])
        lease(ledger, migration, ME)
        ledger.fail_chunk(lease(ledger, migration, ME), ME, error="no", max_attempts=1)
        ledger.add_chunks(migration.id, 1, [(None, 100, 5)])
        counts = ledger.counts(migration.id)
        assert counts.by_state == {"done": 1, "leased": 1, "failed": 1, "pending": 2}
        assert (counts.planned, counts.done, counts.written, counts.gone) == (40, 10, 7, 2)
        assert (counts.passes, counts.open_failures) == (2, 1)
        done = ledger.chunks(migration.id, "done")[0]
        assert (done.written, done.failed, done.gone, done.error, done.lease_owner) == (7, 1, 2, None, None)
        assert done.finished_at is not None
        assert [chunk.ordinal for chunk in ledger.chunks(migration.id, "failed", "leased")] == [1, 2]

    def test_counts_of_nothing(self, ledger):
        counts = ledger.counts(plan(ledger).id)
        assert counts == type(counts)({}, 0, 0, 0, 0, 0, 0)

    def test_a_restored_chunk_is_nobodys(self, ledger):
        migration = open_backfill(ledger, chunks=1)
        chunk = lease(ledger, migration, ME)
        ledger.set_restored(chunk)
        (restored,) = ledger.chunks(migration.id, "restored")
        assert (restored.lease_owner, restored.lease_until) == (None, None)
        with pytest.raises(LeaseLost):
            finish(ledger, chunk, ME, ledger.start_run(migration.id, ME))
        assert lease(ledger, migration, ME) is None

    # -- failures and runs --------------------------------------------------------------------------------------------

    def test_the_life_of_a_dead_letter(self, ledger):
        migration = open_backfill(ledger, chunks=4)
        run = ledger.start_run(migration.id, ME)

        def done(**given: Any) -> None:
            finish(ledger, lease(ledger, migration, ME), ME, run, **given)

        done(failures=[Failure(1, "image", "torn"), Failure("é", "store", "too long")])
        assert [(f.item_id, f.kind, f.attempts) for f in ledger.failures(migration.id)] == [
            ("1", "image", 1), (json.dumps("é"), "store", 1)
        ]  # fmt: skip
        assert ledger.retry_failures(migration) == (2, 0)
        assert ledger.failures(migration.id) == []
        assert len(ledger.failures(migration.id, state="retry")) == 2
        done(written=["é", 5], failures=[Failure(1, "encoder", "not finite")])
        (left,) = ledger.failures(migration.id)
        assert (left.item_id, left.kind, left.reason, left.attempts) == ("1", "encoder", "not finite", 2)
        assert left.first_at <= left.last_at
        assert ledger.counts(migration.id).open_failures == 1
        ledger.retry_failures(migration)
        done(written=[1])
        assert ledger.failures(migration.id) == []
        assert len(ledger.failures(migration.id, state="resolved")) == 2
        done(failures=[Failure(1, "image", "torn again")])
        assert [f.attempts for f in ledger.failures(migration.id)] == [3]
        assert events(ledger, migration)[-2:] == ["retry", "retry"]

    def test_failures_belong_to_one_migration(self, ledger):
        migration = open_backfill(ledger, chunks=1)
        finish(
            ledger, lease(ledger, migration, ME), ME, ledger.start_run(migration.id, ME),
            failures=[Failure(1, "image", "torn")],
        )  # fmt: skip
        other = plan(ledger, "other", collection="letters")
        assert ledger.failures(other.id) == []
        assert ledger.retry_failures(other) == (0, 0)
        assert len(ledger.failures(migration.id)) == 1

    def test_runs(self, ledger):
        migration = open_backfill(ledger)
        first, second = ledger.start_run(migration.id, "a"), ledger.start_run(migration.id, "b")
        finish(ledger, lease(ledger, migration, "a"), "a", first, written=[1, 2])
        ledger.end_run(second, "busy")
        runs = ledger.runs(migration.id)
        assert [(run.id, run.owner, run.chunks, run.items, run.ended) for run in runs] == [
            (first, "a", 1, 2, None), (second, "b", 0, 0, "busy")
        ]  # fmt: skip
        assert all(run.started_at <= run.seen_at for run in runs)

    # -- many at once -------------------------------------------------------------------------------------------------

    def test_threads_never_share_a_chunk(self, ledger):
        migration = open_backfill(ledger, chunks=24)
        at_once = threading.Barrier(4)

        def work(_: int) -> list[int]:
            owner, done = this_process(), []
            run = ledger.start_run(migration.id, owner)
            at_once.wait()
            while (chunk := lease(ledger, migration, owner)) is not None:
                finish(ledger, chunk, owner, run, written=[chunk.ordinal])
                done.append(chunk.ordinal)
            return done

        with ThreadPoolExecutor(4) as pool:
            done = list(pool.map(work, range(4)))
        assert sorted(ordinal for of_one in done for ordinal in of_one) == list(range(24))
        assert ledger.counts(migration.id).written == 24
        assert sum(run.chunks for run in ledger.runs(migration.id)) == 24

    def test_processes_never_share_a_chunk_even_when_killed(self, url, ledger):
        migration = open_backfill(ledger, chunks=30)
        killed = start_worker(url, migration.id, "--die")
        working = [start_worker(url, migration.id) for _ in range(2)]
        assert finished_by(killed, returncode=9) == []
        done = [ordinal for worker in working for ordinal in finished_by(worker, returncode=0)]
        held = ledger.chunks(migration.id, "leased")
        if held:  # the others were through before the killed one took its chunk
            done += finished_by(start_worker(url, migration.id), returncode=0)
        assert sorted(done) == list(range(30))
        assert ledger.counts(migration.id).by_state == {"done": 30}

    def test_created_by_several_processes_at_once(self, empty_url):
        code = (
            "import sys, alembic.command, migrator.ledger as ledger; print(flush=True); sys.stdin.readline();"
            "ledger.Ledger(sys.argv[1]).close()"
        )
        processes = [
            subprocess.Popen([sys.executable, "-c", code, empty_url], stdin=PIPE, stdout=PIPE, stderr=PIPE)
            for _ in range(3)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n", "it is ready"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
        for process in processes:
            _, told = process.communicate(timeout=60)
            assert (process.returncode, told) == (0, b"")
        with closing(Ledger(empty_url)) as ledger:
            assert plan(ledger).state == "planned"


WORKER = """
import os, signal, sys
from migrator.ledger import Ledger, this_process
ledger, migration, owner = Ledger(sys.argv[1]), int(sys.argv[2]), this_process()
run = ledger.start_run(migration, owner)
while (chunk := ledger.lease_chunk(migration, owner, seconds=3600, leave=set())) is not None:
    if "--die" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    ledger.finish_chunk(chunk, owner, run_id=run, written=[chunk.ordinal], gone=0, failures=[])
    print(chunk.ordinal, flush=True)
ledger.close()
"""


def start_worker(url: str, migration_id: int, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WORKER, url, str(migration_id), *options], stdout=PIPE, stderr=PIPE)


def finished_by(worker: subprocess.Popen[bytes], *, returncode: int) -> list[int]:
    out, told = worker.communicate(timeout=60)
    assert (abs(worker.returncode), told) == (returncode, b"") or worker.returncode == 0
    return [int(line) for line in out.split()]


# --- SQLite ----------------------------------------------------------------------------------------------------------


class TestOnSqlite(LedgerSuite):
    @pytest.fixture
    def url(self, template, tmp_path) -> str:
        return f"sqlite:///{shutil.copy(template, tmp_path / 'migrator.db')}"

    @pytest.fixture
    def empty_url(self, tmp_path) -> str:
        return f"sqlite:///{tmp_path / 'made at once.db'}"


def test_the_newest_version_is_the_one_named_in_the_code():
    config = Config()
    config.set_main_option("script_location", str(Path(module.__file__).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [SCHEMA]


def test_it_creates_itself_with_the_settings_it_needs(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path}/migrator.db")
    with ledger._engine.connect() as connection:
        asked = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "foreign_keys")
        }
        assert asked == {"journal_mode": "wal", "foreign_keys": 1}
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2, "FULL: a commit survives a power cut"
    ledger.close()


def test_a_folder_with_awkward_letters(tmp_path):
    folder = tmp_path / "é 100% it's"
    folder.mkdir()
    ledger = Ledger(f"sqlite:///{folder}/migrator.db")
    assert plan(ledger).id == 1
    ledger.close()
    assert (folder / "migrator.db").stat().st_size > 0


def test_creating_it_is_all_or_nothing(tmp_path, monkeypatch):
    from alembic import op

    path = tmp_path / "migrator.db"
    real, calls = op.create_index, []

    def create_index(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise exc.OperationalError("CREATE INDEX", {}, sqlite3.OperationalError("database or disk is full"))
        return real(*args, **kwargs)

    monkeypatch.setattr(op, "create_index", create_index)
    with pytest.raises(TemporarilyUnavailable, match="free some space"):
        Ledger(f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT name FROM sqlite_master").fetchall() == []
    monkeypatch.setattr(op, "create_index", real)
    Ledger(f"sqlite:///{path}").close()


def test_a_newer_revision_upgrades_a_ledger_with_its_rows(template, tmp_path, monkeypatch):
    newer = f"{int(SCHEMA) + 1:04d}"
    path = shutil.copy(template, tmp_path / "migrator.db")
    with closing(Ledger(f"sqlite:///{path}")) as old:
        plan(old)
    package = tmp_path / "newer"
    shutil.copytree(Path(module.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "versions" / f"{newer}_a_mood.py").write_text(
        f"import sqlalchemy as sa\nfrom alembic import op\nrevision, down_revision = '{newer}', '{SCHEMA}'\n"
        "def upgrade():\n    op.add_column('encoders', sa.Column('mood', sa.String()))\n"
    )
    monkeypatch.setattr(module, "__file__", str(package / "ledger.py"))
    monkeypatch.setattr(module, "SCHEMA", newer)
    with closing(Ledger(f"sqlite:///{path}")) as new:
        migration = new.migration("digits-v2")
        assert migration is not None
        assert migration.state == "planned"
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT id, mood FROM encoders ORDER BY id").fetchall() == [(NEW, None), (OLD, None)]
        assert raw.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchall() == [(newer,)]
    monkeypatch.undo()
    with pytest.raises(UsageProblem, match="written by a newer migrator"):
        Ledger(f"sqlite:///{path}")


def test_no_writer_is_asked_of_a_ledger_that_is_up_to_date(template, tmp_path):
    """Opening reads only, so that `status` answers while a backfill holds the write lock."""
    path = shutil.copy(template, tmp_path / "migrator.db")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with closing(Ledger(f"sqlite:///{path}")) as ledger:
            assert ledger.migration("digits-v2") is None


@pytest.mark.parametrize("revision", [None, "0001", "ae1027a6acf5"])
def test_a_database_of_something_else_is_refused(tmp_path, revision):
    path = tmp_path / "shop.db"
    with closing(sqlite3.connect(path)) as shop:
        shop.execute("CREATE TABLE orders (id INTEGER)")
        if revision:  # another program that uses alembic
            shop.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
            shop.execute("INSERT INTO alembic_version VALUES (?)", [revision])
        shop.commit()
    before = path.read_bytes()
    with pytest.raises(UsageProblem) as caught:
        Ledger(f"sqlite:///{path}")
    assert "a database of something else" in one_line(caught)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 5000])
def test_a_file_that_is_no_database(tmp_path, content):
    path = tmp_path / "migrator.db"
    path.write_bytes(content)
    with pytest.raises((UsageProblem, TemporarilyUnavailable)) as caught:
        Ledger(f"sqlite:///{path}")
    assert str(path) in one_line(caught)
    assert caught.value.exit_code == 2
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "url",
    [
        "",
        "migrator.db",
        "sqlite",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite+nosuchdriver:///x.db",
        "nosuchdatabase://u:geheim@h/d",
        "mysql+nosuchdriver://u:geheim@h/d",
        "postgresql+nosuchdriver://u:geheim@h/d",
        "postgresql://u:geheim@h:port/d",
    ],
)
def test_a_url_that_leads_nowhere(url):
    with pytest.raises(UsageProblem) as caught:
        Ledger(url)
    assert "geheim" not in one_line(caught)


@pytest.mark.parametrize("folder", ["missing/migrator.db", ""])
def test_a_path_that_cannot_be_opened(tmp_path, folder):
    with pytest.raises(TemporarilyUnavailable) as caught:
        Ledger(f"sqlite:///{tmp_path / folder}")
    assert str(tmp_path) in one_line(caught)


@contextmanager
def an_ordinary_user() -> Iterator[None]:
    """Root may write everywhere, so permissions mean something only to somebody else."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("mode", [{"file": 0o444, "folder": 0o777}, {"file": 0o444, "folder": 0o555}])
def test_a_ledger_that_cannot_be_written(template, mode):
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # unlike tmp_path, open to others
    try:
        path = Path(shutil.copy(template, folder / "migrator.db"))
        path.chmod(mode["file"])
        folder.chmod(mode["folder"])
        before = path.read_bytes()
        with an_ordinary_user(), pytest.raises(TemporarilyUnavailable) as caught:
            Ledger(f"sqlite:///{path}").save_encoder(OLD, "{}")
        assert "writable for this user" in one_line(caught)
        assert path.read_bytes() == before
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_folder_that_cannot_be_written():
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        folder.chmod(0o555)
        with an_ordinary_user(), pytest.raises(TemporarilyUnavailable) as caught:
            Ledger(f"sqlite:///{folder}/migrator.db")
        assert str(folder) in one_line(caught)
        assert list(folder.iterdir()) == []
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.fixture
def short_waits(monkeypatch):
    """Waits for SQLite's lock only a moment."""
    real = sa.create_engine

    def create_engine(url: Any, **options: Any) -> sa.Engine:
        return real(url, **{**options, "connect_args": {"timeout": 0.05}})

    monkeypatch.setattr(sa, "create_engine", create_engine)


@pytest.mark.parametrize("lock", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_a_locked_ledger(template, tmp_path, short_waits, lock):
    path = shutil.copy(template, tmp_path / "migrator.db")
    with closing(Ledger(f"sqlite:///{path}")) as ledger, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute(lock)
        with pytest.raises(TemporarilyUnavailable) as caught:
            ledger.save_encoder(OLD, "{}")
        assert f"process {os.getpid()} holds it: try again" in one_line(caught)
        assert caught.value.exit_code == 4
        other.execute("ROLLBACK")
        ledger.save_encoder(OLD, "{}")


def test_a_stopped_process_that_holds_the_ledger_is_named_and_the_advice_helps(template, tmp_path, short_waits):
    path = shutil.copy(template, tmp_path / "migrator.db")
    script = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN IMMEDIATE')"
    script += "; print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGSTOP)
        with closing(Ledger(f"sqlite:///{path}")) as ledger:
            with pytest.raises(TemporarilyUnavailable) as caught:
                ledger.save_encoder(OLD, "{}")
            assert f"process {holder.pid}, which is stopped, holds it" in one_line(caught)
            assert f"kill -KILL {holder.pid}" in one_line(caught)
            holder.kill()
            holder.wait(timeout=30)
            ledger.save_encoder(OLD, "{}")


def test_a_ledger_locked_while_it_is_made(tmp_path, short_waits):
    path = tmp_path / "migrator.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TemporarilyUnavailable):
            Ledger(f"sqlite:///{path}")


def test_foreign_keys_hold_in_every_transaction(template, tmp_path):
    with closing(Ledger(f"sqlite:///{shutil.copy(template, tmp_path / 'migrator.db')}")) as ledger:
        for _ in range(2):
            with pytest.raises(exc.IntegrityError, match="FOREIGN KEY"):
                ledger.start_run(99, ME)
        assert ledger.runs(99) == []


def test_a_naive_time_is_refused(template, tmp_path, monkeypatch):
    with closing(Ledger(f"sqlite:///{shutil.copy(template, tmp_path / 'migrator.db')}")) as ledger:
        monkeypatch.setattr(module, "now", lambda: datetime(2026, 1, 1))
        with pytest.raises(exc.StatementError, match="needs a zone"):
            ledger.save_encoder(OLD, "{}")


def test_names_of_processes(dead_owner):
    assert this_process() != this_process()
    assert not is_dead(this_process())
    assert is_dead(dead_owner)
    host, _, token = this_process().rsplit("/", 2)
    assert not is_dead(f"{host}/1/{token}"), "another user's process is alive though it cannot be signalled"


# --- leasing, whatever happens ---------------------------------------------------------------------------------------


class Leasing(RuleBasedStateMachine):
    """Several processes lease, finish, fail, stall and die in any order; no chunk is done twice and none is lost."""

    template: Path
    dead_pid: int
    ledger_module: ModuleType = module

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.ledger = Ledger(f"sqlite:///{shutil.copy(self.template, Path(self.folder.name) / 'migrator.db')}")
        self.ahead = timedelta()
        self.real_now = module.now
        module.now = lambda: self.real_now() + self.ahead
        host, _, token = this_process().rsplit("/", 2)
        self.alive = [this_process() for _ in range(3)]
        self.crashed = f"{host}/{self.dead_pid}/{token}"
        self.held: dict[int, tuple[str, Any, Chunk]] = {}  # chunk id -> owner, end of the lease, chunk
        self.lost: list[tuple[str, Chunk]] = []  # leases that somebody else took over
        self.done: list[int] = []
        self.failed: set[int] = set()

    @initialize(chunks=st.integers(1, 5))
    def begin(self, chunks: int) -> None:
        self.migration = open_backfill(self.ledger, chunks=chunks)
        self.run = self.ledger.start_run(self.migration.id, "all of them")
        self.all = [chunk.id for chunk in self.ledger.chunks(self.migration.id)]

    def free(self) -> list[int]:
        """What may be leased now, by the rules."""
        now = module.now()
        held = {at for at, (owner, until, _) in self.held.items() if until >= now and owner != self.crashed}
        return [at for at in self.all if at not in held and at not in self.done and at not in self.failed]

    @rule(who=st.integers(0, 3), seconds=st.integers(10, 100))
    def take(self, who: int, seconds: int) -> None:
        owner = [*self.alive, self.crashed][who]
        free = self.free()
        chunk = lease(self.ledger, self.migration, owner, seconds=seconds)
        assert (chunk.id if chunk else None) == (free[0] if free else None)
        if chunk is not None:
            if chunk.id in self.held and self.held[chunk.id][0] != owner:
                self.lost.append((self.held[chunk.id][0], self.held[chunk.id][2]))
            self.held[chunk.id] = (owner, chunk.lease_until, chunk)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 4), refused=st.booleans())
    def end(self, which: int, refused: bool) -> None:
        at = list(self.held)[which % len(self.held)]
        owner, _, chunk = self.held.pop(at)
        if refused:
            self.ledger.fail_chunk(chunk, owner, error="no", max_attempts=2)
            if chunk.attempts == 1:
                self.failed.add(at)
        else:
            finish(self.ledger, chunk, owner, self.run, written=[chunk.ordinal])
            self.done.append(at)

    @precondition(lambda self: self.lost)
    @rule(which=st.integers(0, 4))
    def come_late(self, which: int) -> None:
        owner, chunk = self.lost.pop(which % len(self.lost))
        if self.held.get(chunk.id, ("", 0, 0))[0] == owner:
            return  # it has the chunk again
        with pytest.raises(LeaseLost):
            finish(self.ledger, chunk, owner, self.run, written=[chunk.ordinal])

    @rule(who=st.integers(0, 2))
    def leave(self, who: int) -> None:
        self.ledger.return_leases(self.migration.id, self.alive[who])
        self.held = {at: lease for at, lease in self.held.items() if lease[0] != self.alive[who]}

    @rule(who=st.integers(0, 2), seconds=st.integers(10, 100))
    def prolong(self, who: int, seconds: int) -> None:
        self.ledger.extend_leases(self.migration.id, self.alive[who], seconds=seconds)
        for chunk in self.ledger.chunks(self.migration.id, "leased"):
            if chunk.lease_owner == self.alive[who]:
                self.held[chunk.id] = (self.alive[who], chunk.lease_until, self.held[chunk.id][2])

    @rule(seconds=st.integers(1, 60))
    def wait(self, seconds: int) -> None:
        self.ahead += timedelta(seconds=seconds)

    @precondition(lambda self: self.failed)
    @rule()
    def mend(self) -> None:
        assert self.ledger.retry_failures(self.migration) == (0, len(self.failed))
        self.failed.clear()

    @invariant()
    def nothing_is_done_twice(self) -> None:
        if hasattr(self, "migration"):
            counts = self.ledger.counts(self.migration.id)
            assert len(set(self.done)) == len(self.done) == counts.written == counts.by_state.get("done", 0)
            assert sum(counts.by_state.values()) == len(self.all)

    def teardown(self) -> None:
        try:
            if hasattr(self, "migration"):
                self.ahead += timedelta(days=1)
                self.ledger.retry_failures(self.migration)
                while (chunk := lease(self.ledger, self.migration, self.alive[0])) is not None:
                    finish(self.ledger, chunk, self.alive[0], self.run, written=[chunk.ordinal])
                    self.done.append(chunk.id)
                assert sorted(self.done) == self.all, "none is lost"
        finally:
            module.now = self.real_now
            self.ledger.close()
            self.folder.cleanup()


def test_leasing_whatever_happens(template, dead_process):
    machine = type("Leasing", (Leasing,), {"template": template, "dead_pid": dead_process})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=8, stateful_step_count=18, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_results_stored_before_version_0007_get_the_terms_of_today(tmp_path, monkeypatch):
    path = tmp_path / "migrator.db"
    package = tmp_path / "older"
    shutil.copytree(Path(module.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "000[7-9]*"))
    monkeypatch.setattr(module, "__file__", str(package / "ledger.py"))
    monkeypatch.setattr(module, "SCHEMA", "0006")
    interval = {"mean": 0.1, "low": 0.0, "high": 0.2}
    results = {
        "outcome": "pass", "look": 2, "ways_on": [], "curve": {"worth": interval, "lowest": {"share": 0.2}},
        "tests": {"old": {"map@100": 0.6}, "cross": {"map@100": 0.7}}, "intervals": {"old": {"map@100": interval}},
        "histograms": {"edges": [0.0, 1.0], "tests": {"old": {"positives": [1], "negatives": [2]}}}, "threshold": None,
        "live": {"tests": {"old": {"map@100": 0.6}}, "index_recall": {"k": 10, "old": 0.98}, "items": 3},
        "examples": [{"old": [{"id": 1, "right": True}], "new": [{"id": 2, "right": False}], "old_value": 0.4}],
        "questions": {"sha256": "ab", "passed_over": {"items_without_path": 1}},
    }  # fmt: skip
    with closing(Ledger(f"sqlite:///{path}")) as old:
        migration = plan(old)
        old.save_verification(
            migration, plan_fingerprint="p", old_encoder_id=OLD, new_encoder_id=NEW, queries_sha256="ab",
            outcome="pass", results=results,
        )  # fmt: skip
    monkeypatch.undo()
    with closing(Ledger(f"sqlite:///{path}")) as new:
        verification = new.latest_verification(migration.id)
        assert verification is not None
        found = verification.results
    assert found == {
        "outcome": "pass", "interim_analysis": 2, "next_steps": [],
        "curve": {"auc_gain": interval, "lowest": {"share": 0.2}},
        "tests": {"baseline": {"map@100": 0.6}, "cross": {"map@100": 0.7}},
        "intervals": {"baseline": {"map@100": interval}},
        "histograms": {"edges": [0.0, 1.0], "tests": {"baseline": {"positives": [1], "negatives": [2]}}},
        "threshold": None,
        "live": {"tests": {"baseline": {"map@100": 0.6}}, "index_recall": {"k": 10, "baseline": 0.98}, "items": 3},
        "examples": [{"old": [{"id": 1, "relevant": True}], "new": [{"id": 2, "relevant": False}], "old_value": 0.4}],
        "query_set": {"sha256": "ab", "skipped": {"items_without_path": 1}},
    }  # fmt: skip
