"""What is left out of a chat that is too long, and what never is."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.chats import AGENT_CHAT, claimed

from promptfleet_shared.jobs import JobKind, JobState
from promptfleet_shared.policies.context import ContextPolicy, ContextSection
from promptfleet_shared.store.errands import Ended
from promptfleet_shared.tokens import TokenCounter
from promptfleet_workers.context.errands import Answers
from promptfleet_workers.context.estimates import Estimates
from promptfleet_workers.context.fitting import Fitted, fit
from promptfleet_workers.context.turns import split
from promptfleet_workers.context.windows import Window

MODEL = "gpt-4o"
DROPPING = [p for p in ContextPolicy if p is not ContextPolicy.ERROR]


@functools.cache
def counter() -> TokenCounter:
    return TokenCounter()


def window(tokens: int, vocabulary: str = MODEL) -> Window:
    return Window(tokens=tokens, output=None, vocabulary=vocabulary)


def section(policy: ContextPolicy, **fields: Any) -> ContextSection:
    values = {"reserve_output_tokens": 0, "summary_tier": "basic", "summary_tokens": 30, **fields}
    return ContextSection(policy=policy, **values)


def request_of(messages: Sequence[Mapping[str, Any]], **parameters: Any) -> str:
    return orjson.dumps({"messages": messages, **parameters}).decode()


def fitted(
    messages: Sequence[Mapping[str, Any]],
    room: int,
    options: ContextSection,
    answers: Answers | None = None,
    **parameters: Any,
) -> Fitted:
    request = request_of(messages, **parameters)
    return fit(
        claimed(request),
        request,
        {"m": window(room)},
        section=options,
        estimates=Estimates(counter()),
        answers=answers or {},
    )


def with_errands_done(
    messages: Sequence[Mapping[str, Any]], room: int, options: ContextSection, summary: str
) -> Fitted:
    """As the worker does: first what has to be asked, then again with the answers."""
    found = fitted(messages, room, options)
    if not found.errands:
        return found
    answers = {e.key: Ended(JobState.SUCCEEDED, summary, None) for e in found.errands}
    found = fitted(messages, room, options, answers)
    assert not found.errands
    return found


def sent(found: Fitted) -> list[dict[str, Any]]:
    assert found.request is not None
    messages: list[dict[str, Any]] = orjson.loads(found.request)["messages"]
    return messages


def size(messages: Sequence[Mapping[str, Any]]) -> int:
    return counter().count_messages(messages, MODEL)


# -- strategies --------------------------------------------------------------------------------

words = st.text(alphabet="abcdefg äöü\n漢字🙂", max_size=60)
ids = (f"call_{n}" for n in range(10**9))


@st.composite
def turn(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A question, perhaps tools, an answer; perhaps a note of the system within."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": draw(words)}]
    for _ in range(draw(st.integers(0, 2))):
        calls = [next(ids) for _ in range(draw(st.integers(1, 3)))]
        messages.append(
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": call,
                        "type": "function",
                        "function": {"name": "look", "arguments": draw(words)},
                    }
                    for call in calls
                ],
            }
        )
        messages += [
            {"role": "tool", "tool_call_id": call, "content": draw(words)} for call in calls
        ]
    if draw(st.booleans()):
        messages.append({"role": "assistant", "content": draw(words)})
    if draw(st.integers(0, 9)) == 0:
        messages.insert(draw(st.integers(0, len(messages))), {"role": "developer", "content": "d"})
    return messages


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages = [
        message for part in draw(st.lists(turn(), min_size=1, max_size=6)) for message in part
    ]
    if draw(st.booleans()):
        messages.insert(0, {"role": "system", "content": draw(words)})
    return messages


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chats(), st.integers(0, 600), st.sampled_from(DROPPING), words)
def test_what_is_sent_fits_and_keeps_what_is_protected(
    messages: list[dict[str, Any]], room: int, policy: ContextPolicy, summary: str
) -> None:
    found = with_errands_done(messages, room, section(policy), summary)

    protected = protected_of(messages)
    if size(messages) <= room:
        assert (found.models, found.request) == (("m",), None)
    elif size(protected) > room:
        assert found.models == ()
    else:
        left = sent(found)
        assert size(left) <= room
        assert is_within(protected, left)
        assert_tools_are_whole(left)
        assert found.facts["policy"] == policy


@settings(max_examples=60, deadline=None)
@given(chats(), st.integers(40, 600), st.sampled_from(DROPPING))
def test_cutting_the_last_turn_fits_too(
    messages: list[dict[str, Any]], room: int, policy: ContextPolicy
) -> None:
    messages[-1:] = [messages[-1], {"role": "user", "content": "A long question. " * 100}]
    found = with_errands_done(messages, room, section(policy, cut_last_turn=True), "s")

    if found.models:
        left = sent(found) if found.request else messages
        assert size(left) <= room
        assert_tools_are_whole(left)
    else:
        short = [*protected_of(messages)[:-1], {"role": "user", "content": ""}]
        assert size(short) + 10 > room  # not even a little of it had room


def protected_of(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """System messages, and all from the last question on; written down apart from the code."""
    places = [n for n, message in enumerate(messages) if message["role"] == "user"]
    last = places[-1]
    while last > 0:  # questions in a row are one turn
        before = [n for n in range(last) if messages[n]["role"] != "developer"]
        if not before or messages[before[-1]]["role"] != "user":
            break
        last = before[-1]
    return [
        message
        for n, message in enumerate(messages)
        if n >= last or message["role"] in {"system", "developer"}
    ]


def is_within(part: Sequence[object], whole: Sequence[object]) -> bool:
    """True if `part` is a subsequence of `whole`."""
    rest = iter(whole)
    return all(any(item == other for other in rest) for item in part)


def assert_tools_are_whole(messages: Sequence[Mapping[str, Any]]) -> None:
    asked: list[str] = []
    for message in messages:
        asked += [call["id"] for call in message.get("tool_calls") or []]
        if message["role"] == "tool":
            assert message["tool_call_id"] in asked
    answered = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    assert sorted(asked) == sorted(answered)


# -- the policies one by one -------------------------------------------------------------------


def numbered(count: int) -> list[dict[str, Any]]:
    """`count` turns of the same size, then a last question."""
    chat = []
    for n in range(count):
        chat += [
            {"role": "user", "content": f"question {n}"},
            {"role": "assistant", "content": f"answer {n}"},
        ]
    return [{"role": "system", "content": "Be brief."}, *chat, {"role": "user", "content": "now"}]


def kept_of(found: Fitted) -> list[int]:
    return [
        int(message["content"].split()[1])
        for message in sent(found)
        if str(message["content"]).startswith("answer")
    ]


def room_for(turns: int) -> int:
    fixed = size([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "now"}])
    one = size(numbered(1)) - fixed
    return fixed + turns * one


def test_truncate_leaves_out_the_oldest() -> None:
    found = fitted(numbered(6), room_for(2), section(ContextPolicy.TRUNCATE))
    assert kept_of(found) == [4, 5]
    assert found.facts["left_out"] == 4


def test_middle_out_keeps_both_ends() -> None:
    found = fitted(numbered(6), room_for(3), section(ContextPolicy.MIDDLE_OUT))
    assert kept_of(found) == [0, 4, 5]


def test_relevance_keeps_what_the_question_is_about() -> None:
    messages = numbered(6)
    messages[3]["content"] = "question 1 zebra"
    messages[-1]["content"] = "zebra"
    room = room_for(2) + 6
    found = fitted(messages, room, section(ContextPolicy.RELEVANCE))
    assert kept_of(found) == [1, 5]


def test_relevance_by_embeddings_goes_by_their_angle() -> None:
    messages = numbered(4)
    options = section(ContextPolicy.RELEVANCE, relevance="embeddings:e")
    asked = fitted(messages, room_for(1), options).errands
    assert [e.kind for e in asked] == [JobKind.EMBEDDING] * 5
    vectors = [[1, 0], [0, 1], [0.9, 0.1], [0, 1], [0.1, 0.9]]  # the question's first
    answers = {
        errand.key: Ended(
            JobState.SUCCEEDED, None, orjson.dumps({"data": [{"embedding": vector}]}).decode()
        )
        for errand, vector in zip(asked, vectors, strict=True)
    }

    assert kept_of(fitted(messages, room_for(1), options, answers)) == [1]
    without = fitted(messages, room_for(1), options, dict.fromkeys(answers))
    assert kept_of(without) == [3]  # all words alike: the newest
    assert "bm25" in without.facts["relevance"]


def test_summarize_puts_a_summary_in_the_place_of_the_oldest() -> None:
    options = section(ContextPolicy.SUMMARIZE)
    asked = fitted(numbered(20), room_for(13), options)
    (errand,) = asked.errands
    assert (errand.tier, errand.kind) == ("basic", JobKind.CHAT)
    assert "question 0" in errand.request.decode()
    assert "question 19" not in errand.request.decode()

    found = with_errands_done(numbered(20), room_for(13), options, "They counted.")

    roles = [message["role"] for message in sent(found)]
    assert roles[:3] == ["system", "user", "assistant"]
    assert "They counted." in sent(found)[1]["content"]
    assert kept_of(found)[0] > 0
    assert kept_of(found)[-1] == 19


def test_the_next_turns_find_the_same_summary_made() -> None:
    options = section(ContextPolicy.SUMMARIZE)
    keys = [fitted(numbered(n), room_for(13), options).errands[0].key for n in range(20, 24)]
    assert len(set(keys)) < 3


def test_a_summary_that_failed_is_done_without() -> None:
    options = section(ContextPolicy.SUMMARIZE)
    (errand,) = fitted(numbered(20), room_for(13), options).errands
    found = fitted(numbered(20), room_for(13), options, {errand.key: None})
    assert kept_of(found) == list(range(7, 20))
    assert found.facts["summary"] == "failed"


def test_a_long_last_turn_is_an_error_unless_it_may_be_cut() -> None:
    messages = [{"role": "user", "content": "begin " + "word " * 500 + "end"}]
    assert fitted(messages, 100, section(ContextPolicy.MIDDLE_OUT)).models == ()

    def cut(policy: ContextPolicy) -> str:
        found = fitted(messages, 100, section(policy, cut_last_turn=True))
        assert 80 < size(sent(found)) <= 100
        return str(sent(found)[0]["content"])

    assert cut(ContextPolicy.MIDDLE_OUT).startswith("begin")
    assert cut(ContextPolicy.MIDDLE_OUT).endswith("end")
    assert cut(ContextPolicy.TRUNCATE).endswith("end")
    assert "begin" not in cut(ContextPolicy.TRUNCATE)


def test_the_longest_text_of_a_message_in_parts_is_cut() -> None:
    picture = {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}}
    parts = [{"type": "text", "text": "short"}, picture, {"type": "text", "text": "word " * 500}]
    messages = [{"role": "user", "content": parts}]
    found = fitted(messages, 200, section(ContextPolicy.MIDDLE_OUT, cut_last_turn=True))
    content = sent(found)[0]["content"]
    assert content[:2] == parts[:2]
    assert size(sent(found)) <= 200


def test_an_answer_of_a_tool_that_came_late_ties_turns_together() -> None:
    calls = [{"id": "a"}, {"id": "b"}]
    asked: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": calls}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "0"},
        {"role": "assistant", "content": "0"},
        {"role": "user", "content": "1"},
        asked,
        {"role": "user", "content": "2"},
        {"role": "tool", "tool_call_id": "a", "content": "late"},
        {"role": "user", "content": "3"},
        {"role": "tool", "tool_call_id": "b", "content": "later"},
        {"role": "user", "content": "4"},
    ]
    found = split(messages)
    assert (found.turns, found.last) == ([[0, 1], [2, 3, 4, 5, 6, 7]], [8])


# -- models ------------------------------------------------------------------------------------


def fit_models(
    models: dict[str, Window | None], policy: ContextPolicy, **parameters: Any
) -> Fitted:
    request = request_of(numbered(20), **parameters)
    return fit(
        claimed(request),
        request,
        models,
        section=section(policy),
        estimates=Estimates(counter()),
        answers={},
    )


@pytest.mark.parametrize("policy", [ContextPolicy.ERROR, ContextPolicy.TRUNCATE])
def test_models_that_cant_hold_it_are_skipped_before_anything_is_left_out(
    policy: ContextPolicy,
) -> None:
    found = fit_models({"small": window(50), "large": window(5000), "any": None}, policy)
    assert found.models == ("large", "any")
    assert found.request is None
    assert found.facts["skipped"] == ["small"]


def test_the_answer_has_its_room() -> None:
    exact = size(numbered(20))
    models: dict[str, Window | None] = {"m": window(exact + 100)}
    assert fit_models(models, ContextPolicy.ERROR, max_tokens=100).models == ("m",)
    assert fit_models(models, ContextPolicy.ERROR, max_tokens=101).models == ()
    small = Window(tokens=exact + 100, output=50, vocabulary=MODEL)
    assert fit_models({"m": small}, ContextPolicy.ERROR, max_tokens=101).models == ("m",)


def test_error_refuses_only_what_is_too_long_for_sure() -> None:
    exact = size(numbered(20))
    for tokens, models in ((exact, ("m",)), (int(exact * 0.95), ("m",)), (exact // 2, ())):
        unknown: dict[str, Window | None] = {"m": window(tokens, "some-llama")}
        assert fit_models(unknown, ContextPolicy.ERROR).models == models


def test_a_prompt_without_turns_fits_or_does_not() -> None:
    request = orjson.dumps({"prompt": "word " * 100}).decode()
    job = claimed(request, kind=JobKind.COMPLETION)
    for tokens, models in ((110, ("m",)), (90, ())):
        found = fit(
            job,
            request,
            {"m": window(tokens)},
            section=section(ContextPolicy.TRUNCATE),
            estimates=Estimates(counter()),
            answers={},
        )
        assert found.models == models


def test_real_tool_calls_stay_with_their_answers() -> None:
    whole = size(AGENT_CHAT)
    for room in range(size(protected_of(AGENT_CHAT)), whole, 7):
        for policy in DROPPING:
            found = with_errands_done(AGENT_CHAT, room, section(policy), "They planned a trip.")
            assert_tools_are_whole(sent(found))
            assert size(sent(found)) <= room


# -- what is learned ---------------------------------------------------------------------------


def test_what_providers_count_settles_the_estimate() -> None:
    estimates = Estimates(counter())
    text = "word " * 1000
    first = estimates.text(text, "some-llama")
    for _ in range(50):
        estimates.settle("some-llama", 1000, 1500)
    assert estimates.text(text, "some-llama") == pytest.approx(1500, rel=0.02)
    assert first < 1500
    estimates.settle(MODEL, 1000, 1500)  # counted as it counts: nothing to learn
    assert estimates.text(text, MODEL) == counter().count(text, MODEL)


def test_equal_errands_of_different_jobs_are_one() -> None:
    options = section(ContextPolicy.SUMMARIZE)
    keys = {fitted(numbered(20), room_for(13), options).errands[0].key for _ in range(2)}
    assert len(keys) == 1
