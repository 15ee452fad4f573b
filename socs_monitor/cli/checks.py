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
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from socs_monitor.cli import offline
from socs_monitor.cli.shared import counted, size, span
from socs_monitor.settings import Settings
from socs_monitor.suprsync import readonly

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
    subject: str
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
        return _name(pwd.getpwuid, self.uid)

    def may(self, path: str, access: int) -> bool:
        """Whether the file's mode grants the access."""
        status = os.stat(path)
        shift = 6 if status.st_uid == self.uid else 3 if status.st_gid in self.gids else 0
        return self.uid == 0 or status.st_mode >> shift & access == access


def agent_user(settings: Settings) -> User:
    """Return the owner of the spool or, failing that, of the database; without either, the current user."""
    for path in (settings.spool_path, settings.db_path):
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(path)
            gids = {status.st_gid}
            with contextlib.suppress(KeyError):
                entry = pwd.getpwuid(status.st_uid)
                gids |= set(os.getgrouplist(entry.pw_name, entry.pw_gid))
            return User(status.st_uid, frozenset(gids))
    return User(os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))


def udp_port(settings: Settings, running: bool) -> Iterator[Finding]:
    """Check that the agent listens on its UDP port or, if it is stopped, that the port is free."""
    subject, port = "UDP port", settings.udp_port
    own = offline.agent_sockets(port, settings.spool_path)
    if running and own:
        yield ok(subject, f"The agent listens on {port}.")
        if dropped := sum(socket.dropped for socket in own):
            text = f"The kernel has dropped {counted(dropped, 'datagram')} since the agent opened the port."
            advice = "Check the receive buffer below. Register missing timestreams: socs-monitor backfill ROOT"
            yield warning(subject, f"{text} Files they announced are not registered.", advice)
    elif running:
        text = f"The agent does not listen on {port}: messages sent now are lost."
        yield failure(subject, text, "See its log, then restart it.")
    elif offline.sockets_on(port):
        text = f"Another process uses {port}, so the agent cannot listen there."
        yield failure(subject, text, f"Stop that process, or change --udp-port. Run: ss -ulpn 'sport = :{port}'")
    else:
        yield ok(subject, f"{port} is free for the agent, which is not running.")


def receive_buffer(settings: Settings, data: dict[str, Any]) -> Iterator[Finding]:
    """Check that the kernel grants the receive buffer that the agent requests for bursts."""
    subject, asked = "receive buffer", settings.udp_buffer
    advice = (
        f"Set net.core.rmem_max={asked} in /etc/sysctl.d/ and restart the agent. On the host, run: sysctl -w"
        f" net.core.rmem_max={asked}"
    )
    if "socket" in data:
        granted = data["socket"]["buffer"]
        text = f"The agent has {size(granted)} of {size(asked)}."
    else:
        try:
            with open("/proc/sys/net/core/rmem_max") as file:
                granted = min(asked, int(file.read()))
        except FileNotFoundError:
            yield warning(subject, "The host's limit cannot be read from inside the container.", advice)
            return
        text = f"Without CAP_NET_ADMIN the agent gets {size(granted)} of {size(asked)}."
    if granted < asked:
        yield warning(subject, f"{text} Datagrams of a burst may be dropped.", advice)
    else:
        yield ok(subject, text)


def database(settings: Settings) -> Iterator[Finding]:
    """Check that the database can be read and has its tables, and that no row is in the future."""
    subject, path = "database", settings.db_path
    create = "Start the agent with --create-table True, or correct --db-path."
    try:
        with contextlib.closing(readonly.connect(path)) as db:
            names = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            missing = _TABLES - names
            newest = 0.0
            if not missing:
                newest_100 = "SELECT timestamp FROM supersync_v0 ORDER BY id DESC LIMIT 100"
                (newest,) = db.execute(f"SELECT coalesce(max(timestamp), 0) FROM ({newest_100})").fetchone()  # noqa: S608
    except FileNotFoundError:
        if settings.create_table:
            yield ok(subject, f"{path} does not exist yet. The agent creates it.")
        else:
            yield failure(subject, f"{path} does not exist.", create)
    except (sqlite3.Error, OSError) as error:
        advice = "Check its permissions. If it is damaged, restore it from a backup."
        yield failure(subject, f"{path} cannot be read: {error}.", advice)
    else:
        if not missing:
            yield ok(subject, f"{path} has its tables.")
        elif settings.create_table and missing == _TABLES:
            yield ok(subject, f"{path} has no tables yet. The agent creates them.")
        else:
            yield failure(subject, f"{path} has no table {', '.join(sorted(missing))}.", create)
        if (ahead := newest - time.time()) > _AHEAD_S:
            text = f"The newest row is {span(ahead)} in the future, so the clock was set back. New rows look old."
            yield failure("clock", text, "Set the clock.")


