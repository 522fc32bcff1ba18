"""What describes an encoder is called its manifest."""

from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"


def upgrade() -> None:
    op.alter_column("encoders", "card", new_column_name="manifest")
