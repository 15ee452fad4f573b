"""From the spool through the checksum into the SupRsync database, and out of the spool.

A registration is hashed outside of any transaction, its row committed in a short one (`Database.register`, which
is idempotent), and the file looked at once more some seconds later: only if it is still what was hashed does the
registration leave the spool. What fails is tried again or becomes a dead letter; nothing is dropped.
"""

from __future__ import annotations

import heapq
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from socs_monitor import crashpoint, events
from socs_monitor.checksum import fingerprint
from socs_monitor.finder import RETRY_FIRST_S, RETRY_MAX_S, SMALL, Hashed, Policy, archived, look, retry_delay
from socs_monitor.hashers import Hashers
from socs_monitor.intake import BATCH, SPOOL_ADVICE, Intake
from socs_monitor.messages import brief
from socs_monitor.settling import Settling
from socs_monitor.spool import MAX_DEAD, Failure, Registration, Spool
from socs_monitor.spoolfile import SpoolError
from socs_monitor.stats import GIVEN_UP_S, Stats
from socs_monitor.suprsync.database import Database, DatabaseUnavailableError

# What the hashers did is written at such intervals (seconds), and when they are done: a commit for each is dear.
_COLLECT_EVERY_S = 0.03

_CHANGED = "a file changed after it was registered"

_BACKOFF_FIRST_S = 0.05
_BACKOFF_MAX_S = 2.0


