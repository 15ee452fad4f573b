"""What the agent knows about itself: its counters, the conditions that degrade it, and a log that nobody can fill."""

from __future__ import annotations

import functools
import json
import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from socs_monitor.health import events
from socs_monitor.health.activity import StreamActivity, WriteTimes
from socs_monitor.wire.messages import brief

# Problems kept for `session.data`, newest last.
MAX_PROBLEMS = 20

# Bytes of JSON that a text may take there.
_MAX_TEXT = 1200

# Seconds for which datagrams that are no use are gathered into one line of the log.
DIGEST_S = 60.0

# Batches of files share a line of the log where they follow each other faster than this (seconds): a line for each
# would be a tenth of what a file costs, and nothing a person could read.
REGISTERED_S = 1.0

# Seconds for which a file that was given up degrades the agent.
GIVEN_UP_S = 3600.0

# Senders told apart in such a line.
_SENDERS_MAX = 1000


class _Condition(NamedTuple):
    """Holds for the `reason`, at the longest until `until` (CLOCK_MONOTONIC)."""

    reason: str
    until: float


class _Held(NamedTuple):
    """Lines that were not written: `number` of them, and the latest."""

    number: int
    level: str
    text: str
    keys: Mapping[str, object]


class Stats:
    """Counters, and the conditions under which files do not get through. Safe to update from any thread.

    Lines for the log are of one of the events in `events.EVENTS`; their levels are txaio's.

    Args:
        say: Called with ``(level, line)`` for each line that belongs in the log.
        clock: Gives unix time.
        monotonic: Gives seconds of CLOCK_MONOTONIC.

    Attributes:
        datagrams (Counter): Number of datagrams by message type.
        bytes (int): Their bytes.
        malformed (Counter): Number of datagrams that were no message, by reason.
        refused (Counter): Number of registrations that could not even be taken in, by reason.
        unpublished (Counter): Number of messages that reached no feed, by kind.
        last_file (str): Path of the file that was registered last.
        last_time (float): When that was, unix time; None before the first.
        streams (StreamActivity): What each stream brings.
        writes (WriteTimes): How long the database takes.
    """

    def __init__(
        self,
        say: Callable[[str, str], None],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say = say
        self._clock = clock
        self._monotonic = monotonic
        self._conditions: dict[str, _Condition] = {}
        self._problems: deque[dict[str, object]] = deque(maxlen=MAX_PROBLEMS)
        self.datagrams: Counter[str] = Counter()
        self.bytes = 0
        self.malformed: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._useless: Counter[str] = Counter()
        self._useless_senders: Counter[str] = Counter()
        self._said: defaultdict[str, float] = defaultdict(lambda: -math.inf)  # CLOCK_MONOTONIC, by event
        self._unsaid: dict[str, _Held] = {}
        self.unpublished: Counter[str] = Counter()
        self._unsaid_files = 0
        self._counting = threading.Lock()
        self.last_file = ""
        self.last_time: float | None = None
        self.streams = StreamActivity(clock, monotonic)
        self.writes = WriteTimes(monotonic)

    @property
    def degraded(self) -> bool:
        """Whether there is a condition under which files do not get through."""
        return bool(self._conditions)

    def trouble(self, condition: str, reason: str, **keys: object) -> None:
        """Note that `condition` holds, with its `reason` for a person; logged when it begins, not while it lasts."""
        begins = condition not in self._conditions
        self._conditions[condition] = _Condition(_bounded(reason), float("inf"))
        if begins:
            self.log("error", "degraded", reason, condition=condition, **keys)

    def alarm(self, condition: str, reason: str, seconds: float) -> None:
        """Have `condition` hold for so long; the log has been told of its `reason` already."""
        self._conditions[condition] = _Condition(_bounded(reason), self._monotonic() + seconds)

    def cured(self, condition: str, text: str) -> None:
        """Note that `condition` no longer holds; `text` is logged if it did."""
        if self._conditions.pop(condition, None) is not None:
            self.log("info", "recovered", text, condition=condition)

    def forget(self, *conditions: str) -> None:
        """Let conditions end of which nobody can tell any more whether they hold."""
        for condition in conditions:
            self._conditions.pop(condition, None)

    def registered(self, files: int, publishers: Iterable[str], path: str) -> None:
        """Count a batch whose rows were committed.

        Args:
            files: How many files.
            publishers: Who announced them, each but those that were registered before and have changed since.
            path: The last one's.
        """
        with self._counting:
            self._unsaid_files += files
            self.last_file = path
            self.last_time = self._clock()
        self.streams.registered(publishers)
        if self._monotonic() - self._said["registered"] >= REGISTERED_S:
            self.say_registered()

    def say_registered(self) -> None:
        """Log how many files were registered since the last such line."""
        with self._counting:
            files, self._unsaid_files = self._unsaid_files, 0
        if files:
            self._said["registered"] = self._monotonic()
            self.log("info", "registered", f"registered {files} files", files=files, path=self.last_file)

    def useless(self, reason: str, sender: str) -> None:
        """Count a datagram of host `sender` that is no message; the log gets one line a minute about them."""
        self.malformed[reason] += 1
        self._useless[reason] += 1
        if sender in self._useless_senders or len(self._useless_senders) < _SENDERS_MAX:
            self._useless_senders[sender] += 1
        if self._monotonic() - self._said["dropped"] >= DIGEST_S:
            self._say_useless()

    def _say_useless(self) -> None:
        count = self._useless.total()
        reasons = ", ".join(f"{reason}: {number}" for reason, number in self._useless.most_common())
        senders = ", ".join(f"{sender}: {number}" for sender, number in self._useless_senders.most_common(5))
        text = f"{count} datagrams were dropped ({reasons}); most came from {senders}"
        self.log("warn", "dropped", text, count=count, sender=self._useless_senders.most_common(1)[0][0])
        self._useless.clear()
        self._useless_senders.clear()
        self._said["dropped"] = self._monotonic()

    def repeated(self, level: str, event: str, text: str, **keys: object) -> None:
        """Log a line of which there may be many: of each event one a minute is written, the others are counted."""
        if self._monotonic() - self._said[event] < DIGEST_S:
            held = self._unsaid.get(event)
            self._unsaid[event] = _Held(held.number + 1 if held else 1, level, text, keys)
        else:
            self._said[event] = self._monotonic()
            self.log(level, event, text, **keys)

    def digest(self) -> None:
        """Log what was held back and is due, and end the conditions that are over; to be called each second."""
        self.say_registered()
        now = self._monotonic()
        if self._useless and now - self._said["dropped"] >= DIGEST_S:
            self._say_useless()
        for event in [event for event in self._unsaid if now - self._said[event] >= DIGEST_S]:
            count, level, text, keys = self._unsaid.pop(event)
            self._said[event] = now
            text = f"{count} more like this in the last minute, the latest: {text}"
            self.log(level, event, text, count=count, **keys)
        for name in [name for name, condition in list(self._conditions.items()) if condition.until <= now]:
            self.cured(name, f"it is over: {name}")

    def log(self, level: str, event: str, text: str, **keys: object) -> None:
        """Log a line about an event; what is worse than info is kept among the last problems, too."""
        if level != "info" and event not in events.AT_WILL:
            self._problems.append({"time": self._clock(), "text": _bounded(text)})
        self._say(level, events.line(event, text, keys))

    def reporter(self, level: str, event: str) -> Callable[[str], None]:
        """Return what logs a text about that event."""
        return functools.partial(self.log, level, event)

    def data(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """Build what these counters tell of ``session.data``; `counts` are the spool's, of one moment."""
        settling = counts["registered"]  # registered, and still in the spool
        return {
            "timestamp": self._clock(),
            "degraded": {name: condition.reason for name, condition in self._conditions.copy().items()},
            "datagrams": {"total": self.datagrams.total(), "bytes": self.bytes, "by_type": dict(self.datagrams)},
            "malformed": dict(self.malformed),
            "refused": dict(self.refused),
            "unpublished": dict(self.unpublished),
            "files": {
                "received": counts["received"],
                "registered": counts["settled"] + settling,
                "pending": counts["pending"],
                "waiting": counts["waiting"],
                "dead": counts["dead"],
                "discarded": counts["discarded"],
                "settling": settling,
                "last": _bounded(self.last_file),
                "last_time": self.last_time,
            },
            "database": self.writes.data(),
            "streams": self.streams.data(),
            "problems": list(self._problems),
        }


def _bounded(text: str) -> str:
    """Keep a text of senders' making from taking more than `_MAX_TEXT` bytes of JSON."""
    if len(text) < _MAX_TEXT // 12 or len(json.dumps(text)) <= _MAX_TEXT:  # 12 is what a character can take
        return text
    return brief(text, _MAX_TEXT // (2 if text.isascii() else 12))
