"""Folders on a hung disk, whose files are left alone until the disk answers.

A system call on a hung disk cannot be interrupted, so each one costs a thread. The first folder below the data root is
suspended as soon as a call stalls there, and parked once the call counts as hung. When `MAX_FOLDERS` folders of a data
root are parked, the whole root is. So a hung data root costs few threads, and other files are not affected.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

from socs_monitor.registration.checksum import Access, FileRefusedError, is_below, read_byte

# Seconds between two probes of a parked folder.
PROBE_S = 60.0

# Number of parked folders at which their whole data root is parked.
MAX_FOLDERS = 4


class HungError(Exception):
    """The file is on a hung disk, and is not accessed now."""

    def __str__(self) -> str:
        return "reading the file hangs"


class _Folder:
    def __init__(self, root: str, path: str, offset: int, probe_at: float) -> None:
        self.root = root
        self.path = path  # the file where a call hung, and where in it
        self.offset = offset
        self.probe_at = probe_at
        self.is_probing = False
        self.is_parked = False


class Parking:
    """The suspended and parked folders. It outlives the workers of one run, because a hung disk outlives them, too.

    Args:
        access: Which files may be opened. Without data roots, folders below ``/`` are parked, but never all of it.
        spawn: Starts a daemon thread.
    """

    def __init__(self, access: Access, spawn: Callable[[Callable[[], None], str], None]) -> None:
        self._access = access
        self._spawn = spawn
        self._lock = threading.Lock()
        self._folders: dict[str, _Folder] = {}

    def __bool__(self) -> bool:
        """Whether any folder is suspended or parked."""
        return bool(self._folders)

    @property
    def folders(self) -> list[str]:
        """The parked folders."""
        return [name for name, folder in self._folders.copy().items() if folder.is_parked]

    def check(self, path: str) -> None:
        """Make sure that a file may be accessed, however its path is spelled.

        Raises:
            HungError: If it is in a suspended or parked folder.
        """
        folders = tuple(self._folders)
        if is_below(f"{path}/", folders) or is_below(f"{os.path.normpath(path)}/", folders):
            raise HungError

    def root_of(self, path: str) -> str:
        """Return the data root of a file, or ``/`` if it is below none."""
        normal = os.path.normpath(path)
        return next((root for root in self._access.roots if is_below(normal, (root,))), "/")

    def suspend(self, path: str, offset: int, now: float) -> str:
        """Suspend the folder of a file where a call stalls.

        Args:
            path: The file.
            offset: Where in the file it is read, in bytes.
            now: Seconds of CLOCK_MONOTONIC.

        Returns:
            The folder.
        """
        root = self.root_of(path)
        base = root.rstrip("/") + "/"
        name = base + os.path.normpath(path).removeprefix(base).partition("/")[0]
        with self._lock:
            self._folders.setdefault(name, _Folder(root, path, offset, now + PROBE_S))
        return name

    def park(self, name: str) -> str:
        """Park a suspended folder, because the call there counts as hung.

        Returns:
            What is parked: the folder, or its whole data root.
        """
        with self._lock:
            folder = self._folders.get(name)
            if folder is None:  # it was released a moment ago
                return name
            hung = sum(other.is_parked and other.root == folder.root for other in self._folders.values())
            if folder.root in self._access.roots and hung + 1 >= MAX_FOLDERS:
                del self._folders[name]
                name = folder.root
                folder = self._folders.setdefault(name, folder)
            folder.is_parked = True
        return name

    def release(self, name: str) -> None:
        """Use a folder again, because a call on its disk has returned."""
        with self._lock:
            self._folders.pop(name, None)

    def probe(self, now: float) -> None:
        """Start a thread for each parked folder whose probe is due, unless its last probe still hangs.

        The probe reads the byte where a call hung, since a disk may hang in reads but not in look-ups. Any answer, an
        error included, releases the folder.

        Args:
            now: Seconds of CLOCK_MONOTONIC.
        """
        for name, folder in list(self._folders.items()):
            if folder.is_parked and not folder.is_probing and folder.probe_at <= now:
                folder.is_probing = True
                self._spawn(lambda name=name, folder=folder: self._probe(name, folder), "probe")  # type: ignore[misc]

    def _probe(self, name: str, folder: _Folder) -> None:
        with contextlib.suppress(OSError, FileRefusedError):
            read_byte(folder.path, self._access, folder.offset)
        self.release(name)
