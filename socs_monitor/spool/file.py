"""The spool's file: layout, versions, lock, and the reserve for a full disk.

A private SQLite file in WAL mode, which one process at a time may open (``flock`` on ``<spool>.lock``). A file that
cannot be read is renamed and reported, never overwritten, and never prevents a start. Layout, version 2
(``PRAGMA user_version``)::

    registrations(id, state, received, sender, message, attempts, rounds, due, reason, refused)

    id        ascending in the order of arrival, never reused
    state     one of `states.STORED`
    received  unix time of acceptance
    sender    host:port
    message   the registration as a JSON datagram, reduced to the fields that `messages.parse` keeps
    attempts  number of failed attempts to read the file
    rounds    0 until the row is committed, then 1, plus 1 each time the file changed after that
    due       when to process it next, in seconds of CLOCK_MONOTONIC; null if it is dead, or while the queue or a worker
              holds it. Assigned again at each start, because this clock restarts at each boot
    reason    why it is waiting or dead
    refused   1 if the message can never become a row, 0 if its file failed
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

from socs_monitor.spool.states import STORED, State

VERSION = 2

_PAGE = 4096  # bytes, SQLite's default

# Free space kept in the file and in its journal (bytes). On a full disk this holds 45,000 registrations of 320 bytes,
# more than the intake can hold in memory. Making it takes 0.1 s at the first start.
RESERVE = 16 * 1024 * 1024

_RESERVE_MIN = 64 * 1024  # bytes; a smaller reserve is useless

# Journal size (pages) at which a commit checkpoints it. A backstop: under constant load, the checkpoints of
# `Spool.sync` cannot reset the journal.
_JOURNAL_PAGES = 16_384

_JOURNAL_HEADER = 32  # bytes; SQLite treats a journal without a valid header as empty

_LOCK_RETRY_S = 0.05  # `is_locked` holds the lock for microseconds, so a taken lock is tried once more

# Result codes of a file that is damaged, or lacks a table or column. After any other error it may be intact.
_INVALID = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR)

BUSY_TIMEOUT_S = 5.0  # only `Spool.sync` and a person's tools hold a lock, for milliseconds

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

# Registrations of version 1 become newly received ones.
_MIGRATE_FROM_1 = f"""
ALTER TABLE registrations RENAME TO former;
DROP INDEX IF EXISTS dead;
{_SCHEMA}
INSERT INTO registrations (received, sender, message, due) SELECT received, sender, message, 0 FROM former ORDER BY id;
DROP TABLE former;
"""

_IN_UNKNOWN_STATE = f"state NOT IN {tuple(map(str, STORED))}"

OLDEST_PENDING = (
    f"SELECT id, received FROM registrations INDEXED BY pending WHERE state = '{State.PENDING}' ORDER BY id LIMIT 1"
)


class SpoolError(Exception):
    """The spool cannot be used now; the call had no effect."""


class SpoolBusyError(SpoolError):
    """Another process has the spool open."""


def take_lock(path: str) -> IO[bytes]:
    """Lock the spool for this process until the returned file is closed.

    Raises:
        SpoolBusyError: If another process holds the lock.
        SpoolError: If the lock file cannot be created.
    """
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        lock_file = open(path + ".lock", "ab")  # noqa: SIM115 (open as long as the spool is)
    except OSError as error:
        raise open_error(path, error) from error
    try:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_RETRY_S)
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock_file.close()
        raise SpoolBusyError(
            f"the spool {path} is in use by another process. Stop the other agent, or give this one its own"
            f" --instance-id or --spool-path. To find the process, run: fuser {path}.lock"
        ) from error
    return lock_file


def is_locked(path: str) -> bool:
    """Whether a process has the spool open. Does not disturb that process.

    Raises:
        OSError: If the lock file cannot be read.
    """
    with open(path + ".lock", "rb") as lock_file:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def open_error(path: str, error: Exception) -> SpoolError:
    """Return the error of a spool that cannot be opened."""
    folder = os.path.dirname(os.path.abspath(path))
    return SpoolError(
        f"cannot open the spool {path}: {error}. Check that its disk has room and that this user may write there. Run:"
        f" df -h {folder}; ls -la {folder}"
    )


def connect(path: str, busy_timeout: float = BUSY_TIMEOUT_S) -> sqlite3.Connection:
    """Return a connection in autocommit mode, for any thread, which waits `busy_timeout` seconds for a lock.

    Raises:
        sqlite3.Error: If the file cannot be opened.
    """
    db = sqlite3.connect(path, timeout=busy_timeout, isolation_level=None, check_same_thread=False)
    # invalid text, from another program or a bad disk, must not block the other registrations
    db.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
    db.execute(f"PRAGMA page_size = {_PAGE}")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute(f"PRAGMA wal_autocheckpoint = {_JOURNAL_PAGES}")
    return db


def open_or_replace(path: str, report: Callable[[str], None], busy_timeout: float) -> sqlite3.Connection:
    """Open the file, or start a new one if it is invalid; `report` is called with a line that says so.

    Raises:
        sqlite3.Error: If that fails, e.g. for lack of room or permission; the file is left as it is.
        OSError: If an invalid file cannot be renamed.
    """
    try:
        return _open_checked(path, busy_timeout)
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF not in _INVALID:
            raise
        aside = f"{path}.{time.time():.0f}.set-aside"
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                os.rename(path + suffix, aside + suffix)
        report(
            f"The spool {path} cannot be read ({error}). It was set aside as {aside}, and a new one was started."
            " Registrations in the old file are not processed. To register their files, run: socs-monitor backfill ROOT"
        )
        return _open_checked(path, busy_timeout)


def _open_checked(path: str, busy_timeout: float) -> sqlite3.Connection:
    db = connect(path, busy_timeout)
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version == 1 or version == tables == 0:
            db.executescript(f"BEGIN IMMEDIATE; {_MIGRATE_FROM_1 if version else _SCHEMA} COMMIT;")
        elif version != VERSION:
            raise sqlite3.DatabaseError(f"version {version}, expected {VERSION}")
        # after a crash, reuse the journal from its beginning: on a full disk it could not grow
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        if db.execute(f"SELECT 1 FROM registrations WHERE {_IN_UNKNOWN_STATE} LIMIT 1").fetchone():
            db.execute(f"UPDATE registrations SET state = '{State.PENDING}' WHERE {_IN_UNKNOWN_STATE}")
    except BaseException:
        db.close()
        raise
    return db


def keep_journal(path: str) -> sqlite3.Connection:
    """Return a connection to an open spool that keeps the journal on the disk if it is closed last.

    The last connection to be closed deletes the journal, unless it is read-only. On a full disk the journal could not
    be created again.

    Raises:
        sqlite3.Error: If the file cannot be opened.
    """
    uri = f"file:{quote(os.path.abspath(path))}?mode=ro"
    db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA user_version").fetchone()  # opens the journal
    return db


def empty_journal(db: sqlite3.Connection, path: str) -> None:
    """Move the journal's content to the file. The journal keeps its size, but is empty when the spool is opened again.

    So the file alone is the whole spool, and may be copied or replaced. If another program is reading the spool or the
    file cannot grow, the journal keeps its content, too.
    """
    with contextlib.suppress(sqlite3.Error, OSError):
        db.execute("PRAGMA busy_timeout = 0")
        (busy, *_) = db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        if not busy:  # the next transaction writes a new header
            with open(path + "-wal", "r+b") as journal:
                journal.write(bytes(_JOURNAL_HEADER))


def file_bytes(db: sqlite3.Connection) -> int:
    """Return the size of the spool's file."""
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    return int(pages) * _PAGE


