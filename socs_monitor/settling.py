"""Files whose rows are committed, until a second look tells that they stayed as they were when they were hashed.

Of each only what the look needs is kept in memory; what its registration says is in the spool.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

from socs_monitor.checksum import fingerprint
from socs_monitor.finder import Hashed

# A file that changes again and again is registered again ever more rarely, at the longest after this (seconds).
SETTLE_MAX_S = 60.0

# Looks are gathered: they are due at whole multiples of this (seconds), since each waking of the thread costs.
_LOOK_EVERY_S = 0.5


class Registered(NamedTuple):
    """A registration's key in the spool, its file, and the fingerprint from when that was hashed."""

    id: int
    path: str
    fingerprint: int


# Archive and remote path of a registration; with the local path they are its key.
_Key = tuple[str, str]


def _key(hashed: Hashed) -> _Key:
    return hashed.file.entry.archive_name, hashed.file.entry.remote_path


class Settling:
    """What is yet to be looked at again. For one thread.

    Args:
        settle_after: Seconds from the commit to the look.
    """

    def __init__(self, settle_after: float) -> None:
        self._settle_after = settle_after
        self._batches: list[tuple[float, int, list[Registered]]] = []  # heap by time of the look
        self._serial = itertools.count()
        self._delays: dict[int, float] = {}  # seconds to the next look, for files that had changed
        self._keys: dict[str, dict[int, _Key]] = {}  # of what is yet to be settled, by path and id
        self._superseded: set[int] = set()

    @property
    def due(self) -> float:
        """Unix time of the next look; infinite where there is none."""
        return self._batches[0][0] if self._batches else math.inf

    def add(self, batch: Sequence[Hashed], now: float) -> None:
        """Take a batch whose rows were committed just `now` (unix time)."""
        entries = [Registered(r.id, file.entry.local_path, seen) for r, file, seen in batch]
        delays = [self._delays[entry.id] for entry in entries if entry.id in self._delays] if self._delays else ()
        due = now + max(delays, default=self._settle_after)
        heapq.heappush(self._batches, (math.ceil(due / _LOOK_EVERY_S) * _LOOK_EVERY_S, next(self._serial), entries))
        for hashed in batch:
            self._note(hashed)

    def _note(self, hashed: Hashed) -> None:
        """Remember a registration; of two keys of a path the one announced last supersedes the other."""
        id_, key = hashed.registration.id, _key(hashed)
        known = self._keys.setdefault(hashed.file.entry.local_path, {})
        for other in known:
            if known[other] != key:
                self._superseded.add(min(other, id_))
        known[id_] = key

    def void(self, batch: Sequence[Hashed]) -> list[int]:
        """Return the ids of the registrations in a batch that have a row already and are superseded; forget them.

        Another key of their path was announced later, so the file's new content belongs to that key. Registering
        it under the former key, too, would replace the former version in the archive.
        """
        void: list[int] = []
        again = [
            hashed for hashed in batch if hashed.registration.id in self._keys.get(hashed.file.entry.local_path, ())
        ]
        if again:
            for hashed in batch:
                self.supersede(hashed)
            for hashed in again:
                id_ = hashed.registration.id
                if id_ in self._superseded:
                    void.append(id_)
                    self._forget(id_, hashed.file.entry.local_path)
        return void

    def supersede(self, hashed: Hashed) -> None:
        """Let a registration supersede those of other keys of its path that were announced before it."""
        known = self._keys.get(hashed.file.entry.local_path, {})
        id_, key = hashed.registration.id, _key(hashed)
        self._superseded.update(other for other in known if known[other] != key and other < id_)

    def _forget(self, id_: int, path: str) -> None:
        self._delays.pop(id_, None)
        self._superseded.discard(id_)
        known = self._keys.get(path, {})
        known.pop(id_, None)
        if not known:
            self._keys.pop(path, None)

    @property
    def changed(self) -> Container[int]:
        """The ids of registrations whose files had changed after they were registered."""
        return self._delays

    def look(self, now: float) -> tuple[list[int], list[Registered]]:
        """Look at all files that are due.

        Returns:
            The ids of those that are settled, and those that changed. A file that changed after another key of its
            path was announced is settled as well.
        """
        settled: list[int] = []
        changed: list[Registered] = []
        for entry in self._take(now):
            id_, path, before = entry
            try:
                after = fingerprint(os.stat(path))
            except OSError:  # its row is there, and a file that is gone has nothing to add
                after = before
            if after == before or id_ in self._superseded:
                self._forget(id_, path)
                settled.append(id_)
            else:
                delay = self._delays.get(id_, self._settle_after)
                self._delays[id_] = min(2 * delay, SETTLE_MAX_S)
                changed.append(entry)
        return settled, changed

    def take_all(self) -> list[int]:
        """Return the ids of all there are, and forget them."""
        return [entry.id for entry in self._take(math.inf)]

    def _take(self, until: float) -> Iterator[Registered]:
        while self._batches and self._batches[0][0] <= until:
            yield from heapq.heappop(self._batches)[2]
