"""Intake, spool, registrar and database without OCS, all real, over one folder.

Unit tests run it step by step with an injected clock. The worker of the crash tests runs it in threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from socs_monitor.health.health import Health
from socs_monitor.registration.lookup import Policy
from socs_monitor.registration.parking import Parking
from socs_monitor.registration.registrar import Registrar
from socs_monitor.registration.retry import StoppedError
from socs_monitor.registration.workers import SMALL
from socs_monitor.spool.intake import BATCH, QUEUE_MAX, FileQueue, Intake
from socs_monitor.spool.records import Incoming
from socs_monitor.spool.states import STORED
from socs_monitor.spool.store import RECEIVED, Spool
from socs_monitor.suprsync.database import Database
from socs_monitor.wire import messages
from socs_monitor.wire.publisher import data_file
from tests.inline import InlineWorkers
from tests.testbed.processes import rows

SETTLE_S = Policy().settle_after

SENDER = "127.0.0.1:40000"

_mtime_ns = 1_700_000_000 * 10**9


class Clock:
    """A clock for unix time and, by its method `monotonic`, CLOCK_MONOTONIC. It stands still until it is advanced.

    Attributes:
        now: Unix time. Setting it steps only the wall clock.
    """

    def __init__(self) -> None:
        self.now = 1_700_000_000.0
        self._monotonic = 1000.0  # not long after a boot

    def __call__(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Advance both clocks."""
        self.now += seconds
        self._monotonic += seconds

    def advance_to(self, moment: float) -> None:
        """Advance both clocks to a time of CLOCK_MONOTONIC."""
        self.advance(moment - self._monotonic)

    def step(self, seconds: float) -> None:
        """Step only the wall clock, as an NTP daemon or a person does."""
        self.now += seconds


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def write_file(path: Path, content: bytes) -> str:
    """Write a file with an mtime that no other call uses, and return the MD5 sum of its content."""
    global _mtime_ns
    _mtime_ns += 10**9
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(_mtime_ns, _mtime_ns))  # the file system's own timestamps may be too coarse
    return md5(content)


