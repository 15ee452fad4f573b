"""What goes on, in figures: what each stream brings, and how long the database takes. Bounded, whatever senders do."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

from socs_monitor.wire.messages import brief, stream_of

# Streams told apart; where there are more, those without files give way, and the longest silent ones first.
MAX_STREAMS = 50

# Characters of a stream's name.
MAX_NAME = 40

_DAY_S = 86_400

# Seconds over which the longest write is told.
_WINDOW_S = 60


class _Stream:
    __slots__ = ("day", "files", "files_today", "heard", "last_file", "last_metadata")

    def __init__(self) -> None:
        self.files = 0
        self.day = 0
        self.files_today = 0
        self.last_file: float | None = None
        self.last_metadata: float | None = None
        self.heard = 0.0  # CLOCK_MONOTONIC

    @property
    def worth(self) -> tuple[bool, float]:
        return self.files > 0, self.heard


class StreamActivity:
    """Files and metadata of each stream. Safe to use from several threads.

    Args:
        clock: Gives unix time.
        monotonic: Gives seconds of CLOCK_MONOTONIC.
    """

    def __init__(self, clock: Callable[[], float], monotonic: Callable[[], float]) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._streams: dict[str, _Stream] = {}

    def registered(self, publishers: Iterable[str]) -> None:
        """Count a registered file for each of these publisher ids."""
        now = self._clock()
        today = int(now // _DAY_S)
        with self._lock:
            for publisher, files in Counter(publishers).items():
                stream = self._of(stream_of(publisher))
                if stream.day != today:
                    stream.day, stream.files_today = today, 0
                stream.files_today += files
                stream.files += files
                stream.last_file = now

    def metadata(self, stream_id: str) -> None:
        """Note that a register's value came of a stream."""
        with self._lock:
            self._of(stream_id).last_metadata = self._clock()

    def _of(self, stream_id: str) -> _Stream:
        name = stream_id if len(stream_id) <= MAX_NAME else brief(stream_id, MAX_NAME)
        stream = self._streams.get(name)
        if stream is None:
            if len(self._streams) >= MAX_STREAMS:
                del self._streams[min(self._streams, key=lambda known: self._streams[known].worth)]
            stream = self._streams[name] = _Stream()
        stream.heard = self._monotonic()
        return stream

    def data(self) -> dict[str, dict[str, Any]]:
        """Files of this day (UTC, and since the agent started) and the unix times of what came last, by stream."""
        today = int(self._clock() // _DAY_S)
        with self._lock:
            return {
                brief(name, MAX_NAME): {
                    "files_today": stream.files_today if stream.day == today else 0,
                    "last_file": stream.last_file,
                    "last_metadata": stream.last_metadata,
                }
                for name, stream in self._streams.items()
            }

    def files(self) -> dict[str, int]:
        """Number of files registered since the agent started, by stream."""
        with self._lock:
            return {name: stream.files for name, stream in self._streams.items()}


class WriteTimes:
    """How long the database's commits take.

    Args:
        monotonic: Gives seconds of CLOCK_MONOTONIC.

    Attributes:
        errors (int): How often the database could not be used.
        corrected (int): Number of corrections of rows that SupRsync could not finish.
        row_without_file (int): Number of rows that wait for a copy of a file that is gone, a minute ago at most.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self.corrected = 0
        self.row_without_file = 0
        self._longest: deque[tuple[int, float]] = deque(maxlen=_WINDOW_S)  # by second
        self._last = 0.0
        self.errors = 0

    def wrote(self, seconds: float) -> None:
        """Note that a commit took so long."""
        second = int(self._monotonic())
        if self._longest and self._longest[-1][0] == second:
            seconds_before = self._longest.pop()[1]
            self._longest.append((second, max(seconds, seconds_before)))
        else:
            self._longest.append((second, seconds))
        self._last = seconds

    def data(self) -> dict[str, float]:
        """Return the seconds of the last commit and of the longest within the last minute, and the counters."""
        since = self._monotonic() - _WINDOW_S
        recent = [seconds for second, seconds in self._longest.copy() if second >= since]
        return {
            "write": self._last,
            "write_max": max(recent, default=0.0),
            "errors": self.errors,
            "corrected": self.corrected,
            "row_without_file": self.row_without_file,
        }
