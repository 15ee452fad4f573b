"""The agent without a router: its files and sockets, read without changing them; and the spool of a stopped agent."""

from __future__ import annotations

import contextlib
import glob
import os
import sqlite3
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from socs_monitor.cli.shared import CommandError
from socs_monitor.health.units import span
from socs_monitor.report import BACKLOG_S
from socs_monitor.settings import Settings
from socs_monitor.spool import file
from socs_monitor.spool.states import State
from socs_monitor.spool.store import Spool
from socs_monitor.suprsync import readonly

_UNCONNECTED = "07"  # state of a listening UDP socket in /proc/net/udp; that of a DNS query is connected

# States of registrations, as session.data names them.
_COUNTS = {"pending": State.PENDING, "waiting": State.WAITING, "settling": State.REGISTERED, "dead": State.DEAD}


class UdpSocket(NamedTuple):
    """A listening UDP socket, as /proc/net/udp shows it."""

    inode: int
    dropped: int


def inspect(settings: Settings, now: float) -> tuple[bool, dict[str, Any]]:
    """Return whether the agent is running, and what is known of it, under the keys of its ``session.data``.

    Args:
        settings: The agent's settings.
        now: Unix time.

    Raises:
        OSError: If the spool does not exist or cannot be read.
    """
    path = settings.spool_path
    running = file.is_locked(path)
    degraded: dict[str, str] = {}
    data: dict[str, Any] = {"timestamp": now, "degraded": degraded, "files": {}}
    try:
        with contextlib.closing(readonly.connect(settings.db_path)) as db:
            row = db.execute("SELECT local_path, timestamp FROM supersync_v0 ORDER BY id DESC LIMIT 1").fetchone()
        data["files"] |= {"last": row[0], "last_time": row[1]} if row else {}
    except (sqlite3.Error, OSError) as error:
        degraded["database"] = f"The database {settings.db_path} cannot be read: {error}. Run: socs-monitor doctor"
    try:
        with contextlib.closing(readonly.connect(path)) as db:
            counts = dict(db.execute("SELECT state, count(*) FROM registrations GROUP BY state"))
            data["files"] |= {name: counts.get(state, 0) for name, state in _COUNTS.items()}
            data["spool"] = {"bytes": file.used_bytes(db), "max_bytes": settings.spool_size}
            oldest = db.execute(file.OLDEST_PENDING).fetchone()
        if oldest and now - oldest[1] > BACKLOG_S:
            degraded["backlog"] = f"A file has been pending for {span(now - oldest[1])}. See the agent's log."
    except (sqlite3.Error, OSError) as error:
        degraded["spool"] = f"The spool {path} cannot be read: {error}. Run: socs-monitor doctor"
    if running:
        sockets = agent_sockets(settings.udp_port, path)
        data["socket"] = {"listening": bool(sockets)}
        data["lost"] = {"kernel": sum(socket.dropped for socket in sockets)}
        if not sockets:
            text = f"The agent does not listen on UDP port {settings.udp_port}: messages sent now are lost."
            degraded["socket"] = f"{text} See its log, then restart it."
    return running, data


def sockets_on(port: int) -> list[UdpSocket]:
    """Return the sockets that listen on a UDP port, on this host or in this container's network."""
    found = []
    for table in glob.glob("/proc/net/udp*"):
        with open(table) as lines:
            rows = [line.split() for line in lines][1:]
        found += [
            UdpSocket(int(row[9]), int(row[12]))
            for row in rows
            if row[3] == _UNCONNECTED and int(row[1].rpartition(":")[2], 16) == port
        ]
    return found


def agent_sockets(port: int, spool: str) -> list[UdpSocket]:
    """Return the agent's sockets on the port, or all of the port if the agent's process cannot be inspected."""
    sockets = sockets_on(port)
    lock = os.path.realpath(spool + ".lock")
    open_files = [set(_open_files(process)) for process in glob.glob("/proc/[0-9]*")]
    of_agent = [files for files in open_files if lock in files]
    if not of_agent:
        return sockets
    return [socket for socket in sockets if any(f"socket:[{socket.inode}]" in files for files in of_agent)]


def _open_files(process: str) -> Iterator[str]:
    with contextlib.suppress(OSError):  # the process has ended, or belongs to somebody else
        for descriptor in os.listdir(f"{process}/fd"):
            with contextlib.suppress(FileNotFoundError):
                yield os.readlink(f"{process}/fd/{descriptor}")


@contextlib.contextmanager
def spool_if_stopped(path: str) -> Iterator[Spool | None]:
    """Open the spool for changes, or yield None if the agent is running and has locked it.

    Raises:
        CommandError: If there is no spool, or another user owns it: SQLite's files would get the wrong owner.
    """
    if not os.path.exists(path):
        raise CommandError(f"There is no spool {path}. Use --spool-path or --db-path of the agent.")
    owner = os.stat(path).st_uid
    if os.geteuid() not in (0, owner):
        raise CommandError(f"The spool {path} belongs to user {owner}. Run this as that user: sudo -u '#{owner}' ...")
    try:
        spool = Spool(path, lambda text: print(text, file=sys.stderr))
    except file.SpoolBusyError:
        yield None
        return
    with contextlib.closing(spool):
        yield spool
