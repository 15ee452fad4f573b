"""The images and docker-compose.yml, built and run as a site does, beside whatever else this host runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from ocs.ocs_client import OCSClient

from socs_monitor.emulator import Message, SmurfServer
from tests.harness import ROOT, free_tcp_port, free_udp_port, rows, wait_until

# The first build installs everything that the images need.
pytestmark = pytest.mark.timeout(900)

AGENT = "ocs-pysmurf-monitor"
ROUTER = "ocs-crossbar"
HEALTH = ["python3", "/usr/local/lib/socs-monitor/healthcheck.py"]
BOTH_ARCHIVES = ("npy", "png", "txt", "tune", "g3")
# Whatever this shell or a .env has for a real system must not reach into the tests.
DEFAULTS = {"CB_HOST": "127.0.0.1", "SOCS_TAG": "latest", "OCS_CONFIG_DIR": "./docker/config", "DATA_DIR": "/data"}


def fault_of_engine() -> str | None:
    """Why there is no Docker here, or None."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except subprocess.TimeoutExpired:
            return f"`{' '.join(command)}` does not answer"
        if done.returncode != 0:
            return f"`{' '.join(command)}` fails: {done.stderr.strip()}"
    return None


class System:
    """docker-compose.yml, as a project of its own: other names, tags and ports, a scratch folder, else as shipped."""

    def __init__(self, folder: Path) -> None:
        self.name = f"socs-monitor-test-{os.getpid()}"
        self.start_up_log = ""
        self.router_port = free_tcp_port()
        self.udp_port = free_udp_port()
        self.data = folder / "data"
        # `so` is there, as on a SMuRF server, and `databases` is not
        (self.data / "so" / "timestreams").mkdir(parents=True)
        config_dir = folder / "config"
        config_dir.mkdir()
        config = yaml.safe_load((ROOT / "docker" / "config" / "default.yaml").read_text())
        (instance,) = config["hosts"]["ocs-docker"]["agent-instances"]
        instance["arguments"] = [
            [*pair] for pair in (dict(instance["arguments"]) | {"--udp-port": self.udp_port}).items()
        ]
        (config_dir / "default.yaml").write_text(yaml.safe_dump(config))
        override = folder / "override.yml"
        override.write_text(f"""
services:
  {AGENT}:
    container_name: {self.name}-agent
    environment:
      - SITE_HUB=ws://127.0.0.1:{self.router_port}/ws
      - SITE_HTTP={self.http_url}
    healthcheck: {{interval: 1s}}
  {ROUTER}:
    container_name: {self.name}-router
    ports: !override ["127.0.0.1:{self.router_port}:8001"]
    healthcheck: {{interval: 1s}}
""")
        self._compose = [
            "docker",
            "compose",
            "-p",
            self.name,
            "-f",
            str(ROOT / "docker-compose.yml"),
            "-f",
            str(override),
        ]
        settings = {"SOCS_TAG": self.name, "OCS_CONFIG_DIR": str(config_dir), "DATA_DIR": str(self.data)}
        self._env = {**os.environ, **DEFAULTS, **settings}

    @property
    def http_url(self) -> str:
        """Where clients call."""
        return f"http://127.0.0.1:{self.router_port}/call"

    @property
    def database(self) -> Path:
        """The database as this host sees it."""
        return self.data / "so" / "databases" / "suprsync.db"

    def compose(self, *arguments: str, check: bool = True, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
        """Run `docker compose`; where it fails, so does the test, with what it and the containers said."""
        done = subprocess.run(
            [*self._compose, *arguments], env=self._env, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT
        )
        if check and done.returncode != 0:
            pytest.fail(f"docker compose {' '.join(arguments)}:\n{done.stdout}\n{done.stderr}\n{self.log()}")
        return done

    def log(self, *services: str) -> str:
        """What the services have printed lately."""
        return self.compose("logs", "--no-color", "--tail", "100", *services, check=False).stdout

    def execute(
        self, command: Sequence[str], service: str = AGENT, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a running container."""
        return self.compose("exec", "-T", *options, service, *command, check=False)

    def health(self) -> subprocess.CompletedProcess[str]:
        """Ask the agent's health check now."""
        return self.execute(HEALTH)

    def inspect(self, service: str = AGENT) -> dict[str, Any]:
        """What the engine says about a service's container."""
        container = self.compose("ps", "-aq", service).stdout.strip()
        (found,) = json.loads(subprocess.check_output(["docker", "inspect", container]))
        return found

    def client(self) -> OCSClient:
        """A real client of the agent, as soon as the agent answers the router's calls."""

        def connected() -> OCSClient | None:
            try:
                return OCSClient("pysmurf-monitor", args=["--site-file", self._site_file, "--site-http", self.http_url])
            except RuntimeError:  # what OCS raises while the agent has not registered
                return None

        return wait_until(connected, 90, "the agent answers a client")

    @property
    def _site_file(self) -> str:
        return self._env["OCS_CONFIG_DIR"] + "/default.yaml"

    def smurf_server(self) -> SmurfServer:
        """A SMuRF server that writes into the scratch folder and sends to the agent."""
        return SmurfServer(self.data, ("127.0.0.1", self.udp_port), seen_as="/data")

    def wait_healthy(self, said: str) -> None:
        """Wait until the health check says so."""
        wait_until(lambda: self.health().stdout.startswith(f"healthy: {said}"), 90, f"the health check says {said!r}")

    def wait_registered(self, sent: Sequence[Message]) -> None:
        """Wait until each file that was sent has its row, and just one."""
        files = {message.file for message in sent}
        wait_until(lambda: files <= self.registered(), 30, f"{len(files)} files are registered")
        paths = [row["local_path"] for row in rows(self.database)]
        assert len(paths) == len(set(paths))

    def registered(self) -> set[str]:
        """The paths in the database."""
        return {row["local_path"] for row in rows(self.database)}

    def beside(self, user: str, *command: str) -> list[str]:
        """The command line that runs a command on the data in another container, as another user."""
        run = ["docker", "run", "--rm", "--interactive", "--user", user, "--volume", f"{self.data}:/data"]
        return [*run, "--entrypoint", command[0], f"socs-monitor:{self.name}", *command[1:]]

    def remove(self) -> None:
        """Take everything away again, also what belongs to the agent's user."""
        self.compose("stop", check=False)
        subprocess.run(self.beside("root", "rm", "-rf", "/data/so/databases"), capture_output=True, timeout=60)
        self.compose("down", "--volumes", "--rmi", "all", "--timeout", "5")


@pytest.fixture(scope="module")
def engine() -> None:
    """Docker itself; without it all of this is skipped, or fails where a CI says that it has one."""
    if fault := fault_of_engine():
        if os.environ.get("CI") == "true" and os.environ.get("SOCS_MONITOR_DOCKER") == "1":
            pytest.fail(fault)
        pytest.skip(fault)


@pytest.fixture(scope="module")
def system(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The running system; a test leaves it running."""
    system = System(tmp_path_factory.mktemp("docker"))
    try:
        system.compose("up", "--build", "--detach", "--wait", "--wait-timeout", "120", timeout_s=800)
        system.start_up_log = system.log(AGENT)
        with system.smurf_server() as server:
            system.wait_registered(server.send(server.messages(1)))  # the first file makes the database
        yield system
    finally:
        system.remove()


def test_documented_service(engine: None) -> None:
    command = ["docker", "compose", "--env-file", ".env.example", "config", "--format", "json"]
    env = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    services = json.loads(subprocess.check_output(command, cwd=ROOT, env=env))["services"]
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
    # what exists is not touched
    assert (system.data / "so").stat().st_uid == os.getuid()


def test_group_smurf_shares_a_database_that_it_may_write(system: System) -> None:
    system.compose("stop", AGENT)
    subprocess.check_call(system.beside("cryo:smurf", "chmod", "g+w", "/data/so/databases/suprsync.db"))
    system.compose("start", AGENT)
    with system.smurf_server() as server:
        system.wait_healthy("'run' is running")
        before = server.send(server.messages(5))
        system.wait_registered(before)
        write = (
            "import sqlite3; db = sqlite3.connect('/data/so/databases/suprsync.db'); "
            "db.execute('UPDATE supersync_v0 SET failed_copy_attempts = 1'); db.commit()"
        )
        subprocess.check_call(system.beside("2000:smurf", "python3", "-c", write))
        assert {row["failed_copy_attempts"] for row in rows(system.database)} == {1}
        system.wait_registered(server.send(server.messages(5)))


def test_health_check_is_healthy(system: System) -> None:
    done = system.health()
    assert (done.stdout, done.returncode) == ("healthy: 'run' is running\n", 0)
    assert system.inspect()["State"]["Health"]["Status"] == "healthy"
    assert system.inspect(ROUTER)["State"]["Health"]["Status"] == "healthy"


def test_health_check_sees_run_stopped(system: System) -> None:
    client = system.client()
    client.run.stop()
    client.run.wait(timeout=20)
    try:
        done = system.health()
        wait_until(lambda: system.inspect()["State"]["Health"]["Status"] == "unhealthy", 30, "Docker says unhealthy")
    finally:
        client.run.start()
    assert done.returncode == 1
    assert done.stdout.startswith("unhealthy: 'run' is done")
    system.wait_healthy("'run' is running")


class SilentAgentRouter(BaseHTTPRequestHandler):
    """A router that answers while the agent behind it does not: no call ever has a reply."""

    def do_GET(self) -> None:
        self.send_error(405)

    def do_POST(self) -> None:
        self.rfile.read()  # until the caller gives up

    def log_message(self, *_: object) -> None:
        pass


def test_health_check_sees_an_agent_that_hangs(system: System) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SilentAgentRouter) as router:
        thread = threading.Thread(target=router.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{router.server_port}/call"
            done = system.execute(HEALTH, options=["--env", f"SITE_HTTP={url}"])
        finally:
            router.shutdown()
            thread.join()
    assert done.returncode == 1
    assert done.stdout.startswith("unhealthy: the agent does not answer")


def test_health_check_sees_an_agent_that_is_not_on_the_router(system: System) -> None:
    done = system.execute(HEALTH, options=["--env", "INSTANCE_ID=somebody-else"])
    assert done.returncode == 1
    assert done.stdout.startswith("unhealthy: the agent cannot be reached, though the router answers")


def test_health_check_sees_a_closed_port(system: System) -> None:
    # dumb-init has a child here as well, and it listens to nothing
    done = system.compose("run", "--rm", "--no-deps", "--entrypoint", "dumb-init", AGENT, *HEALTH, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("unhealthy: the agent has no UDP port open")


def test_files_are_registered_without_a_router(system: System) -> None:
    system.compose("stop", ROUTER)
    try:
        system.compose("restart", AGENT)
        system.wait_healthy("the agent listens; the router at")
        with system.smurf_server() as server:
            sent = server.send(server.messages(10, BOTH_ARCHIVES))
        system.wait_registered(sent)
        assert system.health().returncode == 0
    finally:
        system.compose("start", ROUTER)
    system.wait_healthy("'run' is running")


def test_killed_agent_comes_back(system: System) -> None:
    before = system.inspect()["RestartCount"]
    system.execute(["sh", "-c", "kill -KILL $(cat /proc/1/task/1/children)"])
    wait_until(lambda: system.inspect()["RestartCount"] == before + 1, 60, "Docker starts the agent again")
    system.wait_healthy("'run' is running")
    with system.smurf_server() as server:
        sent = server.send(server.messages(10, BOTH_ARCHIVES))
    system.wait_registered(sent)


@contextlib.contextmanager
def locked_database(system: System) -> Iterator[None]:
    """Another process holds the write lock."""
    hold = (
        "import sqlite3, sys; db = sqlite3.connect('/data/so/databases/suprsync.db', isolation_level=None); "
        "db.execute('BEGIN IMMEDIATE'); print('locked', flush=True); sys.stdin.read()"
    )
    command = system.beside("cryo:smurf", "python3", "-c", hold)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        yield
        holder.stdin.close()
    assert holder.returncode == 0


def test_stop_is_clean_and_loses_nothing(system: System) -> None:
    client = system.client()

    def pending() -> int:
        files = client.run.status().session["data"].get("files", {})  # empty in the first second
        return files.get("pending", 0)

    before = system.registered()  # the emulator may name a file as an earlier one did
    with locked_database(system), system.smurf_server() as server:
        sent = server.send(server.messages(50, BOTH_ARCHIVES))
        wait_until(lambda: pending() == len(sent), 30, "the agent has accepted what was sent")
        assert system.registered() == before
        system.compose("stop", AGENT)
    state = system.inspect()["State"]
    # a container that has to be killed has 137
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        probe.bind(("127.0.0.1", system.udp_port))
    system.compose("start", AGENT)
    system.wait_registered(sent)
    system.wait_healthy("'run' is running")
