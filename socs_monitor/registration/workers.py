"""Threads that do all file operations, and can be abandoned.

The quick worker takes batches of tasks: it looks files up, hashes small ones, and re-checks registered ones. The other
workers hash large files slice by slice, the least-read file first, so that no file delays a smaller one. All
registrations of a path share one reading.

A thread in a system call cannot be interrupted. A worker that makes no progress for `STALL_S` is relieved: another one
takes its place and the rest of its batch, and the folder of the file in hand is suspended (`parking`). After `HANG_S`
the worker is abandoned: the task in hand fails, and the folder stays parked until the worker or a probe returns.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from socs_monitor.registration.checksum import SLICE, Access, Reading, checksum, present_fingerprint
from socs_monitor.registration.lookup import Policy
from socs_monitor.registration.parking import HungError, Parking
from socs_monitor.registration.work import (
    Deliver,
    Failed,
    Hashed,
    HashedLarge,
    HashResult,
    Recheck,
    Rechecked,
    Result,
    Task,
    fail,
    fail_large,
    ids_of,
    path_of,
)
from socs_monitor.spool.records import Registration
from socs_monitor.spool.states import Event
from socs_monitor.suprsync import archive
from socs_monitor.suprsync.upsert import HashedFile

# Largest file (bytes) that the quick worker hashes.
SMALL = 128 * 1024

# Seconds without progress after which a worker is relieved, and after which it is abandoned. A healthy disk reads a
# chunk within milliseconds.
STALL_S = 0.5
HANG_S = 10.0

# Largest number of tasks that the quick worker holds, and of registrations that `Workers.take` returns at a time.
MAX_TASKS = 1000

# Seconds between two checks whether a hash is still wanted.
_CHECK_WANTED_S = 0.2

Spawn: TypeAlias = Callable[[Callable[[], None], str], None]


def start_thread(work: Callable[[], None], name: str) -> None:
    """Start a daemon thread, which does not keep the process alive when it hangs."""
    threading.Thread(target=work, name=name, daemon=True).start()


class _Batch:
    """Tasks for the quick worker, of which the first `done` are done."""

    def __init__(self, tasks: Sequence[Task], deliver: Callable[[list[Result]], None]) -> None:
        self.tasks = tasks
        self.deliver = deliver
        self.done = 0
        self.results: list[Result] = []


class _Worker:
    """A thread, and the batch or the large file that it has in hand."""

    def __init__(self) -> None:
        self.batch: _Batch | None = None
        self.reading: Reading | None = None
        self.progress = 0  # counts tasks and chunks
        self.seen = (-1, 0.0)  # the progress at the latest look, and when it was first seen
        self.relieved = False  # another worker has taken its place
        self.abandoned = False  # its task has failed, whatever it returns
        self.folder = ""  # suspended or parked because of it

    @property
    def path(self) -> str | None:
        """The file in hand."""
        if self.reading is not None:
            return self.reading.path
        batch = self.batch
        return path_of(batch.tasks[batch.done]) if batch is not None and batch.done < len(batch.tasks) else None


class Workers:
    """The threads, the tasks that wait for them, and their results. For one thread, except `hash`.

    Args:
        policy: Which files may be opened, and how many threads hash large ones.
        parking: The folders on hung disks.
        wake: Called by a thread when there are results.
        spawn: Starts a daemon thread.
        monotonic: Returns seconds of CLOCK_MONOTONIC.
        small: Largest file that the quick worker hashes, in bytes.
        slice_size: Bytes of a large file that are read at a time.

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
        self._results: deque[Result] = deque()
        self._batches: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        # by bytes read so far, then by age; None ends a thread
        self._readings: queue.PriorityQueue[tuple[int, int, Reading | None]] = queue.PriorityQueue()
        self._serial = itertools.count()
        self._lock = threading.Lock()  # guards what follows, and what the workers have in hand
        self._tasks = 0  # number of tasks in batches that are not delivered
        self._waiting: dict[str, list[int | Deliver]] = {}  # by path of a large file, who waits for its sum
        self._workers: list[_Worker] = []
        self._start(self._work_quickly, "quick")
        for number in range(policy.hash_workers):
            self._start(self._work_in_slices, f"hash-{number}")

    def _start(self, work: Callable[[_Worker], None], name: str) -> None:
        worker = _Worker()
        self._workers.append(worker)
        self._spawn(lambda: work(worker), name)

    def close(self) -> None:
        """End the threads, without waiting for those that hang."""
        self._closed = True
        for _ in self._workers:
            self._batches.put(None)
            self._readings.put((-1, next(self._serial), None))

    @property
    def room(self) -> int:
        """The number of tasks that may be submitted now."""
        return max(0, MAX_TASKS - self._tasks)

    @property
    def busy(self) -> bool:
        """Whether anything was submitted whose result was not taken."""
        return bool(self._tasks or self._waiting or self._results)

    def submit(self, tasks: Sequence[Task], deliver: Callable[[list[Result]], None] | None = None) -> None:
        """Queue tasks for the quick worker, in order.

        Args:
            tasks: The tasks.
            deliver: Called with results by a thread that holds the lock. By default, `take` returns them.
        """
        if tasks:
            with self._lock:
                self._tasks += len(tasks)
            self._batches.put(_Batch(tasks, deliver or self._results.extend))

    def hash(self, path: str, waiting: int | Deliver) -> None:
        """Queue a file as a large one. Any thread may call it.

        Args:
            path: The file.
            waiting: The registration that waits for the sum, or a function that is called with the result by a thread
                that holds the lock.
        """
        with self._lock:
            if path not in self._waiting:
                self._waiting[path] = []
                self._readings.put((0, next(self._serial), Reading(path, self._access, self._slice_size)))
            self._waiting[path].append(waiting)

    def hash_and_wait(self, path: str, stopped: Callable[[], bool]) -> HashResult | None:
        """Hash a file as a large one. Return None if the workers are closed, or `stopped` returns True, before."""
        answer: queue.SimpleQueue[HashResult] = queue.SimpleQueue()
        self.hash(path, answer.put)
        while not (self._closed or stopped()):
            with contextlib.suppress(queue.Empty):
                return answer.get(timeout=_CHECK_WANTED_S)
        return None

    def add(self, results: Sequence[Result]) -> None:
        """Add results that need no worker to those that `take` returns."""
        if results:
            self._results.extend(results)
            self._wake()

    def take(self) -> list[Result]:
        """Return the results since the last call, of about `MAX_TASKS` registrations at most."""
        taken: list[Result] = []
        size = 0
        while self._results and size < MAX_TASKS:
            taken.append(self._results.popleft())
            size += len(ids_of(taken[-1]))
        self.has_left = bool(self._results)
        if self.has_left:
            self._wake()
        return taken

    # --- supervision

    def supervise(self) -> None:
        """Relieve and abandon workers that make no progress, and probe parked folders.

        To be called several times a second while the workers are busy.
        """
        now = self._monotonic()
        with self._lock:
            for worker in list(self._workers):
                progress, since = worker.seen
                if worker.path is None:
                    worker.seen = (-1, now)
                elif worker.progress != progress:
                    worker.seen = (worker.progress, now)
                elif now - since >= HANG_S:
                    self._abandon(worker, worker.path)
                elif now - since >= STALL_S and not worker.relieved:
                    self._relieve(worker, worker.path, now)
        self._parking.probe(now)

    def _relieve(self, worker: _Worker, path: str, now: float) -> None:
        """Leave a worker the task in hand, which stalls. Another worker takes the rest, other data roots first."""
        worker.relieved = True
        worker.folder = self._parking.suspend(path, worker.reading.offset if worker.reading is not None else 0, now)
        if (batch := worker.batch) is None:
            self._start(self._work_in_slices, "hash")
            return
        done = batch.done
        root = self._parking.root_of(path)
        rest = batch.tasks[done + 1 :]
        for stalls in (False, True):  # what may stall, too, must not delay the others
            tasks = [task for task in rest if (self._parking.root_of(path_of(task)) == root) is stalls]
            self._batches.put(_Batch(tasks, batch.deliver))
        worker.batch = _Batch(batch.tasks[done : done + 1], batch.deliver)
        batch.tasks = batch.tasks[:done]
        self._deliver(batch)
        self._start(self._work_quickly, "quick")

    def _abandon(self, worker: _Worker, path: str) -> None:
        """Let the task of a relieved worker fail."""
        worker.abandoned = True
        self._workers.remove(worker)
        worker.folder = self._parking.park(worker.folder)
        if (batch := worker.batch) is not None:
            batch.results.append(fail(batch.tasks[batch.done], HungError()))
            self._deliver(batch)
        else:
            self._finish(path, fail_large(path, HungError()))

    def _return(self, worker: _Worker) -> None:
        """End a relieved worker, whose disk answers again."""
        self._parking.release(worker.folder)
        with self._lock:
            if not worker.abandoned:
                self._workers.remove(worker)
        self._wake()

    # --- the quick worker

    def _work_quickly(self, worker: _Worker) -> None:
        while not worker.relieved and (batch := self._batches.get()) is not None:
            self._do(worker, batch)
        if worker.relieved:
            self._return(worker)

    def _do(self, worker: _Worker, batch: _Batch) -> None:
        worker.batch = batch
        folders: dict[str, bool] = {}
        while not self._closed and batch.done < len(batch.tasks):
            result = self._attempt(batch.tasks[batch.done], folders)
            worker.progress += 1
            with self._lock:
                if worker.abandoned:
                    return
                batch = worker.batch  # another one if it was relieved
                if result is not None:
                    batch.results.append(result)
                batch.done += 1
        with self._lock:
            worker.batch = None
            self._deliver(batch)

    def _deliver(self, batch: _Batch) -> None:
        batch.deliver(batch.results)  # before it is counted, so that there are no results when nobody is busy
        self._tasks -= len(batch.tasks)
        self._wake()

    def _attempt(self, task: Task, folders: dict[str, bool]) -> Result | None:
        """Do a task; return None if its file is left to the other workers. Any error is the failure of this task."""
        try:
            if self._parking:
                self._parking.check(path_of(task))
            if isinstance(task, Registration):
                return self._look_up(task)
            if isinstance(task, Recheck):
                is_same = present_fingerprint(task.path, self._access, folders) == task.fingerprint
                return Rechecked(task, Event.UNCHANGED if is_same else Event.CHANGED)
            return self._verify(task, folders)
        except Exception as error:  # noqa: BLE001 (one registration must not stop the others)
            return fail(task, error)

    def _look_up(self, registration: Registration) -> Hashed | None:
        missing: OSError | None = None
        for entry in archive.candidates(registration):
            try:
                found = checksum(entry.local_path, self._access, self._small)
            except (FileNotFoundError, NotADirectoryError) as error:
                missing = missing or error
                continue
            if found is not None:
                return Hashed(registration, HashedFile(entry, found.md5), found.fingerprint)
            self.hash(entry.local_path, registration.id)
            return None
        raise missing or FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def _verify(self, hashed: Hashed, folders: dict[str, bool]) -> Hashed | Failed:
        if present_fingerprint(path_of(hashed), self._access, folders) == hashed.fingerprint:
            return hashed
        return Failed(hashed.registration, "the file changed")

    # --- the workers for large files

    def _work_in_slices(self, worker: _Worker) -> None:
        while not worker.relieved:
            _, _, reading = self._readings.get()
            if reading is None:
                return
            self._read_slice(worker, reading)
        self._return(worker)

    def _read_slice(self, worker: _Worker, reading: Reading) -> None:
        def go_on() -> bool:
            worker.progress += 1
            return not (self._closed or worker.abandoned)

        path = reading.path
        result: HashResult | None
        with self._lock:
            worker.reading = reading
            worker.progress += 1
        try:
            self._parking.check(path)
            found = reading.next_slice(go_on)
            result = found and HashedLarge((), path, found.md5, found.fingerprint)
        except Exception as error:  # noqa: BLE001 (one file must not stop the others)
            result = fail_large(path, error)
        with self._lock:
            if worker.abandoned:
                return
            worker.reading = None
            if result is None:
                self._readings.put((reading.read, next(self._serial), reading))
            else:
                self._finish(path, result)

    def _finish(self, path: str, result: HashResult) -> None:
        """Deliver the result of a large file to everyone who waits for it."""
        ids: list[int] = []
        for waiting in self._waiting[path]:
            if isinstance(waiting, int):
                ids.append(waiting)
            else:
                waiting(result)
        for start in range(0, len(ids), MAX_TASKS):
            self._results.append(result._replace(ids=ids[start : start + MAX_TASKS]))
        del self._waiting[path]
        self._wake()
