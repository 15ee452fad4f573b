"""Operations that may be started by mistake: no single click discards anything, and nothing delays a stop."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ocs
import pytest
from ocs.ocs_client import OCSClient

from socs_monitor.cli.backfill import _backfill_by_agent
from tests.integration.test_cli import command, site, with_dead_letters
from tests.integration.test_end_to_end import announce, files, wait_registered
from tests.testbed.processes import Agent

StartAgent = Callable[..., Agent]


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """Create a folder of timestreams with a hundred million files, nearly all of them through links."""
    files_, streams, root = (tmp_path / name for name in ("files", "streams", "timestreams"))
    for folder in (files_, streams, root):
        folder.mkdir()
    for number in range(100):
        path = files_ / f"{number:03}.g3"
        path.touch()
        os.utime(path, (time.time() - 1000,) * 2)
        (streams / f"ufm_{number}").symlink_to(files_)
    for number in range(10_000):
        (root / f"{number:05}").symlink_to(streams)
    return root


def outcome(reply: Any) -> tuple[bool, str]:
    """Return whether a task succeeded, and its last message."""
    assert reply.session["status"] == "done"
    return reply.session["success"], [text for _, text in reply.session["messages"] if "Status is now" not in text][-1]


def start_backfill(monitor: Agent, client: OCSClient, root: Path, dry_run: bool) -> None:
    """Start a backfill, and wait until it has seen 5,000 files."""
    assert client.backfill.start(root=str(root), dry_run=dry_run).status == ocs.OK
    monitor.wait_for(lambda: seen(client) > 5000, 30, "runs the backfill")


def seen(client: OCSClient) -> int:
    return client.backfill.status().session.get("data", {}).get("seen", 0)


def test_discard_without_ids_discards_nothing(agent: StartAgent, tmp_path: Path) -> None:
    monitor = with_dead_letters(agent, [tmp_path / name for name in ("one.txt", "two.txt", "three.txt")])
    client = monitor.client()

    for wrong in ({}, {"ids": None}, {"all": False}, {"ids": []}, {"ids": [1], "all": True}):
        succeeded, said = outcome(client.discard_failed(**wrong))
        assert not succeeded
        assert "all=True" in said
        assert "ids" in said
        assert files(client)["dead"] == 3

    (first, *_) = [letter["id"] for letter in client.list_failed().session["data"]["failed"]]
    assert outcome(client.discard_failed(ids=[first])) == (True, "1 dead letter discarded.")
    assert outcome(client.discard_failed(all=True)) == (True, "2 dead letters discarded.")
    monitor.wait_for(lambda: files(client)["dead"] == 0, 10, "discarded all")


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_the_command_discards_nothing_either(agent: StartAgent, tmp_path: Path, running: bool) -> None:
    monitor = with_dead_letters(agent, [tmp_path / name for name in ("one.txt", "two.txt")])
    if not running:
        monitor.stop()

    assert "--all" in command("failed", "discard", *site(monitor), code=2)
    assert "not allowed with" in command("failed", "discard", *site(monitor), "--all", "1", code=2)
    assert "2 of 2 dead letters" in command("failed", "list", *site(monitor))
    assert "2 dead letters discarded." in command("failed", "discard", *site(monitor), "--all")
    assert "No dead letters." in command("failed", "list", *site(monitor))


def with_database(agent: StartAgent, folder: Path) -> Agent:
    """Start an agent and register a file, so that there is a database."""
    monitor = agent()
    wait_registered(monitor, announce(monitor, folder, 1))
    return monitor


def test_a_backfill_can_be_aborted_and_started_again(agent: StartAgent, endless: Path, tmp_path: Path) -> None:
    monitor = with_database(agent, tmp_path / "data")
    client = monitor.client()
    for _ in range(2):
        start_backfill(monitor, client, endless, dry_run=True)
        assert client.backfill.abort().status == ocs.OK
        succeeded, said = outcome(client.backfill.wait(timeout=5))
        assert not succeeded
        assert "aborted" in said


def test_interrupting_the_command_aborts_the_backfill(agent: StartAgent, endless: Path, tmp_path: Path) -> None:
    monitor = with_database(agent, tmp_path / "data")
    client = monitor.client()

    def interrupt(progress: dict[str, Any]) -> None:
        assert progress["seen"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _backfill_by_agent(client, Namespace(root=str(endless), dry_run=True), interrupt)
    succeeded, said = outcome(client.backfill.wait(timeout=5))
    assert not succeeded
    assert "aborted" in said


@pytest.mark.alone
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_backfill_delays_no_stop(agent: StartAgent, endless: Path, tmp_path: Path, dry_run: bool) -> None:
    monitor = with_database(agent, tmp_path / "data")
    monitor.client()
    begin = time.monotonic()
    monitor.stop()
    without = time.monotonic() - begin
    print(f"a stop takes {without:.2f} s without a backfill")

    monitor.start()
    start_backfill(monitor, monitor.client(), endless, dry_run)
    begin = time.monotonic()
    assert monitor.stop() == 0
    print(f"and {time.monotonic() - begin:.2f} s with one")
    assert time.monotonic() - begin < without + 1
    assert "Traceback" not in monitor.log
