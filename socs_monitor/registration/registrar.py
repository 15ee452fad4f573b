"""The loop of ``run``, from an accepted registration to a safe row.

Each step takes new registrations from ``file_queue`` and due ones from the spool, hands them to the workers, writes the
rows of files that they have hashed, and applies the transitions of `spool.states` in one spool transaction. The loop
does no file I/O, and waits in place while the database or the spool fails. The spool stays the truth, so a stop or a
crash may happen anywhere, and repeating work is harmless.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from socs_monitor import crashpoint
from socs_monitor.health import events
from socs_monitor.health.conditions import FILE_MISSING_S
from socs_monitor.health.health import Health
from socs_monitor.health.units import span
from socs_monitor.registration import lookup
from socs_monitor.registration.checksum import Access
from socs_monitor.registration.lookup import Policy
from socs_monitor.registration.parking import Parking
from socs_monitor.registration.rechecks import Rechecks
from socs_monitor.registration.retry import Retry, StoppedError
from socs_monitor.registration.work import (
    Failed,
    Hashed,
    HashResult,
    Recheck,
    Rechecked,
    Result,
    ids_of,
    split,
)
from socs_monitor.registration.workers import Workers, start_thread
from socs_monitor.spool.intake import BATCH, FileQueue, Intake
from socs_monitor.spool.records import Record, Registration, Transition
from socs_monitor.spool.states import Event, State
from socs_monitor.spool.store import Spool
from socs_monitor.suprsync.database import Database
from socs_monitor.suprsync.sql import Outcome
from socs_monitor.wire.text import sanitize

# Longest wait (seconds) before the workers are supervised again while they are busy.
_SUPERVISE_S = 0.25

# Age (seconds) up to which a hash counts as fresh. The file of an older one is verified before its row is written.
_FRESH_S = 0.5


class Registrar:
    """Drains the intake. For one thread at a time, except `stop`, `resume`, `retry` and `hash_file`.

    Args:
        intake: Accepts registrations that others put on the queue.
        file_queue: Where new registrations come from.
        spool: Where registrations are kept until their rows are safe.
        database: Where the rows are written.
        health: Counts files, and takes conditions and log lines.
        policy: Which files are read, and how long a missing one is waited for.
        debug: Called with a line per registered file, or None.
        monotonic, make_workers, wait: Replaced by tests. `wait` returns after a number of seconds, or at a stop.
        batch: Largest number of registrations taken at a time.
    """

    def __init__(
        self,
        intake: Intake,
        file_queue: FileQueue,
        spool: Spool,
        database: Database,
        health: Health,
        policy: Policy,
        debug: Callable[[str], None] | None,
        monotonic: Callable[[], float] = time.monotonic,
        make_workers: Callable[[Policy, Parking, Callable[[], None]], Workers] = Workers,
        wait: Callable[[float], object] | None = None,
        *,
        batch: int = BATCH,
    ) -> None:
        self._intake = intake
        self._queue = file_queue
        self._spool = spool
        self._database = database
        self._health = health
        self._conditions = health.conditions
        self._log = health.log.log_throttled
        self._policy = policy
        self._debug = debug
        self._monotonic = monotonic
        self._make_workers = make_workers
        self._batch = batch
        self._parking = Parking(Access(policy.data_roots, policy.own), start_thread)
        self._stopping = threading.Event()
        self._retry = Retry(health, self._stopping, wait or self._stopping.wait)

    def run(self, once: bool = False) -> None:
        """Work until `stop`, or with `once` until nothing is queued, due or in a worker's hands."""
        try:
            self.begin()
            while not self._stopping.is_set():
                worked = self.step(0.0 if once else self._poll_timeout())
                if once and not worked:
                    if not self.workers.busy:
                        break
                    self._queue.take(0, self._poll_timeout())
        except StoppedError:
            pass
        finally:
            self.workers.close()
            self._database.close()
            self._stopping.clear()

    def stop(self) -> None:
        """Make `run` return promptly, even while hashing. Unfinished registrations stay in the spool."""
        self._stopping.set()
        self._queue.wake()

    def resume(self) -> None:
        """Clear a `stop` that came after `run` had returned."""
        self._stopping.clear()

    def sleep(self, seconds: float) -> None:
        """Wait for a number of seconds, or until `stop`."""
        self._stopping.wait(seconds)

    def begin(self) -> None:
        """Start the workers, and make everything in the spool due.

        Raises:
            StoppedError: If `stop` was called while the spool could not be used.
        """
        self.workers = self._make_workers(self._policy, self._parking, self._queue.wake)
        self._rechecks = Rechecks(
            self._spool, self._database, self._health, self._retry, self._policy.settle_after, self._monotonic
        )
        self._taken_at = self._monotonic()  # when the queue was last read
        self._is_late = False  # whether results may be older than `_FRESH_S`
        now = self._monotonic()
        self._retry(lambda: self._intake.requeue_all(lambda attempts: now + lookup.retry_delay(attempts - 1)))

    def retry(self, ids: Iterable[int] | None = None) -> int:
        """Make dead letters (those of `ids`, or all) pending again, and return their number. Any thread may call it.

        Raises:
            SpoolError: If the spool cannot be written now.
        """
        retried = self._spool.retry(ids)
        self._queue.wake()
        return retried

    def hash_file(self, path: str, stopped: Callable[[], bool]) -> HashResult | None:
        """Hash a file that is not being registered, and wait for the result. Any thread may call it.

        Args:
            path: The file.
            stopped: Called several times a second; when it returns True, the result is no longer wanted.

        Returns:
            The result, or None if there was none before the end of the run or before `stopped` returned True.
        """
        workers: Workers | None = getattr(self, "workers", None)  # None before the first run
        return workers.hash_and_wait(path, stopped) if workers is not None else None

    def step(self, timeout: float) -> bool:
        """Do everything that can be done now, after waiting at most `timeout` seconds for something to do.

        Returns:
            Whether anything was done.

        Raises:
            StoppedError: If `stop` was called while the spool or the database failed.
        """
        self._is_late = self.workers.has_left or self._monotonic() - self._taken_at > _FRESH_S
        items = self._queue.take(min(self._batch, self.workers.room), timeout)
        self._taken_at = self._monotonic()
        self.workers.submit(self._adopt(items))
        self.workers.supervise()
        self._report_parked_folders()
        results = self.workers.take()
        due = self._apply(self._evaluate_safely(results))
        self._submit(due)
        return bool(items or results or due)

    def _poll_timeout(self) -> float:
        """Return the seconds until there is something to do, even if nothing arrives."""
        if not self.workers.room:
            return _SUPERVISE_S
        longest = _SUPERVISE_S if self.workers.busy else lookup.RETRY_MAX_S
        return min(max(0.0, self._spool.next_due - self._monotonic()), longest)

    def _adopt(self, items: Sequence[dict[str, object]]) -> list[Registration]:
        """Put items into the spool that something other than the intake put on the queue."""
        registrations = [item for item in items if isinstance(item, Registration)]
        if len(registrations) < len(items):
            foreign = [item for item in items if not isinstance(item, Registration)]
            try:
                registrations += self._retry(lambda: self._intake.adopt(foreign))
            except StoppedError:
                for item in foreign:  # they are nowhere else
                    self._queue.put(item)
                raise
        return registrations

    def _report_parked_folders(self) -> None:
        folders = self._parking.folders
        self._conditions.evaluate_condition(
            "disk_hangs",
            bool(folders),
            f"Reading files in {', '.join(folders)} hangs. Their registrations wait in the spool; files elsewhere are"
            " not affected. The disk is probed every minute. Check it with: df -h",
            "all disks answer again",
        )

    def _submit(self, due: Sequence[Record]) -> None:
        """Hand due registrations to the workers. Those that need no worker are results of the next step."""
        failed: list[Failed] = []
        rechecks = [self._rechecks.due(row.id) for row in due if row.state == State.REGISTERED]
        registrations = lookup.parse([row for row in due if row.message is not None], failed)
        self.workers.submit([*(task for task in rechecks if isinstance(task, Recheck)), *registrations])
        self.workers.add([*(result for result in rechecks if isinstance(result, Rechecked)), *failed])

    def _apply(self, transitions: Sequence[Transition]) -> list[Record]:
        """Apply transitions, and return what is due."""
        limit = min(self._batch, self.workers.room)
        due = self._retry(lambda: self._spool.apply(transitions, self._monotonic(), limit))
        self._rechecks.forget(transitions)
        for transition in transitions:
            if transition.event is Event.COMMITTED:
                crashpoint.reach("settling")
            elif transition.event is Event.UNCHANGED:
                crashpoint.reach("settled")
        return due

    def _evaluate_safely(self, results: Sequence[Result]) -> list[Transition]:
        """Evaluate results. If that fails unexpectedly twice, they are evaluated one by one.

        A registration that fails alone, again twice, becomes a dead letter. So it stops no other registration.
        """
        for _ in range(2):
            try:
                return self._evaluate(results)
            except StoppedError:
                raise
            except Exception as error:  # noqa: BLE001 (registration must go on, whatever happens)
                reason = f"Unexpected error {error!r}. Please report it"
                self._log(
                    "error", "internal_error", f"{reason}. Registration goes on", traceback=traceback.format_exc()
                )
        parts = [part for result in results for part in split(result)]
        if len(parts) > 1:
            return [transition for part in parts for transition in self._evaluate_safely([part])]
        part = parts[0]
        origin = State.REGISTERED if isinstance(part, Rechecked) else getattr(part, "origin", State.PENDING)
        return [Transition(origin, Event.GIVEN_UP, ids_of(part), reason=sanitize(reason))]

    def _evaluate(self, results: Iterable[Result]) -> list[Transition]:
        transitions: list[Transition] = []
        hashed: list[Hashed] = []
        failed: list[Failed] = []
        rechecked: list[Rechecked] = []
        for result in results:
            if isinstance(result, Hashed):
                hashed.append(result)
            elif isinstance(result, Failed):
                failed.append(result)
            elif isinstance(result, Rechecked):
                rechecked.append(result)
            else:
                self._load(result, hashed, failed)
        if hashed:
            crashpoint.reach("hashed")
            transitions += self._register(hashed, failed)
        if rechecked:
            transitions += self._rechecks.evaluate(rechecked, failed)
        if failed:
            transitions += self._evaluate_failures(failed)
        return transitions

    def _load(self, result: HashResult, hashed: list[Hashed], failed: list[Failed]) -> None:
        """Add a result per registration of a large file, which until now only the spool has had."""
        for start in range(0, len(result.ids), self._batch):  # so that the spool is locked for a short time
            ids = result.ids[start : start + self._batch]
            registrations = lookup.parse(self._retry(functools.partial(self._spool.load, ids)), failed)
            for part in lookup.expand(result, registrations):
                if isinstance(part, Hashed):
                    hashed.append(part)
                else:
                    failed.append(part)

    def _register(self, hashed: list[Hashed], failed: list[Failed]) -> list[Transition]:
        """Write the rows of hashed files. Registrations that the database refuses go to `failed`."""
        transitions: list[Transition] = []
        must_verify = self._is_late

        def write() -> list[Outcome]:
            nonlocal hashed, must_verify
            if must_verify:
                hashed = self._verify(hashed)
            must_verify = True  # files may change while the database is waited for
            begin = time.perf_counter()
            outcomes = self._database.register([one.file for one in hashed]) if hashed else []
            if outcomes:
                self._health.counters.writes.wrote(time.perf_counter() - begin)
            return outcomes

        if superseded := self._rechecks.superseded(hashed):
            transitions.append(Transition(State.PENDING, Event.KNOWN, list(superseded)))
            hashed = [one for one in hashed if one.registration.id not in superseded]
        while hashed:
            outcomes = self._retry(write)
            if not outcomes:  # the write lock was waited for
                continue
            must_verify = False
            crashpoint.reach("committed")
            transitions += self._rechecks.restart_if_replaced()
            committed: list[Hashed] = []
            new: list[str] = []
            for one, (changed, refusal) in zip(hashed, outcomes, strict=False):
                registration, path = one.registration, one.file.entry.local_path
                if refusal is None:
                    committed.append(one)
                    if self._debug is not None:
                        self._debug(_line(one))
                    if changed and not registration.rounds:
                        new.append(registration["pub_id"])
                else:
                    failed.append(Failed(registration, sanitize(refusal), refused=True))
                    self._rechecks.supersede(registration, path)
            if committed:
                self._health.count_registered(len(committed), new, committed[-1].file.entry.local_path)
                transitions += self._rechecks.schedule(committed)
            hashed = hashed[len(outcomes) :]
        return transitions

    def _verify(self, hashed: Sequence[Hashed]) -> list[Hashed]:
        """Return the files that have not changed since they were hashed. The others go back to the workers."""
        answers: queue.SimpleQueue[list[Result]] = queue.SimpleQueue()
        self.workers.submit(hashed, answers.put)
        results: list[Result] = []
        while len(results) < len(hashed):
            with contextlib.suppress(queue.Empty):
                results += answers.get(timeout=_SUPERVISE_S)
            self.workers.supervise()
            self._retry.check_stopped()
        self.workers.submit([result.registration for result in results if isinstance(result, Failed)])
        return [result for result in results if isinstance(result, Hashed)]

    def _evaluate_failures(self, failed: Sequence[Failed]) -> list[Transition]:
        """Refuse registrations that can never become rows; schedule a retry of the others, or give them up."""
        transitions: list[Transition] = []
        given_up: list[Failed] = []
        withdrawn = [entry for failure in failed if failure.withdraw for entry in lookup.entries(failure.registration)]
        if withdrawn:  # they may have rows from before they were refused
            self._retry(lambda: self._database.withdraw(withdrawn))
        for failure in failed:
            registration, reason, refused, _, origin = failure
            if refused:
                text = f"Registration {registration.id} was refused and became a dead letter: {reason}"
                self._log("warn", "refused", text, **_keys(registration))
                transitions.append(Transition(origin, Event.REFUSED, [registration.id], reason=reason))
            elif lookup.is_given_up(registration.attempts, self._policy.give_up_after):
                given_up.append(failure)
            else:
                due = self._monotonic() + lookup.retry_delay(registration.attempts)
                transitions.append(Transition(State.PENDING, Event.FAILED, [registration.id], due, reason))
                if not registration.attempts:
                    text = f"A file cannot be read yet and is retried: {reason}"
                    self._log("info", "waiting", text, id=registration["pub_id"])
        return transitions + self._give_up(given_up) if given_up else transitions

    def _give_up(self, failed: Sequence[Failed]) -> list[Transition]:
        """Settle registrations that have a row; the others become dead letters."""
        known = self._rechecks.with_rows([failure.registration for failure in failed])
        transitions = [Transition(State.PENDING, Event.KNOWN, list(known))]
        limit = self._policy.give_up_after
        for registration, reason, *_ in failed:
            if registration.id not in known:
                reason = f"{reason}, given up {f'after {span(limit)}' if limit else 'at once'}"
                text = f"Registration {registration.id} became a dead letter: {reason}. Run: socs-monitor failed list"
                self._log("error", "file_missing", text, **_keys(registration))
                self._conditions.set_condition_for("file_missing", text, FILE_MISSING_S)
                transitions.append(Transition(State.PENDING, Event.GIVEN_UP, [registration.id], reason=reason))
        return transitions


def _line(hashed: Hashed) -> str:
    entry, md5 = hashed.file
    where = {"path": entry.local_path, "archive": entry.archive_name, "remote": entry.remote_path}
    return events.line("registered", "registered", {"id": hashed.registration["pub_id"], **where, "md5": md5})


def _keys(registration: Registration) -> dict[str, Any]:
    return {"sender": registration.sender, "id": registration["pub_id"], "path": registration["path"]}
