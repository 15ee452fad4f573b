"""What the agent publishes: session messages and metadata, each on its OCS feed.

``pysmurf_session_data`` carries the envelopes of ``session_data`` and ``session_log`` unmodified (contract: the
pysmurf-controller reads them). ``<stream_id>_meta`` are recorded feeds, one block a register, buffered for a
second; OCS itself flushes such a buffer only with the next message, so `Feeds` does it by a timer and at the end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from autobahn.wamp.exception import Error as WampError
from ocs.ocs_feed import Feed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall

from socs_monitor.fields import FieldError, Streams
from socs_monitor.messages import Metadata, SessionMessage
from socs_monitor.stats import Stats

SESSION_FEED = "pysmurf_session_data"

# Seconds that recorded data may lie in OCS's buffer.
BUFFER_S = 1

# What publishing raises for a message that OCS, the serializer or the transport does not take.
_NOT_TAKEN = (WampError, RuntimeError, TypeError, ValueError, OverflowError)

# Session messages kept while the router is away: a controller has no use for old ones.
BACKLOG_MAX = 1000
BACKLOG_AGE_S = 300.0


class Feeds:
    """Publishes on the feeds of an OCS agent. For the reactor's thread.

    Args:
        agent: The OCSAgent, or whatever has its ``register_feed`` and ``publish_to_feed``.
        stats: Learns what could not be published.
        monotonic: Gives seconds of CLOCK_MONOTONIC.
    """

    def __init__(self, agent: Any, stats: Stats, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._agent = agent
        self._stats = stats
        self._monotonic = monotonic
        self._backlog: deque[tuple[float, dict[str, Any]]] = deque()
        self._streams = Streams(Feed.enforce_field_name_rules, lambda text: stats.repeated("warn", "field", text))
        self._recorded: dict[str, Any] = {}
        agent.register_feed(SESSION_FEED)

    def start(self, reactor: IReactorTime) -> None:
        """Flush by a timer from now on, and publish what waits whenever the router is joined."""
        timer = LoopingCall(self.flush)
        timer.clock = reactor
        timer.start(BUFFER_S)
        self._agent.on("ready", lambda *_: self._publish_backlog())

    def session(self, message: SessionMessage) -> None:
        """Publish a session message, at once or as soon as the router is there."""
        self._backlog.append((self._monotonic(), message.envelope))
        if len(self._backlog) > BACKLOG_MAX:
            self._backlog.popleft()
            self._stats.unpublished["session messages: no router"] += 1
        self._publish_backlog()

    def _publish_backlog(self) -> None:
        while self._backlog and self._router_joined():
            since, envelope = self._backlog.popleft()
            if self._monotonic() - since > BACKLOG_AGE_S:
                self._stats.unpublished["session messages: no router"] += 1
            else:
                self._publish(SESSION_FEED, envelope)

    def metadata(self, message: Metadata) -> None:
        """Publish the value of a register on its stream's feed; without a router it is dropped, and counted."""
        if not self._router_joined():
            self._stats.unpublished["metadata: no router"] += 1
            return
        try:
            name, value = self._streams.field(message.stream_id, message.path, message.value, message.time)
        except FieldError as error:
            self._stats.unpublished[f"metadata: {error.reason}"] += 1
            return
        self._stats.streams.metadata(message.stream_id)
        feed_name = f"{message.stream_id}_meta"
        if feed_name not in self._recorded:
            self._recorded[feed_name] = self._agent.register_feed(feed_name, record=True, buffer_time=BUFFER_S)
        block = {"block_name": name, "timestamp": message.time, "data": {name: value}}
        self._publish(feed_name, block)

    def _publish(self, feed_name: str, message: dict[str, Any]) -> None:
        try:
            self._agent.publish_to_feed(feed_name, message, from_reactor=True)
        except _NOT_TAKEN as error:
            self._stats.unpublished["not taken by OCS"] += 1
            self._stats.repeated(
                "warn", "not_published", f"a message for a feed could not be published: {error!r}", feed=feed_name
            )

    def flush(self) -> None:
        """Publish what lies in the buffers of the recorded feeds."""
        if self._router_joined():
            for feed in self._recorded.values():
                if feed.buffer_start_time is not None:
                    feed.flush_buffer()
                    feed.buffer_start_time = None

    def _router_joined(self) -> bool:
        return bool(self._agent.realm_joined)
