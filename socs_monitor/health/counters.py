"""What arrived and what became of it, counted since the agent started."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable

from socs_monitor.health.activity import StreamActivity, WriteTimes


class Counters:
    """The counters. Safe to update from any thread.

    Args:
        clock: Returns unix time.
        monotonic: Returns seconds of CLOCK_MONOTONIC.

    Attributes:
        datagrams (Counter): Number of datagrams by message type.
        bytes (int): Their bytes.
        malformed (Counter): Number of datagrams that were not messages, by reason.
        refused (Counter): Number of registrations that could not be kept, by reason: these are lost.
        unpublished (Counter): Number of messages that reached no feed, by kind.
        last_file (str): Path of the file that was registered last.
        last_time (float): When that was, in unix time; None before the first.
        streams (StreamActivity): Files and metadata of each stream.
        writes (WriteTimes): How long the database takes.
    """

    def __init__(self, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.datagrams: Counter[str] = Counter()
        self.bytes = 0
        self.malformed: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.unpublished: Counter[str] = Counter()
        self.last_file = ""
        self.last_time: float | None = None
        self.streams = StreamActivity(clock, monotonic)
        self.writes = WriteTimes(monotonic)

    def count_registered(self, publishers: Iterable[str], path: str) -> None:
        """Count a batch whose rows were committed.

        Args:
            publishers: Who announced the files, one for each file that is new or changed.
            path: The last file.
        """
        with self._lock:
            self.last_file = path
            self.last_time = self._clock()
        self.streams.registered(publishers)
