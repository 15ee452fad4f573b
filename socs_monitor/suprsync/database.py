"""The SupRsync database file: its connection, and the short transactions that write rows.

What is written is decided by the pure rules in `upsert`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from sqlalchemy import (
    ClauseElement,
    ColumnElement,
    Connection,
    bindparam,
    create_engine,
    insert,
    inspect,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import StaticPool

from socs_monitor import crashpoint
from socs_monitor.suprsync.archive import Entry, collapse
from socs_monitor.suprsync.tables import FILES, INDEXES, STUCK, Base
from socs_monitor.suprsync.upsert import INSERT, Action, Correction, HashedFile, Row, plan_upsert

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

_HELD = "{} holds its place in the archive: {} of {}. Announce it under another action, or rename the file"
_CREATE_ADVICE = "start the agent with --create-table True, or correct --db-path"


class DatabaseUnavailableError(Exception):
    """The database cannot be written now; nothing of the call took effect, and it may work later."""


class _RowRefusedError(Exception):
    """SQLite rejected a row; nothing of the transaction took effect."""


class Outcome(NamedTuple):
    """What became of one file.

    Attributes:
        changed: Whether its row was inserted, or reset to other content.
        refusal: Why it can have no row; None if it has one.
    """

    changed: bool
    refusal: str | None = None


_CHANGED, _KEPT = Outcome(True), Outcome(False)


_DIALECT = SQLiteDialect(paramstyle="qmark")


def _sql(statement: ClauseElement, *columns: str) -> str:
    """Compile a statement once, with a parameter for each of `columns`, in the table's order, before its own.

    It is run by sqlite3 itself: SQLAlchemy's work on each statement and row would be a third of what a batch costs.
    """
    return str(statement.compile(dialect=_DIALECT, column_keys=columns))


# Looked up by one statement: each statement lets other threads have the interpreter.
_TOGETHER = 50

# Most work of one transaction: files and the rows they have already, with `_TOGETHER` added for each look-up. SupRsync
# waits meanwhile. It admits 500 files, and some 40 look-ups where each file depends on the one before.
_MAX_WORK = 2000

_INSERT = _sql(
    insert(FILES),
    *("local_path", "local_md5sum", "archive_name", "remote_path", "timestamp"),
    *("failed_copy_attempts", "deletable", "ignore"),
)
_UPDATE = update(FILES).where(FILES.c.id == bindparam("row"))
_CONFIRM = _sql(_UPDATE, "timestamp", "removed", "deletable")
_RETRY = _sql(_UPDATE, "removed", "failed_copy_attempts", "deletable")
_RESET = _sql(
    _UPDATE,
    *("local_md5sum", "timestamp", "remote_md5sum", "copied", "removed", "failed_copy_attempts"),
    *("deletable", "ignore"),
)
_UNDELETABLE = _sql(_UPDATE, "deletable")
_RETIRE = _sql(_UPDATE, "removed", "deletable", "ignore")
_CORRECT = _sql(_UPDATE, "local_md5sum", "remote_md5sum", "removed", "failed_copy_attempts")

_WITHDRAW = """
UPDATE supersync_v0 SET "ignore" = 1, deletable = 0,
    local_path = CASE WHEN coalesce(copied, remote_md5sum) IS NULL THEN 'withdrawn:' ELSE '' END || local_path,
    remote_path = CASE WHEN coalesce(copied, remote_md5sum) IS NULL THEN 'withdrawn/' ELSE '' END || remote_path
