"""A file system that hangs: every access blocks until it recovers, fails or is unmounted.

It is FUSE without a server. Requests stay unread on ``/dev/fuse``, so the caller blocks as on a hard-mounted NFS whose
server is gone. As there, only SIGKILL ends a blocked process.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import os
import select
import stat
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.testbed.processes import unavailable

_DEVICE = "/dev/fuse"
_MNT_DETACH = 2
_ROOT = 1  # node id of the root
_VALID_S = 1  # seconds for which the kernel may cache a name or an attribute


class _Operation(enum.IntEnum):
    """Numbers of the requests, from ``linux/fuse.h``."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    OPEN = 14
    READ = 15
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    INTERRUPT = 36
    BATCH_FORGET = 42


_UNANSWERED = {_Operation.FORGET, _Operation.INTERRUPT, _Operation.BATCH_FORGET}
_HEADER = struct.Struct("=IIQQIIIHH")
_REPLY = struct.Struct("=IiQ")
_MAX_WRITE = 1 << 17
# Without these flags, lookups in a folder wait for each other and a close waits for an answer, even after SIGKILL.
_FOPEN_NOFLUSH = 1 << 5
_PARALLEL_DIROPS = 1 << 18
_INIT_REPLY = struct.pack("=IIIIHHIIHHI28x", 7, 31, _MAX_WRITE, _PARALLEL_DIROPS, 16, 12, _MAX_WRITE, 1, 32, 0, 0)

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


class HungFolder:
    """A mounted file system, created by `hung_folder`. At first every access blocks.

    Attributes:
        path: Mount point.
    """

    def __init__(self, path: Path, device: int) -> None:
        self.path = path
        self._device = device
        self._answering: threading.Thread | None = None
        self._ended, self._end = os.pipe()
        self._contents: Mapping[str, bytes] = {}
        self._error = 0
        self._hang_at: float = float("inf")
        self._read_to = 0
        self._nodes = {_ROOT: ""}  # node id to path below the root
        self._answer(os.read(device, _MAX_WRITE + 4096))  # INIT: the kernel sends nothing else before its answer

    def recover(self, contents: Mapping[str, bytes], hang_at: float = float("inf")) -> None:
        """Answer all requests from now on, including the blocked ones.

        Args:
            contents: Contents of the files that exist now, by path below the mount point.
            hang_at: Hang again once a file has been read up to this offset, bytes.
        """
        if self._answering is not None:
            self._answering.join()
        self._contents, self._hang_at, self._read_to = contents, hang_at, 0
        self._start()

    def wait_hung(self) -> None:
        """Wait until a reader has reached `hang_at`."""
        assert self._answering is not None
        self._answering.join(20)
        assert not self._answering.is_alive()

    def fail(self, number: int) -> None:
        """Let every access fail with this errno from now on, including the blocked ones."""
        self._error = number
        self._start()

    def _start(self) -> None:
        self._answering = threading.Thread(target=self._serve, daemon=True)
        self._answering.start()

    def close(self) -> None:
        """Unmount. Blocked callers get ENOTCONN."""
        with contextlib.suppress(OSError):
            _call("umount2", os.fsencode(self.path), _MNT_DETACH)
        os.close(self._end)
        if self._answering is not None:
            self._answering.join()
        os.close(self._device)
        os.close(self._ended)

    def _serve(self) -> None:
        while self._ended not in select.select([self._device, self._ended], [], [])[0]:
            try:
                request = os.read(self._device, _MAX_WRITE + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                if error.errno not in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # the caller is gone
                    raise
            else:
                self._answer(request)
                if self._read_to >= self._hang_at:
                    return

    def _answer(self, request: bytes) -> None:
        _, operation, unique, node, *_ = _HEADER.unpack_from(request)
        if operation in _UNANSWERED:
            return
        try:
            content = self._reply(operation, node, request[_HEADER.size :])
        except OSError as error:
            reply = _REPLY.pack(_REPLY.size, -(error.errno or errno.EIO), unique)
        else:
            reply = _REPLY.pack(_REPLY.size + len(content), 0, unique) + content
        with contextlib.suppress(FileNotFoundError):  # the caller is gone
            os.write(self._device, reply)

    def _reply(self, operation: int, node: int, body: bytes) -> bytes:
        if operation == _Operation.INIT:
            return _INIT_REPLY
        path = self._nodes[node]
        if operation == _Operation.GETATTR:
            return struct.pack("=QII", _VALID_S, 0, 0) + self._attributes(path, node)
        if self._error:
            raise OSError(self._error, os.strerror(self._error))
        match operation:
            case _Operation.LOOKUP:
                child = os.path.join(path, os.fsdecode(body.rstrip(b"\0")))
                number = next((number for number, known in self._nodes.items() if known == child), len(self._nodes) + 1)
                attributes = self._attributes(child, number)
                self._nodes[number] = child
                return struct.pack("=QQQQII", number, 0, _VALID_S, _VALID_S, 0, 0) + attributes
            case _Operation.OPEN | _Operation.OPENDIR:
                return struct.pack("=QII", 0, _FOPEN_NOFLUSH, 0)
            case _Operation.READ:
                _, offset, size = struct.unpack_from("=QQI", body)
                self._read_to = offset + size
                return self._contents[path][offset : offset + size]
            case _Operation.RELEASE | _Operation.FLUSH | _Operation.READDIR | _Operation.RELEASEDIR:
                return b""  # folders list nothing
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def _attributes(self, path: str, node: int) -> bytes:
        size, mode, links = 0, stat.S_IFDIR | 0o755, 2
        if path in self._contents:
            size, mode, links = len(self._contents[path]), stat.S_IFREG | 0o644, 1
        elif path and not any(name.startswith(f"{path}/") for name in self._contents):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        times = (1_700_000_000,) * 3
        return struct.pack(
            "=QQQQQQIIIIIIIIII", node, size, -(-size // 512), *times, 0, 0, 0, mode, links, 0, 0, 0, 4096, 0
        )


@contextlib.contextmanager
def hung_folder(path: Path) -> Iterator[HungFolder]:
    """Create the folder `path` and mount a hung file system there. It needs root and ``/dev/fuse``."""
    if not os.path.exists(_DEVICE):
        unavailable("this kernel has no FUSE", even_in_ci=True)
    if os.geteuid():
        unavailable("mounting needs root")
    path.mkdir(parents=True)
    device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
    try:
        _call("mount", b"hung", os.fsencode(path), b"fuse", 0, options.encode())
    except OSError as error:
        os.close(device)
        unavailable(f"FUSE cannot be mounted: {error}")
    try:
        folder = HungFolder(path, device)
    except BaseException:
        _call("umount2", os.fsencode(path), _MNT_DETACH)
        os.close(device)
        raise
    try:
        yield folder
    finally:
        folder.close()
