"""From the reactor through the spool to ``file_queue``, and out of it again.

The reactor thread only appends to a list (`Intake.put`); a thread of the intake's own writes what came together
into the spool with one commit, and only then puts it on ``file_queue``. So a slow disk holds up neither the
socket nor a heartbeat, and whatever is on the queue is on the disk.

The queue is a window on the spool, not a second store: beyond `QUEUE_MAX` registrations it is not fed, and the
consumer reads the rest from the spool (`Intake.take`), which is how it begins after a start, too.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import operator
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from socs_monitor import crashpoint, messages
from socs_monitor.spool import Incoming, Registration, Spool
from socs_monitor.spoolfile import PENDING, SpoolError
from socs_monitor.stats import Stats

# Registrations on the queue at the most; about 1 KiB of memory each.
QUEUE_MAX = 10_000

# Bytes of registrations kept in memory while the spool cannot be written; above half of that other traffic is shed.
INBOX_MAX = 64 * 1024 * 1024

# Registrations taken at a time: enough to share the cost of a commit, few enough that it is short.
BATCH = 500

_SYNC_INTERVAL_S = 1.0
_RETRY_S = 1.0

_IN_MEMORY = "What arrives is kept in memory until it works again, and refused when that is full, too"
SPOOL_ADVICE = "See that there is room on its disk, and that this agent may write there"

Meta = dict[str, Any]

_id = operator.attrgetter("id")


class Measure(NamedTuple):
    """The spool's size in bytes, and when its oldest pending registration arrived: unix time, None if there is none."""

    bytes: int
    oldest: float | None


