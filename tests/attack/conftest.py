"""Fixtures of the attacks. Most need no router."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.testbed.processes import Router


@pytest.fixture
def no_router(tmp_path: Path) -> Router:
    """A router that is never started: registering files needs none."""
    return Router(tmp_path / "no-router")
