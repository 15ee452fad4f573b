"""The OCS Tasks for operators: dead letters, and timestream files without a row."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ocs import ocs_agent
from twisted.internet.defer import Deferred, succeed

from socs_monitor.completeness.scan import Scan, registration_of
from socs_monitor.health.health import Health
from socs_monitor.registration.registrar import Registrar
from socs_monitor.spool.file import SpoolError
from socs_monitor.spool.intake import Intake
from socs_monitor.spool.store import Spool
from socs_monitor.wire.text import plural

# Bytes that a backfill may hold in memory before they are in the spool. They are written before the process ends.
_UNWRITTEN_MAX = 1 << 20

# Seconds between two checks whether a backfill has ended or been aborted, and for which an aborted one may continue.
_POLL_S = 0.1
_ABORT_S = 1.0


class Tasks:
    """The agent's Tasks. Each call runs in a thread of its own.

    Args:
        spool: The spool with the dead letters.
        intake: Takes the files that a backfill finds.
        registrar: Retries dead letters.
        health: Logs the results.
        db_path: The SupRsync database.
    """

    def __init__(self, spool: Spool, intake: Intake, registrar: Registrar, health: Health, db_path: str) -> None:
        self._spool = spool
        self._intake = intake
        self._registrar = registrar
        self._health = health
        self._db_path = db_path
        self._aborted: dict[int, threading.Event] = {}  # by session id of a backfill

    def register(self, agent: Any) -> None:
        """Register the tasks with an OCSAgent."""
        # without an access policy, OCS gives every client level 1
        guarded = agent.access_config.policy != "none"
        operator, expert = (2, 3) if guarded else (1, 1)
        agent.register_task("list_failed", self.list_failed)
        agent.register_task("retry_failed", self.retry_failed, min_privs=operator)
        agent.register_task("discard_failed", self.discard_failed, min_privs=expert)
        agent.register_task(
            "backfill", self.backfill, aborter=self._abort_backfill, aborter_blocking=False, min_privs=operator
        )

    @ocs_agent.param("limit", default=100, type=int, check=lambda limit: 0 < limit <= 100)  # type: ignore[untyped-decorator]
    def list_failed(self, session: Any, params: dict[str, Any]) -> tuple[bool, str]:
        """list_failed(limit=100)

        **Task** - List the dead letters, oldest first: registrations whose file could not be registered.

        Parameters:
            limit (int, optional): Largest number of dead letters to list, up to 100. Default is 100.

        Notes:
            The session data contains the dead letters. ``total`` is the number of all dead letters::

                >>> response.session['data']
                {'timestamp': 1700000000.5, 'total': 1,
                 'failed': [{'id': 17, 'received': 1699990000.2, 'sender': '10.0.0.5:45678',
                             'path': '/data/so/timestreams/16999/crate1slot2/1699989000_001.g3',
                             'reason': '...: No such file or directory, given up after 1 h',
                             'refused': False, 'attempts': 68}]}

            A ``refused`` registration can never become a row. The others can be retried with ``retry_failed``.
        """
        total = self._spool.counts["dead"]
        failed = [letter.summary() for letter in self._spool.dead(limit=params["limit"])]
        session.data = {"timestamp": time.time(), "total": total, "failed": failed}
        return True, f"{plural(total, 'dead letter')}, {len(failed)} listed."

    @ocs_agent.param("ids", default=None)  # type: ignore[untyped-decorator]
    def retry_failed(self, session: Any, params: dict[str, Any]) -> tuple[bool, str]:
        """retry_failed(ids=None)

        **Task** - Retry dead letters, as if their registrations had just arrived.

        Parameters:
            ids (list of int, optional): Ids of the dead letters, as listed by ``list_failed``. Default is all.
        """
        return self._change("tried again", self._registrar.retry, params["ids"])

    @ocs_agent.param("ids", default=None)  # type: ignore[untyped-decorator]
    @ocs_agent.param("all", default=False, type=bool)  # type: ignore[untyped-decorator]
    def discard_failed(self, session: Any, params: dict[str, Any]) -> tuple[bool, str]:
        """discard_failed(ids=None, all=False)

        **Task** - Discard dead letters permanently. Their files stay on disk, but will not be copied.

        Either ``ids`` or ``all`` is required. Without them, nothing is discarded.

        Parameters:
            ids (list of int, optional): Ids of the dead letters, as listed by ``list_failed``.
            all (bool, optional): Discard all dead letters. Default is False.
        """
        ids = params["ids"]
        if bool(ids) == params["all"]:
            return (
                False,
                "Discarded nothing. Name the dead letters, e.g. ids=[17], or pass all=True to discard them all.",
            )
        return self._change("discarded", self._spool.discard, None if params["all"] else ids)

    def _change(
        self, what: str, operation: Callable[[list[int] | None], int], ids: list[int] | None
    ) -> tuple[bool, str]:
        if ids is not None and not (isinstance(ids, list) and all(type(id_) is int for id_ in ids)):
            return False, f"ids must be a list of integers, not {ids!r}."
        try:
            changed = operation(ids)
        except SpoolError as error:
            return False, str(error)
        message = f"{plural(changed, 'dead letter')} {what}."
        if unknown := 0 if ids is None else len(set(ids)) - changed:
            message += f" No dead letter has {'this id' if unknown == 1 else f'these {unknown} ids'}."
        self._health.log.log("info", "dead_letters", message, count=changed)
        return not unknown, message

    @ocs_agent.param("root", type=str)  # type: ignore[untyped-decorator]
    @ocs_agent.param("dry_run", default=False, type=bool)  # type: ignore[untyped-decorator]
    def backfill(self, session: Any, params: dict[str, Any]) -> tuple[bool, str]:
        """backfill(root, dry_run=False)

        **Task** - Register the timestream files that have no row, because the agent was down or a datagram was lost.

        Files that changed within the last two minutes are skipped, because the streamer may still be writing them.
        The task can be repeated and aborted at any time. What it has registered until then stays registered.
        Stopping the agent aborts it.

        Parameters:
            root (str): Folder of the timestreams, e.g. ``/data/so/timestreams``.
            dry_run (bool, optional): Only report what would be registered. Default is False.

        Notes:
            The session data shows the progress, and lists the first 20 files without a row::

                >>> response.session['data']
                {'timestamp': 1700000000.5, 'seen': 90000, 'unregistered': 2, 'dry_run': True,
                 'paths': ['/data/so/timestreams/16999/crate1slot2/1699989000_001.g3',
                           '/data/so/timestreams/16999/crate1slot2/1699989000_002.g3']}
        """
        root, dry_run = params["root"], params["dry_run"]

        def show(progress: dict[str, Any]) -> None:
            session.data = {**progress, "dry_run": dry_run}

        aborted = self._aborted.setdefault(session.session_id, threading.Event())
        scan = Scan(root, self._db_path, show, stopped=aborted.is_set)
        errors: list[Exception] = []

        def work() -> None:
            try:
                for path in scan:
                    while self._intake.unwritten > _UNWRITTEN_MAX and not aborted.wait(_POLL_S):
                        pass
                    if not dry_run and not aborted.is_set():
                        self._intake.put(*registration_of(path))
                        self._intake.commit()
            except Exception as error:  # noqa: BLE001 (reported below, as the result of the task)
                errors.append(error)

        # a daemon thread, because a hung disk would otherwise keep the process from ending
        thread = threading.Thread(target=work, name="backfill", daemon=True)
        thread.start()
        while thread.is_alive() and not aborted.is_set():
            thread.join(_POLL_S)
        thread.join(_ABORT_S)
        del self._aborted[session.session_id]
        if errors:
            return False, f"Backfill of {root} failed: {errors[0]}"
        message = f"{plural(scan.seen, 'timestream file')} seen, {scan.unregistered} without a row. "
        if aborted.is_set():
            message += "The backfill was aborted."
        else:
            message += "This was a dry run." if dry_run else "They are being registered."
        self._health.log.log("info", "backfill", f"Backfill: {message}", root=root)
        return not aborted.is_set(), message

    def _abort_backfill(self, session: Any, params: Any = None) -> Deferred[tuple[bool, str]]:
        """Let a backfill end. Runs in the reactor, so it waits for no thread."""
        self._aborted.setdefault(session.session_id, threading.Event()).set()
        if session.status == "running":  # while starting, OCS allows no status but "running"
            session.set_status("stopping")
        return succeed((True, "Aborting the backfill."))
