"""The log's descriptor over real pipes: writing never blocks, whatever the reader does, and what is lost is counted."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from socs_monitor.health.logpipe import CLOSE_S, MAX_BYTES, LogPipe
from tests.testbed.processes import wait_until

LINE = "x" * 1023 + "\n"


class Pipe:
    """A pipe with a log on it."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.log = LogPipe(self.writer)

    def fill(self) -> int:
        """Write until lines are dropped; return how many were written, the dropped ones included."""
        count = 0
        while self.log.dropped < 10:
            self.log.write(LINE)
            count += 1
        return count

    def read(self, size: int) -> bytes:
        """Read so many bytes, as soon as they come."""
        data = b""
        while len(data) < size:
            data += os.read(self.reader, size - len(data))
        return data

    def close(self) -> None:
        os.close(self.reader)  # which ends a write that waits
        wait_until(lambda: not self.log._bytes, 10, "the thread lets go of the pipe")
        os.close(self.writer)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_lines_come_in_order_and_at_once(pipe: Pipe) -> None:
    pipe.log.write("one\n")
    assert pipe.read(4) == b"one\n"
    pipe.log.write("two \u00b5 \ud800\n")
    pipe.log.write("three\n")

    assert pipe.read(20) == b"two \xc2\xb5 \\ud800\nthree\n"
    assert (pipe.log.dropped, pipe.log.stuck) == (0, False)


def test_what_does_not_fit_is_dropped_and_counted_and_the_rest_read_later(pipe: Pipe) -> None:
    count = pipe.fill()
    assert pipe.log.stuck
    kept = pipe.read((count - 10) * len(LINE))
    assert kept == LINE.encode() * (count - 10)
    wait_until(lambda: not pipe.log.stuck, 10, "it is read again")
    pipe.log.write("again\n")

    assert pipe.read(6) == b"again\n"
    assert pipe.log.dropped == 10
    assert MAX_BYTES <= len(kept) < 2 * MAX_BYTES


def test_a_close_waits_for_the_lines(pipe: Pipe) -> None:
    for _ in range(20):
        pipe.log.write(LINE)
    pipe.log.close()

    assert os.read(pipe.reader, 1 << 16) == LINE.encode() * 20


def test_a_close_does_not_wait_long_for_a_reader(pipe: Pipe) -> None:
    pipe.fill()
    begin = time.monotonic()
    pipe.log.close()

    assert CLOSE_S <= time.monotonic() - begin < CLOSE_S + 5


def test_a_pipe_that_another_process_made_non_blocking_loses_no_line(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer, False)
    for _ in range(200):
        pipe.log.write(LINE)

    assert pipe.read(200 * len(LINE)) == LINE.encode() * 200
    assert pipe.log.dropped == 0


def test_lines_that_the_disk_does_not_take_are_counted() -> None:
    with open("/dev/full", "wb") as full:
        log = LogPipe(full.fileno())
        log.write("one\n")
        log.write("two\n")
        log.close()

        assert log.dropped == 2
