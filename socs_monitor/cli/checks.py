"""What `doctor` checks: each check looks at one thing, and says what to do about what it finds."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import grp
import os
import pwd
import re
import sqlite3
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from socs_monitor.cli import offline
from socs_monitor.cli.shared import size
from socs_monitor.health.units import span
from socs_monitor.settings import Settings
from socs_monitor.suprsync import readonly

_TABLES = {"supersync_v0", "timecode_dirs_v0"}

# Free space (bytes) below which a disk counts as full.
_FULL = 64 << 20

# SQLite's locks and shared memory need one kernel that sees all of them.
_NETWORK = re.compile("nfs|cifs|smb|ceph|lustre|gluster|beegfs|gpfs|afs|9p|sshfs")
_VOLATILE = ("tmpfs", "ramfs", "overlay")

# Seconds by which a row may be ahead of the clock.
_AHEAD_S = 5.0

_UNSYNCHRONISED = 5  # what adjtimex(2) returns where nothing disciplines the clock

_READ, _WRITE, _ENTER = 4, 2, 1


class Verdict(enum.Enum):
    """How it is; the value is the colour it is shown in."""

    OK = "green"
    WARNING = "yellow"
    FAILURE = "red"


class Finding(NamedTuple):
    """What a check found, and what to do about it."""

    verdict: Verdict
    what: str
    text: str
    advice: str = ""


class User(NamedTuple):
    """The user that the agent runs as."""

    uid: int
    gids: frozenset[int]

    def __str__(self) -> str:
        with contextlib.suppress(KeyError):
            return pwd.getpwuid(self.uid).pw_name
        return f"user {self.uid}"

    def may(self, path: str, wanted: int) -> bool:
        """Whether the mode of a file allows it."""
        if self.uid == 0:
            return True
        status = os.stat(path)
        shift = 6 if status.st_uid == self.uid else 3 if status.st_gid in self.gids else 0
        return status.st_mode >> shift & wanted == wanted


def agent_user(settings: Settings) -> User:
    """The owner of the spool, which the agent makes, or of the database; where there is neither, whoever asks."""
    for path in (settings.spool_path, settings.db_path):
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(path)
            gids = {status.st_gid}
            with contextlib.suppress(KeyError):
                entry = pwd.getpwuid(status.st_uid)
                gids |= set(os.getgrouplist(entry.pw_name, entry.pw_gid))
            return User(status.st_uid, frozenset(gids))
    return User(os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))


def port(settings: Settings, lives: bool) -> Iterator[Finding]:
    """Whether the agent has its UDP port or, where it is stopped, can have it."""
    number = settings.udp_port
    of_agent = offline.sockets_of_agent(number, settings.spool_path)
    if lives and of_agent:
        dropped = sum(socket.dropped for socket in of_agent)
        yield Finding(Verdict.OK, "UDP port", f"the agent listens on {number}")
        if dropped:
            yield Finding(
                Verdict.WARNING,
                "UDP port",
                f"the kernel has dropped {dropped} datagrams since the agent opened it",
                "see the receive buffer below; files that were not announced: socs-monitor backfill",
            )
    elif lives:
        yield Finding(
            Verdict.FAILURE, "UDP port", f"the agent runs and does not listen on {number}", "see its log; restart it"
        )
    elif offline.sockets_on(number):
        yield Finding(
            Verdict.FAILURE,
            "UDP port",
            f"{number} is in use, and not by this agent, which is stopped",
            f"see who has it (ss -ulpn 'sport = :{number}'); stop that, or change --udp-port",
        )
    else:
        yield Finding(Verdict.OK, "UDP port", f"{number} is free for the agent, which is stopped")


def receive_buffer(settings: Settings, data: dict[str, Any]) -> Iterator[Finding]:
    """Whether a burst fits into the kernel's receive buffer."""
    asked = settings.udp_buffer
    advice = f"on the host: sysctl -w net.core.rmem_max={asked}, and in /etc/sysctl.d/ for good; restart the agent"
    if "socket" in data:
        got = data["socket"]["buffer"]
        verdict = Verdict.OK if got >= asked else Verdict.WARNING
        yield Finding(verdict, "receive buffer", f"the agent has {size(got)} of {size(asked)}", advice)
        return
    try:
        with open("/proc/sys/net/core/rmem_max") as file:
            limit = int(file.read())
    except FileNotFoundError:
        yield Finding(Verdict.WARNING, "receive buffer", "the host's limit cannot be seen from in here", advice)
        return
    verdict = Verdict.OK if limit >= asked else Verdict.WARNING
    text = f"without CAP_NET_ADMIN the agent gets {size(min(limit, asked))} of {size(asked)}"
    yield Finding(verdict, "receive buffer", text, advice)


