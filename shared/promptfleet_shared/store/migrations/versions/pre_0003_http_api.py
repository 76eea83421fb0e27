"""The HTTP API: keys, files, batches, the order in which results land, and tenants' walls."""

from __future__ import annotations

import datetime as dt
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

WALLED = ("jobs", "results", "ledger", "callbacks", "callback_endpoints")


class Xid8(sa.types.UserDefinedType[str]):
    """Postgres' `xid8`."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        """The type's name in DDL."""
        return "xid8"


def upgrade() -> None:
    """Add columns and tables; `row_security` then raises the walls, where it may."""
    _add_columns()
    _create_keys()
    _create_files()
    _create_batches()


def _add_columns() -> None:
    """None of them rewrites its table: no default is volatile."""
    op.add_column(
        "jobs", sa.Column("stream", sa.Boolean, nullable=False, server_default=sa.false())
    )
    op.add_column("jobs", sa.Column("batch_id", pg.UUID))
    op.create_index("jobs_tenant_idx", "jobs", ["tenant", "id"])
    op.create_index(
        "jobs_batch_idx", "jobs", ["batch_id"], postgresql_where=sa.text("batch_id IS NOT NULL")
    )
    op.add_column("results", _counter("unknown_calls"))
    # All earlier results landed with this migration, as it were.
    landed = sa.text("pg_current_xact_id()")
    op.add_column("results", sa.Column("landed", Xid8, nullable=False, server_default=landed))
    op.create_index("results_landed_idx", "results", ["tenant", "landed", "job_id"])
    op.add_column("results", sa.Column("api_batch_id", pg.UUID))
    op.create_index(
        "results_batch_idx",
        "results",
        ["api_batch_id", "landed", "job_id"],
        postgresql_where=sa.text("api_batch_id IS NOT NULL"),
    )


def _create_keys() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", pg.UUID, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False, server_default=""),
        sa.Column("prefix", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("scopes", pg.ARRAY(sa.Text), nullable=False),
        _instant("created_at"),
        _maybe("expires_at"),
        _maybe("revoked_at"),
        _maybe("last_used_at"),
        sa.PrimaryKeyConstraint("id", name="api_keys_pkey"),
        sa.CheckConstraint("octet_length(digest) = 32", name=op.f("api_keys_digest_check")),
        sa.CheckConstraint(
            "cardinality(scopes) > 0 AND scopes <@ ARRAY['submit', 'read', 'admin']",
            name=op.f("api_keys_scopes_check"),
        ),
    )
    op.create_index("api_keys_digest_idx", "api_keys", ["digest"], unique=True)
    op.create_index("api_keys_tenant_idx", "api_keys", ["tenant", "id"])


