"""Whoever reads the agent's standard output stops reading: lines are dropped and counted, and nothing else happens."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ocs.ocs_client import OCSClient

from socs_monitor.wire.publisher import Publisher
from tests.chain import write_file
from tests.evidence import wait_registered
from tests.testbed.processes import Agent, Router

# At level debug each of these files has a line of about 1 KB: more than pipe and agent hold.
COUNT = 2000
NAME = "a_long_name_" * 15

# Seconds within which SIGTERM ends an agent that nobody reads.
END_S = 8.0


class Piped:
    """An agent whose output goes to a pipe that is read only when the test says so."""

    def __init__(self, folder: Path, router: Router) -> None:
        fifo = folder / "output"
        os.mkfifo(fifo)
        self._pipe = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        self.output = b""
        self.agent = Agent(folder / "agent", router, env={"LOGLEVEL": "debug", "FIFO": str(fifo)})
        self.agent.command = ["/bin/sh", "-c", 'exec "$0" "$@" >"$FIFO" 2>&1', *self.agent.command]
        self._numbers = iter(range(1_000_000))
        self._publisher = Publisher("crate1slot2", self.agent.address)
        self._files = folder / "files"

    def close(self) -> None:
        self._publisher.close()
        os.close(self._pipe)

    def connect(self) -> None:
        self.agent.wait_listening()
        self._client: OCSClient = self.agent.client()

    def send(self, count: int) -> list[str]:
        """Write files, announce them, and return their paths."""
        paths = [str(self._files / f"{NAME}{next(self._numbers)}.txt") for _ in range(count)]
        for path in paths:
            write_file(Path(path), b"content")
            self._publisher.data_file(path, action="act", action_ts="1700000000")
        return paths

    def dropped(self) -> int:
        """How many lines were dropped, by the session data."""
        data: dict[str, Any] = self._client.run.status().session["data"]
        dropped: int = data["log"]["dropped"]
        return dropped

    def read(self) -> bool:
        """Read what is in the pipe; return whether there was anything."""
        try:
            some = os.read(self._pipe, 1 << 20)
        except BlockingIOError:
            return False
        self.output += some
        return bool(some)

    def reads(self, pattern: bytes) -> re.Match[bytes] | None:
        """Read what there is, and look for a line."""
        while self.read():
            pass
        return re.search(pattern, self.output)


@pytest.fixture
def piped(tmp_path: Path, router: Router) -> Iterator[Piped]:
    piped = Piped(tmp_path, router)
    with piped.agent:
        piped.connect()
        yield piped
    piped.close()


def test_lines_are_dropped_and_counted_and_files_registered(piped: Piped) -> None:
    paths = piped.send(COUNT)
    wait_registered(piped.agent, paths, 60)
    piped.agent.wait_for(lambda: piped.dropped() > 0, 20, "counted dropped lines")
    dropped = piped.dropped()
    report = piped.agent.wait_for(lambda: piped.reads(rb"Dropped (\d+) lines? .*event=log_dropped.*\n"), 20, "reported")

    assert int(report[1]) >= dropped
    assert piped.dropped() == int(report[1]), "no line is dropped any more"
    written = [line for line in piped.output.decode().splitlines() if "event=registered id=" in line]
    whole = re.compile(r"\d{4}-\d\d-\d\dT\S+ registered \| event=registered id=crate1slot2 .* md5=[0-9a-f]{32}")
    assert [line for line in written if not whole.fullmatch(line)] == []
    assert 0 < len(written) < COUNT <= len(written) + int(report[1])


def test_a_stop_is_not_held_up(piped: Piped) -> None:
    wait_registered(piped.agent, piped.send(COUNT), 60)
    piped.agent.wait_for(lambda: piped.dropped() > 0, 20, "counted dropped lines")
    begin = time.monotonic()

    assert piped.agent.stop() == 0
    assert time.monotonic() - begin < END_S


def test_a_consumer_that_reads_gets_the_last_lines(piped: Piped) -> None:
    piped.agent.wait_for(lambda: piped.reads(rb"run:0 Status is now \"running\""), 20, "logged")
    assert piped.agent.stop() == 0
    assert piped.reads(rb"Main loop terminated\.\n$")
