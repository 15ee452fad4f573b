"""Builds ``session.data``, and evaluates the conditions that follow from its figures.

`Report.update` is called in the reactor's thread every second, `Report.data` from any thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from socs_monitor.health.health import Health
from socs_monitor.health.logpipe import LogPipe
from socs_monitor.health.units import utc
from socs_monitor.spool.intake import Intake
from socs_monitor.spool.store import Spool
from socs_monitor.wire.receiver import Receiver
from socs_monitor.wire.sequences import Sequences
from socs_monitor.wire.text import plural

# Seconds for which lost messages degrade the agent.
LOSS_S = 300.0

# Fraction of its size above which the spool is nearly full.
NEARLY_FULL = 0.9

# Seconds for which a registration may wait for its row.
BACKLOG_S = 60.0


class Report:
    """Reports on all parts of the agent.

    Args:
        health: Counters and conditions.
        sequences: Counts lost messages.
        spool: The spool.
        intake: Measures the spool.
        monotonic: Returns seconds of CLOCK_MONOTONIC.

    Attributes:
        receiver (Receiver): The UDP port; None before it is opened.
        log (LogPipe): Where the log goes; None if there is no standard output.
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
        self._started = monotonic()
        self._dropped = 0
        self._lines_dropped = 0
        self._crowded_out = spool.crowded_out
        self.receiver: Receiver | None = None
        self.log: LogPipe | None = None

    def update(self) -> None:
        """Write the log lines that are due, and begin and end conditions."""
        self._health.tick()
        self._report_losses()
        if self.receiver is not None:
            self._check_socket(self.receiver)
        self._check_spool()
        self._report_discarded()
        if self.log is not None:
            self._report_dropped_lines(self.log)

    def _report_losses(self) -> None:
        for loss in self._sequences.settle():
            text = (
                f"Lost {plural(loss.lost, 'message')} from {loss.id} ({loss.sender}) at {utc(loss.last)} UTC. UDP"
                " cannot resend them. Register the timestream files that they announced. Run: socs-monitor backfill"
                " ROOT"
            )
            keys: dict[str, Any] = {"sender": loss.sender, "id": loss.id, "script": loss.script}
            self._health.log.log_throttled("warn", "messages_lost", text, **keys, lost=loss.lost)
            self._health.conditions.set_condition_for("messages_lost", text, LOSS_S)

    def _check_socket(self, receiver: Receiver) -> None:
        receiver.measure()
        if (dropped := receiver.dropped - self._dropped) > 0:
            if receiver.buffer < receiver.asked:
                advice = f"Allow a larger one and restart the agent. Run: sysctl -w net.core.rmem_max={receiver.asked}"
            else:
                advice = "Register the timestream files that they announced. Run: socs-monitor backfill ROOT"
            text = (
                f"The kernel dropped {plural(dropped, 'datagram')} because the receive buffer ({receiver.buffer} bytes)"
                f" was full. UDP cannot resend them. {advice}"
            )
            self._health.log.log_throttled("warn", "kernel_drops", text, dropped=dropped)
            self._health.conditions.set_condition_for("kernel_drops", text, LOSS_S)
        self._dropped = receiver.dropped
        self._health.conditions.evaluate_condition(
            "socket",
            not receiver.listening,
            f"UDP port {receiver.port} cannot be bound. Messages sent now are lost. The agent tries again every second;"
            " find the program that uses the port. Run: ss -ulpn",
            "The UDP port is bound again",
        )

    def _check_spool(self) -> None:
        size, max_bytes = self._intake.measured.bytes, self._spool.max_bytes
        self._health.conditions.evaluate_condition(
            "spool_size",
            size > NEARLY_FULL * max_bytes,
            f"The spool is nearly full: {size} of its {max_bytes} bytes. Once it is full, new registrations are refused"
            " and lost. Find out why files are not registered, or restart the agent with a larger --spool-size."
            " Run: socs-monitor failed list",
            "The spool has room again",
        )
        # what a stopped agent left behind is given BACKLOG_S from the start
        waited = min(self._age(), self._monotonic() - self._started)
        self._health.conditions.evaluate_condition(
            "backlog",
            waited > BACKLOG_S,
            f"A registration has waited {waited:.0f} s for its row. Nothing is lost, but files are registered too"
            " slowly or not at all. Check that run is running, and which other conditions hold. Run: socs-monitor"
            " status",
            "Registrations get their rows in time again",
        )

    def _report_discarded(self) -> None:
        """Report dead letters that were discarded because there was no room for them."""
        if discarded := self._spool.crowded_out - self._crowded_out:
            self._crowded_out += discarded
            text = (
                f"Discarded {plural(discarded, 'dead letter')} because there is no room for more. Refused ones are"
                " discarded first, then the oldest. Retry or discard the others. Run: socs-monitor failed list"
            )
            self._health.log.log_throttled("warn", "dead_letters", text, discarded=discarded)

    def _report_dropped_lines(self, log: LogPipe) -> None:
        """Report dropped lines of the log, as soon as it is being read again."""
        if (lines := log.dropped - self._lines_dropped) and not log.stuck:
            self._lines_dropped += lines
            text = (
                f"Dropped {plural(lines, 'line')} of this log because the program that reads the agent's standard"
                " output had stopped reading. Files were registered meanwhile. Check the log driver, or the program"
                " behind the pipe"
            )
            self._health.log.log_throttled("warn", "log_dropped", text, lines=lines)

    def _age(self) -> float:
        """Return the age of the oldest registration without a row, in seconds."""
        oldest = self._intake.measured.oldest
        if oldest is None or not self._spool.counts["pending"]:
            return 0.0
        return max(0.0, self._monotonic() - oldest)

    def data(self) -> dict[str, Any]:
        """Return the session data."""
        counts = self._spool.counts
        receiver = self.receiver
        lost = {
            "gaps": self._sequences.lost,
            "kernel": receiver.dropped if receiver else 0,
            "reordered": self._sequences.reordered,
            "senders": [loss._asdict() for loss in self._sequences.latest()],
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
