"""What `enqueue_prompt` accepts, and how it says no."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import json
import types
import uuid
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptfleet.options import MAX_DEADLINE_S
from promptfleet.requests import Defaults, job_id, make_spec, make_specs
from promptfleet_shared.errors import BlockedAddressError, InvalidRequestError
from promptfleet_shared.jobs import CacheMode, CacheOptions, JobKind, OnUnknown

NOW = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
DEFAULTS = Defaults(deadline_s=60.0, now=lambda: NOW)
SECRET = "the secret of the prompt"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def body(prompt: object, **options: Any) -> Any:
    return json.loads(make_spec(prompt, options, DEFAULTS).request)


def test_a_text_becomes_a_user_message() -> None:
    spec = make_spec("hello", {}, DEFAULTS)
    assert spec.request == b'{"messages":[{"content":"hello","role":"user"}]}'
    assert (spec.tier, spec.kind, spec.priority) == ("standard", JobKind.CHAT, 5)
    assert (spec.tenant, spec.deadline_s) == ("default", 60.0)
    assert spec.input_tokens == 12  # 47 bytes, four a token
    assert spec.id.version == 7


def test_none_is_the_same_as_nothing() -> None:
    names = ["tier", "system", "temperature", "metadata", "cache", "deadline", "kind", "stop"]
    nothing = make_spec("hello", dict.fromkeys(names), DEFAULTS)
    assert nothing.request == make_spec("hello", {}, DEFAULTS).request
    assert nothing.cache is None


def test_parameters_go_into_the_body() -> None:
    assert body(
        "hello",
        system="Be brief.",
        max_tokens=5,
        temperature=0,
        top_p=0.5,
        stop=("a", "b"),
        seed=-7,
        response_format={"type": "json_object"},
        tools=[TOOL],
        tool_choice="auto",
    ) == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hello"},
        ],
        "max_tokens": 5,
        "temperature": 0,
        "top_p": 0.5,
        "stop": ["a", "b"],
        "seed": -7,
        "response_format": {"type": "json_object"},
        "tools": [TOOL],
        "tool_choice": "auto",
    }


def test_what_is_ours_stays_out_of_the_body() -> None:
    options: dict[str, Any] = {
        "tier": "basic",
        "model": "m",
        "metadata": {"b": 1, "a": (1, 2)},
        "priority": 9,
        "idempotency_key": "k",
        "callback_url": "https://example.com/hook?x=1",
        "deadline": 5,
        "cache": "refresh",
        "on_unknown": "fail",
    }
    spec = make_spec("hello", options, DEFAULTS)
    assert spec.request == make_spec("hello", {}, DEFAULTS).request
    assert (spec.tier, spec.model, spec.priority) == ("basic", "m", 9)
    assert spec.metadata == {"b": 1, "a": [1, 2]}
    assert (spec.idempotency_key, spec.callback_url) == ("k", "https://example.com/hook?x=1")
    assert (spec.deadline_s, spec.cache) == (5.0, CacheOptions(mode=CacheMode.REFRESH))
    assert spec.on_unknown is OnUnknown.FAIL
    assert make_spec("hello", {}, DEFAULTS).on_unknown is OnUnknown.RETRY


def test_messages_pass_through_untouched() -> None:
    messages = [
        {"role": "developer", "content": "Rules."},
        {
            "role": "user",
            "name": "Ada",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "42", "cache_control": {"x": 1}},
    ]
    assert body(messages)["messages"] == messages


def test_other_mappings_and_sequences_are_messages_too() -> None:
    message = types.MappingProxyType({"role": "user", "content": collections.UserList(["x"])})
    assert body((message,))["messages"] == [{"role": "user", "content": ["x"]}]


def test_a_later_change_of_the_callers_objects_changes_nothing() -> None:
    messages = [{"role": "user", "content": "before"}]
    metadata = {"list": [1]}
    spec = make_spec(messages, {"metadata": metadata}, DEFAULTS)
    messages[0]["content"] = "after"
    metadata["list"].append(2)
    assert b"before" in spec.request
    assert spec.metadata == {"list": [1]}


def test_equal_requests_are_equal_bytes_and_schemas_keep_their_order() -> None:
    one = {"role": "user", "content": "x"}
    other = {"content": "x", "role": "user"}
    assert (
        make_spec([one], {"seed": 1, "top_p": 1}, DEFAULTS).request
        == make_spec([other], {"top_p": 1, "seed": 1}, DEFAULTS).request
    )
    # A model answers in the order of the schema: reasoning first, or it is of no use.
    schema = {"type": "json_schema", "properties": {"reasoning": {}, "answer": {}}}
    request = make_spec("x", {"response_format": schema, "tools": [schema]}, DEFAULTS).request
    assert request.count(b'"properties":{"reasoning":{},"answer":{}}') == 2


def test_completions_and_embeddings() -> None:
    assert body("hello", kind="completion", max_tokens=3) == {"prompt": "hello", "max_tokens": 3}
    assert body("hello", kind=JobKind.EMBEDDING) == {"input": "hello"}
    assert make_spec("hello", {"kind": "embedding"}, DEFAULTS).kind is JobKind.EMBEDDING


def test_a_nul_in_a_prompt_is_allowed() -> None:
    assert body("a\0b")["messages"][0]["content"] == "a\0b"


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("tier", {"tier": "Basic"}),
    ("tier", {"tier": ""}),
    ("tier", {"tier": 1}),
    ("on_unknown", {"on_unknown": "fail_unknown"}),
    ("on_unknown", {"on_unknown": False}),
    ("model", {"model": ""}),
    ("model", {"model": "a\0b"}),
    ("model", {"model": "a\ud800b"}),
    ("model", {"model": "x" * 256}),
    ("system", {"system": ""}),
    ("system", {"system": "\udfff"}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": True}),
    ("max_tokens", {"max_tokens": 1.0}),
    ("temperature", {"temperature": 2.1}),
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": float("nan")}),
    ("temperature", {"temperature": "0.5"}),
    ("temperature", {"temperature": False}),
    ("top_p", {"top_p": 1.5}),
    ("stop", {"stop": ""}),
    ("stop", {"stop": []}),
    ("stop", {"stop": ["a"] * 5}),
    ("stop[1]", {"stop": ["a", 1]}),
    ("stop", {"stop": {"a"}}),
    ("stop", {"stop": ["\ud800"]}),
    ("seed", {"seed": 2**63}),
    ("seed", {"seed": 1.5}),
    ("response_format", {"response_format": "json"}),
    ("response_format", {"response_format": {}}),
    ("response_format", {"response_format": {"type": "x", "y": {1, 2}}}),
    ("tools", {"tools": []}),
    ("tools", {"tools": "f"}),
    ("tools[0]", {"tools": ["f"]}),
    ("tools", {"tools": [{"x": object()}]}),
    ("tool_choice", {"tool_choice": 1}),
    ("metadata", {"metadata": []}),
    ("metadata", {"metadata": {"a": object()}}),
    ("metadata", {"metadata": {1: 2}}),
    ("metadata", {"metadata": {"a": "x" * 17_000}}),
    ("metadata", {"metadata": {"a": "x\0"}}),
    ("metadata", {"metadata": {"x\0": 1}}),
    ("metadata", {"metadata": {"a": "\ud800"}}),
    ("priority", {"priority": 10}),
    ("priority", {"priority": -1}),
    ("priority", {"priority": True}),
    ("deadline", {"deadline": 0}),
    ("deadline", {"deadline": float("inf")}),
    ("deadline", {"deadline": MAX_DEADLINE_S + 1}),
    ("deadline", {"deadline": "tomorrow"}),
    ("deadline", {"deadline": True}),
    ("deadline", {"deadline": dt.timedelta(seconds=-1)}),
    ("deadline", {"deadline": NOW}),
    ("deadline", {"deadline": dt.datetime(2031, 1, 1)}),  # noqa: DTZ001  # naive on purpose
    ("idempotency_key", {"idempotency_key": ""}),
    ("idempotency_key", {"idempotency_key": "a\0"}),
    ("idempotency_key", {"idempotency_key": "x" * 256}),
    ("idempotency_key", {"idempotency_key": 7}),
    ("callback_url", {"callback_url": "ftp://example.com"}),
    ("callback_url", {"callback_url": "https://"}),
    ("callback_url", {"callback_url": "https://exa mple.com"}),
    ("callback_url", {"callback_url": "https://example.com:99999/"}),
    ("callback_url", {"callback_url": "https://example.com/" + "x" * 2048}),
    ("callback_url", {"callback_url": "https://[::1/"}),
    ("callback_url", {"callback_url": "http://example.com/"}),
    ("callback_url", {"callback_url": "http://localhost:8000/"}),
    ("callback_url", {"callback_url": "https://10.0.0.1/"}),
    ("callback_url", {"callback_url": b"https://example.com/"}),
    ("cache", {"cache": "never"}),
    ("cache", {"cache": 1}),
    ("cache.ttl_s", {"cache": CacheOptions(ttl_s=0)}),
    ("cache.namespace", {"cache": CacheOptions(namespace="")}),
    ("kind", {"kind": "image"}),
    ("system", {"kind": "completion", "system": "x"}),
    ("tools", {"kind": "completion", "tools": [TOOL]}),
    ("max_tokens", {"kind": "embedding", "max_tokens": 5}),
    ("temprature", {"temprature": 1}),
]


def test_a_callback_url_is_kept_in_its_normal_form() -> None:
    spec = make_spec("hello", {"callback_url": "HTTPS://Example.com.:443?x"}, DEFAULTS)
    assert spec.callback_url == "https://example.com/?x"


def test_a_blocked_callback_url_is_told_from_a_wrong_one() -> None:
    blocked = {"callback_url": "https://169.254.169.254/"}
    with pytest.raises(BlockedAddressError) as caught:
        make_spec("hello", blocked, DEFAULTS)
    assert caught.value.field == "callback_url"
    with pytest.raises(BlockedAddressError) as caught:
        make_specs(["hello", {"prompt": "hello", **blocked}], {}, DEFAULTS)
    assert caught.value.field == "prompts[1].callback_url"


def test_callbacks_to_this_machine_are_for_development() -> None:
    options = {"callback_url": "http://localhost:8000/hook"}
    develop = dataclasses.replace(DEFAULTS, callback_allow_loopback=True)
    assert make_spec("hello", options, develop).callback_url == "http://localhost:8000/hook"
    with pytest.raises(BlockedAddressError):
        make_spec("hello", {"callback_url": "https://10.0.0.1/"}, develop)


@pytest.mark.parametrize(("field", "options"), REFUSED)
def test_refused_options_are_named(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make_spec(SECRET, options, DEFAULTS)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "prompt"),
    [
        ("prompt", ""),
        ("prompt", b"bytes"),
        ("prompt", None),
        ("prompt", []),
        ("prompt", {"role": "user", "content": SECRET}),
        ("prompt", "\ud800" + SECRET),
        ("prompt", "x" * (8 * 1024 * 1024)),
        ("prompt[0]", [SECRET]),
        ("prompt[0].role", [{"content": SECRET}]),
        ("prompt[1].role", [{"role": "user"}, {"role": SECRET}]),
        ("prompt[1].role", [{"role": "user"}, {"role": ["user"]}]),
        ("prompt[0]", [{"role": "user", "content": SECRET + "\udcff"}]),
        ("prompt[0]", [{"role": "user", "content": {SECRET}}]),
        ("prompt[0]", [{"role": "user", "content": SECRET.encode()}]),
    ],
)
def test_refused_prompts_are_named_and_not_shown(field: str, prompt: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make_spec(prompt, {}, DEFAULTS)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert caught.value.__cause__ is None


def test_messages_tell_what_is_wrong() -> None:
    with pytest.raises(InvalidRequestError, match="lone surrogate"):
        make_spec("\ud800", {}, DEFAULTS)
    with pytest.raises(InvalidRequestError, match="did you mean temperature"):
        make_spec("x", {"temprature": 1}, DEFAULTS)
    with pytest.raises(InvalidRequestError, match="number from 0 to 2; the str that was given"):
        make_spec("x", {"temperature": "hot"}, DEFAULTS)
    with pytest.raises(InvalidRequestError, match="prompt\\[0\\] is a system message already"):
        make_spec([{"role": "system", "content": "a"}], {"system": "b"}, DEFAULTS)
    with pytest.raises(InvalidRequestError, match="naive one has no time zone"):
        make_spec("x", {"deadline": dt.datetime(2031, 1, 1)}, DEFAULTS)  # noqa: DTZ001


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("gpt-5-mni", "did you mean gpt-5-mini"),
        (SECRET, "its models are gpt-5, gpt-5-mini, small"),
    ],
)
def test_models_of_the_fleet(given: str, hint: str) -> None:
    known = Defaults(models=("gpt-5", "gpt-5-mini", "small"))
    assert make_spec("x", {"model": "small"}, known).model == "small"
    assert make_spec("x", {}, known).model is None
    assert make_spec("x", {"model": given}, DEFAULTS).model == given  # nobody tells
    with pytest.raises(InvalidRequestError, match=hint) as caught:
        make_specs(["x", {"prompt": "y", "model": given}], {}, known)
    assert caught.value.field == "prompts[1].model"
    assert given not in str(caught.value)


def test_many_models_are_not_all_listed() -> None:
    known = Defaults(models=tuple(f"model-{n}" for n in range(14)))
    with pytest.raises(InvalidRequestError, match=r"model-9 and 4 more$"):
        make_spec("x", {"model": "?"}, known)


def test_tiers_of_the_fleet() -> None:
    known = Defaults(tier="basic", tiers=("basic", "advanced"))
    assert make_spec("x", {}, known).tier == "basic"
    with pytest.raises(InvalidRequestError, match="its tiers are basic, advanced"):
        make_spec("x", {"tier": "standard"}, known)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (30, 30.0),
        (0.5, 0.5),
        (dt.timedelta(minutes=2), 120.0),
        (NOW + dt.timedelta(seconds=90), 90.0),
        (dt.datetime(2030, 1, 1, 2, tzinfo=dt.timezone(dt.timedelta(hours=1))), 3600.0),
    ],
)
def test_deadlines(value: object, expected: float) -> None:
    assert make_spec("x", {"deadline": value}, DEFAULTS).deadline_s == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, CacheMode.USE),
        (False, CacheMode.OFF),
        ("off", CacheMode.OFF),
        (CacheMode.REFRESH, CacheMode.REFRESH),
        (CacheOptions(mode="refresh"), CacheMode.REFRESH),  # type: ignore[arg-type]
    ],
)
def test_cache_options(value: object, expected: CacheMode) -> None:
    cache = make_spec("x", {"cache": value}, DEFAULTS).cache
    assert cache is not None
    assert cache.mode is expected


def test_backslashes_in_metadata_are_no_nul() -> None:
    metadata = {"path": r"C:\u0000", "two": "\\\\u0000"}
    assert make_spec("x", {"metadata": metadata}, DEFAULTS).metadata == metadata


def test_many_prompts_share_options_and_have_their_own() -> None:
    specs = make_specs(
        [
            "text",
            [{"role": "user", "content": "messages"}],
            {"prompt": "own", "tier": "advanced", "idempotency_key": "k", "temperature": None},
            {"messages": [{"role": "user", "content": "m"}], "metadata": {"n": 4}},
        ],
        {"tier": "basic", "temperature": 1, "metadata": {"run": 1}},
        DEFAULTS,
    )
    assert [spec.tier for spec in specs] == ["basic", "basic", "advanced", "basic"]
    assert [b'"temperature":1' in spec.request for spec in specs] == [True, True, False, True]
    assert [spec.metadata for spec in specs] == [{"run": 1}, {"run": 1}, {"run": 1}, {"n": 4}]
    assert specs[2].idempotency_key == "k"
    assert [spec.id for spec in specs] == sorted(spec.id for spec in specs)


@pytest.mark.parametrize(
    ("field", "prompts", "options"),
    [
        ("prompts", "one text", {}),
        ("prompts", {"prompt": "x"}, {}),
        ("prompts[1]", ["a", ""], {}),
        ("prompts[1]", ["a", 7], {}),
        ("prompts[0]", [{"tier": "basic"}], {}),
        ("prompts[0]", [{"prompt": "a", "messages": []}], {}),
        ("prompts[0]", [{"role": "user", "content": "a"}], {}),
        ("prompts[0].prompt", [{"prompt": 7}], {}),
        ("prompts[0].messages[0].role", [{"messages": [{"role": "x"}]}], {}),
        ("prompts[2].temperature", ["a", "b", {"prompt": "c", "temperature": 9}], {}),
        ("prompts[0].session", [{"prompt": "c", "session": 9}], {}),
        ("temperature", ["a"], {"temperature": 9}),
        ("idempotency_key", ["a"], {"idempotency_key": "k"}),
    ],
)
def test_the_wrong_one_of_many_is_named(field: str, prompts: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make_specs(prompts, options, DEFAULTS)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


def test_ids() -> None:
    id_ = uuid.uuid4()
    assert job_id(id_) is id_
    assert job_id(str(id_)) == id_
    for wrong in ("", "7", None, 7):
        with pytest.raises(InvalidRequestError, match=r"^id: "):
            job_id(wrong)  # type: ignore[arg-type]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.floats(),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.text(alphabet=st.characters(codec="utf-8"), min_size=1) | JSON,
    name=st.sampled_from(sorted({name for name, _ in REFUSED if name.isidentifier()})),
    value=JSON,
)
def test_anything_is_accepted_or_refused_with_its_field(
    prompt: object, name: str, value: object
) -> None:
    try:
        spec = make_spec(prompt, {name: value}, DEFAULTS)
    except InvalidRequestError as error:
        assert error.field.split("[")[0].split(".")[0] in {"prompt", name}  # noqa: PT017
    else:
        assert json.loads(spec.request)
