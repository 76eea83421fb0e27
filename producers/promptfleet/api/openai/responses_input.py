"""A request to `/v1/responses` in the words of a chat, which every provider understands.

Texts, images and files go in, calls of functions too; what only OpenAI's own servers could do
(their tools, their memory of earlier responses) is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import orjson

from promptfleet.api.errors import ApiError
from promptfleet.options import refuse

Json = dict[str, Any]

_RENAMED = {"max_output_tokens": "max_completion_tokens"}
# Of no meaning where every response is kept, and goes on whether somebody waits for it or not.
_DROPPED = frozenset({"background", "input", "instructions", "reasoning", "store", "text"})
_REFUSED = ("conversation", "max_tool_calls", "previous_response_id", "prompt")
_HARMLESS_INCLUDES = frozenset({"reasoning.encrypted_content"})
_ROLES = frozenset({"assistant", "developer", "system", "user"})
_TEXTS = frozenset({"input_text", "output_text", "text"})


def chat_body(body: Mapping[str, Any]) -> Json:
    """The body of the chat request that asks for the same.

    Raises:
        InvalidRequestError: `field` names what is wrong.
        ApiError: 400, it asks for what a chat can't do.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name in _REFUSED:
        if given.get(name) not in (None, "", {}):
            _unsupported(name, "the fleet keeps no conversations: send all that was said as input")
    if given.pop("truncation", "disabled") != "disabled":
        _unsupported("truncation", 'only "disabled"')
    includes = given.pop("include", None) or []
    if not isinstance(includes, list) or any(i not in _HARMLESS_INCLUDES for i in includes):
        _unsupported("include", f"only {', '.join(_HARMLESS_INCLUDES)}")
    chat: Json = {
        _RENAMED.get(name, name): value for name, value in given.items() if name not in _DROPPED
    }
    chat["messages"] = _messages(given.get("instructions"), given.get("input"))
    chat |= _text_options(given.get("text"))
    if isinstance(reasoning := given.get("reasoning"), Mapping) and reasoning.get("effort"):
        chat["reasoning_effort"] = reasoning["effort"]
    if given.get("tools"):
        chat["tools"] = _tools(given["tools"])
        if "tool_choice" in given:
            chat["tool_choice"] = _tool_choice(given["tool_choice"])
    else:
        for name in ("tools", "tool_choice", "parallel_tool_calls"):
            chat.pop(name, None)
    return chat


def _unsupported(field: str, why: str) -> NoReturn:
    raise ApiError(400, f"{field}: is not supported here; {why}", code="unsupported", param=field)


# -- messages --------------------------------------------------------------------------------


def _messages(instructions: Any, given: Any) -> list[Json]:
    messages: list[Json] = []
    if instructions is not None:
        if not isinstance(instructions, str):
            refuse("instructions", "a text", instructions)
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str) and given:
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        refuse("input", "a text that is not empty, or a list of items", given)
    for n, item in enumerate(given):
        if not isinstance(item, Mapping):
            refuse(f"input[{n}]", "an object", item)
        _add(messages, item, f"input[{n}]")
    return messages


def _add(messages: list[Json], item: Mapping[str, Any], field: str) -> None:
    match item.get("type", "message"):
        case "message":
            role = item.get("role")
            if role not in _ROLES:
                refuse(f"{field}.role", "one of " + ", ".join(sorted(_ROLES)), role)
            messages.append({"role": role, "content": _content(item.get("content"), field)})
        case "function_call":
            call = {
                "id": item.get("call_id"),
                "type": "function",
                "function": {"name": item.get("name"), "arguments": item.get("arguments")},
            }
            if messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        case "function_call_output":
            content = _content(item.get("output"), field)
            tool = {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
            messages.append(tool)
        case "reasoning":
            pass  # of an earlier answer; a chat has no place for it
        case _:
            _unsupported(f"{field}.type", "messages and calls of functions are")


def _content(content: Any, field: str) -> str | list[Json]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        refuse(f"{field}.content", "a text or a list of parts", content)
    parts = [_part(part, f"{field}.content[{n}]") for n, part in enumerate(content)]
    if len(parts) == 1 and parts[0].get("type") == "text":
        return str(parts[0]["text"])  # what servers that know texts only understand
    return parts


def _part(part: Any, field: str) -> Json:
    if not isinstance(part, Mapping):
        refuse(field, "an object", part)
    kind = part.get("type")
    if kind in _TEXTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        image = {"url": part["image_url"]}
        if part.get("detail"):
            image["detail"] = part["detail"]
        return {"type": "image_url", "image_url": image}
    if kind == "input_file":
        names = ("file_data", "file_id", "filename")
        return {"type": "file", "file": {n: part[n] for n in names if part.get(n)}}
    if kind == "refusal":
        return {"type": "refusal", "refusal": part.get("refusal")}
    _unsupported(f"{field}.type", "texts, images by their URL and files are")


# -- options ---------------------------------------------------------------------------------


def _text_options(text: Any) -> Json:
    if text is None:
        return {}
    if not isinstance(text, Mapping):
        refuse("text", "an object", text)
    options: Json = {}
    form = text.get("format")
    if isinstance(form, Mapping) and form.get("type") == "json_schema":
        schema = {name: value for name, value in form.items() if name != "type"}
        options["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif isinstance(form, Mapping) and form.get("type") != "text":
        options["response_format"] = dict(form)
    if text.get("verbosity"):
        options["verbosity"] = text["verbosity"]
    return options


def _tools(tools: Any) -> list[Json]:
    if not isinstance(tools, list):
        refuse("tools", "a list", tools)
    translated = []
    for n, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            _unsupported(f"tools[{n}].type", "only functions of your own are")
        function = {name: value for name, value in tool.items() if name != "type"}
        translated.append({"type": "function", "function": function})
    return translated


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


# -- back again ------------------------------------------------------------------------------


def told_options(request: Mapping[str, Any]) -> Json:
    """What a response tells of its request, from the chat request that was stored for it."""
    messages = request.get("messages")
    first = messages[0] if isinstance(messages, list) and messages else {}
    is_system = isinstance(first, Mapping) and first.get("role") == "system"
    tools = [
        {"type": "function", **tool["function"]}
        for tool in request.get("tools") or ()
        if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping)
    ]
    choice = request.get("tool_choice", "auto")
    if isinstance(choice, Mapping) and isinstance(choice.get("function"), Mapping):
        choice = {"type": "function", "name": choice["function"].get("name")}
    effort = request.get("reasoning_effort")
    return {
        "instructions": first.get("content") if is_system else None,
        "max_output_tokens": request.get("max_completion_tokens"),
        "parallel_tool_calls": request.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "reasoning": {"effort": effort, "summary": None},
        "temperature": request.get("temperature"),
        "text": {"format": _told_format(request.get("response_format"))},
        "tool_choice": choice,
        "tools": tools,
        "top_p": request.get("top_p"),
        "truncation": "disabled",
        "user": request.get("user"),
    }


def _told_format(form: Any) -> Json:
    if not isinstance(form, Mapping):
        return {"type": "text"}
    if isinstance(form.get("json_schema"), Mapping):
        return {"type": "json_schema", **form["json_schema"]}
    return dict(form)


def stored_request(request: bytes) -> Json:
    """A request as the database will give it back."""
    decoded: Json = orjson.loads(request)
    return decoded
