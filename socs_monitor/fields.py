"""From a register's value to a field that every reader of a recorded feed survives.

Pure. The readers' rules (contract): a field is str, int, float or bool and keeps its type, names follow OCS's rule,
and what would break the InfluxDB line protocol breaks it for everyone in the batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from typing import TypeAlias

Value: TypeAlias = str | int | float | bool

# Bounds on what senders can make the agent keep: feeds, fields a feed, and characters of the names.
MAX_STREAMS = 64
MAX_FIELDS = 2000
MAX_STREAM_ID = 100
MAX_PATH = 512

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

# A quote or a newline ends a line protocol's string, a backslash may hide the quote that does.
_UNSAFE = str.maketrans({'"': "'", "\\": "/", **{chr(code): " " for code in (*range(32), 127)}})


class FieldError(ValueError):
    """The value cannot be published; `reason` is of a small fixed vocabulary, fit for counting."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Streams:
    """The fields of all streams, as they were first seen.

    Args:
        name_rule: OCS's rule for field names: makes a valid one of any path, if it can.
        report: Called with a line for a person, at most once a field.
    """

    def __init__(self, name_rule: Callable[[str], str], report: Callable[[str], None]) -> None:
        self._name_rule = name_rule
        self._report = report
        self._streams: dict[str, dict[str, _Field]] = {}
        # by field, whatever the stream: in InfluxDB an agent's streams share a measurement, and so the types of fields
        self._kinds: dict[str, type] = {}

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
        field = self._field(stream_id, path)
        kind = self._kinds.setdefault(field.name, type(safe))
        try:
            return field.name, convert(safe, kind)
        except FieldError:
            if not field.complained:
                field.complained = True
                self._report(
                    f"metadata {path!r} of stream {stream_id} was {kind.__name__} and now is"
                    f" {type(safe).__name__}: such values are dropped and counted, since readers cannot take both"
                )
            raise

    def _field(self, stream_id: str, path: str) -> _Field:
        fields = self._streams.get(stream_id)
        if fields is None:
            if len(stream_id) > MAX_STREAM_ID or not _STREAM_ID.fullmatch(stream_id):
                raise FieldError("stream id that is no name for a feed")
            if len(self._streams) >= MAX_STREAMS:
                raise FieldError(f"more than {MAX_STREAMS} streams")
            fields = self._streams[stream_id] = {}
        field = fields.get(path)
        if field is None:
            if len(path) > MAX_PATH:
                raise FieldError(f"path of more than {MAX_PATH} characters")
            if len(fields) >= MAX_FIELDS:
                raise FieldError(f"more than {MAX_FIELDS} fields in a stream")
            field = fields[path] = _Field(self._name(stream_id, path, {known.name for known in fields.values()}))
        return field

    def _name(self, stream_id: str, path: str, taken: set[str]) -> str:
        name = self._name_rule(path)
        if not _FIELD.fullmatch(name):
            raise FieldError("path that makes no field name")
        if name in taken or name in _RESERVED:
            digest = hashlib.sha256(path.encode()).hexdigest()[:8]
            name = f"{name[: _FIELD_MAX - 9]}_{digest}"
            self._report(f"metadata {path!r} of stream {stream_id}: its field name is taken, published as {name}")
        return name


class _Field:
    __slots__ = ("complained", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.complained = False


def _safe(value: object) -> Value:
    """Make a field's value of anything that JSON can hold."""
    if isinstance(value, (list, dict)):
        value = json.dumps(value, separators=(",", ":"))
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
