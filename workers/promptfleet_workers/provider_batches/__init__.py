"""Jobs that go through their provider's own batch API: handed over, sent, watched and landed."""
