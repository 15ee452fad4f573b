"""The spool's file: layout, versions, lock, and what happens to a file that cannot be read.

A private SQLite file in WAL mode, opened by one process at a time (``flock`` on the file ``<spool>.lock``), with one
table. Layout, version 2 (``PRAGMA user_version``)::

    registrations(id, state, received, sender, message, attempts, rounds, due, reason, refused)

    id        in the order of arrival, never used twice
    state     one of `states.STORED`
    received  unix time of acceptance
    sender    host:port
    message   the registration as a JSON datagram, reduced to the fields that `messages.parse` keeps
    attempts  number of failed attempts to read its file
    rounds    0 until its row is committed, then 1, and one more each time that its file changed since
    due       when it is taken up again, in seconds of CLOCK_MONOTONIC; null while the queue or a worker holds it, or it
              is dead. A start assigns it again, since that clock begins again with each boot
    reason    why it waits or is dead
    refused   1 if the message itself can never become a row, 0 if its file failed

The registrations of a version 1 file are taken over as newly received ones. A corrupt file, or one of an unknown
version, is renamed to ``<spool>.<unix time>.set-aside`` together with its journal and reported, and a new file is
started: it is never overwritten, and never a reason not to start.

The file keeps `RESERVE` bytes of free pages, and its journal has the same size, so that registrations can still be
written when the disk is full.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import sqlite3
import time
from collections.abc import Callable
from typing import IO
from urllib.parse import quote

from socs_monitor.spool.states import State

VERSION = 2

_PAGE = 4096  # bytes, SQLite's default

# Room kept in the file and in its journal (bytes). Measured on a full disk: 45,000 registrations of 320 bytes are still
# written, which is what the intake holds in memory at most; making the room takes 0.1 s at start.
RESERVE = 16 * 1024 * 1024

# Less room than this (bytes) is not worth having.
_RESERVE_MIN = 64 * 1024

# The journal's size (pages) at which accepting itself moves it to the file: a backstop, since under a
# load that never pauses the checkpoints of `Spool.sync` cannot reset the journal.
_JOURNAL_PAGES = 16_384

_JOURNAL_HEADER = 32  # bytes; SQLite takes a journal without a valid header as an empty one

_RETRY_LOCK_S = 0.05  # `is_locked` holds the lock for microseconds: if it is taken, try once more

BUSY_TIMEOUT_S = 5.0  # only the connection of `Spool.sync` and a person's tools can hold a lock, for milliseconds

_SCHEMA = f"""
CREATE TABLE registrations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    state TEXT NOT NULL DEFAULT '{State.PENDING}',
    received REAL NOT NULL,
    sender TEXT NOT NULL,
    message TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    rounds INTEGER NOT NULL DEFAULT 0,
    due REAL,
    reason TEXT,
    refused INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX due ON registrations (due) WHERE due IS NOT NULL;
