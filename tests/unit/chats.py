"""Chats and claimed jobs for tests of what fits."""

from __future__ import annotations

import uuid
from typing import Any

from promptfleet_shared.jobs import CacheOptions, ClaimedJob, JobKind, OnUnknown


def claimed(request: str, **fields: Any) -> ClaimedJob:
    """A job that was just claimed."""
    values: dict[str, Any] = {
        "id": uuid.uuid4(),
        "fence": 1,
        "tenant": "default",
        "tier": "basic",
        "kind": JobKind.CHAT,
        "model": None,
        "request": request,
        "input_tokens": -(-len(request.encode()) // 4),
        "priority": 5,
        "cache": CacheOptions(),
        "attempt": 1,
        "deferrals": 0,
        "calls": 0,
        "on_unknown": OnUnknown.RETRY,
        "queued_ms": 0.0,
        "remaining_s": 60.0,
        **fields,
    }
    return ClaimedJob(**values)


def _call(id_: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


AGENT_CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "You plan trips. Use the tools; never guess a price."},
    {"role": "user", "content": "I want to go from Bern to Lisbon in May, two people."},
    {
        "role": "assistant",
        "content": "I'll look for flights and trains.",
        "tool_calls": [
            _call("call_a1", "flights", '{"from":"BRN","to":"LIS","month":5,"people":2}'),
            _call("call_a2", "trains", '{"from":"Bern","to":"Lisboa","month":5}'),
        ],
    },
    {"role": "tool", "tool_call_id": "call_a1", "content": '[{"price":412,"stops":1}]'},
    {"role": "tool", "tool_call_id": "call_a2", "content": '{"error":"no through train"}'},
    {"role": "assistant", "content": "A flight with one stop is CHF 412. No through train."},
    {"role": "user", "content": "And a hotel in Alfama, under 120 a night?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [_call("call_b1", "hotels", '{"area":"Alfama","max":120}')],
    },
    {"role": "tool", "tool_call_id": "call_b1", "content": '[{"name":"Casa","price":98}]'},
    {"role": "assistant", "content": "Casa, at 98 a night."},
    {"role": "user", "content": "Book it, and tell me the total for five nights."},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [_call("call_c1", "book", '{"hotel":"Casa","nights":5}')],
    },
    {"role": "tool", "tool_call_id": "call_c1", "content": '{"ok":true,"total":490}'},
]
"""As OpenAI's API takes it: tools asked for in parallel, one of them failing, one still open."""
