"""The agent's health: its counters, conditions and log, as the other packages use them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from socs_monitor.health.activity import StreamActivity, WriteTimes
from socs_monitor.health.conditions import Conditions
from socs_monitor.health.counters import Counters
from socs_monitor.health.log import Log, bounded
from socs_monitor.wire.text import plural

# Seconds between two lines about registered files. A line per batch would add 10 % to the cost of a file.
REGISTERED_S = 1.0


class Health:
    """Counters, conditions and log of an agent. Safe to use from any thread.

    Args:
        write: Called with ``(level, line)`` for each line of the log.
        clock: Returns unix time.
        monotonic: Returns seconds of CLOCK_MONOTONIC.

    Attributes:
        counters (Counters): What arrived and what became of it.
        conditions (Conditions): Why the agent is degraded.
        log (Log): The rate-limited log.
    """

    def __init__(
        self,
        write: Callable[[str, str], None],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self.counters = Counters(StreamActivity(clock, monotonic), WriteTimes(monotonic))
        self.log = Log(write, clock, monotonic)
        self.conditions = Conditions(self.log, monotonic)

    def count_registered(self, files: int, publishers: Iterable[str], path: str) -> None:
        """Count and log a committed batch.

        Args:
            files: Number of registrations.
            publishers: Publisher id of each file that is new or changed.
            path: The last file.
        """
        self.counters.last = (path, self._clock())
        self.counters.streams.registered(publishers)

        def text(count: int) -> str:
            return f"Registered {plural(count, 'file')}"

        self.log.log_throttled("info", "registered", text, count=files, interval=REGISTERED_S, path=path)

    def count_malformed(self, reason: str, sender: str) -> None:
        """Count and log a datagram that is not a message, or comes from a sender that is not allowed."""
        self.counters.malformed[reason] += 1

        def text(count: int) -> str:
            return f"Dropped {plural(count, 'datagram')}"

        self.log.log_throttled("warn", "dropped", text, labels=(reason, sender), sender=sender)

    def tick(self) -> None:
        """Write the log lines that are due and end expired conditions. Called every second."""
        self.log.flush()
        self.conditions.expire()

    def data(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """Return this part of ``session.data``. `counts` are the spool's counts at one moment."""
        counters = self.counters
        last_path, last_time = counters.last
        settling = counts["registered"]  # registered, and waiting for their re-check
        return {
            "timestamp": self._clock(),
            "degraded": self.conditions.reasons(),
            "datagrams": {
                "total": counters.datagrams.total(),
                "bytes": counters.bytes,
                "by_type": dict(counters.datagrams),
            },
            "malformed": dict(counters.malformed),
            "refused": dict(counters.refused),
            "unpublished": dict(counters.unpublished),
            "files": {
                "received": counts["received"],
                "registered": counts["settled"] + settling,
                "pending": counts["pending"],
                "waiting": counts["waiting"],
                "dead": counts["dead"],
                "discarded": counts["discarded"],
                "settling": settling,
                "last": bounded(last_path),
                "last_time": last_time,
            },
            "database": counters.writes.data(),
            "streams": counters.streams.data(),
            "problems": self.log.problems,
        }
