"""The SupRsync database: its tables, and the one way rows get into them.

The tables are the published ones to the letter (contract: an added index is fine, a column is not), so that
either agent and SupRsync work on the same file. A registration is idempotent; `merge` is the rule.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from sqlalchemy import (
    Boolean,
    ClauseElement,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    bindparam,
    create_engine,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.pool import StaticPool

from socs_monitor import crashpoint
from socs_monitor.archive import Entry


class Base(DeclarativeBase):
    """The tables of version 0."""


class SupRsyncFile(Base):
    """A file for SupRsync to copy, verify and perhaps delete; times are unix seconds."""

    __tablename__ = "supersync_v0"

    id = Column(Integer, primary_key=True)
    local_path = Column(String, nullable=False)
    local_md5sum = Column(String, nullable=False)
    archive_name = Column(String, nullable=False)
    remote_path = Column(String, nullable=False)
    timestamp = Column(Float, nullable=False)
    remote_md5sum = Column(String)
    copied = Column(Float)
    removed = Column(Float)
    failed_copy_attempts = Column(Integer, default=0)
    deletable = Column(Boolean, default=True)
    ignore = Column(Boolean, default=False)


class TimecodeDir(Base):
    """A folder of one timecode in the archive. SupRsync alone writes these rows (contract)."""

    __tablename__ = "timecode_dirs_v0"

    id = Column(Integer, primary_key=True)
    timecode = Column(Integer, nullable=False)
    archive_name = Column(String, nullable=False)
    completed = Column(Boolean, default=False)
    synced = Column(Boolean, default=False)
    finalized = Column(Boolean, default=False)
    finalize_file_id = Column(Integer, ForeignKey("supersync_v0.id"))


# Without it, looking for a path's rows reads the whole table, which grows to millions of rows.
PATH_INDEX = Index("ix_supersync_v0_local_path", SupRsyncFile.local_path)
_TABLE: Any = SupRsyncFile.__table__

# Waiting for a lock happens here only this long (seconds), so that a stop is never held up by it; the registrar
# tries again, with backoff, for as long as it takes.
_BUSY_TIMEOUT_S = 0.25

# Result codes that speak of the values of one row; all others speak of the database.
_ROW_CODES = (sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_RANGE)

_ADVICE = {
    sqlite3.SQLITE_BUSY: "another process holds the write lock",
    sqlite3.SQLITE_READONLY: "it is read-only: check owner and mode of the file, its -wal, its -shm and the folder",
    sqlite3.SQLITE_FULL: "the disk is full: make room",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: check the path and the folder's permissions",
    sqlite3.SQLITE_NOTADB: "it is no SQLite database: move it away, or restore it from a backup",
    sqlite3.SQLITE_CORRUPT: "it is corrupt: move it away, or restore it from a backup",
    sqlite3.SQLITE_IOERR: "the disk fails or is full",
}

_CREATE_ADVICE = "start the agent with --create-table True, or correct --db-path"


class DatabaseUnavailableError(Exception):
    """The database cannot be written now; nothing of the call took effect, and it may work later."""


class RowRefusedError(Exception):
    """The database works, but took offence at a row; nothing of the call took effect."""


class HashedFile(NamedTuple):
    """A file to register, and the MD5 sum of its content."""

    entry: Entry
    md5: str


class Row(NamedTuple):
    """What is known of a path's row; see `SupRsyncFile`."""

    id: int
    archive_name: str
    local_path: str
    remote_path: str
    timestamp: float
    local_md5sum: str
    remote_md5sum: str | None
    removed: float | None

    def is_of(self, entry: Entry) -> bool:
        """Whether it is the entry's own row, by the key of a registration."""
        return (self.archive_name, self.local_path, self.remote_path) == (
            entry.archive_name,
            entry.local_path,
            entry.remote_path,
        )


_DIALECT = SQLiteDialect(paramstyle="qmark")


def _sql(statement: ClauseElement, *columns: str) -> str:
    """Compile a statement once, with a parameter for each of `columns`, in the table's order, before its own.

    It is run by sqlite3 itself: SQLAlchemy's work on each statement and row would be a third of what a batch costs.
    """
    return str(statement.compile(dialect=_DIALECT, column_keys=columns))


