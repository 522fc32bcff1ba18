"""Where a collection lies for its client, and the one beside it that the shadow strategy makes."""

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"


def upgrade() -> None:
    op.add_column("migrations", sa.Column("source", sa.String(), nullable=True))
    op.add_column("migrations", sa.Column("alias", sa.String(), nullable=True))
    op.add_column("migrations", sa.Column("shadow", sa.String(), nullable=True))
    # Until now every collection was a FAISS folder, called `faiss:<folder>`.
    op.execute("UPDATE migrations SET source = substr(collection, length('faiss:') + 1)")
    with op.batch_alter_table("migrations") as table:
        table.alter_column("source", nullable=False)