def database(settings: Settings) -> Iterator[Finding]:
    """Whether the database can be read, and has its tables."""
    path = settings.db_path
    makes = settings.create_table
    start = "start the agent with --create-table True, or correct --db-path"
    try:
        with contextlib.closing(readonly.connect(path)) as db:
            names = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            newest = None
            if missing := _TABLES - names:
                verdict = Verdict.OK if makes and missing == _TABLES else Verdict.FAILURE
                yield Finding(verdict, "database", f"{path} lacks {', '.join(sorted(missing))}", start)
            else:
                (newest,) = db.execute(
                    "SELECT max(timestamp) FROM (SELECT timestamp FROM supersync_v0 ORDER BY id DESC LIMIT 100)"
                ).fetchone()
                yield Finding(Verdict.OK, "database", f"{path} has its tables")
    except FileNotFoundError:
        verdict = Verdict.OK if makes else Verdict.FAILURE
        yield Finding(
            verdict, "database", f"{path} is not there" + (" yet: the agent makes it" if makes else ""), start
        )
    except (sqlite3.Error, OSError) as error:
        advice = "if it is damaged or no database: move it away, or restore it from a backup; else see its mode"
        yield Finding(Verdict.FAILURE, "database", f"{path} cannot be read: {error}", advice)
    else:
        if newest is not None and (ahead := newest - time.time()) > _AHEAD_S:
            text = f"the newest row is {span(ahead)} in the future: the clock was set back"
            yield Finding(Verdict.FAILURE, "clock", text, "set the clock; until it has caught up, new rows look old")


def permissions(settings: Settings) -> Iterator[Finding]:
    """Whether the agent, and others beside it, may write database and spool."""
    user = agent_user(settings)
    for what, path in (("database", settings.db_path), ("spool", settings.spool_path)):
        folder = _existing_folder(path)
        findings = list(_of_folder(user, what, folder))
        files = [path + suffix for suffix in ("", "-wal", "-shm", ".lock") if os.path.exists(path + suffix)]
        for file in files:
            if not user.may(file, _READ | _WRITE):
                advice = f"chown {user} {file}, or chmod it, while agent and SupRsync are stopped"
                findings.append(
                    Finding(Verdict.FAILURE, what, f"{user}, who runs the agent, may not write {_mode(file)}", advice)
                )
        if what == "database" and files[:1] == [path]:
            findings += _of_others(files, folder)
        yield from findings or [Finding(Verdict.OK, what, f"{user}, who runs the agent, may write {folder}")]


def _of_folder(user: User, what: str, folder: str) -> Iterator[Finding]:
    if not user.may(folder, _WRITE | _ENTER):
        text = f"{user}, who runs the agent, may not write the folder {_mode(folder)}"
        yield Finding(Verdict.FAILURE, what, text, f"SQLite makes files beside it: chown {user} {folder}, or chmod it")
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        yield Finding(Verdict.FAILURE, what, f"{folder} is on a read-only file system", "see dmesg; remount it")


