"""How the agent is: ``session.data``, and the conditions that the figures in it make.

`Report.look` is for the reactor's thread, each second; `Report.data` for any.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from socs_monitor.health.health import Health
from socs_monitor.health.logpipe import LogPipe
from socs_monitor.spool.intake import Intake
from socs_monitor.spool.store import Spool
from socs_monitor.wire.receiver import Receiver
from socs_monitor.wire.sequences import Sequences

# Seconds for which messages that were lost degrade the agent.
LOSS_S = 300.0

# Part of its size above which the spool is nearly full.
NEARLY_FULL = 0.9

# Seconds for which a registration may wait for its row.
OLDEST_S = 60.0

_LOST = (
    "A data_file among them cannot be asked for again. Missing timestreams are found and registered with: socs-monitor"
    " backfill ROOT"
)


class Report:
    """Looks at all parts of the agent.

    Args:
        health: Counters and conditions.
        sequences: Knows what senders lost.
        spool: The spool.
        intake: Measures it.
        monotonic: Gives seconds of CLOCK_MONOTONIC.

    Attributes:
        receiver (Receiver): The UDP port; None before there is one.
        log (LogPipe): Where the log goes; None where another program or nobody has it.
    """

    def __init__(
        self,
        health: Health,
        sequences: Sequences,
        spool: Spool,
        intake: Intake,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._health = health
        self._sequences = sequences
        self._spool = spool
        self._intake = intake
        self._monotonic = monotonic
        self._begin = monotonic()
        self._dropped = 0
        self._lines_dropped = 0
        self._crowded_out = spool.crowded_out
        self.receiver: Receiver | None = None
        self.log: LogPipe | None = None

    def look(self) -> None:
        """Log what is due, and let conditions begin and end."""
        self._health.tick()
        self._look_for_gaps()
        if self.receiver is not None:
            self._look_at_socket(self.receiver)
        self._look_at_spool()
        self._look_at_oldest()
        self._look_at_dead_letters()
        if self.log is not None:
            self._look_at_log(self.log)

    def _look_for_gaps(self) -> None:
        for loss in self._sequences.settle():
            when = datetime.fromtimestamp(loss.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            text = (
                f"{loss.lost} messages of {loss.sender} ({loss.id}, {loss.script}) were lost on their way at {when},"
                f" {self._sequences.lost} of all senders so far. {_LOST}"
            )
            keys: dict[str, Any] = {"sender": loss.sender, "id": loss.id, "script": loss.script}
            self._health.log.log_throttled("warn", "messages_lost", text, **keys, lost=loss.lost)
            self._health.conditions.set_condition_for("messages_lost", text, LOSS_S)

    def _look_at_socket(self, receiver: Receiver) -> None:
        health = self._health
        receiver.measure()
        if (dropped := receiver.dropped - self._dropped) > 0:
            text = (
                f"the kernel dropped {dropped} datagrams, {receiver.dropped} so far: they came faster than the agent"
                f" read them, and its receive buffer of {receiver.buffer} bytes was full. {_LOST}. See that the host is"
                f" not overloaded; where the buffer is below the {receiver.asked} bytes asked for: sysctl -w"
                f" net.core.rmem_max={receiver.asked}"
            )
            health.log.log_throttled("warn", "kernel_drops", text, dropped=dropped)
            health.conditions.set_condition_for("kernel_drops", text, LOSS_S)
        self._dropped = receiver.dropped
        if receiver.listening:
            health.conditions.clear_condition("socket", "the UDP port is bound again")
        else:
            health.conditions.set_condition(
                "socket",
                f"the UDP port {receiver.port} cannot be bound: no message arrives, and what is sent now is lost. It is"
                " tried again every second. Find out who has the port: ss -ulpn",
            )

    def _look_at_spool(self) -> None:
        bytes_, most = self._intake.measured.bytes, self._spool.max_bytes
        if bytes_ > NEARLY_FULL * most:
            self._health.conditions.set_condition(
                "spool_size",
                f"the spool has {bytes_} of its {most} bytes: when it is full, registrations are refused, and lost. See"
                " why files are not registered: the other conditions, and socs-monitor failed list. To take more in,"
                " start the agent with a larger --spool-size",
            )
        else:
            self._health.conditions.clear_condition("spool_size", "the spool has room again")

    def _look_at_oldest(self) -> None:
        # what a stopped agent left behind has a minute from the start
        waited = min(self._age(), self._monotonic() - self._begin)
        if waited > OLDEST_S:
            self._health.conditions.set_condition(
                "backlog",
                f"a registration waits for its row for {waited:.0f} s: files are not being registered, or slower than"
                " they come. Nothing is lost. See that the process run is running, and the other conditions; large"
                " files on a slow disk take their time",
            )
        else:
            self._health.conditions.clear_condition("backlog", "registrations get their rows in time again")

    def _look_at_dead_letters(self) -> None:
        """Report dead letters that were discarded for lack of room."""
        if discarded := self._spool.crowded_out - self._crowded_out:
            self._crowded_out += discarded
            text = (
                f"discarded {discarded} dead letters because there is no room for more, refused ones first, then the"
                " oldest. Look at the others, and discard them: socs-monitor failed list"
            )
            self._health.log.log_throttled("warn", "dead_letters", text, discarded=discarded)

    def _look_at_log(self, log: LogPipe) -> None:
        """Report lines that were dropped, as soon as the log is read again."""
        if (lines := log.dropped - self._lines_dropped) and not log.stuck:
            self._lines_dropped += lines
            text = (
                f"dropped {lines} lines of this log, {self._lines_dropped} so far: the program that reads the agent's"
                " standard output had stopped reading. Files were registered meanwhile. Check the log driver, or the"
                " program behind the pipe"
            )
            self._health.log.log_throttled("warn", "log_dropped", text, lines=lines)

    def _age(self) -> float:
        """Age of the oldest registration that has no row yet, in seconds."""
        oldest = self._intake.measured.oldest
        if oldest is None or not self._spool.counts["pending"]:
            return 0.0
        return max(0.0, self._monotonic() - oldest)

    def data(self) -> dict[str, Any]:
        """Build ``session.data``."""
        counts = self._spool.counts
        receiver = self.receiver
        lost = {
            "gaps": self._sequences.lost,
            "kernel": receiver.dropped if receiver else 0,
            "reordered": self._sequences.reordered,
            "senders": [
                {"sender": loss.sender, "id": loss.id, "script": loss.script, "lost": loss.lost, "last": loss.time}
                for loss in self._sequences.latest()
            ],
        }
        return {
            **self._health.data(counts),
            "lost": lost,
            "socket": {
                "buffer_asked": receiver.asked if receiver else 0,
                "buffer": receiver.buffer if receiver else 0,
                "rebinds": receiver.rebinds if receiver else 0,
                "listening": receiver is not None and receiver.listening,
            },
            "queue": {"depth": counts["pending"], "oldest": self._age()},
            "log": {"dropped": self.log.dropped if self.log else 0},
            "spool": {"bytes": self._intake.measured.bytes, "max_bytes": self._spool.max_bytes},
        }
