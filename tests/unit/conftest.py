"""Fixtures for the tests that need no other process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from socs_monitor.spool.store import Spool
from tests.chain import Chain, Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def chain(tmp_path: Path, clock: Clock) -> Iterator[Chain]:
    """A chain that has begun and found nothing to do."""
    chain = Chain(tmp_path, clock, clock.monotonic, busy_timeout=0.0)
    chain.registrar.begin()
    chain.step()
    yield chain
    chain.crash()


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Of a spool."""
    return str(tmp_path / "spool")


@pytest.fixture
def said() -> list[str]:
    """What was reported."""
    return []


@pytest.fixture
def open_spool(path: str, said: list[str]) -> Iterator[Callable[..., Spool]]:
    """Opens the spool; all are closed in the end."""
    opened: list[Spool] = []

    def open_it(**options: Any) -> Spool:
        opened.append(Spool(path, said.append, **options))
        return opened[-1]

    yield open_it
    for spool in opened:
        spool.close()
