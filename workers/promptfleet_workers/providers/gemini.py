"""Google's Gemini API, asked and answering in OpenAI's words: stored requests know one shape only.

Source of the shapes: https://ai.google.dev/api/generate-content and /api/embeddings, as the
official client `google-genai` writes and reads them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Deployment
from promptfleet_shared.jobs import JobKind
from promptfleet_workers.providers.gemini_answers import chat_completion, embeddings
from promptfleet_workers.providers.gemini_stream import ResponseAssembly
from promptfleet_workers.providers.http import Endpoint, HttpClient
from promptfleet_workers.providers.protocol import Answer, Call
from promptfleet_workers.providers.responses import read_answer, read_json, write_json
from promptfleet_workers.providers.streams import read_streamed

_Json = dict[str, Any]
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+);base64,", re.ASCII)
# Files that the API can reach by itself: its own, and those of Google's cloud storage.
_OWN_FILES = ("https://generativelanguage.googleapis.com/", "gs://")
# Fields that only change their name.
_RENAMED = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "seed": "seed",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
    "n": "candidateCount",
}
# What can be left out because it changes nothing in the answer; `None` counts as left out anyway.
_HARMLESS: dict[str, Callable[[Any], bool]] = {
    "metadata": lambda _: True,
    "user": lambda _: True,
    "store": lambda value: value is False,
    "stream": lambda value: value is False,
    "logprobs": lambda value: value is False,
    "parallel_tool_calls": lambda value: value is True,
}
_TRANSLATED = frozenset(
    {
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "stop",
        "tools",
        "tool_choice",
        "response_format",
        "reasoning_effort",
    }
)
_EMBEDDED = frozenset({"input", "dimensions", "encoding_format", "user"})
# As Google's own compatible endpoint translates them for the models that think by budgets; later
# models have levels. Source: https://ai.google.dev/gemini-api/docs/openai#thinking.
_BUDGETS = {"none": 0, "minimal": 1024, "low": 1024, "medium": 8192, "high": 24_576}
_LEVELS = {"none": "MINIMAL"} | {
    effort: effort.upper() for effort in ("minimal", "low", "medium", "high")
}


class GeminiProvider:
    """A deployment that speaks Gemini's own protocol."""

    def __init__(self, deployment: Deployment, client: HttpClient) -> None:
        """Prepare the headers of `deployment`; `client` stays its owner's to close."""
        self._client = client
        self._headers = {key.lower(): value for key, value in deployment.headers.items()}
        secret = (deployment.secret() or "").strip()
        if secret:
            self._headers.setdefault("x-goog-api-key", secret)
        self._base, _, self._query = deployment.base_url.partition("?")
        self._endpoints: dict[tuple[str, str], Endpoint] = {}

    async def call(self, call: Call) -> list[Answer]:
        """Send a chat request, or texts to embed; an answer for each of `call.requests`.

        Raises:
            ProviderError: The call failed; `unsupported` if the API has no counterpart of a field,
                which the message names; `content_filter` if it blocked the prompt.
        """
        if call.kind is JobKind.EMBEDDING:
            return await self._embed(call)
        if call.kind is not JobKind.CHAT:
            raise unsupported(f"kind {call.kind.value}")
        (request,) = call.requests
        body = write_json(translate(read_json(request.encode()), call.model))
        if call.stream:
            assembly = ResponseAssembly(on_text=call.on_text, received=call.received)
            endpoint = self._endpoint(call.model, "streamGenerateContent")
            data, _ = await read_streamed(
                self._client, endpoint, body, call.timeouts, assembly, on_headers=call.on_headers
            )
        else:
            endpoint = self._endpoint(call.model, "generateContent")
            response = await self._client.post(
                endpoint, body, call.timeouts, on_headers=call.on_headers
            )
            data = read_answer(response)
        return [chat_completion(call, data, now=time.time())]

    async def _embed(self, call: Call) -> list[Answer]:
        requests = [read_json(request.encode()) for request in call.requests]
        asked = [embed_requests(request, _path(call.model)) for request in requests]
        body = write_json({"requests": [one for many in asked for one in many]})
        endpoint = self._endpoint(call.model, "batchEmbedContents")
        response = await self._client.post(
            endpoint, body, call.timeouts, on_headers=call.on_headers
        )
        data = read_answer(response)
        as_base64 = [request.get("encoding_format") == "base64" for request in requests]
        return list(embeddings(call, data, [len(many) for many in asked], as_base64))

    def _endpoint(self, model: str, method: str) -> Endpoint:
        """The endpoint of a model, prepared once."""
        known = self._endpoints.get((model, method))
        if known is None:
            query = [self._query] if self._query else []
            if method == "streamGenerateContent":
                query.append("alt=sse")
            url = f"{self._base.rstrip('/')}/{quote(_path(model), safe='/-_.~')}:{method}"
            url += f"?{'&'.join(query)}" if query else ""
            known = self._endpoints[model, method] = Endpoint(url, self._headers)
        return known

    async def aclose(self) -> None:
        """Nothing to give back: the client belongs to whoever made it."""


