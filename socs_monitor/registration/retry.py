"""Operations on the spool or the database that are repeated, with exponential backoff, until they succeed.

No list of pending operations is needed: the registrar waits in place, and a stop leaves the spool as the truth.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import TypeVar

from socs_monitor.health.health import Health
from socs_monitor.spool.file import SpoolError
from socs_monitor.spool.intake import SPOOL_ADVICE
from socs_monitor.suprsync.database import DatabaseUnavailableError

T = TypeVar("T")

_BACKOFF_FIRST_S = 0.05
_BACKOFF_MAX_S = 2.0


class StoppedError(Exception):
    """Work that takes long was stopped. Nothing is lost: a later run repeats it."""


class Retry:
    """Repeats operations, and keeps the conditions ``spool_update`` and ``database`` while they fail.

    Args:
        health: Takes the conditions.
        stopping: Set by a stop.
        wait: Waits for a number of seconds, or until the stop.
    """

    def __init__(self, health: Health, stopping: threading.Event, wait: Callable[[float], object]) -> None:
        self._conditions = health.conditions
        self._writes = health.counters.writes
        self._stopping = stopping
        self._wait = wait
        self._backoff_s = 0.0  # 0 unless the latest operation failed

    def __call__(self, operation: Callable[[], T]) -> T:
        """Return the result of an operation, once neither the spool nor the database makes it fail.

        Raises:
            StoppedError: If the registrar is stopped before.
        """
        while True:
            try:
                result = operation()
            except SpoolError as error:
                text = f"{error}. Nothing is lost, and the operation is retried. {SPOOL_ADVICE}"
                self._conditions.set_condition("spool_update", text)
            except DatabaseUnavailableError as error:
                self._writes.errors += 1
                text = f"{error}. Registrations are kept in the spool until it works again"
                self._conditions.set_condition("database", text)
            else:
                if self._backoff_s:
                    self._backoff_s = 0.0
                    self._conditions.clear_condition("spool_update", "the spool can be used again")
                    self._conditions.clear_condition("database", "the database can be used again")
                return result
            self._backoff_s = min(2 * self._backoff_s or _BACKOFF_FIRST_S, _BACKOFF_MAX_S)
            self._wait(self._backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 (jitter)
            self.check_stopped()

    def check_stopped(self) -> None:
        """Raise `StoppedError` if the registrar was stopped."""
        if self._stopping.is_set():
            raise StoppedError
