"""The conditions that keep files from being registered. While one holds, the agent is degraded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from socs_monitor.health.log import Log, bounded

# Seconds for which a missing file degrades the agent after its registration became a dead letter.
FILE_MISSING_S = 3600.0


class _Condition(NamedTuple):
    reason: str
    until: float  # CLOCK_MONOTONIC


class Conditions:
    """The conditions that hold, each with its reason. Safe to use from any thread.

    Args:
        log: Receives a line when a condition begins and when it ends.
        monotonic: Returns seconds of CLOCK_MONOTONIC.
    """

    def __init__(self, log: Log, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._monotonic = monotonic
        self._conditions: dict[str, _Condition] = {}

    def __bool__(self) -> bool:
        return bool(self._conditions)

    def reasons(self) -> dict[str, str]:
        """Return the reason of each condition."""
        return {name: condition.reason for name, condition in self._conditions.copy().items()}

    def set_condition(self, name: str, reason: str, **keys: object) -> None:
        """Begin a condition and log it, or update its reason: what happened, what it means, what to do."""
        begins = name not in self._conditions
        self._conditions[name] = _Condition(bounded(reason), math.inf)
        if begins:
            self._log.log("error", "degraded", reason, condition=name, **keys)

    def set_condition_for(self, name: str, reason: str, seconds: float) -> None:
        """Begin or prolong a condition that ends after some time. The caller logs the event that caused it."""
        self._conditions[name] = _Condition(bounded(reason), self._monotonic() + seconds)

    def clear_condition(self, name: str, text: str) -> None:
        """End a condition; `text` is logged if it held."""
        if self._conditions.pop(name, None) is not None:
            self._log.log("info", "recovered", text, condition=name)

    def evaluate_condition(self, name: str, holds: bool, reason: str, cleared: str) -> None:
        """Begin or update a condition if it holds, otherwise end it; `cleared` is logged at its end."""
        (self.set_condition if holds else self.clear_condition)(name, reason if holds else cleared)

    def forget(self, *names: str) -> None:
        """Clear conditions whose state is unknown, without logging."""
        for name in names:
            self._conditions.pop(name, None)

    def expire(self) -> None:
        """End the conditions whose time is over."""
        now = self._monotonic()
        for name, condition in self._conditions.copy().items():
            if condition.until <= now:
                self.clear_condition(name, f"{name}: cleared")
