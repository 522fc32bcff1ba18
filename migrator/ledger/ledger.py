"""The ledger: every fact about a migration that must survive a crash, behind one class. SQL is spoken nowhere else.

Each method is one transaction. State changes are compare-and-set, so that two processes cannot both make one.
"""

from __future__ import annotations

import datetime as dt
import getpass
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.orm import Session, undefer
from sqlalchemy.pool import NullPool

from migrator.errors import MigratorError, PreconditionFailed, TemporarilyUnavailable, UsageProblem
from migrator.ledger.models import (
    VERSION_TABLE,
    BackfillRun,
    Base,
    Chunk,
    ChunkState,
    Encoder,
    ItemFailure,
    Migration,
    Outcome,
    Plan,
    Route,
    RouteClientRow,
    StageEvent,
    State,
    TrainingRun,
    Verification,
)
from migrator.lifecycle.strategy import STRATEGIES, Stage

SCHEMA = "0007"
"""The newest revision in `versions/`; a ledger that is at it is opened without loading alembic."""

LOCK: dict[str, Any] = {"key_share": True}
"""PostgreSQL locks a migration's row for the transaction, without hindering rows that refer to it."""

SECONDS = 10
"""How long a connection, a lock or an idle transaction of the PostgreSQL ledger may take."""

IDLE_TRANSACTION = "25P03"
"""PostgreSQL's code for a transaction that it ended because nothing came for `SECONDS`."""

SPARE = 16
"""Further chunks that are tried when the first free ones are lost to their late holders."""

SEARCH = 2.0
"""Seconds that a search may take which was begun with a row in its last moment. No longer than the ttl counts."""

GONE_AFTER = 10
"""Ttls after its last report for which a client that did not close still counts: it may be cut off from the ledger and
answer with the last row that it has."""

FORGOTTEN_AFTER = dt.timedelta(days=1)
"""Age at which the row of a client that did not close is removed; more than `GONE_AFTER` of the longest ttl."""

UPGRADE_LOCK = 0x6D696772
"""PostgreSQL's advisory lock for creating or upgrading the tables."""

FailureKind = Literal["image", "encoder", "store"]


class LeaseLost(MigratorError):
    """Another process took the chunk over, or the migration was stopped: what this one did with it does not count."""

    exit_code = 3


class RouteMoved(PreconditionFailed):
    """The route was changed by somebody else since it was read."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one item could not be re-embedded."""

    item: int | str
    kind: FailureKind
    reason: str


@dataclass(frozen=True, slots=True)
class Counts:
    """Progress of a migration, summed over its chunks."""

    by_state: Mapping[str, int]
    """Chunk state -> number of chunks."""
    planned: int
    """Items in the chunks of the first pass, as cut."""
    done: int
    """Items of the first pass whose chunk is done."""
    written: int
    gone: int
    passes: int
    open_failures: int


def now() -> dt.datetime:
    """The time, in UTC."""
    return dt.datetime.now(dt.UTC)


def this_process() -> str:
    """Names this process as a lease owner: host, pid and a token that no later process shares."""
    return f"{_host()}/{os.getpid()}/{os.urandom(4).hex()}"


