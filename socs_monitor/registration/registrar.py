"""The loop of ``run``: from accepted to registered.

Each step takes what is new from ``file_queue`` and what is due in the spool, hands it to the workers, registers what
they have hashed, and applies the transitions (`spool.states`) in one spool transaction. The loop does no file I/O. It
has its own thread, so it may wait for the database or the spool: a write that fails is retried in place until it
succeeds or `run` is stopped. A stop or a crash at any point leaves the spool as the truth, and repeating work is
harmless.
"""

from __future__ import annotations

import contextlib
import math
import queue
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from socs_monitor import crashpoint
from socs_monitor.health import events
from socs_monitor.health.conditions import FILE_MISSING_S
from socs_monitor.health.health import Health
from socs_monitor.registration import lookup
from socs_monitor.registration.lookup import Policy
from socs_monitor.registration.parking import Parking
from socs_monitor.registration.workers import (
    Failed,
    FailedLarge,
    Hash,
    Hashed,
    HashedLarge,
    Recheck,
    Rechecked,
    Result,
    Task,
    Verify,
    Workers,
    start_thread,
)
from socs_monitor.spool.file import SpoolError
from socs_monitor.spool.intake import BATCH, SPOOL_ADVICE, FileQueue, Intake
from socs_monitor.spool.records import Record, Registration, Transition
from socs_monitor.spool.states import Event, State
from socs_monitor.spool.store import Spool
from socs_monitor.suprsync.archive import ArchiveError
from socs_monitor.suprsync.database import Database, DatabaseUnavailableError
from socs_monitor.suprsync.upsert import HashedFile
from socs_monitor.wire.text import sanitize

T = TypeVar("T")

_BACKOFF_FIRST_S = 0.05
_BACKOFF_MAX_S = 2.0

# Seconds between two looks at workers that are busy.
_SUPERVISE_S = 0.25

# Seconds between two looks whether to go on waiting for a hash.
_ASK_S = 0.2

# Re-checks are due at whole multiples of this (seconds), since each waking of the thread costs.
_RECHECK_EVERY_S = 0.5

# Seconds within which a hash is as good as a look at the file immediately before its row is written.
_FRESH_S = 0.5


class StoppedError(Exception):
    """`run` was stopped while a write was retried; the spool still has what was in hand."""


