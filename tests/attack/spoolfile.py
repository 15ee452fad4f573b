"""Writes a stopped agent's spool directly, in the layout of any version."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Version 1, as released. Its content must never be lost.
VERSION_1 = """
PRAGMA journal_mode = WAL;
CREATE TABLE registrations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    state TEXT NOT NULL DEFAULT 'pending',
    received REAL NOT NULL,
    sender TEXT NOT NULL,
    message TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    due REAL,
    reason TEXT,
    refused INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX dead ON registrations (refused DESC, id) WHERE state = 'dead';
PRAGMA user_version = 1;
"""


def make_version_1(spool: Path) -> None:
    """Create an empty spool of version 1."""
    with contextlib.closing(sqlite3.connect(spool)) as connection:
        connection.executescript(VERSION_1)


def insert(spool: Path, messages: Iterable[str | bytes], **columns: Any) -> None:
    """Insert registrations into the spool of a stopped agent, of any version.

    Args:
        spool: The file.
        messages: Their messages; bytes become text that may be invalid UTF-8.
        columns: Values of other columns, the same for all. Columns that this version does not have are ignored.
    """
    with contextlib.closing(sqlite3.connect(spool)) as connection, connection:
        present = {name for _, name, *_ in connection.execute("PRAGMA table_info(registrations)")}
        values = {"received": 1_700_000_000.0, "sender": "127.0.0.1:40000", **columns}
        values = {name: value for name, value in values.items() if name in present}
        connection.executemany(
            f"INSERT INTO registrations (message, {', '.join(values)}) VALUES (CAST(? AS TEXT){', ?' * len(values)})",
            [(message, *values.values()) for message in messages],
        )
