"""Policies: what fleet.toml says about each feature, and the pure logic that both sides share."""
