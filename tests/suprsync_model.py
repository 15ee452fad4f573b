"""A model of the published SupRsync agent, whose steps a test can interleave with everything else.

SupRsync reads its rows without holding a lock, works for as long as it takes, and then writes only the columns that it
changed. So there are five steps of copying (`select`, `link`, `rsync`, `verify`, `commit`) and three of deleting
(`select_deletable`, `delete`, `commit`). `test_suprsync_model` compares it with the published code.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

COPY = ("link", "rsync", "verify", "commit")
DELETE = ("delete", "commit")


class SupRsync:
    """SupRsync on one archive.

    Args:
        db_path: The database.
        archive_name: ``smurf`` or ``timestreams``.
        clock: Gives unix time.
        max_copy_attempts: Failures after which it does not copy a row.

    Attributes:
        archive: Remote path to content.
        next: The steps of the session that are yet to be done.
    """

    def __init__(
        self, db_path: Path, archive_name: str, clock: Callable[[], float], max_copy_attempts: int = 5
    ) -> None:
        self.archive: dict[str, bytes] = {}
        self.next: list[str] = []
        self._db_path = db_path
        self._archive_name = archive_name
        self._clock = clock
        self._max_copy_attempts = max_copy_attempts
        self._files: list[Row] = []
        self._read: list[Row] = []
        self._links: dict[str, Row] = {}

    def step(self) -> None:
        """Do the next step of the session."""
        getattr(self, self.next.pop(0))()

    def abort(self) -> None:
        """End the session as an error or the end of the process does: nothing is written."""
        self.next = []

    def _rows(self, condition: str, *parameters: object) -> None:
        with contextlib.closing(sqlite3.connect(self._db_path)) as db:
            db.row_factory = sqlite3.Row
            statement = f"SELECT * FROM supersync_v0 WHERE removed IS NULL AND archive_name = ? AND {condition}"
            self._files = [dict(row) for row in db.execute(statement, (self._archive_name, *parameters))]

    def _begin(self, files: list[Row], steps: tuple[str, ...]) -> None:
        self._files = files
        self._read = [dict(file) for file in files]
        self.next = list(steps) if files else []

    def select(self) -> None:
        """Begin to copy what is to be copied."""
        self._rows("failed_copy_attempts < ? AND ignore = 0", self._max_copy_attempts)
        self._begin([file for file in self._files if file["local_md5sum"] != file["remote_md5sum"]], COPY)

    def link(self) -> None:
        """Collect the files that are there; the first row of a remote path has it."""
        self._links = {}
        for file in self._files:
            if not os.path.exists(file["local_path"]) or file["remote_path"] in self._links:
                file["failed_copy_attempts"] += 1
            else:
                self._links[file["remote_path"]] = file

    def rsync(self) -> None:
        """Copy; rsync fails if a file is gone by now, after it copied the others."""
        for remote_path, file in self._links.items():
            try:
                self.archive[remote_path] = Path(file["local_path"]).read_bytes()
            except FileNotFoundError:
                self.abort()
        for file in self._files:
            file["copied"] = self._clock()

    def verify(self) -> None:
        """Ask for the sums of the copies, and compare."""
        for remote_path, file in self._links.items():
            file["remote_md5sum"] = hashlib.md5(self.archive[remote_path]).hexdigest()
        for file in self._files:
            if file["remote_md5sum"] != file["local_md5sum"]:
                file["failed_copy_attempts"] += 1

    def select_deletable(self, delete_after: float) -> None:
        """Begin to delete what may be deleted."""
        self._rows("deletable")
        now = self._clock()
        verified = [file for file in self._files if file["local_md5sum"] == file["remote_md5sum"]]
        self._begin([file for file in verified if now > file["timestamp"] + delete_after], DELETE)

    @property
    def doomed(self) -> list[str]:
        """The local paths that `delete` deletes."""
        return [file["local_path"] for file in self._files] if "delete" in self.next else []

    def delete(self) -> None:
        """Delete."""
        for file in self._files:
            if os.path.exists(file["local_path"]):
                os.remove(file["local_path"])
                file["removed"] = self._clock()
            else:
                file["removed"] = 0

    def commit(self) -> None:
        """Write the columns that were changed; a lock makes that fail."""
        with contextlib.closing(sqlite3.connect(self._db_path, timeout=0)) as db, db:
            for file, read in zip(self._files, self._read, strict=True):
                changed = {name: value for name, value in file.items() if value != read[name]}
                if changed:
                    columns = ", ".join(f"{name} = ?" for name in changed)
                    db.execute(f"UPDATE supersync_v0 SET {columns} WHERE id = ?", (*changed.values(), file["id"]))
