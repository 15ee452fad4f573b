"""Registered files until they settle: what their re-checks need, and the transitions out of state REGISTERED.

This is kept in memory only. A start registers the files again, which is harmless.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from socs_monitor.health.health import Health
from socs_monitor.registration import lookup
from socs_monitor.registration.retry import Retry
from socs_monitor.registration.work import Failed, Hashed, Recheck, Rechecked
from socs_monitor.spool.records import Registration, Transition
from socs_monitor.spool.states import Event, State
from socs_monitor.spool.store import Spool
from socs_monitor.suprsync.database import Database

# Re-checks are due at multiples of this (seconds), since each wake-up of the thread costs.
_RECHECK_EVERY_S = 0.5

_SETTLING = {Event.UNCHANGED, Event.MISSING, Event.SUPERSEDED}


class Rechecks:
    """The registered files of one run.

    Args:
        spool: Has their registrations.
        database: Has their rows.
        health: Takes log lines.
        retry: Repeats operations that fail.
        settle_after: Seconds from the commit of a row to the re-check of its file.
        monotonic: Returns seconds of CLOCK_MONOTONIC.
    """

    def __init__(
        self,
        spool: Spool,
        database: Database,
        health: Health,
        retry: Retry,
        settle_after: float,
        monotonic: Callable[[], float],
    ) -> None:
        self._spool = spool
        self._database = database
        self._log = health.log.log_throttled
        self._retry = retry
        self._settle_after = settle_after
        self._monotonic = monotonic
        self._files: dict[int, Recheck] = {}  # by id of the registration
        self._latest: dict[str, int] = {}  # by path, the id announced last
        self._identity = database.identity  # of the file that has their rows

    def due(self, id_: int) -> Recheck | Rechecked:
        """Return the task to check a registered file again, or a result if only a former run knew the file."""
        return self._files.get(id_) or Rechecked(Recheck(id_, "", 0), Event.RESTARTED)

    def schedule(self, committed: Sequence[Hashed]) -> list[Transition]:
        """Remember files whose rows were committed, and schedule their re-checks."""
        by_rounds: dict[int, list[int]] = defaultdict(list)
        for registration, (entry, _), fingerprint in committed:
            id_, path = registration.id, entry.local_path
            before: tuple[int, ...] = ()
            if (former := self._files.get(self._latest.get(path, id_))) is not None and former.id != id_:
                before = (*former.before, former.id)
            self._latest[path] = id_
            self._files[id_] = Recheck(id_, path, fingerprint, before)
            by_rounds[registration.rounds].append(id_)
        transitions: list[Transition] = []
        for rounds, ids in by_rounds.items():
            due = self._monotonic() + lookup.recheck_delay(rounds, self._settle_after)
            due = math.ceil(due / _RECHECK_EVERY_S) * _RECHECK_EVERY_S
            transitions.append(Transition(State.PENDING, Event.COMMITTED, ids, due))
        return transitions

    def supersede(self, registration: Registration, path: str) -> None:
        """Note that a registered path was announced again, and that announcement refused.

        The new content does not belong to the earlier key.
        """
        if path in self._latest:
            self._latest[path] = registration.id

    def superseded(self, hashed: Sequence[Hashed]) -> set[int]:
        """Return registrations that have a row already, and whose path was announced again later under any key.

        The later announcement takes care of the new content. Under the earlier key, that content would replace the
        archived version.
        """
        if not any(one.registration.rounds for one in hashed):
            return set()
        latest: dict[str, int] = {}
        for registration, file, _ in hashed:
            path = file.entry.local_path
            latest[path] = max(registration.id, latest.get(path, 0), self._latest.get(path, 0))
        earlier = [
            one.registration
            for one in hashed
            if one.registration.rounds and latest[one.file.entry.local_path] != one.registration.id
        ]
        return self.with_rows(earlier) if earlier else set()

    def with_rows(self, registrations: Sequence[Registration]) -> set[int]:
        """Return the ids of registrations whose key has a row: they were registered, or archived and removed.

        The rows are on the disk, so that these registrations may leave the spool.
        """
        entries = {registration.id: lookup.entries(registration) for registration in registrations}
        paths = [entry.local_path for some in entries.values() for entry in some]
        rows = self._retry(lambda: self._database.rows(paths))
        known = {
            id_
            for id_, some in entries.items()
            if any(row.is_of(entry) for entry in some for row in rows.get(entry.local_path, ()))
        }
        if known:
            self._retry(self._database.sync)
        return known

    def restart_if_replaced(self) -> list[Transition]:
        """If the database was replaced, register all files again, because their rows are in another file."""
        if not self._database.is_replaced() and self._database.identity == self._identity:
            return []
        restarted = Transition(State.REGISTERED, Event.RESTARTED, list(self._files), due=0.0)
        self._files.clear()
        self._latest.clear()
        self._identity = self._database.identity
        return [restarted]

    def evaluate(self, rechecked: Sequence[Rechecked], failed: list[Failed]) -> list[Transition]:
        """Settle files that are unchanged, missing or superseded, and register changed ones again.

        Refused ones, whose links were retargeted, are added to `failed`.
        """
        unknown = [result.task.id for result in rechecked if result.task.id not in self._files]
        transitions = self._evaluate_unknown(unknown, failed) if unknown else []
        if restarted := self.restart_if_replaced():
            return transitions + restarted
        by_event: dict[Event, list[int]] = defaultdict(list)
        refused: dict[int, str] = {}
        for task, event, reason in rechecked:
            if self._files.get(task.id) is not task:  # it was restarted while it was checked
                continue
            if event is Event.REFUSED:
                refused[task.id] = reason
            elif event is Event.UNCHANGED or event is Event.MISSING:
                by_event[event] += (task.id, *task.before)
            elif event is Event.CHANGED and self._latest.get(task.path) != task.id:
                by_event[Event.SUPERSEDED].append(task.id)
            else:
                by_event[event].append(task.id)
                if event is Event.CHANGED:
                    text = "A file changed after it was registered, and is registered again"
                    self._log("info", "changed", text, path=task.path)
        if by_event.keys() & _SETTLING:
            self._retry(self._database.sync)
        if refused:
            for registration in self._load(list(refused), failed):
                reason = refused[registration.id]
                failed.append(Failed(registration, reason, refused=True, withdraw=True, origin=State.REGISTERED))
        due = {Event.CHANGED: 0.0, Event.UNREADABLE: self._monotonic() + lookup.RECHECK_MAX_S}
        for event, ids in by_event.items():
            transitions.append(Transition(State.REGISTERED, event, ids, due.get(event)))
        return transitions

    def _evaluate_unknown(self, ids: Sequence[int], failed: list[Failed]) -> list[Transition]:
        """Settle files of a former run whose path was announced again later, if the database has their rows.

        If it does not, because it was replaced, they are registered again.
        """
        registrations = self._load(ids, failed)
        known = self.with_rows(registrations)
        lost = [registration.id for registration in registrations if registration.id not in known]
        return [
            Transition(State.REGISTERED, Event.SUPERSEDED, list(known)),
            Transition(State.REGISTERED, Event.RESTARTED, lost, due=0.0),
        ]

    def _load(self, ids: Sequence[int], failed: list[Failed]) -> list[Registration]:
        rows = self._retry(lambda: self._spool.load(ids))
        return lookup.parse([row for row in rows if row.state == State.REGISTERED], failed)

    def forget(self, transitions: Sequence[Transition]) -> None:
        """Forget the files that left state REGISTERED by transitions that were applied."""
        for origin, event, ids, _, _ in transitions:
            if origin is State.REGISTERED and event not in (Event.UNREADABLE, Event.RESTARTED):
                for id_ in ids:
                    file = self._files.pop(id_, None)
                    if file is not None and self._latest.get(file.path) not in self._files:
                        self._latest.pop(file.path, None)
