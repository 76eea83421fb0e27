"""Compacting changes nothing that a reader of the text, or of its JSON, could notice."""

from __future__ import annotations

import json
import re

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from promptfleet_shared.fleet import parse_fleet
from promptfleet_shared.policies.compact import compact_request, compact_text

# What Markdown is made of: random text of it finds what random characters never would.
PIECES = [
    *("a", "word", "# ", "- ", "* ", "1. ", "> ", "`", "```", "~~~", "```py\n", "    ", "\t"),
    *("  ", " ", "   ", "\n", "\n\n", "\n\n\n", "\r\n", "\r", "\\", "<b>", "<pre>", "</pre>"),
    *("[l](u", ")", "|", "[r]: ", '"', "'", "***", "---", "é", "\u00a0", "&nbsp;"),
    *("{", "}", "[", "]", '{"a": 1}'),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=24).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example("`a   \nb`\n\n\nc")
@example("- ```\n  x   \n```\ny   \n\n\nz")
@example("    code   \n\n\n    code")
@example("a\\ \nb")
@example("> ```\n> a   \n\n\n\n> ```\nb   ")
def test_it_renders_the_same(text: str) -> None:
    compacted = compact_text(text)
    if not _holds_json(text):
        assert MarkdownIt().render(compacted) == MarkdownIt().render(text)
    assert compact_text(compacted) == compacted
    assert len(compacted) <= len(text)
    assert compacted[:1] == text[:1]
    assert compacted[-1:] == text[-1:]


def _holds_json(text: str) -> bool:
    """True where a block may be minified, which changes the text and not its value."""
    return re.search(r"(?:^|\n)\s*[{\[]", text) is not None


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, min_size=1) | st.dictionaries(st.text(), VALUES, min_size=1))
def test_json_keeps_its_values(value: object) -> None:
    text = json.dumps(value, indent=2)
    compacted = compact_text(text)
    assert compacted == json.dumps(value, separators=(",", ":"))


@pytest.mark.parametrize(
    ("text", "compacted"),
    [
        ('{ "a": 1.0, "a": 1e2 }', '{"a":1.0,"a":1e2}'),  # spelling and doubles stay
        ('{ "n": 123456789012345678901234567890 }', '{"n":123456789012345678901234567890}'),
        ('{"s": "two  \\" spaces"}', '{"s":"two  \\" spaces"}'),
        ("{ not: json }", "{ not: json }"),
        ("[1, NaN]", "[1, NaN]"),
        ("Data:\n\n[\n  1,\n  2\n]\n\nSum?", "Data:\n\n[1,2]\n\nSum?"),
        ('```json\n{ "a":   1 }\n```', '```json\n{ "a":   1 }\n```'),
        ("one\n\n\n\n\ntwo", "one\n\ntwo"),
        ("a line break   \nnext", "a line break  \nnext"),
        ("no break \nnext", "no break\nnext"),
        ("The answer is:   ", "The answer is:   "),  # the model goes on here
        ("\n\n\nfirst", "\n\n\nfirst"),
        ("--- a/x\n+++ b/x\n@@ -1 +1 @@\n \n-a   ", "--- a/x\n+++ b/x\n@@ -1 +1 @@\n \n-a   "),
        ("a\tb\t\nc\t\t", "a\tb\t\nc\t\t"),  # columns of a table may be empty
    ],
)
def test_examples(text: str, compacted: str) -> None:
    assert compact_text(text) == compacted


def test_a_request_keeps_all_but_its_white_space() -> None:
    schema = {"z": 1, "a": {"type": "json_object"}}
    body = {
        "max_tokens": 5,
        "messages": [
            {"role": "system", "content": "Be brief. \nBe kind."},
            {"role": "user", "content": [{"type": "text", "text": "a\n\n\n\nb"}, {"type": "x"}]},
        ],
        "response_format": schema,
    }
    request = orjson.dumps(body).decode()
    found = compact_request(request)

    body["messages"][0]["content"] = "Be brief.\nBe kind."  # type: ignore[index]
    body["messages"][1]["content"][0]["text"] = "a\n\nb"  # type: ignore[index]
    assert found == orjson.dumps(body).decode()
    assert compact_request(found) is found


def test_an_embedding_is_not_touched() -> None:
    request = orjson.dumps({"input": "a \n" * 100}).decode()
    assert compact_request(request) is request


def test_a_tier_may_differ_from_the_fleet() -> None:
    fleet = parse_fleet(
        """
default_tier = "basic"
compact = { enabled = true }
[tiers.basic]
models = ["m"]
compact = { enabled = false }
[tiers.top]
models = ["m"]
[models.m]
deployments = [{ base_url = "http://x" }]
"""
    )
    assert [fleet.compact_options(tier).enabled for tier in ("basic", "top")] == [False, True]
