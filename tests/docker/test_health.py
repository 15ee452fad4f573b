"""The container's health check, run as Docker runs it."""

from __future__ import annotations

import json

import pytest

from tests.docker.system import AGENT, HEALTH, ROUTER, System
from tests.silent import silent_router
from tests.testbed.processes import rows, wait_until

# The first build installs everything that the images need.
pytestmark = pytest.mark.timeout(900)


def test_health_check_is_healthy(system: System) -> None:
    done = system.health()
    assert (done.stdout, done.returncode) == ("all well\n", 0)
    system.wait_for_engine("healthy")
    system.wait_for_engine("healthy", ROUTER)


def test_health_check_reports_that_run_is_stopped(system: System) -> None:
    client = system.client()
    client.run.stop()
    client.run.wait(timeout=20)
    try:
        done = system.health()
        system.wait_for_engine("unhealthy")
    finally:
        client.run.start()
    assert done.returncode == 4
    assert done.stdout.startswith("not running; run: The operation run is done")
    system.wait_healthy()


def test_health_check_reports_that_files_are_not_registered(system: System) -> None:
    with system.locked_database(), system.smurf_server() as server:
        sent = server.send(server.messages(5))
        wait_until(lambda: system.health().returncode == 3, 30, "the health check reports degraded")
        assert system.health().stdout.startswith("degraded; database: the database")
        system.wait_for_engine("unhealthy")
    system.wait_registered(sent)
    system.wait_healthy()
    system.wait_for_engine("healthy")


def test_health_check_reports_an_agent_that_hangs(system: System) -> None:
    with silent_router() as port:
        done = system.execute(HEALTH, options=["--env", f"SITE_HTTP=http://127.0.0.1:{port}/call"])
    assert done.returncode == 1
    assert "did not reply within 6 s" in done.stdout


def test_health_check_reports_an_agent_that_is_not_connected(system: System) -> None:
    done = system.execute(HEALTH, options=["--env", "INSTANCE_ID=somebody-else"])
    assert done.returncode == 1
    assert done.stdout.startswith("unknown; agent: The router is up, but no agent 'somebody-else' is connected")


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        # a process that has the agent's spool and no socket, as an agent that lost it
        ("flock /data/so/databases/suprsync.db.pysmurf-monitor.spool.lock", 3, "degraded; socket: The agent does not"),
        ("", 4, "not running; agent: The agent is not running: messages"),
    ],
)
def test_health_check_works_without_a_router(system: System, command: str, code: int, said: str) -> None:
    words = ["run", "--rm", "--no-deps", "--env", "SITE_HTTP=http://127.0.0.1:1/call", "--entrypoint", "dumb-init"]
    system.compose("stop", AGENT)
    try:
        done = system.compose(*words, AGENT, *command.split(), *HEALTH, check=False)
    finally:
        system.compose("start", AGENT)
    assert (done.returncode, done.stdout[: len(said)]) == (code, said)
    system.wait_healthy()


def test_the_command_works_in_the_container(system: System) -> None:
    doctor = system.execute(["socs-monitor", "doctor"])
    assert doctor.returncode == 0, doctor.stdout
    assert "failure" not in doctor.stdout
    for found in ("The agent listens on", "The router is up, and the agent answers.", "/data exists and can be read."):
        assert found in doctor.stdout
    files = system.execute(["socs-monitor", "files", "--json", "--limit", "5"]).stdout.splitlines()
    assert [json.loads(line) for line in files] == rows(system.database)[-5:]
    assert "all well" in system.execute(["socs-monitor", "status"]).stdout
