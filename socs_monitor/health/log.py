"""A rate-limited log of events, and the last problems for ``session.data``. No sender can fill it."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from socs_monitor.health import events
from socs_monitor.wire.text import sanitize

# A text, or a function that returns it for a number of occurrences.
Text: TypeAlias = str | Callable[[int], str]

# Problems kept for ``session.data``; older ones are dropped.
MAX_PROBLEMS = 20

# Seconds between two lines of one event, unless the caller chooses another interval.
THROTTLE_S = 60.0

# Number of labels (reasons and senders) counted for one line, and number of labels shown.
_MAX_LABELS = 1000
_SHOWN_LABELS = 5

# Characters of a text in ``session.data``, which must stay below 100 kB (contract).
_MAX_ASCII, _MAX_WIDE = 500, 100


@dataclass
class _Throttle:
    """One event: when its last line was written, and what has been held back since."""

    interval: float
    last: float  # CLOCK_MONOTONIC
    held: int = 0
    level: str = ""
    text: Text = ""
    keys: Mapping[str, object] = field(default_factory=dict)
    labels: Counter[str] = field(default_factory=Counter)


class Log:
    """Writes one line per event, in the format of `events`. Safe to use from any thread.

    Args:
        write: Called with ``(level, line)``; levels are those of txaio.
        clock: Returns unix time.
        monotonic: Returns seconds of CLOCK_MONOTONIC.
    """

    def __init__(
        self,
        write: Callable[[str, str], None],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._clock = clock
        self._monotonic = monotonic
        self._problems: deque[dict[str, object]] = deque(maxlen=MAX_PROBLEMS)
        self._throttles: dict[str, _Throttle] = {}
        self._lock = threading.Lock()

    @property
    def problems(self) -> list[dict[str, object]]:
        """The last warnings and errors, newest last: ``time`` (unix time) and ``text``."""
        return list(self._problems)

    def log(self, level: str, event: str, text: str, **keys: object) -> None:
        """Write a line about an event (one of `events.EVENTS`)."""
        if level != "info" and event not in events.AT_WILL:
            self._problems.append({"time": self._clock(), "text": bounded(text)})
        self._write(level, events.line(event, text, keys))

    def reporter(self, level: str, event: str) -> Callable[[str], None]:
        """Return a function that logs its argument as that event."""
        return lambda text: self.log(level, event, text)

    def log_throttled(
        self,
        level: str,
        event: str,
        text: Text,
        *,
        count: int = 1,
        interval: float = THROTTLE_S,
        labels: Iterable[str] = (),
        **keys: object,
    ) -> None:
        """Write at most one line of an event per interval, and count the occurrences in between.

        Args:
            level: Level of the line.
            event: One of `events.EVENTS`.
            text: The text of this occurrence, or a function that returns it for a number of occurrences.
            count: Number of occurrences.
            interval: Seconds between two lines.
            labels: Reasons and senders. The line shows how often the most frequent ones occurred.
            keys: Keys of this occurrence. A line for several has the keys of the last one.
        """
        with self._lock:
            throttle = self._throttles.get(event)
            if throttle is None:
                throttle = self._throttles[event] = _Throttle(interval, -interval)
            is_first = not throttle.held
            throttle.held += count
            throttle.level, throttle.text, throttle.keys = level, text, keys
            for label in labels:
                if label in throttle.labels or len(throttle.labels) < _MAX_LABELS:
                    throttle.labels[label] += 1
        if self._monotonic() - throttle.last >= interval:
            self._flush(event, throttle, is_first)

    def flush(self, *, everything: bool = False) -> None:
        """Write the lines whose interval is over. With `everything`, as at a stop, write the others, too."""
        now = self._monotonic()
        for event, throttle in list(self._throttles.items()):
            if everything or now - throttle.last >= throttle.interval:
                self._flush(event, throttle)

    def _flush(self, event: str, throttle: _Throttle, is_first: bool = False) -> None:
        with self._lock:
            count, throttle.held = throttle.held, 0
            if not count:
                return
            level, text, keys = throttle.level, throttle.text, throttle.keys
            labels = throttle.labels.most_common(_SHOWN_LABELS)
            throttle.labels.clear()
            throttle.last = self._monotonic()
        if callable(text):
            text = text(count)
            keys = {"count": count, **keys}
        elif not is_first:
            text = f"{count} more like this in the last {throttle.interval:.0f} s, the latest: {text}"
            keys = {"count": count, **keys}
        if labels:
            text += f" ({', '.join(f'{label}: {number}' for label, number in labels)})"
        self.log(level, event, text, **keys)


def bounded(text: str) -> str:
    """Sanitize and shorten a text for ``session.data``: at most 1,200 bytes of JSON, since a character may take 12."""
    return sanitize(text, _MAX_ASCII if text.isascii() else _MAX_WIDE)
