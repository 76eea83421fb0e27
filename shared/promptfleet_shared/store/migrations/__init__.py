"""Alembic's migrations: `pre_…` run before a deploy, `post_…` after it."""
