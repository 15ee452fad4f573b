"""The load: real files, and processes that announce them at a given rate; and what became of it."""

from __future__ import annotations

import bisect
import gc
import hashlib
import mmap
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.systems import Reader, System
from socs_monitor.wire.publisher import Publisher, g3_file
from tests.testbed.smurf_server import Message, SmurfServer

SENDERS = 3
SMALL = 4096

_POLL_S = 0.004
_CHECK_S = 0.5  # a process that spends less than a tenth of this while no row comes has nothing left to do
_QUIET_S = 1.5
_GIVE_UP_S = 90.0


class Sample(NamedTuple):
    """What came of one load. Times in seconds; `latencies` are of what was registered, from send to visible row."""

    sent: int
    registered: int
    sending_s: float
    tail_s: float  # from the last message to the last row
    total_s: float  # from the first message to the last row
    cpu_s: float
    latencies: list[float]
    by_path: dict[str, float]


def small_files(folder: Path, count: int) -> list[Message]:
    """Files of 4 KiB as pysmurf writes them, and what announces them."""
    server = SmurfServer(folder, streams=SENDERS, sizes={"png": SMALL})
    return list(server.messages(count, ("png",)))


def large_files(folder: Path, count: int, size: int) -> list[Path]:
    """Sparse files of `size` bytes."""
    folder.mkdir(parents=True)
    files = [folder / f"{number}.g3" for number in range(count)]
    for number, path in enumerate(files):
        with open(path, "wb") as file:
            file.write(b"%016x" % number)
            file.truncate(size)
    return files


def have_cached(files: Sequence[Path]) -> None:
    """Read files, so that all that read them next find them in the page cache."""
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def announce_links(files: Sequence[Path], folder: Path) -> list[Message]:
    """Give files new names, since one announced a second time would be no new row, and make their messages."""
    folder.mkdir(parents=True)
    sender = Publisher("STREAMER:ufm_emu2")
    sender.close()
    messages = []
    for number, file in enumerate(files):
        link = str(folder / f"1700000000_{number:05}.g3")
        os.link(file, link)
        messages.append(Message(sender, "g3_file", g3_file(link), link))
    return messages


def md5_limit_s(files: Sequence[Path], workers: int) -> float:
    """Seconds that so many processes, which do nothing else, take to read and hash the files."""
    begin = time.monotonic()
    children = []
    for worker in range(workers):
        if (child := os.fork()) == 0:
            try:
                for path in files[worker::workers]:
                    with open(path, "rb") as file:
                        hashlib.file_digest(file, "md5")
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return time.monotonic() - begin


def run(
    system: System,
    messages: Sequence[Message],
    rate: float | None,
    idle_cpu: float = 0.0,
    settle: bool = True,
    extra: Sequence[Message] = (),
) -> Sample:
    """Send registrations to a system and wait for what comes of them.

    Args:
        system: Whom to send to.
        messages: What to send.
        rate: Messages a second; None for as fast as they can be sent.
        idle_cpu: Share of a core that the system takes anyway, which is not charged to the files.
        settle: Wait, and count the cost, until it has done all that it does for these files.
        extra: Other messages to send meanwhile, evenly spread, by a sender of their own.
    """
    reader = Reader(system.db_path)
    try:
        first = max(reader.last_id(), 0)
        cpu, began = system.cpu_s(), time.monotonic()
        times, children = _senders(system, messages, rate, extra)
        growth = _watch(system, reader, first, len(messages), children)
        if settle:
            time.sleep(system.settle_s)
        cpu = system.cpu_s() - cpu - idle_cpu * (time.monotonic() - began)
        rows = reader.paths(first)
    finally:
        reader.close()
    sent_at = {message.file: sent for message, sent in zip(messages, times, strict=True)}
    ids = [last for last, _ in growth]
    by_path: dict[str, float] = {}
    for row_id, path in rows:
        seen = bisect.bisect_left(ids, row_id)
        if path in sent_at and path not in by_path and seen < len(growth):
            by_path[path] = growth[seen][1] - sent_at[path]
    begin, end = min(times), max(times)
    last_row = growth[-1][1] if growth else end
    return Sample(
        len(messages),
        len(by_path),
        end - begin,
        max(0.0, last_row - end),
        last_row - begin,
        cpu,
        list(by_path.values()),
        by_path,
    )


