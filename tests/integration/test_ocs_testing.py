"""The fixtures of `ocs.testing`, the field's way to test agents, start and drive this agent."""

from __future__ import annotations

import os
from pathlib import Path

import ocs
import pytest
from ocs.ocs_client import OCSClient
from ocs.testing import create_agent_runner_fixture, create_client_fixture

from tests.testbed.ports import free_udp_port
from tests.testbed.processes import OWN_BIN, ROOT, Agent, Router, rows, write_site_config
from tests.testbed.smurf_server import SmurfServer

run_agent = create_agent_runner_fixture(str(ROOT / "socs_monitor" / "agent.py"), "pysmurf_monitor")
client = create_client_fixture(Agent.INSTANCE)


class Site:
    """The files that the fixtures expect in the working directory."""

    def __init__(self, folder: Path, router: Router) -> None:
        self.udp_port = free_udp_port()
        self.db_path = folder / "suprsync.db"
        write_site_config(folder / "default.yaml", router, self.udp_port, self.db_path, [["--test-mode"]])
        (folder / ".coveragerc").write_text("[run]\nsource = socs_monitor\n")


@pytest.fixture
def site(tmp_path: Path, router: Router, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{OWN_BIN}:{os.environ['PATH']}")  # the runner starts `python`
    monkeypatch.setenv("OCS_CONFIG_DIR", "the fixtures set this; monkeypatch restores it")
    return Site(tmp_path, router)


@pytest.mark.usefixtures("site", "run_agent")
def test_run_registers_the_announced_files_and_ends(site: Site, client: OCSClient, tmp_path: Path) -> None:
    with SmurfServer(tmp_path / "data", ("127.0.0.1", site.udp_port)) as server:
        sent = server.send(server.messages(12))
    assert client.run.start(test_mode=True).status == ocs.OK
    reply = client.run.wait(timeout=10)

    assert (reply.status, reply.session["success"]) == (ocs.OK, True), reply
    assert client.run.status().session["op_code"] == ocs.OpCode.SUCCEEDED.value
    assert [row["local_path"] for row in rows(site.db_path)] == [message.file for message in sent]
