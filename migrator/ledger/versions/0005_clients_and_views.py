"""The clients of a route, how long each may keep a row, and the views that others read.

SQLite checks all views when a table is renamed, as `batch_alter_table` does: a later version that needs that drops the
views first and makes them again.
"""

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"

VIEWS = {
    "migrator_progress": """
        SELECT m.id AS migration_id, m.name AS migration,
            CASE WHEN m.id = (SELECT MAX(n.id) FROM migrations n WHERE n.name = m.name) THEN 1 ELSE 0 END AS latest,
            m.collection, m.strategy, m.shadow, m.stage, m.state, m.paused,
            m.old_encoder_id AS old_encoder, m.new_encoder_id AS new_encoder,
            COALESCE(NULLIF(c.planned, 0), {planned_items}, 0) AS items_total,
            COALESCE(c.done, 0) AS items_done, COALESCE(c.written, 0) AS items_written,
            (SELECT COUNT(*) FROM item_failures f WHERE f.migration_id = m.id AND f.state = 'open') AS items_failed,
            COALESCE(c.gone, 0) AS items_gone, COALESCE(c.catch_up_passes, 0) AS catch_up_passes,
            COALESCE(c.chunks_pending, 0) AS chunks_pending, COALESCE(c.chunks_leased, 0) AS chunks_leased,
            COALESCE(c.chunks_done, 0) AS chunks_done, COALESCE(c.chunks_failed, 0) AS chunks_failed,
            COALESCE(c.chunks_restored, 0) AS chunks_restored,
            CASE WHEN m.old_kept THEN 1 ELSE 0 END AS old_kept, m.created_at, m.changed_at
        FROM migrations m LEFT JOIN (
            SELECT migration_id,
                SUM(CASE WHEN pass_number = 0 THEN items ELSE 0 END) AS planned,
                SUM(CASE WHEN pass_number = 0 AND state = 'done' THEN items ELSE 0 END) AS done,
                SUM(written) AS written, SUM(gone) AS gone, MAX(pass_number) AS catch_up_passes,
                SUM(CASE WHEN state = 'pending' THEN 1 ELSE 0 END) AS chunks_pending,
                SUM(CASE WHEN state = 'leased' THEN 1 ELSE 0 END) AS chunks_leased,
                SUM(CASE WHEN state = 'done' THEN 1 ELSE 0 END) AS chunks_done,
                SUM(CASE WHEN state = 'failed' THEN 1 ELSE 0 END) AS chunks_failed,
                SUM(CASE WHEN state = 'restored' THEN 1 ELSE 0 END) AS chunks_restored
            FROM chunks GROUP BY migration_id
        ) c ON c.migration_id = m.id""",
    "migrator_route": """
        SELECT m.name AS migration, r.collection, r.epoch, r.phase, r.query_encoder, r.query_collection,
            r.canary_encoder, r.canary_collection, r.canary_percent, r.write_encoders, r.salt, r.ttl, r.changed_at
        FROM routes r JOIN migrations m ON m.id = r.migration_id""",
    "migrator_clients": """
        SELECT m.name AS migration, k.collection, k.name AS client, k.owner, k.epoch, r.epoch AS route_epoch,
            k.ttl, k.seen_at
        FROM route_clients k JOIN routes r ON r.collection = k.collection JOIN migrations m ON m.id = r.migration_id""",
    "migrator_failures": """
        SELECT f.migration_id, m.name AS migration, f.item_id AS item, f.kind, f.reason, f.state, f.attempts,
            f.first_at, f.last_at
        FROM item_failures f JOIN migrations m ON m.id = f.migration_id""",
    "migrator_history": """
        SELECT e.id, e.migration_id, m.name AS migration, e.event, e.stage, e.detail, e.actor, e.at
        FROM stage_events e JOIN migrations m ON m.id = e.migration_id""",
}
"""With a join in each, so that PostgreSQL too lets nobody write through them."""

ITEMS_OF_PLAN = {
    "sqlite": "json_extract(p.content, '$.collection.items')",
    "postgresql": "(p.content -> 'collection' ->> 'items')::bigint",
}


def upgrade() -> None:
    op.add_column("routes", sa.Column("ttl", sa.Float(), nullable=False, server_default=sa.text("5")))
    op.add_column("routes", sa.Column("settled_at", sa.DateTime(timezone=True), nullable=True))
    op.create_table(
        "route_clients",
        sa.Column("collection", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("ttl", sa.Float(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["collection"], ["routes.collection"]),
        sa.PrimaryKeyConstraint("collection", "owner"),
    )
    latest_plan = "p.id = (SELECT MAX(q.id) FROM plans q WHERE q.migration_id = m.id)"
    items = f"(SELECT {ITEMS_OF_PLAN[op.get_bind().dialect.name]} FROM plans p WHERE {latest_plan})"  # noqa: S608
    for name, select in VIEWS.items():
        op.execute(f"CREATE VIEW {name} AS {select.format(planned_items=items)}")
