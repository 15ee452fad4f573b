"""Fixtures that start real processes, and a process state that does not depend on who started the tests."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.testbed.processes import Agent, Router


def pytest_configure() -> None:
    """Undo what a parent may have set: its umask, and SIGINT ignored by `nohup` or a shell's background job."""
    os.umask(0o022)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """One router for all tests. A test that stops a router starts its own."""
    with Router(tmp_path_factory.mktemp("router")) as router:
        yield router


@pytest.fixture
def no_router(tmp_path: Path) -> Router:
    """A router that is never started: registering files needs none."""
    return Router(tmp_path / "no-router")


@pytest.fixture
def agent(router: Router, tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Start agents: `agent(**arguments of Agent)` returns one that listens. Each has its own folder."""
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
