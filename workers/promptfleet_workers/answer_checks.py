# ruff: noqa: RUF001 - words of many alphabets
"""What may be wrong with a whole answer: a broken schema, a refusal, too short, cut off."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jsonschema_rs
import orjson

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.policies.functions import find_function
from promptfleet_shared.policies.routing import EscalateOn
from promptfleet_workers.providers.protocol import Completion

log = logging.getLogger(__name__)

_KEPT_SCHEMAS = 256
_REFUSAL_CHARS = 300
"""A refusal is at the answer's begin, and the answer is short: what follows "I can't" in a long one
is about something else."""
_LONG_ANSWER_CHARS = 1_200
_CUT_OFF = frozenset({"length", "max_tokens", "MAX_TOKENS", "model_length"})
_REFUSED = frozenset({"refusal", "content_filter", "SAFETY", "PROHIBITED_CONTENT", "BLOCKLIST"})

_NOT = r"(?:can(?:no|['’])t|cannot|won['’]t|unable|not able)"
_PHRASES = (
    rf"\bI(?: am|['’]m) (?:sorry|unable|not able|afraid)\b.{{0,60}}?\b{_NOT}\b",
    rf"^\W{{0,4}}(?:sorry,? )?(?:but )?I (?:{_NOT}|must decline)\b",
    rf"\bI {_NOT} (?:assist|help|comply|fulfil|provide|do that)",
    r"\bas an AI(?: language)? model,? I\b",
    r"\bunable to (?:assist|help|comply|fulfil)",
    r"^\W{0,4}(?:Es )?tut mir leid\b.{0,60}\b(?:kann|darf) ich\b",
    r"^\W{0,4}Ich (?:kann|darf)\b.{0,60}\bnicht (?:helfen|beantworten|erfüllen|unterstützen)",
    r"^\W{0,4}(?:Je suis )?désolé.{0,60}\bne (?:peux|puis)\b",
    r"\bje ne (?:peux|puis) pas (?:vous )?aider",
    r"^\W{0,4}Lo siento.{0,60}\bno puedo\b|\bno puedo (?:ayudar|asistir|cumplir)",
    r"^\W{0,4}(?:Desculpe|Sinto muito|Lamento).{0,60}\bnão posso\b",
    r"^\W{0,4}Mi (?:dispiace|scuso).{0,60}\bnon posso\b",
    r"^\W{0,4}(?:Извините|К сожалению|Простите).{0,60}\bне могу\b",
    r"(?:抱歉|对不起|對不起).{0,20}(?:无法|無法|不能)",
    r"(?:申し訳|すみません).{0,40}(?:できません|できかねます)",
    r"죄송.{0,40}(?:없습니다|어렵습니다)",
)
_REFUSAL = re.compile("|".join(_PHRASES), re.IGNORECASE | re.DOTALL)


class AnswerChecks:
    """Checks answers; on the event loop, so a user's function must be quick."""

    def __init__(
        self,
        functions: Mapping[str, str],
        *,
        find: Callable[[str], Callable[..., Any]] = find_function,
    ) -> None:
        """Import nothing yet.

        Args:
            functions: The users' checks that jobs may name: each one's dotted path.
            find: Finds a function by its dotted path.
        """
        self._functions = functions
        self._find = functools.cache(find)
        self._broken: set[str] = set()

    def failed(self, checks: EscalateOn, request: str, answer: Completion) -> str | None:
        """The name of the first check that a whole answer fails; None if it is good.

        A check that can't be made (a schema that is none, a function that raises) fails nobody.
        """
        if checks.cut_off and answer.finish_reason in _CUT_OFF:
            return "cut_off"
        if checks.refusal and is_refusal(answer):
            return "refusal"
        return None if answer.text is None else self._failed_by(checks, request, answer.text)

    def _failed_by(self, checks: EscalateOn, request: str, text: str) -> str | None:
        """The first check of its text that an answer fails; calls of functions have no text."""
        if len(text.strip()) < checks.min_chars:
            return "min_chars"
        if checks.json_schema is not False and not _follows(checks.json_schema, request, text):
            return "json_schema"
        if checks.function is not None and not self._accepts(checks.function, request, text):
            return "function"
        return None

    def _accepts(self, name: str, request: str, text: str) -> bool:
        path = self._functions.get(name, name)
        if path in self._broken:
            return True
        try:
            function = self._find(path)
        except ConfigurationError as error:
            self._broken.add(path)
            log.warning("check_not_found", extra={"function": path, "error": error.message})
            return True
        try:
            return bool(function(text, orjson.loads(request)))
        except Exception as error:  # noqa: BLE001 - a user's function may raise anything
            # Never its text, which could hold the answer.
            log.warning("check_failed", extra={"function": path, "error": type(error).__name__})
            return True


def is_refusal(answer: Completion) -> bool:
    """True for an answer that refuses, by what the provider says or by its words.

    The words are those of a dozen languages, at the begin of an answer that is not long.
    """
    if answer.finish_reason in _REFUSED:
        return True
    if b'"refusal"' in answer.response and _told_refusal(answer.response):
        return True
    text = answer.text
    if text is None or len(text) > _LONG_ANSWER_CHARS:
        return False
    return _REFUSAL.search(text[:_REFUSAL_CHARS].replace("\n", " ")) is not None


def _told_refusal(response: bytes) -> bool:
    """What OpenAI keeps apart: `message.refusal`, a text or null."""
    try:
        choices = orjson.loads(response)["choices"]
        return any(bool(choice["message"].get("refusal")) for choice in choices)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _follows(wanted: bool | dict[str, Any], request: str, text: str) -> bool:  # noqa: FBT001 - as configured
    schema = wanted if isinstance(wanted, dict) else _schema_of(request)
    if schema is None:
        return True
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    validator = _validator(orjson.dumps(schema))
    return validator is None or validator.is_valid(value)


def _schema_of(request: str) -> dict[str, Any] | None:
    """The schema that the request itself asks for, if it does."""
    if '"response_format"' not in request:
        return None
    wanted = orjson.loads(request).get("response_format")
    if not isinstance(wanted, dict):
        return None
    if wanted.get("type") == "json_object":
        return {"type": "object"}
    schema = (wanted.get("json_schema") or {}).get("schema")
    return schema if wanted.get("type") == "json_schema" and isinstance(schema, dict) else None


@functools.lru_cache(maxsize=_KEPT_SCHEMAS)
def _validator(schema: bytes) -> jsonschema_rs.Validator | None:
    """None for what is no schema, or one that would have to be fetched."""
    try:
        # A tenant's schema: no request to wherever it points, no pattern that takes for ever.
        return jsonschema_rs.validator_for(
            orjson.loads(schema),
            retriever=_fetch_nothing,
            pattern_options=jsonschema_rs.RegexOptions(),
        )
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        log.warning("schema_refused", extra={"error": type(error).__name__})
        return None


def _fetch_nothing(uri: str) -> NoReturn:  # noqa: ARG001 - the library's signature
    raise ValueError("references to other documents are not followed")