_INSERT = _sql(
    insert(_TABLE),
    *("local_path", "local_md5sum", "archive_name", "remote_path", "timestamp"),
    *("failed_copy_attempts", "deletable", "ignore"),
)
_UPDATE = update(_TABLE).where(_TABLE.c.id == bindparam("row"))
_RESET = _sql(
    _UPDATE,
    *("local_md5sum", "timestamp", "remote_md5sum", "copied", "removed", "failed_copy_attempts", "deletable", "ignore"),
)
_RETAKE = _sql(_UPDATE, "local_md5sum", "failed_copy_attempts")
_WITHDRAW = """
UPDATE supersync_v0 SET "ignore" = 1, deletable = 0,
    local_path = CASE WHEN coalesce(copied, remote_md5sum) IS NULL THEN 'withdrawn:' ELSE '' END || local_path,
    remote_path = CASE WHEN coalesce(copied, remote_md5sum) IS NULL THEN 'withdrawn/' ELSE '' END || remote_path
WHERE id = ?
"""
_PATHS = 50  # looked up by a statement, since each lets other threads have the interpreter
_ANY_PATH = _TABLE.c.local_path.in_([bindparam(f"path{number}") for number in range(_PATHS)])
_SELECT = _sql(select(*(_TABLE.c[name] for name in Row._fields)).where(_ANY_PATH))


def merge(rows: Sequence[Row], file: HashedFile) -> tuple[list[int], int | None, bool]:
    """Decide how content that is registered goes in among the rows of its local path.

    An overwritten file would leave rows behind whose sums can never agree, and one of those holds back
    SupRsync's `finalized_until` for ever (contract). So the rows that are not copied yet take the new sum.

    Args:
        rows: All rows of the path.
        file: The content.

    Returns:
        The ids of rows that take the new sum and start their copy attempts anew; the id of the row, or None,
        that is made as new in place; and whether a row is inserted.
    """
    own = [row for row in rows if row.is_of(file.entry)]
    kept = next((row for row in own if row.local_md5sum == file.md5 and row.removed is None), None)
    reset = own[-1] if own and kept is None else None
    uncopied = (row for row in rows if row.local_md5sum != row.remote_md5sum)
    retaken = [row.id for row in uncopied if row is not kept and row is not reset]
    return retaken, reset.id if reset else None, not own


