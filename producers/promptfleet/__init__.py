"""Enqueue prompts and read their results."""
