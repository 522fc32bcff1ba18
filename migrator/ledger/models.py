"""The tables of the ledger. Constraints live here: the database refuses what must not happen, whoever asks."""

from __future__ import annotations

import datetime as dt
from typing import Any, Literal, TypeAlias

from sqlalchemy import (
    JSON,
    CheckConstraint,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from migrator.lifecycle.strategy import STRATEGIES, Stage

State: TypeAlias = Literal["planned", "active", "rolling_back", "rolled_back", "finished"]
ChunkState: TypeAlias = Literal["pending", "leased", "done", "failed", "restored"]
Outcome: TypeAlias = Literal["pass", "fail", "inconclusive"]

VERSION_TABLE = "migrator_schema"
"""Alembic's table under a name of our own: an `alembic_version` belongs to another program."""

STAGES: tuple[Stage, ...] = ("planned", "prepare", "canary", "backfill", "cutover", "finalize")


class UtcDateTime(TypeDecorator[dt.datetime]):
    """An aware UTC time. SQLite keeps no zone, so it is put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        """Refuses a naive time and stores UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time in the ledger needs a zone")
        return value.astimezone(dt.UTC)

    def process_result_value(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        """Gives back an aware UTC time."""
        if value is None:
            return None
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


class Base(DeclarativeBase):
    """All tables of the ledger."""

    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it off the class
        dt.datetime: UtcDateTime(),
        dict[str, Any]: JSON(),
        list[str]: JSON(),
        str: String(),
        Stage: String(16),
        State: String(16),
        ChunkState: String(16),
        Outcome: String(16),
    }


def one_of(column: str, values: tuple[str, ...], name: str) -> CheckConstraint:
    """A CHECK that `column` holds one of `values`."""
    return CheckConstraint(f"{column} IN ({', '.join(repr(value) for value in values)})", name=name)


class Encoder(Base):
    """An encoder as it was when first seen; its manifest holds the fingerprint that later loads are compared with."""

    __tablename__ = "encoders"

    id: Mapped[str] = mapped_column(primary_key=True)
    manifest: Mapped[str] = mapped_column(Text)
    seen_at: Mapped[dt.datetime]


class Migration(Base):
    """One upgrade of one collection. A name used again after an end gets a new row."""

    __tablename__ = "migrations"
    __table_args__ = (
        one_of("stage", STAGES, "migrations_stage"),
        one_of("state", ("planned", "active", "rolling_back", "rolled_back", "finished"), "migrations_state"),
        one_of("strategy", tuple(STRATEGIES), "migrations_strategy"),
        CheckConstraint(
            "state IN ('planned', 'rolled_back') OR (old_encoder_id IS NOT NULL AND new_encoder_id IS NOT NULL)",
            name="migrations_encoders_known",
        ),
        Index(
            "one_active_migration_per_collection",
            "collection",
            unique=True,
            sqlite_where=text("state IN ('active', 'rolling_back')"),
            postgresql_where=text("state IN ('active', 'rolling_back')"),
        ),
        Index(
            "one_open_migration_per_name",
            "name",
            unique=True,
            sqlite_where=text("state IN ('planned', 'active', 'rolling_back')"),
            postgresql_where=text("state IN ('planned', 'active', 'rolling_back')"),
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    collection: Mapped[str]
    """Canonical name of the collection that is migrated."""
    source: Mapped[str]
    """What the store's own client calls that collection."""
    alias: Mapped[str | None]
    """The alias by which the configuration addresses it."""
    shadow: Mapped[str | None]
    """The collection beside it that migrator makes; NULL in place and before `prepare`."""
    strategy: Mapped[str] = mapped_column(String(16))
    stage: Mapped[Stage]
    state: Mapped[State]
    old_encoder_id: Mapped[str | None] = mapped_column(ForeignKey("encoders.id"))
    new_encoder_id: Mapped[str | None] = mapped_column(ForeignKey("encoders.id"))
    paused: Mapped[str | None] = mapped_column(Text)
    """The reason somebody gave for the pause; NULL while running."""
    old_kept: Mapped[bool]
    """The undo log, or the old collection of a shadow, is still there, so a rollback is possible."""
    created_at: Mapped[dt.datetime]
    changed_at: Mapped[dt.datetime]

    @property
    def key(self) -> str:
        """Names this migration and no other, of whatever ledger: for files and collections that it leaves."""
        return f"{self.id}-{self.created_at:%Y%m%dT%H%M%S%f}"


class Plan(Base):
    """An immutable description of what will happen, bound by its fingerprint to the facts it was made from."""

    __tablename__ = "plans"

    id: Mapped[int] = mapped_column(primary_key=True)
    migration_id: Mapped[int] = mapped_column(ForeignKey("migrations.id"), index=True)
    fingerprint: Mapped[str]
    bound: Mapped[dict[str, Any]]
    """The facts under the fingerprint: when one of them changes, the plan is stale."""
    content: Mapped[dict[str, Any]]
    created_at: Mapped[dt.datetime]


class TrainingRun(Base):
    """One run of `train`."""

    __tablename__ = "training_runs"
    __table_args__ = (one_of("state", ("running", "finished", "failed"), "training_runs_state"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    migration_id: Mapped[int] = mapped_column(ForeignKey("migrations.id"), index=True)
    method: Mapped[str]
    settings: Mapped[dict[str, Any]]
    folder: Mapped[str]
    state: Mapped[str] = mapped_column(String(16))
    encoder_id: Mapped[str | None] = mapped_column(ForeignKey("encoders.id"))
    validation: Mapped[dict[str, Any] | None]
    error: Mapped[str | None] = mapped_column(Text)
    started_at: Mapped[dt.datetime]
    finished_at: Mapped[dt.datetime | None]


class Verification(Base):
    """One run of `verify`: what was asked, of which encoders, and the verdict."""

    __tablename__ = "verifications"
    __table_args__ = (one_of("outcome", ("pass", "fail", "inconclusive"), "verifications_outcome"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    migration_id: Mapped[int] = mapped_column(ForeignKey("migrations.id"), index=True)
    plan_fingerprint: Mapped[str]
    old_encoder_id: Mapped[str] = mapped_column(ForeignKey("encoders.id"))
    new_encoder_id: Mapped[str] = mapped_column(ForeignKey("encoders.id"))
    queries_sha256: Mapped[str]
    outcome: Mapped[Outcome]
    results: Mapped[dict[str, Any]]
    created_at: Mapped[dt.datetime]


class Route(Base):
    """Which encoder and which collection answer a query. One row a collection, changed by compare-and-set on `epoch`.

    A share of `canary_percent` of the query keys goes to the canary pair, the rest to the query pair.
    """

    __tablename__ = "routes"
    __table_args__ = (
        CheckConstraint("canary_percent BETWEEN 0 AND 100", name="routes_canary_percent"),
        CheckConstraint("canary_percent = 0 OR canary_encoder IS NOT NULL", name="routes_canary_encoder"),
    )

    collection: Mapped[str] = mapped_column(primary_key=True)
    migration_id: Mapped[int] = mapped_column(ForeignKey("migrations.id"))
    epoch: Mapped[int]
    query_encoder: Mapped[str] = mapped_column(ForeignKey("encoders.id"))
    query_collection: Mapped[str]
    canary_encoder: Mapped[str | None] = mapped_column(ForeignKey("encoders.id"))
    canary_collection: Mapped[str | None]
    canary_percent: Mapped[float] = mapped_column(Float)
    write_encoders: Mapped[list[str]]
    """The encoders with which the application embeds an item that it inserts or changes."""
    salt: Mapped[str]
    phase: Mapped[str] = mapped_column(String(16))
    ttl: Mapped[float] = mapped_column(Float, server_default=text("5"))
    """Seconds for which a client without a name may keep a row."""
    settled_at: Mapped[dt.datetime | None]
    """When no client without a name can hold an earlier row any more, by the database's clock. NULL in rows from before
    there was a ttl."""
    changed_at: Mapped[dt.datetime]


class RouteClientRow(Base):
    """A client of a route that reports which epoch it answers with."""

    __tablename__ = "route_clients"

    collection: Mapped[str] = mapped_column(ForeignKey("routes.collection"), primary_key=True)
    owner: Mapped[str] = mapped_column(primary_key=True)
    """Host and process, as the owner of a lease is named."""
    name: Mapped[str] = mapped_column(Text)
    epoch: Mapped[int]
    ttl: Mapped[float] = mapped_column(Float)
    seen_at: Mapped[dt.datetime]
    """By the database's clock."""


class StageEvent(Base):
    """The audit log: what happened, when, by whom. Rows are never changed or removed; triggers see to it."""

    __tablename__ = "stage_events"

    id: Mapped[int] = mapped_column(primary_key=True)
    migration_id: Mapped[int] = mapped_column(ForeignKey("migrations.id"), index=True)
    event: Mapped[str]
    stage: Mapped[Stage]
    detail: Mapped[dict[str, Any]]
    actor: Mapped[str]
    at: Mapped[dt.datetime]


class BackfillRun(Base):
    """One bounded run of `backfill`; its counts give the measured rate."""

    __tablename__ = "backfill_runs"

    id: Mapped[int] = mapped_column(primary_key=True)
    migration_id: Mapped[int] = mapped_column(ForeignKey("migrations.id"), index=True)
    owner: Mapped[str]
    chunks: Mapped[int]
    items: Mapped[int]
    ended: Mapped[str | None] = mapped_column(Text)
    """Why the run ended; NULL while it runs, and permanently if it was killed."""
    started_at: Mapped[dt.datetime]
    seen_at: Mapped[dt.datetime]
    """The time of the last finished chunk, or of the end."""


class Chunk(Base):
    """The unit of leasing, resuming and reporting: a durable range of item ids, (after_id, upto_id], or a list of them.

    Ids are JSON text, so that 7 and "7" stay two ids.
    """

    __tablename__ = "chunks"
    __table_args__ = (
        UniqueConstraint("migration_id", "pass_number", "ordinal", name="chunks_once"),
        one_of("state", ("pending", "leased", "done", "failed", "restored"), "chunks_state"),
        CheckConstraint("(state = 'leased') = (lease_owner IS NOT NULL)", name="chunks_lease_has_owner"),
        Index("chunks_by_state", "migration_id", "state", "pass_number", "ordinal"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    migration_id: Mapped[int] = mapped_column(ForeignKey("migrations.id"))
    pass_number: Mapped[int]
    """0 is the first pass over everything; 1 and on are catch-up passes."""
    ordinal: Mapped[int]
    after_id: Mapped[str | None] = mapped_column(Text)
    upto_id: Mapped[str] = mapped_column(Text)
    ids: Mapped[str | None] = mapped_column(Text, deferred=True)
    """JSON list of the ids; NULL for a range. A list's range covers it. Long, so loaded only with a lease."""
    items: Mapped[int]
    """How many items the chunk held when it was cut."""
    state: Mapped[ChunkState]
    lease_owner: Mapped[str | None]
    lease_until: Mapped[dt.datetime | None]
    """By the database's clock."""
    lease_epoch: Mapped[int] = mapped_column(server_default="0")
    """The fencing token: grows with every lease of this chunk, and never goes back."""
    attempts: Mapped[int]
    written: Mapped[int]
    failed: Mapped[int]
    gone: Mapped[int]
    error: Mapped[str | None] = mapped_column(Text)
    finished_at: Mapped[dt.datetime | None]


class ItemFailure(Base):
    """A dead letter: an item that could not be re-embedded, and why. Open until a retry succeeds."""

    __tablename__ = "item_failures"
    __table_args__ = (
        UniqueConstraint("migration_id", "item_id", name="item_failures_once"),
        one_of("kind", ("image", "encoder", "store"), "item_failures_kind"),
        one_of("state", ("open", "retry", "resolved"), "item_failures_state"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    migration_id: Mapped[int] = mapped_column(ForeignKey("migrations.id"), index=True)
    item_id: Mapped[str] = mapped_column(Text)
    kind: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16))
    attempts: Mapped[int] = mapped_column(Integer)
    first_at: Mapped[dt.datetime]
    last_at: Mapped[dt.datetime]