class Database:
    """The database file. For one thread at a time.

    Args:
        path: The SQLite file.
        create_table: Whether file and tables are made where they are missing.
        echo: Whether every SQL statement is logged.
        report: Called with a line for a person when something unusual was done.
        clock: Gives unix time.
    """

    def __init__(
        self,
        path: str,
        *,
        create_table: bool,
        echo: bool,
        report: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = os.path.abspath(path)
        self._create_table = create_table
        self._echo = echo
        self._report = report
        self._clock = clock
        self._db: sqlite3.Connection | None = None
        self._pin: int | None = None  # held open, so that no other file can get the inode of the one in use
        self.identity: tuple[int, int] | None = None
        """Device and inode of the file in use; another one means that somebody replaced the file."""

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        self._disconnect()
        self._unpin()

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _unpin(self) -> None:
        if self._pin is not None:
            os.close(self._pin)
            self._pin = self.identity = None

    def is_replaced(self) -> bool:
        """Whether another file, or none, has taken the place of the one in use."""
        return _identity(self.path) != self.identity

    def register(self, files: Sequence[HashedFile]) -> None:
        """Register files in one short transaction, all or none; registering again changes nothing.

        Raises:
            DatabaseUnavailableError: If the database cannot be written now.
            RowRefusedError: If it cannot take one of the rows.
        """
        with self._translated():
            db = self._connection()
            db.execute("BEGIN IMMEDIATE")
            try:
                for by_path in _rounds(files):
                    self._write(db, by_path)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            if _identity(self.path) != self.identity:
                raise DatabaseUnavailableError(f"the database {self.path} was replaced while it was written")

    def _write(self, db: sqlite3.Connection, files: Mapping[str, HashedFile]) -> None:
        known = _rows_by_path(db, files)
        # the contract's time of a row is when it is added: taken under the write lock, next to the commit
        now = self._clock()
        new: list[tuple[object, ...]] = []
        for file in files.values():
            (archive_name, local_path, remote_path, deletable), md5 = file
            rows = known.get(local_path)
            retaken, reset, inserted = merge(rows, file) if rows else ((), None, True)
            if retaken:
                db.executemany(_RETAKE, [(md5, 0, id_) for id_ in retaken])
            if reset is not None:
                db.execute(_RESET, (md5, now, None, None, None, 0, deletable, False, reset))
            if inserted:
                new.append((local_path, md5, archive_name, remote_path, now, 0, deletable, False))
        db.executemany(_INSERT, new)
        crashpoint.reach("inserted")

    def withdraw(self, entries: Sequence[Entry]) -> None:
        """Keep SupRsync from copying or deleting files whose paths are refused now; those without rows are skipped.

        A row that was copied is ignored from now on. One that was never copied no longer names the file or a time
        code's folder: its paths are marked. It is not removed, since SupRsync ends with an error where a row vanishes
        while it copies, and SQLite may give the row's id to the next file.

        Raises:
            DatabaseUnavailableError: If the database cannot be written now.
        """
        rows = self.rows(entry.local_path for entry in entries)
        ids = [row.id for entry in entries for row in rows.get(entry.local_path, ()) if row.is_of(entry)]
        if ids:
            with self._translated():
                self._connection().executemany(_WITHDRAW, [(id_,) for id_ in ids])

    def sync(self) -> None:
        """Bring what was registered so far to the disk. A commit does not, so that no disk holds up the write lock.

        Raises:
            DatabaseUnavailableError: If the disk refused.
        """
        try:
            with open(f"{self.path}-wal", "rb") as journal:
                os.fdatasync(journal.fileno())
        except FileNotFoundError:  # who closed it had it all written to the file itself, and synced
            pass
        except OSError as error:
            advice = _ADVICE[sqlite3.SQLITE_IOERR]
            raise DatabaseUnavailableError(f"the database {self.path} cannot be synced: {error}; {advice}") from error

    def rows(self, paths: Iterable[str]) -> dict[str, list[Row]]:
        """Return the rows of local paths, in the order they were added.

        Raises:
            DatabaseUnavailableError: If the database cannot be read now.
        """
        with self._translated():
            return _rows_by_path(self._connection(), dict.fromkeys(paths))

    def _connection(self) -> sqlite3.Connection:
        identity = _identity(self.path)
        if self._db is None or identity != self.identity:
            self._db = self._connect(identity)
        return self._db

    def _connect(self, identity: tuple[int, int] | None) -> sqlite3.Connection:
        if self._db is not None:
            self._report(f"the database {self.path} was moved away or replaced: opened anew")
        self._disconnect()
        if identity is None and not self._create_table:
            raise DatabaseUnavailableError(f"the database {self.path} does not exist: {_CREATE_ADVICE}")
        if identity is not None:
            _refuse_garbage(self.path)
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        # in autocommit, since `register` begins its own transactions, IMMEDIATE ones
        db = sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        how: dict[str, Any] = {"isolation_level": "AUTOCOMMIT", "poolclass": StaticPool, "echo": self._echo}
        try:
            engine = create_engine("sqlite://", creator=lambda: db, **how)
            with engine.connect() as connection:
                self._prepare(connection)
            if self._echo:
                db.set_trace_callback(engine.logger.info)
            pin = os.open(self.path, os.O_PATH | os.O_CLOEXEC)
        except BaseException:
            db.close()
            raise
        self._unpin()
        self._pin, self.identity = pin, _identity(self.path)
        return db

    def _prepare(self, connection: Connection) -> None:
        connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        connection.exec_driver_sql("PRAGMA synchronous=NORMAL")  # no commit waits for the disk; see `sync`
        inspector = inspect(connection)
        if not inspector.has_table(SupRsyncFile.__tablename__):
            if not self._create_table:
                raise DatabaseUnavailableError(
                    f"the database {self.path} has no table {SupRsyncFile.__tablename__}: {_CREATE_ADVICE}"
                )
            Base.metadata.create_all(connection)
        elif PATH_INDEX.name not in {index["name"] for index in inspector.get_indexes(SupRsyncFile.__tablename__)}:
            start = time.monotonic()
            PATH_INDEX.create(connection)
            self._report(f"made the index {PATH_INDEX.name} of {self.path} in {time.monotonic() - start:.1f} s, once")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DatabaseUnavailableError(f"the database {self.path} cannot be made: {error}") from error
        except UnicodeError as error:
            raise RowRefusedError(str(error)) from error
        except (sqlite3.Error, DBAPIError) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            if code in _ROW_CODES:
                raise RowRefusedError(str(cause)) from error
            self._disconnect()
            advice = _ADVICE.get(code, "")
            raise DatabaseUnavailableError(f"the database {self.path}: {cause}; {advice}") from error


def _refuse_garbage(path: str) -> None:
    """Look at the file itself: beside the journal of a former one, SQLite takes it for a database and overwrites it."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(path)}?mode=ro&immutable=1", uri=True)) as connection:
            connection.execute("PRAGMA schema_version")
    except sqlite3.Error as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_NOTADB:
            raise DatabaseUnavailableError(f"the database {path}: {error}; {_ADVICE[sqlite3.SQLITE_NOTADB]}") from error


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _rows_by_path(db: sqlite3.Connection, paths: Iterable[str]) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    wanted = list(paths)
    for start in range(0, len(wanted), _PATHS):
        some = wanted[start : start + _PATHS]
        for found in sorted(db.execute(_SELECT, some + [None] * (_PATHS - len(some)))):
            row = Row._make(found)
            rows.setdefault(row.local_path, []).append(row)
    return rows


def _rounds(files: Sequence[HashedFile]) -> Iterator[Mapping[str, HashedFile]]:
    """Yield files by path; what names a path again comes later, since it has to see the rows that the first makes."""
    while files:
        by_path: dict[str, HashedFile] = {}
        again = [file for file in files if by_path.setdefault(file.entry.local_path, file) is not file]
        yield by_path
        files = again
