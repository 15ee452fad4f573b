"""The OCS agent: the documented class, and how it is wired to OCS and the reactor.

The path of a datagram: `PysmurfMonitor.datagramReceived` (reactor) parses it into a message. `Feeds` publishes session
messages and metadata. `Intake.put` takes registrations: they go to the spool, then to ``file_queue``, from which
`Registrar` (the process ``run``) registers them in the SupRsync database.
"""

from __future__ import annotations

import argparse
import functools
import gc
import signal
import threading
import time
import traceback
from typing import Any

from ocs import ocs_agent
from twisted.internet import reactor as _reactor
from twisted.internet import threads
from twisted.internet.defer import succeed
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import DatagramProtocol

from socs_monitor.completeness.caretaker import Caretaker
from socs_monitor.feeds.forwarding import Feeds
from socs_monitor.feeds.statistics import INTERVAL_S, StatsFeed
from socs_monitor.health.health import Health
from socs_monitor.health.logpipe import LogPipe
from socs_monitor.process import LOG_LEVEL, end_sessions, repeat, start_log, watch_shutdown
from socs_monitor.registration.registrar import Registrar
from socs_monitor.registration.workers import start_thread
from socs_monitor.report import Report
from socs_monitor.settings import Settings, make_parser, parse_args, sender_filter
from socs_monitor.spool.file import SpoolError
from socs_monitor.spool.intake import FileQueue, Intake
from socs_monitor.spool.records import Incoming
from socs_monitor.spool.store import Spool
from socs_monitor.suprsync.archive import create_remote_path
from socs_monitor.suprsync.database import Database
from socs_monitor.tasks import Tasks
from socs_monitor.wire import messages
from socs_monitor.wire.messages import FileMessage, MessageError, Metadata, SessionMessage
from socs_monitor.wire.receiver import Receiver
from socs_monitor.wire.sequences import Sequences

__all__ = ["PysmurfMonitor", "create_remote_path", "main", "make_parser"]

reactor: Any = _reactor  # a module to the type checker

# Seconds between two updates of session.data.
_UPDATE_S = 1.0

