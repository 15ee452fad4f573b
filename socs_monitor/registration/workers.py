"""All file operations, done by threads that can be abandoned.

The quick worker takes batches of tasks: it looks files up, hashes small ones and checks registered ones again. Larger
ones are hashed by the other workers, slice by slice: a free worker takes the file of which least was read, so that no
file, however large, makes another one wait. Registrations of the same path share one reading.

A thread in a system call cannot be ended. So a worker that makes no progress for `STALL_S` is relieved: another one
takes its place and the rest of its tasks, and its folder is suspended (`parking`): the files there fail at once until
it comes back. After `HANG_S` it is abandoned, too: its task fails with the reason "reading the file hangs", and its
folder is parked until the worker or a probe comes back.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from socs_monitor.registration.checksum import (
    SLICE,
    Access,
    Checksum,
    FileRefusedError,
    Reading,
    checksum,
    present_fingerprint,
)
from socs_monitor.registration.lookup import Policy
from socs_monitor.registration.parking import Parking
from socs_monitor.spool.records import Registration
from socs_monitor.suprsync import archive
from socs_monitor.suprsync.archive import ArchiveError
from socs_monitor.suprsync.upsert import HashedFile
from socs_monitor.wire.text import sanitize

# Files up to this size (bytes) are hashed by the quick worker, in turn.
SMALL = 128 * 1024

# Seconds without progress after which a worker is relieved, and after which it is abandoned: a healthy disk reads a
# chunk in milliseconds.
STALL_S = 0.5
HANG_S = 10.0

# Tasks handed to the quick worker that are not done yet, at most.
MAX_TASKS = 1000

HANGS = "reading the file hangs"


class Hashed(NamedTuple):
    """A registration whose file was found and hashed; `fingerprint` is from before it was read."""

    registration: Registration
    file: HashedFile
    fingerprint: int


class HashedLarge(NamedTuple):
    """A large file that was hashed for all registrations `ids` that meant it."""

    ids: list[int]
    path: str
    md5: str
    fingerprint: int


class Failed(NamedTuple):
    """A registration whose file could not be hashed.

    Attributes:
        registration: The registration.
        reason: Why, for a person.
        refused: Whether it never can be.
        withdraw: Whether that is because of what its path leads to now, so that a row of it must go.
    """

    registration: Registration
    reason: str
    refused: bool = False
    withdraw: bool = False


class FailedLarge(NamedTuple):
    """As `Failed`, of all registrations `ids` that meant a large file; with `missing` there is none."""

    ids: list[int]
    reason: str
    refused: bool = False
    missing: bool = False


class Recheck(NamedTuple):
    """The task to check a registered file again.

    Attributes:
        id: The registration.
        path: The file.
        fingerprint: From when it was hashed.
        before: Earlier registrations of its path, which this one takes care of.
    """

    id: int
    path: str
    fingerprint: int
    before: tuple[int, ...] = ()


class Rechecked(NamedTuple):
    """What a re-check found, unless the file is unchanged: then the result is the task itself.

    With neither `refusal` nor `error`, the file changed, or is `missing`.
    """

    id: int
    missing: bool = False
    refusal: str | None = None
    error: str | None = None


class Verify(NamedTuple):
    """The task to make sure that a file is still what was hashed; otherwise it has `Failed`."""

    hashed: Hashed


class Hash(NamedTuple):
    """The task to hash a path for whoever gets `deliver` called; its failure has the ids of nobody."""

    path: str
    deliver: Callable[[HashedLarge | FailedLarge], None]


Spawn: TypeAlias = Callable[[Callable[[], None], str], None]
Task: TypeAlias = Registration | Recheck | Verify | Hash
Result: TypeAlias = Hashed | HashedLarge | Failed | FailedLarge | Recheck | Rechecked


def start_thread(work: Callable[[], None], name: str) -> None:
    """Start a daemon thread: one that hangs must not keep the process from ending."""
    threading.Thread(target=work, name=name, daemon=True).start()


class _Batch:
    """Tasks for the quick worker. `results` has one entry, perhaps None, for each task that is done."""

    def __init__(self, tasks: Sequence[Task], deliver: Callable[[list[Result]], None]) -> None:
        self.tasks = tasks
        self.deliver = deliver
        self.results: list[Result | None] = []


class _Shared:
    """A large file, and who wants its sum."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.ids: list[int] = []
        self.deliver: list[Callable[[HashedLarge | FailedLarge], None]] = []


