"""What spool, database and kernel tell of an agent that cannot be asked. Nothing of the agent's is touched."""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import sqlite3
from collections.abc import Iterator
from typing import Any, NamedTuple

from socs_monitor import archive, messages, options, readonly, spoolfile
from socs_monitor.report import OLDEST_S
from socs_monitor.spoolfile import DEAD, PENDING

# Old entries looked at: so many files do not grow at a time.
_LOOKED_AT = 1000

_UNCONNECTED = "07"  # the state of a listening UDP socket in /proc/net/udp; a DNS query's socket is connected


class UdpSocket(NamedTuple):
    """A UDP socket that waits for datagrams, as the kernel tells of it."""

    inode: int
    dropped: int


def look(configuration: argparse.Namespace, now: float) -> tuple[bool, dict[str, Any]]:
    """Return whether the agent's process lives, and what is known, under the keys of its ``session.data``.

    Args:
        configuration: The agent's options.
        now: Unix time.

    Raises:
        OSError: If the spool is not there, or cannot be read.
    """
    path = options.spool_path(configuration)
    lives = spoolfile.is_locked(path)
    degraded: dict[str, str] = {}
    data: dict[str, Any] = {"timestamp": now, "degraded": degraded, "files": {}}
    with contextlib.ExitStack() as stack:
        database: sqlite3.Connection | None = None
        try:
            connection = stack.enter_context(contextlib.closing(readonly.connect(configuration.db_path)))
            data["files"] |= _last_of(connection)
            database = connection
        except (sqlite3.Error, OSError) as error:
            degraded["database"] = f"the database {configuration.db_path} cannot be read: {error}"
        try:
            spool = stack.enter_context(contextlib.closing(readonly.connect(path)))
            data["files"] |= _entries_of(spool)
            data["spool"] = {"bytes": spoolfile.used_bytes(spool), "max_bytes": configuration.spool_size}
            if (received := _oldest_without_row(spool, database, now - OLDEST_S)) is not None:
                degraded["oldest"] = f"a registration has waited for its row for {now - received:.0f} s"
        except (sqlite3.Error, OSError) as error:
            degraded["spool"] = f"the spool {path} cannot be read: {error}"
    if lives:
        sockets = sockets_of_agent(configuration.udp_port, path)
        data["socket"] = {"listening": bool(sockets)}
        data["lost"] = {"kernel": sum(socket.dropped for socket in sockets)}
        if not sockets:
            degraded["socket"] = f"the agent does not listen on UDP port {configuration.udp_port}: no file is announced"
    return lives, data


def _last_of(database: sqlite3.Connection) -> dict[str, Any]:
    row = database.execute("SELECT local_path, timestamp FROM supersync_v0 ORDER BY id DESC LIMIT 1").fetchone()
    return {"last": row[0], "last_time": row[1]} if row else {}


def _entries_of(spool: sqlite3.Connection) -> dict[str, int]:
    """How many entries are in which state; of the unsettled ones the agent alone knows which have their row."""
    counts = dict(spool.execute("SELECT state, count(*) FROM registrations GROUP BY state"))
    return {"unsettled": counts.get(PENDING, 0), "waiting": counts.get("waiting", 0), "dead": counts.get(DEAD, 0)}


def _oldest_without_row(spool: sqlite3.Connection, database: sqlite3.Connection | None, before: float) -> float | None:
    """When the oldest entry arrived of those that came before a time, and have no row since.

    An entry whose file goes on growing has its row, and is not settled for as long as it grows.
    """
    for received, message in spool.execute(
        "SELECT received, message FROM registrations WHERE state = 'pending' AND received < ? ORDER BY id LIMIT ?",
        (before, _LOOKED_AT),
    ):
        if database is None or not _has_row(database, message, received):
            return float(received)
    return None


def _has_row(database: sqlite3.Connection, message: str, received: float) -> bool:
    try:
        paths = [entry.local_path for entry in archive.candidates(messages.parse_file(message).meta)]
    except (archive.ArchiveError, messages.MessageError):
        return False
    query = "SELECT 1 FROM supersync_v0 WHERE local_path = ? AND timestamp >= ?"
    return any(database.execute(query, (path, received)).fetchone() for path in paths)


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
