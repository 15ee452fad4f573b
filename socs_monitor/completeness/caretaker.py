"""Correction of stuck rows: those that are not verified, and that SupRsync failed to copy or takes for removed.

SupRsync never copies such a row after `MAX_COPY_ATTEMPTS` failures or with ``removed`` set, and ``finalized_until``
stays before it forever. Rows get stuck if SupRsync commits what it read before a reset, if a file is overwritten
without an announcement, or in the published agent. The caretaker gives them the present content of their files.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from socs_monitor.health.health import Health
from socs_monitor.registration.retry import StoppedError
from socs_monitor.registration.work import FailedLarge, HashedLarge
from socs_monitor.suprsync.database import Database, DatabaseUnavailableError
from socs_monitor.suprsync.upsert import Correction, Row, plan_correction

# Seconds between two passes, and before the first one, which leaves the start to the registrations.
INTERVAL_S = 60.0
FIRST_S = 5.0

# Seconds before a row whose file did not change is checked and corrected again.
RETRY_S = 3600.0

_BATCH = 100  # rows of a query, and corrections of a transaction
_MAX_CHECKED = 50_000  # rows remembered for `RETRY_S`, some 200 bytes each
_MAX_LINES = 20  # lines of the log about the corrections of a pass
_STOP_S = 0.9  # seconds that a stop waits for the thread, which a hanging disk may hold


HashFile = Callable[[str, Callable[[], bool]], HashedLarge | FailedLarge | None]
"""Hashes the file at a path; returns None soon after its second argument returned True."""


class Caretaker:
    """Corrects stuck rows every minute, in a thread of its own between `start` and `stop`.

    Args:
        database: A connection of its own. The thread closes it at its end.
        hash_file: Hashes a file.
        health: Counts and logs corrections.
        monotonic: Returns seconds of CLOCK_MONOTONIC.
    """

    def __init__(
        self,
        database: Database,
        hash_file: HashFile,
        health: Health,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._hash_file = hash_file
        self._health = health
        self._monotonic = monotonic
        self._checked: dict[tuple[int, str, bool], float] = {}  # states of rows, and when they were checked, by time
        self._gone = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="caretaker", daemon=True)

    def start(self) -> None:
        """Start the thread. May be called once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and return within a second. If a disk holds the thread longer, it then does nothing more."""
        self._stopping.set()
        self._thread.join(_STOP_S)

    def _run(self) -> None:
        delay = FIRST_S
        try:
            while not self._stopping.wait(delay):
                delay = INTERVAL_S
                try:
                    self.run_pass()
                except (DatabaseUnavailableError, StoppedError):
                    pass  # the next pass continues, and the registrar reports the database
                except Exception as error:  # noqa: BLE001 (the thread must live)
                    text = f"correcting rows failed: {error!r}. It is tried again every minute. Please report it"
                    self._health.log.log_throttled("error", "internal_error", text)
        finally:
            self._database.close()

    def run_pass(self) -> int:
        """Check all stuck rows once; return how many were corrected.

        Raises:
            DatabaseUnavailableError: If the database cannot be used now.
            StoppedError: If `stop` was called.
        """
        self._forget()
        corrected = gone = after = 0
        last_gone = ""
        while rows := self._database.stuck(after, _BATCH):
            after = rows[-1].id
            corrections: list[Correction] = []
            for row in rows:
                if _state(row) in self._checked:
                    continue
                found = self._hash(row.local_path)
                if isinstance(found, FailedLarge):
                    if found.missing:
                        gone += 1
                        last_gone = row.local_path
                elif correction := plan_correction(row, found.md5):
                    corrections.append(correction)
                else:
                    self._checked[_state(row)] = self._monotonic()
            if corrections:
                corrected += self._correct(corrections, _MAX_LINES - corrected)
        if corrected > _MAX_LINES:
            self._health.log.log("info", "corrected", f"corrected {corrected} rows in one pass", count=corrected)
        self._report_gone(gone, last_gone)
        return corrected

    def _hash(self, path: str) -> HashedLarge | FailedLarge:
        found = None if self._stopping.is_set() else self._hash_file(path, self._stopping.is_set)
        if found is None:
            raise StoppedError(path)
        return found

    def _correct(self, corrections: list[Correction], max_lines: int) -> int:
        """Correct rows, and log the first ones; return how many were corrected."""
        corrected = self._database.correct(corrections)
        now = self._monotonic()
        for number, correction in enumerate(corrected):
            row = correction.row
            self._checked[row.id, correction.local_md5sum, True] = now
            if number < max_lines:
                is_same = correction.local_md5sum == row.local_md5sum
                cause = "SupRsync had given the file up" if is_same else "the file changed after its row was written"
                text = f"{cause}. Corrected the row, so that SupRsync copies the file"
                self._health.log.log("info", "corrected", text, path=row.local_path, archive=row.archive_name)
        for correction in set(corrections).difference(corrected):
            # SupRsync has just written the row, or another path holds its place
            self._checked[_state(correction.row)] = now
        self._health.counters.writes.corrected += len(corrected)
        return len(corrected)

    def _report_gone(self, gone: int, path: str) -> None:
        if gone > self._gone:
            rows = "1 row waits" if gone == 1 else f"{gone} rows wait"
            text = (
                f"{rows} for the copy of a file that is gone, for example {path}. SupRsync reports nothing later as"
                " final. Put the file back, or set ignore to 1 in its row"
            )
            self._health.log.log("warn", "row_without_file", text, count=gone, path=path)
        self._gone = self._health.counters.writes.row_without_file = gone

    def _forget(self) -> None:
        """Forget what was checked long ago."""
        until = self._monotonic() - RETRY_S
        for state, checked in list(self._checked.items()):
            if checked > until and len(self._checked) <= _MAX_CHECKED:
                break
            del self._checked[state]


def _state(row: Row) -> tuple[int, str, bool]:
    """Return what a check of a row depends on, apart from its file."""
    return row.id, row.local_md5sum, row.is_abandoned
