"""What alembic runs: the migrations, in the transaction of whoever calls."""

from alembic import context

from palestra.hub.registry.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
