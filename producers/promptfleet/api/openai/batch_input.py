"""A batch's input: its lines, read from the file's chunks, and what each of them asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from promptfleet.api.bodies import parse_json
from promptfleet.api.errors import ApiError
from promptfleet_shared.errors import InvalidRequestError
from promptfleet_shared.jobs import JobSpec

MAX_LINES = 50_000
MAX_CUSTOM_ID = 512
_SPACE = b" \t\r\n"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InputLine:
    """A line that is not empty.

    Attributes:
        n: Its place among those, from 0.
        number: Its place in the file, from 1, as editors count.
        text: None for one that is too long.
    """

    n: int
    number: int
    text: bytes | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LineRequest:
    """What a line asks for.

    Attributes:
        custom_id: The client's own name for it.
        spec: Its job.
        model: As the line names it.
    """

    custom_id: str
    spec: JobSpec
    model: str | None


class LineError(Exception):
    """A line that can't be taken, as OpenAI's `errors.data` tells it."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        """Name what is wrong; the message holds nothing of a prompt."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


SpecOf = Callable[[str, Mapping[str, Any]], JobSpec]
"""The job that an endpoint's request asks for; raises what the endpoint itself would answer."""


async def input_lines(
    chunks: AsyncIterator[bytes], *, max_bytes: int, first: int = 0
) -> AsyncIterator[list[InputLine]]:
    """The file's lines from the `first` one on, as many at a time as a chunk brings.

    Args:
        chunks: The file's content.
        max_bytes: Bytes that a line may have.
        first: The first line that is wanted.
    """
    n = number = 0
    rest = bytearray()
    skipping = False
    async for chunk in chunks:
        found = []
        start = 0
        while (stop := chunk.find(b"\n", start)) >= 0:
            number += 1
            skipping = skipping or len(rest) + stop - start > max_bytes
            text = None if skipping else bytes((rest + chunk[start:stop]).strip(_SPACE))
            if text is None or text:
                if n >= first:
                    found.append(InputLine(n=n, number=number, text=text))
                n += 1
            rest.clear()
            skipping = False
            start = stop + 1
        skipping = skipping or len(rest) + len(chunk) - start > max_bytes
        if skipping:
            rest.clear()
        else:
            rest += chunk[start:]
        if found:
            yield found
    text = None if skipping else bytes(rest.strip(_SPACE))
    if (text is None or text) and n >= first:
        yield [InputLine(n=n, number=number + 1, text=text)]


def read_line(line: InputLine, *, endpoint: str, spec_of: SpecOf, max_bytes: int) -> LineRequest:
    """What the line asks for.

    Args:
        line: Of the file.
        endpoint: That of the batch.
        spec_of: Knows the endpoints.
        max_bytes: Bytes that a line may have; for the error's message.

    Raises:
        LineError: It can't be taken.
    """
    if line.text is None:
        msg = f"The line is longer than {max_bytes} bytes, the limit."
        raise LineError("line_too_long", msg)
    request = _object(line.text)
    custom_id = _custom_id(request)
    if _required(request, "method") != "POST":
        raise LineError("invalid_method", "method: must be 'POST'.", "method")
    if _required(request, "url") != endpoint:
        msg = f"url: must be the endpoint of the batch, '{endpoint}'."
        raise LineError("url_mismatch", msg, "url")
    body = _required(request, "body")
    if not isinstance(body, Mapping):
        raise LineError("invalid_type", "body: must be an object.", "body")
    if body.get("stream"):
        raise LineError("unsupported_value", "stream: a batch has no streams.", "body.stream")
    try:
        spec = spec_of(endpoint, body)
    except InvalidRequestError as error:
        param = f"body.{error.field}" if error.field else "body"
        raise LineError("invalid_request", error.message, param) from None
    except ApiError as error:
        param = f"body.{error.param}" if error.param else "body"
        raise LineError(error.error_code or "invalid_request", error.message, param) from None
    model = body.get("model")
    return LineRequest(
        custom_id=custom_id, spec=spec, model=model if isinstance(model, str) else None
    )


def _object(text: bytes) -> Mapping[str, Any]:
    try:
        request = parse_json(text, what="The line")
    except InvalidRequestError:
        msg = "This line is not parseable as valid JSON."
        raise LineError("invalid_json_line", msg) from None
    except ApiError as error:
        raise LineError(error.error_code or "invalid_json_line", error.message) from None
    if not isinstance(request, Mapping):
        raise LineError("invalid_json_line", "This line is no JSON object.")
    return request


def _custom_id(request: Mapping[str, Any]) -> str:
    custom_id = _required(request, "custom_id")
    if (
        not isinstance(custom_id, str)
        or not 0 < len(custom_id) <= MAX_CUSTOM_ID
        or "\0" in custom_id
    ):
        msg = f"custom_id: must be a string of 1 to {MAX_CUSTOM_ID} characters without NUL."
        raise LineError("invalid_custom_id", msg, "custom_id")
    return custom_id


def _required(request: Mapping[str, Any], name: str) -> Any:
    value = request.get(name)
    if value is None:
        msg = f"Missing required parameter: '{name}'."
        raise LineError("missing_required_parameter", msg, name)
    return value
