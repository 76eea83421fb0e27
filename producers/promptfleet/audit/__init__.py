"""Look at a file of prompts before it costs money: tokens, beginnings, waste, repetitions."""

from __future__ import annotations
