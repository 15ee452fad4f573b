"""Opening a registered file safely, and its MD5 sum.

A sender chooses the path, so only regular files are opened. A path outside of the data roots is refused by its text,
before any I/O. Any other path is resolved once, to an ``O_PATH`` descriptor, which touches no device and waits for no
FIFO. The file is checked, opened and read through that descriptor, so what is read is what was checked.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

# Bytes per read. Hashing a chunk takes 2 ms without the interpreter lock; a stop is noticed within that time, and the
# buffer fits into the processor's cache.
_CHUNK = 1 << 20

# Bytes of a large file that a worker reads (60 ms of hashing) before it turns to the least-read file.
SLICE = 32 << 20

_FIND = os.O_PATH | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


class FileRefusedError(Exception):
    """The path leads to something that is never opened: it is not a regular file, or not below a data root."""


class Checksum(NamedTuple):
    """The MD5 sum of a file (hexadecimal), and its `fingerprint` from before it was read."""

    md5: str
    fingerprint: int


class Access(NamedTuple):
    """Which files may be opened.

    Attributes:
        roots: Absolute folders. If there are any, files outside of them are refused.
        own: Resolved paths of SQLite databases that this process has open. Files whose paths begin with one of these
            are refused, which includes the journals.
    """

    roots: tuple[str, ...] = ()
    own: tuple[str, ...] = ()


def fingerprint(status: os.stat_result) -> int:
    """Return a hash of the device, inode, size and mtime of a file, to detect that it changed.

    Tens of thousands are kept under load. The four numbers themselves would be half of the memory of a re-check.
    """
    return hash((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


def check_path(path: str, roots: tuple[str, ...]) -> None:
    """Refuse a path outside of the data roots by its text, without any I/O.

    Raises:
        FileRefusedError: If the path is outside.
    """
    if roots and (not is_below(path, roots) or "/../" in path):
        normal = os.path.normpath(path)
        if normal.startswith("//"):  # `normpath` keeps two leading slashes, as POSIX allows
            normal = normal[1:]
        if not _is_inside(normal, roots):
            raise _outside(path, roots)


def _outside(path: str, roots: tuple[str, ...]) -> FileRefusedError:
    return FileRefusedError(f"{path} is outside of the data roots {', '.join(roots)}")


def _find(path: str, access: Access) -> tuple[int, os.stat_result]:
    """Return an ``O_PATH`` descriptor of a file that may be opened, and its status."""
    roots, own = access
    check_path(path, roots)
    try:
        handle = os.open(path, _FIND)
    except OSError:
        if roots and not _is_inside(os.path.realpath(path), roots):
            raise _outside(path, roots) from None
        raise
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            raise FileRefusedError(f"{path} is {kind}, not a regular file")
        target = os.readlink(str(handle), dir_fd=_descriptors(os.getpid()))
        if roots and not _is_inside(target, roots):
            raise _outside(f"{path} leads to {target}, which", roots)
        # to close a descriptor of a file that SQLite has open in this process would drop all of its locks (POSIX)
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
    """Return a descriptor of ``/proc/PID/fd``. It is kept open, to save two look-ups per file."""
    return os.open(f"/proc/{pid}/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def is_below(path: str, folders: tuple[str, ...]) -> bool:
    """Return whether the text of a path begins with one of the folders and a slash."""
    return path.startswith(_with_slashes(folders))


@functools.lru_cache
def _with_slashes(folders: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(folder.rstrip("/") + "/" for folder in folders)


def _is_inside(path: str, roots: tuple[str, ...]) -> bool:
    """Return whether a path is below one of the roots, as they are spelled or with their symbolic links resolved."""
    return is_below(path, roots) or any(is_below(path, (_resolved(root),)) for root in roots)


@functools.cache
def _resolved(root: str) -> str:
    """Return a root with its symbolic links resolved.

    It is resolved at its first use, since its disk may hang, and only once: after the link of a data root is changed,
    the agent has to be restarted.
    """
    return os.path.realpath(root)


def present_fingerprint(path: str, access: Access, folders: dict[str, bool]) -> int:
    """Return the fingerprint of a file as it is now.

    Args:
        path: The file.
        access: Which files may be opened.
        folders: Whether each folder that was resolved for this batch is below the data roots; filled here. Most files
            of a batch are in few folders, and resolving every path takes five times as long.

    Raises:
        FileRefusedError: If the path leads to something that is never opened.
        OSError: If the file is missing or cannot be examined.
    """
    folder = path.rpartition("/")[0]
    if (inside := folders.get(folder)) is None:
        roots = access.roots
        inside = folders[folder] = not roots or _is_inside(f"{os.path.realpath(folder)}/", roots)
    if inside:
        status = os.lstat(path)
        if stat.S_ISREG(status.st_mode):
            return fingerprint(status)
    handle, status = _find(path, access)
    os.close(handle)
    return fingerprint(status)


def checksum(path: str, access: Access, max_bytes: int) -> Checksum | None:
    """Hash a small file with a single read.

    Returns:
        The sum, or None if the file is larger than `max_bytes` or has to be read by `Reading`.

    Raises:
        FileRefusedError: If the path leads to something that is never opened.
        OSError: If the file is missing or cannot be read.
    """
    file, status = _open(path, access)
    try:
        size = status.st_size
        if size > max_bytes:
            return None
        # one byte more than the size is requested: any other result means that the file is changing, or that its file
        # system returns less than requested (FUSE and network file systems may)
        content = os.read(file, size + 1)
        if len(content) != size:
            return None
        return Checksum(hashlib.md5(content, usedforsecurity=False).hexdigest(), fingerprint(status))
    finally:
        os.close(file)


def read_byte(path: str, access: Access, offset: int) -> None:
    """Read one byte of a file, to find out whether its disk answers.

    Raises:
        FileRefusedError: If the path leads to something that is never opened.
        OSError: If the file is missing or cannot be read.
    """
    file, _ = _open(path, access)
    try:
        os.pread(file, 1, offset)
    finally:
        os.close(file)


class Reading:
    """A file that is hashed slice by slice. No descriptor stays open between two slices.

    A file that is replaced or truncated in between is read again from its beginning. A file that grows is read to its
    end; its fingerprint is from before it was read, so the re-check finds the change.

    Args:
        path: The file.
        access: Which files may be opened.
        slice_size: Bytes per slice.

    Attributes:
        path (str): The file.
        offset (int): Where the next slice begins, in bytes.
        read (int): Number of bytes read so far, including those before the file was replaced.
    """

    # Hundreds of thousands may be pending. With slots, and without a digest before the first slice, a pending large
    # file takes 330 bytes in all instead of 770.
    __slots__ = ("_access", "_digest", "_fingerprint", "_place", "_slice_size", "offset", "path", "read")

    def __init__(self, path: str, access: Access, slice_size: int = SLICE) -> None:
        self.path = path
        self.offset = 0
        self.read = 0
        self._slice_size = slice_size
        self._access = access
        self._place: tuple[int, int] | None = None

    def next_slice(self, go_on: Callable[[], bool]) -> Checksum | None:
        """Read the next slice.

        Args:
            go_on: Called after each chunk. If it returns False, the slice ends early.

        Returns:
            The sum when the whole file has been read, else None.

        Raises:
            FileRefusedError: If the path leads to something that is never opened.
            OSError: If the file is missing or cannot be read.
        """
        file, status = _open(self.path, self._access)
        try:
            place = status.st_dev, status.st_ino
            if place != self._place or status.st_size < self.offset:
                self._place = place
                self._fingerprint = fingerprint(status)
                self._digest = hashlib.md5(usedforsecurity=False)
                self.offset = 0
            os.lseek(file, self.offset, os.SEEK_SET)
            os.posix_fadvise(file, self.offset, self._slice_size, os.POSIX_FADV_SEQUENTIAL)
            end = self.offset + self._slice_size
            while self.offset < end:
                chunk = os.read(file, _CHUNK)
                if not chunk:
                    return Checksum(self._digest.hexdigest(), self._fingerprint)
                self._digest.update(chunk)
                self.offset += len(chunk)
                self.read += len(chunk)
                if not go_on():
                    break
            return None
        finally:
            os.close(file)