class Intake:
    """The spool's front. Until `start` is called there is no thread, and `put` itself does all the work.

    Args:
        spool: The open spool.
        file_queue: Where accepted registrations go. A plain dict that somebody else puts there is accepted, too.
        stats: Counts what is received and learns of trouble.
        clock: Gives unix time.

    Attributes:
        measured (Measure): How the spool was at the latest `measure`.
    """

    def __init__(
        self, spool: Spool, file_queue: queue.Queue[Meta], stats: Stats, clock: Callable[[], float] = time.time
    ) -> None:
        self.measured = Measure(0, None)
        self._spool = spool
        self._queue = file_queue
        self._stats = stats
        self._clock = clock
        # A deque and a bell, and no lock that the writer takes as well: under load it would hardly ever get it. The
        # bell is a SimpleQueue, which costs a fifth of what an Event does.
        self._inbox: deque[tuple[Meta, Incoming, int]] = deque()  # the last are the bytes put up to then
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._putting = threading.Lock()
        self._bytes_put = 0
        self._flushing = threading.Lock()
        self._bytes_written = 0
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        # guarded by the queue's mutex
        self._beyond_queue = False  # there may be pending registrations that are in the spool only
        self._woken = False
        self._cursor = 0
        self._in_hand: dict[int, float] = {}  # when what was taken and is not yet `done` arrived, oldest first

    def start(self) -> None:
        """Write the spool from a thread of its own from now on."""
        self._threads = [
            threading.Thread(target=self._write, name="intake", daemon=True),
            threading.Thread(target=self._sync, name="spool-sync", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Write what is left and close the spool."""
        self._closing.set()
        self._bell.put(None)
        for thread in self._threads:
            thread.join()
        self.flush()
        self._spool.close()

    @property
    def overloaded(self) -> bool:
        """Whether registrations pile up in memory, so that what is no registration should give way."""
        return self.unwritten > INBOX_MAX // 2

    @property
    def unwritten(self) -> int:
        """Bytes of registrations that are in memory only."""
        return self._bytes_put - self._bytes_written

    def put(self, meta: Meta, incoming: Incoming) -> None:
        """Accept one registration; `meta` is its metadata, `incoming` the same as it goes into the spool.

        With a thread of the intake's own it is written after the next `commit`.
        """
        with self._putting:
            if self.unwritten > INBOX_MAX:
                self._stats.refused["spool"] += 1
                self._stats.trouble(
                    "intake",
                    "more registrations come than the spool takes, and memory is full: some are refused, and lost. See"
                    " the condition spool; missing timestreams are found with: socs-monitor backfill ROOT",
                )
                return
            self._bytes_put += len(incoming.message)
            self._inbox.append((meta, incoming, self._bytes_put))
        if not self._threads:
            self.flush()

    def commit(self) -> None:
        """Have what was put so far written, now."""
        if self._inbox and self._bell.empty():
            self._bell.put(None)

    def flush(self) -> bool:
        """Bring what was put so far into the spool and onto the queue; return whether all could be brought."""
        with self._flushing:
            while self._inbox:
                batch = [self._inbox.popleft() for _ in range(min(BATCH, len(self._inbox)))]
                try:
                    metas, incoming, bytes_put = zip(*batch, strict=True)
                    self._enqueue(self._accept(metas, incoming))
                except Exception as error:  # noqa: BLE001 (whatever it is, the writer must live and nothing be lost)
                    self._inbox.extendleft(reversed(batch))
                    self._stats.trouble("spool", f"{error}. {_IN_MEMORY}. {SPOOL_ADVICE}")
                    return False
                self._bytes_written = bytes_put[-1]
                self._stats.cured("spool", "the spool can be written again")
                if not self.overloaded:
                    self._stats.cured("intake", "no registration is refused any more")
        return True

    def _accept(self, metas: Sequence[Meta], batch: Sequence[Incoming]) -> list[Registration]:
        crashpoint.reach("received")
        ids = self._spool.accept(batch)
        crashpoint.reach("spooled")
        return [
            Registration(meta, id_, incoming.received, 0, PENDING)
            for meta, id_, incoming in zip(metas, ids, batch, strict=True)
        ]

    def _enqueue(self, registrations: list[Registration]) -> None:
        with self._queue.mutex:
            if self._beyond_queue or len(self._queue.queue) + len(registrations) > QUEUE_MAX:
                self._beyond_queue = True
            else:  # the consumer may have been faster, and read some of these from the spool
                self._queue.queue.extend(registrations[bisect.bisect(registrations, self._cursor, key=_id) :])
            self._queue.not_empty.notify()
        crashpoint.reach("queued")

    def restart(self) -> None:
        """Begin anew: `take` hands out all that is pending in the spool, in order, before what comes now."""
        self.flush()
        with self._queue.mutex:
            foreign = [item for item in self._queue.queue if not isinstance(item, Registration)]
            self._queue.queue.clear()
            self._queue.queue.extend(foreign)
            self._beyond_queue = True
            self._cursor = 0
            self._in_hand.clear()

    def take(self, timeout: float | None) -> list[Registration]:
        """Return the next registrations, at most `BATCH`, as soon as there are any.

        Args:
            timeout: Seconds to wait at the most; the result is empty after that, or after `wake`.

        Raises:
            SpoolError: If the spool cannot be read or written now.
        """
        with self._queue.mutex:
            if not (self._queue.queue or self._beyond_queue or self._woken):
                self._queue.not_empty.wait(timeout)
            self._woken = False
            if not self._queue.queue and self._beyond_queue:
                registrations = self._spool.pending(self._cursor, BATCH)
                if registrations:
                    self._hand_out(registrations)
                else:
                    self._beyond_queue = False
                return registrations
            items = [self._queue.queue.popleft() for _ in range(min(BATCH, len(self._queue.queue)))]
            foreign = [item for item in items if not isinstance(item, Registration)]
            registrations = [item for item in items if isinstance(item, Registration)] if foreign else items
            if registrations:
                self._hand_out(registrations)
        if not foreign:
            return registrations
        try:
            self._adopt(foreign)
        except SpoolError:
            with self._queue.mutex:
                self._queue.queue.extendleft(reversed([*registrations, *foreign]))
            raise
        return registrations or self.take(0.0)

    def _hand_out(self, registrations: list[Registration]) -> None:
        self._cursor = registrations[-1].id
        self._in_hand.update((registration.id, registration.received) for registration in registrations)

    def done(self, registrations: Iterable[Registration]) -> None:
        """Learn that what was taken is registered, waits, is dead or needs nothing: it is not pending any more."""
        with self._queue.mutex:
            for registration in registrations:
                self._in_hand.pop(registration.id, None)

    @property
    def oldest(self) -> float | None:
        """Unix time at which the oldest pending registration arrived; None where nothing is pending.

        Raises:
            SpoolError: If the spool had to be asked, and cannot be read now.
        """
        with self._queue.mutex:
            if self._in_hand:
                return next(iter(self._in_hand.values()))
            heads = [item for item in itertools.islice(self._queue.queue, 1) if isinstance(item, Registration)]
            if not heads and self._beyond_queue:
                heads = self._spool.pending(self._cursor, 1)
            return heads[0].received if heads else None

    def measure(self) -> None:
        """Measure the spool; it may take as long as the disk does."""
        with contextlib.suppress(SpoolError):  # which is told of where it is used
            self.measured = Measure(self._spool.bytes, self.oldest)

    def _adopt(self, metas: list[Meta]) -> None:
        """Accept what somebody else put on the queue; what is accepted is no longer in `metas`."""
        while metas:
            try:
                incoming = Incoming(self._clock(), "file_queue", messages.encode_file(metas[0]))
            except messages.MessageError as error:
                self._stats.repeated("warn", "refused", f"no registration on file_queue, dropped: {error}")
            else:
                with self._flushing:  # what the writer has accepted before is on the queue before
                    self._enqueue(self._accept(metas[:1], [incoming]))
            del metas[0]

    def wake(self) -> None:
        """Make `take` return."""
        with self._queue.mutex:
            self._woken = True
            self._queue.not_empty.notify()

    def _write(self) -> None:
        while not self._closing.is_set():
            self._bell.get()
            if not self.flush():
                self._bell.put(None)
                self._closing.wait(_RETRY_S)

    def _sync(self) -> None:
        while not self._closing.wait(_SYNC_INTERVAL_S):
            try:
                self._spool.sync()
            except SpoolError as error:
                self._stats.trouble("spool sync", f"{error}. A power cut would lose what is not synced. {SPOOL_ADVICE}")
            else:
                self._stats.cured("spool sync", "the spool can be synced again")
            self.measure()
