"""Alembic's entry: runs the versions in one transaction on the connection that the ledger hands over."""

from alembic import context

from migrator.ledger.models import VERSION_TABLE, Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection, target_metadata=Base.metadata, version_table=VERSION_TABLE, render_as_batch=True
)
context.run_migrations()
