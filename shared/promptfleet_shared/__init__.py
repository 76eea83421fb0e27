"""What producers and workers both need. Imports the standard library, then downwards only."""

__version__ = "0.1.0"
