"""From the bytes of one datagram to one typed message, or one `MessageError`.

The wire format is one JSON object a datagram (UTF-8), as pysmurf's ``Publisher`` and the smurf-streamer
send it. Pure: knows no socket, reactor, clock or OCS. Whatever arrives, `parse` returns a message or raises
`MessageError`; nothing else comes out.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, NotRequired, TypeAlias

from pydantic import ConfigDict, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError
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

    `meta` is the payload with the publisher's id added as ``pub_id``, as it goes to ``file_queue``.
    """

    envelope: JSON
    meta: JSON


class G3File(NamedTuple):
    """A ``g3_file`` message: the streamer closed a timestream file. `meta` as in `DataFile`."""

    envelope: JSON
    meta: JSON


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


class _FilePayload(TypedDict):
    __pydantic_config__ = _AS_IT_CAME  # type: ignore[misc]
    path: StrictStr
    archive_name: NotRequired[StrictStr]
    format: NotRequired[StrictStr | None]
    timestamp: NotRequired[StrictFloat | StrictInt | StrictStr]
    action: NotRequired[StrictStr | None]
    action_ts: NotRequired[StrictStr | StrictInt | None]


class _MetadataPayload(TypedDict):
    __pydantic_config__ = _AS_IT_CAME  # type: ignore[misc]
    path: StrictStr
    value: Any


# What is kept of a registration: fields, and characters of a string. pysmurf sends nine fields, the longest a path.
MAX_FIELDS = 32
MAX_STRING = 1024
_SCALARS = (int, float, type(None))
_KEPT = ("path", "pub_id", *_FilePayload.__annotations__, "plot")

_validate_envelope = TypeAdapter(_Envelope).validator.validate_python
_validate_file = TypeAdapter(_FilePayload).validator.validate_python
_validate_metadata = TypeAdapter(_MetadataPayload).validator.validate_python

# Numbers as a sender's str(timestamp) may give them; the first five characters name a folder.
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?")


def parse(datagram: bytes | str) -> Message:
    """Parse one datagram.

    Args:
        datagram: What arrived: UTF-8 JSON of one object with at least ``id``, ``type`` and ``payload``.

    Returns:
        The message, by its ``type``. Types that are not known are `Ignored`, since a newer publisher may
        send them.

    Raises:
        MessageError: For anything that is not such a message.
    """
    if not datagram:
        raise MessageError("empty")
    try:
        envelope = from_json(datagram)
        _validate_envelope(envelope)
        kind = envelope["type"]
        if kind in FILE_TYPES:
            return _file(envelope, kind)
        if kind in SESSION_TYPES:
            return _session(envelope, kind)
        if kind == "metadata":
            return _metadata(envelope)
    except ValidationError as error:  # before ValueError, whose subclass it is
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise MessageError("wrong or missing field", f"{_where(first['loc'])}: {first['msg']}") from None
    except (ValueError, TypeError) as error:  # the latter for text that is no Unicode
        raise MessageError("not JSON", str(error)) from None
    return Ignored(envelope)


def parse_file(datagram: bytes | str) -> DataFile | G3File:
    """Parse a datagram that registers a file; raises `MessageError` for any other."""
    message = parse(datagram)
    if not isinstance(message, (DataFile, G3File)):
        raise MessageError("no registration", str(message.envelope["type"])[:40])
    return message


def reduce(meta: JSON) -> JSON:
    """Return what is kept of a registration's metadata, so that no sender can fill the memory.

    These are the path, whole, and up to `MAX_FIELDS` scalars, strings of up to `MAX_STRING` characters.
    """
    kept = {
        key: value
        for key, value in meta.items()
        if key == "path" or isinstance(value, _SCALARS) or (isinstance(value, str) and len(value) <= MAX_STRING)
    }
    if len(kept) > MAX_FIELDS:
        kept = {key: kept[key] for key in (*_KEPT, *kept)[:MAX_FIELDS] if key in kept}
    return kept


def encode(kind: str, meta: JSON) -> str:
    """Return a datagram of type `kind` that brings reduced metadata, as JSON text."""
    return json.dumps({"id": meta["pub_id"], "type": kind, "payload": meta})


def encode_file(meta: JSON) -> str:
    """Return the datagram that would have brought `meta` (a payload with ``pub_id``), as JSON text.

    Raises:
        MessageError: If there is none.
    """
    if not isinstance(meta, dict):
        raise MessageError("no registration", f"{type(meta).__name__} instead of a dict")
    kind = "g3_file" if meta.get("archive_name") == "timestreams" else "data_file"
    try:
        text = json.dumps({"id": meta.get("pub_id"), "type": kind, "payload": meta})
    except (TypeError, ValueError) as error:
        raise MessageError("no registration", str(error)) from None
    parse_file(text)
    return text


def envelope_of(datagram: bytes | str) -> JSON:
    """Return the envelope of a datagram whose payload `parse` refused; empty where there is none."""
    try:
        envelope = from_json(datagram)
    except (ValueError, TypeError):
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


def _file(envelope: JSON, kind: str) -> DataFile | G3File:
    meta = _validate_file(envelope["payload"])
    if "\0" in meta["path"] or not meta["path"]:
        raise MessageError("wrong or missing field", "payload.path: empty or with a NUL character")
    meta["pub_id"] = envelope["id"]
    if kind == "g3_file":
        return G3File(envelope, meta)
    if not _is_time(meta.get("timestamp")):
        raise MessageError("wrong or missing field", "payload.timestamp: not a time in unix seconds")
    return DataFile(envelope, meta)


def _session(envelope: JSON, kind: str) -> SessionMessage:
    expected: type = dict if kind == "session_data" else str
    if not isinstance(envelope["payload"], expected):
        raise MessageError("wrong or missing field", f"payload: {kind} carries a {expected.__name__}")
    return SessionMessage(envelope)


def _metadata(envelope: JSON) -> Metadata:
    payload = _validate_metadata(envelope["payload"])
    sent = envelope.get("time")
    if not isinstance(sent, (int, float)) or not _is_time(sent):
        raise MessageError("wrong or missing field", "time: not a time in unix seconds")
    return Metadata(envelope, stream_of(envelope["id"]), payload["path"], payload["value"], float(sent))


def _is_time(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= 64 and _NUMBER.fullmatch(value) is not None
    return isinstance(value, (int, float)) and abs(value) < 1e12  # no NaN is below anything


def _where(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "message"
