"""Reading a SQLite file that others write: nothing is locked for long, and no file is ever made."""

from __future__ import annotations

import os
import sqlite3
from urllib.parse import quote

_WAL = 2  # the 19th byte of a database that is in WAL mode
_BUSY_TIMEOUT_S = 2.0


def connect(path: str) -> sqlite3.Connection:
    """Open a database read-only.

    A reader of a database in WAL mode that nobody has open would make its ``-wal`` and ``-shm``, and leave them
    behind: with the reader's owner, so that the writer might never open it again. Such a file is read as one that
    nobody changes. Closing drops SQLite's locks in this process: not for one that has the database open otherwise.

    Raises:
        OSError: If the file cannot be opened.
        sqlite3.Error: If it cannot be read.
    """
    with open(path, "rb") as file:
        in_wal_mode = file.read(20)[18:19] == bytes([_WAL])
    is_open = os.path.exists(path + "-wal") and os.path.exists(path + "-shm")
    immutable = "&immutable=1" if in_wal_mode and not is_open else ""
    return sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=ro{immutable}", uri=True, timeout=_BUSY_TIMEOUT_S)
