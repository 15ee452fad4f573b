"""What is measured: the bare work, this agent and the published one, each a real process; and what /proc says of it."""

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

# The agent looks at each file a second time five seconds after its row; what that costs belongs to the registration.
SETTLED_S = 6.0
# The bare work gathers so long in what measures its cost, since a commit for few files is dear; for latency not at all.
_GATHER_S = 0.05


class System(NamedTuple):
    """One running process under measurement.

    `settle_s` is how long after its last row it still works on what it has registered.
    """

    name: str
    process: Process
    udp_port: int
    db_path: Path
    settle_s: float

    @property
    def address(self) -> tuple[str, int]:
        """Where its senders send to."""
        return "127.0.0.1", self.udp_port

    @property
    def place(self) -> str:
        """Name of its folder."""
        return self.db_path.parent.name

    def cpu_s(self) -> float:
        """User and system time that the process has spent, seconds."""
        # its clock by clock_getcpuclockid(3), which Python lacks; /proc counts hundredths of a second
        return time.clock_gettime(~self.process.pid << 3 | 2)

    def memory_mb(self, field: str = "VmRSS") -> float:
        """Memory of the process by a field of its status, MB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024 / 1e6
        return 0.0


class Reader:
    """Watches a database grow, from its outside and without holding up who writes it."""

    def __init__(self, db_path: Path) -> None:
        self._uri = f"file:{db_path}?mode=ro"
        self._connection: sqlite3.Connection | None = None

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()

    def last_id(self) -> int:
        """Id of the latest row; -1 while that cannot be told: nobody has made a table, or somebody is committing."""
        try:
            return self._connected().execute("SELECT max(id) FROM supersync_v0").fetchone()[0] or 0
        except sqlite3.OperationalError:
            return -1

    def paths(self, after: int) -> list[tuple[int, str]]:
        """Id and path of the rows after the id `after`."""
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
    """Whether the published agent is there to be measured."""
    return (PEER_BIN / "ocs-agent-cli").exists()


@contextlib.contextmanager
def floor(folder: Path, gather_s: float = _GATHER_S) -> Iterator[System]:
    """The bare work."""
    folder.mkdir(parents=True)
    port, db_path = free_udp_port(), folder / "suprsync.db"
    command = [sys.executable, "-m", "bench.floor", port, db_path, gather_s]
    process = Process([str(part) for part in command], folder / "floor.log")
    with process:
        process.wait_for(lambda: udp_port_is_bound(port), 30, "opened its UDP port")
        yield System(FLOOR, process, port, db_path, 0.5)
        process.kill()  # it knows no other end


@contextlib.contextmanager
def agent(folder: Path, name: str = OURS) -> Iterator[System]:
    """This agent or the published one, with a router of its own: both have the same address on it."""
    folder.mkdir(parents=True, exist_ok=True)
    with Router(folder) as router, _agent(folder, router, name) as system:
        yield system


@contextlib.contextmanager
def several(folder: Path, count: int) -> Iterator[list[System]]:
    """Some of this agent, one a SMuRF server, on one router."""
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
        with contextlib.suppress(AssertionError):  # the published one may take its time
            process.stop()


@contextlib.contextmanager
def everything(folder: Path) -> Iterator[dict[str, System]]:
    """All of them at once; they are loaded in turn, and what an idle one costs is told by its own case."""
    with contextlib.ExitStack() as stack:
        systems = [stack.enter_context(floor(folder / "floor")), stack.enter_context(agent(folder / "ours"))]
        if peer_installed():
            systems.append(stack.enter_context(agent(folder / "peer", PEER)))
        yield {system.name: system for system in systems}
