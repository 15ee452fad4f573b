"""The running system, built and brought up once for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.docker.system import AGENT, System, fault_of_engine


@pytest.fixture(scope="session")
def engine() -> None:
    """Docker itself; without it all of this is skipped, or fails where a CI says that it has one."""
    if fault := fault_of_engine():
        if os.environ.get("CI") == "true" and os.environ.get("SOCS_MONITOR_DOCKER") == "1":
            pytest.fail(fault)
        pytest.skip(fault)


@pytest.fixture(scope="session")
def system(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The running system; a test leaves it running."""
    system = System(tmp_path_factory.mktemp("docker"))
    try:
        system.compose("up", "--build", "--detach", "--wait", "--wait-timeout", "120", timeout_s=800)
        system.start_up_log = system.log(AGENT)
        with system.smurf_server() as server:
            system.wait_registered(server.send(server.messages(1)))  # the first file makes the database
        yield system
    finally:
        system.remove()
