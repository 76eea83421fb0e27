"""The tables, as SQLAlchemy sees them; a test holds the migrations against them."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from promptfleet_shared.jobs import FINAL_STATES, CacheStatus, JobKind, JobState, OnUnknown

FILE_STATES = ("uploading", "uploaded", "processed", "error")
BATCH_STATES = (
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
)
PROVIDER_BATCH_STATES = (
    "gathering",
    "preparing",
    "submitting",
    "unknown",
    "submitted",
    "ended",
)
KEY_SCOPES = ("submit", "read", "admin")

metadata = sa.MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "ix": "%(column_0_label)s_idx",
    }
)


def _one_of(column: str, values: object) -> sa.CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in sorted(values))  # type: ignore[call-overload]
    return sa.CheckConstraint(f"{column} IN ({listed})", name=column)


def _counter(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer, nullable=False, server_default="0")


def _instant(name: str, *, nullable: bool = False) -> sa.Column[dt.datetime]:
    default = None if nullable else sa.text("clock_timestamp()")
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, server_default=default)


def _text(name: str, *, nullable: bool = False, default: str | None = None) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=nullable, server_default=default)


class Xid8(sa.types.UserDefinedType[str]):
    """A transaction's number, which never comes again: Postgres' `xid8`."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        """The type's name in DDL."""
        return "xid8"


def _usage() -> list[sa.Column[int]]:
    names = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
    return [_counter(name) for name in names]


# The claim changes only columns that no index knows, so that Postgres can update in place (HOT):
# `finished_at`, not `state`, is what the partial index asks for.
jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", pg.UUID, primary_key=True),
    _text("tenant"),
    _text("tier"),
    _text("kind", default=JobKind.CHAT.value),
    _text("model", nullable=True),
    _text("state", default=JobState.QUEUED.value),
    sa.Column("request", pg.JSON, nullable=False),
    _counter("input_tokens"),
    sa.Column("priority", sa.SmallInteger, nullable=False, server_default="5"),
    sa.Column("cache", pg.JSONB),
    sa.Column("metadata", pg.JSONB),
    _text("idempotency_key", nullable=True),
    sa.Column("request_digest", sa.LargeBinary),
    _text("callback_url", nullable=True),
    _instant("created_at"),
    _instant("run_at"),
    sa.Column("deadline", sa.DateTime(timezone=True), nullable=False),
    # When the sweeper looks at the job next; the one timer of a job.
    sa.Column("sweep_at", sa.DateTime(timezone=True), nullable=False),
    _instant("rung_at"),
    _counter("rings"),
    _counter("attempt"),
    _counter("crashes"),
    _counter("calls"),
    _counter("unknown_calls"),
    # Calls that the present claim has begun or is about to begin: what a lost lease is charged.
    _counter("claim_calls"),
    _text("on_unknown", default=OnUnknown.RETRY.value),
    _counter("deferrals"),
    sa.Column("fence", sa.BigInteger, nullable=False, server_default="0"),
    _text("lease_owner", nullable=True),
    _instant("lease_until", nullable=True),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("last_error", pg.JSONB),
    _instant("finished_at", nullable=True),
    sa.Column("stream", sa.Boolean, nullable=False, server_default=sa.false()),
    # The API's batch that the job is a line of; the workers' batches are in the results.
    sa.Column("batch_id", pg.UUID),
    # Options that steer how it is answered, and what was decided by them so far.
    sa.Column("policy", pg.JSONB),
    sa.Column("decision", pg.JSONB),
    _text("concurrency_key", nullable=True),
    _one_of("state", JobState),
    _one_of("kind", JobKind),
    _one_of("on_unknown", OnUnknown),
    sa.CheckConstraint("priority BETWEEN 0 AND 9", name="priority"),
    sa.CheckConstraint(
        "(state IN ('cancelled', 'expired', 'failed', 'succeeded')) = (finished_at IS NOT NULL)",
        name="finished",
    ),
    sa.Index("jobs_sweep_idx", "sweep_at", postgresql_where=sa.text("finished_at IS NULL")),
    sa.Index(
        "jobs_idempotency_idx",
        "tenant",
        "idempotency_key",
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    ),
    sa.Index("jobs_tenant_idx", "tenant", "id"),
    sa.Index("jobs_batch_idx", "batch_id", postgresql_where=sa.text("batch_id IS NOT NULL")),
    # The unfinished jobs of a conversation, in the order of submission.
    sa.Index(
        "jobs_memory_idx",
        "tenant",
        sa.text("(policy ->> 'memory_id')"),
        "id",
        postgresql_where=sa.text("(policy ->> 'memory_id') IS NOT NULL AND finished_at IS NULL"),
    ),
)

