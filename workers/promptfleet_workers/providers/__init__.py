"""Providers: one module a protocol, independent of each other."""
