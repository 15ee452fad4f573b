"""`socs-monitor status` with real agents: running, stopped, killed, and without a router."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from socs_monitor.cli import client, status
from socs_monitor.cli import main as cli
from socs_monitor.cli.health import Health, State
from socs_monitor.cli.shared import CommandError
from socs_monitor.spool import file as spoolfile
from socs_monitor.wire.publisher import Publisher
from tests.integration.test_cli import command, run, site
from tests.integration.test_end_to_end import announce, data, files, wait_registered
from tests.silent import silent_router
from tests.testbed.processes import OWN_BIN, PEER_BIN, Agent, Router, wait_until

StartAgent = Callable[..., Agent]

ALL_WELL, UNKNOWN, DEGRADED, NOT_RUNNING = 0, 1, 3, 4


def report(words: Sequence[str]) -> Health:
    """The health that the command would print."""
    return status.evaluate(cli.make_parser(["status"]).parse_args(["status", *words]))


def ask(monitor: Agent, *words: str, code: int, **env: str) -> str:
    """Run the command as a process, check its exit code, and return its output."""
    done = run(OWN_BIN / "socs-monitor", "status", *site(monitor), *words, env=env)
    assert (done.returncode, done.stderr) == (code, ""), done.stdout + done.stderr
    return done.stdout


def spool(monitor: Agent) -> str:
    return f"{monitor.db_path}.{monitor.INSTANCE}.spool"


def elsewhere(monitor: Agent, url: str) -> list[str]:
    """The options that select an agent via another router."""
    path = monitor.site_config.with_name("elsewhere.yaml")
    path.write_text(re.sub(r"(?m)^( *wamp_http): .*$", rf"\1: {url}", monitor.site_config.read_text()))
    return ["--site-file", str(path), "--site-host", "localhost"]


def without_router(monitor: Agent) -> list[str]:
    return elsewhere(monitor, "http://127.0.0.1:1/call")


def registered(agent: StartAgent, tmp_path: Path) -> Agent:
    """An agent that is connected to the router and has registered 3 files."""
    monitor = agent()
    wait_registered(monitor, announce(monitor, tmp_path / "data", 3))
    client = monitor.client()
    monitor.wait_for(lambda: files(client).get("registered") == 3, 10, "tells of them")
    return monitor


def with_pending(agent: StartAgent, tmp_path: Path) -> Agent:
    """An agent with a pending file, because it has no database."""
    monitor = agent(options=[["--create-table", False]])
    client = monitor.client()
    announce(monitor, tmp_path / "data", 1)
    monitor.wait_for(lambda: "database" in data(client).get("degraded", {}), 10, "misses the database")
    return monitor


def test_all_is_well(agent: StartAgent, tmp_path: Path) -> None:
    monitor = registered(agent, tmp_path)

    shown = ask(monitor, code=ALL_WELL)
    assert "all well" in shown
    assert "3 received = 3 registered + 0 pending + 0 waiting + 0 dead + 0 discarded" in shown
    assert ask(monitor, "--brief", code=ALL_WELL) == "all well\n"
    told = json.loads(ask(monitor, "--json", code=ALL_WELL))
    assert (told["state"], told["reasons"], told["note"]) == ("all well", {}, "")
    assert told["data"].keys() == data(monitor.client()).keys()
    assert told["data"]["files"]["registered"] == 3


def test_every_part_of_the_session_data_is_shown(agent: StartAgent, tmp_path: Path) -> None:
    monitor = registered(agent, tmp_path)
    with contextlib.closing(Publisher("crate1slot2", monitor.address)) as publisher:
        publisher.send(b"garbage")
    monitor.wait_for(lambda: data(monitor.client())["malformed"], 10, "counts it")

    shown = ask(monitor, code=ALL_WELL)
    rows = {line.strip("│ ").split("  ")[0] for line in shown.splitlines()}
    assert {
        "files",
        "last file",
        "datagrams",
        "malformed",
        "queue",
        "lost",
        "socket",
        "database",
        "spool",
        "streams",
    } <= rows


def test_losses_are_shown_with_their_sender(agent: StartAgent) -> None:
    monitor = agent()
    client = monitor.client()
    with contextlib.closing(Publisher("crate1slot2", monitor.address)) as publisher:
        publisher.start()
        publisher.encode({}, "general")  # and not sent
        publisher.stop()
    monitor.wait_for(lambda: "messages_lost" in data(client).get("degraded", {}), 10, "misses it")

    shown = ask(monitor, code=DEGRADED)
    assert "1 missing by sequence number, 0 dropped by the kernel" in shown
    assert "1 from crate1slot2 undeclared at 127.0.0.1:" in shown


@pytest.mark.skipif(not (PEER_BIN / "ocs-agent-cli").exists(), reason="the published agent is not installed")
def test_the_published_agent_is_supported(agent: StartAgent) -> None:
    monitor = agent(bin_dir=PEER_BIN)
    client = monitor.client()
    monitor.wait_for(lambda: client.run.status().session.get("status") == "running", 10, "runs")
    assert "all well" in ask(monitor, code=ALL_WELL)


def test_degraded_has_reasons(agent: StartAgent, tmp_path: Path) -> None:
    monitor = with_pending(agent, tmp_path)

    assert "DEGRADED" in (shown := ask(monitor, code=DEGRADED))
    assert f"database: the database {monitor.db_path} does not exist" in shown
    assert ask(monitor, "--brief", code=DEGRADED).startswith("degraded; database: the database")
    assert "database" in json.loads(ask(monitor, "--json", code=DEGRADED))["reasons"]


def test_a_stopped_operation_is_not_running(agent: StartAgent, tmp_path: Path) -> None:
    monitor = registered(agent, tmp_path)
    monitor.client().run.stop()
    monitor.client().run.wait(timeout=20)

    assert ask(monitor, "--brief", code=NOT_RUNNING) == (
        "not running; run: The operation run is done: files are not registered. Start it, or restart the agent\n"
    )
    assert "NOT RUNNING" in ask(monitor, code=NOT_RUNNING)


def test_without_a_router_spool_database_and_kernel_are_read(agent: StartAgent, tmp_path: Path) -> None:
    monitor = registered(agent, tmp_path)
    paths = [row["local_path"] for row in monitor.rows()]

    shown = command("status", *without_router(monitor), code=ALL_WELL)
    assert "does not answer. Files are registered without it." in shown
    assert "This status is from spool, database and kernel." in shown
    for part in (paths[-1], "listening", "0 waiting, 0 dead", "0 dropped by the kernel"):
        assert part in shown
    wait_registered(monitor, [*paths, *announce(monitor, tmp_path / "more", 2, "more")])


def test_without_a_router_a_backlog_is_detected(
    agent: StartAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = with_pending(agent, tmp_path)
    without = without_router(monitor)
    begin = time.time()

    assert report(without).reasons.keys() == {"database"}  # there is none
    monkeypatch.setattr(status.time, "time", lambda: begin + 100)
    found = report(without)
    assert found.state is State.DEGRADED
    assert re.search(r"has been pending for 1\d\d s", found.reasons["backlog"])
    assert found.data["files"]["pending"] == 1


def test_without_a_router_a_growing_file_is_not_a_backlog(
    agent: StartAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = registered(agent, tmp_path)
    begin = time.time()
    monitor.kill()  # nothing is settled from now on, as if all the files grew
    monkeypatch.setattr(status.time, "time", lambda: begin + 100)

    files = report(site(monitor)).data["files"]
    assert (files["settling"], files["pending"]) == (3, 0)
    assert "backlog" not in report(site(monitor)).reasons


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_stopped_agent_is_not_running_and_nothing_is_changed(agent: StartAgent, tmp_path: Path, end: str) -> None:
    monitor = registered(agent, tmp_path)
    monitor.stop() if end == "stopped" else monitor.kill()
    without = without_router(monitor)

    def state() -> dict[str, bytes]:
        """Names and contents; that of the shared memory has no meaning while nobody runs."""
        found = [path for path in monitor.db_path.parent.iterdir() if path.is_file() and path != monitor.log_path]
        return {path.name: b"" if path.name.endswith("-shm") else path.read_bytes() for path in found}

    before = state()
    for words in (site(monitor), without):
        shown = command("status", *words, code=NOT_RUNNING)
        assert "The agent is not running: messages sent now are lost. Start it." in shown
        assert "0 waiting, 0 dead" in shown
    assert state() == before


def test_a_running_agent_without_a_connection_is_unknown(agent: StartAgent, tmp_path: Path) -> None:
    monitor = registered(agent, tmp_path)
    with Router(tmp_path / "other") as other:
        shown = command("status", *elsewhere(monitor, other.http_url), code=UNKNOWN)
    assert "UNKNOWN" in shown
    assert "The router is up, but no agent 'pysmurf-monitor' is connected." in shown
    assert "listening" in shown


def test_without_site_config_and_spool_the_status_is_unknown(tmp_path: Path) -> None:
    shown = command("status", "--db-path", tmp_path / "none.db", code=UNKNOWN)
    assert "No site config given. Use --site-file, or set OCS_CONFIG_DIR." in shown
    assert "Run this on the agent's host, or use --spool-path or --db-path." in shown


@contextlib.contextmanager
def deaf_router() -> Iterator[int]:
    """A router that hangs: connections are made, and that is all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("router_", "code", "said"),
    [
        (silent_router, UNKNOWN, "The router is up, but agent 'pysmurf-monitor' did not reply within 0 s."),
        (deaf_router, ALL_WELL, "does not answer. Files are registered without it."),
    ],
)
def test_a_hanging_agent_or_router_is_detected(
    agent: StartAgent,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    router_: Callable[[], object],
    code: int,
    said: str,
) -> None:
    monitor = registered(agent, tmp_path)
    monkeypatch.setattr(client, "_AGENT_S", 0.3)
    monkeypatch.setattr(client, "_ROUTER_S", 0.3)
    with router_() as port:
        found = report(elsewhere(monitor, f"http://127.0.0.1:{port}/call"))
    assert found.state.value == code
    assert said in found.note


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ('{"args": [[-1, "No task or process called \\"run\\"", {}]]}', "Agent 'other' is not a PysmurfMonitor"),
        ('{"error": "wamp.error.not_authorized"}', "The router rejected the call (wamp.error.not_authorized)."),
        ("<html>", "is not an OCS router"),
    ],
)
def test_an_unexpected_reply_is_explained(tmp_path: Path, reply: str, said: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as router:
        hub = f"wamp_server: ws://x, wamp_http: 'http://127.0.0.1:{router.server_port}', wamp_realm: x, address_root: x"
        (tmp_path / "site.yaml").write_text(f"hub: {{{hub}}}\nhosts: {{}}\n")
        words = ["status", "--site-file", str(tmp_path / "site.yaml"), "--instance-id", "other"]
        thread = threading.Thread(target=router.handle_request)
        thread.start()
        with pytest.raises(CommandError) as error:
            client.run_session(cli.make_parser(["status"]).parse_args(words))
        thread.join()
    assert said in str(error.value)


def test_without_a_router_a_socket_of_another_process_is_not_the_agents(agent: StartAgent, tmp_path: Path) -> None:
    monitor = registered(agent, tmp_path)
    words = without_router(monitor)
    monitor.stop()
    bind = (
        "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
        f" s.bind(('127.0.0.1', {monitor.udp_port})); print('bound', flush=True); sys.stdin.read()"
    )
    with spoolfile.take_lock(spool(monitor)):  # as an agent that has lost its socket
        assert report(words).reasons.keys() == {"socket"}
        with subprocess.Popen([sys.executable, "-c", bind], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"bound\n"
            assert report(words).reasons.keys() == {"socket"}
            other.communicate()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
            own.bind(("127.0.0.1", monitor.udp_port))
            assert report(words).state is State.ALL_WELL


def test_text_from_senders_is_displayed_literally(agent: StartAgent, tmp_path: Path) -> None:
    odd = ["/a/[/bold]x", "/a/[red]x[/red]", "/a/\x1b[31mred", "/a/\x1b]0;title\x07", "/a/\u202egpj.exe"]
    monitor = agent(options=[["--give-up-after", 0]])
    with contextlib.closing(Publisher("[/]\x1b[2J", monitor.address)) as publisher:
        for path in odd:
            publisher.data_file(path, action="[red]", action_ts="1700000000")
            publisher.encode({}, "general")  # and not sent: it is named as one whose messages are lost
    of_agent = monitor.client()
    monitor.wait_for(lambda: files(of_agent).get("dead") == len(odd), 10, "has no place for them")
    monitor.wait_for(lambda: "messages_lost" in data(of_agent)["degraded"], 10, "misses others")

    done = run(OWN_BIN / "socs-monitor", "status", *site(monitor))
    assert (done.returncode, done.stderr) == (DEGRADED, "")
    assert "[/]\\x1b[2J" in done.stdout
    assert all(character.isprintable() or character == "\n" for character in done.stdout), repr(done.stdout)


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_watching_refreshes_and_ends_cleanly(agent: StartAgent, tmp_path: Path, signal_: signal.Signals) -> None:
    monitor = registered(agent, tmp_path)
    terminal, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    background = ["sh", "-c", 'trap "" INT; exec "$0" "$@"']  # as nohup and `&` in a script: SIGINT is ignored
    watch = [*background, OWN_BIN / "socs-monitor", "status", "--watch", *site(monitor)]
    seen = b""
    with subprocess.Popen(watch, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True) as watcher:
        os.close(slave)
        os.set_blocking(terminal, False)

        def shows(what: bytes) -> bool:
            nonlocal seen
            with contextlib.suppress(BlockingIOError, OSError):
                seen += os.read(terminal, 65_536)
            return what in seen

        try:
            wait_until(lambda: shows(b"3 registered"), 20, "it shows the files")
            announce(monitor, tmp_path / "more", 4, "more")
            wait_until(lambda: shows(b"7 registered"), 20, "it shows more")
            watcher.send_signal(signal_)
            wait_until(lambda: shows(b"\x1b[?1049l") and watcher.poll() is not None, 20, "it ends")
        finally:
            watcher.kill()
    shows(b"")
    os.close(terminal)
    after = seen.partition(b"\x1b[?1049l")[2]
    assert watcher.returncode == ALL_WELL
    assert b"7 registered" in after  # the last view stays
    assert b"Traceback" not in seen


def test_environment_variables_select_the_agent(agent: StartAgent, tmp_path: Path) -> None:
    monitor = registered(agent, tmp_path)
    config = monitor.site_config.read_text()
    url = re.findall("wamp_http: (.*)", config)[0]
    config = config.replace(url, "http://127.0.0.1:1/call").replace("localhost:", "server21:")
    (tmp_path / "default.yaml").write_text(config)

    def told(code: int, **env: str) -> str:
        done = run(OWN_BIN / "socs-monitor", "status", "--brief", env={"OCS_CONFIG_DIR": str(tmp_path), **env})
        assert (done.returncode, done.stderr) == (code, ""), done.stdout
        return done.stdout

    assert told(ALL_WELL, SITE_HTTP=url) == "all well\n"
    assert "no agent 'another' is connected" in told(UNKNOWN, SITE_HTTP=url, INSTANCE_ID="another")
    assert "The router at http://127.0.0.1:1/call does not answer." in told(ALL_WELL, SITE_HOST="server21")
    assert "no usable entry for agent 'pysmurf-monitor' on this host" in told(UNKNOWN)


def test_exit_codes_are_in_the_help() -> None:
    said = command("status", "--help")
    assert re.search(r"0 all well; 1 .*asked; 2 .*usage; 3 degraded.*; 4 not running", " ".join(said.split()))


def test_the_health_check_imports_no_heavy_packages(agent: StartAgent) -> None:
    monitor = agent()
    monitor.client()
    words = ["status", "--brief", *site(monitor)]
    program = f"import sys; from socs_monitor.cli.main import main; main({words!r}); print(*sys.modules)"

    health, modules = run(sys.executable, "-c", program).stdout.splitlines()
    assert health == "all well"
    assert not {"pydantic", "sqlalchemy", "twisted", "rich", "requests"} & {*modules.split()}