# No foreign key to jobs: its check would take a row lock on the job that the same statement has
# just written, at a tenth of the whole cost of finishing; the statement itself joins the two.
results = sa.Table(
    "results",
    metadata,
    sa.Column("job_id", pg.UUID, primary_key=True),
    _text("tenant"),
    _text("tier"),
    _text("state"),
    _text("text", nullable=True),
    sa.Column("response", pg.JSON),
    _text("finish_reason", nullable=True),
    sa.Column("error", pg.JSONB),
    _text("model", nullable=True),
    _text("provider", nullable=True),
    _text("deployment", nullable=True),
    *_usage(),
    sa.Column("cost_usd", sa.Numeric),
    _text("cache", default=CacheStatus.OFF.value),
    _counter("attempts"),
    _counter("calls"),
    sa.Column("batch_id", pg.UUID),
    sa.Column("batch_size", sa.Integer, nullable=False, server_default="1"),
    sa.Column("queued_ms", sa.Float, nullable=False, server_default="0"),
    sa.Column("provider_ms", sa.Float),
    sa.Column("total_ms", sa.Float, nullable=False, server_default="0"),
    sa.Column("metadata", pg.JSONB),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    _instant("finished_at"),
    _counter("unknown_calls"),
    # The transaction that wrote the row: what readers in landing order go by; see `listing`.
    sa.Column("landed", Xid8, nullable=False, server_default=sa.text("pg_current_xact_id()")),
    # The job's batch of the API; `batch_id` is the worker's.
    sa.Column("api_batch_id", pg.UUID),
    sa.Column("decision", pg.JSONB),
    sa.Column("saved_usd", sa.Numeric),
    _one_of("state", FINAL_STATES),
    _one_of("cache", CacheStatus),
    sa.Index("results_landed_idx", "tenant", "landed", "job_id"),
    sa.Index(
        "results_batch_idx",
        "api_batch_id",
        "landed",
        "job_id",
        postgresql_where=sa.text("api_batch_id IS NOT NULL"),
    ),
)

# What was paid, and what may have been: a row for each finished or released claim that called.
ledger = sa.Table(
    "ledger",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("job_id", pg.UUID, nullable=False),
    _text("tenant"),
    _text("tier"),
    _text("model", nullable=True),
    _text("provider", nullable=True),
    _text("deployment", nullable=True),
    _counter("calls"),
    _counter("unknown_calls"),
    *_usage(),
    sa.Column("cost_usd", sa.Numeric),
    _instant("at"),
    # By our own estimate, where a part of an answer came and the provider's count did not.
    sa.Column("estimated_usd", sa.Numeric),
    # What calls may have cost at most of which nobody knows what the provider did.
    sa.Column("at_most_usd", sa.Numeric),
    # The job's, which is pruned long before its ledger.
    sa.Column("metadata", pg.JSONB),
    sa.Index("ledger_at_idx", "at", postgresql_using="brin"),
    sa.Index("ledger_tenant_idx", "tenant", "at"),
)

