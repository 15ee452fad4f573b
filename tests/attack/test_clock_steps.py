"""The wall clock steps while the real agent runs. No delay depends on it, so nothing is lost, late or misreported.

A preloaded library, `stepped_clock.c`, makes the steps real for the whole process, including its C libraries.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ocs.ocs_client import OCSClient

from socs_monitor.wire.publisher import Publisher
from tests.chain import write_file, write_lock
from tests.evidence import MIX, md5_of
from tests.testbed.processes import Agent, Router, require
from tests.testbed.smurf_server import SmurfServer

SOURCE = Path(__file__).with_name("stepped_clock.c")

# Seconds; larger than every delay and timeout. `tests/unit/test_clock_steps.py` has small steps, too.
STEPS = {"a day back": -86_400, "a day ahead": 86_400}

RATE = 600.0  # registrations a second
COUNT = 1500

# Seconds within which a file gets its row on a busy machine, far shorter than a step.
SOON_S = 20.0


class Stepped:
    """An agent whose wall clock can be stepped, and its client."""

    def __init__(self, folder: Path, router: Router, library: Path, step_s: int) -> None:
        self.step_s = step_s
        self._stepped_s = 0
        offset_path = folder / "offset"
        offset_path.write_bytes(bytes(8))
        with open(offset_path, "r+b") as file:
            self._offset = memoryview(mmap.mmap(file.fileno(), 8)).cast("q")
        env = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(offset_path)}
        self.agent = Agent(folder / "agent", router, env=env)

    def step(self) -> None:
        """Step the clock at once."""
        self._stepped_s += self.step_s
        self._offset[0] = self._stepped_s * 10**9

    def connect(self) -> None:
        self.agent.wait_listening()
        self._client: OCSClient = self.agent.client()

    def data(self) -> dict[str, Any]:
        data: dict[str, Any] = self._client.run.status().session["data"]
        return data

    def data_after_step(self) -> dict[str, Any]:
        """Return the first session data that is newer than the step."""

        def after_step() -> dict[str, Any] | None:
            data = self.data()
            return data if self._is_now(data["timestamp"]) else None

        return self.agent.wait_for(after_step, SOON_S, "updated its session data")

    def _is_now(self, timestamp: float) -> bool:
        return abs(timestamp - time.time() - self._stepped_s) < 45

    def wait_registered(self, paths: list[str]) -> None:
        """Wait until each file has one row with its present MD5 sum, and no condition is set."""
        wanted = {path: md5_of(path) for path in paths}

        def registered() -> bool:
            rows = [row for row in self.agent.rows() if row["local_path"] in wanted]
            return sorted((row["local_path"], row["local_md5sum"]) for row in rows) == sorted(wanted.items())

        self.agent.wait_for(registered, SOON_S, f"registered {len(paths)} files")
        assert all(self._is_now(row["timestamp"]) for row in self.agent.rows()[-1:]), "rows have wall time"
        self.agent.wait_for(lambda: self.data()["degraded"] == {}, SOON_S, "was healthy")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the library that shifts the wall clock of a process."""
    path = tmp_path_factory.mktemp("library") / "stepped_clock.so"
    subprocess.run([require("gcc"), "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", path, SOURCE], check=True)
    return path


@pytest.fixture(scope="module", params=STEPS.values(), ids=STEPS)
def stepped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, router: Router, library: Path
) -> Iterator[Stepped]:
    """Start one agent for each step."""
    stepped = Stepped(tmp_path_factory.mktemp("stepped"), router, library, request.param)
    with stepped.agent:
        stepped.connect()
        yield stepped
    print(f"--- log\n{stepped.agent.log}")


def test_nothing_is_lost_under_load(stepped: Stepped, tmp_path: Path) -> None:
    logged_before = len(stepped.agent.log)
    with SmurfServer(tmp_path, stepped.agent.address) as server:
        half = COUNT // 2
        sent = server.send(server.messages(half, MIX), RATE)
        stepped.step()
        sent += server.send(server.messages(COUNT - half, MIX), RATE)

        stepped.wait_registered([message.file for message in sent if message.file])
    data = stepped.data()
    assert (data["lost"]["gaps"], data["lost"]["kernel"]) == (0, 0)
    assert "event=degraded" not in stepped.agent.log[logged_before:]


def test_a_lock_of_the_database_is_waited_out(stepped: Stepped, tmp_path: Path) -> None:
    publisher = Publisher("crate1slot2", stepped.agent.address)
    paths = [str(tmp_path / f"{number}.txt") for number in range(10)]
    stepped.agent.wait_for(stepped.agent.db_path.exists, SOON_S, "made the database")
    with write_lock(stepped.agent.db_path):
        for path in paths:
            write_file(Path(path), os.urandom(100))
            publisher.data_file(path, action="lock", action_ts="1700000000")
        stepped.agent.wait_for(lambda: stepped.data()["degraded"], SOON_S, "met the lock")
        stepped.step()
        assert set(stepped.data_after_step()["degraded"]) == {"database"}, "no registration has waited for a minute yet"

    stepped.wait_registered(paths)
    publisher.close()


def test_a_late_file_and_one_that_changes_are_seen_in_time(stepped: Stepped, tmp_path: Path) -> None:
    publisher = Publisher("crate1slot2", stepped.agent.address)
    late, changing = tmp_path / "late.txt", tmp_path / "changing.txt"
    write_file(changing, b"before")
    publisher.data_file(str(late), action="late", action_ts="1700000000")
    publisher.data_file(str(changing), action="changing", action_ts="1700000000")
    stepped.agent.wait_for(lambda: stepped.data()["files"]["waiting"] == 1, SOON_S, "waits for the late file")
    stepped.wait_registered([str(changing)])
    stepped.step()
    write_file(late, b"there at last")
    write_file(changing, b"after")

    stepped.wait_registered([str(late), str(changing)])
    publisher.close()