WHERE id = ?
"""

_COLUMNS = [FILES.c[name] for name in Row._fields]


def _is_any(name: str) -> ColumnElement[bool]:
    """The condition that a column has one of `_TOGETHER` values."""
    column: ColumnElement[Any] = FILES.c[name]
    return column.in_([bindparam(f"{name}{number}") for number in range(_TOGETHER)])


_BY_LOCAL_PATH = _sql(select(*_COLUMNS).where(_is_any("local_path")))
_BY_REMOTE_PATH = _sql(select(*_COLUMNS).where(_is_any("remote_path")))
_BY_ID = _sql(select(*_COLUMNS).where(_is_any("id")))
# the unary plus keeps SQLite from walking the whole table by id
_STUCK = _sql(select(*_COLUMNS).where(STUCK, literal_column("+id") > bindparam("after")).order_by("id")) + " LIMIT ?"


class Database:
    """The database file. For one thread at a time.

    Args:
        path: The SQLite file.
        create_table: Whether file and tables are made where they are missing.
        echo: Whether every SQL statement is logged.
        report: Called with a line for a person when something unusual was done.
        clock: Gives unix time.
        busy_timeout: Seconds for which a lock is waited for.
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
        self._create_table = create_table
        self._echo = echo
        self._report = report
        self._clock = clock
        self._busy_timeout = busy_timeout
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

    def register(self, files: Sequence[HashedFile]) -> list[Outcome]:
        """Register files in one short transaction; registering one again changes nothing.

        The caller makes sure, immediately before the call, that each file is still what was hashed.

        Returns:
            The outcomes of the first files, in order. There are fewer than there are files where all of them would
            hold the write lock for too long: call again with the rest. There is none where another process had the
            write lock: meanwhile files may have changed, so check them and call again.

        Raises:
            DatabaseUnavailableError: If the database cannot be written now. Nothing took effect.
        """
        try:
            return self._register(files, _TOGETHER)
        except _RowRefusedError:
            # find out which one, so that it does not hold up the others
            return self._register(files, 1)

    def _register(self, files: Sequence[HashedFile], together: int) -> list[Outcome]:
        outcomes: list[Outcome] = []
        work = 0
        with self._transaction() as (db, waited):
            if waited:
                return []
            # a row must not get a time that SupRsync has reported final: taken under the write lock, next to the commit
            now = self._clock()
            while work < _MAX_WORK and len(outcomes) < len(files):
                some = _independent(files, len(outcomes), together)
                written, known = (_write if together > 1 else _write_or_refuse)(db, some, now)
                outcomes += written
                work += _TOGETHER + len(some) + known
            crashpoint.reach("inserted")
        return outcomes

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
            with self._transaction() as (db, _):
                db.executemany(_WITHDRAW, [(id_,) for id_ in ids])

    def stuck(self, after: int, limit: int) -> list[Row]:
        """Return the first `limit` rows that `tables.STUCK` selects and whose id is above `after`, in order.

        Raises:
            DatabaseUnavailableError: If the database cannot be read now.
        """
        with self._translated():
            return _read(self._connection(), _STUCK, (after, limit))

    def correct(self, corrections: Sequence[Correction]) -> list[Row]:
        """Correct rows in one short transaction.

        A row stays as it is if it changed since it was selected, or if another local path holds its remote path.

        Returns:
            The rows that were corrected, as they were before.

        Raises:
            DatabaseUnavailableError: If the database cannot be written now. Nothing took effect.
        """
        corrected: list[Row] = []
        with self._transaction() as (db, _):
            rows = [correction.row for correction in corrections]
            present = {row.id: row for row in _rows_where(db, _BY_ID, [row.id for row in rows])}
            holders = _holders(_rows_where(db, _BY_REMOTE_PATH, list(dict.fromkeys(row.remote_path for row in rows))))
            for correction in corrections:
                row = correction.row
                if present.get(row.id) == row and holders[row.archive_name, row.remote_path] == {row.local_path}:
                    db.execute(_CORRECT, (correction.local_md5sum, correction.remote_md5sum, None, 0, row.id))
                    corrected.append(row)
        return corrected

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
            return _by_path(_rows_where(self._connection(), _BY_LOCAL_PATH, list(dict.fromkeys(paths))))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[tuple[sqlite3.Connection, bool]]:
        """Provide the connection with the write lock, and whether that had to be waited for."""
        with self._translated():
            db = self._connection()
            waited = self._begin(db)
            try:
                yield db, waited
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            if _identity(self.path) != self.identity:
                raise DatabaseUnavailableError(f"the database {self.path} was replaced while it was written")

    def _begin(self, db: sqlite3.Connection) -> bool:
        """Begin a transaction with the write lock; return whether another process had it."""
        db.execute("PRAGMA busy_timeout = 0")
        try:
            db.execute("BEGIN IMMEDIATE")
            return False
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_BUSY:
                raise
        finally:
            db.execute(f"PRAGMA busy_timeout = {round(self._busy_timeout * 1000)}")
        db.execute("BEGIN IMMEDIATE")
        return True

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
        db = sqlite3.connect(self.path, timeout=self._busy_timeout, isolation_level=None, check_same_thread=False)
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
        table = str(FILES.name)
        if not inspector.has_table(table):
            if not self._create_table:
                raise DatabaseUnavailableError(f"the database {self.path} has no table {table}: {_CREATE_ADVICE}")
            Base.metadata.create_all(connection)
            return
        present = {index["name"] for index in inspector.get_indexes(table)}
        for index in INDEXES:
            if index.name not in present:
                start = time.monotonic()
                index.create(connection)
                self._report(f"made the index {index.name} of {self.path} in {time.monotonic() - start:.1f} s, once")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DatabaseUnavailableError(f"the database {self.path} cannot be made: {error}") from error
        except UnicodeError as error:
            raise _RowRefusedError(str(error)) from error
        except (sqlite3.Error, DBAPIError) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            code = _code(cause)
            if code in _ROW_CODES:
                raise _RowRefusedError(str(cause)) from error
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


