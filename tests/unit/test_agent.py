"""The documented class, made by hand: a mock agent, the documented arguments, no router and no running reactor."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import queue
import sqlite3
import subprocess
import sys
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from twisted.internet.protocol import DatagramProtocol

from socs_monitor import DB_PATH, UDP_PORT
from socs_monitor import agent as agent_module
from socs_monitor.agent import PysmurfMonitor, create_remote_path, make_parser
from socs_monitor.settings import Settings
from socs_monitor.suprsync import archive
from socs_monitor.wire.publisher import Publisher, data_file, g3_file
from tests.testbed.processes import rows, wait_until

ADDRESS = ("127.0.0.1", 40000)


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    with contextlib.closing(Publisher("crate1slot2")) as publisher:
        yield publisher


def documented_args(folder: Path, **changed: Any) -> Namespace:
    """The documented options at their defaults, but for the database."""
    documented = {"udp_port": 8200, "create_table": True, "echo_sql": False, "test_mode": False}
    return Namespace(**{**documented, "db_path": str(folder / "suprsync.db"), **changed})


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[PysmurfMonitor]:
    monitor = PysmurfMonitor(MagicMock(), documented_args(tmp_path))
    yield monitor
    monitor._intake.close()


def a_file(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_text(name)
    return path


def test_it_is_the_documented_class(tmp_path: Path) -> None:
    agent, args = MagicMock(), documented_args(tmp_path, echo_sql=True)
    monitor = PysmurfMonitor(agent, args)

    assert isinstance(monitor, DatagramProtocol)
    assert (monitor.agent, monitor.log) == (agent, agent.log)
    assert isinstance(monitor.file_queue, queue.Queue)
    assert (monitor.db_path, monitor.running, monitor.echo_sql) == (args.db_path, False, True)
    assert list(tmp_path.iterdir()) == [], "made by hand it must not touch the disk yet"
    assert agent_module.create_remote_path is archive.create_remote_path is create_remote_path


def test_a_datagram_is_on_the_queue_as_its_metadata_when_it_was_received(
    monitor: PysmurfMonitor, publisher: Publisher, tmp_path: Path
) -> None:
    payload = data_file(str(a_file(tmp_path, "x.txt")), action="take_iv", action_ts="1700000000")
    monitor.datagramReceived(publisher.encode(payload, "data_file"), ADDRESS)
    monitor.datagramReceived(publisher.encode(g3_file("/a/b/c.g3"), "g3_file").decode(), ADDRESS)

    assert monitor.file_queue.get_nowait() == {**payload, "pub_id": "crate1slot2"}
    assert monitor.file_queue.get_nowait() == {**g3_file("/a/b/c.g3"), "pub_id": "crate1slot2"}
    assert monitor.file_queue.empty()


def test_other_messages_are_not_queued(monitor: PysmurfMonitor, publisher: Publisher) -> None:
    for payload, kind in (("step", "session_log"), ({"a": 1}, "session_data"), ({}, "start"), ([1], "general")):
        monitor.datagramReceived(publisher.encode(payload, kind), ADDRESS)
    for garbage in (b"", b"no JSON", b"\x80", b'{"type": "data_file"}'):
        monitor.datagramReceived(garbage, ADDRESS)

    assert monitor.file_queue.empty()
    assert not rows(monitor.db_path)


@pytest.mark.parametrize("params", [{"test_mode": True}, {"test_mode": False}, None], ids=str)
def test_run_in_test_mode_writes_the_rows_and_returns(
    publisher: Publisher, tmp_path: Path, params: dict[str, Any] | None
) -> None:
    wanted = bool(params and params["test_mode"])
    monitor = PysmurfMonitor(MagicMock(), documented_args(tmp_path, test_mode=not wanted))
    paths = [a_file(tmp_path, f"{number}.txt") for number in range(20)]
    for path in paths:
        payload = data_file(str(path), timestamp=1700000000.25, action="take_iv", action_ts=1700000001, plot=True)
        monitor.datagramReceived(publisher.encode(payload, "data_file"), ADDRESS)
    session = MagicMock()
    ok, text = monitor.run(session, params)
    monitor._intake.close()

    assert (ok, monitor.running) == (True, False), text
    written = rows(monitor.db_path)
    assert [row["local_path"] for row in written] == [str(path) for path in paths]
    for row, path in zip(written, paths, strict=True):
        assert row["local_md5sum"] == hashlib.md5(path.read_bytes()).hexdigest()
        assert row["remote_path"] == f"17000/crate1slot2/1700000001_take_iv/plots/{path.name}"
        assert row["archive_name"] == "smurf"
    assert session.data["files"]["registered"] == 20


def test_run_in_test_mode_returns_at_once_with_nothing_to_do(monitor: PysmurfMonitor) -> None:
    assert monitor.run(MagicMock(), {"test_mode": True})[0] is True


def test_run_goes_on_until_it_is_stopped_and_can_be_run_again(
    monitor: PysmurfMonitor, publisher: Publisher, tmp_path: Path
) -> None:
    for turn in range(3):
        session, results = MagicMock(), []
        thread = threading.Thread(target=lambda: results.append(monitor.run(session, {})))  # noqa: B023
        thread.start()
        payload = data_file(str(a_file(tmp_path, f"{turn}.txt")))
        monitor.datagramReceived(publisher.encode(payload, "data_file"), ADDRESS)
        wait_until(lambda: len(rows(monitor.db_path)) == turn + 1, 10, "the row is written")  # noqa: B023
        assert monitor.running
        assert thread.is_alive()

        ok, text = monitor._stop(session, None)
        thread.join(1)
        assert ok, text
        assert not thread.is_alive()
        assert results == [(True, "Monitor exited cleanly.")]
        session.set_status.assert_called_once_with("stopping")
        assert not monitor.running


def test_run_is_degraded_while_files_cannot_be_registered(publisher: Publisher, tmp_path: Path) -> None:
    monitor = PysmurfMonitor(MagicMock(), documented_args(tmp_path, create_table=False))
    payload = data_file(str(a_file(tmp_path, "x.txt")))
    monitor.datagramReceived(publisher.encode(payload, "data_file"), ADDRESS)
    session = MagicMock()
    thread = threading.Thread(target=lambda: monitor.run(session))
    thread.start()
    wait_until(lambda: monitor._health.conditions, 10, "it is degraded")
    monitor._update_session()
    assert session.degraded is True
    assert "--create-table" in session.data["degraded"]["database"]

    maker = PysmurfMonitor(MagicMock(), documented_args(tmp_path, spool_path=str(tmp_path / "other.spool")))
    maker._registrar._database.register([])
    maker._registrar._database.close()
    maker._intake.close()
    wait_until(lambda: len(rows(monitor.db_path)) == 1, 10, "the row is written")
    wait_until(lambda: not monitor._health.conditions, 10, "it is well")
    monitor._stop(session)
    thread.join(1)
    monitor._intake.close()
    assert session.degraded is False


def test_run_survives_and_reports_an_unexpected_error(
    monitor: PysmurfMonitor, publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "_RESTART_S", 0.01)
    payload = data_file(str(a_file(tmp_path, "x.txt")))
    monitor.datagramReceived(publisher.encode(payload, "data_file"), ADDRESS)
    whole, errors = monitor._registrar.run, iter([RuntimeError("never thought of")])

    def failing_once() -> None:
        for error in errors:
            raise error
        whole()

    monkeypatch.setattr(monitor._registrar, "run", failing_once)
    session = MagicMock()
    thread = threading.Thread(target=monitor.run, args=(session, {}))
    thread.start()
    wait_until(lambda: len(rows(monitor.db_path)) == 1, 10, "the row is written all the same")
    monitor._stop(session)
    thread.join(1)

    assert any("never thought of" in problem["text"] for problem in session.data["problems"])
    assert session.degraded is False


def test_after_run_the_database_is_closed(monitor: PysmurfMonitor, publisher: Publisher, tmp_path: Path) -> None:
    monitor.datagramReceived(publisher.encode(data_file(str(a_file(tmp_path, "x"))), "data_file"), ADDRESS)
    monitor.run(MagicMock(), {"test_mode": True})
    gc.collect()  # what were left open would warn here, and a warning is an error

    with contextlib.closing(sqlite3.connect(monitor.db_path)) as db:
        assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    assert not Path(monitor.db_path + "-wal").exists(), "somebody else has it open"


def test_registrations_outlive_the_monitor(publisher: Publisher, tmp_path: Path) -> None:
    path = a_file(tmp_path, "x.txt")
    first = PysmurfMonitor(MagicMock(), documented_args(tmp_path))
    first.datagramReceived(publisher.encode(data_file(str(path)), "data_file"), ADDRESS)
    first._intake.close()

    second = PysmurfMonitor(MagicMock(), documented_args(tmp_path))
    second.run(MagicMock(), {"test_mode": True})
    second._intake.close()
    assert [row["local_path"] for row in rows(second.db_path)] == [str(path)]


def test_the_options_have_the_documented_defaults() -> None:
    args = make_parser().parse_args([])

    assert (args.udp_port, args.create_table, args.echo_sql, args.test_mode) == (8200, True, False, False)
    assert args.db_path == "/data/so/databases/suprsync.db"


@pytest.mark.parametrize(
    ("text", "value"),
    [("True", True), ("true", True), ("yes", True), ("1", True), ("False", False), ("no", False), ("0", False)],
)
def test_create_table_is_a_boolean(text: str, value: bool) -> None:
    assert make_parser().parse_args(["--create-table", text]).create_table is value


@pytest.mark.parametrize(
    "arguments", [("--create-table", "maybe"), ("--create-table",), ("--udp-port", "x"), ("--give-up-after", "-1")]
)
def test_an_invalid_option_is_refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(arguments)

    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_parser_adds_to_one_that_is_there() -> None:
    parser = ArgumentParser()
    assert make_parser(parser) is parser
    assert parser.parse_args(["--udp-port", "1"]).udp_port == 1


def test_help_shows_the_documented_options_and_defaults() -> None:
    shown = subprocess.run(
        [sys.executable, agent_module.__file__, "--help"], capture_output=True, text=True, timeout=30, check=True
    ).stdout
    for option in ("--udp-port", "--create-table", "--db-path", "--echo-sql", "--test-mode"):
        assert option in shown
    for default in (UDP_PORT, DB_PATH):
        assert f"{default}" in shown


def test_an_agent_of_another_instance_has_another_spool(tmp_path: Path) -> None:
    paths = [
        Settings.from_args(documented_args(tmp_path, **more)).spool_path for more in ({}, {"instance_id": "monitor-2"})
    ]

    assert paths == [f"{tmp_path}/suprsync.db.pysmurf-monitor.spool", f"{tmp_path}/suprsync.db.monitor-2.spool"]
    assert Settings.from_args(documented_args(tmp_path, spool_path="/x/y")).spool_path == "/x/y"


def test_the_operation_is_documented_as_ocs_shows_it() -> None:
    assert (PysmurfMonitor.run.__doc__ or "").splitlines()[0] == "run(test_mode=False)"


def test_a_stop_after_run_has_ended_does_not_stop_the_next_run(
    monitor: PysmurfMonitor, publisher: Publisher, tmp_path: Path
) -> None:
    ended = MagicMock()
    monitor.run(ended, {"test_mode": True})
    monitor._stop(ended)
    session = MagicMock()
    thread = threading.Thread(target=monitor.run, args=(session, {}))
    thread.start()
    payload = data_file(str(a_file(tmp_path, "x.txt")))
    monitor.datagramReceived(publisher.encode(payload, "data_file"), ADDRESS)
    wait_until(lambda: len(rows(monitor.db_path)) == 1, 10, "the row is written")
    assert thread.is_alive()
    monitor._stop(session)
    thread.join(1)

    assert not thread.is_alive()


def test_a_stop_while_run_is_starting_ends_it_and_leaves_its_status_to_ocs(monitor: PysmurfMonitor) -> None:
    session = MagicMock(status="starting")
    assert monitor._stop(session)[0]
    thread = threading.Thread(target=monitor.run, args=(session, {}))
    thread.start()
    thread.join(5)

    assert not thread.is_alive()
    session.set_status.assert_not_called()


def test_a_stop_between_the_last_work_and_the_end_does_not_stop_the_next_run(
    monitor: PysmurfMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, work = MagicMock(), monitor._registrar.run

    def stopped_late(once: bool = False) -> None:
        work(once=once)
        monitor._stop(session)

    with monkeypatch.context() as patch:
        patch.setattr(monitor._registrar, "run", stopped_late)
        monitor.run(session, {"test_mode": True})

    assert not monitor._registrar._stopping.is_set()


def test_run_starts_without_the_conditions_of_the_previous_run(monitor: PysmurfMonitor) -> None:
    monitor._health.conditions.set_condition("database", "locked")
    monitor._health.conditions.set_condition("socket", "lost")
    session = MagicMock()
    monitor.run(session, {"test_mode": True})

    assert session.data["degraded"] == {"socket": "lost"}


def test_lost_messages_are_in_the_session_data(monitor: PysmurfMonitor, publisher: Publisher) -> None:
    session = MagicMock()
    for payload, kind, arrives in (
        ("x", "session_log", True),
        ("x", "session_log", False),
        ([1], "session_data", True),  # is refused, but did arrive
        ({"path": "AMCc.x", "value": 1, "type": "int"}, "metadata", True),
    ):
        datagram = publisher.encode(payload, kind)
        if arrives:
            monitor.datagramReceived(datagram, ADDRESS)
    monitor.run(session, {"test_mode": True})
    assert session.data["lost"]["gaps"] == 0
    monitor._report.update()
    assert session.data["lost"]["gaps"] == 0, "it may still come"
    wait_until(lambda: monitor._update() or session.data["lost"]["gaps"] == 1, 5, "the gap is told")

    assert session.data["malformed"] == {"wrong or missing field": 1}
    assert session.degraded is True
    assert list(session.data["streams"]) == ["crate1slot2"]
