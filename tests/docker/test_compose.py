"""The images and docker-compose.yml, built and run as a site does, without disturbing other systems on the host."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.docker.system import AGENT, DEFAULTS, ROUTER, System
from tests.testbed.processes import ROOT, rows, wait_until

# The first build installs everything that the images need.
pytestmark = pytest.mark.timeout(900)

BOTH_ARCHIVES = ("npy", "png", "txt", "tune", "g3")


def config(*options: str) -> dict[str, Any]:
    """Return the configuration that compose reads, with these options."""
    command = ["docker", "compose", "--env-file", ".env.example", *options, "config", "--format", "json"]
    env = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    done: dict[str, Any] = json.loads(subprocess.check_output(command, cwd=ROOT, env=env))
    return done


def test_documented_service(engine: None) -> None:
    services = config()["services"]
    agent = services[AGENT]
    assert agent["container_name"] == AGENT
    assert agent["hostname"] == "ocs-docker"
    assert agent["user"] == "cryo:smurf"
    assert agent["network_mode"] == "host"
    assert agent["restart"] == "unless-stopped"
    assert agent["environment"] == {
        "INSTANCE_ID": "pysmurf-monitor",
        "SITE_HUB": "ws://127.0.0.1:8001/ws",
        "SITE_HTTP": "http://127.0.0.1:8001/call",
        "CROSSBAR_TIMEOUT": "0",
    }
    volumes = {volume["target"]: volume["source"] for volume in agent["volumes"]}
    assert volumes == {"/config": str(ROOT / "docker" / "config"), "/data": "/data"}
    assert ROUTER in services
    assert ROUTER not in agent["depends_on"]


def test_env_example_holds_the_defaults(engine: None) -> None:
    command = ["docker", "compose", "config"]
    env = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    with_example = subprocess.check_output([*command[:2], "--env-file", ".env.example", "config"], cwd=ROOT, env=env)
    without = subprocess.check_output([*command[:2], "--env-file", os.devnull, "config"], cwd=ROOT, env=env)
    assert with_example == without


def test_profile_monitoring_adds_three_services_for_this_host_only(engine: None) -> None:
    plain, monitoring = config(), config("--profile", "monitoring")
    assert "volumes" not in plain
    assert set(monitoring["volumes"]) == {"influxdb", "grafana"}
    services = monitoring["services"]
    added = {name: services.pop(name) for name in ("ocs-influxdb", "ocs-influxdb-publisher", "ocs-grafana")}
    assert services == plain["services"]
    for name, service in added.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["mem_limit"], name
        assert re.fullmatch(r"socs-monitor:latest|[a-z/]+:\d+\.\d+\.\d+", service["image"]), name
        assert {port["host_ip"] for port in service.get("ports", [])} <= {"127.0.0.1"}, name
    assert all(volume.get("read_only") for volume in added["ocs-grafana"]["volumes"] if volume["type"] == "bind")


@pytest.mark.parametrize("service", ["ocs-influxdb", "ocs-grafana"])
def test_monitoring_does_not_start_without_a_password(engine: None, service: str) -> None:
    name, _, script = config("--profile", "monitoring")["services"][service]["entrypoint"]
    done = subprocess.run([name, "-c", script.replace("$$", "$")], env={}, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"set \w+_PASSWORD in \.env\n", done.stdout)


def test_files_become_rows(system: System) -> None:
    with system.smurf_server() as server:
        sent = server.send(server.messages(30, BOTH_ARCHIVES))
    system.wait_registered(sent)
    found = {row["local_path"]: row for row in rows(system.database)}
    for message in sent:
        row = found[message.file]
        on_host = system.data / Path(message.file).relative_to("/data")
        assert row["local_md5sum"] == hashlib.md5(on_host.read_bytes()).hexdigest()
        assert row["archive_name"] == ("timestreams" if message.kind == "g3_file" else "smurf")


def test_start_up_log_is_clean(system: System) -> None:
    assert "Traceback" not in system.start_up_log
    assert not re.search("error|warning", system.start_up_log, re.IGNORECASE)
    assert "no --data-root" not in system.start_up_log


@pytest.mark.parametrize("service", [AGENT, ROUTER])
def test_hardening_is_in_force(system: System, service: str) -> None:
    # root could write to / even without capabilities, so only the mount can refuse it
    write = system.execute(["touch", "/here"], service, ["--user", "root"])
    assert "Read-only file system" in write.stderr
    assert system.execute(["touch", "/tmp/here"], service).returncode == 0
    status = system.execute(["cat", "/proc/1/status"], service).stdout
    values = dict(line.split(":\t", 1) for line in status.splitlines())
    assert {values[name] for name in values if name.startswith("Cap")} == {"0000000000000000"}
    assert values["NoNewPrivs"] == "1"
    assert values["Uid"].split()[1] != "0"
    limit = system.execute(
        ["sh", "-c", "cat /sys/fs/cgroup/memory.max || cat /sys/fs/cgroup/memory/memory.limit_in_bytes"], service
    )
    assert int(limit.stdout) == {AGENT: 1536 << 20, ROUTER: 512 << 20}[service]


def test_agent_is_cryo_of_smurf(system: System) -> None:
    (child,) = system.execute(["cat", "/proc/1/task/1/children"]).stdout.split()
    for process in ("1", child):
        ids = system.execute(["stat", "--format", "%u:%g", f"/proc/{process}"])
        assert ids.stdout.strip() == "1000:1001"
    names = system.execute(["id"]).stdout
    assert names.startswith("uid=1000(cryo) gid=1001(smurf)")


def test_database_folder_is_shared_in_the_group(system: System) -> None:
    folder = system.database.parent.stat()
    assert (folder.st_uid, folder.st_gid, oct(folder.st_mode & 0o7777)) == (1000, 1001, "0o2775")
    assert system.database.stat().st_gid == 1001
    # existing folders are not changed
    assert (system.data / "so").stat().st_uid == os.getuid()


def test_group_smurf_shares_a_database_that_it_may_write(system: System) -> None:
    system.compose("stop", AGENT)
    subprocess.check_call(system.beside("cryo:smurf", "chmod", "g+w", "/data/so/databases/suprsync.db"))
    system.compose("start", AGENT)
    with system.smurf_server() as server:
        system.wait_healthy()
        before = server.send(server.messages(5))
        system.wait_registered(before)
        write = (
            "import sqlite3; db = sqlite3.connect('/data/so/databases/suprsync.db'); "
            "db.execute('UPDATE supersync_v0 SET failed_copy_attempts = 1'); db.commit()"
        )
        subprocess.check_call(system.beside("2000:smurf", "python3", "-c", write))
        assert {row["failed_copy_attempts"] for row in rows(system.database)} == {1}
        system.wait_registered(server.send(server.messages(5)))


def test_files_are_registered_without_a_router(system: System) -> None:
    system.compose("stop", ROUTER)
    try:
        system.compose("restart", AGENT)
        system.wait_healthy("all well; The router at ")
        with system.smurf_server() as server:
            sent = server.send(server.messages(10, BOTH_ARCHIVES))
        system.wait_registered(sent)
        assert system.health().returncode == 0
    finally:
        system.compose("start", ROUTER)
    system.wait_healthy()


def test_killed_agent_comes_back(system: System) -> None:
    before = system.inspect()["RestartCount"]
    system.execute(["sh", "-c", "kill -KILL $(cat /proc/1/task/1/children)"])
    wait_until(lambda: system.inspect()["RestartCount"] == before + 1, 60, "Docker has restarted the agent")
    system.wait_healthy()
    with system.smurf_server() as server:
        sent = server.send(server.messages(10, BOTH_ARCHIVES))
    system.wait_registered(sent)


def test_stop_is_clean_and_loses_nothing(system: System) -> None:
    client = system.client()

    def pending() -> int:
        files = client.run.status().session["data"].get("files", {})  # absent in the first second
        return files.get("pending", 0)

    before = system.registered()  # the SMuRF server may reuse a name
    with system.locked_database(), system.smurf_server() as server:
        sent = server.send(server.messages(50, BOTH_ARCHIVES))
        wait_until(lambda: pending() == len(sent), 30, "the agent has accepted what was sent")
        assert system.registered() == before
        system.compose("stop", AGENT)
    state = system.inspect()["State"]
    # 137 if it had to be killed
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        probe.bind(("127.0.0.1", system.udp_port))
    system.compose("start", AGENT)
    system.wait_registered(sent)
    system.wait_healthy()
