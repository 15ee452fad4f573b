"""Opening a registered path safely, and its MD5 sum.

A sender names the path, so nothing but a regular file is ever opened. A path outside of the data roots is refused by
its text alone, before any I/O. Otherwise the path is resolved once to an ``O_PATH`` descriptor, which touches no device
and waits for no FIFO. The checks, the opening and the reading go through that descriptor: what is checked is hashed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

# Read at a time. Large enough that the interpreter lock is held for little of the time, small enough that a stop
# is noticed within milliseconds and the buffer stays in the processor's cache.
_CHUNK = 1 << 20

# A worker reads this much of a large file (bytes, 60 ms of hashing), then turns to the file of which it has read least.
SLICE = 32 << 20

_FIND = os.O_PATH | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class FileRefusedError(Exception):
    """The path names something that is never opened: no regular file, or one outside of the data roots."""


class Checksum(NamedTuple):
    """A file's MD5 sum (hexadecimal), with its `fingerprint` from before it was read."""

    md5: str
    fingerprint: int


class Access(NamedTuple):
    """What may be opened.

    Attributes:
        roots: Absolute folders; where there are any, a file outside of them is refused.
        own: Resolved paths of SQLite databases that this process has open; these, their journals and whatever else
            begins with their names are refused.
    """

    roots: tuple[str, ...] = ()
    own: tuple[str, ...] = ()


