"""Opening a registered path safely, and its MD5 sum.

A sender names the path, so nothing but a regular file is ever opened: the path is resolved once to an
``O_PATH`` descriptor, which touches no device and waits for no FIFO, and all else (the checks, the opening, the
reading) goes through that descriptor. What is checked is what is hashed.
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

_FIND = os.O_PATH | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class FileRefusedError(Exception):
    """The path names something that is never opened: no regular file, or one outside of the data roots."""


class StoppedError(Exception):
    """Hashing was given up because the process stops."""


class Checksum(NamedTuple):
    """A file's MD5 sum (hexadecimal), with its `fingerprint` from before it was read."""

    md5: str
    fingerprint: int


def fingerprint(status: os.stat_result) -> int:
    """What tells that a file changed: a hash of where it is, its size and its mtime.

    There are tens of thousands of these under load, and the figures themselves would be half of their memory.
    """
    return hash((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


def _locate(path: str, roots: tuple[str, ...], own: tuple[str, ...]) -> tuple[int, os.stat_result]:
    """Return an ``O_PATH`` descriptor of a file that may be read, and its status."""
    try:
        handle = os.open(path, _FIND)
    except OSError:
        if roots and not os.path.realpath(path).startswith(_below(roots)):
            raise FileRefusedError(f"{path} is outside of the data roots {', '.join(roots)}") from None
        raise
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise FileRefusedError(f"{path} is {_kind(status.st_mode)}, not a regular file")
        target = os.readlink(str(handle), dir_fd=_descriptors(os.getpid()))
        if roots and not target.startswith(_below(roots)):
            raise FileRefusedError(f"{path} is {target}, outside of the data roots {', '.join(roots)}")
        # closing a descriptor of a file that SQLite has open here would drop all of its locks (POSIX)
        if target.startswith(own) or (status.st_nlink > 1 and _is_one_of(status, own)):
            raise FileRefusedError(f"{path} is {target}, a file of the monitor's own databases")
    except BaseException:
        os.close(handle)
        raise
    return handle, status


def _open(path: str, roots: tuple[str, ...], own: tuple[str, ...]) -> tuple[int, os.stat_result]:
    handle, status = _locate(path, roots, own)
    try:
        return os.open(str(handle), _READ, dir_fd=_descriptors(os.getpid())), status
    finally:
        os.close(handle)


def present_fingerprint(path: str, roots: tuple[str, ...], own: tuple[str, ...]) -> int:
    """Return the fingerprint that `checksum` would give now, without reading the file.

    Raises:
        FileRefusedError: If the path names something that is not opened any more.
        OSError: If the file is missing or cannot be found.
    """
    if not roots:  # an unchanged file was in order when it was hashed; only where it lies may have changed
        return fingerprint(os.stat(path))
    handle, status = _locate(path, roots, own)
    os.close(handle)
    return fingerprint(status)


def _is_one_of(status: os.stat_result, own: tuple[str, ...]) -> bool:
    names = [name + suffix for name in own for suffix in ("", "-wal", "-shm")]
    return any(os.path.samestat(status, os.stat(name)) for name in names if os.path.exists(name))


@functools.cache
def _descriptors(pid: int) -> int:
    """The folder of process `pid`'s descriptors, kept open: the way there would be looked up twice for each file."""
    return os.open(f"/proc/{pid}/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


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


def checksum(
    path: str,
    roots: tuple[str, ...] = (),
    at_most: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
    own: tuple[str, ...] = (),
) -> Checksum | None:
    """Hash a file.

    Args:
        path: The file.
        roots: Absolute, resolved folders; where there are any, a file outside of them is refused.
        at_most: Leave a file of more bytes alone.
        stopped: Asked between two chunks whether to give up.
        own: Resolved paths of SQLite databases that this process has open; these, their journals and whatever else
            begins with their names are refused.

    Returns:
        The sum, or None for a file larger than `at_most`.

    Raises:
        FileRefusedError: If the path names something that is never opened.
        StoppedError: If `stopped` said so.
        OSError: If the file is missing or cannot be read.
    """
    file, status = _open(path, roots, own)
    try:
        size = status.st_size
        if at_most is not None and size > at_most:
            return None
        if size < _CHUNK:
            # one byte more than there should be: getting fewer tells that this was all
            content = os.read(file, size + 1)
            if len(content) <= size:
                return Checksum(hashlib.md5(content, usedforsecurity=False).hexdigest(), fingerprint(status))
            os.lseek(file, 0, os.SEEK_SET)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        digest = hashlib.md5(usedforsecurity=False)
        while chunk := os.read(file, _CHUNK):
            digest.update(chunk)
            if stopped():
                raise StoppedError(path)
        return Checksum(digest.hexdigest(), fingerprint(status))
    finally:
        os.close(file)
