"""What spool, database and kernel tell of an agent that cannot be asked. Nothing of the agent's is touched."""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import sqlite3
from collections.abc import Iterator
from typing import Any, NamedTuple

from socs_monitor import options, readonly, spoolfile
from socs_monitor.spoolfile import PENDING

# As for the agent itself: an entry without a row for longer than this (seconds) says that files do not get through.
OLDEST_S = 60.0

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
    data: dict[str, Any] = {"timestamp": now, "degraded": degraded}
    try:
        data |= _of_spool(path, now, configuration.spool_size)
        if (oldest := data["queue"]["oldest"]) > OLDEST_S:
            degraded["oldest"] = f"a registration has waited for its row for {oldest:.0f} s"
    except (sqlite3.Error, OSError) as error:
        degraded["spool"] = f"the spool {path} cannot be read: {error}"
    try:
        data["files"] = data.get("files", {}) | _of_database(configuration.db_path)
    except (sqlite3.Error, OSError) as error:
        degraded["database"] = f"the database {configuration.db_path} cannot be read: {error}"
    if lives:
        sockets = sockets_of_agent(configuration.udp_port, path)
        data["socket"] = {"listening": bool(sockets)}
        data["lost"] = {"kernel": sum(socket.dropped for socket in sockets)}
        if not sockets:
            degraded["socket"] = f"the agent does not listen on UDP port {configuration.udp_port}: no file is announced"
    return lives, data


def _of_spool(path: str, now: float, max_bytes: int) -> dict[str, Any]:
    with contextlib.closing(readonly.connect(path)) as db:
        states = {
            state: (count, received)
            for state, count, received in db.execute(
                "SELECT state, count(*), min(received) FROM registrations GROUP BY state"
            )
        }
        pages, free, page = (
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
    depth, received = states.get(PENDING, (0, now))
    return {
        "files": {state: states.get(state, (0,))[0] for state in (PENDING, "waiting", "dead", "settling")},
        "queue": {"depth": depth, "oldest": max(0.0, now - received)},
        "spool": {"bytes": (pages - free) * page, "max_bytes": max_bytes},
    }


def _of_database(path: str) -> dict[str, Any]:
    with contextlib.closing(readonly.connect(path)) as db:
        row = db.execute("SELECT local_path, timestamp FROM supersync_v0 ORDER BY id DESC LIMIT 1").fetchone()
    return {"last": row[0], "last_time": row[1]} if row else {}


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