def _host() -> str:
    """Where a pid means something. Cloned machines share a name and containers a kernel, but no two running systems
    share the id of their boot, and no two process tables of one system their namespace.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        table = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:  # not Linux
        return f"{socket.gethostname()}:0"
    return f"{socket.gethostname()}:{boot}:{table}"


def is_dead(owner: str) -> bool:
    """Whether `owner` was a process of this host that no longer runs. A process elsewhere is never known to be dead."""
    host, pid, _ = owner.rsplit("/", 2)
    if host != _host():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


class Ledger:
    """The SQL database with migrations, plans, routes, chunks and the audit log. SQLite or PostgreSQL."""

    def __init__(self, url: str) -> None:
        """Opens the ledger at `url`, creating or upgrading its tables where needed.

        Raises `TemporarilyUnavailable` if it cannot be reached or written, `UsageProblem` if a newer migrator wrote it.
        """
        try:
            self.url: URL = make_url(url)
        except (exc.ArgumentError, ValueError) as error:
            raise UsageProblem('the ledger\'s URL is not one: write for instance "sqlite:///migrator.db"') from error
        self._engine = self._create_engine()
        try:
            with self._translated():
                self._bring_up_to_date()
        except MigratorError:
            self.close()
            raise

    # -- opening ------------------------------------------------------------------------------------------------

    def _create_engine(self) -> Engine:
        try:
            if self.url.get_backend_name() != "sqlite":
                # A host that does not answer must not hold up the application that reads its route.
                return self._server_engine()
            if self.url.database in (None, "", ":memory:"):
                raise UsageProblem("a ledger in memory forgets all: name a file, for instance sqlite:///migrator.db")
            # NullPool: a connection per transaction keeps SQLite's locks short and lets threads share the ledger.
            engine = sa.create_engine(self.url, poolclass=NullPool, connect_args={"timeout": 15})
        except (ImportError, exc.ArgumentError) as error:
            raise UsageProblem(
                f"no driver for the ledger {self}: {error}. For PostgreSQL: pip install 'advbct-migrator[postgres]'"
            ) from error

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, _record: Any) -> None:
            connection.isolation_level = None  # we say BEGIN ourselves, below
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            # Writers take SQLite's write lock at once: a deferred one could fail half-way with "database is locked".
            writes = connection.get_execution_options().get("writes", False)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

        return engine

    def _server_engine(self) -> Engine:
        """For PostgreSQL: no process that was stopped or cut off holds up another one for long.

        A cut connection is noticed by the kernel (`tcp_user_timeout`), and a transaction of a frozen process is ended
        by the server, which sets its locks free.
        """
        options: dict[str, Any] = {"connect_timeout": SECONDS}
        if self.url.get_driver_name() == "psycopg":
            options.update(keepalives_idle=SECONDS, keepalives_interval=SECONDS, tcp_user_timeout=1000 * SECONDS)
        engine = sa.create_engine(self.url, pool_pre_ping=True, connect_args=options)

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, _record: Any) -> None:
            with connection.cursor() as cursor:
                for name in ("idle_in_transaction_session_timeout", "lock_timeout"):
                    cursor.execute(f"SET {name} = '{SECONDS}s'")
            connection.commit()

        return engine

    def __str__(self) -> str:
        return self.url.render_as_string(hide_password=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except exc.OperationalError as error:
            raise TemporarilyUnavailable(f"ledger {self}: {_reason(error)}; {_advice(error, self.url)}") from error
        except exc.DatabaseError as error:
            if isinstance(error, exc.IntegrityError):
                raise
            if getattr(error.orig, "sqlstate", None) == IDLE_TRANSACTION:
                raise TemporarilyUnavailable(
                    f"ledger {self}: this process was stopped in the middle of a transaction, which the server ended; "
                    "run the command again"
                ) from error
            raise UsageProblem(f"ledger {self}: {_reason(error)}; check that the URL names a ledger") from error

    def _revision(self, connection: Connection) -> str | None:
        """The ledger's schema; None for an empty database. Refuses what this migrator must not touch."""
        tables = sa.inspect(connection).get_table_names()
        if VERSION_TABLE not in tables:
            if tables:
                raise UsageProblem(
                    f"{self} is a database of something else: give migrator one of its own (key `ledger`)"
                )
            return None
        revision = connection.execute(sa.select(sa.column("version_num")).select_from(sa.table(VERSION_TABLE))).scalar()
        if revision is not None and revision > SCHEMA:
            raise UsageProblem(
                f"ledger {self} has schema {revision}, written by a newer migrator; this one knows up to {SCHEMA}: "
                "pip install --upgrade advbct-migrator"
            )
        return None if revision is None else str(revision)

    def _bring_up_to_date(self) -> None:
        with self._engine.connect() as connection:
            if self._revision(connection) == SCHEMA:
                return
        if self.url.get_backend_name() == "sqlite":
            with self._engine.connect() as connection:
                # Readers continue while a writer writes; the mode stays with the file.
                connection.exec_driver_sql("COMMIT")
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
        with self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            if self.url.get_backend_name() == "postgresql":  # SQLite has its write lock already
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(UPGRADE_LOCK)))
            if self._revision(connection) != SCHEMA:  # another process may have been faster
                config.attributes["connection"] = connection
                command.upgrade(config, "head")

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with self._translated(), Session(self._engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def _write(self) -> Iterator[Session]:
        with (
            self._translated(),
            self._engine.connect().execution_options(writes=True) as connection,
            Session(connection, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    def _clock(self, session: Session) -> dt.datetime:
        """The database's time, by which leases begin and end: machines may disagree about theirs.

        A SQLite file is on one machine, whose clock SQLite itself would read.
        """
        if self.url.get_backend_name() == "sqlite":
            return now()
        at = session.scalar(sa.select(sa.func.clock_timestamp()))
        assert isinstance(at, dt.datetime)
        return at.astimezone(dt.UTC)

    def close(self) -> None:
        """Releases the database connections."""
        self._engine.dispose()

    # -- encoders -----------------------------------------------------------------------------------------------

    def save_encoder(self, encoder_id: str, manifest: str) -> None:
        """Keeps the manifest (JSON text) of an encoder seen for the first time."""
        with suppress(exc.IntegrityError), self._write() as session:  # another process may save it just now
            if session.get(Encoder, encoder_id) is None:
                session.add(Encoder(id=encoder_id, manifest=manifest, seen_at=now()))

    def encoder_manifest(self, encoder_id: str) -> str | None:
        """The manifest (JSON text) of an encoder, as it was when first seen."""
        with self._read() as session:
            found = session.get(Encoder, encoder_id)
            return found.manifest if found else None

    # -- migrations, plans, training, verification -----------------------------------------------------------------

    def migration(self, name: str) -> Migration | None:
        """The latest migration of that name."""
        with self._read() as session:
            return session.scalars(
                sa.select(Migration).where(Migration.name == name).order_by(Migration.id.desc())
            ).first()

    def other_owner(self, migration: Migration) -> Migration | None:
        """Another migration that holds this one's collection, or still keeps old vectors of it."""
        with self._read() as session:
            return session.scalars(
                sa.select(Migration)
                .where(Migration.collection == migration.collection, Migration.id != migration.id)
                .where(
                    Migration.state.in_(("active", "rolling_back"))
                    | (Migration.old_kept.is_(True) & (Migration.state == "finished"))
                )
            ).first()

    def save_plan(
        self,
        name: str,
        *,
        collection: str,
        source: str,
        alias: str | None,
        strategy: str,
        old_encoder_id: str,
        new_encoder_id: str | None,
        fingerprint: str,
        bound: dict[str, Any],
        content: dict[str, Any],
    ) -> Plan:
        """Saves a plan; opens the migration if none of that name is open. Refuses for one under way."""
        with self._write() as session:
            found = self._plannable(session, name)
            if found is None:
                found = Migration(
                    name=name, stage="planned", state="planned", paused=None, old_kept=False, created_at=now()
                )
                session.add(found)
            found.collection, found.source, found.alias, found.strategy = collection, source, alias, strategy
            found.old_encoder_id, found.new_encoder_id = old_encoder_id, new_encoder_id
            found.changed_at = now()
            try:
                session.flush()
            except exc.IntegrityError as error:
                if "one_open_migration_per_name" not in str(error.orig):
                    raise
                raise PreconditionFailed(
                    f"{name} is being planned by another process: run the command again"
                ) from error
            plan = Plan(migration_id=found.id, fingerprint=fingerprint, bound=bound, content=content, created_at=now())
            session.add(plan)
            self._note(session, found, "plan", {"fingerprint": fingerprint})
            return plan

    def check_plannable(self, name: str) -> None:
        """Refuses while a migration of that name is under way."""
        with self._read() as session:
            self._plannable(session, name)

    def _plannable(self, session: Session, name: str) -> Migration | None:
        """The migration of that name that is planned and no more, if there is one."""
        found = session.scalars(
            sa.select(Migration)
            .where(Migration.name == name, Migration.state.in_(("planned", "active", "rolling_back")))
            .with_for_update(key_share=True)
        ).first()
        if found is not None and found.state != "planned":
            raise PreconditionFailed(
                f"{name} is under way (stage {found.stage}): finish it, or `migrator rollback {name}`, "
                "before planning again"
            )
        return found

    def latest_plan(self, migration_id: int) -> Plan | None:
        """The newest plan of a migration."""
        with self._read() as session:
            return session.scalars(
                sa.select(Plan).where(Plan.migration_id == migration_id).order_by(Plan.id.desc())
            ).first()

    def start_training(self, migration_id: int, *, method: str, settings: dict[str, Any], folder: str) -> int:
        """Opens a training run and returns its number."""
        with self._write() as session:
            migration = session.get_one(Migration, migration_id)
            run = TrainingRun(
                migration_id=migration_id,
                method=method,
                settings=settings,
                folder=folder,
                state="running",
                encoder_id=None,
                validation=None,
                error=None,
                started_at=now(),
                finished_at=None,
            )
            session.add(run)
            self._note(session, migration, "train", {"method": method})
            session.flush()
            return run.id

    def finish_training(
        self,
        run_id: int,
        *,
        encoder_id: str | None,
        validation: dict[str, Any] | None,
        error: str | None,
        is_candidate: bool = True,
    ) -> None:
        """Closes a training run; with an encoder, that becomes the migration's new encoder if it `is_candidate`."""
        with self._write() as session:
            run = session.get_one(TrainingRun, run_id)
            migration = session.get_one(Migration, run.migration_id, with_for_update=True)
            if encoder_id is not None and is_candidate and migration.state != "planned":
                error = f"{migration.name} is under way: its new encoder cannot be exchanged"
            run.state = "finished" if error is None else "failed"
            run.encoder_id, run.validation, run.error, run.finished_at = encoder_id, validation, error, now()
            if encoder_id is not None and error is None and is_candidate:
                migration.new_encoder_id, migration.changed_at = encoder_id, now()
            detail = {"encoder": encoder_id} if error is None else {"error": error}
            self._note(session, migration, "trained" if error is None else "training failed", detail)
        if encoder_id is not None and error is not None:
            raise PreconditionFailed(error)

    def set_new_encoder(self, migration_id: int, encoder_id: str) -> None:
        """Takes an encoder of another run, or made elsewhere, as the new one, while nothing is under way."""
        with self._write() as session:
            session.execute(
                sa.update(Migration)
                .where(Migration.id == migration_id, Migration.state == "planned")
                .values(new_encoder_id=encoder_id, changed_at=now())
            )

    def trainings(self, migration_id: int) -> Sequence[TrainingRun]:
        """The training runs of a migration, oldest first."""
        with self._read() as session:
            return session.scalars(
                sa.select(TrainingRun).where(TrainingRun.migration_id == migration_id).order_by(TrainingRun.id)
            ).all()

    def save_verification(
        self,
        migration: Migration,
        *,
        plan_fingerprint: str,
        old_encoder_id: str,
        new_encoder_id: str,
        queries_sha256: str,
        outcome: Outcome,
        results: dict[str, Any],
    ) -> None:
        """Records what `verify` found."""
        with self._write() as session:
            session.add(
                Verification(
                    migration_id=migration.id,
                    plan_fingerprint=plan_fingerprint,
                    old_encoder_id=old_encoder_id,
                    new_encoder_id=new_encoder_id,
                    queries_sha256=queries_sha256,
                    outcome=outcome,
                    results=results,
                    created_at=now(),
                )
            )
            detail = {"outcome": outcome} | ({"accepted": True} if results.get("accepted") else {})
            self._note(session, session.get_one(Migration, migration.id), "verify", detail)

    def verifications(self, migration_id: int) -> Sequence[Verification]:
        """All verifications of a migration, oldest first."""
        with self._read() as session:
            return session.scalars(
                sa.select(Verification).where(Verification.migration_id == migration_id).order_by(Verification.id)
            ).all()

    def latest_verification(self, migration_id: int) -> Verification | None:
        """The newest verification of a migration."""
        with self._read() as session:
            return session.scalars(
                sa.select(Verification)
                .where(Verification.migration_id == migration_id)
                .order_by(Verification.id.desc())
            ).first()

    # -- stages, route, audit log -----------------------------------------------------------------------------------

    def _note(self, session: Session, migration: Migration, what: str, detail: dict[str, Any]) -> None:
        session.add(
            StageEvent(
                migration_id=migration.id, event=what, stage=migration.stage, detail=detail, actor=_actor(), at=now()
            )
        )

    def note(self, migration: Migration, what: str, detail: dict[str, Any]) -> None:
        """Writes a line into the audit log."""
        with self._write() as session:
            self._note(session, session.get_one(Migration, migration.id), what, detail)

    def events(self, migration_id: int) -> Sequence[StageEvent]:
        """The audit log of a migration, oldest first."""
        with self._read() as session:
            return session.scalars(
                sa.select(StageEvent).where(StageEvent.migration_id == migration_id).order_by(StageEvent.id)
            ).all()

    def move(
        self,
        migration: Migration,
        *,
        stage: Stage | None = None,
        state: State | None = None,
        event: str,
        detail: dict[str, Any] | None = None,
        route: dict[str, Any] | None = None,
        old_kept: bool | None = None,
        shadow: str | None = None,
        all_done: bool = False,
    ) -> Migration:
        """Moves a migration on from exactly the stage and state it was read in, with its route, in one transaction.

        `route` holds columns of `Route`; its `epoch` is the one last read (0 where there is none) and grows by one.
        With `all_done` every chunk must be done at that instant. Raises `PreconditionFailed` if that is not so, or if
        somebody else moved it meanwhile, or holds the collection; `RouteMoved` likewise.
        """
        changes: dict[str, Any] = {"changed_at": now(), "stage": stage or migration.stage}
        changes["state"] = state or migration.state
        changes["old_kept"] = migration.old_kept if old_kept is None else old_kept
        changes["shadow"] = migration.shadow if shadow is None else shadow
        try:
            with self._write() as session:
                moved = session.execute(
                    sa.update(Migration)
                    .where(
                        Migration.id == migration.id,
                        Migration.stage == migration.stage,
                        Migration.state == migration.state,
                    )
                    .values(**changes)
                ).rowcount  # type: ignore[attr-defined]
                if moved != 1:
                    raise PreconditionFailed(
                        f"{migration.name} was moved by another process meanwhile: `migrator status {migration.name}`"
                    )
                if all_done and self._has_open_chunks(session, migration.id):
                    raise PreconditionFailed(
                        f"{migration.name}: a backfill run cut further chunks: `migrator backfill` first"
                    )
                if route is not None:
                    self._set_route(session, migration, route)
                fresh = session.get_one(Migration, migration.id, populate_existing=True)
                self._note(session, fresh, event, detail or {})
                return fresh
        except exc.IntegrityError as error:
            raise PreconditionFailed(
                f"another migration is active on {migration.collection}: finish it or roll it back first"
            ) from error

    def _has_open_chunks(self, session: Session, migration_id: int) -> bool:
        """No lease is given out while the caller's transaction holds the migration's row."""
        return (
            session.scalar(
                sa.select(Chunk.id).where(Chunk.migration_id == migration_id, Chunk.state != "done").limit(1)
            )
            is not None
        )

    def _set_route(self, session: Session, migration: Migration, route: dict[str, Any]) -> None:
        epoch, at = route["epoch"], self._clock(session)
        values = {**route, "migration_id": migration.id, "epoch": epoch + 1, "changed_at": now(), "settled_at": at}
        if epoch == 0:
            session.add(Route(collection=migration.collection, **values))
            session.flush()
            return
        before = session.get(Route, migration.collection, populate_existing=True)
        if before is not None:
            values["settled_at"] = max(
                _settled_at(before), at + dt.timedelta(seconds=before.ttl + min(before.ttl, SEARCH))
            )
        moved = session.execute(
            sa.update(Route).where(Route.collection == migration.collection, Route.epoch == epoch).values(**values)
        ).rowcount  # type: ignore[attr-defined]
        if moved != 1:
            raise RouteMoved(
                f"the route of {migration.collection} was changed by another process: run the command again"
            )

    def route(self, collection: str) -> Route | None:
        """The route of a collection, in one read."""
        with self._read() as session:
            return session.get(Route, collection)

    # -- clients of the route -----------------------------------------------------------------------------------------

    def report_client(self, collection: str, owner: str, *, name: str, epoch: int, ttl: float) -> None:
        """Records that a client answers with the row of this epoch, and keeps a row for up to `ttl` seconds."""
        with self._write() as session:
            at = self._clock(session)
            session.execute(sa.delete(RouteClientRow).where(RouteClientRow.seen_at < at - FORGOTTEN_AFTER))
            session.merge(
                RouteClientRow(collection=collection, owner=owner, name=name, epoch=epoch, ttl=ttl, seen_at=at)
            )

    def forget_client(self, collection: str, owner: str) -> None:
        """Removes a client that has stopped."""
        with self._write() as session:
            session.execute(
                sa.delete(RouteClientRow).where(RouteClientRow.collection == collection, RouteClientRow.owner == owner)
            )

    def clients_behind(self, collection: str, epoch: int) -> Sequence[RouteClientRow]:
        """Clients that reported an earlier epoch than this one last and may still answer with it, by name."""
        with self._read() as session:
            at = self._clock(session)
            earlier = session.scalars(
                sa.select(RouteClientRow)
                .where(RouteClientRow.collection == collection, RouteClientRow.epoch < epoch)
                .order_by(RouteClientRow.name, RouteClientRow.owner)
            ).all()
            return [
                client
                for client in earlier
                if at - client.seen_at < dt.timedelta(seconds=GONE_AFTER * client.ttl) and not is_dead(client.owner)
            ]

    def seconds_to_settle(self, collection: str) -> float:
        """How long a client without a name may still hold an earlier row of the route; 0 when none can."""
        with self._read() as session:
            route = session.get(Route, collection)
            if route is None:
                return 0.0
            return max(0.0, (_settled_at(route) - self._clock(session)).total_seconds())

    def pause(self, migration: Migration, reason: str | None) -> None:
        """Asks for a pause (a reason) or lifts it (None). A running backfill stops at its next chunk boundary."""
        with self._write() as session:
            fresh = session.get_one(Migration, migration.id)
            fresh.paused, fresh.changed_at = reason, now()
            self._note(session, fresh, "resume" if reason is None else "pause", {"reason": reason} if reason else {})

    # -- chunks -----------------------------------------------------------------------------------------------------

    def add_chunks(
        self,
        migration_id: int,
        pass_number: int,
        ranges: Sequence[tuple[int | str | None, int | str, int]],
        lists: Sequence[Sequence[int | str]] | None = None,
    ) -> None:
        """Stores the ranges (after, up_to, items) of one pass, all or none. A pass already stored stays as it is.

        With `lists` each chunk is that list of ids, which its range covers.
        """
        with self._write() as session:
            session.get_one(Migration, migration_id, with_for_update=LOCK)  # one process at a time cuts
            if self._has_pass(session, migration_id, pass_number):
                return
            rows = [
                {
                    "migration_id": migration_id,
                    "pass_number": pass_number,
                    "ordinal": ordinal,
                    "after_id": None if after is None else json.dumps(after),
                    "upto_id": json.dumps(up_to),
                    "ids": None if lists is None else json.dumps(lists[ordinal]),
                    "items": items,
                    "state": "pending",
                    "attempts": 0,
                    "written": 0,
                    "failed": 0,
                    "gone": 0,
                }
                for ordinal, (after, up_to, items) in enumerate(ranges)
            ]
            if rows:
                session.execute(sa.insert(Chunk), rows)

    def _has_pass(self, session: Session, migration_id: int, pass_number: int) -> bool:
        return (
            session.scalar(
                sa.select(Chunk.id).where(Chunk.migration_id == migration_id, Chunk.pass_number == pass_number).limit(1)
            )
            is not None
        )

    def lease_chunk(self, migration_id: int, owner: str, *, seconds: float, leave: set[int]) -> Chunk | None:
        """The first chunk that is free, with its ids, taken for `seconds`; None if there is none or in a pause.

        Free is: pending, its lease run out, or its holder a dead process of this host. `leave` holds chunk ids that
        this run has already tried. Raises `LeaseLost` once the migration is no longer in its backfill stage.
        """
        with self._write() as session:
            # One lease at a time, and none while the migration is being moved on. SQLite's write lock does the same.
            migration = session.get_one(Migration, migration_id, with_for_update=LOCK)
            if migration.state != "active" or migration.stage not in STRATEGIES[migration.strategy].backfill_stages:
                raise LeaseLost(f"{migration.name} left the backfill stage (now {migration.stage}, {migration.state})")
            if migration.paused is not None:
                return None
            mine = Chunk.migration_id == migration_id
            holders = session.scalars(sa.select(Chunk.lease_owner).where(mine, Chunk.state == "leased").distinct())
            dead = [holder for holder in holders if holder is not None and is_dead(holder)]
            at = self._clock(session)
            abandoned = (Chunk.lease_until < at) | Chunk.lease_owner.in_(dead)
            free = (Chunk.state == "pending") | ((Chunk.state == "leased") & abandoned)
            until = at + dt.timedelta(seconds=seconds)
            first = sa.select(Chunk.id).where(mine, free).order_by(Chunk.pass_number, Chunk.ordinal)
            for chunk_id in session.scalars(first.limit(len(leave) + SPARE)).all():
                if chunk_id in leave:
                    continue
                taken = session.execute(
                    sa.update(Chunk)
                    .where(Chunk.id == chunk_id, free)  # its late holder may finish it just now
                    .values(state="leased", lease_owner=owner, lease_until=until, lease_epoch=Chunk.lease_epoch + 1)
                ).rowcount  # type: ignore[attr-defined]
                if taken:
                    return session.get_one(Chunk, chunk_id, options=[undefer(Chunk.ids)])
            return None

    def finish_chunk(
        self,
        chunk: Chunk,
        owner: str,
        *,
        run_id: int,
        written: Sequence[int | str],
        gone: int,
        failures: Sequence[Failure],
    ) -> None:
        """Marks a leased chunk as done, with its failures, and counts it in the run. Raises `LeaseLost`."""
        with self._write() as session:
            self._unlease(
                session,
                chunk,
                owner,
                state="done",
                written=len(written),
                gone=gone,
                failed=len(failures),
                error=None,
                finished_at=now(),
            )
            self._resolve_failures(session, chunk.migration_id, written)
            self._add_failures(session, chunk.migration_id, failures)
            run = session.get_one(BackfillRun, run_id)
            run.chunks += 1
            run.items += len(written)
            run.seen_at = now()

    def fail_chunk(self, chunk: Chunk, owner: str, *, error: str, max_attempts: int) -> None:
        """Gives back a chunk that the store refused; after `max_attempts` of these it stays `failed`."""
        with self._write() as session:
            attempts = chunk.attempts + 1
            state: ChunkState = "failed" if attempts >= max_attempts else "pending"
            self._unlease(session, chunk, owner, state=state, attempts=attempts, error=error)

    def return_leases(self, migration_id: int, owner: str) -> None:
        """Gives back every chunk that `owner` still holds, undone."""
        with self._write() as session:
            session.execute(
                sa.update(Chunk)
                .where(Chunk.migration_id == migration_id, Chunk.state == "leased", Chunk.lease_owner == owner)
                .values(state="pending", lease_owner=None, lease_until=None)
            )

    def _unlease(self, session: Session, chunk: Chunk, owner: str, **values: Any) -> None:
        freed = session.execute(
            sa.update(Chunk)
            .where(
                Chunk.id == chunk.id,
                Chunk.state == "leased",
                Chunk.lease_owner == owner,
                Chunk.lease_epoch == chunk.lease_epoch,
            )
            .values(lease_owner=None, lease_until=None, **values)
        ).rowcount  # type: ignore[attr-defined]
        if freed != 1:
            raise LeaseLost(f"chunk {chunk.pass_number}/{chunk.ordinal} was taken over by another process")

    def extend_leases(self, migration_id: int, owner: str, *, seconds: float) -> set[int]:
        """Prolongs every lease of `owner`, and returns the ids of the chunks that it still holds.

        None is prolonged once the migration is no longer active: a rollback waits for the last of them to end.
        """
        active = sa.select(Migration.id).where(Migration.id == migration_id, Migration.state == "active")
        with self._write() as session:
            until = self._clock(session) + dt.timedelta(seconds=seconds)
            return set(
                session.scalars(
                    sa.update(Chunk)
                    .where(
                        Chunk.migration_id.in_(active),
                        Chunk.state == "leased",
                        Chunk.lease_owner == owner,
                    )
                    .values(lease_until=until)
                    .returning(Chunk.id)
                )
            )

    def check_lease(self, chunk: Chunk) -> None:
        """Raises `LeaseLost` unless the lease that `chunk` was read with is the present one, in an active migration."""
        with self._read() as session:
            holds = session.scalar(
                sa.select(Chunk.id)
                .join(Migration, Migration.id == Chunk.migration_id)
                .where(
                    Chunk.id == chunk.id,
                    Chunk.state == "leased",
                    Chunk.lease_epoch == chunk.lease_epoch,
                    Migration.state == "active",
                )
            )
        if holds is None:
            raise LeaseLost(f"chunk {chunk.pass_number}/{chunk.ordinal} was taken over by another process")

    def live_leases(self, migration_id: int) -> Sequence[Chunk]:
        """Chunks held by processes that may still be writing."""
        with self._read() as session:
            at = self._clock(session)
            leased = session.scalars(
                sa.select(Chunk).where(
                    Chunk.migration_id == migration_id, Chunk.state == "leased", Chunk.lease_until >= at
                )
            ).all()
            return [chunk for chunk in leased if chunk.lease_owner is not None and not is_dead(chunk.lease_owner)]

    def chunks(self, migration_id: int, *states: ChunkState) -> Sequence[Chunk]:
        """The chunks of a migration in one of `states` (all, if none is given), in order, without their ids."""
        with self._read() as session:
            query = sa.select(Chunk).where(Chunk.migration_id == migration_id)
            if states:
                query = query.where(Chunk.state.in_(states))
            return session.scalars(query.order_by(Chunk.pass_number, Chunk.ordinal)).all()

    def chunks_of_later_passes(self, migration_id: int) -> Sequence[Chunk]:
        """The chunks of all passes but the first, in order."""
        with self._read() as session:
            query = sa.select(Chunk).where(Chunk.migration_id == migration_id, Chunk.pass_number > 0)
            return session.scalars(query.order_by(Chunk.pass_number, Chunk.ordinal)).all()

    def ids_of(self, chunk: Chunk) -> list[int | str] | None:
        """The ids of a chunk that is a list; None of one that is a range."""
        with self._read() as session:
            ids = session.scalar(sa.select(Chunk.ids).where(Chunk.id == chunk.id))
            return None if ids is None else list(json.loads(ids))

    def set_restored(self, chunk: Chunk) -> None:
        """Marks a chunk whose old vectors are back."""
        with self._write() as session:
            session.execute(
                sa.update(Chunk)
                .where(Chunk.id == chunk.id)
                .values(state="restored", lease_owner=None, lease_until=None)
            )

    def counts(self, migration_id: int) -> Counts:
        """Progress, in one transaction."""
        with self._read() as session:
            mine = Chunk.migration_id == migration_id
            by_state = dict(
                session.execute(sa.select(Chunk.state, sa.func.count()).where(mine).group_by(Chunk.state)).all()
            )
            written, gone, passes = session.execute(
                sa.select(sa.func.sum(Chunk.written), sa.func.sum(Chunk.gone), sa.func.max(Chunk.pass_number)).where(
                    mine
                )
            ).one()
            first = mine & (Chunk.pass_number == 0)
            planned = session.scalar(sa.select(sa.func.sum(Chunk.items)).where(first))
            done = session.scalar(sa.select(sa.func.sum(Chunk.items)).where(first, Chunk.state == "done"))
            failures = session.scalar(
                sa.select(sa.func.count())
                .select_from(ItemFailure)
                .where(ItemFailure.migration_id == migration_id, ItemFailure.state == "open")
            )
            return Counts(
                by_state={str(state): number for state, number in by_state.items()},
                planned=planned or 0,
                done=done or 0,
                written=written or 0,
                gone=gone or 0,
                passes=0 if passes is None else passes + 1,
                open_failures=failures or 0,
            )

    # -- item failures ------------------------------------------------------------------------------------------------

    def _resolve_failures(self, session: Session, migration_id: int, written: Sequence[int | str]) -> None:
        waiting = session.scalars(
            sa.select(ItemFailure).where(ItemFailure.migration_id == migration_id, ItemFailure.state != "resolved")
        ).all()
        if waiting:
            items = {json.dumps(item) for item in written}
            for failure in waiting:
                if failure.item_id in items:
                    failure.state, failure.last_at = "resolved", now()

    def _add_failures(self, session: Session, migration_id: int, failures: Sequence[Failure]) -> None:
        for failure in failures:
            item_id = json.dumps(failure.item)
            found = session.scalars(
                sa.select(ItemFailure).where(ItemFailure.migration_id == migration_id, ItemFailure.item_id == item_id)
            ).first()
            if found is None:
                found = ItemFailure(migration_id=migration_id, item_id=item_id, attempts=0, first_at=now())
                session.add(found)
            found.kind, found.reason, found.state = failure.kind, failure.reason, "open"
            found.attempts += 1
            found.last_at = now()

    def failures(self, migration_id: int, *, state: str = "open") -> Sequence[ItemFailure]:
        """The dead letters of a migration, in the order they were first seen."""
        with self._read() as session:
            return session.scalars(
                sa.select(ItemFailure)
                .where(ItemFailure.migration_id == migration_id, ItemFailure.state == state)
                .order_by(ItemFailure.id)
            ).all()

    def retry_failures(self, migration: Migration) -> tuple[int, int]:
        """Lets the next backfill run try every open failure and every failed chunk again; returns both numbers."""
        with self._write() as session:
            items = session.execute(
                sa.update(ItemFailure)
                .where(ItemFailure.migration_id == migration.id, ItemFailure.state == "open")
                .values(state="retry")
            ).rowcount  # type: ignore[attr-defined]
            chunks = session.execute(
                sa.update(Chunk)
                .where(Chunk.migration_id == migration.id, Chunk.state == "failed")
                .values(state="pending", attempts=0)
            ).rowcount  # type: ignore[attr-defined]
            self._note(session, session.get_one(Migration, migration.id), "retry", {"items": items, "chunks": chunks})
            return items, chunks

    # -- backfill runs ------------------------------------------------------------------------------------------------

    def start_run(self, migration_id: int, owner: str) -> int:
        """Opens a backfill run and returns its number."""
        with self._write() as session:
            run = BackfillRun(
                migration_id=migration_id, owner=owner, chunks=0, items=0, ended=None, started_at=now(), seen_at=now()
            )
            session.add(run)
            session.flush()
            return run.id

    def end_run(self, run_id: int, reason: str) -> None:
        """Closes a backfill run."""
        with self._write() as session:
            run = session.get_one(BackfillRun, run_id)
            run.ended, run.seen_at = reason, now()

    def first_pass_work(self, migration_id: int, *, runs: int) -> tuple[list[tuple[dt.datetime, dt.datetime]], int]:
        """The last `runs` backfill runs that finished chunks of the first pass: start and last such chunk of each.

        Then the number of items in the first pass's chunks that were finished since the first of these began.
        """
        done = (Chunk.migration_id == migration_id) & (Chunk.pass_number == 0) & (Chunk.state == "done")
        during = Chunk.finished_at.between(BackfillRun.started_at, BackfillRun.seen_at)
        with self._read() as session:
            spans = [
                (began, ended or began)
                for _, began, ended in session.execute(
                    sa.select(BackfillRun.id, BackfillRun.started_at, sa.func.max(Chunk.finished_at))
                    .join(Chunk, done & during)
                    .where(BackfillRun.migration_id == migration_id)
                    .group_by(BackfillRun.id, BackfillRun.started_at)
                    .order_by(BackfillRun.id.desc())
                    .limit(runs)
                ).all()
            ]
            if not spans:
                return [], 0
            since = min(began for began, _ in spans)
            items = session.scalar(sa.select(sa.func.sum(Chunk.items)).where(done, Chunk.finished_at >= since))
            return spans, int(items or 0)

    def runs(self, migration_id: int) -> Sequence[BackfillRun]:
        """All backfill runs, oldest first."""
        with self._read() as session:
            return session.scalars(
                sa.select(BackfillRun).where(BackfillRun.migration_id == migration_id).order_by(BackfillRun.id)
            ).all()


def _settled_at(route: Route) -> dt.datetime:
    return route.settled_at or route.changed_at + dt.timedelta(seconds=route.ttl)


def metadata() -> sa.MetaData:
    """The tables as the models declare them, to be compared with what the versions build."""
    return Base.metadata


def _actor() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no such user in this container
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _reason(error: exc.DBAPIError) -> str:
    return " ".join(str(error.orig).split())


def _advice(error: exc.OperationalError, url: URL) -> str:
    reason = str(error.orig)
    if "readonly" in reason or "read-only" in reason:
        return "make the file and its folder writable for this user"
    if "locked" in reason:
        return _advice_on_holder(_holder(url.database or ""))
    if "unable to open" in reason:
        return "create its folder, or correct `ledger` in the configuration"
    if "full" in reason:
        return "free some space on its disk and run the command again"
    return "check that it can be reached, then run the command again"


def _holder(database: str) -> int | None:
    """The process that holds a SQLite file for writing, where this machine's lock table can tell."""
    try:
        inodes = {str(Path(database + suffix).stat().st_ino) for suffix in ("", "-shm")}
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for lock in locks:  # "1: POSIX  ADVISORY  WRITE 4711 fe:00:2146651 120 120"
        fields = lock.split()
        if fields[1] == "POSIX" and fields[3] == "WRITE" and fields[5].rpartition(":")[2] in inodes:
            return int(fields[4])
    return None


def _advice_on_holder(pid: int | None) -> str:
    if pid is None:
        return "another process holds it; try again, and if it stays so look for a stuck one"
    try:
        stopped = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        stopped = False
    if not stopped:
        return f"process {pid} holds it: try again"
    return f"process {pid}, which is stopped, holds it: let it continue (kill -CONT {pid}) or end it (kill -KILL {pid})"