def _independent(files: Sequence[HashedFile], start: int, paths: int) -> Sequence[HashedFile]:
    """Return the files from `start` on, of at most `paths` paths, up to one that depends on an earlier one's row.

    A file that equals the latest of its path is registered with that one.
    """
    latest: dict[str, HashedFile] = {}
    places: dict[str, str] = {}
    for end in range(start, len(files)):
        file = files[end]
        path = file.entry.local_path
        if latest.setdefault(path, file) != file or places.setdefault(file.entry.remote_path, path) != path:
            return files[start:end]
        if len(latest) > paths:
            return files[start:end]
    return files[start:]


def _write(db: sqlite3.Connection, files: Sequence[HashedFile], now: float) -> tuple[list[Outcome], int]:
    """Register files that are independent of each other; return their outcomes, and the number of rows they had."""
    by_path = {file.entry.local_path: file for file in files}
    held = _rows_where(db, _BY_REMOTE_PATH, [file.entry.remote_path for file in by_path.values()])
    rows = _rows_where(db, _BY_LOCAL_PATH, list(by_path))
    known = _by_path({row.id: row for row in sorted(held + rows)}.values()) if held or rows else {}
    holders = _holders(held)
    outcomes: dict[str, Outcome] = {}
    new: list[tuple[object, ...]] = []
    for path, file in by_path.items():
        (archive_name, _, remote_path, deletable), md5 = file
        plan = plan_upsert(known.get(path, ()), file, holders.get((archive_name, remote_path), ())) if known else INSERT
        outcomes[path] = _CHANGED
        match plan.action, plan.row:
            case Action.INSERT, _:
                new.append((path, md5, archive_name, remote_path, now, 0, deletable, False))
            case Action.RESET, Row(id=id_, local_md5sum=former, ignore=ignore):
                ignored = bool(ignore) and former == md5
                db.execute(_RESET, (md5, now, None, None, None, 0, deletable, ignored, id_))
            case Action.CONFIRM, Row(id=id_, timestamp=timestamp, removed=removed):
                outcomes[path] = _KEPT
                db.execute(_CONFIRM, (timestamp if removed is None else now, None, deletable, id_))
            case Action.RETRY, Row(id=id_):
                outcomes[path] = _KEPT
                db.execute(_RETRY, (None, 0, deletable, id_))
            case Action.REFUSE, _:
                outcomes[path] = Outcome(False, _HELD.format(plan.holder, remote_path, archive_name))
            case _:
                outcomes[path] = _KEPT
        if plan.undeletable:
            db.executemany(_UNDELETABLE, [(False, id_) for id_ in plan.undeletable])
        if plan.retired:
            # 0 is what SupRsync writes for a file that is gone; a time would say that it removed the file then
            db.executemany(_RETIRE, [(0.0, False, True, id_) for id_ in plan.retired])
    db.executemany(_INSERT, new)
    written: list[Outcome] = []
    for file in files:
        outcome = outcomes[file.entry.local_path]
        written.append(outcome)
        if outcome is _CHANGED:
            outcomes[file.entry.local_path] = _KEPT  # for files equal to this one
    return written, len(known) and sum(map(len, known.values()))


def _write_or_refuse(db: sqlite3.Connection, files: Sequence[HashedFile], now: float) -> tuple[list[Outcome], int]:
    """As `_write`, but an error that concerns the values of a row is the outcome of all `files`."""
    db.execute("SAVEPOINT one")
    try:
        written, known = _write(db, files, now)
    except (sqlite3.Error, UnicodeError) as error:
        if not isinstance(error, UnicodeError) and _code(error) not in _ROW_CODES:
            raise
        db.execute("ROLLBACK TO one")
        written, known = [Outcome(False, f"the database refused it: {error}")] * len(files), 0
    db.execute("RELEASE one")
    return written, known


def _code(error: BaseException | None) -> int:
    """SQLite's primary result code."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _read(db: sqlite3.Connection, statement: str, parameters: Sequence[object]) -> list[Row]:
    """Read rows. Their local paths are collapsed, because the published agent stores them as they were announced."""
    return [Row(id_, collapse(local_path), *others) for id_, local_path, *others in db.execute(statement, parameters)]


def _rows_where(db: sqlite3.Connection, statement: str, values: Sequence[object]) -> list[Row]:
    """Read the rows that have one of `values`, `_TOGETHER` of them at a time; in order if these are one column's."""
    rows: list[Row] = []
    for start in range(0, len(values), _TOGETHER):
        some = values[start : start + _TOGETHER]
        rows += _read(db, statement, (*some, *(None,) * (_TOGETHER - len(some))))
    rows.sort()
    return rows


def _by_path(rows: Iterable[Row]) -> dict[str, list[Row]]:
    by_path: dict[str, list[Row]] = {}
    for row in rows:
        by_path.setdefault(row.local_path, []).append(row)
    return by_path


def _holders(rows: Iterable[Row]) -> dict[tuple[str, str], set[str]]:
    """Return the local paths that have rows for each archive and remote path."""
    holders: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        holders.setdefault((row.archive_name, row.remote_path), set()).add(row.local_path)
    return holders
