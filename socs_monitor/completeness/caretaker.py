"""Correction of rows that SupRsync cannot finish.

A row is stuck if SupRsync failed to copy its file or takes it for removed, while the two sums differ: after
`MAX_COPY_ATTEMPTS` failures, or with ``removed`` set, SupRsync never copies it, and ``finalized_until`` stays before it
forever. This happens where SupRsync commits what it read before a reset, where a file was overwritten without an
announcement, and in rows of the published agent. The caretaker gives such rows the present content of their files.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from socs_monitor.health.health import Health
from socs_monitor.registration.work import FailedLarge, HashedLarge
from socs_monitor.suprsync.database import Database, DatabaseUnavailableError
from socs_monitor.suprsync.upsert import Correction, needs_retry, plan_correction

# Seconds between two passes. The first one comes sooner, but leaves the start to the registrations.
INTERVAL_S = 60.0
FIRST_S = 5.0

# Seconds for which a row whose file did not change is left alone: failed copies are tried again, and files hashed
# again, no more often.
RETRY_S = 3600.0

# Rows read, and then corrected, by one statement and one transaction.
_BATCH = 100

# Rows remembered for `RETRY_S`, some 200 bytes each.
_REMEMBERED = 50_000

# Lines of the log about the corrections of one pass.
_LINES = 20

# Seconds that a stop waits for the thread, which a hanging disk may hold.
_STOP_S = 0.9


class StoppedError(Exception):
    """The caretaker was stopped during a pass."""


HashFile = Callable[[str, Callable[[], bool]], HashedLarge | FailedLarge | None]
"""Hashes the file at a path; returns None soon after its second argument has returned true."""


class Caretaker:
    """Looks at stuck rows every minute, in a thread of its own between `start` and `stop`.

    Args:
        database: Its own connection; closed at the end of the thread.
        hash_file: Hashes a file.
        health: Counts and logs corrections.
        monotonic: Gives seconds of a clock that never steps.
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
        self._checked: dict[tuple[int, str, bool], float] = {}  # in the order of their times
        self._gone = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="caretaker", daemon=True)

    def start(self) -> None:
        """Start the thread; once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread within a second. A hanging disk may hold it longer; it then does nothing more."""
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
                    pass  # the next pass does it; the registrar reports the database
                except Exception as error:  # noqa: BLE001 (the thread must live)
                    text = f"correcting rows failed: {error!r}. It is tried again every minute; please report it"
                    self._health.log.log_throttled("error", "internal_error", text)
        finally:
            self._database.close()

    def run_pass(self) -> int:
        """Look at all stuck rows once; return how many were corrected.

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
                key = row.id, row.local_md5sum, needs_retry(row)
                if key in self._checked:
                    continue
                if self._stopping.is_set():
                    raise StoppedError(row.local_path)
                found = self._hash_file(row.local_path, self._stopping.is_set)
                if found is None:
                    raise StoppedError(row.local_path)
                if isinstance(found, HashedLarge):
                    if (correction := plan_correction(row, found.md5)) is not None:
                        corrections.append(correction)
                    else:
                        self._checked[key] = self._monotonic()
                elif found.missing:
                    gone += 1
                    last_gone = row.local_path
            if corrections:
                corrected += self._correct(corrections, corrected)
        if corrected > _LINES:
            self._health.log.log("info", "corrected", f"corrected {corrected} rows in one pass", count=corrected)
        self._report_gone(gone, last_gone)
        return corrected

    def _correct(self, corrections: list[Correction], before: int) -> int:
        """Write corrections; return how many were written, `before` is how many were in this pass already."""
        now = self._monotonic()
        done = {row.id for row in self._database.correct(corrections)}
        number = before
        for correction in corrections:
            row = correction.row
            if row.id not in done:  # SupRsync is at it, or another path holds its place
                self._checked[row.id, row.local_md5sum, needs_retry(row)] = now
                continue
            self._checked[row.id, correction.local_md5sum, True] = now
            if (number := number + 1) <= _LINES:
                same = correction.local_md5sum == row.local_md5sum
                why = "SupRsync had given it up" if same else "the file has other content than its row"
                text = f"{why}; SupRsync copies it again: {row.local_path}"
                self._health.log.log("info", "corrected", text, path=row.local_path, archive=row.archive_name)
        self._health.counters.writes.corrected += len(done)
        return len(done)

    def _report_gone(self, gone: int, path: str) -> None:
        if gone > self._gone:
            rows = "1 row waits" if gone == 1 else f"{gone} rows wait"
            text = (
                f"{rows} for a copy of a file that is gone, among them {path}. SupRsync reports nothing later as final."
                " Put the file back, or set ignore to 1 in its row"
            )
            self._health.log.log("warn", "row_without_file", text, count=gone, path=path)
        self._gone = self._health.counters.writes.row_without_file = gone

    def _forget(self) -> None:
        until = self._monotonic() - RETRY_S
        for key in list(self._checked):
            if self._checked[key] > until and len(self._checked) <= _REMEMBERED:
                break
            del self._checked[key]