# The outbox of signed callbacks, written with the result that they tell of.
callbacks = sa.Table(
    "callbacks",
    metadata,
    sa.Column("id", pg.UUID, primary_key=True, server_default=sa.text("gen_random_uuid()")),
    # The job that it tells of; null where it has a payload of its own.
    sa.Column("job_id", pg.UUID),
    _text("tenant"),
    _text("url"),
    # The URL without its query: what is slowed down, paused and disabled as one.
    sa.Column(
        "endpoint", sa.Text, sa.Computed("split_part(url, '?', 1)", persisted=True), nullable=False
    ),
    _text("event"),
    _counter("attempts"),
    _instant("next_at"),
    _instant("created_at"),
    _instant("delivered_at", nullable=True),
    _instant("exhausted_at", nullable=True),
    _instant("lease_until", nullable=True),
    sa.Column("last_status", sa.Integer),
    _text("last_error", nullable=True),
    # When its schedule began: with its row, or at its last replay.
    _instant("begun_at"),
    # What it says, for what is no job's end.
    sa.Column("payload", pg.JSON),
    sa.CheckConstraint("(job_id IS NULL) <> (payload IS NULL)", name="subject"),
    sa.Index("callbacks_job_idx", "job_id"),
    # By endpoint, so that a long backlog of one hides no other's.
    sa.Index(
        "callbacks_due_idx",
        "tenant",
        "endpoint",
        "next_at",
        postgresql_where=sa.text("delivered_at IS NULL AND exhausted_at IS NULL"),
    ),
    sa.Index(
        "callbacks_lease_idx", "lease_until", postgresql_where=sa.text("lease_until IS NOT NULL")
    ),
    sa.Index(
        "callbacks_exhausted_idx",
        "tenant",
        "exhausted_at",
        postgresql_where=sa.text("exhausted_at IS NOT NULL"),
    ),
)

# What is known of those who receive callbacks; a row comes with an endpoint's first failure.
callback_endpoints = sa.Table(
    "callback_endpoints",
    metadata,
    _text("tenant"),
    _text("endpoint"),
    _counter("failures"),
    _instant("paused_until", nullable=True),
    _instant("disabled_at", nullable=True),
    sa.PrimaryKeyConstraint("tenant", "endpoint", name="callback_endpoints_pkey"),
)

# Keys of the HTTP API. Only what a key's SHA-256 is, so that nobody reads a key here.
api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", pg.UUID, primary_key=True),
    _text("tenant"),
    _text("name", default=""),
    _text("prefix"),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("scopes", pg.ARRAY(sa.Text), nullable=False),
    _instant("created_at"),
    _instant("expires_at", nullable=True),
    _instant("revoked_at", nullable=True),
    # To the minute: written in batches, and seldom.
    _instant("last_used_at", nullable=True),
    sa.CheckConstraint("octet_length(digest) = 32", name="digest"),
    sa.CheckConstraint(
        "cardinality(scopes) > 0 AND scopes <@ ARRAY['submit', 'read', 'admin']", name="scopes"
    ),
    sa.Index("api_keys_digest_idx", "digest", unique=True),
    sa.Index("api_keys_tenant_idx", "tenant", "id"),
)

# Files that clients uploaded for batches, and those that batches wrote.
files = sa.Table(
    "files",
    metadata,
    sa.Column("id", pg.UUID, primary_key=True),
    _text("tenant"),
    _text("purpose"),
    _text("filename"),
    sa.Column("bytes", sa.BigInteger, nullable=False, server_default="0"),
    _text("status", default="uploading"),
    _instant("created_at"),
    _instant("expires_at", nullable=True),
    _one_of("status", FILE_STATES),
    sa.CheckConstraint("bytes >= 0", name="bytes"),
    sa.Index("files_tenant_idx", "tenant", "id"),
    sa.Index("files_expires_idx", "expires_at", postgresql_where=sa.text("expires_at IS NOT NULL")),
)

