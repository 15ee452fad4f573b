"""The checks of `socs-monitor doctor`. Each yields its findings: what was found, what it means, and what to do."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import grp
import os
import pwd
import re
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from socs_monitor.cli import offline
from socs_monitor.cli.shared import size
from socs_monitor.health.units import span
from socs_monitor.settings import Settings
from socs_monitor.suprsync import readonly
from socs_monitor.wire.text import plural

_TABLES = {"supersync_v0", "timecode_dirs_v0"}

# Free space (bytes) below which a disk counts as full.
_FULL = 64 << 20

# SQLite's locks and shared memory work only if a single kernel manages the file system.
_NETWORK = re.compile("nfs|cifs|smb|ceph|lustre|gluster|beegfs|gpfs|afs|9p|sshfs")
_VOLATILE = ("tmpfs", "ramfs", "overlay")

# Tolerated difference between the newest row and the clock, in seconds.
_AHEAD_S = 5.0

_UNSYNCHRONISED = 5  # adjtimex(2)'s return value if nothing disciplines the clock

_READ, _WRITE, _ENTER = 4, 2, 1


class Verdict(enum.Enum):
    """The result of a check. The value is its colour in the terminal."""

    OK = "green"
    WARNING = "yellow"
    FAILURE = "red"


class Finding(NamedTuple):
    """What a check found and what that means (`text`), and what to do (`advice`)."""

    verdict: Verdict
    text: str
    advice: str = ""


ok = functools.partial(Finding, Verdict.OK)
warning = functools.partial(Finding, Verdict.WARNING)
failure = functools.partial(Finding, Verdict.FAILURE)


class User(NamedTuple):
    """The user that the agent runs as."""

    uid: int
    gids: frozenset[int]

    def __str__(self) -> str:
        return f"user {_name(pwd.getpwuid, self.uid)}"

    def may(self, path: str, access: int) -> bool:
        """Whether the file's mode grants the access."""
        status = os.stat(path)
        shift = 6 if status.st_uid == self.uid else 3 if status.st_gid in self.gids else 0
        return self.uid == 0 or status.st_mode >> shift & access == access


def agent_user(settings: Settings) -> User:
    """Return the owner of the spool or else of the database; if neither can be seen, the current user."""
    for path in (settings.spool_path, settings.db_path):
        with contextlib.suppress(OSError):
            status = os.stat(path)
            gids = {status.st_gid}
            with contextlib.suppress(KeyError):
                entry = pwd.getpwuid(status.st_uid)
                gids |= set(os.getgrouplist(entry.pw_name, entry.pw_gid))
            return User(status.st_uid, frozenset(gids))
    return User(os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))


def udp_port(settings: Settings, running: bool) -> Iterator[Finding]:
    """Check that the agent listens on its UDP port or, if it is stopped, that the port is free."""
    port = settings.udp_port
    own = offline.agent_sockets(port, settings.spool_path)
    if running and own:
        yield ok(f"The agent listens on {port}.")
        if dropped := sum(socket.dropped for socket in own):
            text = f"The kernel has dropped {plural(dropped, 'datagram')} since then: files may not be registered."
            yield warning(text, "Check the receive buffer below. For timestreams, run: socs-monitor backfill ROOT")
    elif running:
        text = f"The agent does not listen on {port}: messages sent now are lost."
        yield failure(text, "See its log, then restart it.")
    elif offline.sockets_on(port):
        text = f"Another process uses {port}, so the agent cannot listen there."
        yield failure(text, f"Stop that process, or change --udp-port. Run: ss -ulpn 'sport = :{port}'")
    else:
        yield ok(f"{port} is free for the agent, which is not running.")


def receive_buffer(asked: int, granted: int | None) -> Iterator[Finding]:
    """Check that the kernel grants the requested receive buffer (bytes); None if the agent could not be asked."""
    limit = f"net.core.rmem_max={asked}"
    advice = f"Put {limit} in /etc/sysctl.d/, and restart the agent. On the host, run: sysctl -w {limit}"
    who = "The agent has"
    if granted is None:
        try:
            with open("/proc/sys/net/core/rmem_max") as file:
                granted = min(asked, int(file.read()))
        except FileNotFoundError:
            yield warning("The host's limit cannot be read from inside the container.", advice)
            return
        who = "Without CAP_NET_ADMIN the agent gets"
    text = f"{who} {size(granted)} of {size(asked)}."
    yield ok(text) if granted >= asked else warning(f"{text} Datagrams of a burst may be dropped.", advice)


def database(settings: Settings) -> Iterator[Finding]:
    """Check that the database can be read and has its tables."""
    path, creates = settings.db_path, settings.create_table
    advice = "Start the agent with --create-table True, or correct --db-path."
    try:
        with contextlib.closing(readonly.connect(path)) as db:
            names = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except FileNotFoundError:
        text = f"{path} does not exist"
        yield ok(f"{text} yet. The agent creates it.") if creates else failure(f"{text}.", advice)
    except (sqlite3.Error, OSError) as error:
        text = f"{path} cannot be read: {error}."
        yield failure(text, "Check its permissions. If it is damaged, restore it from a backup.")
    else:
        missing = _TABLES - names
        if not missing:
            yield ok(f"{path} has its tables.")
        elif creates and missing == _TABLES:
            yield ok(f"{path} has no tables yet. The agent creates them.")
        else:
            yield failure(f"{path} has no table {', '.join(sorted(missing))}.", advice)


