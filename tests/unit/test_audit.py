"""An audit finds what is repeated, and proposes what saves it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from promptfleet.audit.prefixes import (
    BLOCK,
    Beginning,
    best_order,
    cached_tokens,
    common_blocks,
    shared_prefixes,
    signature,
)
from promptfleet.audit.repetitions import Duplicates, Paragraphs
from promptfleet.cli import app

FLEET = """
default_tier = "basic"
[tiers.basic]
models = ["mini"]
[tiers.top]
models = ["big"]
[models.mini]
deployments = [{ base_url = "https://api.openai.com/v1", model = "gpt-4o-mini" }]
[models.big]
deployments = [{ base_url = "https://api.openai.com/v1", model = "gpt-4o" }]
"""
RunAudit = Callable[..., dict[str, Any]]
WORDS = ("refund", "order", "ship", "within", "days", "always", "never", "customer", "polite")


def prose(seed: int, words: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def beginnings(*texts: str) -> list[Beginning]:
    return [
        Beginning(signature=signature(t), tokens=len(t) // 4, chars=len(t), line=n)
        for n, t in enumerate(texts, 1)
    ]


class TestPrefixes:
    @pytest.mark.parametrize("blocks", [0, 1, 7, 20])
    def test_common_blocks(self, blocks: int) -> None:
        shared = prose(1, 2000)[: blocks * BLOCK]
        one, other = shared + prose(2, 500), shared + prose(3, 900)
        assert common_blocks(signature(one), signature(other)) == blocks

    def test_alternating_prompts_are_put_together(self) -> None:
        a, b = prose(1, 1500), prose(2, 1500)
        found = beginnings(a + "1", b + "2", a + "3", b + "4", "short", a + "5")
        order = best_order(found)
        assert order == [0, 2, 5, 1, 3, 4]
        assert cached_tokens(found, range(6)) == 0
        assert cached_tokens(found, order) == pytest.approx(3 * len(a) // 4, rel=0.05)

    def test_what_is_too_short_for_a_cache_saves_nothing(self) -> None:
        a = prose(1, 300)
        found = beginnings(a + "1", a + "2")
        assert cached_tokens(found, [0, 1]) == 0

    def test_groups_within_groups(self) -> None:
        a, b = prose(1, 800), prose(2, 800)
        found = beginnings(*[a + b + str(n) for n in range(5)], a + prose(3, 50), prose(4, 50))
        shared = shared_prefixes(found, best_order(found))
        assert [(group.prompts, group.lines) for group in shared] == [(5, (1, 2, 3))]
        assert shared[0].tokens == pytest.approx(len(a + b) // 4, rel=0.1)


class TestRepetitions:
    def test_a_paragraph_said_twice(self) -> None:
        one, other = prose(1, 30), prose(2, 30)
        paragraphs = Paragraphs()
        assert paragraphs.add(f"{one}\n\n{other}\n\n{one}", 1) == len(one)
        assert paragraphs.add(f"{one}\n\n{other}", 2) == 0
        assert paragraphs.prompts_with_repeats == 1

    def test_boilerplate_that_moves(self) -> None:
        paragraphs, fixed, moving = Paragraphs(), prose(1, 40), prose(2, 30)
        for n in range(12):
            paragraphs.add(f"{fixed}\n\n{'x' * n}\n\n{moving}", n)
        found = paragraphs.boilerplate()
        assert [(p.prompts, p.moves) for p in found] == [(12, False), (12, True)]

    def test_equal_requests(self) -> None:
        duplicates = Duplicates()
        assert [duplicates.is_repeated(facts, 1) for facts in (b"a", b"b", b"a")] == [0, 0, 1]

    def test_nearly_equal_texts(self) -> None:
        duplicates = Duplicates()
        text = " ".join(f"word{n}" for n in range(100)).replace("1", "one").replace("2", "two")
        assert not duplicates.is_alike(text, 1)
        assert duplicates.is_alike(text.upper() + "!", 2)  # the same words
        changed = text.split()
        changed[50] = "another"
        assert duplicates.is_alike(" ".join(changed), 3)
        assert not duplicates.is_alike(prose(9, 100), 4)
        assert duplicates.near == [(1, 2), (1, 3)]

    def test_a_few_words_are_not_compared(self) -> None:
        duplicates = Duplicates()
        assert not duplicates.is_alike("Summarise this", 1)
        assert not duplicates.is_alike("Translate this", 2)


class TestCommand:
    @pytest.fixture
    def audit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunAudit:
        (tmp_path / "fleet.toml").write_text(FLEET)
        monkeypatch.chdir(tmp_path)
        for name in ("PROMPTFLEET_CONFIG", "PROMPTFLEET_DATABASE_URL"):
            monkeypatch.delenv(name, raising=False)

        def audit(lines: list[Any], *words: str) -> dict[str, Any]:
            Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            result = CliRunner().invoke(app, ["audit", "in.jsonl", "--json", *words])
            assert result.exit_code == 0, result.output
            found: dict[str, Any] = json.loads(result.stdout)
            return found

        return audit

    def test_suggestions_come_by_money(self, audit: RunAudit) -> None:
        policy = prose(1, 1500)
        lines = [
            {"system": policy if n % 2 else prose(n + 50, 1500), "prompt": f"{n}?", "max_tokens": 9}
            for n in range(20)
        ]
        lines += [lines[1], {"prompt": "a" + "\n" * 200 + "b", "max_tokens": 9, "tier": "top"}]
        found = audit(lines)

        assert (found["prompts"], found["invalid"], found["duplicates"]) == (22, 0, 1)
        assert found["prefixes"][0]["prompts"] == 11
        assert found["cached_tokens"]["reordered"] > 10_000 > found["cached_tokens"]["now"]
        assert found["white_space_tokens"] > 0
        assert found["batch_usd"] == pytest.approx(found["cost_usd"] / 2)
        assert found["all_on"]["top"]["cost_usd"] > 10 * found["all_on"]["basic"]["cost_usd"]
        worth = [suggestion["usd"] for suggestion in found["suggestions"]]
        assert worth == sorted(worth, reverse=True)
        codes = {suggestion["code"] for suggestion in found["suggestions"]}
        assert codes >= {"batch", "reorder", "duplicates", "compact"}

    def test_reordered_lines_are_the_same_lines(self, audit: RunAudit) -> None:
        a, b = prose(1, 500), prose(2, 500)
        lines = [{"prompt": text + str(n)} for n in range(4) for text in (a, b)]
        audit([*lines, {"prompt": 7}], "--reorder", "out.jsonl")
        written = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
        assert written == [*lines[::2], *lines[1::2]]

    def test_a_table_for_people(self, audit: RunAudit, monkeypatch: pytest.MonkeyPatch) -> None:
        audit([{"prompt": "Hello"}])
        result = CliRunner().invoke(app, ["audit", "in.jsonl"])
        assert "suggestions, by money" in result.stdout
        assert "Hello" not in result.stdout

    def test_its_own_input_is_not_overwritten(self, audit: RunAudit) -> None:
        audit(["Hello"])
        result = CliRunner().invoke(app, ["audit", "in.jsonl", "--reorder", "in.jsonl"])
        assert result.exit_code == 2
        assert Path("in.jsonl").read_text() == '"Hello"\n'
