"""The SupRsync database file: its connection, and the short transactions that write rows.

Every call either took effect as a whole, or raises `DatabaseUnavailableError` and may be repeated. The pure rules in
`upsert` decide what is written.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from urllib.parse import quote

from socs_monitor import crashpoint
from socs_monitor.suprsync import sql
from socs_monitor.suprsync.archive import Entry
from socs_monitor.suprsync.sql import Outcome
from socs_monitor.suprsync.tables import CREATE_INDEXES, CREATE_TABLES, SupRsyncFile
from socs_monitor.suprsync.upsert import Correction, HashedFile, Row

# Seconds that a call waits for a lock. It is short so that a lock never holds up a stop; callers retry with backoff.
_BUSY_TIMEOUT_S = 0.25

# Most work of one transaction, during which SupRsync waits: files and the rows that they have already, plus
# `sql.GROUP` for each look-up. It admits 500 files, or some 40 look-ups where each file depends on the one before.
_MAX_WORK = 2000

_ADVICE = {
    sqlite3.SQLITE_BUSY: "another process holds the write lock",
    sqlite3.SQLITE_READONLY: "it is read-only: check owner and mode of the file, its -wal, its -shm and the folder",
    sqlite3.SQLITE_FULL: "the disk is full: make room",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: check the path and the folder's permissions",
    sqlite3.SQLITE_NOTADB: "it is not an SQLite database: move it away, or restore a backup",
    sqlite3.SQLITE_CORRUPT: "it is corrupt: move it away, or restore a backup",
    sqlite3.SQLITE_IOERR: "the disk fails or is full",
}
_CREATE_ADVICE = "start the agent with --create-table True, or correct --db-path"


class DatabaseUnavailableError(Exception):
    """The database cannot be used now. Nothing of the call took effect, and a later call may succeed."""


class Database:
    """The database file. For one thread at a time.

    All methods but `close` and `is_replaced` raise `DatabaseUnavailableError`.

    Args:
        path: The SQLite file.
        create_table: Whether to create the file and its tables if they are missing.
        echo: Whether to print every SQL statement.
        report: Called with a line for the log when an index was made, or another file took the place of the old one.
        clock: Returns unix time.
        busy_timeout: Seconds to wait for a lock.

    Attributes:
        path (str): The absolute path of the file.
        identity: Device and inode of the file in use. It changes when somebody replaced the file.
    """

    def __init__(
        self,
        path: str,
        *,
        create_table: bool,
        echo: bool,
        report: Callable[[str], None],
        clock: Callable[[], float] = time.time,
        busy_timeout: float = _BUSY_TIMEOUT_S,
    ) -> None:
        self.path = os.path.abspath(path)
        self.identity: tuple[int, int] | None = None
        self._create_table = create_table
        self._echo = echo
        self._report = report
        self._clock = clock
        self._busy_timeout = busy_timeout
        self._db: sqlite3.Connection | None = None
        self._pin: int | None = None  # an open descriptor, so that no other file can get the inode of the one in use

    def close(self) -> None:
        """Close the file. The next call opens it again."""
        self._disconnect()
        self._unpin()

    def is_replaced(self) -> bool:
        """Whether another file, or none, has taken the place of the one in use."""
        return _identity(self.path) != self.identity

    def register(self, files: Sequence[HashedFile]) -> list[Outcome]:
        """Register files in one short transaction. Registering a file again changes nothing.

        The caller makes sure, immediately before the call, that each file is still what was hashed.

        Returns:
            The outcomes of the first files, in order. If all files would hold the write lock for too long, there are
            fewer outcomes than files: call again with the rest. If another process had the write lock, there is
            none, because files may have changed meanwhile: check them and call again.
        """
        outcomes: list[Outcome] = []
        work = 0
        with self._transaction() as (db, waited):
            if waited:
                return []
            # A row must not get a time that SupRsync has reported as final, so it is taken under the write lock.
            now = self._clock()
            while work < _MAX_WORK and len(outcomes) < len(files):
                group = sql.independent(files, len(outcomes))
                written, known = sql.write(db, group, now)
                outcomes += written
                work += sql.GROUP + len(group) + known
            crashpoint.reach("inserted")
        return outcomes

    def withdraw(self, entries: Sequence[Entry]) -> None:
        """Keep SupRsync from copying or deleting files whose paths are refused now. Entries without rows are skipped.

        A row that was copied is ignored from now on. In one that was never copied, both paths are also marked, so that
        it names neither the file nor a timecode's folder. It is not removed: SupRsync fails if a row vanishes while it
        copies, and SQLite may give the row's id to the next file.
        """
        with self._translated_errors():
            if not sql.find_keys(self._connection(), entries):
                return  # without waiting for a lock
        with self._transaction() as (db, _):
            sql.withdraw(db, sql.find_keys(db, entries))

    def stuck(self, after: int, limit: int) -> list[Row]:
        """Return the first `limit` rows that `tables.STUCK` selects and whose id is above `after`, by id."""
        with self._translated_errors():
            return sql.read(self._connection(), sql.STUCK, (after, limit))

    def correct(self, corrections: Sequence[Correction]) -> list[Correction]:
        """Correct stuck rows in one short transaction.

        Returns:
            The corrections that were made. A row stays as it is if it changed since it was selected, or if another
            local path holds its remote path.
        """
        with self._transaction() as (db, _):
            return sql.correct(db, corrections)

    def sync(self) -> None:
        """Flush what was registered so far to the disk. Commits do not, so that no disk holds up the write lock."""
        try:
            with open(f"{self.path}-wal", "rb") as journal:
                os.fdatasync(journal.fileno())
        except FileNotFoundError:  # whoever closed the database last has moved it all to the file, and synced that
            pass
        except OSError as error:
            raise self._unavailable(f" cannot be synced: {error}", sqlite3.SQLITE_IOERR) from error

    def rows(self, paths: Iterable[str]) -> dict[str, list[Row]]:
        """Return the rows of local paths, in the order they were added."""
        with self._translated_errors():
            return sql.by_path(sql.find(self._connection(), sql.BY_LOCAL_PATH, paths))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[tuple[sqlite3.Connection, bool]]:
        """Provide the connection with the write lock, and whether another process had the lock."""
        with self._translated_errors():
            db = self._connection()
            waited = self._begin(db)
            try:
                yield db, waited
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            if self.is_replaced():
                raise self._unavailable(" was replaced while it was written")

    def _begin(self, db: sqlite3.Connection) -> bool:
        """Begin a transaction with the write lock; return whether another process had it."""
        db.execute("PRAGMA busy_timeout = 0")
        try:
            db.execute("BEGIN IMMEDIATE")
            return False
        except sqlite3.OperationalError as error:
            if sql.code(error) != sqlite3.SQLITE_BUSY:
                raise
        finally:
            db.execute(f"PRAGMA busy_timeout = {round(self._busy_timeout * 1000)}")
        db.execute("BEGIN IMMEDIATE")
        return True

    def _connection(self) -> sqlite3.Connection:
        if self._db is None or self.is_replaced():
            self._db = self._connect()
        return self._db

    def _connect(self) -> sqlite3.Connection:
        if self._db is not None:
            self._report(f"the database {self.path} was moved away or replaced: opened the file that is there now")
        self._disconnect()
        if os.path.exists(self.path):
            self._check_format()
        elif not self._create_table:
            raise self._unavailable(f" does not exist: {_CREATE_ADVICE}")
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        # in autocommit, because `_begin` begins the transactions
        db = sqlite3.connect(self.path, timeout=self._busy_timeout, isolation_level=None, check_same_thread=False)
        try:
            if self._echo:
                db.set_trace_callback(print)
            self._prepare(db)
            pin = os.open(self.path, os.O_PATH | os.O_CLOEXEC)
        except BaseException:
            db.close()
            raise
        self._unpin()
        self._pin, self.identity = pin, _identity(self.path)
        return db

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _unpin(self) -> None:
        if self._pin is not None:
            os.close(self._pin)
            self._pin = self.identity = None

    def _check_format(self) -> None:
        """Refuse a file that is not a database. Beside the journal of a former one, SQLite would overwrite it."""
        uri = f"file:{quote(self.path)}?mode=ro&immutable=1"
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
                db.execute("PRAGMA schema_version")
        except sqlite3.Error as error:
            if sql.code(error) == sqlite3.SQLITE_NOTADB:
                raise

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Create what is missing."""
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # commits do not wait for the disk; see `sync`
        present = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        table = SupRsyncFile.__tablename__
        if table not in present:
            if not self._create_table:
                raise self._unavailable(f" has no table {table}: {_CREATE_ADVICE}")
            for statement in CREATE_TABLES:
                db.execute(statement)
        for name, statement in CREATE_INDEXES.items():
            if name not in present:
                start = time.monotonic()
                db.execute(statement)
                if table in present:
                    seconds = time.monotonic() - start
                    self._report(f"made the index {name} of {self.path} in {seconds:.1f} s; this happens once")

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unavailable(f" cannot be opened: {error}") from error
        except sqlite3.Error as error:
            self._disconnect()
            raise self._unavailable(f": {error}", sql.code(error)) from error

    def _unavailable(self, problem: str, code: int = sqlite3.SQLITE_OK) -> DatabaseUnavailableError:
        advice = _ADVICE.get(code)
        return DatabaseUnavailableError(f"the database {self.path}{problem}{f'; {advice}' if advice else ''}")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
