"""From the bytes of one datagram to one typed message, or one `MessageError`.

The wire format is one JSON object a datagram (UTF-8), as pysmurf's ``Publisher`` and the smurf-streamer
send it. Pure: knows no socket, reactor, clock or OCS. Whatever arrives, `parse` returns a message or raises
`MessageError`; nothing else comes out.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, TypeAlias

from pydantic import ConfigDict, StrictStr, TypeAdapter, ValidationError
from pydantic_core import from_json
from typing_extensions import TypedDict

JSON = dict[str, Any]

FILE_TYPES = frozenset({"data_file", "g3_file"})
SESSION_TYPES = frozenset({"session_data", "session_log"})
TYPES = FILE_TYPES | SESSION_TYPES | {"metadata", "start", "stop", "log", "backend_error", "general"}


class MessageError(Exception):
    """The datagram is no message of the wire format.

    Attributes:
        reason: What is wrong, out of a small fixed vocabulary, fit for counting.
        detail: The same with the particulars, for a person.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class DataFile(NamedTuple):
    """A ``data_file`` message: pysmurf wrote an ancillary file.

    `meta` is the payload with the publisher's id added as ``pub_id``, as it goes to ``file_queue``. `text` is what goes
    into the spool: a datagram that has the same `meta`.
    """

    envelope: JSON
    meta: JSON
    text: str


class G3File(NamedTuple):
    """A ``g3_file`` message: the streamer closed a timestream file. `meta` and `text` as in `DataFile`."""

    envelope: JSON
    meta: JSON
    text: str


class SessionMessage(NamedTuple):
    """A ``session_data`` or ``session_log`` message; the envelope goes to the feed unmodified."""

    envelope: JSON


class Metadata(NamedTuple):
    """A ``metadata`` message: one register's value. `time` is unix seconds at sending."""

    envelope: JSON
    stream_id: str
    path: str
    value: object
    time: float


class Ignored(NamedTuple):
    """A message that asks for nothing (``start``, ``stop``, ``log``, ``general`` and types yet unknown)."""

    envelope: JSON


Message: TypeAlias = DataFile | G3File | SessionMessage | Metadata | Ignored

# Fields beyond these are kept as they came: what a newer publisher adds is not ours to drop.
_AS_IT_CAME = ConfigDict(extra="allow")


class _Envelope(TypedDict):
    __pydantic_config__ = _AS_IT_CAME  # type: ignore[misc]
    id: StrictStr
    type: StrictStr
    payload: Any


class _MetadataPayload(TypedDict):
    __pydantic_config__ = _AS_IT_CAME  # type: ignore[misc]
    path: StrictStr
    value: Any


# What is kept of a registration: fields, and characters of a string. pysmurf sends nine fields, the longest a path.
MAX_FIELDS = 32
MAX_STRING = 1024

# The fields that make a row. One that is a list or an object stays, empty, so that the registration is refused for it.
_OF_ROW = ("path", "archive_name", "format", "timestamp", "action", "action_ts", "plot")

# Bytes of a datagram that is stored as it came; a longer one is reduced first.
_SHORT = 2048

_validate_envelope = TypeAdapter(_Envelope).validator.validate_python
_validate_metadata = TypeAdapter(_MetadataPayload).validator.validate_python

_BYTE_ORDER_MARK = "\ufeff"


def parse(datagram: bytes | str) -> Message:
    """Parse one datagram.

    Args:
        datagram: What arrived: UTF-8 JSON of one object with at least ``id``, ``type`` and ``payload``. The messages
            that register a file only need ``type`` and the payload's ``path``: whether the rest is fit for the archive
            is found out later, and what is not becomes a dead letter.

    Returns:
        The message, by its ``type``. Types that are not known are `Ignored`, since a newer publisher may
        send them.

    Raises:
        MessageError: For anything that is not such a message.
    """
    if not datagram:
        raise MessageError("empty")
    text = None
    try:
        envelope = from_json(datagram)
        text = datagram if isinstance(datagram, str) else datagram.decode()
    except (ValueError, TypeError):  # the latter for text that is no Unicode
        envelope = _leniently(datagram)
    kind = envelope.get("type") if isinstance(envelope, dict) else None
    if isinstance(kind, str) and kind in FILE_TYPES:
        return _file(envelope, kind, text)
    try:
        _validate_envelope(envelope)
        if kind in SESSION_TYPES:
            return _session(envelope, kind)
        if kind == "metadata":
            return _metadata(envelope)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise MessageError("wrong or missing field", f"{_where(first['loc'])}: {first['msg']}") from None
    return Ignored(envelope)


