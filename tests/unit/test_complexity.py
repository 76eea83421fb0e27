# ruff: noqa: RUF001 - words of many alphabets
"""The rules' guess at how hard a prompt is: on real prompts, and on whatever else may come."""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfleet_shared.policies.complexity import (
    HEAD_CHARS,
    HIGHEST,
    LOWEST,
    TAIL_CHARS,
    Estimate,
    PromptFacts,
    estimate_complexity,
    prompt_facts,
)

SAMPLE = Path(__file__).parents[1] / "data" / "mt_bench_sample.jsonl"


def estimate(text: str) -> Estimate:
    return estimate_complexity(PromptFacts(text=text, chars=len(text)))


@pytest.fixture(scope="module")
def real() -> dict[str, list[Estimate]]:
    """Estimates of MT-Bench's questions, by their category."""
    found: dict[str, list[Estimate]] = defaultdict(list)
    for line in SAMPLE.read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        found[question["category"]].append(estimate(question["turns"][0]))
    return found


EASY = (
    "What is the capital of France?",
    "Hi",
    "Thanks!",
    "Translate 'dog' to French",
    "Classify the sentiment: I love it",
    "Who was Ada Lovelace?",
    "Was ist die Hauptstadt von Peru?",
    "¿Quién es el presidente de Chile?",
    "Quand a commencé la guerre ?",
    "法国的首都是什么？",
    "Как тебя зовут? Привет",
    "프랑스의 수도는 어디인가요?",
    "ما هي عاصمة فرنسا؟",
)


@pytest.mark.parametrize("text", EASY)
def test_small_questions_are_easy_in_many_languages(text: str) -> None:
    assert estimate(text).score < 3


HARD = (
    "Prove step by step that the square root of 2 is irrational, and compare two proofs.",
    "Beweise Schritt für Schritt, dass die Wurzel aus 2 irrational ist, und vergleiche die Wege.",
    "Démontre étape par étape que racine de 2 est irrationnelle, et compare deux preuves.",
    "Demuestra paso a paso que la raíz de 2 es irracional y compara dos pruebas.",
    "Докажи шаг за шагом, что корень из 2 иррационален, и сравни два доказательства.",
    "请逐步证明根号2是无理数，并比较两种证明。",
    "√2が無理数であることを段階的に証明し、その理由を説明してください。",
    "√2가 무리수임을 단계별로 증명하고 두 증명을 비교하세요.",
)


@pytest.mark.parametrize("text", HARD)
def test_proofs_are_not_easy_in_many_languages(text: str) -> None:
    found = estimate(text)
    assert found.score >= 3
    assert found.needs_reasoning
    assert not found.is_simple_query


def test_real_questions_that_need_thought_are_seen(real: dict[str, list[Estimate]]) -> None:
    for category in ("math", "coding", "reasoning"):
        needing = [found.needs_reasoning for found in real[category]]
        assert sum(needing) >= 4, category  # of six
    needed = sum(found.needs_reasoning for found in real["writing"])
    assert needed <= 2


def test_real_questions_that_need_fantasy_are_seen(real: dict[str, list[Estimate]]) -> None:
    for category in ("writing", "roleplay"):
        assert sum(found.needs_creativity for found in real[category]) >= 4, category
    for category in ("math", "coding", "extraction"):
        assert sum(found.needs_creativity for found in real[category]) <= 2, category


def test_real_questions_are_spread_over_the_scale(real: dict[str, list[Estimate]]) -> None:
    scores = [found.score for estimates in real.values() for found in estimates]
    assert min(scores) < 3
    assert max(scores) > 6
    assert statistics.mean(f.score for f in real["math"] + real["coding"]) > 3.5


def test_a_real_question_takes_less_than_a_millisecond() -> None:
    texts = [json.loads(line)["turns"][0] for line in SAMPLE.read_text("utf-8").splitlines()]
    best = min(_seconds(texts) for _ in range(5))
    assert best / len(texts) < 0.001


def _seconds(texts: list[str]) -> float:
    began = time.perf_counter()
    for text in texts:
        estimate(text)
    return time.perf_counter() - began


NASTY = {
    "words": "The quick brown fox jumps over the lazy dog; ",
    "brackets": "{};()==",
    "spaces": " ",
    "lines": "\n",
    "tabs": "\t- ",
    "digits": "1",
    "letters": "a",
    "accents": "é",
    "numbers": "1.1,",
    "chinese": "中",
    "backticks": "`",
    "questions": "?",
}


@pytest.mark.parametrize("piece", NASTY.values(), ids=NASTY)
def test_a_megabyte_is_bounded(piece: str) -> None:
    text = (piece * (1_000_000 // len(piece) + 1))[:1_000_000]
    assert min(_seconds([text]) for _ in range(3)) < 0.25


def test_what_is_read_of_a_long_text_are_its_ends() -> None:
    middle = "x " * (HEAD_CHARS + TAIL_CHARS)
    assert not estimate(f"{middle} prove it {middle}").needs_reasoning
    assert estimate(f"prove it {middle}").needs_reasoning
    assert estimate(f"{middle} prove it").needs_reasoning


def test_markers_are_words_and_not_parts_of_words() -> None:
    assert estimate("prove it").needs_reasoning
    assert not estimate("improve it").needs_reasoning


@given(st.text(max_size=400))
def test_any_text_has_a_score_on_the_scale_and_reasons_that_add_up(text: str) -> None:
    found = estimate(text)
    assert LOWEST <= found.score <= HIGHEST
    total = LOWEST + sum(found.reasons.values())
    assert found.score == pytest.approx(min(HIGHEST, max(LOWEST, total)), abs=0.11)
    assert found == estimate(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["role", "content", "text", "type", "messages", "prompt", "input"]),
                inner,
                max_size=3,
            )
        ),
        max_leaves=8,
    )
)
def test_no_shape_of_a_request_is_too_odd(value: object) -> None:
    for name in ("messages", "prompt", "input"):
        estimate_complexity(prompt_facts({name: value, "response_format": value}, {}))


def test_facts_of_a_conversation() -> None:
    facts = prompt_facts(
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "One"},
                {"role": "assistant", "content": "Two"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Three"}, {"type": "image_url"}],
                },
            ],
            "tools": [{}],
            "response_format": {"type": "json_schema"},
        },
        {"lang": "en"},
    )
    assert facts == PromptFacts(
        text="Three",
        chars=20,
        turns=2,
        has_tools=True,
        has_schema=True,
        has_media=True,
        attributes={"lang": "en"},
    )
