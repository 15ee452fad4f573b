"""The events in the log, and the format of a line: ``text | event=NAME key=value ...``.

The text is for people; the keys are logfmt, which Loki parses. Levels: ``error`` means that files are not being
registered or somebody has to act, ``warn`` that somebody should look within a day, ``info`` that all is well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from socs_monitor.wire.text import shorten

EVENTS: Mapping[str, str] = {
    "registered": "Rows were committed: their count within a second, and the last path. At debug, one line per file.",
    "waiting": "A file is missing or cannot be read. It will be looked up again.",
    "changed": "A file changed after it was registered. It is hashed and registered again.",
    "corrected": "SupRsync could not finish a row, so the row was given the present content of its file.",
    "row_without_file": "Rows wait for a copy of a missing file. SupRsync can never finish them.",
    "file_missing": "A file was missing or unreadable for too long. Its registration became a dead letter.",
    "refused": "A registration can never become a row. It became a dead letter.",
    "dead_letters": "Dead letters were retried or discarded by an operator, or discarded because there were too many.",
    "backfill": "A backfill ended.",
    "degraded": "A condition began; files are not being registered. condition is its key in the session data.",
    "recovered": "A condition ended.",
    "messages_lost": "Messages from a sender did not arrive.",
    "kernel_drops": "The kernel dropped datagrams because they arrived faster than they were read.",
    "socket": "The UDP port failed, or the kernel granted a smaller receive buffer than requested.",
    "dropped": "Datagrams were malformed, or came from senders that are not allowed.",
    "not_published": "OCS did not accept messages for a feed.",
    "field": "A register was published under another field name, its type changed, or values were dropped.",
    "database": "A database index was created, or a replaced database file was opened again.",
    "spool": "The spool could not be read and was set aside.",
    "log_dropped": "Log lines were dropped because the program that reads them had stopped reading.",
    "registrations_lost": "The agent stopped while the spool could not be written. The named registrations are lost.",
    "configuration": "An option that a site should set is missing.",
    "internal_error": "An unexpected error. Please report it, with its traceback.",
}

# Events that any sender can cause at will: counted and logged, but not kept among the last problems.
AT_WILL = frozenset({"refused", "dropped", "not_published", "field"})

# Values that logfmt accepts without quotes.
_UNQUOTED = re.compile(r"[^\s\"=\\]+")

# Characters of a value. Tracebacks, which no sender writes, may be longer.
_MAX_VALUE = 400
_MAX_TRACEBACK = 8000


def line(event: str, text: str, keys: Mapping[str, object]) -> str:
    """Return the line of an `event` (one of `EVENTS`): `text`, then the event and `keys`."""
    pairs = "".join(f" {key}={_value(key, value)}" for key, value in keys.items())
    return f"{text} | event={event}{pairs}"


def _value(key: str, value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = shorten(str(value), _MAX_TRACEBACK if key == "traceback" else _MAX_VALUE)
    if text.isprintable() and _UNQUOTED.fullmatch(text):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())
