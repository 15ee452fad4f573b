"""Read-only access to an SQLite file that others write. It holds no lock for long and never creates a file."""

from __future__ import annotations

import os
import sqlite3
from urllib.parse import quote

_WAL = 2  # the 19th byte of a database in WAL mode
_BUSY_TIMEOUT_S = 2.0


def connect(path: str) -> sqlite3.Connection:
    """Open a database read-only.

    If nobody has a database in WAL mode open, a reader would create its ``-wal`` and ``-shm`` and leave them behind.
    They would have the reader's owner, so the writer might never open the database again. So this database is opened as
    one that nobody changes. Do not use this in a process that also has the database open otherwise: closing drops all
    locks that the process has on the file.

    Raises:
        OSError: If the file cannot be opened.
        sqlite3.Error: If it cannot be read.
    """
    with open(path, "rb") as file:
        in_wal_mode = file.read(20)[18:19] == bytes([_WAL])
    is_open = os.path.exists(path + "-wal") and os.path.exists(path + "-shm")
    immutable = "&immutable=1" if in_wal_mode and not is_open else ""
    return sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=ro{immutable}", uri=True, timeout=_BUSY_TIMEOUT_S)