@contextlib.contextmanager
def write_lock(db_path: str | Path) -> Iterator[sqlite3.Connection]:
    """Hold the write lock of a SQLite file. What is written through the connection is rolled back."""
    with contextlib.closing(sqlite3.connect(db_path, isolation_level=None, timeout=10)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection


def execute(db_path: str | Path, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
    """Execute and commit one statement on a SQLite file, as another program would."""
    with contextlib.closing(sqlite3.connect(db_path, isolation_level=None, timeout=10)) as connection:
        return connection.execute(statement, parameters).fetchall()


class Chain:
    """The whole path of a registration. `crash` ends it; `open` starts it again on the same files.

    Args:
        folder: Folder of the database, the spool and the folder ``files``.
        clock: Returns unix time.
        monotonic: Returns CLOCK_MONOTONIC, seconds.
        policy: Policy of the registrar.
        threads: Whether real threads read the files; otherwise each step does.
        small: Size up to which a step hashes a file, bytes.
        queue_max: Largest size of the registrations on the queue, bytes.
        batch: Registrations in a batch.
        busy_timeout: Timeout for a lock, seconds; None: as in the agent.
        limits: Further limits of the spool.

    Attributes:
        locked: Called when a step waits for the database or the spool. If it returns False, `step` raises
            `StoppedError`, as if the registrar had been stopped.
        waits: Duration of each of these waits, seconds.
        said: All log lines: level and text.
    """

    def __init__(
        self,
        folder: Path,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        policy: Policy | None = None,
        *,
        threads: bool = False,
        small: int = SMALL,
        queue_max: int = QUEUE_MAX,
        batch: int = BATCH,
        busy_timeout: float | None = None,
        **limits: Any,
    ) -> None:
        self.limits = limits if threads else {"reserve": 0, **limits}
        self._threads = threads
        self._queue_max = queue_max
        self._batch = batch
        self._timeout: dict[str, Any] = {} if busy_timeout is None else {"busy_timeout": busy_timeout}
        self._small = small
        self.locked: Callable[[], bool] = lambda: False
        self.db_path = folder / "suprsync.db"
        self.spool_path = folder / "spool"
        self.files = folder / "files"
        self.clock = clock
        self.monotonic = monotonic
        self.waits: list[float] = []
        self.said: list[tuple[str, str]] = []
        own = (os.path.realpath(self.db_path), os.path.realpath(self.spool_path))
        self._policy = dataclasses.replace(policy or Policy(), own=own)
        self.open()

    def open(self) -> None:
        """Start, as the agent does."""
        self.health = Health(lambda level, text: self.said.append((level, text)), self.clock, self.monotonic)
        limits = {**self.limits, **self._timeout}
        self.spool = Spool(str(self.spool_path), self.health.log.reporter("warn", "spool"), **limits)
        self.queue = FileQueue(self._queue_max)
        self.intake = Intake(self.spool, self.queue, self.health, self.clock, self.monotonic, batch=self._batch)
        self.database = Database(
            str(self.db_path),
            create_table=True,
            echo=False,
            report=self.health.log.reporter("warn", "database"),
            clock=self.clock,
            **self._timeout,
        )
        self.registrar = Registrar(
            self.intake,
            self.queue,
            self.spool,
            self.database,
            self.health,
            self._policy,
            lambda _: None,
            self.monotonic,
            batch=self._batch,
            **({} if self._threads else {"make_workers": self._workers, "wait": self._wait}),
        )

    def _workers(self, policy: Policy, parking: Parking, wake: Callable[[], None]) -> InlineWorkers:
        return InlineWorkers(policy, parking, wake, self._small)

    def _wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        if not self.locked():
            raise StoppedError

    @contextlib.contextmanager
    def lock_for(self, waits: int, path: Path, meanwhile: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Hold a SQLite file's write lock until a step has waited `waits` times, and call `meanwhile` each time."""
        with contextlib.ExitStack() as lock:
            lock.enter_context(write_lock(path))
            left = waits

            def locked() -> bool:
                nonlocal left
                left -= 1
                meanwhile()
                if left == 0:
                    lock.close()
                return left >= 0

            self.locked = locked
            yield
        assert left == 0, f"it waited {waits - left} times"

    def hash_large(self) -> None:
        """Hash the large files that were found."""
        workers = self.registrar.workers
        assert isinstance(workers, InlineWorkers)
        workers.hash_large()

    def crash(self) -> None:
        """End as a killed process does: memory is lost, locks are released, nothing more is written."""
        self.database.close()
        self.spool.close()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run the registrar in a thread. It is stopped at the end, which must take at most 2 s."""
        thread = threading.Thread(target=self.registrar.run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.registrar.stop()
            thread.join(2)
        assert not thread.is_alive()

    def reopen(self) -> None:
        """Crash, and start again."""
        self.crash()
        self.open()
        self.registrar.begin()

    def path(self, name: str) -> Path:
        return self.files / name

    def write(self, name: str, content: bytes) -> str:
        """Write a file in the folder of files, as `write_file` does."""
        return write_file(self.path(name), content)

    def accept(self, name: str, action: str = "act", **fields: Any) -> None:
        """Accept a registration of a file in the folder of files."""
        payload = data_file(str(self.path(name)), timestamp=1_700_000_000, action=action, action_ts="1700000000")
        self.accept_datagram({"id": "crate1slot2", "type": "data_file", "payload": {**payload, **fields}})

    def accept_datagram(self, envelope: dict[str, Any]) -> None:
        """Accept any registration."""
        text = json.dumps(envelope)
        self.intake.put(messages.parse_file(text).meta, Incoming(self.clock(), SENDER, text))

    def step(self) -> bool:
        """Do everything that is due now, and return whether there was anything. Counts are checked before and after."""
        self.check()
        worked = False
        while self.registrar.step(0.0):
            worked = True
        self.check()
        return worked

    def check(self) -> None:
        """Check that the counts add up, and agree with the spool's file."""
        counts = self.spool.counts
        assert counts[RECEIVED] == sum(counts[state] for state in counts if state != RECEIVED), counts
        stored = dict(execute(self.spool_path, "SELECT state, count(*) FROM registrations GROUP BY state"))
        assert {state: counts[state] for state in STORED} == {state: stored.get(state, 0) for state in STORED}
        files = self.health.data(counts)["files"]
        assert files["received"] == sum(files[key] for key in ("registered", "pending", "waiting", "dead", "discarded"))

    def counts(self) -> dict[str, int]:
        """Return the number of registrations in each state, without zeros."""
        return {state: count for state, count in self.spool.counts.items() if count}

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the database, in order."""
        return rows(self.db_path)

    def sums(self) -> dict[str, str]:
        """Return the MD5 sums of the rows, by file name. A file with two rows is an error."""
        rows = self.rows()
        sums = {os.path.basename(row["local_path"]): row["local_md5sum"] for row in rows}
        assert len(sums) == len(rows), rows
        return sums

    def dead_letters(self) -> list[tuple[str, str, bool]]:
        """Return file name, reason and `refused` of each dead letter."""
        letters = [letter.summary() for letter in self.spool.dead()]
        return [(os.path.basename(letter["path"]), letter["reason"], letter["refused"]) for letter in letters]

    def next_due(self) -> float:
        """Return when the next registration is due, CLOCK_MONOTONIC seconds."""
        return self.spool.next_due

    def archive(self, name: str, *, remove: bool) -> None:
        """Do as SupRsync does: mark a file as copied and verified, and with `remove` delete it."""
        path = self.path(name)
        execute(
            self.db_path,
            "UPDATE supersync_v0 SET remote_md5sum = ?, copied = ?, removed = ? WHERE local_path = ?",
            md5(path.read_bytes()),
            self.clock(),
            self.clock() if remove else None,
            str(path),
        )
        if remove:
            path.unlink()
