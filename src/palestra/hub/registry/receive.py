"""Uploads as twine and `uv publish` send them: a form in parts, of which one is the file.

Consumes: the body of a request. Produces: its fields, and the file on disk, hashed on the way.
Waits for: the next piece, at most `_SILENCE_S`; all of it, at most the deadline.
Ends when: the form ends, or is refused.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from palestra.core.errors import UserError
from palestra.hub.registry.blobs import Incoming, Received, TooLargeError

_SILENCE_S = 60.0
_PIECE = 1 << 20
_MAX_FIELD_BYTES = 4 << 20  # the description is among the fields
_MAX_FIELDS_BYTES = 8 << 20
_MAX_FIELDS = 2000
_MAX_HEADER_BYTES = 8192
FORM_BYTES = _MAX_FIELDS_BYTES  # that a form may have beside its file


class SlowError(UserError):
    """A client that did not send in time."""


@dataclass
class Form:
    """`fields` has the first value of each name; `received` the file in the part `content`."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""
    received: Received | None = None


class _Parts:
    """What the parser calls. File pieces wait in `pending` until they are written."""

    def __init__(self, incoming: Incoming):
        self._incoming, self.form = incoming, Form()
        self.pending = bytearray()
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self._name, self._content, self._is_file, self._num_bytes, self._num = "", bytearray(), False, 0, 0

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._more(self._header, data[start:end]),
            "on_header_value": lambda data, start, end: self._more(self._value, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._data,
            "on_part_end": self._end,
        }

    def _begin(self) -> None:
        self._num += 1
        if self._num > _MAX_FIELDS:
            raise UserError(f"more than {_MAX_FIELDS} fields")
        self._disposition, self._content, self._is_file = b"", bytearray(), False

    def _more(self, to: bytearray, piece: bytes) -> None:
        to += piece
        if len(to) > _MAX_HEADER_BYTES:
            raise UserError("a header of a part is too long")

    def _end_header(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        if b"filename" in options and self._name == "content":
            if self.form.filename:
                raise UserError("more than one file; send one in each request")
            self._is_file, self.form.filename = True, options[b"filename"].decode(errors="replace")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.pending += data[start:end]
            return
        self._content += data[start:end]
        self._num_bytes += end - start
        if len(self._content) > _MAX_FIELD_BYTES or self._num_bytes > _MAX_FIELDS_BYTES:
            raise TooLargeError(f"field {self._name[:60]!r} is too long")

    def _end(self) -> None:
        if not self._is_file:
            self.form.fields.setdefault(self._name, self._content.decode(errors="replace"))

    def write_pending(self) -> None:
        self._incoming.write(bytes(self.pending))
        self.pending.clear()


async def form(request: Request, incoming: Incoming, *, deadline_s: float) -> Form:
    """Errors: UserError for a form that is none, TooLargeError, SlowError."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise UserError("this address takes what twine and `uv publish` send: multipart/form-data")
    parts = _Parts(incoming)
    try:
        async with asyncio.timeout(deadline_s):
            await _read(request, MultipartParser(options[b"boundary"], parts.callbacks()), parts)
    except TimeoutError:
        raise SlowError(f"nothing came for {_SILENCE_S:g} s, or not all within {deadline_s:g} s") from None
    except FormParserError as error:
        raise UserError(f"this is no form: {error}") from None
    except ClientDisconnect:
        raise SlowError("the client went away") from None
    parts.form.received = incoming.received()
    return parts.form


async def _read(request: Request, parser: MultipartParser, parts: _Parts) -> None:
    stream = request.stream()
    while True:
        try:
            piece = await asyncio.wait_for(anext(stream), timeout=_SILENCE_S)
        except StopAsyncIteration:
            break
        parser.write(piece)
        if len(parts.pending) >= _PIECE:
            await asyncio.to_thread(parts.write_pending)
    parser.finalize()
    await asyncio.to_thread(parts.write_pending)
