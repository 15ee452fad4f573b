"""The operations for people: dead letters, and files that were missed. OCS Tasks."""

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

# Bytes that a backfill may have in memory on their way into the spool: they are written before the process ends.
_UNWRITTEN_MAX = 1 << 20

# Seconds between two looks at whether a backfill has ended or has been aborted, and for which an aborted one may go on.
_POLL_S = 0.1
_ABORT_S = 1.0


class Tasks:
    """The agent's Tasks; each runs in a thread of its own.

    Args:
        spool: The spool with the dead letters.
        intake: Takes what is found missing.
        registrar: Tries again.
        health: Says what was done.
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
        # where a site has no access policy, OCS gives everybody level 1 and nobody more
        guarded = agent.access_config.policy != "none"
        agent.register_task("list_failed", self.list_failed)
        agent.register_task("retry_failed", self.retry_failed, min_privs=2 if guarded else 1)
        agent.register_task("discard_failed", self.discard_failed, min_privs=3 if guarded else 1)
        agent.register_task(
            "backfill",
            self.backfill,
            aborter=self._abort_backfill,
            aborter_blocking=False,
            min_privs=2 if guarded else 1,
        )

    @ocs_agent.param("limit", default=100, type=int, check=lambda limit: 0 < limit <= 100)  # type: ignore[untyped-decorator]
    def list_failed(self, session: Any, params: dict[str, Any]) -> tuple[bool, str]:
        """list_failed(limit=100)

        **Task** - List the dead letters: registrations whose file could not be registered, oldest first.

        Parameters:
            limit (int, optional): How many to list at the most, up to 100. Default is 100.

        Notes:
            The session data holds them, with ``total`` the number of all there are::

                >>> response.session['data']
                {'timestamp': 1700000000.5, 'total': 1,
                 'failed': [{'id': 17, 'received': 1699990000.2, 'sender': '10.0.0.5:45678',
                             'path': '/data/so/timestreams/16999/crate1slot2/1699989000_001.g3',
                             'reason': '...: No such file or directory, given up after 1 h',
                             'refused': False, 'attempts': 68}]}

            ``refused`` ones can never become a row as they are; the others may be tried again (`retry_failed`).
        """
        total = self._spool.counts["dead"]
        failed = [letter.summary() for letter in self._spool.dead(limit=params["limit"])]
        session.data = {"timestamp": time.time(), "total": total, "failed": failed}
        return True, f"{total} dead letters, {len(failed)} listed."

    @ocs_agent.param("ids", default=None)  # type: ignore[untyped-decorator]
    def retry_failed(self, session: Any, params: dict[str, Any]) -> tuple[bool, str]:
        """retry_failed(ids=None)

        **Task** - Try dead letters again, as if they had just arrived.

        Parameters:
            ids (list of int, optional): Which ones, by the ids of `list_failed`. Default is all.
        """
        return self._revise("tried again", self._registrar.retry, params["ids"])

    @ocs_agent.param("ids", default=None)  # type: ignore[untyped-decorator]
    @ocs_agent.param("all", default=False, type=bool)  # type: ignore[untyped-decorator]
    def discard_failed(self, session: Any, params: dict[str, Any]) -> tuple[bool, str]:
        """discard_failed(ids=None, all=False)

        **Task** - Forget dead letters for good. Their files stay where they are, and nobody will copy them.

        It needs either ``ids`` or ``all``. Without them it discards nothing.

        Parameters:
            ids (list of int, optional): Which ones, by the ids of `list_failed`.
            all (bool, optional): Discard all of them. Default is False.
        """
        ids = params["ids"]
        if bool(ids) == params["all"]:
            return (
                False,
                "Discarded nothing. Name the dead letters, e.g. ids=[17], or pass all=True to discard them all.",
            )
        return self._revise("discarded", self._spool.discard, None if params["all"] else ids)

    def _revise(
        self, what: str, operation: Callable[[list[int] | None], int], ids: list[int] | None
    ) -> tuple[bool, str]:
        if ids is not None and not (isinstance(ids, list) and all(type(id_) is int for id_ in ids)):
            return False, f"ids is to be a list of whole numbers, not {ids!r}."
        try:
            changed = operation(ids)
        except SpoolError as error:
            return False, str(error)
        missing = 0 if ids is None else len(set(ids)) - changed
        message = f"{changed} dead letters {what}" + (f", {missing} ids are no dead letters." if missing else ".")
        self._health.log.log("info", "dead_letters", message, count=changed)
        return not missing, message

    @ocs_agent.param("root", type=str)  # type: ignore[untyped-decorator]
    @ocs_agent.param("dry_run", default=False, type=bool)  # type: ignore[untyped-decorator]
    def backfill(self, session: Any, params: dict[str, Any]) -> tuple[bool, str]:
        """backfill(root, dry_run=False)

        **Task** - Register timestream files that no row names: the agent was down, or a datagram was lost.

        Files that changed within the last two minutes are left alone, since the streamer may still write them.
        It may be repeated at any time, and aborted: what it has registered until then stays registered. A stop of the
        agent aborts it.

        Parameters:
            root (str): Folder of the timestreams, e.g. ``/data/so/timestreams``.
            dry_run (bool, optional): Only say what would be registered. Default is False.

        Notes:
            The session data tells of the progress, and lists the first 20 files that no row names::

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
            except Exception as error:  # noqa: BLE001 (it is told below, where the Task ends)
                errors.append(error)

        # a thread that nobody waits for, since a disk that hangs would otherwise keep the process from ending
        thread = threading.Thread(target=work, name="backfill", daemon=True)
        thread.start()
        while thread.is_alive() and not aborted.is_set():
            thread.join(_POLL_S)
        thread.join(_ABORT_S)
        del self._aborted[session.session_id]
        found = f"{scan.seen} timestream files seen, {scan.unregistered}"
        if errors:
            return False, f"backfill of {root}: {errors[0]}"
        if aborted.is_set():
            succeeded, message = False, f"aborted: {found} of them in no row."
        else:
            succeeded, message = True, f"{found} {'would be' if dry_run else 'are being'} registered."
        self._health.log.log("info", "backfill", f"backfill: {message}", root=root)
        return succeeded, message

    def _abort_backfill(self, session: Any, params: Any = None) -> Deferred[tuple[bool, str]]:
        """Let a backfill end. Runs in the reactor, so that it waits for no thread."""
        self._aborted.setdefault(session.session_id, threading.Event()).set()
        if session.status == "running":  # before that OCS allows no other status than this
            session.set_status("stopping")
        return succeed((True, "Aborting the backfill."))
