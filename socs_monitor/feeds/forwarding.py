"""Publishes session messages and metadata on OCS feeds.

``pysmurf_session_data`` carries the envelopes of ``session_data`` and ``session_log`` unmodified (contract: the
pysmurf-controller reads them). The ``<stream_id>_meta`` feeds are recorded, with one block per register. OCS flushes
their buffers only with the next message, so `Feeds` flushes them by a timer, by size, and at the end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ocs.ocs_feed import Feed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall

from socs_monitor.feeds.fields import FieldError, Streams, Value
from socs_monitor.health.health import Health
from socs_monitor.wire import messages
from socs_monitor.wire.messages import Metadata, SessionMessage
from socs_monitor.wire.text import plural

SESSION_FEED = "pysmurf_session_data"

# Seconds for which recorded data may stay in OCS's buffer.
BUFFER_S = 1

# Bytes at which such a buffer is flushed. The transport refuses messages of more than 1 MiB. The last sample may add
# three times the 64 kB of a datagram, as JSON text in which two bytes become an escape of six.
BUFFER_BYTES = 256_000

# Bytes of a sample without its value and field name: the block's keys, time and number.
_SAMPLE_BYTES = 100

# Bytes of datagrams published while the router reads nothing. autobahn keeps them in memory, without a limit.
IN_FLIGHT_MAX = 16 << 20

# Session messages kept while the router is away; a controller has no use for old ones. They are kept as bytes, because
# parsed messages can take 28 times as much memory.
BACKLOG_MAX = 1000
BACKLOG_BYTES = 16 << 20
BACKLOG_AGE_S = 300.0

_NO_ROUTER = "session messages: no router"


class _Flow:
    """Tells whether the router reads what is published: a push producer (Twisted's IPushProducer) of the connection."""

    def __init__(self) -> None:
        self._paused = False
        self._in_flight = 0  # bytes published while paused

    def pauseProducing(self) -> None:
        """Note that the transport's buffer is full."""
        self._paused = True

    def resumeProducing(self) -> None:
        """Note that the transport's buffer is empty."""
        self._paused = False
        self._in_flight = 0

    def stopProducing(self) -> None:
        """Note that the connection is lost, and its buffer with it."""
        self.resumeProducing()

    def reserve(self, size: int) -> bool:
        """Return whether this number of bytes may be published now; if so, count them."""
        if not self._paused:
            return True
        if self._in_flight + size > IN_FLIGHT_MAX:
            return False
        self._in_flight += size
        return True


@dataclass(slots=True)
class _Recorded:
    """A stream's feed, and the approximate size of its buffer in bytes."""

    feed: Feed
    bytes: int = 0


class Feeds:
    """Publishes on the feeds of an OCS agent, in the reactor's thread.

    Args:
        agent: The OCSAgent, or any object with its ``register_feed`` and ``publish_to_feed``.
        health: Counts what could not be published.
        monotonic: Returns seconds of CLOCK_MONOTONIC.
    """

    def __init__(self, agent: Any, health: Health, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._agent = agent
        self._health = health
        self._unpublished = health.counters.unpublished
        self._monotonic = monotonic
        self._backlog: deque[tuple[float, bytes]] = deque()
        self._backlog_bytes = 0
        self._flow = _Flow()
        self._streams = Streams(
            Feed.enforce_field_name_rules,
            lambda text: health.log.log_throttled("warn", "field", text),
            self._forget,
            self._widen,
        )
        self._recorded: dict[str, _Recorded] = {}  # by stream
        agent.register_feed(SESSION_FEED)

    def start(self, reactor: IReactorTime) -> None:
        """Flush buffers by a timer, and publish the backlog whenever the router is joined."""
        timer = LoopingCall(self.flush)
        timer.clock = reactor
        timer.start(BUFFER_S)
        self._agent.on("ready", lambda *_: self._joined())

    def _joined(self) -> None:
        self._flow.resumeProducing()
        self._agent.transport.transport.registerProducer(self._flow, True)  # of a websocket or a raw socket
        self._publish_backlog()

    def has_room(self, size: int) -> bool:
        """Return whether a datagram of `size` bytes may be published. A stalled connection keeps it in memory."""
        return self._flow.reserve(size)

    def session(self, message: SessionMessage, datagram: bytes) -> None:
        """Publish a session message, which arrived as `datagram`, as soon as the router is there."""
        if self._agent.realm_joined and not self._backlog:
            self._publish_session(message)
            return
        self._backlog.append((self._monotonic(), datagram))
        self._backlog_bytes += len(datagram)
        while len(self._backlog) > BACKLOG_MAX or self._backlog_bytes > BACKLOG_BYTES:
            self._take_oldest()
            self._unpublished[_NO_ROUTER] += 1
        self._publish_backlog()

    def _take_oldest(self) -> tuple[float, bytes]:
        since, datagram = self._backlog.popleft()
        self._backlog_bytes -= len(datagram)
        return since, datagram

    def _publish_backlog(self) -> None:
        while self._backlog and self._agent.realm_joined:
            since, datagram = self._take_oldest()
            if self._monotonic() - since > BACKLOG_AGE_S:
                self._unpublished[_NO_ROUTER] += 1
            else:
                self._publish_session(messages.parse(datagram))

    def _publish_session(self, message: messages.Message) -> None:
        try:
            self._agent.publish_to_feed(SESSION_FEED, message.envelope, from_reactor=True)
        except Exception as error:  # noqa: BLE001 (whatever it is, the next message may be accepted)
            self._count_refused(1, SESSION_FEED, error)

    def metadata(self, message: Metadata) -> None:
        """Publish the value of a register on its stream's feed. While the router is away, it is dropped and counted."""
        if not self._agent.realm_joined:
            self._unpublished["metadata: no router"] += 1
            return
        try:
            name, value = self._streams.field(message.stream_id, message.path, message.value, message.time)
        except FieldError as error:
            self._unpublished[f"metadata: {error}"] += 1
            return
        self._health.counters.streams.metadata(message.stream_id)
        recorded = self._recorded.get(message.stream_id)
        if recorded is None:
            feed = self._agent.register_feed(f"{message.stream_id}_meta", record=True, buffer_time=BUFFER_S)
            recorded = self._recorded[message.stream_id] = _Recorded(feed)
        block = {"block_name": name, "timestamp": message.time, "data": {name: value}}
        try:
            self._agent.publish_to_feed(recorded.feed.feed_name, block, from_reactor=True)
        except Exception as error:  # noqa: BLE001 (see _flush)
            self._drop_buffer(recorded, error)
            return
        if recorded.feed.buffer_start_time is None:  # OCS flushed the buffer with this sample
            recorded.bytes = 0
            return
        recorded.bytes += _SAMPLE_BYTES + 2 * len(name) + (len(value.encode()) if isinstance(value, str) else 0)
        if recorded.bytes >= BUFFER_BYTES:
            self._flush(recorded)

    def flush(self) -> None:
        """Publish the buffers of the recorded feeds."""
        if self._agent.realm_joined:
            for recorded in self._recorded.values():
                self._flush(recorded)

    def _flush(self, recorded: _Recorded) -> None:
        if recorded.feed.buffer_start_time is None:
            return
        try:
            recorded.feed.flush_buffer()
        except Exception as error:  # noqa: BLE001 (OCS would keep the buffer and try it again and again)
            self._drop_buffer(recorded, error)
        recorded.feed.buffer_start_time = None
        recorded.bytes = 0

    def _drop_buffer(self, recorded: _Recorded, error: Exception) -> None:
        """Empty the buffer of a feed that OCS, the serializer or the transport refused to publish."""
        samples = sum(len(block.timestamps) for block in recorded.feed.blocks.values())
        for block in recorded.feed.blocks.values():
            block.clear()
        recorded.feed.buffer_start_time = None
        recorded.bytes = 0
        self._count_refused(samples, recorded.feed.feed_name, error)

    def _count_refused(self, number: int, feed_name: str, error: Exception) -> None:
        self._unpublished["not taken by OCS"] += number
        text = f"OCS did not publish {plural(number, 'message')} on a feed: {error!r}"
        self._health.log.log_throttled("warn", "not_published", text, feed=feed_name)

    def _forget(self, stream_id: str) -> None:
        """Publish a stream's buffer, and remove its feed from OCS, which has no method for that."""
        recorded = self._recorded.pop(stream_id, None)
        if recorded is not None:
            self._flush(recorded)
            self._agent.feeds.pop(recorded.feed.feed_name, None)

    def _widen(self, field: str, kind: type[Value]) -> None:
        """Convert a field in all buffers. InfluxDB would refuse a whole batch with a new field in two types."""
        for recorded in self._recorded.values():
            block = recorded.feed.blocks.get(field)
            if block is not None:
                block.data[field] = [kind(value) for value in block.data[field]]
