"""The HTTP API: `create_app` makes it, `lifespan` starts it where it is mounted in another app."""

from promptfleet.api.app import create_app, lifespan

__all__ = ["create_app", "lifespan"]