def _create_files() -> None:
    op.create_table(
        "files",
        sa.Column("id", pg.UUID, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("status", sa.Text, nullable=False, server_default="uploading"),
        _instant("created_at"),
        _maybe("expires_at"),
        sa.PrimaryKeyConstraint("id", name="files_pkey"),
        sa.CheckConstraint(
            "status IN ('error', 'processed', 'uploaded', 'uploading')",
            name=op.f("files_status_check"),
        ),
        sa.CheckConstraint("bytes >= 0", name=op.f("files_bytes_check")),
    )
    op.create_index("files_tenant_idx", "files", ["tenant", "id"])
    op.create_index(
        "files_expires_idx",
        "files",
        ["expires_at"],
        postgresql_where=sa.text("expires_at IS NOT NULL"),
    )
    op.create_table(
        "file_chunks",
        sa.Column("file_id", pg.UUID, nullable=False),
        sa.Column("n", sa.Integer, nullable=False),
        # Its own, though its file has it: a wall that looks at each row alone is the fast one.
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("file_id", "n", name="file_chunks_pkey"),
        sa.ForeignKeyConstraint(
            ["file_id"], ["files.id"], name="file_chunks_file_fkey", ondelete="CASCADE"
        ),
    )
    # Written once and read once: not worth the CPU of compressing it.
    op.execute("ALTER TABLE file_chunks ALTER COLUMN data SET STORAGE EXTERNAL")


def _create_batches() -> None:
    op.create_table(
        "batches",
        sa.Column("id", pg.UUID, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("input_file_id", pg.UUID, nullable=False),
        sa.Column("output_file_id", pg.UUID),
        sa.Column("error_file_id", pg.UUID),
        sa.Column("status", sa.Text, nullable=False, server_default="validating"),
        _counter("total"),
        _counter("completed"),
        _counter("failed"),
        sa.Column("metadata", pg.JSONB),
        sa.Column("completion_window_s", sa.Integer, nullable=False, server_default="86400"),
        sa.Column("callback_url", sa.Text),
        sa.Column("errors", pg.JSONB),
        _instant("created_at"),
        _maybe("in_progress_at"),
        _maybe("finalizing_at"),
        _maybe("completed_at"),
        _maybe("failed_at"),
        _maybe("expired_at"),
        _maybe("cancelling_at"),
        _maybe("cancelled_at"),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("lease_owner", sa.Text),
        _maybe("lease_until"),
        _counter("next_line"),
        _counter("jobs"),
        sa.Column("model", sa.Text),
        sa.Column("usage", pg.JSONB),
        sa.Column("output_ttl_s", sa.Integer),
        sa.Column("idempotency_key", sa.Text),
        sa.PrimaryKeyConstraint("id", name="batches_pkey"),
        sa.CheckConstraint(
            "status IN ('cancelled', 'cancelling', 'completed', 'expired', 'failed', 'finalizing',"
            " 'in_progress', 'validating')",
            name=op.f("batches_status_check"),
        ),
        sa.CheckConstraint(
            "completed >= 0 AND failed >= 0 AND completed + failed <= total",
            name=op.f("batches_counts_check"),
        ),
    )
    op.create_index("batches_tenant_idx", "batches", ["tenant", "id"])
    is_open = sa.text("status IN ('validating', 'in_progress', 'finalizing', 'cancelling')")
    op.create_index("batches_open_idx", "batches", ["id"], postgresql_where=is_open)
    op.create_index(
        "batches_idempotency_idx",
        "batches",
        ["tenant", "idempotency_key"],
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_table(
        "batch_lines",
        sa.Column("batch_id", pg.UUID, nullable=False),
        sa.Column("n", sa.Integer, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("custom_id", sa.Text, nullable=False),
        sa.Column("job_id", pg.UUID),
        sa.Column("error", pg.JSONB),
        sa.PrimaryKeyConstraint("batch_id", "n", name="batch_lines_pkey"),
    )
    op.create_index("batch_lines_custom_idx", "batch_lines", ["batch_id", "custom_id"], unique=True)


def downgrade() -> None:
    """Undo it: keys, files and batches are gone, jobs and results stay."""
    for table in ("batch_lines", "batches", "file_chunks", "files", "api_keys"):
        op.drop_table(table)
    for table in WALLED:
        op.execute(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
        for policy in ("promptfleet_tenant", "promptfleet_fleet"):
            op.execute(f"DROP POLICY IF EXISTS {policy} ON {table}")
    op.drop_index("results_batch_idx", "results")
    op.drop_column("results", "api_batch_id")
    op.drop_index("results_landed_idx", "results")
    op.drop_column("results", "landed")
    op.drop_column("results", "unknown_calls")
    op.drop_index("jobs_batch_idx", "jobs")
    op.drop_index("jobs_tenant_idx", "jobs")
    op.drop_column("jobs", "batch_id")
    op.drop_column("jobs", "stream")


def _counter(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer, nullable=False, server_default="0")


def _instant(name: str) -> sa.Column[dt.datetime]:
    now = sa.text("clock_timestamp()")
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default=now)


def _maybe(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True))
