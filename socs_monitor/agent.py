"""The OCS agent: the documented class, its options and its wiring. What it does is in the modules below it.

The way of a datagram: `PysmurfMonitor.datagramReceived` (reactor) -> `messages.parse` -> either `Feeds`, or
`Intake.put` -> spool -> ``file_queue`` -> `Registrar` (the process ``run``) -> SupRsync database.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import gc
import ipaddress
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import txaio
from ocs import ocs_agent
from twisted.internet import reactor as _reactor
from twisted.internet import threads
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import DatagramProtocol
from twisted.internet.task import LoopingCall

from socs_monitor.completeness.caretaker import Caretaker
from socs_monitor.feeds.forwarding import Feeds
from socs_monitor.feeds.statistics import INTERVAL_S, StatsFeed
from socs_monitor.health.health import Health
from socs_monitor.health.logpipe import LogPipe
from socs_monitor.registration.registrar import Registrar
from socs_monitor.registration.workers import start_thread
from socs_monitor.report import Report
from socs_monitor.settings import Network, Settings, make_parser, parse_args
from socs_monitor.spool.file import SpoolError
from socs_monitor.spool.intake import FileQueue, Intake
from socs_monitor.spool.records import Incoming
from socs_monitor.spool.store import Spool
from socs_monitor.suprsync.archive import create_remote_path
from socs_monitor.suprsync.database import Database
from socs_monitor.tasks import Tasks
from socs_monitor.wire import messages
from socs_monitor.wire.messages import DataFile, G3File, MessageError, Metadata, SessionMessage
from socs_monitor.wire.receiver import Receiver
from socs_monitor.wire.sequences import Sequences

__all__ = ["PysmurfMonitor", "create_remote_path", "main", "make_parser"]

reactor: Any = _reactor  # a module to the type checker, the reactor's interfaces in truth

_LOG_LEVEL = os.environ.get("LOGLEVEL", "info")  # as for all agents

# Seconds between two updates of session.data.
_SHOW_INTERVAL_S = 1.0

# Seconds after which `run` goes on when it met an error that nobody foresaw.
_RESTART_S = 5.0

# Seconds that operations may take to stop at the end of the process.
_END_S = 3.0

# Seconds after which the process ends itself if something hangs in a system call; Docker kills it after 10 s.
_WATCHDOG_S = 5.0


class PysmurfMonitor(DatagramProtocol):
    """Monitor for pysmurf UDP publisher.

    This agent should be run on the smurf-server and will monitor messages published via the pysmurf Publisher.

    Main functions are making sure registered files make their way to the SupRsync database, and passing session
    info to pysmurf-controller agents via the ``pysmurf_session_data`` feed.

    Args:
        agent (ocs.ocs_agent.OCSAgent): OCSAgent object.
        args (argparse.Namespace): Namespace with site_config and agent specific arguments; of the latter only
            the documented ones need to be there.

    Attributes:
        agent (ocs.ocs_agent.OCSAgent): OCSAgent object.
        log (txaio.tx.Logger): txaio logger object created by agent.
        file_queue (queue.Queue): Queue containing metadata for registered files: for each a dict, the payload's scalars
            and the publisher's id as ``pub_id``. What is on it is in the spool, too.
        db_path (str): Path to the suprsync database where files should be entered.
        running (bool): True if the main process is running.
        echo_sql (bool): If True, will echo all sql statements whenever writing to the suprsync db.
    """

    def __init__(self, agent: Any, args: argparse.Namespace) -> None:
        self.agent = agent
        self.log = agent.log
        self.file_queue = FileQueue()
        self._settings = settings = Settings.from_args(args)
        self.db_path = settings.db_path
        self.running = False
        self.echo_sql = settings.echo_sql
        self._session: Any = None
        self._ended: Any = None  # the session of the run that ended last
        self._ending = threading.Lock()
        self._receiver: Receiver | None = None
        self._health = Health(self._say)
        self._sequences = Sequences()
        self._feeds = Feeds(agent, self._health)
        self._is_allowed = _membership(settings.allow_sender)

    # The spool is opened when it is first needed, so that a monitor made by hand touches no disk before.

    @functools.cached_property
    def _spool(self) -> Spool:
        settings = self._settings
        return Spool(settings.spool_path, self._health.log.reporter("warn", "spool"), settings.spool_size)

    @functools.cached_property
    def _intake(self) -> Intake:
        return Intake(self._spool, self.file_queue, self._health)

    def _database(self, create_table: bool) -> Database:
        report = self._health.log.reporter("warn", "database")
        return Database(self.db_path, create_table=create_table, echo=self.echo_sql, report=report)

    def _make_caretaker(self) -> Caretaker:
        return Caretaker(self._database(False), self._registrar.hash_file, self._health)

    @functools.cached_property
    def _registrar(self) -> Registrar:
        database = self._database(self._settings.create_table)
        debug = self._debug if _LOG_LEVEL in ("debug", "trace") else None
        policy = self._settings.policy
        return Registrar(self._intake, self.file_queue, self._spool, database, self._health, policy, debug)

    @functools.cached_property
    def _report(self) -> Report:
        return Report(self._health, self._sequences, self._spool, self._intake)

    def start(self, log: LogPipe | None) -> None:
        """Open the spool, bind the port, and have all that needs the reactor done by it from now on.

        Args:
            log: Where the log goes; None if there is no standard output.

        Raises:
            SpoolError: If the spool cannot be opened, or another process has it.
            twisted.internet.error.CannotListenError: If the port cannot be bound.
        """
        self._intake.start()
        self._report.log = log
        Tasks(self._spool, self._intake, self._registrar, self._health, self.db_path).register(self.agent)
        self._receiver = self._report.receiver = self._listen()
        self._feeds.start(reactor)
        stats_feed = StatsFeed(self.agent, self._report.data, self._health.counters.streams.files)
        self._each(_SHOW_INTERVAL_S, self._look)
        self._each(INTERVAL_S, stats_feed.publish)
        reactor.addSystemEventTrigger("before", "shutdown", lambda: start_thread(self._watch_shutdown, "watchdog"))
        # OCS leaves the router in another trigger, so what is published here is on the wire before
        reactor.addSystemEventTrigger("before", "shutdown", self._feeds.flush)
        reactor.addSystemEventTrigger("before", "shutdown", stats_feed.publish)
        # without a router OCS stops no session, and the reactor would wait for the thread of `run`, for ever where
        # that is just starting: it would wait for the reactor
        reactor.addSystemEventTrigger("before", "shutdown", functools.partial(_end_sessions, self.agent))
        reactor.addSystemEventTrigger("after", "shutdown", self._receiver.drain)
        reactor.addSystemEventTrigger("after", "shutdown", self._intake.close)

    def _listen(self) -> Receiver:
        settings = self._settings
        receiver = Receiver(
            settings.udp_port,
            self,
            settings.udp_host,
            reactor,
            buffer=settings.udp_buffer,
            report=self._health.log.log_throttled,
            after_read=self._intake.commit,
        )
        receiver.startListening()
        if receiver.buffer < settings.udp_buffer:
            text = f"the kernel grants a receive buffer of {receiver.buffer} bytes instead of {settings.udp_buffer}"
            advice = f"On the host: sysctl -w net.core.rmem_max={settings.udp_buffer}"
            self._health.log.log("warn", "socket", f"{text}: a burst may be lost. {advice}", buffer=receiver.buffer)
        if not settings.policy.data_roots:
            self._health.log.log(
                "warn",
                "configuration",
                "no --data-root: any file that a sender names is registered, and SupRsync may delete it. Name the"
                " folders in which files are written, e.g. --data-root /data",
            )
        return receiver

    def datagramReceived(self, _data: bytes | str, addr: tuple[str, int]) -> None:
        """Take one datagram. Called whenever UDP data is received.

        Args:
            _data (bytes or str): Raw data passed over the UDP port. The pysmurf publisher sends a JSON string.
            addr (tuple): (host, port) of the sender.
        """
        health = self._health
        health.counters.bytes += len(_data)
        if not self._is_allowed(addr[0]):
            health.count_malformed("sender not allowed", addr[0])
            return
        try:
            message = messages.parse(_data)
        except MessageError as error:
            health.count_malformed(error.reason, addr[0])
            self._sequences.seen(addr, messages.envelope_of(_data))  # it did arrive
            return
        self._sequences.seen(addr, message.envelope)
        kind = message.envelope["type"]
        health.counters.datagrams[kind if kind in messages.TYPES else "other"] += 1
        if isinstance(message, (DataFile, G3File)):
            self._intake.put(message.meta, Incoming(time.time(), f"{addr[0]}:{addr[1]}", message.text))
        elif self._intake.overloaded:
            health.counters.unpublished["overload"] += 1
        elif isinstance(message, (SessionMessage, Metadata)):
            if not self._feeds.has_room(len(_data)):
                health.counters.unpublished["overload"] += 1
            elif isinstance(message, SessionMessage):
                self._feeds.session(message, _data if isinstance(_data, bytes) else _data.encode())
            else:
                self._feeds.metadata(message)

    @ocs_agent.param("test_mode", default=False, type=bool)  # type: ignore[untyped-decorator]
    def run(self, session: Any, params: dict[str, Any] | None = None) -> tuple[bool, str]:
        """run(test_mode=False)

        **Process** - Main process for the pysmurf monitor agent. Processes files that have been added to the
        queue, adding them to the suprsync database.

        Files are picked up as they come. While the database cannot be written, the process stays up, is
        degraded, and goes on by itself; files that arrive meanwhile wait in the spool, also when the process is
        stopped.

        Parameters:
            test_mode (bool, optional): Stop the Process loop after processing any file(s). This is meant only
                for testing. Default is False.

        Notes:
            The session data is updated every second, and at the end. Counters begin at the agent's start, times
            are unix times, None where there was nothing yet::

                >>> response.session['data']
                {'timestamp': 1700000000.5,
                 'degraded': {},
                 'datagrams': {'total': 1042, 'bytes': 331811,
                               'by_type': {'metadata': 992, 'data_file': 30, 'g3_file': 20}},
                 'malformed': {'not JSON': 2},
                 'refused': {},
                 'unpublished': {},
                 'lost': {'gaps': 3, 'kernel': 0, 'reordered': 0,
                          'senders': [{'sender': '10.0.0.1:40000', 'id': 'crate1slot2',
                                       'script': 'undeclared', 'lost': 3, 'last': 1700000000.1}]},
                 'socket': {'buffer_asked': 33554432, 'buffer': 33554432, 'rebinds': 0, 'listening': True},
                 'files': {'received': 50, 'registered': 49, 'pending': 0, 'waiting': 1, 'dead': 0,
                           'discarded': 0, 'settling': 3,
                           'last': '/data/so/timestreams/17000/crate1slot2/1700000000_002.g3',
                           'last_time': 1700000000.2},
                 'queue': {'depth': 0, 'oldest': 0.0},
                 'log': {'dropped': 0},
                 'database': {'write': 0.003, 'write_max': 0.02, 'errors': 0, 'corrected': 0,
                              'row_without_file': 0},
                 'spool': {'bytes': 12345, 'max_bytes': 1073741824},
                 'streams': {'crate1slot2': {'files_today': 12, 'last_file': 1700000000.1,
                                             'last_metadata': 1700000000.4}},
                 'problems': [{'time': 1700000000.1, 'text': '3 messages of ...'}]}

            ``degraded`` maps each condition under which files do not get through to its reason: what happened,
            what it means, what to do. The conditions are ``database``, ``spool``, ``registrations_rejected``,
            ``spool_update``, ``spool_sync``, ``spool_size`` (nearly full), ``backlog`` (a file waits for its row
            for more than a minute), ``file_missing`` (a file was missing for too long; for an hour),
            ``messages_lost`` and ``kernel_drops`` (for five minutes), ``disk_hangs`` (files on it wait),
            ``socket`` and ``internal_error``. Each ends by itself.

            ``malformed`` are datagrams that were no message, ``refused`` registrations that could not even be
            kept, ``unpublished`` messages that reached no feed, each by reason. ``lost`` are messages that never
            came: ``gaps`` are missing by their senders' sequence numbers, those of the latest ten ``senders`` by
            themselves, and ``kernel`` are datagrams that this host's kernel dropped, most of which are gaps, too.
            ``reordered`` ones came late, and are no loss.

            Of the ``files``, ``received`` always equals ``registered`` + ``pending`` + ``waiting`` + ``dead`` +
            ``discarded``; ``settling`` are registered ones whose file is yet to be looked at once more. The
            ``queue`` holds the pending ones; its ``oldest`` is an age in seconds. ``database`` tells the seconds
            that the last commit took, and the longest of the last minute; ``corrected`` counts rows that SupRsync
            could not finish and that were given the present content of their files, ``row_without_file`` is the
            number of rows that it can never finish because their files are gone. ``log`` counts the lines of the
            log that were dropped, because nobody read the agent's standard output. ``streams`` are the latest 50,
            with the files of this day (UTC), and ``problems`` the latest 20.
        """
        once = bool((params or {}).get("test_mode")) or self._settings.test_mode
        self._session = session
        self.running = True
        self._health.conditions.forget("database", "spool_update", "internal_error")  # their state is unknown now
        self._show()
        try:
            if once:
                self._take_all()
                self._registrar.run(once=True)
            else:
                caretaker = self._make_caretaker()
                caretaker.start()
                try:
                    self._run_for_ever()
                finally:
                    caretaker.stop()
        finally:
            with self._ending:
                self._ended = session
                self.running = False
                self._registrar.resume()
            self._health.log.flush(everything=True)
            self._show()
            if once and self._receiver is None:
                self._close_spool()
        return True, "Monitor exited cleanly."

    def _close_spool(self) -> None:
        """Let go of the spool, as nobody else does for a monitor made by hand; it is opened again when it is needed."""
        self._intake.close()
        for part in ("_spool", "_intake", "_registrar", "_report"):
            self.__dict__.pop(part, None)

    def _run_for_ever(self) -> None:
        while self.running:
            try:
                self._registrar.run()
                return
            except Exception as error:  # noqa: BLE001 (nobody is there at night to start the process again)
                reason = f"unforeseen error {error!r}, going on in {_RESTART_S:.0f} s; please report it"
                self._health.conditions.set_condition("internal_error", reason, traceback=traceback.format_exc())
                self._registrar.sleep(_RESTART_S)
                self._health.conditions.clear_condition("internal_error", "going on after an unforeseen error")

    def _take_all(self) -> None:
        """Have everything that was sent so far on the queue, also what the kernel still holds."""
        if self._receiver is not None:
            threads.blockingCallFromThread(reactor, self._receiver.drain)
        self._intake.flush()

    def _stop(self, session: Any, params: Any = None) -> tuple[bool, str]:
        """Stop the process ``run``; what is not done stays in the spool."""
        with self._ending:
            if session is not self._ended:  # a stop that comes too late is not for the next run
                self.running = False
                self._registrar.stop()
        if session.status != "starting":  # OCS is yet to say that it is running, and allows no way back
            session.set_status("stopping")
        return True, "Done monitoring."

    def _watch_shutdown(self) -> None:
        """End the process if a hung disk keeps it from ending, but not while registrations are still being written."""
        seconds = _WATCHDOG_S
        while True:
            written = self._intake.written
            time.sleep(seconds)
            if self._intake.written == written:
                break
            seconds = 1.0
        self._intake.log_unwritten()
        text = "The agent did not stop in time, because a disk hangs. It was ended. Registrations in the spool are safe"
        self._health.log.log("error", "internal_error", text)
        if self._report.log is not None:
            self._report.log.close()
        os._exit(1)

    def _each(self, seconds: float, work: Callable[[], None]) -> None:
        """Do something now and again, also when it failed once."""

        def guarded() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 (Twisted would not call it again, and nobody would notice)
                text = f"unforeseen error {error!r}; please report it"
                self._health.log.log_throttled("error", "internal_error", text, traceback=traceback.format_exc())

        LoopingCall(guarded).start(seconds)

    def _look(self) -> None:
        self._report.look()
        self._show()

    def _show(self) -> None:
        if self._session is not None:
            self._session.data = self._report.data()
            self._session.degraded = bool(self._health.conditions)

    def _say(self, level: str, text: str) -> None:
        getattr(self.log, level)("{text}", text=text)

    def _debug(self, text: str) -> None:
        self.log.debug("{text}", text=text)


def _membership(networks: Sequence[Network]) -> Callable[[str], bool]:
    """Return whether an address is in one of `networks`; any is where there are none."""
    if not networks:
        return lambda _: True

    @functools.lru_cache(maxsize=4096)
    def is_member(host: str) -> bool:
        address = ipaddress.ip_address(host)
        address = getattr(address, "ipv4_mapped", None) or address  # as a socket for both kinds sees IPv4
        return any(address in network for network in networks)

    return is_member


def _end_sessions(agent: Any) -> Deferred[Any]:
    """Stop what runs and wait until it has ended, at most `_END_S` seconds.

    Stands in for OCS's own method, which waits three seconds in any case, and that twice.
    """
    running = [session for session in agent.sessions.values() if session is not None and session.status != "done"]
    for session in running:
        if session.status != "stopping":
            (agent.stop if session.op_name in agent.processes else agent.abort)(session.op_name, password=agent)
    return DeferredList([agent.wait(session.op_name, timeout=_END_S) for session in running])


def _begin_log() -> LogPipe | None:
    """Begin the log on the standard output, if there is one."""
    log = None
    if sys.stdout is not None:
        sys.stdout.flush()
        log = LogPipe(sys.stdout.fileno())
        atexit.register(log.close)
    txaio.start_logging(out=log, level=_LOG_LEVEL)  # type: ignore[attr-defined]
    return log


def main(args: list[str] | None = None) -> None:
    """Run the agent: the entry point for ``ocs-agent-cli`` and for ``python3 socs_monitor/agent.py``."""
    reactor.seconds = time.monotonic  # Twisted's timers follow the wall clock, and stand still when that is set back
    # until the reactor has its own handler; an exception here would be taken for one of what is just going on
    signal.signal(signal.SIGTERM, lambda *_: reactor.callWhenRunning(reactor.stop))
    parsed = parse_args(args)  # before the log takes over, so that --help and errors look like any command's
    log = _begin_log()
    agent, runner = ocs_agent.init_site_agent(parsed)
    agent._stop_all_running_sessions = functools.partial(_end_sessions, agent)
    monitor = PysmurfMonitor(agent, parsed)
    agent.register_process("run", monitor.run, monitor._stop)
    try:
        monitor.start(log)
    except (SpoolError, CannotListenError) as error:
        raise SystemExit(f"PysmurfMonitor cannot start: {error}") from error
    # what is there by now stays, and looking through it again and again would be a tenth of what a file costs
    gc.collect()
    gc.freeze()
    if not parsed.test_mode:
        # not OCS's start-up, which waits for the router: files are registered without one
        reactor.callWhenRunning(agent.start, "run", {}, password=agent)
    runner.run(agent, auto_reconnect=True)


if __name__ == "__main__":
    main()
