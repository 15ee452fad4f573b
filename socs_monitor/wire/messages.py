"""Parses one datagram into one typed message, or raises one `MessageError`, whatever arrives.

The wire format, as pysmurf's ``Publisher`` and the smurf-streamer send it: one JSON object per datagram, in UTF-8.
Pure: no socket, reactor, clock or OCS.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, TypeAlias

from pydantic_core import from_json

JSON = dict[str, Any]

FILE_TYPES = frozenset({"data_file", "g3_file"})
SESSION_TYPES = frozenset({"session_data", "session_log"})
TYPES = FILE_TYPES | SESSION_TYPES | {"metadata", "start", "stop", "log", "backend_error", "general"}

_WRONG_FIELD = "wrong or missing field"


class MessageError(Exception):
    """The datagram is not a message of the wire format.

    Attributes:
        reason: What is wrong, from a small fixed vocabulary that can be counted.
        detail: The particulars, for a person.
        envelope: The JSON object that arrived; empty if there was none.
    """

    def __init__(self, reason: str, detail: str = "", envelope: JSON | None = None) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.envelope = envelope or {}


class FileMessage(NamedTuple):
    """A ``data_file`` message (pysmurf wrote a file) or ``g3_file`` message (the streamer closed a timestream file).

    `meta` is what goes to ``file_queue``: the payload, and the publisher's id as ``pub_id``. `text` is what goes into
    the spool: a datagram with the same `meta`.
    """

    envelope: JSON
    meta: JSON
    text: str


class SessionMessage(NamedTuple):
    """A ``session_data`` or ``session_log`` message. Its envelope is published unmodified."""

    envelope: JSON


class Metadata(NamedTuple):
    """A ``metadata`` message: the value of one register. `time` is when it was sent, in unix time."""

    envelope: JSON
    stream_id: str
    path: str
    value: object
    time: float


class Ignored(NamedTuple):
    """A message that needs no action: ``start``, ``stop``, ``log``, ``general`` and unknown types."""

    envelope: JSON


Message: TypeAlias = FileMessage | SessionMessage | Metadata | Ignored

# How much of a registration is kept: number of fields, and characters per string. pysmurf sends nine fields, and the
# longest one is a path.
MAX_FIELDS = 32
MAX_STRING = 1024

# The fields that determine a row. A list or object in one of them is kept as an empty one, so that the registration
# is refused for it.
_ROW_FIELDS = ("path", "archive_name", "format", "timestamp", "action", "action_ts", "plot")

# A registration of at most this many characters is stored exactly as it arrived; a longer one is encoded again.
_STORED_AS_RECEIVED = 2048

_BYTE_ORDER_MARK = "\ufeff"


def parse(datagram: bytes | str) -> Message:
    """Parse one datagram.

    Args:
        datagram: UTF-8 JSON: an object with ``id``, ``type`` and ``payload``. A message that registers a file needs
            only ``type`` and the payload's ``path``. Whether the rest is fit for the archive is decided later, and a
            registration that is not becomes a dead letter.

    Returns:
        The message. Unknown types are `Ignored`, because a newer publisher may send them.

    Raises:
        MessageError: If the datagram is not a message.
    """
    if not datagram:
        raise MessageError("empty")
    text = None
    try:
        envelope = from_json(datagram)
        text = datagram if isinstance(datagram, str) else datagram.decode()
    except (ValueError, TypeError):  # a str with a lone surrogate is a TypeError
        envelope = _parse_leniently(datagram)
    if not isinstance(envelope, dict):
        raise MessageError(_WRONG_FIELD, "message: not an object")
    kind = envelope.get("type")
    if isinstance(kind, str) and kind in FILE_TYPES:
        return _file_message(envelope, text)
    for field in ("id", "type"):
        if not isinstance(envelope.get(field), str):
            raise MessageError(_WRONG_FIELD, f"{field}: not a string", envelope)
    if "payload" not in envelope:
        raise MessageError(_WRONG_FIELD, "payload: missing", envelope)
    if kind == "metadata":
        return _metadata(envelope)
    if kind in SESSION_TYPES:
        expected = dict if kind == "session_data" else str
        if not isinstance(envelope["payload"], expected):
            raise MessageError(_WRONG_FIELD, f"payload: not a {expected.__name__}", envelope)
        return SessionMessage(envelope)
    return Ignored(envelope)


def _parse_leniently(datagram: bytes | str) -> Any:
    """Parse JSON as Python does, which accepts a byte order mark, lone surrogates and deeper nesting."""
    try:
        text = datagram if isinstance(datagram, str) else datagram.decode(errors="surrogatepass")
        return json.loads(text.removeprefix(_BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as error:
        raise MessageError("not JSON", str(error)) from None


def parse_file(datagram: bytes | str) -> FileMessage:
    """Parse a datagram that registers a file. Any other is a `MessageError`."""
    message = parse(datagram)
    if not isinstance(message, FileMessage):
        raise MessageError("no registration", str(message.envelope["type"])[:40])
    return message


def encode_file(meta: JSON) -> str:
    """Return the datagram, as text, that `parse_file` turns into this `meta` (a payload with ``pub_id``).

    Raises:
        MessageError: If `meta` is not the metadata of a file.
    """
    if not isinstance(meta, dict):
        raise MessageError("no registration", f"{type(meta).__name__} instead of a dict")
    kind = "g3_file" if meta.get("archive_name") == "timestreams" else "data_file"
    try:
        text = json.dumps({"id": meta.get("pub_id"), "type": kind, "payload": meta})
    except (TypeError, ValueError, RecursionError) as error:
        raise MessageError("no registration", str(error)) from None
    return parse_file(text).text


def stream_of(publisher: str) -> str:
    """Return the stream id in a publisher id: the part after the first colon, or all of it."""
    _, colon, stream_id = publisher.partition(":")
    return stream_id if colon else publisher


def _file_message(envelope: JSON, text: str | None) -> FileMessage:
    """Return the message of a registration. Without `text`, the datagram cannot be stored as it is."""
    payload = envelope.get("payload")
    if not isinstance(payload, dict):
        raise MessageError(_WRONG_FIELD, "payload: not an object", envelope)
    path = payload.get("path")
    if not isinstance(path, str) or not path or "\0" in path:
        raise MessageError(_WRONG_FIELD, "payload.path: not a path", envelope)
    id_ = envelope.get("id")
    if not isinstance(id_, str):
        id_ = str(id_) if isinstance(id_, (int, float)) else ""
    id_ = id_[:MAX_STRING]
    payload = _bounded_payload(payload)
    if text is None or len(text) > _STORED_AS_RECEIVED:
        text = json.dumps({"id": id_, "type": envelope["type"], "payload": payload})
    return FileMessage(envelope, {**payload, "pub_id": id_}, text)


def _bounded_payload(payload: JSON) -> JSON:
    """Return the whole path and up to `MAX_FIELDS` scalars of a payload, so that no sender can fill the memory."""
    kept: JSON = {}
    for key, value in payload.items():
        if isinstance(value, str):
            kept[key] = value if key == "path" or len(value) <= MAX_STRING else value[:MAX_STRING]
        elif not isinstance(value, (list, dict)):
            kept[key] = value
        elif key == "plot":
            kept[key] = bool(value)
        elif key in _ROW_FIELDS:
            kept[key] = type(value)()
    if len(kept) <= MAX_FIELDS:
        return kept
    first = (*_ROW_FIELDS, *(key[:MAX_STRING] for key in kept))
    return {key: kept[key] for key in first[:MAX_FIELDS] if key in kept}


def _metadata(envelope: JSON) -> Metadata:
    payload, sent = envelope["payload"], envelope.get("time")
    if not isinstance(payload, dict):
        raise MessageError(_WRONG_FIELD, "payload: not an object", envelope)
    path = payload.get("path")
    if not isinstance(path, str):
        raise MessageError(_WRONG_FIELD, "payload.path: not a string", envelope)
    if "value" not in payload:
        raise MessageError(_WRONG_FIELD, "payload.value: missing", envelope)
    if not isinstance(sent, (int, float)) or not abs(sent) < 1e12:  # false for NaN, too
        raise MessageError(_WRONG_FIELD, "time: not a unix time", envelope)
    return Metadata(envelope, stream_of(envelope["id"]), path, payload["value"], float(sent))
