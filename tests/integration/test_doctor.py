"""`socs-monitor doctor` finds real faults and suggests fixes."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from socs_monitor import settings
from tests.integration.test_cli import command, run, site
from tests.integration.test_end_to_end import announce, wait_registered
from tests.integration.test_status import elsewhere, without_router
from tests.testbed.processes import OWN_BIN, Agent, free_udp_port

StartAgent = Callable[..., Agent]

FAILED = 1

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def diagnosis(*words: object, code: int = 0) -> dict[tuple[str, str], str]:
    """The findings with their advice, by verdict and subject."""
    found: dict[tuple[str, str], str] = {}
    key = ("", "")
    for line in command("doctor", *words, code=code).splitlines():
        if match := re.match(r"(ok|warning|failure) +(\S+(?: \S+)*?) {2,}(.*\S)", line):
            key = match[1], match[2]
            found[key] = found.get(key, "") + match[3]
        else:
            found[key] += " " + line.strip()
    return found


def failures(found: dict[tuple[str, str], str]) -> dict[str, str]:
    return {what: text for (verdict, what), text in found.items() if verdict == "failure"}


@pytest.fixture
def stopped(agent: StartAgent, tmp_path: Path) -> Agent:
    """An agent that has registered a file and was stopped."""
    monitor = agent()
    wait_registered(monitor, announce(monitor, tmp_path / "data", 1))
    monitor.client()
    assert monitor.stop() == 0
    return monitor


def change(monitor: Agent, *options: tuple[str, object]) -> None:
    """Change the agent's options in its site config."""
    config = yaml.safe_load(monitor.site_config.read_text())
    (instance,) = config["hosts"]["localhost"]["agent-instances"]
    instance["arguments"] = [*map(list, (dict(instance["arguments"]) | dict(options)).items())]
    monitor.site_config.write_text(yaml.safe_dump(config))


def test_a_running_agent_has_no_failures(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    wait_registered(monitor, announce(monitor, tmp_path / "data", 1))
    monitor.client()

    found = diagnosis(*site(monitor))
    assert not failures(found)
    assert "The agent listens on" in found["ok", "UDP port"]
    assert found["ok", "router"] == "The router is up, and the agent answers."
    assert "has its tables" in found["ok", "database"]
    assert found["ok", "data roots"] == "/ exists and can be read."
    assert {what for _, what in found} >= {"configuration", "receive buffer", "spool", "spool's disk", "clock"}


def test_a_stopped_agent_has_no_failures(stopped: Agent) -> None:
    found = diagnosis(*site(stopped))
    assert not failures(found)
    assert f"{stopped.udp_port} is free" in found["ok", "UDP port"]
    assert "no agent 'pysmurf-monitor' is connected" in found["warning", "agent"]


def test_an_agent_that_never_ran_has_no_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "UDP_PORT", free_udp_port())  # the default may be in use on this machine
    found = diagnosis("--db-path", tmp_path / "new" / "suprsync.db")
    assert not failures(found)
    assert "does not exist yet. The agent creates it." in found["ok", "database"]
    assert "OCS_CONFIG_DIR" in found["warning", "configuration"]
    assert "SupRsync may delete" in found["warning", "data roots"]


def test_a_missing_router_is_a_warning(agent: StartAgent) -> None:
    found = diagnosis(*without_router(agent()))
    assert "Files are registered without it." in found["warning", "router"]


def test_an_unconnected_agent_is_a_failure(agent: StartAgent) -> None:
    monitor = agent()
    config = elsewhere(monitor, re.findall("wamp_http: (.*)", monitor.site_config.read_text())[0])
    path = Path(config[1])
    path.write_text(path.read_text().replace("address_root: observatory", "address_root: elsewhere"))
    assert "no agent 'pysmurf-monitor' is connected" in failures(diagnosis(*config, code=FAILED))["agent"]


@pytest.mark.parametrize(
    ("option", "said"), [(("--udp-port", "x"), "--udp-port: invalid int value: 'x'"), (("--colour", "red"), "--colour")]
)
def test_a_wrong_option_in_the_site_config_is_a_failure(stopped: Agent, option: tuple[str, str], said: str) -> None:
    change(stopped, option)
    assert said in failures(diagnosis(*site(stopped), code=FAILED))["configuration"]


def test_a_site_config_without_the_agent_is_a_failure(stopped: Agent, tmp_path: Path) -> None:
    assert "another" in failures(diagnosis(*site(stopped), "--instance-id", "another", code=FAILED))["configuration"]
    assert "--site-file" in failures(diagnosis("--site-file", tmp_path / "none", code=FAILED))["configuration"]


def test_a_port_in_use_is_a_failure(stopped: Agent) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", stopped.udp_port))
        said = failures(diagnosis(*site(stopped), code=FAILED))["UDP port"]
    assert f"Another process uses {stopped.udp_port}" in said
    assert f"ss -ulpn 'sport = :{stopped.udp_port}'" in said


def test_a_small_receive_buffer_is_a_warning(stopped: Agent) -> None:
    change(stopped, ("--udp-buffer", 1 << 40))
    assert f"sysctl -w net.core.rmem_max={1 << 40}" in diagnosis(*site(stopped))["warning", "receive buffer"]
    change(stopped, ("--udp-buffer", 4096))
    assert "4 KiB of 4 KiB" in diagnosis(*site(stopped))["ok", "receive buffer"]


def test_a_damaged_database_is_a_failure(stopped: Agent) -> None:
    stopped.db_path.write_bytes(b"garbage" * 1000)
    assert "restore it from a backup" in failures(diagnosis(*site(stopped), code=FAILED))["database"]


