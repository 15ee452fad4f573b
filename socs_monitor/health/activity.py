"""Activity per stream, and how long database commits take. The memory used is bounded, whatever senders write."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

from socs_monitor.wire.messages import stream_of
from socs_monitor.wire.text import sanitize

# Number of streams kept. When there are more, a stream without files is dropped first, then the longest silent one.
MAX_STREAMS = 50

# Characters of a stream's name.
MAX_NAME = 40

_DAY_S = 86_400

# Seconds for which the longest commit is reported.
_WINDOW_S = 60


@dataclasses.dataclass(slots=True)
class _Stream:
    files: int = 0
    day: int = 0
    files_today: int = 0
    last_file: float | None = None
    last_metadata: float | None = None
    heard: float = 0.0  # CLOCK_MONOTONIC


class StreamActivity:
    """Files and metadata of each stream. Safe to use from any thread.

    Args:
        clock: Returns unix time.
        monotonic: Returns seconds of CLOCK_MONOTONIC.
    """

    def __init__(self, clock: Callable[[], float], monotonic: Callable[[], float]) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._streams: dict[str, _Stream] = {}

    def registered(self, publishers: Iterable[str]) -> None:
        """Count one registered file for each of these publisher ids."""
        now = self._clock()
        today = int(now // _DAY_S)
        with self._lock:
            for publisher, files in Counter(publishers).items():
                stream = self._stream(stream_of(publisher))
                if stream.day != today:
                    stream.day, stream.files_today = today, 0
                stream.files_today += files
                stream.files += files
                stream.last_file = now

    def metadata(self, stream_id: str) -> None:
        """Note that a stream sent the value of a register."""
        with self._lock:
            self._stream(stream_id).last_metadata = self._clock()

    def _stream(self, stream_id: str) -> _Stream:
        name = sanitize(stream_id, MAX_NAME)
        stream = self._streams.get(name)
        if stream is None:
            if len(self._streams) >= MAX_STREAMS:
                del self._streams[min(self._streams, key=self._priority)]
            stream = self._streams[name] = _Stream()
        stream.heard = self._monotonic()
        return stream

    def _priority(self, name: str) -> tuple[bool, float]:
        stream = self._streams[name]
        return stream.files > 0, stream.heard

    def data(self) -> dict[str, dict[str, Any]]:
        """Return ``streams`` of the session data. A day is a UTC day; files count from the start of the agent."""
        today = int(self._clock() // _DAY_S)
        with self._lock:
            return {
                name: {
                    "files_today": stream.files_today if stream.day == today else 0,
                    "last_file": stream.last_file,
                    "last_metadata": stream.last_metadata,
                }
                for name, stream in self._streams.items()
            }

    def files(self) -> dict[str, int]:
        """Return the number of files registered since the start of the agent, by stream."""
        with self._lock:
            return {name: stream.files for name, stream in self._streams.items()}


class WriteTimes:
    """How long database commits take.

    Args:
        monotonic: Returns seconds of CLOCK_MONOTONIC.

    Attributes:
        errors (int): How often the database could not be used.
        corrected (int): Number of rows corrected because SupRsync could not finish them.
        row_without_file (int): Number of rows waiting for a copy of a missing file, updated every minute.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._last = 0.0
        self._longest: deque[tuple[int, float]] = deque(maxlen=_WINDOW_S)  # second, and its longest commit
        self.errors = 0
        self.corrected = 0
        self.row_without_file = 0

    def wrote(self, seconds: float) -> None:
        """Note the duration of a commit."""
        self._last = longest = seconds
        second = int(self._monotonic())
        if self._longest and self._longest[-1][0] == second:
            longest = max(seconds, self._longest.pop()[1])
        self._longest.append((second, longest))

    def data(self) -> dict[str, float]:
        """Return ``database`` of the session data: seconds of the last and the longest recent commit, and counters."""
        since = self._monotonic() - _WINDOW_S
        return {
            "write": self._last,
            "write_max": max((longest for second, longest in self._longest.copy() if second >= since), default=0.0),
            "errors": self.errors,
            "corrected": self.corrected,
            "row_without_file": self.row_without_file,
        }
