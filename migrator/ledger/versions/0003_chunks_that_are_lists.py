"""A chunk may be a list of ids in place of a range of them."""

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"


def upgrade() -> None:
    op.add_column("chunks", sa.Column("ids", sa.Text(), nullable=True))
