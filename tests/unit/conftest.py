"""Fixtures for the tests that need no other process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chain import Chain, Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def chain(tmp_path: Path, clock: Clock) -> Iterator[Chain]:
    """A chain that has begun and found nothing to do."""
    chain = Chain(tmp_path, clock)
    chain.registrar.begin()
    chain.step()
    yield chain
    chain.crash()
