"""Anthropic's Messages API, asked in OpenAI's words: stored requests know one shape only."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Deployment
from promptfleet_shared.jobs import JobKind, Usage
from promptfleet_workers.providers.anthropic_stream import MessageAssembly
from promptfleet_workers.providers.http import Endpoint, HttpClient
from promptfleet_workers.providers.protocol import Answer, Call, Completion
from promptfleet_workers.providers.responses import (
    TOKENS_MAX,
    bad_response,
    estimate_tokens,
    name,
    read_answer,
    read_json,
    storable,
    tokens,
    truncated,
    write_json,
)
from promptfleet_workers.providers.streams import read_streamed

API_VERSION = "2023-06-01"
DEFAULT_MAX_TOKENS = 4096
"""Anthropic's API asks for a limit; this one is taken where a request has none."""

_Json = dict[str, Any]
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+);base64,", re.ASCII)
_PASSED = frozenset({"temperature", "top_p", "top_k", "thinking", "service_tier"})
# What can be left out because it changes nothing in the answer; `None` counts as left out anyway.
_HARMLESS: dict[str, Callable[[Any], bool]] = {
    "metadata": lambda _: True,
    "user": lambda _: True,
    "store": lambda value: value is False,
    "stream": lambda value: value is False,
    "n": lambda value: value == 1,
    "logprobs": lambda value: value is False,
    "response_format": lambda value: isinstance(value, dict) and value.get("type") == "text",
    "parallel_tool_calls": lambda value: isinstance(value, bool),  # see _tool_choice
}
_TRANSLATED = frozenset(
    {"messages", "max_tokens", "max_completion_tokens", "stop", "tools", "tool_choice"}
)


class AnthropicProvider:
    """A deployment that speaks Anthropic's protocol."""

    def __init__(self, deployment: Deployment, client: HttpClient) -> None:
        """Prepare the endpoint of `deployment`; `client` stays its owner's to close."""
        self._client = client
        headers = {"anthropic-version": API_VERSION}
        headers |= {key.lower(): value for key, value in deployment.headers.items()}
        secret = (deployment.secret() or "").strip()
        if secret:
            headers.setdefault("x-api-key", secret)
        self._endpoint = Endpoint(f"{deployment.base_url.rstrip('/')}/messages", headers)

    async def call(self, call: Call) -> list[Answer]:
        """Send a chat request; the one answer to it.

        Raises:
            ProviderError: The call failed; `unsupported` if the API has no counterpart of a field,
                which the message names.
        """
        if call.kind is not JobKind.CHAT:
            raise unsupported(f"kind {call.kind.value}")
        (request,) = call.requests
        fields = {"model": call.model, **translate(read_json(request.encode()))}
        if call.stream:
            return [await self._streamed(call, write_json({**fields, "stream": True}))]
        body = write_json(fields)
        response = await self._client.post(
            self._endpoint, body, call.timeouts, on_headers=call.on_headers
        )
        return [completion_of(call, read_answer(response), response.body)]

    async def _streamed(self, call: Call, body: bytes) -> Completion:
        """The same by way of an event stream."""
        assembly = MessageAssembly(on_text=call.on_text, received=call.received)
        data, response = await read_streamed(
            self._client, self._endpoint, body, call.timeouts, assembly, on_headers=call.on_headers
        )
        return completion_of(call, data, response)

    async def aclose(self) -> None:
        """Nothing to give back: the client belongs to whoever made it."""


def unsupported(field: str) -> ProviderError:
    """The refusal of what the API has no counterpart of."""
    message = f"Anthropic's API has no counterpart of {field}"
    return ProviderError(message, code="unsupported")


