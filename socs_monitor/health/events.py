"""What the agent's log says: one line an event, for a person first and after ``|`` for a machine.

A line reads ``text | event=NAME key=value ...``; the keys are logfmt, which Loki takes as it is. `EVENTS` names all
there are. The level tells what a line is for: ``error`` where files do not get through or a person is needed, ``warn``
what is to be looked at tomorrow, ``info`` what is as it should be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

EVENTS: Mapping[str, str] = {
    "registered": "Rows were committed: files is how many in a second, path the last one's. Each by itself at debug.",
    "waiting": "A file is not there yet, or cannot be read; it is looked for again.",
    "changed": "A file changed after it was registered; it is hashed and registered again.",
    "corrected": "A row that SupRsync could not finish was given the present content of its file.",
    "row_without_file": "Rows wait for a copy of a file that is gone: SupRsync can never finish them.",
    "file_missing": "A file was missing or unreadable for too long: its registration is a dead letter.",
    "refused": "A registration can never become a row: it is a dead letter.",
    "dead_letters": "Dead letters were tried again or discarded by a person, or dropped since there are too many.",
    "backfill": "A backfill ended.",
    "degraded": "A condition began under which files do not get through; condition is its key in the session data.",
    "recovered": "Such a condition ended.",
    "messages_lost": "Messages of a sender were lost on their way.",
    "kernel_drops": "The kernel dropped datagrams, since they came faster than they were read.",
    "socket": "The UDP port failed, or the kernel grants it less of a buffer than was asked for.",
    "dropped": "Datagrams were no messages, or of senders that are not allowed.",
    "not_published": "A message for a feed was not taken by OCS.",
    "field": "A register got another field name than its own, its type widened, or values of another type are dropped.",
    "database": "Something unusual was done to the database: an index made, a replaced file opened anew.",
    "spool": "The spool could not be read and was set aside.",
    "log_dropped": "Lines of the log were dropped, because the program that reads it had stopped reading.",
    "registrations_lost": "The agent stopped while the spool could not be written: the paths it names are lost.",
    "configuration": "An option is missing that a site should set.",
    "internal_error": "An error that nobody thought of; to be reported, with its traceback.",
}

# Events that senders can bring about at will: counted and logged, but not kept among the last problems.
AT_WILL = frozenset({"refused", "dropped", "not_published", "field"})

# What can stand in logfmt without quotes.
_PLAIN = re.compile(r"[^\s\"=\\]+")

# Characters of a value, and of a traceback, which is of our own making; of a longer one the middle is left out.
_MAX_VALUE = 400
_MAX_TRACEBACK = 8000


def line(event: str, text: str, keys: Mapping[str, object]) -> str:
    """Return the line of an `event` (one of `EVENTS`): `text`, then the event and `keys`."""
    pairs = "".join(f" {key}={_value(key, value)}" for key, value in keys.items())
    return f"{text} | event={event}{pairs}"


def _value(key: str, value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    most = _MAX_TRACEBACK if key == "traceback" else _MAX_VALUE
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    if not text.isprintable():
        return json.dumps(text)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
