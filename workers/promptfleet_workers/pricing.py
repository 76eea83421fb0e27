"""What calls cost: both sides price, so it is in shared."""

from __future__ import annotations

from promptfleet_shared.pricing import FREE, Pricer

__all__ = ["FREE", "Pricer"]
