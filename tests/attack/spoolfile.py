"""Entries in the spool's file that the running agent did not write, in any version's layout."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Version 1, as released: what is in such a file is never to be lost.
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
    """Begin a spool as version 1 did."""
    with contextlib.closing(sqlite3.connect(spool)) as connection:
        connection.executescript(VERSION_1)


def insert(spool: Path, messages: Iterable[str | bytes], **columns: Any) -> None:
    """Put registrations into the spool of a stopped agent, whatever its version.

    Args:
        spool: The file.
        messages: Each one's message; bytes become text that may be no UTF-8.
        columns: Values of other columns, the same for all; one that this version does not have is left out.
    """
    with contextlib.closing(sqlite3.connect(spool)) as connection, connection:
        present = {name for _, name, *_ in connection.execute("PRAGMA table_info(registrations)")}
        values = {"received": 1_700_000_000.0, "sender": "127.0.0.1:40000", **columns}
        values = {name: value for name, value in values.items() if name in present}
        connection.executemany(
            f"INSERT INTO registrations (message, {', '.join(values)}) VALUES (CAST(? AS TEXT){', ?' * len(values)})",
            [(message, *values.values()) for message in messages],
        )