# Seconds after which `run` continues after an unexpected error.
_RESTART_S = 5.0


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
        self._health = Health(self._write_log)
        self._sequences = Sequences()
        self._feeds = Feeds(agent, self._health)
        self._is_allowed = sender_filter(settings.allow_sender)

    # The spool is opened when it is first needed: constructing a monitor by hand does not touch the disk.

    @functools.cached_property
    def _spool(self) -> Spool:
        settings = self._settings
        return Spool(settings.spool_path, self._health.log.reporter("warn", "spool"), settings.spool_size)

    @functools.cached_property
    def _intake(self) -> Intake:
        return Intake(self._spool, self.file_queue, self._health)

    @functools.cached_property
    def _registrar(self) -> Registrar:
        database = self._database(self._settings.create_table)
        debug = functools.partial(self._write_log, "debug") if LOG_LEVEL in ("debug", "trace") else None
        policy = self._settings.policy
        return Registrar(self._intake, self.file_queue, self._spool, database, self._health, policy, debug)

    @functools.cached_property
    def _report(self) -> Report:
        return Report(self._health, self._sequences, self._spool, self._intake)

    def _database(self, create_table: bool) -> Database:
        report = self._health.log.reporter("warn", "database")
        return Database(self.db_path, create_table=create_table, echo=self.echo_sql, report=report)

    def start(self, log: LogPipe | None) -> None:
        """Open the spool, bind the port, and start everything that runs in the reactor.

        Args:
            log: Where the log goes; None if there is no standard output.

        Raises:
            SpoolError: If the spool cannot be opened, or another process uses it.
            twisted.internet.error.CannotListenError: If the port cannot be bound.
        """
        self._intake.start()
        self._report.log = log
        Tasks(self._spool, self._intake, self._registrar, self._health, self.db_path).register(self.agent)
        self._receiver = self._report.receiver = self._listen()
        self._feeds.start(reactor)
        stats_feed = StatsFeed(self.agent, self._report.data, self._health.counters.streams.files)
        repeat(_UPDATE_S, self._update, self._health)
        repeat(INTERVAL_S, stats_feed.publish, self._health)
        watch = functools.partial(watch_shutdown, self._intake, self._health, log)
        for phase, work in (
            ("before", functools.partial(start_thread, watch, "watchdog")),
            # OCS leaves the router in a later trigger, so these messages are still sent
            ("before", self._feeds.flush),
            ("before", stats_feed.publish),
            # without a router OCS stops no session: the reactor would wait for the thread of `run`, and forever if
            # that is just starting, because it then waits for the reactor
            ("before", functools.partial(end_sessions, self.agent)),
            ("after", self._receiver.drain),
            ("after", self._intake.close),
        ):
            reactor.addSystemEventTrigger(phase, "shutdown", work)

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
            text = (
                f"The kernel granted a receive buffer of {receiver.buffer} instead of {settings.udp_buffer} bytes."
                " Messages may be lost in a burst. Allow a larger buffer on the host and restart the agent."
                f" Run: sysctl -w net.core.rmem_max={settings.udp_buffer}"
            )
            self._health.log.log("warn", "socket", text, buffer=receiver.buffer)
        if not settings.policy.data_roots:
            text = (
                "There is no --data-root. Any file that a sender names is registered, and SupRsync may delete it. Name"
                " the folders in which files are written, e.g. --data-root /data"
            )
            self._health.log.log("warn", "configuration", text)
        return receiver

    def datagramReceived(self, _data: bytes | str, addr: tuple[str, int]) -> None:
        """Process one datagram. Called whenever UDP data is received.

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
            self._sequences.seen(addr, error.envelope)  # malformed, but not lost
            return
        self._sequences.seen(addr, message.envelope)
        kind = message.envelope["type"]
        health.counters.datagrams[kind if kind in messages.TYPES else "other"] += 1
        if isinstance(message, FileMessage):
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

        Files are processed as soon as they are announced. If the database cannot be written, the process keeps
        running, reports itself as degraded and retries until it succeeds. Files that are announced meanwhile, or
        while the process is stopped, wait in the spool.

        Parameters:
            test_mode (bool, optional): Stop the Process loop after processing any file(s). This is meant only
                for testing. Default is False.

        Notes:
            The session data is updated every second and when the process ends. Counters start at 0 with the agent.
            Times are unix times, or None if the event has not happened yet::

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
                 'problems': [{'time': 1700000000.1, 'text': 'Lost 3 messages from ...'}]}

            ``degraded`` maps each condition that holds to its reason: what happened, what it means and what to do.
            The conditions are ``database``, ``spool``, ``registrations_rejected``, ``spool_update``,
            ``spool_sync``, ``spool_size`` (the spool is nearly full), ``backlog`` (a registration has waited for
            its row for over a minute), ``file_missing`` (a file was missing for too long; holds for an hour),
            ``messages_lost`` and ``kernel_drops`` (each holds for five minutes), ``disk_hangs`` (files on that
            disk wait), ``socket`` and ``internal_error``. Every condition ends by itself.

            These count by reason: ``malformed`` the datagrams that were not messages, ``refused`` the
            registrations that could not even be stored, ``unpublished`` the messages that were not published on
            a feed. ``lost`` counts messages that did not arrive: ``gaps`` by their senders' sequence numbers, with
            the ten ``senders`` that lost messages most recently, and ``kernel`` the datagrams that this host's
            kernel dropped, most of which are gaps, too. ``reordered`` messages arrived late and are not lost.

            In ``files``, ``received`` always equals ``registered`` + ``pending`` + ``waiting`` + ``dead`` +
            ``discarded``. ``settling`` counts the registered files that are still to be re-checked. ``queue`` is
            about the pending files; ``oldest`` is an age in seconds. In ``database``, ``write`` is the duration of
            the last commit and ``write_max`` the longest of the last minute, in seconds; ``corrected`` counts the
            rows that SupRsync could not finish and that were given the present content of their file, and
            ``row_without_file`` is the number of rows that it can never finish because their file is missing.
            ``log`` counts the lines that were dropped because nobody read the agent's standard output.
            ``streams`` lists the latest 50 streams with the files of the current UTC day, and ``problems`` the
            latest 20 problems.
        """
        once = bool((params or {}).get("test_mode")) or self._settings.test_mode
        self._session = session
        self.running = True
        self._health.conditions.forget("database", "spool_update", "internal_error")  # unknown until `run` works
        self._update_session()
        try:
            if once:
                if self._receiver is not None:  # the kernel may still hold datagrams
                    threads.blockingCallFromThread(reactor, self._receiver.drain)
                self._intake.flush()
                self._registrar.run(once=True)
            else:
                caretaker = Caretaker(self._database(False), self._registrar.hash_file, self._health)
                caretaker.start()
                try:
                    self._run_until_stopped()
                finally:
                    caretaker.stop()
        finally:
            with self._ending:
                self._ended = session
                self.running = False
                self._registrar.resume()
            self._health.log.flush(everything=True)
            self._update_session()
            if once and self._receiver is None:
                self._close_spool()
        return True, "Monitor exited cleanly."

    def _close_spool(self) -> None:
        """Close the spool of a monitor constructed by hand, which nobody else does. It is opened again when needed."""
        self._intake.close()
        for part in ("_spool", "_intake", "_registrar", "_report"):
            self.__dict__.pop(part, None)

    def _run_until_stopped(self) -> None:
        while self.running:
            try:
                self._registrar.run()
                return
            except Exception as error:  # noqa: BLE001 (nobody would restart the process at night)
                reason = (
                    f"Unexpected error in run: {error!r}. No file is registered until it continues, in {_RESTART_S:.0f}"
                    " s. Please report it with the traceback from the log"
                )
                self._health.conditions.set_condition("internal_error", reason, traceback=traceback.format_exc())
                self._registrar.sleep(_RESTART_S)
                self._health.conditions.clear_condition("internal_error", "run continues after an unexpected error")

    def _stop(self, session: Any, params: Any = None) -> tuple[bool, str]:
        """Stop the process ``run``. Unfinished registrations stay in the spool."""
        with self._ending:
            if session is not self._ended:  # a stop that comes too late must not stop the next run
                self.running = False
                self._registrar.stop()
        if session.status != "starting":  # while starting, OCS allows no status but "running"
            session.set_status("stopping")
        return True, "Done monitoring."

    def _update(self) -> None:
        self._report.update()
        self._update_session()

    def _update_session(self) -> None:
        if self._session is not None:
            self._session.data = self._report.data()
            self._session.degraded = bool(self._health.conditions)

    def _write_log(self, level: str, line: str) -> None:
        getattr(self.log, level)("{line}", line=line)


