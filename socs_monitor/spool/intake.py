"""From the reactor through the spool to ``file_queue``.

The reactor thread only appends to a list (`Intake.put`) and wakes the writer after each reading of the socket
(`Intake.commit`). The writer, a thread of the intake, writes what has come together into the spool with one commit, and
only then puts it on ``file_queue``. So a slow disk holds up neither the socket nor a heartbeat, and whatever is on the
queue is on the disk.

The queue is a window on the spool, not a second store: a registration for which it has no room is due in the spool at
once, and is taken up from there.
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
from socs_monitor.spool.store import Incoming, Registration, Spool, SpoolFullError
from socs_monitor.wire import messages
from socs_monitor.wire.text import sanitize

# Bytes of memory that registrations on the queue take at most, some 6,000 of them.
QUEUE_MAX = 16 * 1024 * 1024

# Bytes of registrations kept in memory while the spool cannot be written; above half of that, other traffic is shed.
INBOX_MAX = 96 * 1024 * 1024

# Bytes that a registration takes in memory beside its text: the objects of its fields.
_MEMORY = 2_000

# Bytes of memory for each character of a registration's text, in which the texts of its fields count, too: Python has
# one, two or four bytes for every character of a text, by the widest in it.
_NARROW, _WIDE = 2, 8

# Registrations taken at a time: enough to share the cost of a commit, few enough that it is short.
BATCH = 500

_SYNC_INTERVAL_S = 1.0

# A wall clock that is adjusted by more than this between two batches was set (seconds).
_STEP_S = 1.0

_RETRY_S = 1.0

_IN_MEMORY = "Registrations are kept in memory until it works again, and refused when memory is full, too"
SPOOL_ADVICE = "Make sure that there is room on its disk, and that this agent may write there"

# Paths in a line of the log when they could not be written.
_PATHS_A_LINE = 50

Meta = dict[str, Any]


class FileQueue(queue.Queue[Meta]):
    """The queue ``file_queue`` between the intake and the registrar.

    It is bounded by what `has_room` says, which `put` does not ask: nobody who puts is ever made to wait. Memory counts
    as free again when the queue is empty.

    Args:
        max_bytes: Bytes of memory that its registrations take at most.
    """

    def __init__(self, max_bytes: int = QUEUE_MAX) -> None:
        super().__init__()
        self._max_bytes = max_bytes

    def _init(self, maxsize: int) -> None:
        self.queue: deque[Meta] = deque()
        self._memory = 0
        self._woken = False

    def _put(self, item: Meta) -> None:
        self.queue.append(item)

    def _get(self) -> Meta:
        item = self.queue.popleft()
        if not self.queue:
            self._memory = 0
        return item

    def extend(self, registrations: Sequence[Registration], memory: int) -> None:
        """Put several at once, which take so many bytes of memory."""
        with self.mutex:
            self.queue.extend(registrations)
            self._memory += memory
            self.not_empty.notify()

    def has_room(self, memory: int) -> bool:
        """Whether registrations that take so many bytes of memory should be put on it."""
        return self._memory + memory <= self._max_bytes

    def clear(self) -> None:
        """Take registrations off the queue; what somebody else put there stays."""
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
        """Return the next items, at most `limit`, as soon as there are any.

        Args:
            limit: How many at most; with 0 only a `wake` is waited for.
            timeout: Seconds to wait at most. The result is empty after that, or after `wake`.
        """
        with self.mutex:
            if not (self._woken or (limit and self.queue)):
                self.not_empty.wait(timeout)
            self._woken = False
            return [self._get() for _ in range(min(limit, len(self.queue)))]


def _memory_of(incoming: Incoming) -> int:
    """Return the bytes of memory that a registration takes at most."""
    text = incoming.message
    is_narrow = text.isascii() and "\\u" not in text
    return _MEMORY + len(text) * (_NARROW if is_narrow else _WIDE)


class Measure(NamedTuple):
    """The spool's size in bytes, and the arrival of its oldest pending registration.

    The arrival is in seconds of CLOCK_MONOTONIC, None where nothing is pending.
    """

    bytes: int
    oldest: float | None


class Intake:
    """The spool's front. Until `start` is called there is no thread, and `put` itself does all the work.

    Args:
        spool: The open spool.
        file_queue: Where accepted registrations go. A plain dict that somebody else puts there is accepted, too.
        health: Counts what is received and takes conditions.
        clock: Gives unix time.
        monotonic: Gives seconds of CLOCK_MONOTONIC.
        batch: Number of registrations written at a time.
        inbox_max: Bytes of registrations kept in memory while the spool cannot be written.
        retry_s: Seconds after which the intake's thread tries again to write.

    Attributes:
        measured (Measure): What the latest `measure` found.
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
        self._batch = batch
        self._inbox_max = inbox_max
        self._retry_s = retry_s
        self.measured = Measure(0, None)
        self._spool = spool
        self._queue = file_queue
        self._health = health
        self._clock = clock
        self._monotonic = monotonic
        # by the first id that was received then, by how much unix time is ahead of CLOCK_MONOTONIC; one entry a step
        self._offsets: list[tuple[int, float]] = [(0, clock() - monotonic())]
        self._put: list[tuple[Meta, Incoming]] = []  # since the latest `flush`
        self._putting = threading.Lock()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # wakes the writer
        self._to_write: deque[tuple[Meta, Incoming]] = deque()  # guarded by `_flushing`
        self._memory_put = 0
        self._memory_freed = 0
        self._flushing = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()

    def start(self) -> None:
        """Write the spool from a thread of its own from now on."""
        self._threads = [
            threading.Thread(target=self._write, name="intake", daemon=True),
            threading.Thread(target=self._sync, name="spool-sync", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Write what is left and close the spool; log, by path, what cannot be written."""
        self._closing.set()
        self._bell.put(None)
        for thread in self._threads:
            thread.join()
        if not self.flush():
            self.log_unwritten()
        self._spool.close()

    @property
    def written(self) -> int:
        """A number that grows while registrations are written."""
        return self._memory_freed

    def log_unwritten(self) -> None:
        """Log, by path, the registrations that are in memory only. Takes no lock, since who holds one may hang."""
        paths = [sanitize(meta["path"]) for meta, _ in (*self._to_write, *self._put)]
        for start in range(0, len(paths), _PATHS_A_LINE):
            self._health.log.log(
                "error",
                "registrations_lost",
                f"The spool {self._spool.path} could not be written before the agent stopped. Nobody will copy these"
                f" files until they are announced again: {', '.join(paths[start : start + _PATHS_A_LINE])}."
                " Run: socs-monitor send FILE...",
                count=len(paths),
            )

    @property
    def overloaded(self) -> bool:
        """Whether registrations pile up in memory, so that non-registration traffic is shed."""
        return self.unwritten > self._inbox_max // 2

    @property
    def unwritten(self) -> int:
        """Bytes of memory that registrations take which are not in the spool yet."""
        return self._memory_put - self._memory_freed

    def put(self, meta: Meta, incoming: Incoming) -> None:
        """Accept one registration; `meta` is its metadata, `incoming` the same as it goes into the spool.

        With a thread of the intake's own it is written after the next `commit`.
        """
        with self._putting:
            if self.unwritten > self._inbox_max:
                self._health.counters.refused["spool"] += 1
                self._health.conditions.set_condition(
                    "registrations_rejected",
                    "The spool cannot take registrations as fast as they arrive, and memory is full. Some are refused"
                    " and lost. See the condition spool. Find missing timestreams with: socs-monitor backfill ROOT",
                )
                return
            self._memory_put += _memory_of(incoming)
            self._put.append((meta, incoming))
        if not self._threads:
            self.flush()

    def commit(self) -> None:
        """Have what was put so far written now."""
        if self._put and self._bell.empty():
            self._bell.put(None)

    def flush(self) -> bool:
        """Write what was put so far into the spool and onto the queue; return whether all could be written."""
        with self._flushing:
            with self._putting:
                self._to_write.extend(self._put)
                self._put = []
            while self._to_write:
                batch = [self._to_write[place] for place in range(min(self._batch, len(self._to_write)))]
                try:
                    self._accept([meta for meta, _ in batch], [incoming for _, incoming in batch])
                except Exception as error:  # noqa: BLE001 (whatever it is, the writer must live and nothing be lost)
                    self._health.conditions.set_condition("spool", f"{error}. {_IN_MEMORY}. {SPOOL_ADVICE}")
                    return False
                for _, incoming in batch:
                    self._memory_freed += _memory_of(incoming)
                    self._to_write.popleft()
                self._health.conditions.clear_condition("spool", "the spool can be written again")
                if not self.overloaded:
                    text = "registrations are no longer refused"
                    self._health.conditions.clear_condition("registrations_rejected", text)
        return True

    def _accept(self, metas: Sequence[Meta], batch: Sequence[Incoming]) -> None:
        crashpoint.reach("received")
        memory = sum(map(_memory_of, batch))
        held = self._queue.has_room(memory)
        ids = self._spool.accept(batch, held=held)
        crashpoint.reach("spooled")
        self._note_clock(ids[0])
        if held:
            self._queue.extend(
                [
                    Registration(meta, id_, incoming.received, incoming.sender)
                    for meta, id_, incoming in zip(metas, ids, batch, strict=True)
                ],
                memory,
            )
        else:
            self._queue.wake()
        crashpoint.reach("queued")

    def restart(self, retry_at: Callable[[int], float]) -> None:
        """Make all that is in the spool due, as `Spool.begin`, and take it off the queue.

        Raises:
            SpoolError: If the spool cannot be written now.
        """
        self.flush()
        with self._flushing:  # nothing is accepted meanwhile
            self._queue.clear()
            self._spool.begin(retry_at)

    def adopt(self, metas: Sequence[Meta]) -> list[Registration]:
        """Accept dicts that somebody else put on the queue, and return them as registrations.

        Where the spool has no room, they come on the queue again when it has.

        Raises:
            SpoolError: If the spool cannot be written now; none is accepted.
        """
        batch: list[tuple[Meta, Incoming]] = []
        for meta in metas:
            try:
                batch.append((meta, Incoming(self._clock(), "file_queue", messages.encode_file(meta))))
            except messages.MessageError as error:
                text = f"an item of file_queue is not a registration: {error}"
                self._health.log.log_throttled("warn", "refused", text)
        try:
            ids = self._spool.accept([incoming for _, incoming in batch], held=True)
        except SpoolFullError:  # the caller must go on, or nothing would ever leave the spool
            for meta, incoming in batch:
                self.put(meta, incoming)
            self.commit()
            return []
        return [
            Registration(meta, id_, incoming.received, incoming.sender)
            for (meta, incoming), id_ in zip(batch, ids, strict=True)
        ]

    def measure(self) -> None:
        """Measure the spool; it may take as long as the disk does."""
        with contextlib.suppress(SpoolError):  # reported where the spool is used
            oldest = self._spool.oldest_pending()
            self.measured = Measure(self._spool.bytes, self._arrival(*oldest) if oldest else None)

    def _note_clock(self, id_: int) -> None:
        """Note a step of the wall clock before registration `id_` was received."""
        offset = self._clock() - self._monotonic()
        if abs(offset - self._offsets[-1][1]) > _STEP_S:
            self._offsets.append((id_, offset))

    def _arrival(self, id_: int, received: float) -> float:
        """Return when a registration arrived, seconds of CLOCK_MONOTONIC."""
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
                text = f"{error}. A power cut would lose what is not synced. {SPOOL_ADVICE}"
                self._health.conditions.set_condition("spool_sync", text)
            else:
                self._health.conditions.clear_condition("spool_sync", "the spool can be synced again")
            self.measure()
