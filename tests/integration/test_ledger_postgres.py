from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta

import pytest
import sqlalchemy as sa

from migrator.errors import PreconditionFailed, TemporarilyUnavailable, UsageProblem
from migrator.ledger import LeaseLost, Ledger, this_process
from migrator.ledger import ledger as module
from migrator.ledger.ledger import SCHEMA, metadata
from migrator.ledger.models import VERSION_TABLE, Chunk, Migration
from tests import postgres
from tests.unit import test_ledger as core
from tests.unit.test_ledger import clock, dead_owner, dead_process  # noqa: F401 - fixtures of the suite


@pytest.fixture(scope="session")
def server() -> Iterator[sa.Engine]:
    """The server's own database, in which the others are made."""
    with postgres.server() as url:
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        yield engine
        engine.dispose()


def make_database(server: sa.Engine, name: str) -> str:
    """Makes an empty database and gives its URL."""
    with server.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    return server.url.set(database=name).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def ledger_url(server) -> str:
    url = make_database(server, "ledger")
    Ledger(url).close()
    return url


numbers = itertools.count()


class TestOnPostgres(core.LedgerSuite):
    @pytest.fixture
    def empty_url(self, server) -> str:
        return make_database(server, f"empty_{next(numbers)}")

    @pytest.fixture
    def url(self, ledger_url) -> Iterator[str]:
        """A ledger that is emptied after each test: faster than making one anew."""
        yield ledger_url
        engine = sa.create_engine(ledger_url, poolclass=sa.NullPool)
        with engine.begin() as connection:
            connection.exec_driver_sql("SET lock_timeout = '10s'")  # a test that left a connection open
            connection.exec_driver_sql("SET session_replication_role = replica")  # what is written once, too
            for table in metadata().tables:
                connection.exec_driver_sql(f"DELETE FROM {table}")
            connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '{SCHEMA}'")
        engine.dispose()

    def test_a_database_of_something_else_is_refused(self, empty_url):
        engine = sa.create_engine(empty_url, poolclass=sa.NullPool)
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE alembic_version (version_num text)")
        with pytest.raises(UsageProblem, match="a database of something else"):
            Ledger(empty_url)
        with engine.connect() as connection:
            assert sa.inspect(connection).get_table_names() == ["alembic_version"]
        engine.dispose()

    def test_a_transaction_of_a_process_that_was_stopped_is_ended(self, url, monkeypatch):
        with monkeypatch.context() as short:
            short.setattr(module, "SECONDS", 1)  # for the connection that is made now
            stopped = Ledger(url)
        with closing(stopped), closing(Ledger(url)) as other:
            migration = core.open_backfill(other)

            def stop_in_a_transaction() -> None:
                with stopped._write() as session:
                    session.get_one(Migration, migration.id, with_for_update=module.LOCK)
                    assert core.lease(other, migration, this_process()) is not None, "its lock is free again"
                    session.get_one(Migration, migration.id, populate_existing=True)

            with pytest.raises(TemporarilyUnavailable, match="stopped in the middle of a transaction") as caught:
                stop_in_a_transaction()
            assert caught.value.exit_code == 4
            assert stopped.migration(migration.name) is not None, "the command may be repeated"

    @pytest.mark.parametrize("minutes", [-10, 10])
    def test_leases_go_by_the_databases_clock_whatever_a_machine_says(self, url, monkeypatch, minutes):
        real = module.now
        with closing(Ledger(url)) as ledger, closing(Ledger(url)) as other:
            migration = core.open_backfill(ledger, chunks=1)
            mine = core.lease(ledger, migration, "here/1/a", seconds=60)
            with monkeypatch.context() as wrong:
                wrong.setattr(module, "now", lambda: real() + timedelta(minutes=minutes))
                assert core.lease(other, migration, this_process()) is None, "60 s are not over"
                assert [chunk.id for chunk in other.live_leases(migration.id)] == [mine.id]
                assert other.extend_leases(migration.id, "here/1/a", seconds=60) == {mine.id}
            ledger.check_lease(mine)
            (chunk,) = ledger.live_leases(migration.id)
            assert chunk.lease_until is not None
            left = chunk.lease_until - real()
            assert timedelta(seconds=30) < left < timedelta(seconds=90)

    def test_a_server_that_is_not_there(self, url, server):
        gone = sa.make_url(url).set(database="no_such_database", username="u", password="geheim")
        for unreachable in (gone, gone.set(host="/nowhere", query={})):
            with pytest.raises(TemporarilyUnavailable) as caught:
                Ledger(unreachable.render_as_string(hide_password=False))
            assert "geheim" not in core.one_line(caught)
            assert caught.value.exit_code == 4

    def test_a_connection_that_broke_is_replaced(self, url, ledger, server):
        core.plan(ledger)
        with server.connect() as connection:
            name = sa.make_url(url).database
            ended = connection.execute(
                sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"), {"name": name}
            )
            assert ended.all() == [(True,)]
        assert ledger.migration("digits-v2").name == "digits-v2"

    def test_a_lease_taken_meanwhile_is_seen_by_the_move_that_waited(self, url, ledger):
        """A rollback that begins while a lease is being taken sees that lease, so it does not overtake the writer."""
        migration = core.open_backfill(ledger, chunks=1)
        leasing, go_on = threading.Event(), threading.Event()

        @sa.event.listens_for(ledger._engine, "before_cursor_execute")
        def wait(_connection, _cursor, statement, *_):
            if statement.startswith("UPDATE chunks"):
                leasing.set()
                assert go_on.wait(20)

        with closing(Ledger(url)) as other, ThreadPoolExecutor(2) as pool:
            leased = pool.submit(core.lease, ledger, migration, this_process())
            assert leasing.wait(20)
            moved = pool.submit(other.move, migration, state="rolling_back", event="rollback begins")
            core.until(lambda: waiting_for_a_lock(url) == 1)
            go_on.set()
            assert leased.result(20).ordinal == 0
            assert moved.result(20).state == "rolling_back"
            assert len(other.live_leases(migration.id)) == 1
            with pytest.raises(LeaseLost):
                core.lease(other, migration, this_process())

    def test_a_late_finish_is_not_undone_by_the_lease_that_came_too_late(self, url, ledger, dead_owner):  # noqa: F811
        """The holder was taken for dead, yet finishes in the very moment in which another takes its chunk over."""
        migration = core.open_backfill(ledger, chunks=1)
        chunk = core.lease(ledger, migration, dead_owner)
        run = ledger.start_run(migration.id, dead_owner)
        finishing, go_on = threading.Event(), threading.Event()

        @sa.event.listens_for(ledger._engine, "before_cursor_execute")
        def wait(_connection, _cursor, statement, *_):
            if statement.startswith("UPDATE backfill_runs"):  # the chunk is done, and not yet committed
                finishing.set()
                assert go_on.wait(20)

        with closing(Ledger(url)) as other, ThreadPoolExecutor(2) as pool:
            done = pool.submit(core.finish, ledger, chunk, dead_owner, run, written=[1, 2])
            assert finishing.wait(20)
            leased = pool.submit(core.lease, other, migration, this_process())
            core.until(lambda: waiting_for_a_lock(url) == 1)
            go_on.set()
            done.result(20)
            assert leased.result(20) is None
            (found,) = other.chunks(migration.id)
            assert isinstance(found, Chunk)
            assert (found.state, found.written) == ("done", 2)

    def test_a_name_planned_by_many_at_once(self, ledger):
        core.plan(ledger, "other")  # the encoders
        at_once = threading.Barrier(4)

        def plan(_: int) -> bool:
            at_once.wait()
            try:
                core.plan(ledger)
            except PreconditionFailed:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert any(pool.map(plan, range(4)))
        assert ledger.migration("digits-v2").state == "planned"


def waiting_for_a_lock(url: str) -> int:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        found = connection.exec_driver_sql(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ).scalar_one()
    engine.dispose()
    return int(found)