def _leniently(datagram: bytes | str) -> Any:
    """Read JSON as Python's own parser does: with a byte order mark, lone surrogates, and nested more deeply."""
    try:
        text = datagram if isinstance(datagram, str) else datagram.decode(errors="surrogatepass")
        return json.loads(text.removeprefix(_BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as error:
        raise MessageError("not JSON", str(error)) from None


def parse_file(datagram: bytes | str) -> DataFile | G3File:
    """Parse a datagram that registers a file; raises `MessageError` for any other."""
    message = parse(datagram)
    if not isinstance(message, (DataFile, G3File)):
        raise MessageError("no registration", str(message.envelope["type"])[:40])
    return message


def encode_file(meta: JSON) -> str:
    """Return a datagram that brings `meta` (a payload with ``pub_id``), as JSON text.

    Raises:
        MessageError: If there is none.
    """
    if not isinstance(meta, dict):
        raise MessageError("no registration", f"{type(meta).__name__} instead of a dict")
    kind = "g3_file" if meta.get("archive_name") == "timestreams" else "data_file"
    try:
        text = json.dumps({"id": meta.get("pub_id"), "type": kind, "payload": meta})
    except (TypeError, ValueError, RecursionError) as error:
        raise MessageError("no registration", str(error)) from None
    return parse_file(text).text


def envelope_of(datagram: bytes | str) -> JSON:
    """Return the envelope of a datagram whose payload `parse` refused; empty where there is none."""
    try:
        envelope = _leniently(datagram)
    except MessageError:
        return {}
    return envelope if isinstance(envelope, dict) else {}


def stream_of(publisher: str) -> str:
    """Return the stream id of a publisher's: what follows the first colon, or all of it."""
    _, colon, stream_id = publisher.partition(":")
    return stream_id if colon else publisher


def brief(text: str, most: int = 300) -> str:
    """Return what a sender wrote as a person is shown it: one line of at most `most` characters, none of control."""
    shown = text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown if len(shown) <= most else f"{shown[: most // 2 - 5]} ... {shown[-most // 2 :]}"


def _file(envelope: JSON, kind: str, text: str | None) -> DataFile | G3File:
    """Return the message of a registration; without its `text`, what cannot be stored or read again is left out."""
    payload = envelope.get("payload")
    if not isinstance(payload, dict):
        raise MessageError("wrong or missing field", "payload: not an object")
    path = payload.get("path")
    if not isinstance(path, str) or not path or "\0" in path:
        raise MessageError("wrong or missing field", "payload.path: not a path")
    id_ = envelope.get("id")
    if not isinstance(id_, str):
        id_ = str(id_) if isinstance(id_, (int, float)) else ""
    payload = _reduced(payload)
    if text is None or len(text) > _SHORT:
        text = json.dumps({"id": id_[:MAX_STRING], "type": kind, "payload": payload})
    meta = {**payload, "pub_id": id_[:MAX_STRING]}
    return G3File(envelope, meta, text) if kind == "g3_file" else DataFile(envelope, meta, text)


def _reduced(payload: JSON) -> JSON:
    """Return what is kept of a registration's payload, so that no sender can fill the memory.

    These are the path, whole, and up to `MAX_FIELDS` scalars, strings of up to `MAX_STRING` characters.
    """
    kept: JSON = {}
    for key, value in payload.items():
        if isinstance(value, str):
            kept[key] = value if key == "path" or len(value) <= MAX_STRING else value[:MAX_STRING]
        elif not isinstance(value, (list, dict)):
            kept[key] = value
        elif key == "plot":
            kept[key] = bool(value)
        elif key in _OF_ROW:
            kept[key] = type(value)()
    if len(kept) <= MAX_FIELDS:
        return kept
    first = (*_OF_ROW, *(key[:MAX_STRING] for key in kept))
    return {key: kept[key] for key in first[:MAX_FIELDS] if key in kept}


def _session(envelope: JSON, kind: str) -> SessionMessage:
    expected: type = dict if kind == "session_data" else str
    if not isinstance(envelope["payload"], expected):
        raise MessageError("wrong or missing field", f"payload: {kind} carries a {expected.__name__}")
    return SessionMessage(envelope)


def _metadata(envelope: JSON) -> Metadata:
    payload = _validate_metadata(envelope["payload"])
    sent = envelope.get("time")
    if not isinstance(sent, (int, float)) or not abs(sent) < 1e12:  # no NaN is below anything
        raise MessageError("wrong or missing field", "time: not a time in unix seconds")
    return Metadata(envelope, stream_of(envelope["id"]), payload["path"], payload["value"], float(sent))


def _where(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "message"
