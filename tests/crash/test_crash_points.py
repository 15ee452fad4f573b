"""The real agent, killed at every one of its crash points: what it had acknowledged is registered once, and right."""

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

# A start with registrations in the spool comes by these without a message.
ON_REPLAY = ("hashed", "inserted", "committed", "settling")


@pytest.mark.parametrize(
    "deaths", [*([point] for point in POINTS), *(["queued", point] for point in ON_REPLAY)], ids="-then-".join
)
def test_what_was_acknowledged_survives(deaths: list[str], router: Router, tmp_path: Path) -> None:
    port = free_udp_port()
    folder = tmp_path / "agent"
    with SmurfServer(tmp_path / "data", ("127.0.0.1", port)) as server:
        for point in deaths:
            with Agent(folder, router, udp_port=port, env={"SOCS_MONITOR_CRASH": point}) as doomed:
                doomed.wait_listening()
                if point == deaths[0]:
                    send_files(server, 9)
                doomed.wait_for(lambda d=doomed: d.exit_code is not None, 20, "dies")
                assert doomed.exit_code == -signal.SIGKILL
        died = time.time()
        kept = acknowledged(doomed)
        before = doomed.rows()
        check_registered(doomed.db_path, [row["local_path"] for row in before])
        assert bool(kept) == (deaths != ["received"])
        assert bool(before) == (deaths[-1] in ("committed", "settling", "settled"))

        with Agent(folder, router, udp_port=port) as agent:
            agent.wait_listening()
            wait_registered(agent, [*kept, *send_files(server, 3)])
            after = agent.rows()
            assert after[: len(before)] == before, "a replay changes nothing"
            assert all(row["timestamp"] >= died for row in after[len(before) :]), "the time of a row is its commit's"
            agent.wait_for(lambda: not spooled(spool_of(agent)), 10, "told the spool that all is settled")
            assert agent.stop() == 0