CREATE INDEX pending ON registrations (id) WHERE state = '{State.PENDING}';
CREATE INDEX dead ON registrations (refused DESC, id) WHERE state = '{State.DEAD}';
PRAGMA user_version = {VERSION};
"""

# What was received is all that is taken over from version 1: the rest follows from it.
_FROM_VERSION_1 = f"""
ALTER TABLE registrations RENAME TO former;
DROP INDEX IF EXISTS dead;
{_SCHEMA}
INSERT INTO registrations (received, sender, message, due) SELECT received, sender, message, 0 FROM former ORDER BY id;
DROP TABLE former;
"""

OLDEST_PENDING = (
    f"SELECT id, received FROM registrations INDEXED BY pending WHERE state = '{State.PENDING}' ORDER BY id LIMIT 1"
)


class SpoolError(Exception):
    """The spool cannot be used now; nothing of the call took effect."""


class SpoolBusyError(SpoolError):
    """Another process has this spool open."""


class _UnknownVersionError(sqlite3.DatabaseError):
    """The file was written by another version of this module."""


# Result codes of a file that is no spool, or a damaged one.
_UNREADABLE = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


def take_lock(path: str) -> IO[bytes]:
    """Make this process the only one that has the spool, until the returned file is closed.

    Raises:
        SpoolBusyError: If another process has it.
        SpoolError: If the file cannot be made.
    """
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        lock_file = open(path + ".lock", "ab")  # noqa: SIM115 (held for as long as the spool is)
    except OSError as error:
        raise SpoolError(f"cannot open the spool {path}: {error}") from error
    try:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_RETRY_LOCK_S)
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock_file.close()
        raise SpoolBusyError(
            f"the spool {path} is in use by another process (see: fuser {path}.lock). Stop the other agent, or"
            " give this one an --instance-id or a --spool-path of its own"
        ) from error
    return lock_file


def is_locked(path: str) -> bool:
    """Whether a process has the spool, without being in its way; raises `OSError` if that cannot be seen."""
    with open(path + ".lock", "rb") as lock_file:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def connect(path: str, busy_timeout: float = BUSY_TIMEOUT_S) -> sqlite3.Connection:
    """Return a connection as the spool needs it, which waits `busy_timeout` seconds for a lock.

    Raises:
        sqlite3.Error: If the file cannot be opened.
    """
    db = sqlite3.connect(path, timeout=busy_timeout, isolation_level=None, check_same_thread=False)
    # text that another program or a bad disk left there must not hold up the rest
    db.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
    db.execute(f"PRAGMA page_size = {_PAGE}")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute(f"PRAGMA wal_autocheckpoint = {_JOURNAL_PAGES}")
    return db


def keep_journal(path: str) -> sqlite3.Connection:
    """Return a connection that keeps the journal of an open spool on the disk if it is the last one to be closed.

    SQLite deletes the journal with the last connection, and a full disk has no room for another one. A connection that
    cannot write deletes nothing.

    Raises:
        sqlite3.Error: If the file cannot be opened.
    """
    connection = sqlite3.connect(
        f"file:{quote(os.path.abspath(path))}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA user_version").fetchone()  # opens the journal
    return connection


def empty_journal(connection: sqlite3.Connection, path: str) -> None:
    """Move the content of the journal to the file. The journal keeps its size, but is empty to whoever opens it next.

    So the file alone is the spool, and may be replaced. Nothing is changed while another program reads the spool, or
    where the disk has no room for the file to grow.
    """
    with contextlib.suppress(sqlite3.Error, OSError):
        connection.execute("PRAGMA busy_timeout = 0")
        (busy, *_) = connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        if not busy:  # the next writer begins with a new header
            with open(path + "-wal", "r+b") as journal:
                journal.write(bytes(_JOURNAL_HEADER))


def _open_checked(path: str, busy_timeout: float) -> sqlite3.Connection:
    db = connect(path, busy_timeout)
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version == 0 and tables == 0:
            db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        elif version == 1:
            _take_over(db)
        elif version != VERSION:
            raise _UnknownVersionError(f"version {version}, expected {VERSION}")
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()  # of a killed process: it need not grow then
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise _UnknownVersionError(verdict)
    except BaseException:
        db.close()
        raise
    return db


def _take_over(db: sqlite3.Connection) -> None:
    """Bring a version 1 file to this version."""
    try:
        db.executescript(f"BEGIN IMMEDIATE; {_FROM_VERSION_1} COMMIT;")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_ERROR:  # a table or column is missing
            raise _UnknownVersionError(f"not the layout of version 1: {error}") from error
        raise


def file_bytes(connection: sqlite3.Connection) -> int:
    """Size of the spool's file."""
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    return int(pages) * _PAGE


def used_bytes(connection: sqlite3.Connection) -> int:
    """Size of what is in the spool, without what is free in its file."""
    return file_bytes(connection) - _free_bytes(connection)


def _free_bytes(connection: sqlite3.Connection) -> int:
    (pages,) = connection.execute("PRAGMA freelist_count").fetchone()
    return int(pages) * _PAGE


def reserve(connection: sqlite3.Connection, path: str, size: int) -> None:
    """Have free pages in the spool's file, and a journal of that size, which are used when the disk is full.

    The pages are written by one transaction and freed by the next, so that journal and file really have the blocks.

    Args:
        connection: The open spool.
        path: Its file.
        size: Bytes to have free; fewer where they would be more than an eighth of what the disk has left.

    Raises:
        sqlite3.Error: If the disk has no room for them; none is taken then.
        OSError: Likewise.
    """
    connection.execute("DROP TABLE IF EXISTS reserve")  # of a process that was killed here
    present = min(_free_bytes(connection), os.path.getsize(path + "-wal"))
    disk = os.statvfs(path)
    size = min(size, max(present, disk.f_bavail * disk.f_frsize // 8))
    if size < _RESERVE_MIN:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    if size <= present:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("CREATE TABLE reserve (room BLOB)")
        connection.execute("INSERT INTO reserve VALUES (zeroblob(?))", (size,))
        connection.execute("COMMIT")
        connection.execute("DROP TABLE reserve")
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    except sqlite3.Error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        raise


def open_or_begin(path: str, report: Callable[[str], None], busy_timeout: float = BUSY_TIMEOUT_S) -> sqlite3.Connection:
    """Open the file, or a new one in its place; `report` is told if the old one had to be set aside.

    Raises:
        sqlite3.Error: If that cannot be done.
        OSError: Likewise.
    """
    try:
        return _open_checked(path, busy_timeout)
    except sqlite3.DatabaseError as error:
        if not isinstance(error, _UnknownVersionError) and error.sqlite_errorcode & 0xFF not in _UNREADABLE:
            raise  # no room, no permission: the file may be whole
        aside = f"{path}.{time.time():.0f}.set-aside"
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                os.rename(path + suffix, aside + suffix)
        report(f"The spool {path} cannot be read ({error}). It was set aside as {aside}, and a new one was started.")
        return _open_checked(path, busy_timeout)
