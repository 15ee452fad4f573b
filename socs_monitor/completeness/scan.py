"""Search for timestream files that no row names.

A scan walks the timestreams folder and looks its files up in the SupRsync database. It changes nothing; the caller
registers what was found like any other file.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from socs_monitor.spool.records import Incoming
from socs_monitor.suprsync import archive
from socs_monitor.suprsync.database import Database
from socs_monitor.wire import messages

# Seconds without a change after which a file is complete. The streamer writes several times a second.
QUIET_S = 120.0

_SENDER = "backfill"
_BATCH = 500  # files looked up at a time
_MAX_PATHS = 20  # paths listed by `Scan.progress`


class Scan:
    """Iterates over the paths of g3 files (``<root>/<5 digits>/<stream id>/<name>.g3``) that no row names, in order.

    Iterating raises `OSError` if a folder cannot be read, and `DatabaseUnavailableError`.

    Args:
        root: The timestreams folder. Paths begin with it, so it must be spelled as the streamer spells it.
        db_path: The SupRsync database.
        report: Called with `progress` after each batch of files.
        clock: Returns unix time.
        stopped: Called at every file. The iteration ends when it returns True.

    Attributes:
        seen (int): Number of files seen so far, without those that may still be written.
        unregistered (int): Number of those files that no row names.
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
        with contextlib.closing(database):
            files = self._files()
            is_last = False
            while not is_last:
                batch = list(itertools.islice(files, _BATCH))
                if self._stopped():
                    return
                is_last = len(batch) < _BATCH
                registered = database.rows(batch)
                unregistered = [path for path in batch if path not in registered]
                self.seen += len(batch)
                self.unregistered += len(unregistered)
                self._paths += unregistered[: _MAX_PATHS - len(self._paths)]
                yield from unregistered
                self._report(self.progress())

    def progress(self) -> dict[str, Any]:
        """Return the progress for ``session.data``."""
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
        """Iterate over the entries of a folder by name, until the scan is stopped."""
        with os.scandir(folder) as entries:
            found = sorted(itertools.takewhile(lambda _: not self._stopped(), entries), key=lambda entry: entry.name)
        return itertools.takewhile(lambda _: not self._stopped(), found)


def registration_of(path: str) -> tuple[dict[str, Any], Incoming]:
    """Return the metadata and the spool entry of a timestream file, as if its datagram had arrived."""
    meta = {"path": path, "archive_name": archive.TIMESTREAMS, "pub_id": _SENDER}
    return meta, Incoming(time.time(), _SENDER, messages.encode_file(meta))