def _path(model: str) -> str:
    """`models/NAME`; a name with a slash, such as that of a tuned model, is a path already."""
    return model if "/" in model else f"models/{model}"


def unsupported(field: str) -> ProviderError:
    """The refusal of what the API has no counterpart of."""
    message = f"Gemini's API has no counterpart of {field}"
    return ProviderError(message, code="unsupported")


def translate(request: _Json, model: str) -> _Json:
    """The body of the `generateContent` request that asks for the same.

    Args:
        request: OpenAI's chat request without its model.
        model: Models differ in how they are told how much to think.

    Raises:
        ProviderError: `unsupported`, naming the field.

    Example:
        >>> translate({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}, "gemini")
        {'contents': [{'role': 'user', 'parts': [{'text': 'Hi'}]}], 'generationConfig': {'maxOutputTokens': 9}}
    """  # noqa: E501 - the example's output is one line
    given = {field: value for field, value in request.items() if value is not None}
    for field, value in given.items():
        if field not in _TRANSLATED and field not in _RENAMED:
            is_harmless = _HARMLESS.get(field)
            if is_harmless is None or not is_harmless(value):
                raise unsupported(f"the field {field}" if field.isidentifier() else "a field")
    body: _Json = _conversation(given["messages"])
    if given.get("tools"):
        declared = [_declaration(n, tool) for n, tool in enumerate(given["tools"])]
        body["tools"] = [{"functionDeclarations": declared}]
        body |= _tool_config(given.get("tool_choice"))
    if config := _generation_config(given, model):
        body["generationConfig"] = config
    return body


def embed_requests(request: _Json, path: str) -> list[_Json]:
    """The items of a `batchEmbedContents` request for one embeddings request.

    Raises:
        ProviderError: `unsupported`: the input is made of token ids, or a field has no counterpart.
    """
    for field, value in request.items():
        if field not in _EMBEDDED and value is not None:
            raise unsupported(f"the field {field}" if field.isidentifier() else "a field")
    given = request.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise unsupported("an input that is no text")
    dimensions = request.get("dimensions")
    size = {} if dimensions is None else {"outputDimensionality": dimensions}
    return [{"model": path, "content": {"parts": [{"text": text}]}, **size} for text in texts]


# -- how to answer ---------------------------------------------------------------------------


def _generation_config(given: _Json, model: str) -> _Json:
    config: _Json = {ours: given[field] for field, ours in _RENAMED.items() if field in given}
    limit = given.get("max_completion_tokens", given.get("max_tokens"))
    if limit is not None:
        config["maxOutputTokens"] = limit
    if "stop" in given:
        stop = given["stop"]
        config["stopSequences"] = [stop] if isinstance(stop, str) else stop
    if "response_format" in given:
        config |= _response_format(given["response_format"])
    if "reasoning_effort" in given:
        config["thinkingConfig"] = _thinking(given["reasoning_effort"], model)
    return config


def _response_format(form: Any) -> _Json:
    match form:
        case {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"responseMimeType": "application/json"}
        case {"type": "json_schema", "json_schema": {"schema": dict() as schema}}:
            return {"responseMimeType": "application/json", "responseJsonSchema": schema}
        case _:
            raise unsupported("this response_format")


def _thinking(effort: Any, model: str) -> _Json:
    if not isinstance(effort, str) or effort not in _BUDGETS:
        raise unsupported("this reasoning_effort")
    if "gemini-2" in model:
        return {"thinkingBudget": _BUDGETS[effort]}
    return {"thinkingLevel": _LEVELS[effort]}


# -- messages --------------------------------------------------------------------------------


def _conversation(messages: list[_Json]) -> _Json:
    """`contents`, and `systemInstruction` where there is any."""
    system: list[_Json] = []
    contents: list[_Json] = []
    names: dict[str, str] = {}  # of the functions that were called, by the calls' ids
    for n, message in enumerate(messages):
        field = f"messages[{n}]"
        role = message.get("role")
        if role in {"system", "developer"}:
            system += _text_parts(f"{field}.content", message.get("content"))
        elif role == "user":
            _add(contents, "user", _parts(f"{field}.content", message.get("content")))
        elif role == "assistant":
            _add(contents, "model", _model_parts(field, message, names))
        elif role == "tool":
            _add(contents, "user", [_function_response(field, message, names)])
        else:
            raise unsupported(f"the role of {field}")
    body: _Json = {"contents": contents}
    if system:
        body["systemInstruction"] = {"role": "user", "parts": system}
    return body


