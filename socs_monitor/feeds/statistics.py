"""The feed ``monitor_stats``: the figures that alerts need, as numbers.

It is recorded, but not by the aggregator. No name on it contains ``_meta``, by which readers recognise metadata.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ocs.ocs_feed import Feed

FEED = "monitor_stats"

# Seconds between two messages.
INTERVAL_S = 10.0

_FILES = ("received", "registered", "pending", "waiting", "settling", "dead", "discarded")

# Fields of the block, and their places in the session data. A place with counts by reason is published as their sum.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "datagrams": ("datagrams", "total"),
    "bytes": ("datagrams", "bytes"),
    "malformed": ("malformed",),
    "refused": ("refused",),
    "unpublished": ("unpublished",),
    "lost_gaps": ("lost", "gaps"),
    "lost_kernel": ("lost", "kernel"),
    "rebinds": ("socket", "rebinds"),
    "listening": ("socket", "listening"),
    "receive_buffer": ("socket", "buffer"),
    **{f"files_{count}": ("files", count) for count in _FILES},
    "queue_depth": ("queue", "depth"),
    "queue_oldest": ("queue", "oldest"),
    "database_write": ("database", "write"),
    "database_write_max": ("database", "write_max"),
    "database_errors": ("database", "errors"),
    "spool_bytes": ("spool", "bytes"),
    "spool_max_bytes": ("spool", "max_bytes"),
    "degraded": ("degraded",),
}

# Number of streams that get a block. Streams without a file get at most half of them.
MAX_STREAMS = 100


def numbers(data: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the block's fields for a session data."""
    return {field: _number(data, place) for field, place in FIELDS.items()}


def _number(data: Mapping[str, Any], place: tuple[str, ...]) -> int | float:
    value: Any = data
    for key in place:
        value = value[key]
    if isinstance(value, dict):
        return int(bool(value)) if place == ("degraded",) else sum(value.values())
    return int(value) if isinstance(value, bool) else value


class StatsFeed:
    """Publishes the feed, in the reactor's thread.

    Args:
        agent: The OCSAgent.
        data: Returns the session data.
        files: Returns the number of files registered since the start, by stream.
        clock: Returns unix time.
    """

    def __init__(
        self,
        agent: Any,
        data: Callable[[], Mapping[str, Any]],
        files: Callable[[], Mapping[str, int]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._agent = agent
        self._data = data
        self._files = files
        self._clock = clock
        self._streams: dict[str, str] = {}  # field to stream
        # with a shorter buffer time, OCS would publish each block by itself; `publish` flushes them together
        self._feed = agent.register_feed(
            FEED, record=True, agg_params={"exclude_aggregator": True}, buffer_time=2 * INTERVAL_S
        )

    def publish(self) -> None:
        """Publish the present figures, unless the router is away."""
        if not self._agent.realm_joined:
            return
        self._add(FEED, numbers(self._data()))
        for stream, files in self._files().items():
            field = self._field(stream, files)
            if field is not None:
                self._add("stream_" + field.removeprefix("registered_"), {field: files})
        self._feed.flush_buffer()
        self._feed.buffer_start_time = None

    def _add(self, block: str, fields: Mapping[str, int | float]) -> None:
        message = {"block_name": block, "timestamp": self._clock(), "data": fields}
        self._agent.publish_to_feed(FEED, message, from_reactor=True)

    def _field(self, stream: str, files: int) -> str | None:
        """Return the field of a stream; None if its name is invalid or taken, or if there are too many streams."""
        field: str = Feed.enforce_field_name_rules(f"registered_{stream}")
        if "_meta" in field or field == "registered_":
            return None
        if field not in self._streams and len(self._streams) >= (MAX_STREAMS if files else MAX_STREAMS // 2):
            return None
        return field if self._streams.setdefault(field, stream) == stream else None
