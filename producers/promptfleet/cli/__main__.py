"""`python -m promptfleet.cli`: the command line of this very interpreter."""

from __future__ import annotations

from promptfleet.cli import main

if __name__ == "__main__":
    main()
