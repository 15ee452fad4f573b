"""From the reactor through the spool to ``file_queue``.

The reactor only appends to a list (`Intake.put`) and wakes the writer after each read of the socket (`Intake.commit`).
The writer thread stores what has accumulated with one commit, and only then puts it on ``file_queue``. So everything on
the queue is on the disk, and a slow disk delays neither the socket nor a heartbeat.

The queue holds part of the spool in memory. Registrations for which it has no room are due in the spool at once, and
are claimed from there.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from socs_monitor import crashpoint
from socs_monitor.health.health import Health
from socs_monitor.spool.file import SpoolError
from socs_monitor.spool.records import Incoming, Registration
from socs_monitor.spool.store import Spool, SpoolFullError
from socs_monitor.wire import messages
from socs_monitor.wire.text import sanitize

# Memory for registrations on the queue (bytes): about 6,000 of them.
QUEUE_MAX = 16 * 1024 * 1024

# Memory for registrations that are not in the spool yet (bytes). Above half of it, non-registration traffic is shed.
INBOX_MAX = 96 * 1024 * 1024

# Memory for the objects of one registration (bytes), in addition to the text of its fields.
_MEMORY = 2_000

# Memory per character of a registration's message (bytes), which counts the fields, too: Python stores every character
# of a text in one, two or four bytes, depending on the widest one.
_NARROW, _WIDE = 2, 8

# Registrations per commit: enough to share its cost, and few enough to keep it short.
BATCH = 500

_SYNC_INTERVAL_S = 1.0

_RETRY_S = 1.0

_CLOCK_STEP_S = 1.0  # the wall clock was set if it moves by more than this between two batches

SPOOL_ADVICE = "Check that its disk has room and that the agent may write there. Run: socs-monitor doctor"

_PATHS_PER_LINE = 50  # in the log, of registrations that were lost

Meta = dict[str, Any]


class FileQueue(queue.Queue[Meta]):
    """The queue ``file_queue`` between the intake and the registrar.

    `put` never blocks; the intake asks `has_room` before it uses `extend`. Memory is freed when the queue is empty.

    Args:
        max_bytes: Memory for registrations on the queue.
    """

    def __init__(self, max_bytes: int = QUEUE_MAX) -> None:
        super().__init__()
        self._max_bytes = max_bytes
        self._memory = 0
        self._woken = False

    def _get(self) -> Meta:
        item: Meta = self.queue.popleft()
        if not self.queue:
            self._memory = 0
        return item

    def extend(self, registrations: Sequence[Registration], memory: int) -> None:
        """Put several registrations, which take `memory` bytes in all."""
        with self.mutex:
            self.queue.extend(registrations)
            self._memory += memory
            self.not_empty.notify()

    def has_room(self, memory: int) -> bool:
        """Whether there is room for registrations that take `memory` bytes."""
        return self._memory + memory <= self._max_bytes

    def clear(self) -> None:
        """Remove all registrations. Items that somebody else put on the queue stay."""
        with self.mutex:
            foreign = [item for item in self.queue if not isinstance(item, Registration)]
            self.queue.clear()
            self.queue.extend(foreign)
            self._memory = 0

    def wake(self) -> None:
        """Make `take` return."""
        with self.mutex:
            self._woken = True
            self.not_empty.notify()

    def take(self, limit: int, timeout: float | None) -> list[Meta]:
        """Return up to `limit` items as soon as there are any.

        Args:
            limit: Number of items at most; 0 to wait for `wake` only.
            timeout: Seconds to wait at most. The result is empty after that, or after `wake`.
        """
        with self.mutex:
            if not (self._woken or (limit and self.queue)):
                self.not_empty.wait(timeout)
            self._woken = False
            return [self._get() for _ in range(min(limit, len(self.queue)))]


class Measurement(NamedTuple):
    """State of the spool at some moment.

    Attributes:
        bytes: Size of its content.
        oldest: When the oldest pending registration arrived, seconds of CLOCK_MONOTONIC; None if nothing is pending.
    """

    bytes: int
    oldest: float | None


class _Item(NamedTuple):
    """A registration in memory: its metadata, its form in the spool, and the memory that both take (bytes)."""

    meta: Meta
    incoming: Incoming
    memory: int = 0


def _registrations(batch: Sequence[_Item], ids: Sequence[int]) -> list[Registration]:
    return [
        Registration(meta, id_, incoming.received, incoming.sender)
        for (meta, incoming, _), id_ in zip(batch, ids, strict=True)
    ]


class Intake:
    """Accepts registrations. Before `start`, there is no thread and `put` itself writes to the spool.

    Args:
        spool: The open spool.
        file_queue: Receives accepted registrations. It may also hold plain dicts from somebody else, see `adopt`.
        health: Counts rejected registrations and takes conditions.
        clock: Returns unix time.
        monotonic: Returns seconds of CLOCK_MONOTONIC.
        batch: Number of registrations per commit.
        inbox_max: Memory (bytes) for registrations that are not in the spool yet.
        retry_s: Seconds after which a failed write is retried.

    Attributes:
        measured (Measurement): Result of the latest `measure`.
    """

    def __init__(
        self,
        spool: Spool,
        file_queue: FileQueue,
        health: Health,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        *,
        batch: int = BATCH,
        inbox_max: int = INBOX_MAX,
        retry_s: float = _RETRY_S,
    ) -> None:
        self.measured = Measurement(0, None)
        self._spool = spool
        self._queue = file_queue
        self._health = health
        self._clock = clock
        self._monotonic = monotonic
        self._batch = batch
        self._inbox_max = inbox_max
        self._retry_s = retry_s
        # by how much the wall clock was ahead of CLOCK_MONOTONIC, from which id on; an entry for each step of it
        self._offsets: list[tuple[int, float]] = [(0, clock() - monotonic())]
        self._inbox: deque[_Item] = deque()  # appended with `_putting`, removed with `_flushing`
        self._put_bytes = 0  # changed with `_putting`
        self._written_bytes = 0  # changed with `_flushing`
        self._putting = threading.Lock()
        self._flushing = threading.Lock()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # wakes the writer
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads that write and sync the spool."""
        self._threads = [
            threading.Thread(target=self._write, name="intake", daemon=True),
            threading.Thread(target=self._sync, name="spool-sync", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Write the rest, log the paths that cannot be written, and close the spool."""
        self._closing.set()
        self._bell.put(None)
        for thread in self._threads:
            thread.join()
        if not self.flush():
            self.log_unwritten()
        self._spool.close()

    @property
    def written(self) -> int:
        """A number that grows as long as registrations are written."""
        return self._written_bytes

    @property
    def unwritten(self) -> int:
        """Memory of the registrations that are not in the spool yet (bytes)."""
        return self._put_bytes - self._written_bytes

    @property
    def overloaded(self) -> bool:
        """Whether so much is unwritten that non-registration traffic is shed."""
        return self.unwritten > self._inbox_max // 2

    def log_unwritten(self) -> None:
        """Log the paths of the registrations that are only in memory. Takes no lock, as its holder may hang."""
        paths = [sanitize(item.meta["path"]) for item in self._inbox.copy()]
        for start in range(0, len(paths), _PATHS_PER_LINE):
            self._health.log.log(
                "error",
                "registrations_lost",
                f"The agent stopped before the spool {self._spool.path} could be written. These files will not be"
                f" copied until they are announced again: {', '.join(paths[start : start + _PATHS_PER_LINE])}."
                " Run: socs-monitor send FILE...",
                count=len(paths),
            )

    def put(self, meta: Meta, incoming: Incoming) -> None:
        """Accept one registration. After `start`, it is written after the next `commit`.

        Args:
            meta: Its metadata.
            incoming: The same, as it is stored.
        """
        text = incoming.message
        is_narrow = text.isascii() and "\\u" not in text
        memory = _MEMORY + len(text) * (_NARROW if is_narrow else _WIDE)
        with self._putting:
            if self.unwritten > self._inbox_max:
                self._health.counters.refused["spool"] += 1
                self._health.conditions.set_condition(
                    "registrations_rejected",
                    "Registrations arrive faster than the spool can be written, and memory is full. Some are rejected"
                    " and lost. Resolve the condition spool first. Then find missing timestreams. Run: socs-monitor"
                    " backfill ROOT",
                )
                return
            self._put_bytes += memory
            self._inbox.append(_Item(meta, incoming, memory))
        if not self._threads:
            self.flush()

    def commit(self) -> None:
        """Let the writer store everything that was put so far."""
        if self._inbox and self._bell.empty():
            self._bell.put(None)

    def flush(self) -> bool:
        """Store everything that was put so far and put it on the queue; return False if that failed."""
        with self._flushing:
            left = len(self._inbox)
            while left:
                batch = [self._inbox[place] for place in range(min(self._batch, left))]
                try:
                    self._store(batch)
                except Exception as error:  # noqa: BLE001 (whatever it is, the writer must live and nothing be lost)
                    text = f"{error}. Registrations are kept in memory, and rejected when that is full. {SPOOL_ADVICE}"
                    self._health.conditions.set_condition("spool", text)
                    return False
                for item in batch:
                    self._written_bytes += item.memory
                    self._inbox.popleft()
                left -= len(batch)
                self._health.conditions.clear_condition("spool", "the spool can be written again")
                if not self.overloaded:
                    self._health.conditions.clear_condition("registrations_rejected", "all registrations are accepted")
        return True

    def _store(self, batch: Sequence[_Item]) -> None:
        crashpoint.reach("received")
        memory = sum(item.memory for item in batch)
        held = self._queue.has_room(memory)
        ids = self._spool.accept([item.incoming for item in batch], held=held)
        crashpoint.reach("spooled")
        offset = self._clock() - self._monotonic()
        if abs(offset - self._offsets[-1][1]) > _CLOCK_STEP_S:
            self._offsets.append((ids[0], offset))
        if held:
            self._queue.extend(_registrations(batch, ids), memory)
        else:
            self._queue.wake()
        crashpoint.reach("queued")

    def requeue_all(self, retry_at: Callable[[int], float]) -> None:
        """Schedule everything again at a start, as `Spool.requeue_all`, and take it off the queue.

        Raises:
            SpoolError: If the spool cannot be written now.
        """
        self.flush()
        with self._flushing:  # so that nothing is accepted meanwhile
            self._queue.clear()
            self._spool.requeue_all(retry_at)

    def adopt(self, metas: Sequence[Meta]) -> list[Registration]:
        """Store dicts that somebody else put on the queue, and return them as registrations.

        If the spool is full, they are put on the queue when it has room again.

        Raises:
            SpoolError: If the spool cannot be written now; none is stored.
        """
        batch = []
        for meta in metas:
            try:
                batch.append(_Item(meta, Incoming(self._clock(), "file_queue", messages.encode_file(meta))))
            except messages.MessageError as error:
                text = f"an item of file_queue is not a registration: {error}. It was dropped"
                self._health.log.log_throttled("warn", "refused", text)
        try:
            return _registrations(batch, self._spool.accept([item.incoming for item in batch], held=True))
        except SpoolFullError:  # the caller must go on, because only that makes room in the spool
            for item in batch:
                self.put(item.meta, item.incoming)
            self.commit()
            return []

    def measure(self) -> None:
        """Update `measured`. Waits for the disk."""
        with contextlib.suppress(SpoolError):  # reported by those who need the spool
            oldest = self._spool.oldest_pending()
            self.measured = Measurement(self._spool.bytes, self._arrival(*oldest) if oldest else None)

    def _arrival(self, id_: int, received: float) -> float:
        """Convert the reception of a registration from unix time to CLOCK_MONOTONIC."""
        place = bisect.bisect(self._offsets, (id_, math.inf)) - 1
        return received - self._offsets[place][1]

    def _write(self) -> None:
        while not self._closing.is_set():
            self._bell.get()
            while not self.flush() and not self._closing.wait(self._retry_s):
                pass

    def _sync(self) -> None:
        while not self._closing.wait(_SYNC_INTERVAL_S):
            try:
                self._spool.sync()
            except SpoolError as error:
                text = f"{error}. A power failure would lose recent registrations. {SPOOL_ADVICE}"
                self._health.conditions.set_condition("spool_sync", text)
            else:
                self._health.conditions.clear_condition("spool_sync", "the spool can be synced again")
            self.measure()
