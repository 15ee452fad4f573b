"""Counts what arrived and what became of it, since the start of the agent."""

from __future__ import annotations

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
        bytes (int): Total size of the datagrams.
        malformed (Counter): Number of datagrams that were not messages, by reason.
        refused (Counter): Number of registrations that could not be kept, by reason. These are lost.
        unpublished (Counter): Number of messages that were not published on a feed, by reason.
        last (tuple): Path of the latest registered file, and its unix time; None before the first.
        streams (StreamActivity): Files and metadata of each stream.
        writes (WriteTimes): How long database commits take.
    """

    def __init__(self, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.datagrams: Counter[str] = Counter()
        self.bytes = 0
        self.malformed: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.unpublished: Counter[str] = Counter()
        self.last: tuple[str, float | None] = ("", None)
        self.streams = StreamActivity(clock, monotonic)
        self.writes = WriteTimes(monotonic)

    def count_registered(self, publishers: Iterable[str], path: str) -> None:
        """Count a committed batch: the publisher id of each new or changed file, and the path of the last one."""
        self.last = (path, self._clock())
        self.streams.registered(publishers)