# A file's content, a piece a row, so that neither side ever holds the whole.
file_chunks = sa.Table(
    "file_chunks",
    metadata,
    sa.Column("file_id", pg.UUID, nullable=False),
    sa.Column("n", sa.Integer, nullable=False),
    _text("tenant"),
    sa.Column("data", sa.LargeBinary, nullable=False),
    sa.PrimaryKeyConstraint("file_id", "n", name="file_chunks_pkey"),
    sa.ForeignKeyConstraint(
        ["file_id"], ["files.id"], name="file_chunks_file_fkey", ondelete="CASCADE"
    ),
)

# Batches of the HTTP API, as OpenAI's Batch object has them; who moves one on holds its lease.
batches = sa.Table(
    "batches",
    metadata,
    sa.Column("id", pg.UUID, primary_key=True),
    _text("tenant"),
    _text("endpoint"),
    sa.Column("input_file_id", pg.UUID, nullable=False),
    sa.Column("output_file_id", pg.UUID),
    sa.Column("error_file_id", pg.UUID),
    _text("status", default="validating"),
    _counter("total"),
    _counter("completed"),
    _counter("failed"),
    sa.Column("metadata", pg.JSONB),
    sa.Column("completion_window_s", sa.Integer, nullable=False, server_default="86400"),
    _text("callback_url", nullable=True),
    sa.Column("errors", pg.JSONB),
    _instant("created_at"),
    _instant("in_progress_at", nullable=True),
    _instant("finalizing_at", nullable=True),
    _instant("completed_at", nullable=True),
    _instant("failed_at", nullable=True),
    _instant("expired_at", nullable=True),
    _instant("cancelling_at", nullable=True),
    _instant("cancelled_at", nullable=True),
    sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
    _text("lease_owner", nullable=True),
    _instant("lease_until", nullable=True),
    # The first line of the input file that is not a job yet.
    _counter("next_line"),
    # Lines that became jobs: not those that the batch's end came before.
    _counter("jobs"),
    # The one that all lines name; null where they name several.
    _text("model", nullable=True),
    sa.Column("usage", pg.JSONB),
    sa.Column("output_ttl_s", sa.Integer),
    _text("idempotency_key", nullable=True),
    _one_of("status", BATCH_STATES),
    sa.CheckConstraint(
        "completed >= 0 AND failed >= 0 AND completed + failed <= total", name="counts"
    ),
    sa.Index("batches_tenant_idx", "tenant", "id"),
    sa.Index(
        "batches_open_idx",
        "id",
        postgresql_where=sa.text(
            "status IN ('validating', 'in_progress', 'finalizing', 'cancelling')"
        ),
    ),
    sa.Index(
        "batches_idempotency_idx",
        "tenant",
        "idempotency_key",
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    ),
)

# A line of a batch's input: its job, or why it has none. No foreign key, as for results: 50,000
# lines come in one go, with their batch.
batch_lines = sa.Table(
    "batch_lines",
    metadata,
    sa.Column("batch_id", pg.UUID, nullable=False),
    sa.Column("n", sa.Integer, nullable=False),
    _text("tenant"),
    _text("custom_id"),
    sa.Column("job_id", pg.UUID),
    sa.Column("error", pg.JSONB),
    sa.PrimaryKeyConstraint("batch_id", "n", name="batch_lines_pkey"),
    sa.Index("batch_lines_custom_idx", "batch_id", "custom_id", unique=True),
)

