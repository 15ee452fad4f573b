"""The agent's health, as the commands print it."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

from socs_monitor.wire.text import sanitize


class State(enum.Enum):
    """The agent's health. The value is the exit code of `socs-monitor status`."""

    ALL_WELL = 0
    UNKNOWN = 1
    DEGRADED = 3
    NOT_RUNNING = 4

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


class Health(NamedTuple):
    """The agent's health, and the data it is derived from.

    Attributes:
        state: The health in one word.
        reasons: Reason for each condition.
        note: Source of the data if the agent did not answer, otherwise empty.
        data: ``session.data`` of `run`, as far as it is known.
    """

    state: State
    reasons: dict[str, str]
    note: str
    data: dict[str, Any]

    def line(self) -> str:
        """Return state, reasons and note on one line."""
        parts = [f"{condition}: {reason}" for condition, reason in self.reasons.items()]
        return sanitize("; ".join(part.rstrip(".") for part in (str(self.state), *parts, self.note) if part), None)

    def json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {**self._asdict(), "state": str(self.state)}
