"""The container's health check, asked as Docker asks it."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.docker.system import AGENT, HEALTH, ROUTER, System
from tests.harness import wait_until

# The first build installs everything that the images need.
pytestmark = pytest.mark.timeout(900)


def test_health_check_is_healthy(system: System) -> None:
    done = system.health()
    assert (done.stdout, done.returncode) == ("healthy: 'run' is running\n", 0)
    assert system.inspect()["State"]["Health"]["Status"] == "healthy"
    assert system.inspect(ROUTER)["State"]["Health"]["Status"] == "healthy"


def test_health_check_sees_run_stopped(system: System) -> None:
    client = system.client()
    client.run.stop()
    client.run.wait(timeout=20)
    try:
        done = system.health()
        wait_until(lambda: system.inspect()["State"]["Health"]["Status"] == "unhealthy", 30, "Docker says unhealthy")
    finally:
        client.run.start()
    assert done.returncode == 1
    assert done.stdout.startswith("unhealthy: 'run' is done")
    system.wait_healthy("'run' is running")


class SilentAgentRouter(BaseHTTPRequestHandler):
    """A router that answers while the agent behind it does not: no call ever has a reply."""

    def do_GET(self) -> None:
        self.send_error(405)

    def do_POST(self) -> None:
        self.rfile.read()  # until the caller gives up

    def log_message(self, *_: object) -> None:
        pass


def test_health_check_sees_an_agent_that_hangs(system: System) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SilentAgentRouter) as router:
        thread = threading.Thread(target=router.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{router.server_port}/call"
            done = system.execute(HEALTH, options=["--env", f"SITE_HTTP={url}"])
        finally:
            router.shutdown()
            thread.join()
    assert done.returncode == 1
    assert done.stdout.startswith("unhealthy: the agent does not answer")


def test_health_check_sees_an_agent_that_is_not_on_the_router(system: System) -> None:
    done = system.execute(HEALTH, options=["--env", "INSTANCE_ID=somebody-else"])
    assert done.returncode == 1
    assert done.stdout.startswith("unhealthy: the agent cannot be reached, though the router answers")


def test_health_check_sees_a_closed_port(system: System) -> None:
    # dumb-init has a child here as well, and it listens to nothing
    done = system.compose("run", "--rm", "--no-deps", "--entrypoint", "dumb-init", AGENT, *HEALTH, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("unhealthy: the agent has no UDP port open")