# Batches that a provider's own batch API has, or is about to be given; who moves one on holds its
# lease. A batch that waits has its lease end when somebody should look again.
provider_batches = sa.Table(
    "provider_batches",
    metadata,
    sa.Column("id", pg.UUID, primary_key=True),
    _text("tenant"),
    _text("deployment"),
    _text("kind"),
    # As the deployment calls it.
    _text("model"),
    _text("state", default="gathering"),
    # Of what was ever attached; `sent` is what the provider gets.
    _counter("lines"),
    sa.Column("bytes", sa.BigInteger, nullable=False, server_default="0"),
    _counter("sent"),
    _counter("tries"),
    _text("file_id", nullable=True),
    _text("provider_id", nullable=True),
    sa.Column("cancel_sent", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("error", pg.JSONB),
    _instant("created_at"),
    # Written before the provider is asked to make it.
    _instant("submitting_at", nullable=True),
    # When it was noticed that nobody knows whether the provider made it.
    _instant("unknown_at", nullable=True),
    _instant("submitted_at", nullable=True),
    _instant("ended_at", nullable=True),
    _text("lease_owner", nullable=True),
    _instant("lease_until"),
    _one_of("state", PROVIDER_BATCH_STATES),
    sa.CheckConstraint("(state = 'ended') = (ended_at IS NOT NULL)", name="ended"),
    sa.Index(
        "provider_batches_gathering_idx",
        "tenant",
        "deployment",
        "kind",
        "model",
        unique=True,
        postgresql_where=sa.text("state = 'gathering'"),
    ),
    sa.Index(
        "provider_batches_due_idx", "lease_until", postgresql_where=sa.text("state <> 'ended'")
    ),
    sa.Index("provider_batches_provider_idx", "deployment", "provider_id"),
)

# A claim that was given to a provider's batch: its job, under that claim's fence. Gone once the
# batch has ended.
provider_batch_lines = sa.Table(
    "provider_batch_lines",
    metadata,
    sa.Column("job_id", pg.UUID, nullable=False),
    sa.Column("fence", sa.BigInteger, nullable=False),
    sa.Column("batch_id", pg.UUID, nullable=False),
    _text("tenant"),
    # Where what is sent is not the job's own request, to the letter.
    sa.Column("request", pg.JSON),
    _text("cache_key", nullable=True),
    sa.Column("queued_ms", sa.Float, nullable=False, server_default="0"),
    sa.Column("sent", sa.Boolean, nullable=False, server_default=sa.false()),
    # Of budgets: nanodollars by "budget:value".
    sa.Column("reserved", pg.JSONB),
    sa.PrimaryKeyConstraint("job_id", "fence", name="provider_batch_lines_pkey"),
    sa.Index("provider_batch_lines_batch_idx", "batch_id", "job_id"),
)

# Conversations that jobs with a `memory_id` take part in; see `conversations`.
conversations = sa.Table(
    "conversations",
    metadata,
    _text("tenant"),
    _text("memory_id"),
    # The number of the last turn.
    sa.Column("turns", sa.BigInteger, nullable=False, server_default="0"),
    _text("summary", nullable=True),
    # The number of the last turn that the summary tells of.
    sa.Column("summarised", sa.BigInteger, nullable=False, server_default="0"),
    # The claim whose turn it is: it holds the conversation as long as it holds the job.
    sa.Column("holder", pg.UUID),
    sa.Column("holder_fence", sa.BigInteger),
    _instant("created_at"),
    _instant("updated_at"),
    sa.PrimaryKeyConstraint("tenant", "memory_id", name="conversations_pkey"),
    sa.Index("conversations_updated_idx", "updated_at"),
)

conversation_turns = sa.Table(
    "conversation_turns",
    metadata,
    _text("tenant"),
    _text("memory_id"),
    sa.Column("n", sa.BigInteger, nullable=False),
    sa.Column("job_id", pg.UUID, nullable=False),
    sa.Column("messages", pg.JSON, nullable=False),
    # So that the newest turns can be counted without reading them.
    sa.Column("bytes", sa.Integer, nullable=False),
    _instant("created_at"),
    sa.PrimaryKeyConstraint("tenant", "memory_id", "n", name="conversation_turns_pkey"),
)

# What was used of limits of an hour and longer; see `limit_windows`.
limit_windows = sa.Table(
    "limit_windows",
    metadata,
    # Empty where the limit is no tenant's.
    _text("tenant"),
    _text("name"),
    # What was used in each sixtieth of the period, by its number.
    sa.Column("pieces", pg.JSONB, nullable=False),
    # When, by the clock of the Redis that counts.
    sa.Column("seen_us", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint("tenant", "name", name="limit_windows_pkey"),
)
