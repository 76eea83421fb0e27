"""Which requests are equal, and what [cache] may say."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfleet.requests import Defaults, make_spec
from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.fleet import parse_fleet
from promptfleet_workers.caching.keys import canonical
from promptfleet_workers.caching.questions import must_agree

scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5)
values = st.recursive(
    scalars | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
bodies = st.dictionaries(st.text(max_size=5), values, max_size=5)


def _shuffled(body: dict[str, Any]) -> bytes:
    return orjson.dumps(dict(reversed(body.items())))


@given(bodies)
def test_the_order_of_parameters_does_not_matter(body: dict[str, Any]) -> None:
    stored = orjson.dumps(body, option=orjson.OPT_SORT_KEYS).decode()

    assert canonical(_shuffled(body).decode(), as_stored=False) == canonical(
        stored, as_stored=False
    )


@given(bodies)
def test_the_short_cut_for_stored_requests_changes_nothing(body: dict[str, Any]) -> None:
    stored = orjson.dumps(body, option=orjson.OPT_SORT_KEYS).decode()
    if any(name in body for name in ("tools", "tool_choice", "response_format")):
        return

    if "e" not in stored:  # 1e16 is left as it is: another form costs a hit, and nothing else
        assert canonical(stored, as_stored=True) == canonical(stored, as_stored=False)


@pytest.mark.parametrize("as_stored", [True, False])
def test_whole_floats_are_integers(as_stored: bool) -> None:
    one = '{"messages":[{"content":"v1.0","role":"user"}],"temperature":1.0,"top_p":0.0}'
    other = '{"messages":[{"content":"v1.0","role":"user"}],"temperature":1,"top_p":0}'

    assert canonical(one, as_stored=as_stored) == canonical(other, as_stored=as_stored) == other
    assert canonical('{"t":0.5,"x":1.0}', as_stored=as_stored) == '{"t":0.5,"x":1}'


def test_a_schema_keeps_its_order() -> None:
    schema = '{"prompt":"x","response_format":{"type":"json","b":1.0,"a":2}}'

    assert canonical(schema, as_stored=False) == (
        '{"prompt":"x","response_format":{"type":"json","b":1,"a":2}}'
    )


@pytest.mark.parametrize("text", ["", "[]", "{", '"1.0"', "1.0"])
def test_what_is_no_request_stays_as_it_is(text: str) -> None:
    assert canonical(text, as_stored=False) == text


def test_users_may_write_numbers_and_options_as_they_like() -> None:
    one = make_spec("Hi", {"temperature": 1, "max_tokens": 5, "top_p": 1}, Defaults())
    other = make_spec("Hi", {"top_p": 1.0, "max_tokens": 5, "temperature": 1.0}, Defaults())

    assert one.request != other.request
    assert canonical(one.request.decode(), as_stored=True) == canonical(
        other.request.decode(), as_stored=True
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How tall is Mont Blanc?", "What height does Mont Blanc have?"),
        ("I don't like it", "That is not for me"),
        ("Name 3 rivers", "Tell me 3 rivers"),
    ],
)
def test_other_words_for_the_same_agree(one: str, other: str) -> None:
    assert must_agree(one) == must_agree(other)


@pytest.mark.parametrize(
    ("toml", "field", "told"),
    [
        ('type = "file"', "cache.type", "'redis', 'memory', 'disk' or 'custom'"),
        ('type = "disk"', "cache", "connection: type"),
        ('type = "custom"', "cache", "factory: type"),
        ('factory = "a:b"', "cache", "factory: belongs to type"),
        ("max_bytes = 5", "cache", "max_bytes: Redis evicts"),
        ('type = "memory"\nlayers = ["memory"]', "cache", "layers:"),
        ('connection = "x"\nconnection_env = "Y"', "cache", "connection_env:"),
        ("[cache.semantic]\nenabled = true", "cache.semantic", "model: the semantic cache needs"),
        (
            '[cache.semantic]\nenabled = true\nmodel = "nobody"',
            "cache.semantic.model",
            "no [models.'nobody'] is defined",
        ),
        ('[cache.semantic]\nverify = "maybe"', "cache.semantic.verify", "pattern"),
        ("[cache.semantic]\nthreshold = 2", "cache.semantic.threshold", "1"),
    ],
)
def test_mistakes_name_their_field(toml: str, field: str, told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_fleet(f"[cache]\n{toml}\n")

    assert f": {field}: " in str(caught.value)
    assert told in str(caught.value)


def test_a_connection_with_a_password_is_not_shown() -> None:
    fleet = parse_fleet('[cache]\nconnection = "redis://:SECRET@cache:6379/0"\n')

    assert "SECRET" not in repr(fleet)
    assert fleet.cache.where() == "redis://:SECRET@cache:6379/0"


def test_a_connection_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_CACHE", "redis://elsewhere:6379/1")

    fleet = parse_fleet('[cache]\nconnection_env = "MY_CACHE"\n')

    assert fleet.cache.where() == "redis://elsewhere:6379/1"
