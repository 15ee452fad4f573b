"""One registration whose file cannot be looked at must not hold up the others."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from socs_monitor.cli.health import State
from socs_monitor.wire.publisher import Publisher
from tests.chain import execute
from tests.evidence import spool_of, spooled
from tests.integration.test_end_to_end import announce, wait_registered
from tests.testbed.processes import OWN_BIN, Agent

StartAgent = Callable[..., Agent]

NAME_MAX = 255


def longer_than_any_path(folder: Path) -> Path:
    """A path of more than 4,096 characters, which the kernel takes for an error and not for a missing file."""
    return folder.joinpath(*["d" * 250] * 20, "x" * 253)


def link_to_itself(folder: Path, length: int) -> Path:
    """A file name of some length that cannot be opened, whoever tries."""
    path = folder / ("x" * length)
    path.symlink_to(path)
    return path


@pytest.mark.parametrize(
    "unreadable",
    [longer_than_any_path, lambda folder: link_to_itself(folder, 252), lambda folder: link_to_itself(folder, NAME_MAX)],
    ids=["longer than any path", "name of 252", "name of 255"],
)
def test_a_path_that_cannot_be_looked_up_holds_up_no_other(
    agent: StartAgent, tmp_path: Path, unreadable: Callable[[Path], Path]
) -> None:
    monitor = agent()
    path = unreadable(tmp_path)
    with pytest.raises(OSError, match=r"too long|symbolic links"):
        os.stat(path)
    publisher = Publisher("ufm_mv19", monitor.address)
    publisher.data_file(str(path), timestamp=1700000000, action="take_iv", action_ts="1700000000")
    publisher.close()
    registered = announce(monitor, tmp_path / "data", 12)

    wait_registered(monitor, registered)
    assert spooled(spool_of(monitor))[str(path)] == "waiting"
    assert "internal_error" not in monitor.log


def test_a_message_that_this_version_cannot_read_holds_up_no_other(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    path = tmp_path / "missing.txt"
    publisher = Publisher("ufm_mv19", monitor.address)
    publisher.data_file(str(path), timestamp=1700000000, action="take_iv", action_ts="1700000000")
    publisher.close()
    spool = spool_of(monitor)
    monitor.wait_for(lambda: spooled(spool) == {str(path): "waiting"}, 30, "waits for the file")
    assert monitor.stop() == 0
    execute(spool, "UPDATE registrations SET message = '{}', state = 'pending', received = 1700000000")
    status = [OWN_BIN / "socs-monitor", "status", "--brief", "--site-file", monitor.site_config]
    asked = subprocess.run(status, capture_output=True, text=True, timeout=60, check=False)
    assert (asked.returncode, asked.stderr) == (State.NOT_RUNNING.value, "")
    assert "backlog" in asked.stdout
    monitor.start()
    monitor.wait_listening()

    wait_registered(monitor, announce(monitor, tmp_path / "data", 12))
    (letter,) = monitor.client().list_failed().session["data"]["failed"]
    assert letter["refused"]
    assert "wrong or missing field" in letter["reason"]
    assert "internal_error" not in monitor.log