class Registrar:
    """Drains the intake. All methods but `stop`, `resume` and `retry` are for one thread at a time.

    Args:
        intake: Where registrations are accepted.
        file_queue: Where they come from.
        spool: Where they are kept meanwhile.
        database: Where they go.
        health: Counts files and takes conditions.
        policy: How files are treated.
        debug: Called with a line for each file; None where nobody reads that.
        monotonic: Gives seconds of CLOCK_MONOTONIC.
        make_workers: Makes the workers of a run.
        wait: Waits so many seconds, but not beyond `stop`.
        batch: Number of registrations taken up at a time.
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
        self._policy = policy
        self._debug = debug
        self._monotonic = monotonic
        self._make_workers = make_workers
        self._batch = batch
        self._parking = Parking(policy.data_roots, start_thread)
        self._stopping = threading.Event()
        self._wait = wait or self._stopping.wait
        self._hashing: Workers | None = None  # while they work

    def run(self, once: bool = False) -> None:
        """Work until `stop`, or with `once` until nothing is queued, due or in a worker's hands."""
        try:
            self.begin()
            while not self._stopping.is_set():
                worked = self.step(0.0 if once else self._patience())
                if once and not (worked or self.workers.busy):
                    break
                if once and not worked:
                    self._queue.take(0, self._patience())
        except StoppedError:
            pass
        finally:
            self._hashing = None
            self.workers.close()
            self._database.close()
            self._stopping.clear()

    def stop(self) -> None:
        """Make `run` return promptly, even while hashing; what is not done stays in the spool."""
        self._stopping.set()
        self._queue.wake()

    def resume(self) -> None:
        """Forget a `stop` that came when `run` had ended."""
        self._stopping.clear()

    def sleep(self, seconds: float) -> None:
        """Wait, but not beyond `stop`."""
        self._stopping.wait(seconds)

    def begin(self) -> None:
        """Start from what the spool holds.

        Raises:
            StoppedError: If `stop` was called while the spool could not be used.
        """
        self.workers = self._make_workers(self._policy, self._parking, self._queue.wake)
        self._hashing = self.workers
        self._registered: dict[int, Recheck] = {}  # by id, until the re-check
        self._latest: dict[str, int] = {}  # by path, the last registered of `_registered`
        self._backoff_s = _BACKOFF_FIRST_S
        self._waited = self._monotonic()  # when the queue was last waited for
        self._is_late = False  # whether results may have lain about since they were found
        self._database_identity = self._database.identity
        now = self._monotonic()
        self._persist(lambda: self._intake.requeue_all(lambda attempts: now + lookup.retry_delay(attempts - 1)))

    def retry(self, ids: Iterable[int] | None = None) -> int:
        """Try dead letters (those of `ids`, or all) again now; return how many. Any thread may call it.

        Raises:
            SpoolError: If the spool cannot be written now.
        """
        retried = self._spool.retry(ids)
        self._queue.wake()
        return retried

    def hash_file(self, path: str, stopped: Callable[[], bool]) -> HashedLarge | FailedLarge | None:
        """Hash a file that is not being registered, and wait for that. Any thread may call it.

        Args:
            path: The file.
            stopped: Asked now and then whether to give up.

        Returns:
            The result; None if the workers ended before, or `stopped` returned True.
        """
        answer: queue.SimpleQueue[HashedLarge | FailedLarge] = queue.SimpleQueue()
        workers = self._hashing
        if workers is not None:
            workers.submit([Hash(path, answer.put)])
        while workers is not None and self._hashing is workers and not stopped():
            with contextlib.suppress(queue.Empty):
                return answer.get(timeout=_ASK_S)
        return None

    def step(self, timeout: float) -> bool:
        """Do all that can be done now; wait for something to do for at most `timeout` seconds.

        Returns:
            Whether anything was done.

        Raises:
            StoppedError: If `stop` was called while a write was retried.
        """
        self._is_late = self.workers.has_left or self._monotonic() - self._waited > _FRESH_S
        items = self._queue.take(min(self._batch, self.workers.room), timeout)
        self._waited = self._monotonic()
        self.workers.submit(self._adopted(items))
        self.workers.supervise()
        self._note_hanging()
        results = self.workers.take()
        due = self._apply(self._outcomes(results))
        if due:
            self._take_up(due)
        return bool(items or results or due)

    def _patience(self) -> float:
        """Seconds until there is something to do by itself."""
        if not self.workers.room:
            return _SUPERVISE_S
        longest = _SUPERVISE_S if self.workers.busy else lookup.RETRY_MAX_S
        return min(max(0.0, self._spool.next_due - self._monotonic()), longest)

    def _adopted(self, items: Sequence[dict[str, object]]) -> list[Registration]:
        registrations = [item for item in items if isinstance(item, Registration)]
        if len(registrations) < len(items):
            foreign = [item for item in items if not isinstance(item, Registration)]
            try:
                registrations += self._persist(lambda: self._intake.adopt(foreign))
            except StoppedError:
                for item in foreign:  # of which the spool has nothing yet
                    self._queue.put(item)
                raise
        return registrations

    def _note_hanging(self) -> None:
        if folders := self._parking.folders:
            self._health.conditions.set_condition(
                "disk_hangs",
                f"Reading files in {', '.join(folders)} hangs. Their registrations wait in the spool; files elsewhere"
                " are not affected. The disk is tried again every minute. Check it with: df -h",
            )
        else:
            self._health.conditions.clear_condition("disk_hangs", "all disks answer again")

    # --- from results to transitions

    def _outcomes(self, results: list[Result]) -> list[Transition]:
        """Return what results mean. An error that nobody expected is the failure of one result, not of all."""
        for _ in range(2):
            try:
                return self._evaluate(results)
            except StoppedError:
                raise
            except Exception as error:  # noqa: BLE001 (files go on being registered, whatever it is)
                self._report_unexpected(error)
        transitions: list[Transition] = []
        for result in results:
            try:
                transitions += self._evaluate([result])
            except StoppedError:
                raise
            except Exception as error:  # noqa: BLE001 (this one alone is given up)
                self._report_unexpected(error)
                transitions += self._culprit(result, f"unexpected error {error!r}. Please report it")
        return transitions

    def _report_unexpected(self, error: Exception) -> None:
        text = f"Unexpected error {error!r}. Registration goes on. Please report it"
        self._health.log.log_throttled("error", "internal_error", text, traceback=traceback.format_exc())

    def _culprit(self, result: Result, reason: str) -> list[Transition]:
        if isinstance(result, (Recheck, Rechecked)):
            due = self._monotonic() + lookup.RECHECK_MAX_S
            return [Transition(State.REGISTERED, Event.UNREADABLE, [result.id], due, sanitize(reason))]
        ids = result.ids if isinstance(result, (HashedLarge, FailedLarge)) else [result.registration.id]
        return [Transition(State.PENDING, Event.GIVEN_UP, ids, reason=sanitize(reason))]

    def _evaluate(self, results: Iterable[Result]) -> list[Transition]:
        transitions: list[Transition] = []
        hashed: list[Hashed] = []
        failed: list[Failed] = []
        rechecked: list[Recheck | Rechecked] = []
        for result in results:
            if isinstance(result, Hashed):
                hashed.append(result)
            elif isinstance(result, (Recheck, Rechecked)):
                rechecked.append(result)
            elif isinstance(result, Failed):
                failed.append(result)
            else:
                self._expand(result, hashed, failed)
        if hashed:
            crashpoint.reach("hashed")
            refused = self._register(hashed, transitions)
            failed += refused
        if failed:
            transitions += self._judge(failed)
        if rechecked:
            transitions += self._conclude(rechecked)
        return transitions

    def _expand(self, result: HashedLarge | FailedLarge, hashed: list[Hashed], failed: list[Failed]) -> None:
        """Turn the result of a large file into results of its registrations, which only the spool has by now."""
        for start in range(0, len(result.ids), self._batch):
            some = result.ids[start : start + self._batch]
            rows = self._persist(lambda some=some: self._spool.load(some))  # type: ignore[misc]
            for registration in self._parsed(rows, failed):
                if isinstance(result, FailedLarge):
                    failed.append(Failed(registration, result.reason, result.refused, withdraw=result.refused))
                    continue
                try:
                    entry = lookup.entry_at(registration, result.path)
                except ArchiveError as error:
                    failed.append(Failed(registration, sanitize(str(error)), refused=True))
                else:
                    hashed.append(Hashed(registration, HashedFile(entry, result.md5), result.fingerprint))

    def _parsed(self, rows: Iterable[Record], failed: list[Failed]) -> list[Registration]:
        """Parse registrations of the spool; what this version cannot parse goes to `failed`."""
        registrations = []
        for row in rows:
            try:
                registrations.append(lookup.parse(row))
            except Exception as error:  # noqa: BLE001 (whatever is in the spool, it must not stop the others)
                unknown = Registration({"path": row.message, "pub_id": ""}, row.id, row.received, row.sender)
                failed.append(Failed(unknown, sanitize(f"it cannot be parsed: {error}"), refused=True))
        return registrations

    def _register(self, hashed: list[Hashed], transitions: list[Transition]) -> list[Failed]:
        """Write rows for hashed files; return those that can have none."""
        refused: list[Failed] = []
        if any(one.registration.rounds for one in hashed):
            hashed = self._without_superseded(hashed, transitions)
        if self._is_late:
            hashed = self._verified(hashed)
        while hashed:
            begin = time.perf_counter()
            try:
                outcomes = self._database.register([one.file for one in hashed])
            except DatabaseUnavailableError as error:
                self._unavailable(error)
                hashed = self._verified(hashed)
                continue
            if not outcomes:  # the write lock was waited for, and files may have changed meanwhile
                hashed = self._verified(hashed)
                continue
            self._health.counters.writes.wrote(time.perf_counter() - begin)
            self._succeeded("database", "the database can be written again")
            crashpoint.reach("committed")
            if self._database.identity != self._database_identity:
                # another file than before: what was committed to that one is not in this one
                transitions.append(self._restart_registered())
                self._database_identity = self._database.identity
            written = hashed[: len(outcomes)]
            hashed = hashed[len(outcomes) :]
            first: list[str] = []
            registered: list[Hashed] = []
            for one, (changed, refusal) in zip(written, outcomes, strict=True):
                registration = one.registration
                if refusal is not None:
                    refused.append(Failed(registration, sanitize(refusal), refused=True))
                    if one.file.entry.local_path in self._latest:  # the new content does not belong to the earlier key
                        self._latest[one.file.entry.local_path] = registration.id
                    continue
                registered.append(one)
                if changed and not registration.rounds:
                    first.append(registration["pub_id"])
            if registered:
                self._health.count_registered(len(registered), first, registered[-1].file.entry.local_path)
                transitions += self._committed(registered)
        return refused

    def _without_superseded(self, hashed: list[Hashed], transitions: list[Transition]) -> list[Hashed]:
        """Leave out files that have a row already and were announced again later, under whatever key.

        That announcement takes care of the new content. Under the former key it would replace the archived version.
        """
        latest: dict[str, int] = {}
        for registration, file, _ in hashed:
            path = file.entry.local_path
            latest[path] = max(registration.id, latest.get(path, 0), self._latest.get(path, 0))
        earlier = [
            one.registration
            for one in hashed
            if one.registration.rounds and latest[one.file.entry.local_path] != one.registration.id
        ]
        superseded = self._until_available(lambda: self._have_rows(earlier)) if earlier else set()
        if superseded:
            self._sync()
            transitions.append(Transition(State.PENDING, Event.KNOWN, list(superseded)))
        return [one for one in hashed if one.registration.id not in superseded]

    def _verified(self, hashed: list[Hashed]) -> list[Hashed]:
        """Return those files that are still what was hashed; the others go back to the workers."""
        answers: queue.SimpleQueue[list[Result]] = queue.SimpleQueue()
        self.workers.submit([Verify(one) for one in hashed], answers.put)
        results: list[Result] = []
        while len(results) < len(hashed):
            with contextlib.suppress(queue.Empty):
                results += answers.get(timeout=_SUPERVISE_S)
            self.workers.supervise()
            self._check_stopping()
        verified = [result for result in results if isinstance(result, Hashed)]
        self.workers.submit([result.registration for result in results if isinstance(result, Failed)])
        return verified

    def _committed(self, registered: Sequence[Hashed]) -> list[Transition]:
        """Return the transitions of files whose rows were committed, and remember what their re-check needs."""
        by_rounds: dict[int, list[int]] = {}
        for registration, (entry, md5), fingerprint in registered:
            id_, path, rounds = registration.id, entry.local_path, registration.rounds
            before: tuple[int, ...] = ()
            if (former := self._latest.get(path)) is not None and former != id_ and former in self._registered:
                before = (*self._registered[former].before, former)
            self._latest[path] = id_
            self._registered[id_] = Recheck(id_, path, fingerprint, before)
            by_rounds.setdefault(rounds, []).append(id_)
            if self._debug is not None:
                where = {"path": path, "archive": entry.archive_name, "remote": entry.remote_path}
                keys = {"id": registration["pub_id"], **where, "md5": md5}
                self._debug(events.line("registered", "registered", keys))
        return [
            Transition(State.PENDING, Event.COMMITTED, ids, self._recheck_at(rounds))
            for rounds, ids in by_rounds.items()
        ]

    def _recheck_at(self, rounds: int) -> float:
        due = self._monotonic() + lookup.recheck_delay(rounds, self._policy.settle_after)
        return math.ceil(due / _RECHECK_EVERY_S) * _RECHECK_EVERY_S

    def _judge(self, failed: Sequence[Failed]) -> list[Transition]:
        """Let what failed wait or die; what has a row already is settled."""
        transitions: list[Transition] = []
        given_up: list[Failed] = []
        now = self._monotonic()
        self._withdraw([failure.registration for failure in failed if failure.withdraw])
        for failure in failed:
            registration, reason, refused, _ = failure
            if refused:
                self._log_dead(registration, reason, refused=True)
                transitions.append(Transition(State.PENDING, Event.REFUSED, [registration.id], reason=reason))
            elif lookup.is_given_up(registration.attempts, self._policy.give_up_after):
                given_up.append(failure)
            else:
                due = now + lookup.retry_delay(registration.attempts)
                transitions.append(Transition(State.PENDING, Event.FAILED, [registration.id], due, reason))
                if not registration.attempts:
                    text = f"waiting for a file that cannot be read yet: {reason}"
                    self._health.log.log_throttled("info", "waiting", text, id=registration["pub_id"])
        if given_up:
            transitions += self._give_up(given_up)
        return transitions

    def _give_up(self, failed: Sequence[Failed]) -> list[Transition]:
        transitions: list[Transition] = []
        try:
            known = self._have_rows([failure.registration for failure in failed])
        except DatabaseUnavailableError as error:
            due = self._monotonic() + lookup.RETRY_MAX_S
            reason = sanitize(f"{failed[0].reason}; {error}")
            return [Transition(State.PENDING, Event.FAILED, [one.registration.id for one in failed], due, reason)]
        for registration, reason, *_ in failed:
            if registration.id in known:
                transitions.append(Transition(State.PENDING, Event.KNOWN, [registration.id]))
                continue
            reason = f"{reason}, given up after {lookup.duration(self._policy.give_up_after)}"
            self._log_dead(registration, reason, refused=False)
            transitions.append(Transition(State.PENDING, Event.GIVEN_UP, [registration.id], reason=reason))
        return transitions

    def _have_rows(self, registrations: Sequence[Registration]) -> set[int]:
        """Return the ids of those of which a row tells: they were registered, or archived and removed.

        Raises:
            DatabaseUnavailableError: If the database cannot be read now.
        """
        entries = {registration.id: lookup.entries(registration) for registration in registrations}
        rows = self._database.rows(entry.local_path for some in entries.values() for entry in some)
        return {
            id_
            for id_, some in entries.items()
            if any(row.is_of(entry) for entry in some for row in rows.get(entry.local_path, ()))
        }

    def _log_dead(self, registration: Registration, reason: str, *, refused: bool) -> None:
        keys = {"sender": registration.sender, "id": registration["pub_id"], "path": registration["path"]}
        if refused:
            text = f"registration {registration.id} was refused, a dead letter: {reason}"
            self._health.log.log_throttled("warn", "refused", text, **keys)
        else:
            text = f"registration {registration.id} became a dead letter: {reason}. Run: socs-monitor failed list"
            self._health.log.log_throttled("error", "file_missing", text, **keys)
            self._health.conditions.set_condition_for("file_missing", text, FILE_MISSING_S)

    # --- re-checks

    def _take_up(self, due: Sequence[Record]) -> None:
        """Hand what is due to the workers; what they can do nothing about is a result for the next step."""
        failed: list[Failed] = []
        tasks: list[Task] = []
        unknown: list[Rechecked] = []
        for row in due:
            if row.state == State.REGISTERED:
                if (known := self._registered.get(row.id)) is not None:
                    tasks.append(known)
                else:
                    unknown.append(Rechecked(row.id))
        tasks += self._parsed([row for row in due if row.message is not None], failed)
        self.workers.submit(tasks)
        if failed or unknown:
            self.workers.add([*failed, *unknown])

    def _conclude_unknown(self, ids: Sequence[int]) -> list[Transition]:
        """Conclude registered files that a former run left behind, and whose path was announced again later.

        Those that have their row are done. The others, if the database was replaced meanwhile, are registered again.
        """
        failed: list[Failed] = []
        rows = [row for row in self._persist(lambda: self._spool.load(ids)) if row.state == State.REGISTERED]
        registrations = self._parsed(rows, failed)
        known = self._until_available(lambda: self._have_rows(registrations))
        lost = [registration.id for registration in registrations if registration.id not in known]
        if known:
            self._sync()
        return [
            Transition(State.REGISTERED, Event.SUPERSEDED, list(known)),
            Transition(State.REGISTERED, Event.RESTARTED, lost, due=0.0),
            *(
                Transition(State.REGISTERED, Event.REFUSED, [failure.registration.id], reason=failure.reason)
                for failure in failed
            ),
        ]

    def _conclude(self, rechecked: Sequence[Recheck | Rechecked]) -> list[Transition]:
        """Settle registered files that are as they were hashed, and register again those that changed."""
        unknown = [result.id for result in rechecked if result.id not in self._registered]
        transitions = self._conclude_unknown(unknown) if unknown else []
        if self._database.is_replaced() or self._database.identity != self._database_identity:
            return [*transitions, self._restart_registered()]
        by_event: dict[Event, list[int]] = {}
        concluded: list[int] = []
        for result in rechecked:
            id_ = result.id
            if (known := self._registered.get(id_)) is None:
                continue
            if isinstance(result, Recheck):
                if result is known:
                    by_event.setdefault(Event.UNCHANGED, []).extend((id_, *known.before))
                continue  # it is forgotten below
            if result.refusal is not None:
                transitions.append(self._refuse(id_, result.refusal))
            elif result.error is not None:
                due = self._monotonic() + lookup.RECHECK_MAX_S
                transitions.append(Transition(State.REGISTERED, Event.UNREADABLE, [id_], due, result.error))
                continue
            elif result.missing:
                by_event.setdefault(Event.MISSING, []).extend((id_, *known.before))
            elif self._latest.get(known.path) != id_:
                by_event.setdefault(Event.SUPERSEDED, []).append(id_)
            else:
                text = "a file changed after it was registered, and is registered again"
                self._health.log.log_throttled("info", "changed", text, path=known.path)
                transitions.append(Transition(State.REGISTERED, Event.CHANGED, [id_], due=0.0))
            concluded.append(id_)
        if by_event:
            self._sync()
        for event, ids in by_event.items():
            concluded += ids
            transitions.append(Transition(State.REGISTERED, event, ids))
        for id_ in concluded:  # once nothing can fail any more
            self._forget(id_)
        return transitions

    def _forget(self, id_: int) -> None:
        known = self._registered.pop(id_, None)
        if known is not None and self._latest.get(known.path) not in self._registered:
            self._latest.pop(known.path, None)

    def _refuse(self, id_: int, reason: str) -> Transition:
        """Make a registered file a dead letter that is refused now: a link was retargeted after it was hashed."""
        failed: list[Failed] = []
        registrations = self._parsed(self._persist(lambda: self._spool.load([id_])), failed)
        self._withdraw(registrations)
        for registration in registrations:
            self._log_dead(registration, reason, refused=True)
        return Transition(State.REGISTERED, Event.REFUSED, [id_], reason=reason)

    def _withdraw(self, registrations: Sequence[Registration]) -> None:
        """Keep SupRsync from what a path leads to now: its row may be from before that was so."""
        if entries := [entry for registration in registrations for entry in lookup.entries(registration)]:
            self._until_available(lambda: self._database.withdraw(entries))

    def _restart_registered(self) -> Transition:
        """Register all again whose rows may not be in the database that is there now."""
        ids = list(self._registered)
        self._registered.clear()
        self._latest.clear()
        return Transition(State.REGISTERED, Event.RESTARTED, ids, due=0.0)

    # --- what is retried in place

    def _apply(self, transitions: Sequence[Transition]) -> list[Record]:
        limit = min(self._batch, self.workers.room)
        due = self._persist(lambda: self._spool.apply(transitions, self._monotonic(), limit))
        for transition in transitions:
            if transition.event is Event.COMMITTED:
                crashpoint.reach("settling")
            elif transition.event is Event.UNCHANGED:
                crashpoint.reach("settled")
        return due

    def _persist(self, operation: Callable[[], T]) -> T:
        """Do an operation on the spool, again and again until it succeeds."""
        while True:
            try:
                result = operation()
            except SpoolError as error:
                text = f"{error}. Nothing is lost; it is tried again. {SPOOL_ADVICE}"
                self._health.conditions.set_condition("spool_update", text)
                self._back_off()
            else:
                self._succeeded("spool_update", "the spool can be used again")
                return result

    def _until_available(self, operation: Callable[[], T]) -> T:
        """Do an operation on the database, again and again until it succeeds."""
        while True:
            try:
                result = operation()
            except DatabaseUnavailableError as error:
                self._unavailable(error)
            else:
                self._succeeded("database", "the database can be used again")
                return result

    def _sync(self) -> None:
        """Have the rows of what is settled on the disk: a power cut takes what is not."""
        self._until_available(self._database.sync)

    def _unavailable(self, error: DatabaseUnavailableError) -> None:
        self._health.counters.writes.errors += 1
        text = f"{error}. Registrations are kept in the spool until it works again"
        self._health.conditions.set_condition("database", text)
        self._back_off()

    def _succeeded(self, condition: str, text: str) -> None:
        self._backoff_s = _BACKOFF_FIRST_S
        self._health.conditions.clear_condition(condition, text)

    def _back_off(self) -> None:
        self._wait(self._backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 (jitter)
        self._backoff_s = min(2 * self._backoff_s, _BACKOFF_MAX_S)
        self._check_stopping()

    def _check_stopping(self) -> None:
        if self._stopping.is_set():
            raise StoppedError