def used_bytes(db: sqlite3.Connection) -> int:
    """Return the size of the spool's content: the file without its free pages."""
    return file_bytes(db) - free_bytes(db)


def free_bytes(db: sqlite3.Connection) -> int:
    """Return the size of the free pages in the spool's file."""
    (pages,) = db.execute("PRAGMA freelist_count").fetchone()
    return int(pages) * _PAGE


def reserve(db: sqlite3.Connection, path: str, size: int) -> None:
    """Provide free pages in the spool's file and a journal of the same size, for use when the disk is full.

    One transaction writes the pages and the next frees them, so that both files own their blocks.

    Args:
        db: The open spool.
        path: Its file.
        size: Bytes to reserve, limited to an eighth of the disk's free space. A reserve that exists is kept.

    Raises:
        sqlite3.Error: If the disk has no room; nothing is reserved then.
        OSError: The same.
    """
    db.execute("DROP TABLE IF EXISTS reserve")  # left by a process that was killed here
    present = min(free_bytes(db), os.path.getsize(path + "-wal"))
    disk = os.statvfs(path)
    size = min(size, max(present, disk.f_bavail * disk.f_frsize // 8))
    if size < _RESERVE_MIN:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    if size <= present:
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        db.execute("CREATE TABLE reserve (room BLOB)")
        db.execute("INSERT INTO reserve VALUES (zeroblob(?))", (size,))
        db.execute("COMMIT")
        db.execute("DROP TABLE reserve")
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    except sqlite3.Error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        raise
