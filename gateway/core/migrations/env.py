"""alembic's entry: runs the revisions on the connection that the gateway hands over, inside the gateway's own
transaction.
"""

from alembic import context

from gateway.core.schema import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True
)
context.run_migrations()
