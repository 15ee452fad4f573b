"""Folders whose disk hangs: their files are left alone until the disk answers again.

A system call on a hung disk cannot be ended, so each one costs a thread. The first folder below the data root is
suspended as soon as a call stalls there, and parked once the call counts as hanging; when `MAX_FOLDERS` of a data root
are parked, the whole root is.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

# Seconds between two probes of a parked folder.
PROBE_S = 60.0

# Parked folders of one data root at which all of it is parked.
MAX_FOLDERS = 4


class _Folder:
    def __init__(self, root: str, path: str, probe_at: float) -> None:
        self.root = root
        self.path = path  # the one that hung
        self.probe_at = probe_at
        self.probing = False
        self.parked = False


class Parking:
    """The suspended and parked folders. Outlives the workers of one run, since what hangs goes on hanging.

    Args:
        roots: The data roots; without any, folders below ``/`` are parked, but never all of it.
        spawn: Starts a daemon thread.
        probe_s: Seconds between two probes.
    """

    def __init__(
        self, roots: tuple[str, ...], spawn: Callable[[Callable[[], None], str], None], probe_s: float = PROBE_S
    ) -> None:
        self._roots = roots
        self._spawn = spawn
        self._probe_s = probe_s
        self._lock = threading.Lock()
        self._folders: dict[str, _Folder] = {}

    def __bool__(self) -> bool:
        """Whether any folder is suspended or parked."""
        return bool(self._folders)

    @property
    def folders(self) -> list[str]:
        """The parked folders."""
        return [name for name, folder in self._folders.copy().items() if folder.parked]

    def covers(self, path: str) -> bool:
        """Whether a path, however it is spelled, is in a suspended or parked folder."""
        spellings = f"{path}/", f"{os.path.normpath(path)}/"
        return any(
            spelling.startswith(f"{folder.rstrip('/')}/") for folder in list(self._folders) for spelling in spellings
        )

    def suspend(self, path: str, now: float) -> str:
        """Leave the folder alone of a path at which a call stalls, and return it.

        Args:
            path: The path.
            now: Seconds of CLOCK_MONOTONIC.
        """
        normal = os.path.normpath(path)
        root = next((root for root in self._roots if normal.startswith(root.rstrip("/") + "/")), "/")
        base = root.rstrip("/") + "/"
        name = base + normal.removeprefix(base).partition("/")[0]
        with self._lock:
            self._folders.setdefault(name, _Folder(root, path, now + self._probe_s))
        return name

    def park(self, name: str) -> str:
        """Park a suspended folder, since the call there hangs; return what is parked: it, or its whole data root."""
        with self._lock:
            folder = self._folders.get(name)
            if folder is None:  # it has just been released
                return name
            hanging = sum(other.parked and other.root == folder.root for other in self._folders.values())
            if folder.root in self._roots and hanging + 1 >= MAX_FOLDERS:
                del self._folders[name]
                name = folder.root
                folder = self._folders.setdefault(name, folder)
            folder.parked = True
        return name

    def release(self, folder: str) -> None:
        """Take a folder as usable again: a call on its disk has come back."""
        with self._lock:
            self._folders.pop(folder, None)

    def probe(self, now: float) -> None:
        """Try again what hung in folders whose time has come; one that answers is released.

        Args:
            now: Seconds of CLOCK_MONOTONIC.
        """
        for name, folder in list(self._folders.items()):
            if folder.parked and not folder.probing and folder.probe_at <= now:
                folder.probing = True
                self._spawn(self._attempt(name, folder.path), "probe")

    def _attempt(self, name: str, path: str) -> Callable[[], None]:
        def attempt() -> None:
            with contextlib.suppress(OSError):
                os.stat(path)
            self.release(name)

        return attempt
