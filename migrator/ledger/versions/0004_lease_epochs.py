"""Each lease of a chunk has a number that only grows, by which a late holder is told from the present one."""

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"


def upgrade() -> None:
    op.add_column("chunks", sa.Column("lease_epoch", sa.Integer(), nullable=False, server_default="0"))
