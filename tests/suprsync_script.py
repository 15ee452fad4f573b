"""Scripts of what happens to SupRsync's files and rows, as lists of steps that JSON can carry.

``["copy"]`` and ``["delete"]`` begin a session of SupRsync, each ``["step"]`` continues it; without a session that does
nothing. Between two of them other programs act, by `Outside`. Imports nothing but the standard library, because the
interpreter of the published SupRsync runs it as well.
"""

from __future__ import annotations

import hashlib
import os
import random
import sqlite3
from pathlib import Path
from typing import Any

Step = list[Any]

PATHS = ("x", "y")
REMOTE_PATHS = ("17000/s/x", "17000/s/y")
CONTENTS = ("1", "2")

_COLUMNS = (
    *("local_path", "local_md5sum", "archive_name", "remote_path", "timestamp"),
    *("remote_md5sum", "removed", "failed_copy_attempts", "deletable", "ignore"),
)


def _md5(content: str) -> str:
    return hashlib.md5(content.encode(), usedforsecurity=False).hexdigest()


class Outside:
    """Everybody else: those who write files and rows, and hold locks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._db = sqlite3.connect(folder / "suprsync.db", isolation_level=None)

    def __call__(self, step: Step) -> None:
        kind, *arguments = step
        getattr(self, kind)(*arguments)

    def write(self, name: str, content: str) -> None:
        """Write a file."""
        (self._folder / name).write_text(content)

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self._folder / name).unlink(missing_ok=True)

    def insert(self, name: str, *values: object) -> None:
        """Insert a row; `values` are those of the columns after ``local_path``."""
        marks = ", ".join("?" * len(_COLUMNS))
        statement = f"INSERT INTO supersync_v0 ({', '.join(_COLUMNS)}) VALUES ({marks})"
        self._db.execute(statement, (str(self._folder / name), *values))

    def set(self, id_: int, column: str, value: object) -> None:
        """Change a column of a row."""
        self._db.execute(f"UPDATE supersync_v0 SET {column} = ? WHERE id = ?", (value, id_))

    def lock(self) -> None:
        """Hold the write lock, or let go of it."""
        self._db.execute("ROLLBACK" if self._db.in_transaction else "BEGIN IMMEDIATE")

    def result(self, archive: dict[str, bytes]) -> list[Any]:
        """What there is in the end: rows (of times only whether there are any), files and the archive."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._db.row_factory = sqlite3.Row
        rows = [dict(row) for row in self._db.execute("SELECT * FROM supersync_v0 ORDER BY id")]
        self._db.close()
        for row in rows:
            row["local_path"] = os.path.basename(row["local_path"])
            row["copied"] = row["copied"] and "a time"
            row["removed"] = row["removed"] and "a time"
        files = {name: (self._folder / name).read_text() for name in PATHS if (self._folder / name).exists()}
        return [rows, files, {path: content.decode() for path, content in sorted(archive.items())}]


def random_script(choose: random.Random) -> list[Step]:
    """Draw a script: some files and rows, and then sessions of SupRsync with interference."""
    sums = [_md5(content) for content in CONTENTS]
    script: list[Step] = [["write", name, choose.choice(CONTENTS)] for name in PATHS if choose.random() < 0.9]
    rows = choose.randint(1, 4)
    for _ in range(rows):
        script.append(
            [
                "insert", choose.choice(PATHS), choose.choice(sums), choose.choice(["smurf"] * 4 + ["timestreams"]),
                choose.choice(REMOTE_PATHS), choose.choice([1.0, 1.0, 9e9]), choose.choice([None, None, *sums]),
                choose.choice([None, None, None, 0.0, 7.0]), choose.choice([0, 0, 0, 1, 4, 5]),
                choose.random() < 0.7, choose.random() < 0.15,
            ]
        )  # fmt: skip
    for _ in range(choose.randint(1, 5)):
        session = choose.choice(["copy", "copy", "delete"])
        script.append([session])
        for _ in range(4 if session == "copy" else 2):
            while choose.random() < 0.35:
                script.append(_interference(choose, rows, sums))
            script.append(["step"])
    return script


def _interference(choose: random.Random, rows: int, sums: list[str]) -> Step:
    kind = choose.choice(["write", "write", "remove", "set", "set", "set"])
    if kind == "write":
        return ["write", choose.choice(PATHS), choose.choice(CONTENTS)]
    if kind == "remove":
        return ["remove", choose.choice(PATHS)]
    column, values = choose.choice(
        [
            ("local_md5sum", sums), ("remote_md5sum", [None, *sums]), ("removed", [None, 0.0]),
            ("ignore", [True, False]),
            ("failed_copy_attempts", [0, 4, 5]), ("deletable", [True, False]), ("timestamp", [1.0, 9e9]),
        ]
    )  # fmt: skip
    return ["set", choose.randint(1, rows), column, choose.choice(values)]