def permissions(settings: Settings) -> Iterator[Finding]:
    """Check that the agent, and others who share the database, may write database and spool."""
    user = agent_user(settings)
    for subject, path in (("database", settings.db_path), ("spool", settings.spool_path)):
        folder = _existing_folder(path)
        files = [path + suffix for suffix in ("", "-wal", "-shm", ".lock") if os.path.exists(path + suffix)]
        findings = []
        if not user.may(folder, _WRITE | _ENTER):
            text = f"The agent's user {user} may not write to the folder {_mode(folder)}, where SQLite creates files."
            findings.append(failure(subject, text, f"Run chmod, or: chown {user} {folder}"))
        if os.statvfs(folder).f_flag & os.ST_RDONLY:
            findings.append(failure(subject, f"{folder} is on a read-only file system.", "Remount it. Run: dmesg"))
        for file in files:
            if not user.may(file, _READ | _WRITE):
                text = f"The agent's user {user} may not write {_mode(file)}."
                findings.append(failure(subject, text, f"Stop agent and SupRsync, then run: chown {user} {file}"))
        if subject == "database" and files[:1] == [path]:
            findings += _shared_database(files, folder)
        yield from findings or [ok(subject, f"The agent's user {user} may write to {folder}.")]


def _shared_database(files: list[str], folder: str) -> Iterator[Finding]:
    """Check that whoever may write the database may also write the files that SQLite creates beside it."""
    path = files[0]
    main = os.stat(path)
    shared = main.st_mode & 0o022
    if not shared:
        text = f"Only its owner may write {_mode(path)}. Run SupRsync as that user, or make it group-writable."
        yield ok("database", text)
        return
    others = f"Other users may write {_mode(path)}, but not"
    for file in files:
        status = os.stat(file)
        if shared & ~status.st_mode or status.st_gid != main.st_gid:
            fix = f"chown --reference={path} {file}; chmod --reference={path} {file}"
            yield failure("database", f"{others} {_mode(file)}.", f"Stop agent and SupRsync, then run: {fix}")
    status = os.stat(folder)
    if shared & ~status.st_mode or (shared & 0o020 and status.st_gid != main.st_gid):
        text = f"{others} the folder {_mode(folder)}, where SQLite creates -wal and -shm."
        yield warning("database", text, f"Run: chgrp {main.st_gid} {folder}; chmod g+ws {folder}")


def disks(settings: Settings) -> Iterator[Finding]:
    """Check that database and spool are on local disks with enough space."""
    for name, path in (("database", settings.db_path), ("spool", settings.spool_path)):
        folder = _existing_folder(path)
        kind = _file_system(folder)
        state = os.statvfs(folder)
        free = state.f_bavail * state.f_frsize
        subject, text = f"{name}'s disk", f"{folder} is on {kind} with {size(free)} free."
        if _NETWORK.search(kind):
            yield failure(subject, f"{text} SQLite's locks do not work on network file systems.", "Use a local disk.")
        elif kind in _VOLATILE:
            yield warning(subject, f"{text} Its content is lost when host or container restart.", "Use a disk.")
        elif free < _FULL:
            yield failure(subject, text, "Free some space.")
        elif name == "spool" and free < settings.spool_size:
            text += f" The spool may grow to {size(settings.spool_size)}."
            yield warning(subject, text, "Free some space, or lower --spool-size.")
        else:
            yield ok(subject, text)


def data_roots(settings: Settings) -> Iterator[Finding]:
    """Check that the data roots exist and can be read."""
    subject, user = "data roots", agent_user(settings)
    if not settings.policy.data_roots:
        text = "No data root is set: any file that a sender names is registered, and SupRsync may delete it."
        yield warning(subject, text, "Set --data-root to the folders in which files are written.")
    for root in settings.policy.data_roots:
        if not os.path.isdir(root):
            text = f"{root} is not a folder. Files outside of the data roots are refused."
            yield failure(subject, text, "Mount it, or correct --data-root.")
        elif not user.may(root, _READ | _ENTER):
            text = f"The agent's user {user} may not read {_mode(root)}."
            yield failure(subject, text, f"Add {user} to its group, or run: chmod o+rx {root}")
        else:
            yield ok(subject, f"{root} exists and can be read.")


def clock() -> Iterator[Finding]:
    """Check that the kernel's clock is synchronised."""
    if ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) == _UNSYNCHRONISED:
        text = "The kernel's clock is not synchronised, so timestamps of rows and feeds may be wrong."
        yield warning("clock", text, "Set up NTP. Run: timedatectl, or chronyc tracking")
    else:
        yield ok("clock", "The kernel's clock is synchronised.")


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
