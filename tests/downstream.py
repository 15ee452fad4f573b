"""The real readers of recorded feeds: OCS's aggregator, and OCS's InfluxDB publisher with an InfluxDB."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from ocs.ocs_client import OCSClient

from tests.testbed.ports import free_tcp_port
from tests.testbed.processes import ENVS, OWN_BIN, Agent, Process, require

AGGREGATOR_BIN = ENVS / "aggregator" / "bin"

# Prints every sample in G3 files: address of the feed, block, field, time (unix seconds), value.
_READ_G3 = """
import json, sys
import so3g
from spt3g import core
for path in sys.argv[1:]:
    for frame in core.G3File(path):
        if "hkagg_type" in frame and frame["hkagg_type"] == so3g.HKFrameType.data:
            for name, block in zip(frame["block_names"], frame["blocks"]):
                times = [time.time / core.G3Units.s for time in block.times]
                for field in block.keys():
                    for time, value in zip(times, block[field]):
                        print(json.dumps([frame["address"], name, field, time, value]))
"""


class Reader(Process):
    """An OCS agent that reads feeds, started as a site does.

    Args:
        folder: Scratch folder.
        monitor: Agent whose router it connects to.
        agent_class: Its agent class.
        arguments: Its options, as in a site config.
        bin_dir: Programs of the environment whose `ocs-agent-cli` is used.
    """

    def __init__(
        self, folder: Path, monitor: Agent, agent_class: str, arguments: Sequence[Sequence[Any]], bin_dir: Path
    ) -> None:
        self.instance = agent_class.lower()
        config = yaml.safe_load(monitor.site_config.read_text())
        instance = {"agent-class": agent_class, "instance-id": self.instance, "arguments": [*map(list, arguments)]}
        config["hosts"]["localhost"]["agent-instances"] = [instance]
        self.site_config = folder / f"{self.instance}.yaml"
        self.site_config.write_text(yaml.safe_dump(config))
        command = [require(bin_dir / "ocs-agent-cli"), "--site-file", self.site_config, "--instance-id", self.instance]
        super().__init__(command, folder / f"{self.instance}.log", cwd=folder)

    def start(self) -> None:
        """Start it, and wait until it records."""
        super().start()
        self.client = self.wait_for(self._connected, 30, "answered a client")
        self.wait_for(lambda: self.client.record.status().session.get("status") == "running", 10, "recorded")

    def stop(self, deadline_s: float = 15) -> int | None:
        """Kill it: it is not under test, and does not stop on request while it is degraded."""
        self.kill()
        return None

    def _connected(self) -> OCSClient | None:
        try:
            return OCSClient(self.instance, args=["--site-file", str(self.site_config)])
        except RuntimeError:  # OCS raises this while the agent is not connected
            return None

    def __str__(self) -> str:
        return self.instance


def aggregator(folder: Path, monitor: Agent) -> Reader:
    """Return the aggregator. It writes below `folder`/hk."""
    arguments = [["--initial-state", "record"], ["--data-dir", str(folder / "hk")]]
    return Reader(folder, monitor, "AggregatorAgent", arguments, AGGREGATOR_BIN)


def read_g3(folder: Path) -> list[tuple[str, str, str, float, Any]]:
    """Return all samples that the aggregator of `folder` wrote: address, block, field, time, value."""
    paths = sorted((folder / "hk").glob("*/*.g3"))
    assert paths, "the aggregator wrote no file"
    done = subprocess.run(
        [AGGREGATOR_BIN / "python", "-c", _READ_G3, *paths], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


class InfluxDB(Process):
    """A real, empty InfluxDB on the loopback interface, with its files in a scratch folder."""

    DATABASE = "ocs_feeds"

    def __init__(self, folder: Path) -> None:
        self.port = free_tcp_port()
        config = folder / "influxdb.conf"
        config.write_text(f"""
            reporting-disabled = true
            bind-address = "127.0.0.1:{free_tcp_port()}"
            [meta]
            dir = "{folder}/influxdb/meta"
            [data]
            dir = "{folder}/influxdb/data"
            wal-dir = "{folder}/influxdb/wal"
            [monitor]
            store-enabled = false
            [http]
            bind-address = "127.0.0.1:{self.port}"
        """)
        super().__init__([require("influxd"), "-config", config], folder / "influxdb.log", cwd=folder)

    def start(self) -> None:
        """Start it, wait until it answers, and create the database. The publisher would do so only after it records."""
        super().start()
        self.wait_for(self._answers, 30, "answered")
        statement = urllib.parse.urlencode({"q": f"CREATE DATABASE {self.DATABASE}"}).encode()
        urllib.request.urlopen(f"http://127.0.0.1:{self.port}/query", statement, timeout=30).close()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ping", timeout=5) as reply:
                return reply.status == 204
        except OSError:
            return False

    def publisher(self, folder: Path, monitor: Agent) -> Reader:
        """Return OCS's publisher, configured for this database."""
        arguments = [["--host", "127.0.0.1"], ["--port", self.port], ["--database", self.DATABASE]]
        return Reader(folder, monitor, "InfluxDBAgent", arguments, OWN_BIN)

    def query(self, statement: str) -> list[dict[str, Any]]:
        """Return the series that answer a query."""
        words = urllib.parse.urlencode({"db": self.DATABASE, "q": statement, "epoch": "ns"})
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/query?{words}", timeout=30) as reply:
            (result,) = json.load(reply)["results"]
        assert "error" not in result, result
        series: list[dict[str, Any]] = result.get("series", [])
        return series

    def samples(self, monitor: Agent) -> list[tuple[str, str, int, Any]]:
        """Return all samples of an agent: feed, field, time (unix nanoseconds), value."""
        return [
            (series["tags"]["feed"], field, row[0], value)
            for series in self.query(f'SELECT * FROM "observatory.{monitor.INSTANCE}" GROUP BY feed')
            for row in series["values"]
            for field, value in zip(series["columns"][1:], row[1:], strict=True)
            if value is not None
        ]

    def types(self, monitor: Agent) -> dict[str, str]:
        """Return the type of each field of an agent."""
        shown = self.query(f'SHOW FIELD KEYS FROM "observatory.{monitor.INSTANCE}"')
        return {field: kind for series in shown for field, kind in series["values"]}
