"""The agent's operating system process: its log, its periodic work, and an end that nothing can hold up."""

from __future__ import annotations

import atexit
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import txaio
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import LoopingCall

from socs_monitor.health.health import Health
from socs_monitor.health.logpipe import LogPipe
from socs_monitor.spool.intake import Intake

LOG_LEVEL = os.environ.get("LOGLEVEL", "info")  # as in every OCS agent

# Seconds that operations may take to stop at the end of the process.
_END_S = 3.0

# Seconds after which the process ends itself if a system call hangs. Docker kills it after 10 s.
_WATCHDOG_S = 5.0


def start_log() -> LogPipe | None:
    """Start logging to standard output, if there is one."""
    log = None
    if sys.stdout is not None:
        sys.stdout.flush()
        log = LogPipe(sys.stdout.fileno())
        atexit.register(log.close)
    txaio.start_logging(out=log, level=LOG_LEVEL)  # type: ignore[attr-defined]
    return log


def repeat(seconds: float, work: Callable[[], None], health: Health) -> None:
    """Call `work` at regular intervals in the reactor, even after it failed."""

    def guarded() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 (Twisted would stop calling it, and nobody would notice)
            text = f"Unexpected error: {error!r}. Please report it"
            health.log.log_throttled("error", "internal_error", text, traceback=traceback.format_exc())

    LoopingCall(guarded).start(seconds)


def end_sessions(agent: Any) -> Deferred[Any]:
    """Stop all operations of an OCSAgent and wait until they have ended, at most `_END_S` seconds.

    Used at the end of the process instead of OCS's own method, which always waits three seconds, and is called twice.
    """
    running = [session for session in agent.sessions.values() if session is not None and session.status != "done"]
    for session in running:
        if session.status != "stopping":
            (agent.stop if session.op_name in agent.processes else agent.abort)(session.op_name, password=agent)
    return DeferredList([agent.wait(session.op_name, timeout=_END_S) for session in running])


def watch_shutdown(intake: Intake, health: Health, log: LogPipe | None) -> None:
    """End the process if a hung disk keeps it from ending, once no registrations are being written any more."""
    seconds = _WATCHDOG_S
    while True:
        written = intake.written
        time.sleep(seconds)
        if intake.written == written:
            break
        seconds = 1.0
    intake.log_unwritten()
    text = "The agent did not stop in time because a disk hangs. It was ended. Registrations in the spool are safe"
    health.log.log("error", "internal_error", text)
    if log is not None:
        log.close()
    os._exit(1)
