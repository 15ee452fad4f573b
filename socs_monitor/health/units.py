"""Quantities as text, for log messages, reasons and tables. Pure."""

from __future__ import annotations

import datetime


def span(seconds: float) -> str:
    """Return a time span as text: in the largest unit of which it is at least two, or a whole number."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length or seconds % length == 0:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def utc(timestamp: float) -> str:
    """Return unix time as date and time in UTC."""
    return datetime.datetime.fromtimestamp(timestamp, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
