"""`multipart/form-data`, piece by piece: fields are kept, and a file's bytes go on as they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TypeAlias

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from promptfleet.api.errors import ApiError

FORM_TYPE = b"multipart/form-data"
MAX_FIELD_BYTES = 4_096
MAX_PARTS = 32
MAX_FORM_BYTES = MAX_PARTS * 2 * MAX_FIELD_BYTES
"""Bytes of a form beside its file's: more than all its fields, headers and boundaries may have."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileBegins:
    """A part that is a file; its bytes follow."""

    name: str
    filename: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """A part that is none, whole."""

    name: str
    value: str


FormEvent: TypeAlias = FileBegins | Field | bytes


class FormParser:
    """Cuts a form into its parts; holds no more than one field."""

    def __init__(self, boundary: bytes) -> None:
        """At the beginning.

        Args:
            boundary: What stands between the parts.
        """
        self._events: list[FormEvent] = []
        self._parts = 0
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._name = ""
        self._field: bytearray | None = None
        self.ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._part_data,
                "on_part_end": self._part_ends,
                "on_end": self._end,
            },
        )

    def feed(self, piece: bytes) -> Iterator[FormEvent]:
        """What this piece brings.

        Raises:
            ApiError: 400, it is no form.
        """
        try:
            self._parser.write(piece)
        except FormParserError:
            raise _bad_form("The body is no valid multipart form.") from None
        events, self._events = self._events, []
        yield from events

    def _part_begins(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _bad_form(f"The form has more than {MAX_PARTS} parts, the limit.")
        self._disposition = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _header_ends(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        name.clear()
        value.clear()

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        self._name = _text(options.get(b"name", b""))
        filename = options.get(b"filename")
        if filename is None:
            self._field = bytearray()
        else:
            self._field = None
            self._events.append(FileBegins(name=self._name, filename=_text(filename)))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._events.append(data[start:end])
            return
        if len(self._field) + end - start > MAX_FIELD_BYTES:
            raise _bad_form(f"A field of the form is longer than {MAX_FIELD_BYTES} bytes.")
        self._field += data[start:end]

    def _part_ends(self) -> None:
        if self._field is not None:
            self._events.append(Field(name=self._name, value=_text(bytes(self._field))))

    def _end(self) -> None:
        self.ended = True


def form_parser(request: Request) -> FormParser:
    """A parser for the request's body.

    Raises:
        ApiError: 400, it says that it is something else.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != FORM_TYPE or not boundary:
        msg = "content-type: must be multipart/form-data with a boundary"
        raise ApiError(400, msg, code="unsupported_media_type", param="content-type")
    try:
        return FormParser(boundary)
    except FormParserError:
        raise _bad_form("The form's boundary is too long.") from None


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace").replace("\0", "\ufffd")


def _bad_form(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_form")
