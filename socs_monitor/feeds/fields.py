"""Turns the value of a register into a field that every reader of a recorded feed accepts.

Pure. The readers require (contract) that a field is a str, int, float or bool and keeps its type, and that its name
follows OCS's rule. A value that breaks the InfluxDB line protocol would break it for a whole batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

Value: TypeAlias = str | int | float | bool

# Bounds on what senders can make the agent keep: feeds, fields per feed, and characters of the names.
MAX_STREAMS = 64
MAX_FIELDS = 2000
MAX_STREAM_ID = 100
MAX_PATH = 512

# When there are MAX_STREAMS, a new stream replaces the one that has been silent longest. A stream that has sent
# PROVEN_MESSAGES is replaced only after IDLE_S seconds of silence. At most MAX_PROVEN streams have this privilege, so
# that there is always a place for a new one.
PROVEN_MESSAGES = 10
IDLE_S = 60.0
MAX_PROVEN = 48

# Readers keep what they see of every feed, so the rate of replacements is limited: REPLACE_BURST at once, then one per
# second. Half of the burst is reserved for streams that were turned away before and send again, because a flood of
# invented ids does not repeat itself. The last MAX_TURNED_AWAY ids are remembered.
REPLACE_BURST = 64
MAX_TURNED_AWAY = 10_000

# What a feed's address (WAMP) and a tag's value (InfluxDB) take unchanged. With a dot, nobody would receive the feed:
# readers subscribe to addresses of exactly four components.
_STREAM_ID = re.compile(r"[A-Za-z0-9_-]+")
_FIELD = re.compile(r"_*[A-Za-z][A-Za-z0-9_]{0,254}")
_FIELD_MAX = 255
# InfluxDB's name for a sample's time, and the OCS publisher's tag.
_RESERVED = ("time", "feed")

# Unix times that fit InfluxDB's 64-bit nanoseconds.
_TIME_MAX = 2**63 / 1e9

_INT_MAX = 2**63 - 1
_EXACT_FLOAT = 2**53

# A quote or a newline ends a string of the line protocol, and a backslash may hide the quote that does. A lone
# surrogate has no UTF-8, so it would keep a whole buffer from being published.
_UNSAFE = str.maketrans(
    {
        **{'"': "'", "\\": "/"},
        **{chr(code): " " for code in (*range(32), 127)},
        **{chr(code): "\ufffd" for code in range(0xD800, 0xE000)},
    }
)

# The types to which a field of a type changes as soon as it has such a value.
_WIDER: Mapping[type[Value], tuple[type[Value], ...]] = {bool: (int, float), int: (float,)}


class FieldError(ValueError):
    """The value cannot be published. The text comes from a small fixed vocabulary that can be counted."""


@dataclasses.dataclass(slots=True)
class _Type:
    """The type of a field, and the number of streams that have the field."""

    type: type[Value]
    streams: int = 0


@dataclasses.dataclass(slots=True)
class _Field:
    name: str
    kind: _Type
    is_reported: bool = False  # that values are dropped


@dataclasses.dataclass(slots=True)
class _Stream:
    fields: dict[str, _Field] = dataclasses.field(default_factory=dict)  # by path
    last: float = 0.0  # CLOCK_MONOTONIC
    messages: int = 0
    is_proven: bool = False


class Streams:
    """The streams that send metadata, with their fields and types.

    Args:
        name_rule: OCS's rule for field names. Turns any path into a valid name, if it can.
        report: Called with a text for people, a few times per field at most.
        forget: Called with the id of a stream that is replaced, before its successor has a field.
        widened: Called with a field and its new type, before the first value of that type is returned.
        monotonic: Returns seconds of CLOCK_MONOTONIC.
    """

    def __init__(
        self,
        name_rule: Callable[[str], str],
        report: Callable[[str], None],
        forget: Callable[[str], None],
        widened: Callable[[str, type[Value]], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name_rule = name_rule
        self._report = report
        self._forget = forget
        self._widened = widened
        self._monotonic = monotonic
        self._streams: dict[str, _Stream] = {}  # the one that sent last is last
        # by field, for all streams: in InfluxDB an agent's streams share a measurement, and so the types of fields
        self._types: dict[str, _Type] = {}
        self._replaceable = float(REPLACE_BURST)
        self._replaced_at = monotonic()
        self._turned_away: dict[str, None] = {}

    def field(self, stream_id: str, path: str, value: object, time: float) -> tuple[str, Value]:
        """Return the name and value of the field as which a register is published.

        Args:
            stream_id: The stream.
            path: Dotted rogue path of the register.
            value: The register's value.
            time: When it was sent, in unix time.

        Raises:
            FieldError: If it cannot be published.
        """
        if not 0 <= time < _TIME_MAX:
            raise FieldError("time out of range")
        safe = _safe(value)
        stream = self._stream(stream_id)
        field = stream.fields.get(path) or self._add_field(stream, stream_id, path, type(safe))
        if type(safe) is field.kind.type:
            return field.name, safe
        text = f"Metadata {path!r} of stream {stream_id} changed from {field.kind.type.__name__} to"
        text += f" {type(safe).__name__}."
        if type(safe) in _WIDER.get(field.kind.type, ()):
            self._report(f"{text} It is published with the new type from now on, for all streams")
            field.kind.type = type(safe)
            self._widened(field.name, type(safe))
        try:
            return field.name, convert(safe, field.kind.type)
        except FieldError:
            if not field.is_reported:
                field.is_reported = True
                self._report(f"{text} Such values are dropped and counted, because readers accept one type per field")
            raise

    def _stream(self, stream_id: str) -> _Stream:
        """Return the stream, which is now the one that sent last. A new one may have to replace another."""
        now = self._monotonic()
        stream = self._streams.pop(stream_id, None)
        if stream is None:
            if len(stream_id) > MAX_STREAM_ID or not _STREAM_ID.fullmatch(stream_id):
                raise FieldError("stream id that is no name for a feed")
            if len(self._streams) >= MAX_STREAMS:
                self._replace_one(stream_id, now)
            stream = _Stream()
        self._streams[stream_id] = stream
        stream.last = now
        stream.messages += 1
        if stream.messages >= PROVEN_MESSAGES and not stream.is_proven:
            stream.is_proven = sum(other.is_proven for other in self._streams.values()) < MAX_PROVEN
        return stream

    def _replace_one(self, newcomer: str, now: float) -> None:
        """Forget the stream that has been silent longest, of those that may be replaced.

        Raises:
            FieldError: If too many streams were replaced recently.
        """
        self._replaceable = min(REPLACE_BURST, self._replaceable + now - self._replaced_at)
        self._replaced_at = now
        reserved = 0 if newcomer in self._turned_away else REPLACE_BURST // 2
        if self._replaceable < reserved + 1:
            self._turned_away[newcomer] = None
            if len(self._turned_away) > MAX_TURNED_AWAY:
                del self._turned_away[next(iter(self._turned_away))]
            raise FieldError(f"more than {MAX_STREAMS} streams")
        self._replaceable -= 1
        self._turned_away.pop(newcomer, None)
        silent = (id_ for id_, stream in self._streams.items() if not stream.is_proven or now - stream.last >= IDLE_S)
        replaced = next(silent)  # there is one, because not all can be proven
        for field in self._streams.pop(replaced).fields.values():
            field.kind.streams -= 1
            if not field.kind.streams:
                del self._types[field.name]
        self._forget(replaced)

    def _add_field(self, stream: _Stream, stream_id: str, path: str, kind: type[Value]) -> _Field:
        if len(path) > MAX_PATH:
            raise FieldError(f"path of more than {MAX_PATH} characters")
        if len(stream.fields) >= MAX_FIELDS:
            raise FieldError(f"more than {MAX_FIELDS} fields in a stream")
        name = self._name_rule(path)
        if not _FIELD.fullmatch(name):
            raise FieldError("path that makes no field name")
        if name in _RESERVED or any(name == known.name for known in stream.fields.values()):
            digest = hashlib.sha256(path.encode(errors="surrogatepass")).hexdigest()[:8]
            name = f"{name[: _FIELD_MAX - 9]}_{digest}"
            self._report(f"Metadata {path!r} of stream {stream_id} is published as {name}: its field name is taken")
        field = stream.fields[path] = _Field(name, self._types.setdefault(name, _Type(kind)))
        field.kind.streams += 1
        return field


def _safe(value: object) -> Value:
    """Return a value that the line protocol can hold, for anything that JSON can hold."""
    if isinstance(value, (list, dict)):
        try:
            value = json.dumps(value, separators=(",", ":"))
        except RecursionError:
            raise FieldError("nested too deeply") from None
    if isinstance(value, str):
        return value.translate(_UNSAFE)
    if value is None:
        raise FieldError("None")
    if isinstance(value, float) and not math.isfinite(value):
        raise FieldError("NaN or infinity")
    if isinstance(value, int) and abs(value) > _INT_MAX:
        raise FieldError("integer beyond 64 bits")
    if isinstance(value, (bool, int, float)):
        return value
    raise FieldError("unknown type")


def convert(value: Value, kind: type) -> Value:
    """Return `value` as one of type `kind`.

    Raises:
        FieldError: If the conversion would lose something.
    """
    if type(value) is kind:
        return value
    if kind is str:
        return str(value)
    if isinstance(value, str):
        value = _number(value)
    if kind is bool and value in (0, 1):
        return bool(value)
    if kind is int and abs(value) <= _INT_MAX and value == int(value):
        return int(value)
    if kind is float and abs(value) <= _EXACT_FLOAT:
        return float(value)
    raise FieldError("type changed")


def _number(text: str) -> int | float:
    for number in (int, float):
        try:
            value = number(text)
        except ValueError:
            continue
        if math.isfinite(value) and abs(value) <= _INT_MAX:
            return value
    raise FieldError("type changed")
