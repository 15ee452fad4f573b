"""Fixtures with real processes; what they are, says the harness."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.testbed.processes import Agent, Router


@pytest.fixture(scope="session")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """The router that all tests share; a test that stops a router starts one of its own."""
    with Router(tmp_path_factory.mktemp("router")) as router:
        yield router


@pytest.fixture
def agent(router: Router, tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Starts agents: `agent(**arguments of Agent)`, returned when their UDP port is open. Each has its own folder."""
    started: list[Agent] = []

    def start(**arguments: Any) -> Agent:
        agent = Agent(tmp_path / f"agent-{len(started)}", router, **arguments)
        started.append(stack.enter_context(agent))
        agent.wait_listening()
        return agent

    with contextlib.ExitStack() as stack:
        yield start
    for agent in started:
        print(f"--- log of {agent.site_config.parent.name}\n{agent.log}")  # pytest shows it if the test failed