def fingerprint(status: os.stat_result) -> int:
    """Return a hash of a file's place, size and mtime, which tells that the file changed.

    There are tens of thousands of these under load, and the figures themselves would be half of their memory.
    """
    return hash((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


def check_path(path: str, roots: tuple[str, ...]) -> None:
    """Refuse a path that names no place below the data roots, without touching its disk.

    Raises:
        FileRefusedError: If it does not.
    """
    if roots and (not path.startswith(_below(roots)) or "/../" in path):
        normal = os.path.normpath(path)
        if normal.startswith("//"):  # the only ones that it keeps
            normal = normal[1:]
        if not _is_inside(normal, roots):
            raise FileRefusedError(f"{path} is outside of the data roots {', '.join(roots)}")


def _find(path: str, access: Access) -> tuple[int, os.stat_result]:
    """Return an ``O_PATH`` descriptor of a file that may be opened, and its status."""
    roots, own = access
    check_path(path, roots)
    try:
        handle = os.open(path, _FIND)
    except OSError:
        if roots and not _is_inside(os.path.realpath(path), roots):
            raise FileRefusedError(f"{path} is outside of the data roots {', '.join(roots)}") from None
        raise
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise FileRefusedError(f"{path} is {_kind(status.st_mode)}, not a regular file")
        target = os.readlink(str(handle), dir_fd=_descriptors(os.getpid()))
        if roots and not _is_inside(target, roots):
            raise FileRefusedError(f"{path} is {target}, outside of the data roots {', '.join(roots)}")
        # closing a descriptor of a file that SQLite has open here would drop all of its locks (POSIX)
        if target.startswith(own) or (status.st_nlink > 1 and _is_one_of(status, own)):
            raise FileRefusedError(f"{path} is {target}, a file of the monitor's own databases")
    except BaseException:
        os.close(handle)
        raise
    return handle, status


def _open(path: str, access: Access) -> tuple[int, os.stat_result]:
    handle, status = _find(path, access)
    try:
        return os.open(str(handle), _READ, dir_fd=_descriptors(os.getpid())), status
    finally:
        os.close(handle)


def _is_one_of(status: os.stat_result, own: tuple[str, ...]) -> bool:
    names = [name + suffix for name in own for suffix in ("", "-wal", "-shm")]
    return any(os.path.samestat(status, os.stat(name)) for name in names if os.path.exists(name))


@functools.cache
def _descriptors(pid: int) -> int:
    """The folder of process `pid`'s descriptors, kept open: the way there would be looked up twice for each file."""
    return os.open(f"/proc/{pid}/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _is_inside(path: str, roots: tuple[str, ...]) -> bool:
    """Whether a path begins with one of the roots, as they are spelled or without symbolic links."""
    return path.startswith(_below(roots)) or any(path.startswith(_below((_resolved(root),))) for root in roots)


@functools.cache
def _resolved(root: str) -> str:
    """Return a root without symbolic links. Found when it is first needed, since its disk may hang."""
    return os.path.realpath(root)


@functools.cache
def _below(roots: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(root.rstrip("/") + "/" for root in roots)


def _kind(mode: int) -> str:
    names = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
    }
    return names.get(stat.S_IFMT(mode), "something else")


def present_fingerprint(path: str, access: Access, folders: dict[str, bool]) -> int:
    """Return the fingerprint of a file as it is now.

    Args:
        path: The file.
        access: What may be opened.
        folders: For folders that were resolved a moment ago, whether they are below the data roots; filled here. Most
            files of a batch lie in few folders, and to resolve each path costs five times as much.

    Raises:
        FileRefusedError: If the path names something that is never opened.
        OSError: If the file is missing or cannot be looked up.
    """
    folder = path.rpartition("/")[0]
    if (inside := folders.get(folder)) is None:
        roots = access.roots
        inside = not roots or _is_inside(f"{os.path.realpath(folder)}/", roots)
        folders[folder] = inside
    if inside:
        status = os.lstat(path)
        if stat.S_ISREG(status.st_mode):
            return fingerprint(status)
    handle, status = _find(path, access)
    os.close(handle)
    return fingerprint(status)


def checksum(path: str, access: Access, max_bytes: int) -> Checksum | None:
    """Hash a small file by one read.

    Args:
        path: The file.
        access: What may be opened.
        max_bytes: A larger file is left alone.

    Returns:
        The sum, or None for a file larger than `max_bytes`, or one that has to be read by `Reading`.

    Raises:
        FileRefusedError: If the path names something that is never opened.
        OSError: If the file is missing or cannot be read.
    """
    file, status = _open(path, access)
    try:
        size = status.st_size
        if size > max_bytes:
            return None
        # asked for one byte more than there should be: anything but the size means that the file changes, or that its
        # file system hands out less than it is asked for (FUSE and network file systems may)
        content = os.read(file, size + 1)
        if len(content) != size:
            return None
        return Checksum(hashlib.md5(content, usedforsecurity=False).hexdigest(), fingerprint(status))
    finally:
        os.close(file)


class Reading:
    """A file that is hashed slice by slice; no descriptor stays open between two slices.

    A file that is replaced or cut meanwhile is read from its beginning again. One that grows is read to its end; its
    fingerprint is from before it was read, so that the re-check finds the change.

    Args:
        path: The file.
        access: What may be opened.
        slice_size: Bytes of a slice.

    Attributes:
        read (int): Number of bytes read so far, of all attempts.
    """

    def __init__(self, path: str, access: Access, slice_size: int = SLICE) -> None:
        self.path = path
        self.read = 0
        self._slice_size = slice_size
        self._access = access
        self._begin()

    def _begin(self) -> None:
        self._digest = hashlib.md5(usedforsecurity=False)
        self._offset = 0
        self._first: os.stat_result | None = None

    def next_slice(self, go_on: Callable[[], bool]) -> Checksum | None:
        """Read the next slice.

        Args:
            go_on: Called after each chunk; when it returns False, the slice ends early.

        Returns:
            The sum once the whole file is read, else None.

        Raises:
            FileRefusedError: If the path names something that is never opened.
            OSError: If the file is missing or cannot be read.
        """
        file, status = _open(self.path, self._access)
        try:
            if self._first is not None and (not os.path.samestat(status, self._first) or status.st_size < self._offset):
                self._begin()
            if self._first is None:
                self._first = status
            os.lseek(file, self._offset, os.SEEK_SET)
            os.posix_fadvise(file, self._offset, self._slice_size, os.POSIX_FADV_SEQUENTIAL)
            end = self._offset + self._slice_size
            while self._offset < end:
                chunk = os.read(file, _CHUNK)
                if not chunk:
                    return Checksum(self._digest.hexdigest(), fingerprint(self._first))
                self._digest.update(chunk)
                self._offset += len(chunk)
                self.read += len(chunk)
                if not go_on():
                    break
            return None
        finally:
            os.close(file)
