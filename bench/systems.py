"""The measured systems (the bare work, this agent, the published agent) as real processes, and their resource use."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.testbed.ports import free_udp_port, udp_port_is_bound
from tests.testbed.processes import OWN_BIN, PEER_BIN, Agent, Process, Router

FLOOR, OURS, PEER = "floor", "this agent", "published agent"

# Seconds. The agent re-checks each file five seconds after its row; the cost of that belongs to the registration.
SETTLED_S = 6.0
# Seconds during which the bare work collects a batch when its cost is measured, because small commits are expensive.
# When its latency is measured, it does not wait.
_GATHER_S = 0.05


class System(NamedTuple):
    """One running process under measurement.

    `settle_s` is how long (seconds) it still works on its registrations after its last row.
    """

    name: str
    process: Process
    udp_port: int
    db_path: Path
    settle_s: float

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to which its senders send."""
        return "127.0.0.1", self.udp_port

    @property
    def place(self) -> str:
        """Name of its folder."""
        return self.db_path.parent.name

    def cpu_s(self) -> float:
        """Return the user and system time of the process in seconds."""
        # The clock of clock_getcpuclockid(3), which Python lacks; /proc has a resolution of only 10 ms.
        return time.clock_gettime(~self.process.pid << 3 | 2)

    def memory_mb(self, field: str = "VmRSS") -> float:
        """Return the memory of the process in MB, from a field of /proc/<pid>/status."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024 / 1e6
        return 0.0


class Reader:
    """Observes a growing database from outside, without blocking its writer."""

    def __init__(self, db_path: Path) -> None:
        self._uri = f"file:{db_path}?mode=ro"
        self._connection: sqlite3.Connection | None = None

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()

    def last_id(self) -> int:
        """Return the id of the latest row, or -1 while it is unknown: there is no table, or a commit is in progress."""
        try:
            return self._connected().execute("SELECT max(id) FROM supersync_v0").fetchone()[0] or 0
        except sqlite3.OperationalError:
            return -1

    def paths(self, after: int) -> list[tuple[int, str]]:
        """Return id and path of all rows with an id above `after`."""
        for _ in range(1000):
            try:
                found = self._connected().execute("SELECT id, local_path FROM supersync_v0 WHERE id > ?", (after,))
                return found.fetchall()
            except sqlite3.OperationalError:
                time.sleep(0.01)
        return []

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = sqlite3.connect(self._uri, uri=True, timeout=0, isolation_level=None)
        return self._connection


def peer_installed() -> bool:
    """Return whether the published agent is installed."""
    return (PEER_BIN / "ocs-agent-cli").exists()


@contextlib.contextmanager
def floor(folder: Path, gather_s: float = _GATHER_S) -> Iterator[System]:
    """Run the bare work."""
    folder.mkdir(parents=True)
    port, db_path = free_udp_port(), folder / "suprsync.db"
    command = [sys.executable, "-m", "bench.floor", port, db_path, gather_s]
    process = Process([str(part) for part in command], folder / "floor.log")
    with process:
        process.wait_for(lambda: udp_port_is_bound(port), 30, "opened its UDP port")
        yield System(FLOOR, process, port, db_path, 0.5)
        process.kill()  # it has no other way to end


@contextlib.contextmanager
def agent(folder: Path, name: str = OURS) -> Iterator[System]:
    """Run this agent or the published one, with its own router, because both use the same address."""
    folder.mkdir(parents=True, exist_ok=True)
    with Router(folder) as router, _agent(folder, router, name) as system:
        yield system


@contextlib.contextmanager
def several(folder: Path, count: int) -> Iterator[list[System]]:
    """Run several instances of this agent, one per SMuRF server, on one router."""
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        router = stack.enter_context(Router(folder))
        agents = [_agent(folder / f"{number}", router, OURS, f"pysmurf-monitor-{number}") for number in range(count)]
        yield [stack.enter_context(agent) for agent in agents]


@contextlib.contextmanager
def _agent(folder: Path, router: Router, name: str, instance: str = Agent.INSTANCE) -> Iterator[System]:
    process = Agent(folder, router, bin_dir=PEER_BIN if name == PEER else OWN_BIN, instance=instance)
    with process:
        process.wait_listening(120)
        process.client()
        yield System(name, process, process.udp_port, process.db_path, 1.0 if name == PEER else SETTLED_S)
        with contextlib.suppress(AssertionError):  # the published agent may be slow to stop
            process.stop()


@contextlib.contextmanager
def everything(folder: Path) -> Iterator[dict[str, System]]:
    """Run all systems at once. They are loaded in turn; the cost of an idle one is measured separately."""
    with contextlib.ExitStack() as stack:
        systems = [stack.enter_context(floor(folder / "floor")), stack.enter_context(agent(folder / "ours"))]
        if peer_installed():
            systems.append(stack.enter_context(agent(folder / "peer", PEER)))
        yield {system.name: system for system in systems}
