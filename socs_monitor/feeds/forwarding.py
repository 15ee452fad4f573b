"""What the agent publishes: session messages and metadata, each on its OCS feed.

``pysmurf_session_data`` carries the envelopes of ``session_data`` and ``session_log`` unmodified (contract: the
pysmurf-controller reads them). ``<stream_id>_meta`` are recorded feeds, one block a register, buffered for a
second or `BUFFER_BYTES`; OCS itself flushes such a buffer only with the next message, so `Feeds` does it by a timer and
at the end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ocs.ocs_feed import Feed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall

from socs_monitor.feeds.fields import FieldError, Streams, Value
from socs_monitor.health.health import Health
from socs_monitor.wire import messages
from socs_monitor.wire.messages import Metadata, SessionMessage

SESSION_FEED = "pysmurf_session_data"

# Seconds that recorded data may lie in OCS's buffer.
BUFFER_S = 1

# Bytes in such a buffer from which it is flushed: the transport takes messages of up to 1 MiB and refuses larger ones.
# The last sample may bring three times the 64 kB of a datagram, as JSON text that escapes two bytes with six.
BUFFER_BYTES = 256_000

# Bytes of a sample beside its field's name, which it may bring twice, and its text: a block's keys, time and number.
_SAMPLE_BYTES = 100

# Bytes of datagrams published while the router takes nothing: autobahn keeps them in memory, whatever their number.
IN_FLIGHT_MAX = 16 << 20

# Session messages kept while the router is away: a controller has no use for old ones. They are kept as bytes, since
# the objects of a message can take 28 times as much.
BACKLOG_MAX = 1000
BACKLOG_BYTES = 16 << 20
BACKLOG_AGE_S = 300.0


class _Flow:
    """Whether the router takes what is published; a push producer (Twisted's IPushProducer) of the connection."""

    def __init__(self) -> None:
        self._paused = False
        self._in_flight = 0  # bytes published since the router takes nothing

    def pauseProducing(self) -> None:
        """Note that the transport's buffer is full."""
        self._paused = True

    def resumeProducing(self) -> None:
        """Note that the transport's buffer is empty."""
        self._paused = False
        self._in_flight = 0

    def stopProducing(self) -> None:
        """Note that the connection is lost, and with it the buffer."""
        self.resumeProducing()

    def takes(self, size: int) -> bool:
        """Whether so many bytes may be published now; they are counted then."""
        if not self._paused:
            return True
        if self._in_flight + size > IN_FLIGHT_MAX:
            return False
        self._in_flight += size
        return True


class Feeds:
    """Publishes on the feeds of an OCS agent. For the reactor's thread.

    Args:
        agent: The OCSAgent, or whatever has its ``register_feed`` and ``publish_to_feed``.
        health: Learns what could not be published.
        monotonic: Gives seconds of CLOCK_MONOTONIC.
    """

    def __init__(self, agent: Any, health: Health, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._agent = agent
        self._health = health
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
        """Flush by a timer from now on, and publish what waits whenever the router is joined."""
        timer = LoopingCall(self.flush)
        timer.clock = reactor
        timer.start(BUFFER_S)
        self._agent.on("ready", lambda *_: self._joined())

    def _joined(self) -> None:
        self._flow.resumeProducing()
        self._agent.transport.transport.registerProducer(self._flow, True)  # of a websocket or a raw socket
        self._publish_backlog()

    def has_room(self, size: int) -> bool:
        """Whether a datagram of so many bytes may be published: a stalled connection would keep it in memory."""
        return self._flow.takes(size)

    def session(self, message: SessionMessage, datagram: bytes) -> None:
        """Publish a session message, at once or as soon as the router is there; `datagram` is what it came as."""
        if self._router_joined() and not self._backlog:
            self._publish(SESSION_FEED, message.envelope)
            return
        self._backlog.append((self._monotonic(), datagram))
        self._backlog_bytes += len(datagram)
        while len(self._backlog) > BACKLOG_MAX or self._backlog_bytes > BACKLOG_BYTES:
            self._take_oldest()
            self._health.counters.unpublished["session messages: no router"] += 1
        self._publish_backlog()

    def _take_oldest(self) -> tuple[float, bytes]:
        since, datagram = self._backlog.popleft()
        self._backlog_bytes -= len(datagram)
        return since, datagram

    def _publish_backlog(self) -> None:
        while self._backlog and self._router_joined():
            since, datagram = self._take_oldest()
            if self._monotonic() - since > BACKLOG_AGE_S:
                self._health.counters.unpublished["session messages: no router"] += 1
            else:
                self._publish(SESSION_FEED, messages.parse(datagram).envelope)

    def metadata(self, message: Metadata) -> None:
        """Publish the value of a register on its stream's feed; without a router it is dropped, and counted."""
        if not self._router_joined():
            self._health.counters.unpublished["metadata: no router"] += 1
            return
        try:
            name, value = self._streams.field(message.stream_id, message.path, message.value, message.time)
        except FieldError as error:
            self._health.counters.unpublished[f"metadata: {error.reason}"] += 1
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
            self._drop(recorded, error)
            return
        if recorded.feed.buffer_start_time is None:  # it was flushed with this sample
            recorded.bytes = 0
            return
        recorded.bytes += _SAMPLE_BYTES + 2 * len(name) + (len(value.encode()) if isinstance(value, str) else 0)
        if recorded.bytes >= BUFFER_BYTES:
            self._flush(recorded)

    def _publish(self, feed_name: str, message: dict[str, Any]) -> None:
        try:
            self._agent.publish_to_feed(feed_name, message, from_reactor=True)
        except Exception as error:  # noqa: BLE001 (whatever it is, the next message may be taken)
            self._count_refused(1, feed_name, error)

    def flush(self) -> None:
        """Publish what lies in the buffers of the recorded feeds."""
        if self._router_joined():
            for recorded in self._recorded.values():
                self._flush(recorded)

    def _flush(self, recorded: _Recorded) -> None:
        feed = recorded.feed
        if feed.buffer_start_time is None:
            return
        try:
            feed.flush_buffer()
        except Exception as error:  # noqa: BLE001 (OCS would keep the buffer, and refuse it again for ever)
            self._drop(recorded, error)
        feed.buffer_start_time = None
        recorded.bytes = 0

    def _drop(self, recorded: _Recorded, error: Exception) -> None:
        """Empty the buffer of a feed that OCS, the serializer or the transport refused to publish."""
        samples = 0
        for block in recorded.feed.blocks.values():
            samples += len(block.timestamps)
            block.clear()
        recorded.feed.buffer_start_time = None
        recorded.bytes = 0
        self._count_refused(samples, recorded.feed.feed_name, error)

    def _count_refused(self, number: int, feed_name: str, error: Exception) -> None:
        self._health.counters.unpublished["not taken by OCS"] += number
        text = f"could not publish {number} messages on a feed: {error!r}"
        self._health.log.log_throttled("warn", "not_published", text, feed=feed_name)

    def _forget(self, stream_id: str) -> None:
        """Publish what a stream has left, and take its feed from OCS, which has no method for that."""
        recorded = self._recorded.pop(stream_id, None)
        if recorded is not None:
            self._flush(recorded)
            self._agent.feeds.pop(recorded.feed.feed_name, None)

    def _widen(self, field: str, kind: type[Value]) -> None:
        """Convert what lies in the buffers: InfluxDB refuses a whole batch that has a new field in two types."""
        for recorded in self._recorded.values():
            block = recorded.feed.blocks.get(field)
            if block is not None:
                block.data[field] = [kind(value) for value in block.data[field]]

    def _router_joined(self) -> bool:
        return bool(self._agent.realm_joined)


class _Recorded:
    """A stream's feed, and about how many bytes lie in its buffer."""

    __slots__ = ("bytes", "feed")

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self.bytes = 0
