"""Every SQL statement of promptfleet, and only here.

Statements are synchronous functions over a `sqlalchemy.Connection`: the caller owns the
transaction. Async callers pass them to `AsyncConnection.run_sync`, so each is written once.
"""
