"""Counting tokens without a network."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from promptfleet_shared import tokens
from promptfleet_shared.tokens import TokenCounter, encoding_name


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> TokenCounter:
    return TokenCounter(tmp_path_factory.mktemp("vocabularies"))


@pytest.mark.parametrize(
    ("text", "model", "number"),
    [
        # as OpenAI's cookbook counts them
        ("antidisestablishmentarianism", "gpt-4o", 6),
        ("antidisestablishmentarianism", "gpt-4", 6),
        ("お誕生日おめでとう", "gpt-4o", 8),
        ("お誕生日おめでとう", "gpt-4", 9),
        ("2 + 2 = 4", "gpt-4", 7),
        ("", None, 0),
        ("<|endoftext|>", None, 7),
    ],
)
def test_counts(counter: TokenCounter, text: str, model: str | None, number: int) -> None:
    assert counter.count(text, model) == number


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (None, "o200k_base"),
        ("llama-3", "o200k_base"),
        ("gpt-5-mini", "o200k_base"),
        ("gpt-4-0613", "cl100k_base"),
        ("gpt-oss-20b", "o200k_harmony"),
        ("text-davinci-003", "cl100k_base"),
        ("gpt2", "cl100k_base"),
    ],
)
def test_the_vocabulary_of_a_model(counter: TokenCounter, model: str | None, name: str) -> None:
    assert encoding_name(model) == name
    assert counter.count("Hello, world!", model) == 4


@given(st.text())
def test_any_text_can_be_counted(text: str) -> None:
    assert 0 <= TokenCounter().count(text) <= len(text.encode("utf-8", "replace")) + len(text)


def test_lone_surrogates_are_counted(counter: TokenCounter) -> None:
    assert counter.count("a\ud800b") > 0


def test_pieces_change_little(counter: TokenCounter) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 1_000

    exact = len(tiktoken.get_encoding("o200k_base").encode_ordinary(text))

    assert exact <= counter.count(text) <= exact + 2 * (len(text) // tokens.PIECE)


def test_a_very_long_text_is_estimated(
    counter: TokenCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MAX_COUNTED", 1_000)

    assert counter.count("one two " * 1_000) == pytest.approx(2_000, rel=0.01)


def test_messages_cost_more_than_their_texts(counter: TokenCounter) -> None:
    # The example of OpenAI's cookbook, "How to count tokens with tiktoken"; the API counted 124.
    messages = [
        {
            "role": "system",
            "content": "You are a helpful, pattern-following assistant that translates corporate "
            "jargon into plain English.",
        },
        {
            "role": "system",
            "name": "example_user",
            "content": "New synergies will help drive top-line growth.",
        },
        {
            "role": "system",
            "name": "example_assistant",
            "content": "Things working well together will increase revenue.",
        },
        {
            "role": "system",
            "name": "example_user",
            "content": "Let's circle back when we have more bandwidth to touch base on "
            "opportunities for increased leverage.",
        },
        {
            "role": "system",
            "name": "example_assistant",
            "content": "Let's talk later when we're less busy about how to do better.",
        },
        {
            "role": "user",
            "content": "This late pivot means we don't have time to boil the ocean for the client "
            "deliverable.",
        },
    ]

    assert counter.count_messages(messages, "gpt-4o-mini") == 124
    assert counter.count_messages(messages, "gpt-4-0613") == 129


def test_parts_and_tool_calls_count(counter: TokenCounter) -> None:
    def count(**message: object) -> int:
        return counter.count_messages([{"role": "user", **message}])

    text = {"type": "text", "text": "Hello, world!"}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 9_999}}
    small = {"type": "image_url", "image_url": {"url": "https://a.test", "detail": "low"}}

    assert count(content=[text]) == count(content="Hello, world!")
    assert count(content=[text, picture]) == count(content=[text]) + 765
    assert count(content=[text, small]) == count(content=[text]) + 85
    assert count(content=None, tool_calls=[{"function": {"name": "f"}}]) > count(content=None)
    assert count(content=["no part", {"type": "input_audio"}]) == count(content="")


COUNT_IN_A_NEW_PROCESS = """
import sys
from pathlib import Path
import tiktoken.load
from promptfleet_shared.tokens import TokenCounter

def refuse(address):
    raise AssertionError("tiktoken went to the network")

tiktoken.load.read_file = refuse
sys.stdin.read()  # all of them start at once
print(TokenCounter(Path(sys.argv[1])).count("Hello, world!"))
"""


def test_many_processes_unpack_at_once_and_none_downloads(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "vocabularies"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COUNT_IN_A_NEW_PROCESS, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    outputs = [process.communicate(timeout=60)[0] for process in processes]

    assert outputs == ["4\n"] * 3
    # The digest that tiktoken itself asks for
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()]
    assert digests == ["446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"]


def test_a_damaged_vocabulary_is_replaced(tmp_path: Path) -> None:
    tokens._unpack("cl100k_base", tmp_path)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1_000])

    tokens._unpack("cl100k_base", tmp_path)

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_writable_cache_a_temporary_directory_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a-file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    directory = tokens._user_directory()

    assert directory.parent == tmp_path
    assert directory.is_dir()
