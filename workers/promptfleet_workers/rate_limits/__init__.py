"""Use all of a quota and never more: reserved before the call, settled after it, fleet-wide."""
