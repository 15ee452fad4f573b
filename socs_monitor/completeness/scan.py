"""Timestream files that no row names: found by walking their folder, and registered like any other."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from socs_monitor.spool.records import Incoming
from socs_monitor.suprsync import archive
from socs_monitor.suprsync.database import Database
from socs_monitor.wire import messages

# A file that changed within this time (seconds) may still be written; the streamer writes several times a second.
QUIET_S = 120.0

_SENDER = "backfill"
_AT_A_TIME = 500
_PATHS_SHOWN = 20


class Scan:
    """Iterates over the g3 files below a timestreams folder (``<5 digits>/<stream id>/<name>.g3``) that no row names.

    Args:
        root: The folder; paths begin with it, so it must be spelled as the streamer spells it.
        db_path: The SupRsync database.
        report: Called now and then with `progress`.
        clock: Gives unix time.
        stopped: Asked at every file; once it says so, the iteration ends.

    Attributes:
        seen (int): Number of files looked at so far, without those still being written.
        unregistered (int): How many of them no row names.

    Iterating raises `OSError` if the folder cannot be read, and `DatabaseUnavailableError`.
    """

    def __init__(
        self,
        root: str,
        db_path: str,
        report: Callable[[dict[str, Any]], None],
        clock: Callable[[], float] = time.time,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._root = os.path.abspath(root)
        self._db_path = db_path
        self._report = report
        self._clock = clock
        self._stopped = stopped
        self._paths: list[str] = []
        self.seen = 0
        self.unregistered = 0

    def __iter__(self) -> Iterator[str]:
        database = Database(self._db_path, create_table=False, echo=False, report=lambda _: None)
        try:
            batch: list[str] = []
            for path in self._files():
                batch.append(path)
                if len(batch) == _AT_A_TIME:
                    yield from self._unknown(database, batch)
                    batch = []
            yield from self._unknown(database, batch)
        finally:
            database.close()

    def progress(self) -> dict[str, Any]:
        """Return how far it is, for ``session.data``."""
        return {
            "timestamp": self._clock(),
            "seen": self.seen,
            "unregistered": self.unregistered,
            "paths": list(self._paths),
        }

    def _files(self) -> Iterator[str]:
        newest = self._clock() - QUIET_S
        for timecode in self._entries(self._root):
            if len(timecode.name) == 5 and timecode.name.isdigit() and timecode.is_dir():
                for stream in self._entries(timecode.path):
                    if stream.is_dir():
                        for file in self._entries(stream.path):
                            if file.name.endswith(".g3") and file.is_file() and file.stat().st_mtime < newest:
                                yield file.path

    def _entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        """Entries of a folder in the order of their names, until it is stopped."""
        with os.scandir(folder) as entries:
            found = sorted(itertools.takewhile(lambda _: not self._stopped(), entries), key=lambda entry: entry.name)
        return itertools.takewhile(lambda _: not self._stopped(), found)

    def _unknown(self, database: Database, paths: list[str]) -> Iterator[str]:
        if self._stopped():
            return
        known = database.rows(paths)
        self.seen += len(paths)
        for path in paths:
            if path not in known:
                self.unregistered += 1
                if len(self._paths) < _PATHS_SHOWN:
                    self._paths.append(path)
                yield path
        self._report(self.progress())


def registration_of(path: str) -> tuple[dict[str, Any], Incoming]:
    """What registers a timestream file, as if its datagram had arrived."""
    meta = {"path": path, "archive_name": archive.TIMESTREAMS, "pub_id": _SENDER}
    return meta, Incoming(time.time(), _SENDER, messages.encode_file(meta))
