"""Spool and database on a full disk, when the agent stops or starts: nothing is lost without a log entry."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from socs_monitor.wire.publisher import data_file
from tests import hostile
from tests.attack.test_memory import numbered
from tests.evidence import entries, path_of, send_files, wait_rows
from tests.testbed.processes import Agent, Router, require, unavailable
from tests.testbed.smurf_server import SmurfServer

SIZE_MIB = 192

NAME = r"none_\d{6}_"

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN of linux/fs.h: every later write fails, as on a broken disk


def run(*words: object) -> None:
    """Run a program that needs privileges. The test is skipped without them."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        unavailable(f"{words[0]}: {done.stderr.strip()}")


class Disk:
    """A small mounted file system."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        """Use up every byte."""
        with open(self._ballast, "ab", buffering=0) as ballast:
            size = 0
            for portion in (1 << 20, 4096, 512, 1):
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(ballast.fileno(), size, portion)
                        size += portion
        assert shutil.disk_usage(self.path).free == 0

    def die(self) -> None:
        """Fail every later access."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, _SHUTDOWN, (2).to_bytes(4, sys.byteorder))
        finally:
            os.close(folder)

    def free(self) -> None:
        """Remove the ballast."""
        self._ballast.unlink()


@contextlib.contextmanager
def mounted(path: Path, *words: object) -> Iterator[Disk]:
    path.mkdir()
    run(require("mount"), *words, path)
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextlib.contextmanager
def tmpfs(folder: Path) -> Iterator[Disk]:
    with mounted(folder / "tmpfs", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "none") as disk:
        yield disk


@contextlib.contextmanager
def ext4(folder: Path) -> Iterator[Disk]:
    image = folder / "image"
    with open(image, "wb") as file:
        file.truncate(SIZE_MIB << 20)
    run(require("mkfs.ext4"), "-q", "-m", "0", image)  # no blocks reserved for root
    try:
        with mounted(folder / "ext4", "-o", "loop", image) as disk:
            yield disk
    finally:
        image.unlink()


@pytest.fixture(params=[tmpfs, ext4])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    make: Callable[[Path], contextlib.AbstractContextManager[Disk]] = request.param
    if os.geteuid():
        unavailable("mounting needs root")
    with make(tmp_path) as disk:
        yield disk


@contextlib.contextmanager
def started(folder: Path, router: Router, disk: Disk) -> Iterator[tuple[Agent, SmurfServer]]:
    """An agent with database and spool on the disk, and a sender with its files elsewhere."""
    with (
        Agent(folder / "agent", router, db_path=disk.path / "suprsync.db") as agent,
        SmurfServer(folder / "server", agent.address) as server,
    ):
        agent.wait_listening()
        wait_rows(agent, send_files(server, 20))
        yield agent, server


def stop(agent: Agent) -> None:
    begin = time.monotonic()
    agent.stop()
    taken = time.monotonic() - begin
    print(f"stopped in {taken:.1f} s, exit code {agent.exit_code}")
    assert taken < 10


def test_registrations_on_a_full_disk_survive_sigterm(disk: Disk, no_router: Router, tmp_path: Path) -> None:
    with started(tmp_path, no_router, disk) as (agent, server):
        disk.fill()
        sent = send_files(server, 500)
        hostile.wait_read(agent.udp_port)
        stop(agent)
        disk.free()
        rows = {row["local_path"] for row in agent.rows()}
        kept = {path_of(entry["message"]) for entry in entries(agent)} | rows
        print(f"{len(kept & set(sent))} of 500 are in spool or database ({len(rows & set(sent))} rows)")

        agent.start()
        agent.wait_listening()
        wait_rows(agent, sent, 20)
        assert agent.stop() == 0


def test_registration_resumes_when_the_disk_has_room_again(disk: Disk, no_router: Router, tmp_path: Path) -> None:
    with started(tmp_path, no_router, disk) as (agent, server):
        disk.fill()
        sent = send_files(server, 500)
        hostile.wait_read(agent.udp_port)
        disk.free()
        wait_rows(agent, sent, 20)
        assert agent.stop() == 0


def test_an_agent_starts_on_a_disk_that_filled_up_after_it_was_stopped(
    disk: Disk, no_router: Router, tmp_path: Path
) -> None:
    with started(tmp_path, no_router, disk) as (agent, server):
        assert agent.stop() == 0
        disk.fill()
        agent.start()
        agent.wait_listening()
        sent = send_files(server, 500)
        hostile.wait_read(agent.udp_port)
        stop(agent)
        assert {path_of(entry["message"]) for entry in entries(agent)} >= set(sent)

        disk.free()
        agent.start()
        agent.wait_listening()
        wait_rows(agent, sent, 20)
        assert agent.stop() == 0


def in_log(agent: Agent) -> set[str]:
    """Numbered names in the log, which shortens long paths in the middle."""
    return set(re.findall(NAME, agent.log))


def test_registrations_without_room_are_logged_by_path(disk: Disk, no_router: Router, tmp_path: Path) -> None:
    """3,000 registrations of 4 kB exceed the reserve."""
    payload = data_file(f"{tmp_path}/{'d' * 250}{'/d' * 1700}/none_@_.txt", action="a", action_ts="1700000000")
    datagram = hostile.encode({**hostile.envelopes()[0], "payload": payload})
    with started(tmp_path, no_router, disk) as (agent, _):
        disk.fill()
        count = hostile.send(agent.udp_port, numbered(datagram, 3000))
        stop(agent)
        names = {f"none_{number:06}_" for number in range(count)}
        kept = {name for entry in entries(agent) for name in re.findall(NAME, entry["message"])}
        print(f"of {count} {len(kept & names)} are in the spool, {len(in_log(agent) & names)} in the log")
        assert names <= kept | in_log(agent)
        disk.free()
        agent.start()
        agent.wait_listening()
        assert agent.stop() == 0


def test_registrations_on_a_broken_disk_are_logged_by_path(no_router: Router, tmp_path: Path) -> None:
    if os.geteuid():
        unavailable("mounting needs root")
    files = tmp_path / "files"
    files.mkdir()
    datagram = hostile.encode(hostile.envelopes(f"{files}/none_@_.txt")[0])
    with ext4(tmp_path) as disk, started(tmp_path, no_router, disk) as (agent, _):
        disk.die()
        count = hostile.send(agent.udp_port, numbered(datagram, 500))
        stop(agent)
        names = {f"none_{number:06}_" for number in range(count)}
        print(f"of {count} {len(in_log(agent) & names)} are in the log")
        assert names <= in_log(agent)