def permissions(user: User, path: str) -> Iterator[Finding]:
    """Check that the agent's user may write a SQLite file, and the files that SQLite creates beside it."""
    folder = _existing_folder(path)
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        yield failure(f"{folder} is on a read-only file system.", "Remount it. Run: dmesg")
    elif not user.may(folder, _WRITE | _ENTER):
        text = f"The agent's {user} may not write to the folder {_mode(folder)}, where SQLite creates files."
        yield failure(text, f"Run chmod, or: chown {user.uid} {folder}")
    else:
        yield ok(f"The agent's {user} may write to {folder}.")
    for file in _sqlite_files(path):
        if not user.may(file, _READ | _WRITE):
            text = f"The agent's {user} may not write {_mode(file)}."
            yield failure(text, f"Stop agent and SupRsync, then run: chown {user.uid} {file}")


def sharing(path: str) -> Iterator[Finding]:
    """Check that whoever may write the database may also write the files that SQLite creates beside it."""
    if not os.path.exists(path):
        return
    main = os.stat(path)
    shared = main.st_mode & 0o022
    if not shared:
        yield ok(f"Only its owner may write {_mode(path)}. Run SupRsync as that user, or make it group-writable.")
        return
    others = f"Other users may write {_mode(path)}, but not"
    for file in _sqlite_files(path):
        status = os.stat(file)
        if shared & ~status.st_mode or status.st_gid != main.st_gid:
            fix = f"chown --reference={path} {file}; chmod --reference={path} {file}"
            yield failure(f"{others} {_mode(file)}.", f"Stop agent and SupRsync, then run: {fix}")
    folder = _existing_folder(path)
    status = os.stat(folder)
    if shared & ~status.st_mode or (shared & 0o020 and status.st_gid != main.st_gid):
        text = f"{others} the folder {_mode(folder)}, where SQLite creates -wal and -shm."
        yield warning(text, f"Run: chgrp {main.st_gid} {folder}; chmod g+ws {folder}")


def disk(path: str, max_bytes: int = 0) -> Iterator[Finding]:
    """Check that a SQLite file, which may grow to `max_bytes`, is on a local disk with enough space."""
    folder = _existing_folder(path)
    kind = _file_system(folder)
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    text = f"{folder} is on {kind} with {size(free)} free."
    if _NETWORK.search(kind):
        yield failure(f"{text} SQLite's locks do not work on network file systems.", "Use a local disk.")
    elif kind in _VOLATILE:
        yield warning(f"{text} Its content is lost when host or container restart.", "Use a disk.")
    elif free < _FULL:
        yield failure(text, "Free some space.")
    elif free < max_bytes:
        yield warning(f"{text} The spool may grow to {size(max_bytes)}.", "Free some space, or lower --spool-size.")
    else:
        yield ok(text)


def data_roots(user: User, roots: Collection[str]) -> Iterator[Finding]:
    """Check that the data roots exist and that the agent's user can read them."""
    if not roots:
        text = "No data root is set: any file that a sender names is registered, and SupRsync may delete it."
        yield warning(text, "Set --data-root to the folders in which files are written.")
    for root in roots:
        if not os.path.isdir(root):
            yield failure(f"{root} is not a folder. Its files are refused.", "Mount it, or correct --data-root.")
        elif not user.may(root, _READ | _ENTER):
            text = f"The agent's {user} may not read {_mode(root)}."
            yield failure(text, f"Add the user to its group, or run: chmod o+rx {root}")
        else:
            yield ok(f"{root} exists and can be read.")


def clock(db_path: str) -> Iterator[Finding]:
    """Check that the kernel's clock is synchronised, and that no row is in the future."""
    if ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) == _UNSYNCHRONISED:
        text = "The kernel's clock is not synchronised, so timestamps of rows and feeds may be wrong."
        yield warning(text, "Set up NTP. Run: timedatectl, or chronyc tracking")
    else:
        yield ok("The kernel's clock is synchronised.")
    with contextlib.suppress(sqlite3.Error, OSError):  # reported by `database`
        with contextlib.closing(readonly.connect(db_path)) as db:
            newest = db.execute("SELECT timestamp FROM supersync_v0 ORDER BY id DESC LIMIT 100").fetchall()
        if (ahead := max((row[0] or 0 for row in newest), default=0) - time.time()) > _AHEAD_S:
            text = f"The newest row is {span(ahead)} in the future, so the clock was set back. New rows look old."
            yield failure(text, "Set the clock.")


def _sqlite_files(path: str) -> list[str]:
    return [path + suffix for suffix in ("", "-wal", "-shm", ".lock") if os.path.exists(path + suffix)]


def _existing_folder(path: str) -> str:
    """Return the file's folder or, if it does not exist, the nearest parent that does."""
    folder = os.path.dirname(os.path.realpath(path))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _file_system(folder: str) -> str:
    """Return the type of the folder's file system."""
    kinds = {}
    with open("/proc/self/mountinfo") as lines:
        for line in lines:
            mount, _, source = line.partition(" - ")
            kinds[mount.split()[4].encode().decode("unicode_escape")] = source.split()[0]
    while folder not in kinds:
        folder = os.path.dirname(folder)
    return kinds[folder]


def _mode(path: str) -> str:
    """Return the path with owner, group and octal mode."""
    status = os.stat(path)
    owner, group = _name(pwd.getpwuid, status.st_uid), _name(grp.getgrgid, status.st_gid)
    return f"{path} ({owner}:{group} {status.st_mode & 0o7777:o})"


def _name(look_up: Callable[[int], Any], number: int) -> str:
    try:
        return str(look_up(number)[0])
    except KeyError:
        return str(number)