def translate(request: _Json) -> _Json:
    """The body, `model` aside, of the Messages request that asks for the same.

    Raises:
        ProviderError: `unsupported`, naming the field.

    Example:
        >>> translate({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9})
        {'messages': [{'role': 'user', 'content': 'Hi'}], 'max_tokens': 9}
    """
    given = {field: value for field, value in request.items() if value is not None}
    for field, value in given.items():
        if field not in _TRANSLATED and field not in _PASSED:
            is_harmless = _HARMLESS.get(field)
            if is_harmless is None or not is_harmless(value):
                raise unsupported(f"the field {field}" if field.isidentifier() else "a field")
    body: _Json = _conversation(given["messages"])
    limit = given.get("max_completion_tokens", given.get("max_tokens"))
    body["max_tokens"] = DEFAULT_MAX_TOKENS if limit is None else limit
    if "stop" in given:
        stop = given["stop"]
        body["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    if given.get("tools"):
        body["tools"] = [_tool(n, tool) for n, tool in enumerate(given["tools"])]
        body |= _tool_choice(given.get("tool_choice"), given.get("parallel_tool_calls"))
    body |= {field: given[field] for field in _PASSED if field in given}
    return body


# -- messages --------------------------------------------------------------------------------


def _conversation(messages: list[_Json]) -> _Json:
    """`messages`, and `system` where there is any."""
    system: list[_Json] = []
    turns: list[_Json] = []
    for n, message in enumerate(messages):
        field = f"messages[{n}]"
        role = message.get("role")
        if role in {"system", "developer"}:
            system += _text_parts(f"{field}.content", message.get("content"))
        elif role == "user":
            _add(turns, "user", _user_content(f"{field}.content", message.get("content")))
        elif role == "assistant":
            _add(turns, "assistant", _assistant_content(field, message))
        elif role == "tool":
            _add(turns, "user", [_tool_result(field, message)])
        else:
            raise unsupported(f"the role of {field}")
    body: _Json = {"messages": turns}
    if system:
        is_plain = all(part.keys() == {"type", "text"} for part in system)
        body["system"] = "\n\n".join(part["text"] for part in system) if is_plain else system
    return body


def _add(turns: list[_Json], role: str, content: str | list[_Json]) -> None:
    """Append a turn, or go on with the last one: there, roles take turns."""
    if not content:
        return  # an empty text is refused there
    if not turns or turns[-1]["role"] != role:
        turns.append({"role": role, "content": content})
        return
    turns[-1]["content"] = [*_as_parts(turns[-1]["content"]), *_as_parts(content)]


def _as_parts(content: str | list[_Json]) -> list[_Json]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _user_content(field: str, content: Any) -> str | list[_Json]:
    if isinstance(content, str):
        return content
    return [
        part
        for n, item in enumerate(content or [])
        if (part := _part(f"{field}[{n}]", item)) is not None
    ]


def _text_parts(field: str, content: Any) -> list[_Json]:
    """Content that may hold texts only."""
    parts = _as_parts(_user_content(field, content)) if content else []
    for n, part in enumerate(parts):
        if part["type"] != "text":
            raise unsupported(f"the type of {field}[{n}]")
    return parts


def _part(field: str, item: _Json) -> _Json | None:
    """One part of a message; None for an empty text."""
    match item.get("type"):
        case "text" if isinstance(item.get("text"), str):
            part = {"type": "text", "text": item["text"]} if item["text"] else None
        case "image_url":
            part = {"type": "image", "source": _image_source(field, item.get("image_url"))}
        case _:
            raise unsupported(f"the type of {field}")
    if part is not None and "cache_control" in item:
        part["cache_control"] = item["cache_control"]
    return part


def _image_source(field: str, image: Any) -> _Json:
    url = image.get("url") if isinstance(image, dict) else image
    if isinstance(url, str):
        if found := _DATA_URL.match(url):
            return {"type": "base64", "media_type": found[1], "data": url[found.end() :]}
        if url.startswith(("https://", "http://")):
            return {"type": "url", "url": url}
    raise unsupported(f"the URL of {field}")


def _assistant_content(field: str, message: _Json) -> str | list[_Json]:
    content = message.get("content")
    calls = message.get("tool_calls") or []
    if isinstance(content, str) and not calls:
        return content
    parts = _text_parts(f"{field}.content", content)
    return parts + [_tool_use(f"{field}.tool_calls[{n}]", call) for n, call in enumerate(calls)]


def _tool_use(field: str, call: _Json) -> _Json:
    function = call.get("function")
    if not isinstance(function, dict):
        raise unsupported(f"the type of {field}")
    arguments = function.get("arguments") or "{}"
    try:
        data = read_json(arguments.encode()) if isinstance(arguments, str) else arguments
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise unsupported(f"arguments that are no JSON object, as in {field}")
    return {"type": "tool_use", "id": call.get("id"), "name": function.get("name"), "input": data}


def _tool_result(field: str, message: _Json) -> _Json:
    content = _user_content(f"{field}.content", message.get("content"))
    result = {"type": "tool_result", "tool_use_id": message.get("tool_call_id")}
    return {**result, "content": content} if content else result


# -- tools -----------------------------------------------------------------------------------


def _tool(n: int, tool: _Json) -> _Json:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise unsupported(f"the type of tools[{n}]")
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    translated = {"name": function.get("name"), "input_schema": schema}
    if function.get("description"):
        translated["description"] = function["description"]
    return translated


def _tool_choice(choice: Any, parallel: bool | None) -> _Json:  # noqa: FBT001 - a field's value
    translated: _Json
    match choice:
        case None | "auto":
            translated = {"type": "auto"}
        case "none":
            translated = {"type": "none"}
        case "required":
            translated = {"type": "any"}
        case {"type": "function", "function": {"name": str() as function}}:
            translated = {"type": "tool", "name": function}
        case _:
            raise unsupported("this tool_choice")
    if parallel is False and translated["type"] != "none":
        translated["disable_parallel_tool_use"] = True
    elif choice is None:
        return {}
    return {"tool_choice": translated}


# -- the answer ------------------------------------------------------------------------------


def completion_of(call: Call, data: _Json, body: bytes) -> Completion:
    """What one request's whole answer says, however it came.

    Raises:
        ProviderError: It is no whole answer.
    """
    content = data.get("content")
    if not isinstance(content, list):
        raise bad_response("the answer has no content")
    finish_reason = name(data.get("stop_reason"))
    if finish_reason is None:
        raise truncated(usage=_usage(data.get("usage")))
    texts = [
        block["text"]
        for block in content
        if isinstance(block, dict)
        and block.get("type") == "text"
        and isinstance(block.get("text"), str)
    ]
    text = storable("".join(texts)) if texts else None
    return Completion(
        text=text,
        response=body,
        finish_reason=finish_reason,
        usage=_usage(data.get("usage"))
        or Usage(input=max(call.input_tokens[0], 0), output=estimate_tokens(text)),
        model=name(data.get("model")),
    )


def _usage(counts: Any) -> Usage | None:
    """The provider's own count, whose input tokens leave out those that a cache has to do with."""
    if not isinstance(counts, dict):
        return None
    cached = tokens(counts.get("cache_read_input_tokens"))
    written = tokens(counts.get("cache_creation_input_tokens"))
    prompt = tokens(counts.get("input_tokens")) + cached + written
    output = tokens(counts.get("output_tokens"))
    if not prompt and not output:
        return None
    return Usage(input=min(prompt, TOKENS_MAX), cached=cached, output=output)
