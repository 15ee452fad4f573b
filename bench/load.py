"""The load: real files, processes that announce them at a given rate, and the measurement of the result."""

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
_CHECK_S = 0.5  # a process that uses less than a tenth of this while no row appears is done
_QUIET_S = 1.5
_GIVE_UP_S = 90.0


class Sample(NamedTuple):
    """Result of one load. Times in seconds; `latencies` of registered files, from send to visible row."""

    sent: int
    registered: int
    sending_s: float
    tail_s: float  # from the last message to the last row
    total_s: float  # from the first message to the last row
    cpu_s: float
    latencies: list[float]
    by_path: dict[str, float]


def small_files(folder: Path, count: int) -> list[Message]:
    """Create files of 4 KiB as pysmurf writes them, and return their announcements."""
    server = SmurfServer(folder, streams=SENDERS, sizes={"png": SMALL})
    return list(server.messages(count, ("png",)))


def large_files(folder: Path, count: int, size: int) -> list[Path]:
    """Create sparse files of `size` bytes."""
    folder.mkdir(parents=True)
    files = [folder / f"{number}.g3" for number in range(count)]
    for number, path in enumerate(files):
        with open(path, "wb") as file:
            file.write(b"%016x" % number)
            file.truncate(size)
    return files


def fill_cache(files: Sequence[Path]) -> None:
    """Read files into the page cache."""
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def announce_links(files: Sequence[Path], folder: Path) -> list[Message]:
    """Link files under new names, because a repeated announcement adds no row, and return their announcements."""
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
    """Return the seconds that `workers` processes need to read and hash the files, doing nothing else."""
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
    """Send registrations to a system and wait until it has processed them.

    Args:
        system: The receiver.
        messages: Registrations to send.
        rate: Messages per second; None to send as fast as possible.
        idle_cpu: Share of a core that the idle system uses; it is subtracted from the cost.
        settle: Also wait for the work that follows the rows, and include its cost.
        extra: Other messages that a separate sender spreads evenly over the load.
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
    """Start the senders. Returns the send times, in shared memory, and the process ids."""
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
            due = begin + int(number / rate * 1000) / 1000  # 1 ms steps: a sleep per message would use a core
        else:
            due = begin + number / rate
        while (early := due - clock()) > 0:
            time.sleep(early)
        sent[number] = clock()
        send(datagram)


def _watch(system: System, reader: Reader, first: int, expected: int, children: list[int]) -> list[tuple[int, float]]:
    """Wait until all rows exist, or no more appear. Returns each new last id and when it was first seen."""
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
    """Send one message at a time, waiting for each row. Returns the seconds from send to visible row."""
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
