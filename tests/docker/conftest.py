"""The running system, built and started once for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.docker.system import AGENT, System, fault_of_engine


@pytest.fixture(scope="session")
def engine() -> None:
    """Require Docker. Without it, skip; fail in a CI that sets ``SOCS_MONITOR_DOCKER=1``."""
    if fault := fault_of_engine():
        if os.environ.get("CI") == "true" and os.environ.get("SOCS_MONITOR_DOCKER") == "1":
            pytest.fail(fault)
        pytest.skip(fault)


@pytest.fixture(scope="session")
def system(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Provide the running system. Every test leaves it running."""
    system = System(tmp_path_factory.mktemp("docker"))
    try:
        system.compose("up", "--build", "--detach", "--wait", "--wait-timeout", "120", timeout_s=800)
        system.start_up_log = system.log(AGENT)
        with system.smurf_server() as server:
            system.wait_registered(server.send(server.messages(1)))  # the first file creates the database
        yield system
    finally:
        system.remove()
