"""The first ledger."""

import sqlalchemy as sa
from alembic import op

# The audit log and the plans are written once: no one changes or removes a row, whatever program they use.
WRITTEN_ONCE = ("stage_events", "plans")

revision: str = "0001"
down_revision: str | None = None


def upgrade() -> None:
    op.create_table(
        "encoders",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("card", sa.Text(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "migrations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("collection", sa.String(), nullable=False),
        sa.Column("strategy", sa.String(length=16), nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("old_encoder_id", sa.String(), nullable=True),
        sa.Column("new_encoder_id", sa.String(), nullable=True),
        sa.Column("paused", sa.Text(), nullable=True),
        sa.Column("old_kept", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "stage IN ('planned', 'prepare', 'canary', 'backfill', 'cutover', 'finalize')", name="migrations_stage"
        ),
        sa.CheckConstraint(
            "state IN ('planned', 'active', 'rolling_back', 'rolled_back', 'finished')", name="migrations_state"
        ),
        sa.CheckConstraint(
            "state IN ('planned', 'rolled_back') OR (old_encoder_id IS NOT NULL AND new_encoder_id IS NOT NULL)",
            name="migrations_encoders_known",
        ),
        sa.CheckConstraint("strategy IN ('in_place', 'shadow')", name="migrations_strategy"),
        sa.ForeignKeyConstraint(
            ["new_encoder_id"],
            ["encoders.id"],
        ),
        sa.ForeignKeyConstraint(
            ["old_encoder_id"],
            ["encoders.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "one_active_migration_per_collection",
        "migrations",
        ["collection"],
        unique=True,
        sqlite_where=sa.text("state IN ('active', 'rolling_back')"),
        postgresql_where=sa.text("state IN ('active', 'rolling_back')"),
    )
    op.create_index(
        "one_open_migration_per_name",
        "migrations",
        ["name"],
        unique=True,
        sqlite_where=sa.text("state IN ('planned', 'active', 'rolling_back')"),
        postgresql_where=sa.text("state IN ('planned', 'active', 'rolling_back')"),
    )

    op.create_table(
        "backfill_runs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("migration_id", sa.Integer(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("chunks", sa.Integer(), nullable=False),
        sa.Column("items", sa.Integer(), nullable=False),
        sa.Column("ended", sa.Text(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["migration_id"],
            ["migrations.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_backfill_runs_migration_id", "backfill_runs", ["migration_id"], unique=False)

    op.create_table(
        "chunks",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("migration_id", sa.Integer(), nullable=False),
        sa.Column("pass_number", sa.Integer(), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("after_id", sa.Text(), nullable=True),
        sa.Column("upto_id", sa.Text(), nullable=False),
        sa.Column("items", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("lease_owner", sa.String(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("written", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("gone", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("(state = 'leased') = (lease_owner IS NOT NULL)", name="chunks_lease_has_owner"),
        sa.CheckConstraint("state IN ('pending', 'leased', 'done', 'failed', 'restored')", name="chunks_state"),
        sa.ForeignKeyConstraint(
            ["migration_id"],
            ["migrations.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("migration_id", "pass_number", "ordinal", name="chunks_once"),
    )
    op.create_index("chunks_by_state", "chunks", ["migration_id", "state", "pass_number", "ordinal"], unique=False)

    op.create_table(
        "item_failures",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("migration_id", sa.Integer(), nullable=False),
        sa.Column("item_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("first_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("kind IN ('image', 'encoder', 'store')", name="item_failures_kind"),
        sa.CheckConstraint("state IN ('open', 'retry', 'resolved')", name="item_failures_state"),
        sa.ForeignKeyConstraint(
            ["migration_id"],
            ["migrations.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("migration_id", "item_id", name="item_failures_once"),
    )
    op.create_index("ix_item_failures_migration_id", "item_failures", ["migration_id"], unique=False)

    op.create_table(
        "plans",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("migration_id", sa.Integer(), nullable=False),
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.Column("bound", sa.JSON(), nullable=False),
        sa.Column("content", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["migration_id"],
            ["migrations.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_plans_migration_id", "plans", ["migration_id"], unique=False)

    op.create_table(
        "routes",
        sa.Column("collection", sa.String(), nullable=False),
        sa.Column("migration_id", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("query_encoder", sa.String(), nullable=False),
        sa.Column("query_collection", sa.String(), nullable=False),
        sa.Column("canary_encoder", sa.String(), nullable=True),
        sa.Column("canary_collection", sa.String(), nullable=True),
        sa.Column("canary_percent", sa.Float(), nullable=False),
        sa.Column("write_encoders", sa.JSON(), nullable=False),
        sa.Column("salt", sa.String(), nullable=False),
        sa.Column("phase", sa.String(length=16), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("canary_percent = 0 OR canary_encoder IS NOT NULL", name="routes_canary_encoder"),
        sa.CheckConstraint("canary_percent BETWEEN 0 AND 100", name="routes_canary_percent"),
        sa.ForeignKeyConstraint(
            ["canary_encoder"],
            ["encoders.id"],
        ),
        sa.ForeignKeyConstraint(
            ["migration_id"],
            ["migrations.id"],
        ),
        sa.ForeignKeyConstraint(
            ["query_encoder"],
            ["encoders.id"],
        ),
        sa.PrimaryKeyConstraint("collection"),
    )
    op.create_table(
        "stage_events",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("migration_id", sa.Integer(), nullable=False),
        sa.Column("event", sa.String(), nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["migration_id"],
            ["migrations.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_stage_events_migration_id", "stage_events", ["migration_id"], unique=False)

    op.create_table(
        "training_runs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("migration_id", sa.Integer(), nullable=False),
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("folder", sa.String(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("encoder_id", sa.String(), nullable=True),
        sa.Column("validation", sa.JSON(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('running', 'finished', 'failed')", name="training_runs_state"),
        sa.ForeignKeyConstraint(
            ["encoder_id"],
            ["encoders.id"],
        ),
        sa.ForeignKeyConstraint(
            ["migration_id"],
            ["migrations.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_training_runs_migration_id", "training_runs", ["migration_id"], unique=False)

    op.create_table(
        "verifications",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("migration_id", sa.Integer(), nullable=False),
        sa.Column("plan_fingerprint", sa.String(), nullable=False),
        sa.Column("old_encoder_id", sa.String(), nullable=False),
        sa.Column("new_encoder_id", sa.String(), nullable=False),
        sa.Column("queries_sha256", sa.String(), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("results", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("outcome IN ('pass', 'fail', 'inconclusive')", name="verifications_outcome"),
        sa.ForeignKeyConstraint(
            ["migration_id"],
            ["migrations.id"],
        ),
        sa.ForeignKeyConstraint(
            ["new_encoder_id"],
            ["encoders.id"],
        ),
        sa.ForeignKeyConstraint(
            ["old_encoder_id"],
            ["encoders.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_verifications_migration_id", "verifications", ["migration_id"], unique=False)

    for table in WRITTEN_ONCE:
        if op.get_bind().dialect.name == "sqlite":
            refuse = f"BEGIN SELECT RAISE(ABORT, 'rows of {table} are written once'); END"
            for verb in ("UPDATE", "DELETE"):
                op.execute(f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} {refuse}")
            # INSERT OR REPLACE removes a row without firing a trigger for DELETE.
            again = f"WHEN NEW.id IN (SELECT id FROM {table})"  # noqa: S608
            op.execute(f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} {again} {refuse}")
        else:
            op.execute(
                f"CREATE FUNCTION {table}_written_once() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN RAISE EXCEPTION 'rows of {table} are written once'; END $$"
            )
            op.execute(
                f"CREATE TRIGGER {table}_written_once BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
                f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_written_once()"
            )
