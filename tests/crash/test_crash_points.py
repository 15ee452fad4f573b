"""The real agent, killed at each of its crash points: every acknowledged file is registered once, and correctly."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from socs_monitor.crashpoint import POINTS
from tests.evidence import acknowledged, check_registered, send_files, spool_of, spooled, wait_registered
from tests.testbed.ports import free_udp_port
from tests.testbed.processes import Agent, Router
from tests.testbed.smurf_server import SmurfServer

# A start with registrations in the spool reaches these without a message, and each leaves work for the next one.
ON_REPLAY = ("hashed", "inserted", "committed", "settling")

WITH_ROWS = ("committed", "settling", "settled")


@pytest.mark.parametrize("deaths", [*([point] for point in POINTS), ["queued", *ON_REPLAY]], ids="-".join)
def test_acknowledged_files_survive(deaths: list[str], no_router: Router, tmp_path: Path) -> None:
    port = free_udp_port()
    folder = tmp_path / "agent"
    with SmurfServer(tmp_path / "data", ("127.0.0.1", port)) as server:
        for point in deaths:
            with Agent(folder, no_router, udp_port=port, env={"SOCS_MONITOR_CRASH": point}) as doomed:
                doomed.wait_listening()
                if point == deaths[0]:
                    send_files(server, 9)
                assert doomed.wait(20) == -signal.SIGKILL
            died = time.time()
            kept = acknowledged(doomed)
            before = doomed.rows()
            check_registered(doomed.db_path, [row["local_path"] for row in before])
            assert bool(kept) == (point != "received")
            assert bool(before) == (point in WITH_ROWS)

        with Agent(folder, no_router, udp_port=port) as agent:
            agent.wait_listening()
            wait_registered(agent, [*kept, *send_files(server, 3)])
            after = agent.rows()
            assert after[: len(before)] == before, "a replay changes nothing"
            assert all(row["timestamp"] >= died for row in after[len(before) :]), "a row has the time of its commit"
            if deaths[-1] == "settling":
                agent.wait_for(lambda: not spooled(spool_of(agent)), 10, "re-checked all files")
            assert agent.stop() == 0