def main(args: list[str] | None = None) -> None:
    """Run the agent: the entry point for ``ocs-agent-cli`` and for ``python3 socs_monitor/agent.py``."""
    reactor.seconds = time.monotonic  # Twisted's timers follow the wall clock, and stop while it is set back
    # until the reactor installs its own handler; an exception could be caught by whatever is just running
    signal.signal(signal.SIGTERM, lambda *_: reactor.callWhenRunning(reactor.stop))
    parsed = parse_args(args)  # before logging starts, so that --help and errors look like any command's
    log = start_log()
    agent, runner = ocs_agent.init_site_agent(parsed)
    # OCS would stop `run` for good if the router refuses the agent, e.g. because it still knows an earlier process.
    agent._stop_all_running_sessions = lambda: succeed(None)
    monitor = PysmurfMonitor(agent, parsed)
    agent.register_process("run", monitor.run, monitor._stop)
    try:
        monitor.start(log)
    except (SpoolError, CannotListenError) as error:
        raise SystemExit(f"PysmurfMonitor cannot start: {error}") from error
    # what exists now stays; not scanning it again and again saves 10 % of the cost of a file
    gc.collect()
    gc.freeze()
    if not parsed.test_mode:
        # OCS's own start-up would wait for the router, but registering files does not need one
        reactor.callWhenRunning(agent.start, "run", {}, password=agent)
    runner.run(agent, auto_reconnect=True)


if __name__ == "__main__":
    main()
