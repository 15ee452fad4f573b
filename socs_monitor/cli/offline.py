"""What spool, database and kernel tell of an agent that cannot be asked. Nothing of the agent's is touched."""

from __future__ import annotations

import contextlib
import glob
import os
import sqlite3
from collections.abc import Iterator
from typing import Any, NamedTuple

from socs_monitor.report import BACKLOG_S
from socs_monitor.settings import Settings
from socs_monitor.spool import file
from socs_monitor.spool.states import State
from socs_monitor.suprsync import readonly

# Old entries looked at: so many files do not grow at a time.
_LOOKED_AT = 1000

_UNCONNECTED = "07"  # the state of a listening UDP socket in /proc/net/udp; a DNS query's socket is connected


class UdpSocket(NamedTuple):
    """A UDP socket that waits for datagrams, as the kernel tells of it."""

    inode: int
    dropped: int


def look(settings: Settings, now: float) -> tuple[bool, dict[str, Any]]:
    """Return whether the agent's process lives, and what is known, under the keys of its ``session.data``.

    Args:
        settings: The agent's settings.
        now: Unix time.

    Raises:
        OSError: If the spool is not there, or cannot be read.
    """
    path = settings.spool_path
    lives = file.is_locked(path)
    degraded: dict[str, str] = {}
    data: dict[str, Any] = {"timestamp": now, "degraded": degraded, "files": {}}
    with contextlib.ExitStack() as stack:
        try:
            connection = stack.enter_context(contextlib.closing(readonly.connect(settings.db_path)))
            data["files"] |= _last_of(connection)
        except (sqlite3.Error, OSError) as error:
            degraded["database"] = f"the database {settings.db_path} cannot be read: {error}"
        try:
            spool = stack.enter_context(contextlib.closing(readonly.connect(path)))
            data["files"] |= _entries_of(spool)
            data["spool"] = {"bytes": file.used_bytes(spool), "max_bytes": settings.spool_size}
            oldest = spool.execute(
                "SELECT received FROM registrations WHERE state = 'pending' ORDER BY id LIMIT 1"
            ).fetchone()
            if oldest is not None and now - oldest[0] > BACKLOG_S:
                degraded["backlog"] = f"a registration has waited for its row for {now - oldest[0]:.0f} s"
        except (sqlite3.Error, OSError) as error:
            degraded["spool"] = f"the spool {path} cannot be read: {error}"
    if lives:
        sockets = sockets_of_agent(settings.udp_port, path)
        data["socket"] = {"listening": bool(sockets)}
        data["lost"] = {"kernel": sum(socket.dropped for socket in sockets)}
        if not sockets:
            degraded["socket"] = f"the agent does not listen on UDP port {settings.udp_port}: no file is announced"
    return lives, data


def _last_of(database: sqlite3.Connection) -> dict[str, Any]:
    row = database.execute("SELECT local_path, timestamp FROM supersync_v0 ORDER BY id DESC LIMIT 1").fetchone()
    return {"last": row[0], "last_time": row[1]} if row else {}


def _entries_of(spool: sqlite3.Connection) -> dict[str, int]:
    """Return how many registrations are in which state."""
    counts = dict(spool.execute("SELECT state, count(*) FROM registrations GROUP BY state"))
    return {
        "pending": counts.get(State.PENDING, 0),
        "waiting": counts.get(State.WAITING, 0),
        "settling": counts.get(State.REGISTERED, 0),
        "dead": counts.get(State.DEAD, 0),
    }


def sockets_on(port: int) -> list[UdpSocket]:
    """Return the sockets on this host (or in this container's network) that wait for datagrams on a port."""
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


def sockets_of_agent(port: int, spool: str) -> list[UdpSocket]:
    """Return those of the agent; where its process cannot be looked into, all of that port."""
    sockets = sockets_on(port)
    if not (processes := _processes_with(spool + ".lock")):
        return sockets
    links = {link for process in processes for link in _files_of(process)}
    return [socket for socket in sockets if f"socket:[{socket.inode}]" in links]


def _processes_with(path: str) -> list[str]:
    """The processes, of those that we may look into, that have a file open."""
    resolved = os.path.realpath(path)
    return [process for process in glob.glob("/proc/[0-9]*") if resolved in _files_of(process)]


def _files_of(process: str) -> Iterator[str]:
    """What a process has open; processes end and files are closed while we look."""
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(f"{process}/fd"):
            with contextlib.suppress(FileNotFoundError):
                yield os.readlink(f"{process}/fd/{descriptor}")
