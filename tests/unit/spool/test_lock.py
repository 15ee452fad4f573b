"""Looking whether a process has the spool: truthful, and in nobody's way."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from socs_monitor.spool import file as spoolfile
from socs_monitor.spool.file import SpoolBusyError


def test_whoever_has_the_spool_is_seen(tmp_path: Path) -> None:
    path = str(tmp_path / "spool")
    with pytest.raises(FileNotFoundError):
        spoolfile.is_locked(path)
    with spoolfile.take_lock(path):
        assert spoolfile.is_locked(path)
    assert not spoolfile.is_locked(path)


def test_an_agent_starts_while_somebody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "spool")
    spoolfile.take_lock(path).close()
    looking = os.open(path + ".lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    assert not spoolfile.is_locked(path)  # nor is one who looks in the way of another
    monkeypatch.setattr(spoolfile.time, "sleep", lambda _: os.close(looking))

    spoolfile.take_lock(path).close()


def test_a_spool_that_stays_taken_is_busy(tmp_path: Path) -> None:
    path = str(tmp_path / "spool")
    with spoolfile.take_lock(path), pytest.raises(SpoolBusyError):
        spoolfile.take_lock(path)
