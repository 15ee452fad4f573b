"""The spool's lock, and asking whether it is held without disturbing its holder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from socs_monitor.spool import file as spoolfile
from socs_monitor.spool.file import SpoolBusyError


def test_a_held_lock_is_reported(tmp_path: Path) -> None:
    path = str(tmp_path / "spool")
    with pytest.raises(FileNotFoundError):
        spoolfile.is_locked(path)
    with spoolfile.take_lock(path):
        assert spoolfile.is_locked(path)
    assert not spoolfile.is_locked(path)


def test_an_agent_can_start_during_a_lock_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "spool")
    spoolfile.take_lock(path).close()
    looking = os.open(path + ".lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    assert not spoolfile.is_locked(path)  # two checks do not disturb each other
    monkeypatch.setattr(spoolfile.time, "sleep", lambda _: os.close(looking))

    spoolfile.take_lock(path).close()


def test_a_lock_that_stays_held_is_an_error(tmp_path: Path) -> None:
    path = str(tmp_path / "spool")
    with spoolfile.take_lock(path), pytest.raises(SpoolBusyError):
        spoolfile.take_lock(path)
