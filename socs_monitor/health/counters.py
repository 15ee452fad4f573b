"""Counts what arrived and what became of it, since the start of the agent."""

from __future__ import annotations

from collections import Counter

from socs_monitor.health.activity import StreamActivity, WriteTimes


class Counters:
    """The counters. Safe to update from any thread.

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

    def __init__(self, streams: StreamActivity, writes: WriteTimes) -> None:
        self.datagrams: Counter[str] = Counter()
        self.bytes = 0
        self.malformed: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.unpublished: Counter[str] = Counter()
        self.last: tuple[str, float | None] = ("", None)
        self.streams = streams
        self.writes = writes
