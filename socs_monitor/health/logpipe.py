"""A log on a descriptor whose reader may stop reading: lines wait in memory, or are dropped and counted.

A write to a full pipe blocks, which on the reactor's thread would stop the whole agent. So a thread of its own writes.
(O_NONBLOCK does not help: it would apply to every process that shares the pipe.)
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque

# Bytes that may wait for the reader, in addition to one line.
MAX_BYTES = 1 << 20

# Seconds for which the end of the process waits for the reader.
CLOSE_S = 1.0


class LogPipe:
    """A file object for log lines, written to `descriptor` by a daemon thread. Safe to use from any thread.

    Args:
        descriptor: File descriptor, e.g. of standard output.

    Attributes:
        mode (str): Mode of a text file, as txaio expects.
        dropped (int): Number of dropped lines.
    """

    mode = "w"

    def __init__(self, descriptor: int) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._lines: deque[bytes] = deque()
        self._bytes = 0  # of lines that are waiting or being written
        self._changed = threading.Condition()  # re-entrant, because a signal handler may log, too
        threading.Thread(target=self._write_lines, name="log", daemon=True).start()

    def write(self, line: str) -> None:
        """Write a line, or drop it if too many bytes are waiting. Never blocks."""
        data = line.encode(errors="backslashreplace")
        with self._changed:
            if self._bytes >= MAX_BYTES:
                self.dropped += 1
            else:
                self._bytes += len(data)
                self._lines.append(data)
                self._changed.notify_all()

    @property
    def stuck(self) -> bool:
        """Whether so many bytes are waiting that lines may soon be dropped."""
        return self._bytes > MAX_BYTES // 2

    def close(self) -> None:
        """Wait until all lines are written, at most `CLOSE_S` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._bytes, CLOSE_S)

    def _write_lines(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                data = self._lines.popleft()
            written = self._write_all(data)
            with self._changed:
                self._bytes -= len(data)
                self.dropped += not written
                self._changed.notify_all()

    def _write_all(self, data: bytes) -> bool:
        """Write bytes, however long it takes. Return whether the descriptor accepted them."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # another process made the pipe non-blocking
                select.select([], [self._descriptor], [])
            except OSError:  # the reader is gone, or the disk is full
                return False
        return True