def _of_others(files: list[str], folder: str) -> Iterator[Finding]:
    """Whether who may write the database may also write what SQLite puts beside it."""
    modes = {file: os.stat(file) for file in files}
    main = modes[files[0]]
    shared = main.st_mode & 0o022
    for file, status in modes.items():
        if shared & ~status.st_mode or (shared and status.st_gid != main.st_gid):
            yield Finding(
                Verdict.FAILURE,
                "database",
                f"who else may write {_mode(files[0])} may not write {_mode(file)}",
                f"while agent and SupRsync are stopped: chown --reference={files[0]} {file};"
                f" chmod --reference={files[0]} {file}",
            )
    in_folder = os.stat(folder)
    if shared & ~in_folder.st_mode or (shared & 0o020 and in_folder.st_gid != main.st_gid):
        yield Finding(
            Verdict.WARNING,
            "database",
            f"who else may write {_mode(files[0])} may not write the folder {_mode(folder)}, in which SQLite makes"
            " -wal and -shm",
            f"chgrp {main.st_gid} {folder}; chmod g+ws {folder}",
        )
    if not shared:
        text = f"only its owner may write {_mode(files[0])}: SupRsync has to run as that user, or chmod g+w it"
        yield Finding(Verdict.OK, "database", text)


def disks(settings: Settings) -> Iterator[Finding]:
    """Whether database and spool lie on local disks that have room."""
    for what, path in (("database", settings.db_path), ("spool", settings.spool_path)):
        folder = _existing_folder(path)
        kind = _file_system(folder)
        state = os.statvfs(folder)
        free = state.f_bavail * state.f_frsize
        text = f"{folder} is on {kind}, with {size(free)} free"
        if _NETWORK.search(kind):
            advice = "SQLite's locks fail on network file systems, and what it says is safe is not: use a local disk"
            verdict = Verdict.FAILURE
        elif kind in _VOLATILE:
            advice, verdict = "what is there is gone after a restart of host or container: use a disk", Verdict.WARNING
        elif free < _FULL:
            advice, verdict = "make room", Verdict.FAILURE
        elif what == "spool" and free < settings.spool_size:
            verdict = Verdict.WARNING
            advice = f"it may grow to {size(settings.spool_size)} (--spool-size): make room, or allow it less"
        else:
            advice, verdict = "", Verdict.OK
        yield Finding(verdict, f"{what}'s disk", text, advice)


def data_roots(settings: Settings) -> Iterator[Finding]:
    """Whether the folders in which files may lie are there, and can be read."""
    user = agent_user(settings)
    if not settings.policy.data_roots:
        advice = "SupRsync may delete what is registered: name the folders in which files are written"
        yield Finding(Verdict.WARNING, "data roots", "any file that a sender names is registered", advice)
    for root in settings.policy.data_roots:
        if not os.path.isdir(root):
            advice = "mount it, or correct --data-root: files elsewhere are refused"
            yield Finding(Verdict.FAILURE, "data roots", f"{root} is no folder", advice)
        elif not user.may(root, _READ | _ENTER):
            text = f"{user}, who runs the agent, may not read {_mode(root)}"
            yield Finding(Verdict.FAILURE, "data roots", text, f"chmod o+rx {root}, or put {user} into its group")
        else:
            yield Finding(Verdict.OK, "data roots", f"{root} is there")


def clock() -> Iterator[Finding]:
    """Whether the kernel's clock is kept right, as far as the kernel knows."""
    if ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) == _UNSYNCHRONISED:
        text = "nothing keeps the clock right, as far as the kernel knows"
        advice = "times of rows and feeds are only as good as it: see chronyc tracking, timedatectl, or the like"
        yield Finding(Verdict.WARNING, "clock", text, advice)
    else:
        yield Finding(Verdict.OK, "clock", "the kernel says that it is synchronised")


def _existing_folder(path: str) -> str:
    """The folder of a file or, where that is not there, the nearest above it that is."""
    folder = os.path.dirname(os.path.realpath(path))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _file_system(folder: str) -> str:
    """The kind of file system that a folder is on."""
    kinds = {}
    with open("/proc/self/mountinfo") as lines:
        for line in lines:
            mount, _, source = line.partition(" - ")
            kinds[mount.split()[4].encode().decode("unicode_escape")] = source.split()[0]
    while folder not in kinds:
        folder = os.path.dirname(folder)
    return kinds[folder]


def _mode(path: str) -> str:
    """A path with owner, group and mode, as `ls` has them."""
    status = os.stat(path)
    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        owner = str(status.st_uid)
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    return f"{path} ({owner}:{group} {status.st_mode & 0o7777:o})"
