"""One file on its way from a form into the database; at most a chunk of it is in memory."""

from __future__ import annotations

import re

from starlette.requests import Request

from promptfleet.api.bodies import BodyReader
from promptfleet.api.errors import ApiError, limited, too_large
from promptfleet.api.file_writer import FileWriter
from promptfleet.api.forms import (
    MAX_FORM_BYTES,
    Field,
    FileBegins,
    FormEvent,
    FormParser,
    form_parser,
)
from promptfleet.api.services import Services
from promptfleet_shared.store.files import StoredFile, stored_bytes

PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
SHORTEST_TTL_S, LONGEST_TTL_S = 3_600, 2_592_000
_DAY_S = 86_400.0
_MAX_NAME = 255
_DIGITS = re.compile(r"[0-9]{1,9}")
_MEGABYTE = 1_000_000


class FileUpload:
    """An upload: reads the form, writes the file, and leaves nothing behind where that fails."""

    def __init__(self, services: Services, tenant: str, request: Request) -> None:
        """Read nothing yet."""
        self._services = services
        self._tenant = tenant
        self._request = request
        self._most = services.settings.api_max_file_bytes
        self._writer = FileWriter(services.stores, tenant)
        self._filename: str | None = None
        self._is_file = False
        self._fields: dict[str, str] = {}
        self._pieces: list[bytes] = []
        self._size = 0

    async def run(self) -> StoredFile:
        """The file, once it is whole and committed.

        Raises:
            ApiError: 400, the form is wrong. 408, it paused for too long. 413, the file is too
                large. 429, the tenant has no room for it.
            ClientDisconnect: The client left.
            StoreUnavailableError: It can't be kept now.
        """
        self._check_length()
        form = form_parser(self._request)
        await self._check_room()
        reader = BodyReader(self._request.receive)
        try:
            await self._read(reader, form)
            return await self._finish()
        except BaseException:
            await self._writer.abandon()
            raise
        finally:
            await reader.close()

    def _check_length(self) -> None:
        """Refuse what is too large before any of it is read."""
        text = self._request.headers.get("content-length", "")
        if text.isascii() and text.isdigit() and int(text[:18]) > self._most + MAX_FORM_BYTES:
            raise self._too_large()

    async def _check_room(self) -> None:
        most = self._services.settings.api_max_stored_bytes_per_tenant
        if not most:
            return
        tenant = self._tenant
        stored = await self._services.stores.run(tenant, lambda c: stored_bytes(c, tenant=tenant))
        if stored >= most:
            msg = f"Your files have {stored} bytes; {most} is the limit. Delete some of them."
            raise limited(msg, code="storage_full", retry_after_s=60)

    async def _read(self, reader: BodyReader, form: FormParser) -> None:
        while piece := await reader.read():
            for event in form.feed(piece):
                self._take(event)
            pieces, self._pieces = self._pieces, []
            for data in pieces:
                await self._writer.write(data)
        if not form.ended:
            raise ApiError(400, "The form is not whole: the body ended too early.", code="bad_form")

    def _take(self, event: FormEvent) -> None:
        match event:
            case bytes():
                if self._is_file:
                    self._size += len(event)
                    if self._size > self._most:
                        raise self._too_large()
                    self._pieces.append(event)
            case FileBegins(name="file"):
                if self._filename is not None:
                    raise _bad("file", "There is more than one file in the form.")
                self._filename = event.filename[:_MAX_NAME] or "upload"
                self._is_file = True
            case FileBegins():
                self._is_file = False
            case Field():
                self._is_file = False
                self._fields[event.name] = event.value
                if event.name == "purpose":
                    _check_purpose(event.value)  # early, where it stands before the file

    async def _finish(self) -> StoredFile:
        filename = self._filename
        if filename is None:
            raise _bad("file", "Missing required parameter: 'file'.", "missing_required_parameter")
        if "purpose" not in self._fields:
            message = "Missing required parameter: 'purpose'."
            raise _bad("purpose", message, "missing_required_parameter")
        purpose, ttl_s = self._fields["purpose"], self._ttl_s()
        await self._writer.write(b"")  # an empty file is one, too
        await self._writer.flush()
        tenant = self._tenant
        return await self._services.stores.run(
            tenant,
            lambda c: self._writer.finish(c, purpose=purpose, filename=filename, ttl_s=ttl_s),
        )

    def _ttl_s(self) -> float | None:
        anchor = self._fields.get("expires_after[anchor]")
        seconds = self._fields.get("expires_after[seconds]")
        if anchor is None and seconds is None:
            days = self._services.settings.api_file_days
            return days * _DAY_S if days and self._fields["purpose"] == "batch" else None
        if anchor != "created_at":
            raise _bad("expires_after.anchor", "expires_after.anchor: must be 'created_at'.")
        return float(check_ttl(seconds, "expires_after.seconds"))

    def _too_large(self) -> ApiError:
        megabytes = f"{self._most / _MEGABYTE:g}"
        msg = f"The file is larger than {self._most} bytes ({megabytes} MB), the limit."
        return too_large(msg, code="file_too_large")


def check_ttl(value: object, param: str) -> int:
    """Seconds until a file expires.

    Raises:
        ApiError: 400; they are none that OpenAI takes.
    """
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        value = int(value)
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or not SHORTEST_TTL_S <= value <= LONGEST_TTL_S
    ):
        raise _bad(param, f"{param}: must be from {SHORTEST_TTL_S} to {LONGEST_TTL_S}.")
    return value


def _check_purpose(purpose: str) -> None:
    if purpose not in PURPOSES:
        accepted = ", ".join(f"'{name}'" for name in PURPOSES)
        raise _bad("purpose", f"purpose: must be one of {accepted}.", "invalid_value")


def _bad(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)