def _senders(
    system: System, messages: Sequence[Message], rate: float | None, extra: Sequence[Message]
) -> tuple[memoryview, list[int]]:
    """Start the senders; they share with us the times at which they sent."""
    times = memoryview(mmap.mmap(-1, 8 * len(messages))).cast("d")
    ignored = memoryview(mmap.mmap(-1, 8 * max(1, len(extra)))).cast("d")
    shares = []
    senders = min(SENDERS, len(messages))
    for number in range(senders):
        publisher = Publisher(f"crate1slot{number + 2}", system.address)
        datagrams = [publisher.encode(message.payload, message.kind) for message in messages[number::senders]]
        shares.append((publisher, datagrams, times[number::senders], rate and rate / senders))
    if extra:
        publisher = Publisher("STREAMER:ufm_emu2", system.address)
        datagrams = [publisher.encode(message.payload, message.kind) for message in extra]
        shares.append((publisher, datagrams, ignored, rate and rate * len(extra) / len(messages)))
    begin = time.monotonic() + 0.05
    children = []
    for publisher, datagrams, sent, share in shares:
        if (child := os.fork()) == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                gc.disable()
                _send(publisher, datagrams, sent, begin, share)
            finally:
                os._exit(0)
        children.append(child)
        publisher.close()
    return times, children


def _send(publisher: Publisher, datagrams: Sequence[bytes], sent: memoryview, begin: float, rate: float | None) -> None:
    clock, send = time.monotonic, publisher.send
    for number, datagram in enumerate(datagrams):
        if rate is None:
            due = begin
        elif rate > 500:
            due = begin + int(number / rate * 1000) / 1000  # by the millisecond: a sleep for each would cost a core
        else:
            due = begin + number / rate
        while (early := due - clock()) > 0:
            time.sleep(early)
        sent[number] = clock()
        send(datagram)


def _watch(system: System, reader: Reader, first: int, expected: int, children: list[int]) -> list[tuple[int, float]]:
    """Wait until all rows are there, or nothing more comes; returns which id was first seen when."""
    growth: list[tuple[int, float]] = []
    last, changed = first, time.monotonic()
    checked, cpu = changed, system.cpu_s()
    give_up = changed + _GIVE_UP_S
    while True:
        time.sleep(_POLL_S)
        found, now = reader.last_id(), time.monotonic()
        if found > last:
            last, changed = found, now
            growth.append((found, now))
        if children:
            children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
            continue
        if last - first >= expected or now > give_up:
            return growth
        if now - checked >= _CHECK_S:
            spent, cpu = system.cpu_s() - cpu, system.cpu_s()
            busy = spent > (now - checked) / 10
            checked = now
            if busy:
                changed = max(changed, now - _QUIET_S / 2)
            elif now - changed > _QUIET_S:
                return growth


def alone(system: System, messages: Sequence[Message], pause_s: float = 0.03) -> list[float]:
    """Send one message at a time, each when the row of the one before is there; seconds from send to visible row."""
    reader = Reader(system.db_path)
    publisher = Publisher("crate1slot2", system.address)
    waited = []
    try:
        for message in messages:
            last = max(reader.last_id(), 0)
            datagram = publisher.encode(message.payload, message.kind)
            begin = time.monotonic()
            publisher.send(datagram)
            while reader.last_id() <= last and time.monotonic() - begin < 10:
                time.sleep(0.0005)
            waited.append(time.monotonic() - begin)
            time.sleep(pause_s)
    finally:
        publisher.close()
        reader.close()
    return waited
