"""From a register's value to a field that every reader of a recorded feed survives.

Pure. The readers' rules (contract): a field is str, int, float or bool and keeps its type, names follow OCS's rule,
and what would break the InfluxDB line protocol breaks it for everyone in the batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

Value: TypeAlias = str | int | float | bool

# Bounds on what senders can make the agent keep: feeds, fields a feed, and characters of the names.
MAX_STREAMS = 64
MAX_FIELDS = 2000
MAX_STREAM_ID = 100
MAX_PATH = 512

# When there are `MAX_STREAMS`, a new stream replaces the one that has been silent longest. A stream that has sent
# PROVEN_MESSAGES is replaced only after IDLE_S seconds of silence. At most MAX_PROVEN streams have this privilege, so
# that there is always a place for a new one.
PROVEN_MESSAGES = 10
IDLE_S = 60.0
MAX_PROVEN = 48

# Readers keep what they see of every feed, so the rate of replacements is limited: REPLACE_BURST at once, then one a
# second. Half of the burst is reserved for streams that were turned away before and send again: a flood of new ids does
# not repeat itself. The last MAX_TURNED_AWAY ids are remembered.
REPLACE_BURST = 64
MAX_TURNED_AWAY = 10_000

# What a feed's address (WAMP) and a tag's value (InfluxDB) take unchanged. A point would make a feed that nobody hears:
# the readers subscribe to addresses of just four components.
_STREAM_ID = re.compile(r"[A-Za-z0-9_-]+")
_FIELD = re.compile(r"_*[A-Za-z][A-Za-z0-9_]{0,254}")
_FIELD_MAX = 255
# InfluxDB's own name for a sample's time, and the OCS publisher's tag.
_RESERVED = ("time", "feed")

# Unix seconds that fit InfluxDB's 64-bit nanoseconds.
_TIME_MAX = 2**63 / 1e9

_INT_MAX = 2**63 - 1
_EXACT_FLOAT = 2**53

# A quote or a newline ends a line protocol's string, a backslash may hide the quote that does. A lone surrogate has no
# UTF-8, so that nothing at all of a buffer with one in it could be published.
_UNSAFE = str.maketrans(
    {
        **{'"': "'", "\\": "/"},
        **{chr(code): " " for code in (*range(32), 127)},
        **{chr(code): "\ufffd" for code in range(0xD800, 0xE000)},
    }
)

# The types that a field of a type changes to as soon as it has such a value.
_WIDER: Mapping[type[Value], tuple[type[Value], ...]] = {bool: (int, float), int: (float,)}


class FieldError(ValueError):
    """The value cannot be published; `reason` is of a small fixed vocabulary, fit for counting."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Streams:
    """The fields of the streams that send, and their types.

    Args:
        name_rule: OCS's rule for field names: makes a valid one of any path, if it can.
        report: Called with a line for a person, a few times a field at most.
        forget: Called with the id of a stream that is replaced, before its successor has any field.
        widened: Called with a field and its new type, before the first value of that type is returned.
        monotonic: Gives seconds of CLOCK_MONOTONIC.
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
        # by field, whatever the stream: in InfluxDB an agent's streams share a measurement, and so the types of fields
        self._kinds: dict[str, _Kind] = {}
        self._replaceable = float(REPLACE_BURST)
        self._replaced_at = monotonic()
        self._turned_away: dict[str, None] = {}

    def field(self, stream_id: str, path: str, value: object, time: float) -> tuple[str, Value]:
        """Return name and value of the field that a register is published as.

        Args:
            stream_id: The stream.
            path: Dotted rogue path of the register.
            value: What it holds.
            time: When it was sent, unix seconds.

        Raises:
            FieldError: If it cannot be published.
        """
        if not 0 <= time < _TIME_MAX:
            raise FieldError("time out of range")
        safe = _safe(value)
        field = self._field(self._stream(stream_id), stream_id, path, type(safe))
        kind = field.kind
        if type(safe) in _WIDER.get(kind.type, ()):
            self._report(
                f"metadata {path!r} of stream {stream_id} was {kind.type.__name__} and now is {type(safe).__name__}:"
                " published as that from now on, for all streams"
            )
            kind.type = type(safe)
            self._widened(field.name, kind.type)
        try:
            return field.name, convert(safe, kind.type)
        except FieldError:
            if not field.complained:
                field.complained = True
                self._report(
                    f"metadata {path!r} of stream {stream_id} was {kind.type.__name__} and now is"
                    f" {type(safe).__name__}: such values are dropped and counted, since readers cannot take both"
                )
            raise

    def _stream(self, stream_id: str) -> _Stream:
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
        if stream.messages >= PROVEN_MESSAGES and not stream.proven:
            stream.proven = sum(other.proven for other in self._streams.values()) < MAX_PROVEN
        return stream

    def _replace_one(self, newcomer: str, now: float) -> None:
        """Forget the stream that has been silent longest of those that may be replaced.

        Raises:
            FieldError: If too many were replaced lately.
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
        silent = (id_ for id_, stream in self._streams.items() if not stream.proven or now - stream.last >= IDLE_S)
        replaced = next(silent)  # there is one, since not all can be proven
        for field in self._streams.pop(replaced).fields.values():
            field.kind.fields -= 1
            if not field.kind.fields:
                del self._kinds[field.name]
        self._forget(replaced)

    def _field(self, stream: _Stream, stream_id: str, path: str, kind: type[Value]) -> _Field:
        field = stream.fields.get(path)
        if field is None:
            if len(path) > MAX_PATH:
                raise FieldError(f"path of more than {MAX_PATH} characters")
            if len(stream.fields) >= MAX_FIELDS:
                raise FieldError(f"more than {MAX_FIELDS} fields in a stream")
            name = self._name(stream_id, path, {known.name for known in stream.fields.values()})
            field = stream.fields[path] = _Field(name, self._kinds.setdefault(name, _Kind(kind)))
        return field

    def _name(self, stream_id: str, path: str, taken: set[str]) -> str:
        name = self._name_rule(path)
        if not _FIELD.fullmatch(name):
            raise FieldError("path that makes no field name")
        if name in taken or name in _RESERVED:
            digest = hashlib.sha256(path.encode(errors="surrogatepass")).hexdigest()[:8]
            name = f"{name[: _FIELD_MAX - 9]}_{digest}"
            self._report(f"metadata {path!r} of stream {stream_id}: its field name is taken, published as {name}")
        return name


class _Stream:
    __slots__ = ("fields", "last", "messages", "proven")

    def __init__(self) -> None:
        self.fields: dict[str, _Field] = {}  # by path
        self.last = 0.0
        self.messages = 0
        self.proven = False


class _Kind:
    """The type of a field, and in how many streams it is a field."""

    __slots__ = ("fields", "type")

    def __init__(self, kind: type[Value]) -> None:
        self.fields = 0
        self.type = kind


class _Field:
    __slots__ = ("complained", "kind", "name")

    def __init__(self, name: str, kind: _Kind) -> None:
        self.name = name
        self.kind = kind
        self.complained = False
        kind.fields += 1


def _safe(value: object) -> Value:
    """Make a field's value of anything that JSON can hold."""
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
    """Return `value` as one of type `kind`, if nothing is lost by that.

    Raises:
        FieldError: If something would be.
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