class _Worker:
    """A thread's work in progress. `progress` grows with each task or chunk."""

    def __init__(self) -> None:
        self.progress = 0
        self.relieved = False  # another one works in its place
        self.abandoned = False  # its task has been answered for
        self.folder = ""  # that is left alone since it was relieved
        self.batch: _Batch | None = None
        self.shared: _Shared | None = None
        self.seen = (-1, 0.0)  # the progress at the latest look, and when it was first seen

    @property
    def path(self) -> str | None:
        """The path of the task in hand."""
        if self.shared is not None:
            return self.shared.reading.path
        batch = self.batch
        if batch is None or len(batch.results) >= len(batch.tasks):
            return None
        return _path_of(batch.tasks[len(batch.results)])


class Workers:
    """The threads and their results. All but the threads is for one thread.

    Args:
        policy: How files are treated.
        parking: The folders whose disk hangs.
        wake: Called, by a thread, when there are results.
        spawn: Starts a daemon thread.
        monotonic: Gives seconds of CLOCK_MONOTONIC.
        small: Bytes up to which the quick worker hashes files.
        slice_size: Bytes of a larger file that are read at a time.

    Attributes:
        has_left (bool): Whether the latest `take` left results.
    """

    def __init__(
        self,
        policy: Policy,
        parking: Parking,
        wake: Callable[[], None],
        *,
        spawn: Spawn = start_thread,
        monotonic: Callable[[], float] = time.monotonic,
        small: int = SMALL,
        slice_size: int = SLICE,
    ) -> None:
        self._access = Access(policy.data_roots, policy.own)
        self._parking = parking
        self._wake = wake
        self._spawn = spawn
        self._monotonic = monotonic
        self._small = small
        self._slice_size = slice_size
        self.has_left = False
        self._closed = False
        self._lock = threading.Lock()
        self._results: deque[Result] = deque()
        self._batches: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._tasks = 0  # of batches that were submitted and are not delivered
        self._serial = itertools.count()
        # guarded by the lock
        self._shared: dict[str, _Shared] = {}
        self._heap: list[tuple[int, int, _Shared]] = []
        self._large = threading.Semaphore(0)  # as many as there are on the heap
        self._workers: list[_Worker] = []
        self._start(self._quick, "quick")
        for number in range(policy.hash_workers):
            self._start(self._hash, f"hash-{number}")

    def _start(self, work: Callable[[_Worker], None], name: str) -> None:
        worker = _Worker()
        self._workers.append(worker)
        self._spawn(lambda: work(worker), name)

    def close(self) -> None:
        """End the threads, without waiting for one that hangs."""
        self._closed = True
        for _ in self._workers:
            self._batches.put(None)
            self._large.release()

    # --- for the registrar

    @property
    def room(self) -> int:
        """How many tasks should be submitted at most."""
        return max(0, MAX_TASKS - self._tasks)

    @property
    def busy(self) -> bool:
        """Whether there is anything that was submitted and not taken as a result."""
        return bool(self._tasks or self._shared or self._results)

    def submit(self, tasks: Sequence[Task], deliver: Callable[[list[Result]], None] | None = None) -> None:
        """Have tasks done, in order; the results go to `deliver`, called by a thread with the lock, or to `take`."""
        if tasks:
            with self._lock:
                self._tasks += len(tasks)
            self._batches.put(_Batch(tasks, deliver or self._results.extend))

    def take(self) -> list[Result]:
        """Return results since the last call, of some `MAX_TASKS` registrations; `has_left` tells if there are more."""
        taken: list[Result] = []
        size = 0
        for _ in range(len(self._results)):
            if size >= MAX_TASKS:
                self.has_left = True
                self._wake()
                return taken
            result = self._results.popleft()
            size += len(result.ids) if isinstance(result, (HashedLarge, FailedLarge)) else 1
            taken.append(result)
        self.has_left = False
        return taken

    def add(self, results: Sequence[Result]) -> None:
        """Have results taken beside those of the workers."""
        self._results.extend(results)
        self._wake()

    def supervise(self) -> None:
        """Abandon workers that hang, and probe parked folders. To be called each second while it is `busy`."""
        now = self._monotonic()
        for worker in list(self._workers):
            if worker.path is None:
                worker.seen = (-1, now)
            elif worker.progress != worker.seen[0]:
                worker.seen = (worker.progress, now)
            elif now - worker.seen[1] >= HANG_S:
                self._abandon(worker)
            elif now - worker.seen[1] >= STALL_S and not worker.relieved:
                self._relieve(worker, now)
        self._parking.probe(now)

    def _relieve(self, worker: _Worker, now: float) -> None:
        """Have another worker do all but the task in hand, which stalls."""
        with self._lock:
            batch, shared = worker.batch, worker.shared
            done = len(batch.results) if batch is not None else 0  # it may come back at any moment, and add to them
            left = batch.tasks[done:] if batch is not None else ()
            if not left and shared is None:
                return  # it has come back just now
            worker.relieved = True
            worker.folder = self._parking.suspend(shared.reading.path if shared is not None else _path_of(left[0]), now)
            if batch is not None:
                batch.tasks = batch.tasks[: done + 1]
        if batch is not None:
            if len(left) > 1:
                self._batches.put(_Batch(left[1:], batch.deliver))
            self._start(self._quick, "quick")
        else:
            self._start(self._hash, "hash")

    def _abandon(self, worker: _Worker) -> None:
        """Answer for the task of a relieved worker."""
        with self._lock:
            batch, shared = worker.batch, worker.shared
            done = list(batch.results) if batch is not None else []
            left = batch.tasks[len(done) :] if batch is not None else ()
            if not left and shared is None:
                return
            worker.abandoned = True
            self._workers.remove(worker)
            worker.folder = self._parking.park(worker.folder)
            if shared is not None:
                self._give(shared, FailedLarge(shared.ids, HANGS))
        if batch is not None:
            results = [result for result in (*done, _failure(left[0], HANGS)) if result is not None]
            self._finish(batch, results, len(batch.tasks))
        else:
            self._wake()

    def _came_back(self, worker: _Worker) -> None:
        self._parking.release(worker.folder)
        if not worker.abandoned:
            self._workers.remove(worker)
        self._wake()

    # --- the quick worker

    def _quick(self, worker: _Worker) -> None:
        while not worker.relieved and (batch := self._batches.get()) is not None:
            self._do(worker, batch)
        if worker.relieved:
            self._came_back(worker)

    def _do(self, worker: _Worker, batch: _Batch) -> None:
        worker.batch = batch
        results = batch.results
        folders: dict[str, bool] = {}
        while len(results) < len(batch.tasks) and not self._closed and not worker.abandoned:
            task = batch.tasks[len(results)]
            parked = self._parking and self._parking.covers(_path_of(task))
            results.append(_failure(task, HANGS) if parked else self._attempt(task, folders))
            worker.progress += 1
        with self._lock:
            if worker.abandoned:
                return
            worker.batch = None
        self._finish(batch, [result for result in results if result is not None], len(batch.tasks))

    def _finish(self, batch: _Batch, results: list[Result], tasks: int) -> None:
        with self._lock:
            batch.deliver(results)  # before: where nobody is busy, all results can be taken
            self._tasks -= tasks
        self._wake()

    def _attempt(self, task: Task, folders: dict[str, bool]) -> Result | None:
        """Do a task; whatever it raises is its own failure. None where a large file is to be read."""
        try:
            if isinstance(task, Registration):
                return self._look_up(task)
            if isinstance(task, Recheck):
                return self._recheck(task, folders)
            if isinstance(task, Verify):
                return self._verify(task.hashed, folders)
            self._share(task.path, task.deliver)
            return None
        except ArchiveError as error:
            return _failure(task, str(error), refused=True)
        except FileRefusedError as error:
            return _failure(task, str(error), refused=True, withdraw=True)
        except OSError as error:
            return _failure(task, f"{_path_of(task)}: {error.strerror or error}")
        except Exception as error:  # noqa: BLE001 (one registration must not stop the others)
            return _failure(task, f"{_path_of(task)}: unexpected error {error!r}. Please report it")

    def _look_up(self, registration: Registration) -> Result | None:
        missing: OSError | None = None
        for entry in archive.candidates(registration):
            try:
                found = checksum(entry.local_path, self._access, self._small)
            except (FileNotFoundError, NotADirectoryError) as error:
                missing = missing or error
                continue
            if found is not None:
                return Hashed(registration, HashedFile(entry, found.md5), found.fingerprint)
            self._share(entry.local_path, registration.id)
            return None
        raise missing or FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def _recheck(self, task: Recheck, folders: dict[str, bool]) -> Recheck | Rechecked:
        try:
            now = present_fingerprint(task.path, self._access, folders)
        except (FileNotFoundError, NotADirectoryError):
            return Rechecked(task.id, missing=True)
        return task if now == task.fingerprint else Rechecked(task.id)

    def _verify(self, hashed: Hashed, folders: dict[str, bool]) -> Result:
        if present_fingerprint(hashed.file.entry.local_path, self._access, folders) == hashed.fingerprint:
            return hashed
        return Failed(hashed.registration, "the file changed")

    # --- large files

    def _share(self, path: str, who: int | Callable[[HashedLarge | FailedLarge], None]) -> None:
        """Have a path read for a registration, or for whoever wants to be called."""
        with self._lock:
            shared = self._shared.get(path)
            if shared is None:
                shared = self._shared[path] = _Shared(Reading(path, self._access, self._slice_size))
                heapq.heappush(self._heap, (0, next(self._serial), shared))
                self._large.release()
            if isinstance(who, int):
                shared.ids.append(who)
            else:
                shared.deliver.append(who)

    def _hash(self, worker: _Worker) -> None:
        while not worker.relieved and not self._closed:
            self._large.acquire()
            self._next_slice(worker)
        if worker.relieved:
            self._came_back(worker)

    def _next_slice(self, worker: _Worker) -> None:
        with self._lock:
            if not self._heap or self._closed:
                return
            _, _, shared = heapq.heappop(self._heap)
            worker.shared = shared
            worker.progress += 1
        result = self._read(worker, shared)
        with self._lock:
            if worker.abandoned:
                return
            worker.shared = None
            if result is None:
                heapq.heappush(self._heap, (shared.reading.read, next(self._serial), shared))
                self._large.release()
                return
            self._give(shared, result)
        self._wake()

    def _read(self, worker: _Worker, shared: _Shared) -> HashedLarge | FailedLarge | None:
        path, ids = shared.reading.path, shared.ids

        def go_on() -> bool:
            worker.progress += 1
            return not (self._closed or worker.abandoned)

        try:
            if self._parking and self._parking.covers(path):
                return FailedLarge(ids, HANGS)
            found: Checksum | None = shared.reading.next_slice(go_on)
        except FileRefusedError as error:
            return FailedLarge(ids, sanitize(str(error)), refused=True)
        except OSError as error:
            missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
            return FailedLarge(ids, sanitize(f"{path}: {error.strerror or error}"), missing=missing)
        except Exception as error:  # noqa: BLE001 (one file must not stop the others)
            return FailedLarge(ids, sanitize(f"{path}: unexpected error {error!r}. Please report it"))
        return found and HashedLarge(ids, path, found.md5, found.fingerprint)

    def _give(self, shared: _Shared, result: HashedLarge | FailedLarge) -> None:
        """Deliver the result of a large file to all who wanted it; with the lock, as nobody may join them any more."""
        for deliver in shared.deliver:
            deliver(result)
        for start in range(0, len(shared.ids), MAX_TASKS):
            self._results.append(result._replace(ids=shared.ids[start : start + MAX_TASKS]))
        del self._shared[shared.reading.path]


def _failure(task: Task, reason: str, *, refused: bool = False, withdraw: bool = False) -> Result | None:
    reason = sanitize(reason)
    if isinstance(task, Registration):
        return Failed(task, reason, refused, withdraw)
    if isinstance(task, Verify):
        return Failed(task.hashed.registration, reason, refused)
    if isinstance(task, Recheck):
        return Rechecked(task.id, refusal=reason) if refused else Rechecked(task.id, error=reason)
    task.deliver(FailedLarge([], reason, refused))
    return None


def _path_of(task: Task) -> str:
    if isinstance(task, Registration):
        return str(task["path"])
    if isinstance(task, Verify):
        return task.hashed.file.entry.local_path
    return task.path
