"""The spool's file: its layout, and how it is opened.

A private SQLite file in WAL mode, opened by one process at a time (``flock`` on the file ``<spool>.lock``), with
one table. Layout, version 1 (``PRAGMA user_version``)::

    registrations(id, state, received, sender, message, attempts, due, reason, refused)

    id        in the order of arrival, never used twice
    state     pending   accepted; which of these have their row and settle, the agent that runs knows by heart
              waiting   the file was missing or unreadable, or changed after its row; looked for at `due`
              settling  as an earlier version left it; taken for pending
              dead      given up or refused, kept for a person, with its `reason`
    received  unix time of acceptance
    due       seconds of CLOCK_MONOTONIC, so of no meaning after a reboot; unix time as an earlier version left it
    sender    host:port
    message   the datagram's JSON text, as it came: a replay parses it again
    refused   1 where the message itself can never become a row, 0 where its file failed

A corrupt file, or one of an unknown version, is renamed to ``<spool>.<unix time>.set-aside`` together with its
journal and reported, and a new one begun: never overwritten, and never a reason not to start.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable
from typing import IO

VERSION = 1

PENDING = "pending"
DEAD = "dead"

_PAGE = 4096  # bytes, SQLite's default

# The journal's size (pages) at which accepting itself moves it to the file: a backstop, since under a
# load that never pauses the checkpoints of `sync` cannot reset the journal.
_JOURNAL_PAGES = 16_384

_LOOK_S = 0.05  # `is_locked` has the lock for microseconds: who finds it taken tries once more

_BUSY_TIMEOUT_S = 5.0  # only `sync`'s connection and a person's tools can be in the way, for milliseconds

_SCHEMA = f"""
CREATE TABLE registrations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    state TEXT NOT NULL DEFAULT '{PENDING}',
    received REAL NOT NULL,
    sender TEXT NOT NULL,
    message TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    due REAL,
    reason TEXT,
    refused INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX dead ON registrations (refused DESC, id) WHERE state = '{DEAD}';
PRAGMA user_version = {VERSION};
"""


class SpoolError(Exception):
    """The spool cannot be used now; nothing of the call took effect."""


class SpoolBusyError(SpoolError):
    """Another process has this spool open."""


class _UnknownVersionError(sqlite3.DatabaseError):
    """The file was written by another version of this module."""


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
            time.sleep(_LOOK_S)
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


def connect(path: str) -> sqlite3.Connection:
    """Return a connection as the spool needs it; raises `sqlite3.Error`."""
    db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    db.execute(f"PRAGMA page_size = {_PAGE}")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute(f"PRAGMA wal_autocheckpoint = {_JOURNAL_PAGES}")
    return db


def _open_checked(path: str) -> sqlite3.Connection:
    db = connect(path)
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version == 0 and tables == 0:
            db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        elif version != VERSION:
            raise _UnknownVersionError(f"version {version}, expected {VERSION}")
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise _UnknownVersionError(verdict)
    except BaseException:
        db.close()
        raise
    return db


def file_bytes(connection: sqlite3.Connection) -> int:
    """Size of the spool's file."""
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    return int(pages) * _PAGE


def used_bytes(connection: sqlite3.Connection) -> int:
    """Size of what is in the spool, without what is free in its file."""
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    return file_bytes(connection) - int(free) * _PAGE


def open_or_begin(path: str, report: Callable[[str], None]) -> sqlite3.Connection:
    """Open the file, or a new one in its place; `report` is told if the old one had to be set aside.

    Raises:
        sqlite3.Error: If that cannot be done.
        OSError: Likewise.
    """
    try:
        return _open_checked(path)
    except sqlite3.DatabaseError as error:
        if not isinstance(error, _UnknownVersionError) and error.sqlite_errorcode & 0xFF not in _UNREADABLE:
            raise  # no room, no permission: the file may be whole
        aside = f"{path}.{time.time():.0f}.set-aside"
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                os.rename(path + suffix, aside + suffix)
        report(f"the spool {path} cannot be read ({error}): set aside as {aside}, a new one is begun")
        return _open_checked(path)