def test_missing_tables_are_a_failure_without_create_table(stopped: Agent) -> None:
    for path in stopped.db_path.parent.glob("suprsync.db*"):
        path.unlink()
    sqlite3.connect(stopped.db_path).close()
    assert "has no tables yet. The agent creates them." in diagnosis(*site(stopped))["ok", "database"]
    change(stopped, ("--create-table", False))
    assert "--create-table True" in failures(diagnosis(*site(stopped), code=FAILED))["database"]
    stopped.db_path.unlink()
    assert "does not exist." in failures(diagnosis(*site(stopped), code=FAILED))["database"]


def test_a_row_from_the_future_is_a_failure_of_the_clock(stopped: Agent) -> None:
    with contextlib.closing(sqlite3.connect(stopped.db_path)) as db, db:
        db.execute("UPDATE supersync_v0 SET timestamp = ?", (time.time() + 9000,))
    assert "2 h in the future, so the clock was set back." in failures(diagnosis(*site(stopped), code=FAILED))["clock"]


def test_a_missing_data_root_is_a_failure(stopped: Agent, tmp_path: Path) -> None:
    change(stopped, ("--data-root", str(tmp_path / "none")))
    said = failures(diagnosis(*site(stopped), code=FAILED))["data roots"]
    assert f"{tmp_path / 'none'} is not a folder" in said


@pytest.fixture
def given_away(stopped: Agent) -> Iterator[Agent]:
    """An agent whose files belong to another user and group, with fixed modes whatever the umask."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o2775)
        change(stopped, ("--db-path", f"{name}/suprsync.db"))
        stopped.db_path = stopped.db_path.rename(Path(name) / "suprsync.db")
        Path(f"{stopped.db_path}.{stopped.INSTANCE}.spool").touch()
        for path in (Path(name), *Path(name).iterdir()):
            os.chown(path, 1000, 1001)
            if path.is_file():
                os.chmod(path, 0o644)
        yield stopped


@as_root
def test_files_of_the_right_owner_are_fine(given_away: Agent) -> None:
    found = diagnosis(*site(given_away))
    assert not failures(found)
    assert re.search(r"suprsync.db \(\w+:\w+ 644\). Run SupRsync as that user", found["ok", "database"])


@as_root
@pytest.mark.parametrize("suffix", ["-wal", "-shm", f".{Agent.INSTANCE}.spool-wal", f".{Agent.INSTANCE}.spool.lock"])
def test_a_file_that_the_agent_may_not_write_is_a_failure(given_away: Agent, suffix: str) -> None:
    path = Path(f"{given_away.db_path}{suffix}")
    path.touch()  # as root, e.g. with sqlite3
    os.chmod(path, 0o644)
    said = failures(diagnosis(*site(given_away), code=FAILED))
    assert f"may not write {path} (root:" in said["spool" if "spool" in suffix else "database"]


@as_root
def test_a_folder_that_the_agent_may_not_write_is_a_failure(given_away: Agent) -> None:
    os.chown(given_away.db_path.parent, 0, 0)
    os.chmod(given_away.db_path.parent, 0o755)
    assert "may not write to the folder" in failures(diagnosis(*site(given_away), code=FAILED))["database"]


@as_root
def test_a_group_writable_database_needs_its_journal_and_folder(given_away: Agent) -> None:
    os.chmod(given_away.db_path, 0o664)
    assert not failures(diagnosis(*site(given_away)))
    wal = Path(f"{given_away.db_path}-wal")
    wal.touch()
    os.chown(wal, 1000, 1001)
    os.chmod(wal, 0o644)
    said = failures(diagnosis(*site(given_away), code=FAILED))["database"]
    assert f"but not {wal}" in said
    assert f"chmod --reference={given_away.db_path} {wal}" in said
    wal.unlink()
    os.chmod(given_away.db_path.parent, 0o755)
    assert "where SQLite creates -wal and -shm" in diagnosis(*site(given_away))["warning", "database"]


@as_root
def test_a_data_root_that_the_agent_may_not_read_is_a_failure(given_away: Agent, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    change(given_away, ("--data-root", str(tmp_path / "closed")))
    assert "may not read" in failures(diagnosis(*site(given_away), code=FAILED))["data roots"]


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="there is no tmpfs")
def test_a_spool_in_memory_is_a_warning(stopped: Agent) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        change(stopped, ("--spool-path", f"{folder}/spool"))
        said = diagnosis(*site(stopped))["warning", "spool's disk"]
    assert "tmpfs" in said
    assert "lost when host or container restart" in said


def test_too_little_space_for_the_spool_is_a_warning(stopped: Agent) -> None:
    change(stopped, ("--spool-size", 1 << 60))
    assert "--spool-size" in diagnosis(*site(stopped))["warning", "spool's disk"]


@as_root
def test_a_read_only_file_system_is_a_failure(stopped: Agent) -> None:
    folder = stopped.db_path.parent
    mount = 'mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"; exec "$@"'
    words = ["sh", "-ec", mount, folder, OWN_BIN / "socs-monitor", "doctor", *site(stopped)]
    done = run("unshare", "--mount", *words, env={"COLUMNS": "400"})

    assert done.returncode == FAILED, done.stderr
    for what in ("database", "spool"):
        assert re.search(rf"failure +{what} +{folder} is on a read-only file system", done.stdout), done.stdout
    assert "Run: dmesg" in done.stdout


def test_nothing_is_changed(stopped: Agent) -> None:
    def state() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in stopped.db_path.parent.iterdir() if path.is_file()}

    before = state()
    diagnosis(*site(stopped))
    assert state() == before