def _add(contents: list[_Json], role: str, parts: list[_Json]) -> None:
    """Append a turn, or go on with the last one: there, roles take turns."""
    if not parts:
        return
    if contents and contents[-1]["role"] == role:
        contents[-1]["parts"] += parts
    else:
        contents.append({"role": role, "parts": parts})


def _parts(field: str, content: Any) -> list[_Json]:
    if isinstance(content, str):
        return [{"text": content}] if content else []
    return [
        part
        for n, item in enumerate(content or [])
        if (part := _part(f"{field}[{n}]", item)) is not None
    ]


def _text_parts(field: str, content: Any) -> list[_Json]:
    """Content that may hold texts only."""
    parts = _parts(field, content)
    for n, part in enumerate(parts):
        if "text" not in part:
            raise unsupported(f"the type of {field}[{n}]")
    return parts


def _part(field: str, item: _Json) -> _Json | None:
    """One part of a message; None for an empty text."""
    match item:
        case {"type": "text", "text": str() as text}:
            return {"text": text} if text else None
        case {"type": "image_url", "image_url": {"url": str() as url} | (str() as url)}:
            return _file(field, url)
        case {
            "type": "input_audio",
            "input_audio": {"data": str() as data, "format": str() as form},
        }:
            return {"inlineData": {"mimeType": f"audio/{form}", "data": data}}
        case {"type": "file", "file": {"file_data": str() as url}}:
            return _file(field, url)
        case _:
            raise unsupported(f"the type of {field}")


def _file(field: str, url: str) -> _Json:
    if found := _DATA_URL.match(url):
        return {"inlineData": {"mimeType": found[1], "data": url[found.end() :]}}
    if url.startswith(_OWN_FILES):
        return {"fileData": {"fileUri": url}}
    raise unsupported(f"the URL of {field}")


def _model_parts(field: str, message: _Json, names: dict[str, str]) -> list[_Json]:
    parts = _text_parts(f"{field}.content", message.get("content"))
    for n, call in enumerate(message.get("tool_calls") or []):
        parts.append(_function_call(f"{field}.tool_calls[{n}]", call, names))
    return parts


def _function_call(field: str, call: _Json, names: dict[str, str]) -> _Json:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise unsupported(f"the type of {field}")
    arguments = function.get("arguments") or "{}"
    try:
        data = read_json(arguments.encode()) if isinstance(arguments, str) else arguments
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise unsupported(f"arguments that are no JSON object, as in {field}")
    part: _Json = {"functionCall": {"name": function["name"], "args": data}}
    if isinstance(call.get("id"), str):
        part["functionCall"]["id"] = call["id"]
        names[call["id"]] = function["name"]
    match call:  # models that think want their own thoughts back; see gemini_answers
        case {"extra_content": {"google": {"thought_signature": str() as signature}}}:
            part["thoughtSignature"] = signature
    return part


def _function_response(field: str, message: _Json, names: Mapping[str, str]) -> _Json:
    call_id = message.get("tool_call_id")
    name = names.get(call_id) if isinstance(call_id, str) else None
    name = name or message.get("name")
    if not isinstance(name, str):
        raise unsupported(f"the answer to a call that is not there, {field}")
    texts = _text_parts(f"{field}.content", message.get("content"))
    text = "".join(part["text"] for part in texts)
    try:
        said = read_json(text.encode("utf-8", "replace"))
    except ValueError:
        said = text
    response: _Json = {
        "name": name,
        "response": said if isinstance(said, dict) else {"output": said},
    }
    if isinstance(call_id, str):
        response["id"] = call_id
    return {"functionResponse": response}


# -- tools -----------------------------------------------------------------------------------


def _declaration(n: int, tool: _Json) -> _Json:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise unsupported(f"the type of tools[{n}]")
    declared = {"name": function.get("name")}
    if function.get("description"):
        declared["description"] = function["description"]
    if function.get("parameters"):
        declared["parametersJsonSchema"] = function["parameters"]
    return declared


def _tool_config(choice: Any) -> _Json:
    config: _Json
    match choice:
        case None:
            return {}
        case "auto":
            config = {"mode": "AUTO"}
        case "none":
            config = {"mode": "NONE"}
        case "required":
            config = {"mode": "ANY"}
        case {"type": "function", "function": {"name": str() as function}}:
            config = {"mode": "ANY", "allowedFunctionNames": [function]}
        case _:
            raise unsupported("this tool_choice")
    return {"toolConfig": {"functionCallingConfig": config}}
