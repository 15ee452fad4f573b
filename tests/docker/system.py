"""The system in docker-compose.yml, run as a project of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from ocs.ocs_client import OCSClient

from tests.testbed.ports import free_tcp_port, free_udp_port
from tests.testbed.processes import ROOT, rows, wait_until
from tests.testbed.smurf_server import Message, SmurfServer

AGENT = "ocs-pysmurf-monitor"
ROUTER = "ocs-crossbar"
HEALTH = ["socs-monitor", "status", "--brief"]
# Settings of a real system, from this shell or a .env, must not affect the tests.
DEFAULTS = {
    **{"CB_HOST": "127.0.0.1", "SOCS_TAG": "latest", "OCS_CONFIG_DIR": "./docker/config", "DATA_DIR": "/data"},
    **{"INFLUXDB_PASSWORD": "", "GRAFANA_PASSWORD": ""},
}


def fault_of_engine() -> str | None:
    """Return why Docker cannot be used, or None."""
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
    """docker-compose.yml as shipped, but with other names, tags and ports, and a scratch folder."""

    def __init__(self, folder: Path) -> None:
        self.name = f"socs-monitor-test-{os.getpid()}"
        self.start_up_log = ""
        self.router_port = free_tcp_port()
        self.udp_port = free_udp_port()
        self.data = folder / "data"
        # `so` exists, as on a SMuRF server; `databases` does not
        (self.data / "so" / "timestreams").mkdir(parents=True)
        config_dir = folder / "config"
        config_dir.mkdir()
        config = yaml.safe_load((ROOT / "docker" / "config" / "default.yaml").read_text())
        instance = config["hosts"]["ocs-docker"]["agent-instances"][0]
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
        """HTTP address, for clients."""
        return f"http://127.0.0.1:{self.router_port}/call"

    @property
    def database(self) -> Path:
        """Path of the database on this host."""
        return self.data / "so" / "databases" / "suprsync.db"

    def compose(self, *arguments: str, check: bool = True, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
        """Run `docker compose`. If it fails, the test fails and shows its output and the containers' logs."""
        done = subprocess.run(
            [*self._compose, *arguments], env=self._env, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT
        )
        if check and done.returncode != 0:
            pytest.fail(f"docker compose {' '.join(arguments)}:\n{done.stdout}\n{done.stderr}\n{self.log()}")
        return done

    def log(self, *services: str) -> str:
        """Return the last 100 log lines of each service."""
        return self.compose("logs", "--no-color", "--tail", "100", *services, check=False).stdout

    def execute(
        self, command: Sequence[str], service: str = AGENT, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a running container."""
        return self.compose("exec", "-T", *options, service, *command, check=False)

    def health(self) -> subprocess.CompletedProcess[str]:
        """Run the agent's health check now."""
        return self.execute(HEALTH)

    def inspect(self, service: str = AGENT) -> dict[str, Any]:
        """Return the engine's description of a service's container."""
        container = self.compose("ps", "-aq", service).stdout.strip()
        (found,) = json.loads(subprocess.check_output(["docker", "inspect", container]))
        return found

    def client(self) -> OCSClient:
        """Return a real client, as soon as the agent answers calls via the router."""

        def connected() -> OCSClient | None:
            try:
                return OCSClient("pysmurf-monitor", args=["--site-file", self._site_file, "--site-http", self.http_url])
            except RuntimeError:  # OCS raises this while the agent is not connected
                return None

        return wait_until(connected, 90, "the agent answers a client")

    @property
    def _site_file(self) -> str:
        return self._env["OCS_CONFIG_DIR"] + "/default.yaml"

    def smurf_server(self) -> SmurfServer:
        """Return a SMuRF server that writes to the scratch folder and sends to the agent."""
        return SmurfServer(self.data, ("127.0.0.1", self.udp_port), seen_as="/data")

    def wait_healthy(self, said: str = "all well\n") -> None:
        """Wait until the output of the health check begins with `said`."""
        wait_until(lambda: self.health().stdout.startswith(said), 90, f"the health check says {said!r}")

    def wait_for_engine(self, status: str, service: str = AGENT) -> None:
        """Wait until the engine's own checks give a service this health status."""
        wait_until(lambda: self.inspect(service)["State"]["Health"]["Status"] == status, 60, f"{service} is {status}")

    def wait_registered(self, sent: Sequence[Message]) -> None:
        """Wait until each announced file has a row, and check that no row is repeated."""
        files = {message.file for message in sent}
        wait_until(lambda: files <= self.registered(), 30, f"{len(files)} files are registered")
        found = Counter((row["archive_name"], row["local_path"], row["remote_path"]) for row in rows(self.database))
        twice = [key for key, count in found.items() if count > 1]
        assert not twice, twice

    def registered(self) -> set[str]:
        """Return the paths in the database."""
        return {row["local_path"] for row in rows(self.database)}

    def beside(self, user: str, *command: str) -> list[str]:
        """Return the command line that runs a command in another container with the data, as another user."""
        run = ["docker", "run", "--rm", "--interactive", "--user", user, "--volume", f"{self.data}:/data"]
        return [*run, "--entrypoint", command[0], f"socs-monitor:{self.name}", *command[1:]]

    @contextlib.contextmanager
    def locked_database(self) -> Iterator[None]:
        """Let another process hold the write lock."""
        hold = (
            "import sqlite3, sys; db = sqlite3.connect('/data/so/databases/suprsync.db', isolation_level=None); "
            "db.execute('BEGIN IMMEDIATE'); print('locked', flush=True); sys.stdin.read()"
        )
        command = self.beside("cryo:smurf", "python3", "-c", hold)
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdin is not None
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"locked\n"
            yield
            holder.stdin.close()
        assert holder.returncode == 0

    def remove(self) -> None:
        """Remove everything, including the files of the agent's user."""
        self.compose("stop", check=False)
        subprocess.run(self.beside("root", "rm", "-rf", "/data/so/databases"), capture_output=True, timeout=60)
        self.compose("down", "--volumes", "--rmi", "all", "--timeout", "5")
