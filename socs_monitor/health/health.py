"""The agent's health: counters, conditions and log together, as the other packages use them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from socs_monitor.health.conditions import Conditions
from socs_monitor.health.counters import Counters
from socs_monitor.health.log import Log, bounded

# Seconds between two lines about registered files: a line per batch would be a tenth of the cost of a file.
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
        log (Log): The log.
    """

    def __init__(
        self,
        write: Callable[[str, str], None],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self.counters = Counters(clock, monotonic)
        self.log = Log(write, clock, monotonic)
        self.conditions = Conditions(self.log, monotonic)

    def count_registered(self, files: int, publishers: Iterable[str], path: str) -> None:
        """Count and log a batch whose rows were committed.

        Args:
            files: Number of registrations.
            publishers: Who announced the files, one for each file that is new or changed.
            path: The last file.
        """
        self.counters.count_registered(publishers, path)
        self.log.log_throttled(
            "info",
            "registered",
            lambda count: f"registered {count} file{'' if count == 1 else 's'}",
            count=files,
            interval=REGISTERED_S,
            path=path,
        )

    def count_malformed(self, reason: str, sender: str) -> None:
        """Count and log a datagram of a host that is not a message."""
        self.counters.malformed[reason] += 1
        self.log.log_throttled(
            "warn",
            "dropped",
            lambda count: f"dropped {count} datagram{'' if count == 1 else 's'}",
            labels=(reason, sender),
            sender=sender,
        )

    def tick(self) -> None:
        """Write the log lines that are due, and end the conditions whose time is over. Called every second."""
        self.log.flush()
        self.conditions.expire()

    def data(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """Return this part of ``session.data``; `counts` are the spool's, of one moment."""
        counters = self.counters
        settling = counts["registered"]  # registered, and still in the spool
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
                "last": bounded(counters.last_file),
                "last_time": counters.last_time,
            },
            "database": counters.writes.data(),
            "streams": counters.streams.data(),
            "problems": self.log.problems,
        }