class Registrar:
    """Drains the intake. All methods but `stop` and `retry` are for one thread at a time.

    Args:
        intake: Where registrations come from.
        spool: Where they are kept meanwhile.
        database: Where they go.
        stats: Learns of files and of trouble.
        policy: How files are treated.
        debug: Called with a line for each file; None where nobody reads that.
        clock: Gives unix time.
    """

    def __init__(
        self,
        intake: Intake,
        spool: Spool,
        database: Database,
        stats: Stats,
        policy: Policy,
        debug: Callable[[str], None] | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._intake = intake
        self._spool = spool
        self._database = database
        self._stats = stats
        self._policy = policy
        self._debug = debug
        self._clock = clock
        self._stopping = threading.Event()
        self._reset()

    def _reset(self) -> None:
        self._work: deque[Registration] = deque()  # to be hashed now
        self._unwritten: deque[list[Hashed]] = deque()  # the database has yet to take these
        self._owed: deque[tuple[Callable[[Any], None], Any]] = deque()  # the spool has yet to learn this
        self._settling = Settling(self._policy.settle_after)
        self._waiting: list[tuple[float, int]] = []  # heap of when which registration is due
        self._revived: deque[int] = deque()
        self._unstable: dict[int, int] = {}  # how often a file had changed before its row was written
        self._database_identity = self._database.identity
        self._backoff_s = _BACKOFF_FIRST_S
        self._blocked_until = 0.0

    def run(self, once: bool = False) -> None:
        """Work until `stop`, or with `once` until all that has arrived was handled; then close the database."""
        self.begin()
        try:
            while not self._stopping.is_set():
                worked = self.step(0.0 if once and not self._busy() else self._patience())
                if once and not (worked or self._busy()):
                    break
        finally:
            self._stopping.set()  # the hashers ask, too
            self._hashers.close()
            self._database.close()
            self._stopping.clear()

    def stop(self) -> None:
        """Make `run` return within moments, whatever it is at; what is not done stays in the spool."""
        self._stopping.set()
        self._intake.wake()

    def resume(self) -> None:
        """Forget a `stop` that came when `run` had ended."""
        self._stopping.clear()

    def sleep(self, seconds: float) -> None:
        """Wait, but not beyond `stop`."""
        self._stopping.wait(seconds)

    def begin(self) -> None:
        """Start from what the spool holds, in order."""
        self._reset()
        self._hashers = Hashers(self._policy, self._stopping.is_set, self._intake.wake)
        self._intake.restart()
        self._owe(self._reload, None)

    def _reload(self, _: None) -> None:
        self._spool.unsettle()
        self._waiting = self._spool.waiting_times()
        heapq.heapify(self._waiting)

    def step(self, timeout: float) -> bool:
        """Do all that can be done now; wait for something to do for at most `timeout` seconds.

        Returns:
            Whether anything was done.
        """
        if (blocked := self._blocked_until - self._clock()) > 0:
            self._stopping.wait(min(timeout, blocked))
            return False
        try:
            self._pay()
            if not self._unwritten:
                self._look_again()
                self._pay()
                self._due()
                self._work.extend(self._intake.take(0.0 if self._work else timeout))
                self._hash()
            worked = bool(self._unwritten or self._owed)
            while self._unwritten:
                self._write()
                self._pay()
            self._pay()
        except SpoolError as error:
            self._stats.trouble("spool entries", f"{error}. Nothing is lost; it is tried again. {SPOOL_ADVICE}")
            self._block()
            return False
        except DatabaseUnavailableError as error:
            self._stats.writes.errors += 1
            self._stats.trouble("database", f"{error}. Registrations are kept in the spool until it works again")
            self._block()
            return False
        self._backoff_s = _BACKOFF_FIRST_S
        self._stats.cured("spool entries", "the spool can be used again")
        return worked

    def _pay(self) -> None:
        while self._owed:
            operation, argument = self._owed[0]
            operation(argument)
            self._owed.popleft()

    def _busy(self) -> bool:
        return bool(self._hashers or self._work or self._unwritten or self._owed)

    def _patience(self) -> float:
        """Seconds until there is something to do of itself."""
        now = self._clock()
        if self._blocked_until > now:
            return self._blocked_until - now
        if self._owed or self._work:
            return 0.0
        times = [self._settling.due]
        if self._waiting:
            times.append(self._waiting[0][0])
        if self._hashers:
            times.append(now + _COLLECT_EVERY_S)
        return min(max(0.0, min(times) - now), RETRY_MAX_S)

    def _block(self) -> None:
        self._blocked_until = self._clock() + self._backoff_s * random.uniform(0.5, 1.0)  # noqa: S311 (jitter)
        self._backoff_s = min(2 * self._backoff_s, _BACKOFF_MAX_S)

    def _owe(self, operation: Callable[[Any], Any], argument: Any) -> None:
        """Have the spool learn something, surely: what fails is tried again before anything else is done."""
        self._owed.append((operation, argument))

    def retry(self, ids: Iterable[int] | None = None) -> int:
        """Try dead letters (those of `ids`, or all) again, now; return how many. Any thread may call it.

        Raises:
            SpoolError: If the spool cannot be written now.
        """
        revived = self._spool.retry(ids)
        self._revived.extend(revived)
        self._intake.wake()
        return len(revived)

    def _due(self) -> None:
        """Take up what waited long enough."""
        while self._revived:
            heapq.heappush(self._waiting, (0.0, self._revived.popleft()))
        due: list[tuple[float, int]] = []
        while self._waiting and self._waiting[0][0] <= self._clock() and len(due) < BATCH:
            due.append(heapq.heappop(self._waiting))
        if due:
            try:
                self._work.extend(self._spool.waiting([id_ for _, id_ in due]))
            except SpoolError:
                self._waiting = list(heapq.merge(due, sorted(self._waiting)))
                raise

    def _look_again(self) -> None:
        """Look again at files that were registered; settle those that stayed as they were, take up the others."""
        now = self._clock()
        if self._settling.due > now:
            return
        if self._database.is_replaced():
            self._owe(self._take_up, (self._settling.take_all(), "the database was replaced"))
            return
        settled, changed = self._settling.look(now)
        for entry in changed:
            self._stats.repeated("info", "changed", f"{_CHANGED}, hashing it again", path=entry.path)
        if settled:
            self._owe(self._settle, settled)
        if changed:
            self._owe(self._take_up, ([entry.id for entry in changed], _CHANGED))

    def _settle(self, ids: list[int]) -> None:
        """Let the spool forget registrations whose rows are on the disk: a power cut takes what is not."""
        self._database.sync()
        self._stats.cured("database", "the database can be written again")
        self._spool.settle(ids)

    def _take_up(self, ids_and_reason: tuple[list[int], str]) -> None:
        """Register files that were registered before.

        In the spool's file they wait, so that who reads that does not take them for what never got a row.
        """
        ids, reason = ids_and_reason
        registrations = self._spool.settling(ids)
        self._spool.wait([Failure(registration, reason, due=self._clock()) for registration in registrations])
        self._work.extend(registrations)

    def _hash(self) -> None:
        """Hash small files at once and have the hashers do the others; sort what came out."""
        results: list[Hashed | Failure] = []
        stopped = self._stopping.is_set
        while self._work:
            registration = self._work.popleft()
            found = look(registration, self._policy, SMALL, stopped)
            if found is not None:
                results.append(found)
            else:
                self._hashers.add(registration)
        results += self._hashers.take()
        hashed = [result for result in results if isinstance(result, Hashed)]
        crashpoint.reach("hashed")
        if hashed:
            self._unwritten.append(hashed)
        if len(hashed) < len(results):
            self._sort([result for result in results if isinstance(result, Failure)])

    def _sort(self, failures: list[Failure]) -> None:
        """Let what failed wait, or bury it; what SupRsync has archived and removed meanwhile is done."""
        waiting: list[Failure] = []
        dead = [failure for failure in failures if failure.refused]
        absent = [failure for failure in failures if not failure.refused]
        done = archived([failure.registration for failure in absent], self._database)
        for failure in absent:
            registration = failure.registration
            if done is not None and registration.id in done:
                continue
            delay = retry_delay(registration.attempts, self._policy.give_up_after)
            registration.attempts += 1
            if delay is None and done is not None:
                hours = self._policy.give_up_after / 3600
                dead.append(failure._replace(reason=f"{failure.reason}, given up after {hours:.3g} h"))
            else:
                waiting.append(failure._replace(due=self._clock() + (delay or RETRY_MAX_S)))
        if done:
            self._owe(self._remove, list(done.values()))
        if waiting:
            self._owe(self._wait, waiting)
        if dead:
            self._owe(self._bury, dead)

    def _remove(self, registrations: list[Registration]) -> None:
        self._spool.remove(registrations)
        self._intake.done(registrations)

    def _wait(self, failures: list[Failure]) -> None:
        self._spool.wait(failures)
        self._intake.done(failure.registration for failure in failures)
        for failure in failures:
            heapq.heappush(self._waiting, (failure.due or 0.0, failure.registration.id))
            if failure.registration.attempts == 1:
                text = f"waiting for a file that cannot be read yet: {failure.reason}"
                self._stats.repeated("info", "waiting", text, id=failure.registration["pub_id"])

    def _bury(self, failures: list[Failure]) -> None:
        dropped = self._spool.bury(failures)
        self._intake.done(failure.registration for failure in failures)
        if dropped:
            text = f"more than {MAX_DEAD} dead letters: the oldest are dropped, refused ones first"
            self._stats.repeated("warn", "dead_letters", text, dropped=dropped)
        letters = self._spool.dead([failure.registration.id for failure in failures])
        senders = {letter.id: letter.sender for letter in letters}
        for registration, reason, _, refused in failures:
            keys = {"sender": senders.get(registration.id), "id": registration["pub_id"], "path": registration["path"]}
            if refused:
                text = f"registration {registration.id} was refused, a dead letter: {reason}"
                self._stats.repeated("warn", "refused", text, **keys)
            else:
                text = f"registration {registration.id} became a dead letter: {reason}. See the task retry_failed"
                self._stats.repeated("error", "given_up", text, **keys)
                self._stats.alarm("given up", text, GIVEN_UP_S)

    def _write(self) -> None:
        """Write the first batch that is unwritten, as far as one short transaction goes."""
        batch = self._still_valid(self._unwritten.popleft())
        if not batch:
            return
        self._unwritten.appendleft(batch)
        begin = time.perf_counter()
        outcomes = self._database.register([hashed.file for hashed in batch])
        if not outcomes:  # it waited for the write lock, so the files are looked at again
            return
        self._stats.writes.wrote(time.perf_counter() - begin)
        crashpoint.reach("committed")
        self._unwritten.popleft()
        if len(outcomes) < len(batch):
            self._unwritten.appendleft(batch[len(outcomes) :])
        self._stats.cured("database", "the database can be written again")
        done: list[Hashed] = []
        changed: list[str] = []
        refused: list[Failure] = []
        for hashed, outcome in zip(batch, outcomes, strict=False):
            registration = hashed.registration
            self._unstable.pop(registration.id, None)
            if outcome.refusal is not None:
                refused.append(Failure(registration, brief(outcome.refusal), refused=True))
                self._settling.supersede(hashed)
                continue
            done.append(hashed)
            if outcome.changed and registration.id not in self._settling.changed:
                changed.append(registration["pub_id"])
        if refused:
            self._owe(self._bury, refused)
        if done:
            self._registered(done, changed)

    def _still_valid(self, batch: list[Hashed]) -> list[Hashed]:
        """Return those of a batch whose files are still what was hashed; hash the others again.

        Rows must never claim content that was replaced, or a file that SupRsync removed, while the database was
        locked. A registration whose re-check has become void is settled instead.
        """
        valid: list[Hashed] = []
        void = self._settling.void(batch)
        for hashed in batch:
            registration, file, before = hashed
            if registration.id in void:
                continue
            try:
                after = fingerprint(os.stat(file.entry.local_path))
            except OSError:
                after = None
            if after == before:
                valid.append(hashed)
            else:
                self._hash_again(registration)
        if void:
            self._owe(self._settle_void, void)
        return valid

    def _hash_again(self, registration: Registration) -> None:
        """Hash a file again that changed before its row was written; after the second time wait longer and longer."""
        times = self._unstable.get(registration.id, 0)
        self._unstable[registration.id] = times + 1
        if times < 2:
            self._work.append(registration)
        else:
            delay = min(RETRY_FIRST_S * 2.0**times, RETRY_MAX_S)
            reason = f"{registration['path']}: it changes faster than it can be hashed"
            self._owe(self._wait, [Failure(registration, reason, due=self._clock() + delay)])

    def _settle_void(self, ids: list[int]) -> None:
        self._database.sync()
        registrations = self._spool.waiting(ids)
        self._spool.remove(registrations)
        self._intake.done(registrations)

    def _registered(self, batch: list[Hashed], changed: list[str]) -> None:
        """Note what is registered; `changed` are the publishers of files that are new, or have new content."""
        registrations = [hashed.registration for hashed in batch]
        self._stats.registered(len(batch), changed, batch[-1].file.entry.local_path)
        self._spool.registered(registrations)
        self._intake.done(registrations)
        if self._debug is not None:
            for registration, (entry, md5), _ in batch:
                where = {"path": entry.local_path, "archive": entry.archive_name, "remote": entry.remote_path}
                self._debug(
                    events.line("registered", "registered", {"id": registration["pub_id"], **where, "md5": md5})
                )
        if self._database.identity != self._database_identity:
            # another file than before: what was committed to that one is not in this one
            if former := self._settling.take_all():
                self._owe(self._take_up, (former, "the database was replaced"))
            self._database_identity = self._database.identity
        self._settling.add(batch, self._clock())
