"""What the attacks share: most need no router, and say so by an address where none is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.testbed.processes import Router


@pytest.fixture
def no_router(tmp_path: Path) -> Router:
    """A router that is never started: files need none."""
    return Router(tmp_path / "no-router")
